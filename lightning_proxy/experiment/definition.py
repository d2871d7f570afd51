"""What an experiment is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from lightning_proxy.experiment.curve import ExperimentResult

Split = Literal["train", "heldout"]


class AgentTask(Protocol):
    """Something to ask an agent, and the answer that is right."""

    @property
    def task_id(self) -> str: ...

    @property
    def answer(self) -> str: ...

    def arguments(self, folder: Path) -> list[str]:
        """The agent's arguments; a file that they name is written to ``folder``, once."""
        ...

    def for_grader(self, folder: Path) -> dict[str, Any]:
        """What ``grade`` has to know of it beside its id: ``answer``, or ``gold_query`` and ``db``."""
        ...


@dataclass(frozen=True, slots=True)
class Experiment:
    """An agent, the model that it calls, and tasks for it.

    ``make_tasks(seed, split, count, start=0)`` gives tasks ``start`` to ``start + count`` of a split.
    """

    title: str
    policy: str  # the model's name, which the agent asks for
    model: Path
    agent: Path  # a Python script
    make_tasks: Callable[..., Sequence[AgentTask]]
    python: str = sys.executable  # of the environment that has the agent's packages
    settings: Mapping[str, Any] = field(default_factory=dict)  # beside the loop's own, as in lightning.toml
    tasks_per_turn: int = 16
    runs_per_task: int = 8
    held_out_tasks: int = 64
    iterations: int = 24
    measure_sampled: bool = False  # held-out success at temperature 1 too, before and after
    stop_at: float | None = None  # held-out success at which we are content; None: all iterations are run
    stop_at_sampled: float = 0.8  # once sampling, which explores, succeeds this often too
    stop_after_s: float = 270.0  # or has had this long for it

    def is_content(self, result: ExperimentResult) -> bool:
        """Whether further iterations would show nothing new."""
        if self.stop_at is None:
            return False
        far = result.iterations[-1].reward >= self.stop_at_sampled or result.seconds >= self.stop_after_s
        return result.final >= self.stop_at and far
