"""Runs unmodified agent commands as rollouts.

``command``   one command under a fresh rollout: its environment, its signals, its end (read this first)
``worker``    the same for every task of the pool: claims, leases, ends, signals
``process``   an agent's process group: started with a log, ended as a whole
``warden``    a program of its own, which ends the agents of a runner that died
``names``     what a runner is called, and how the next one knows that it is dead
``taskfile``  tasks from a JSONL file, and their fields in command and environment (no processes)
``pool``      each thing that can be asked of the task pool

Standard library only, beside ``errors``, ``client`` and the store's reading of a task: the proxy may
be on another machine.
"""

from lightning_proxy.runner.command import RolloutRequest, run_command
from lightning_proxy.runner.pool import enqueue, progress
from lightning_proxy.runner.taskfile import check_command, read_tasks
from lightning_proxy.runner.worker import Done, Runner, Work

__all__ = [
    "Done",
    "RolloutRequest",
    "Runner",
    "Work",
    "check_command",
    "enqueue",
    "progress",
    "read_tasks",
    "run_command",
]
