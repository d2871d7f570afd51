"""The command line: parse, call one function, print.

``app``       puts the commands together; an error of ours becomes one line (read this first)
``common``    options that many commands share, settings from them, tables and JSON
``setup``     init, serve, demo
``learn``     train
``run``       run: one command, or the task pool
``tasks``     tasks: list, add, show, cancel
``records``   rollouts, spans, reward
``exchange``  export, import
``policies``  policies: list, promote, rollback
``status``    status

Rooms are imported inside the commands that need them, so that ``--help`` is quick and ``serve``
never loads the trainer.
"""

from lightning_proxy.cli.app import app

__all__ = ["app"]
