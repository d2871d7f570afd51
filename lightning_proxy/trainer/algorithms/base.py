"""What a pass asks of its algorithm, and what it gives it to work with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lightning_proxy.config.settings import Settings
from lightning_proxy.errors import TrainingError
from lightning_proxy.store import PolicyVersion, RecordedRollout, Store
from lightning_proxy.trainer.backend import Backend, open_backend
from lightning_proxy.trainer.batches import Floats, Rows
from lightning_proxy.trainer.guard import Look
from lightning_proxy.trainer.report import Progress, Stopwatch
from lightning_proxy.trainer.trajectories import Trajectory


class Note(Protocol):
    """Where an algorithm enters what the report has to say."""

    def __call__(self, **values: Any) -> None:
        """Values by the report's own names."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What a pass has at hand."""

    settings: Settings
    store: Store
    progress: Progress
    clock: Stopwatch
    note: Note

    def versions(self) -> list[PolicyVersion]:
        """All that the policy has."""
        return self.store.list_versions(self.settings.policy.name)

    def base_logprobs(self, backend: Backend, rows: Rows, parent: PolicyVersion, wanted_by: str) -> Floats:
        """Logprobs of version 0; ``TrainingError`` where its weights are gone. ``wanted_by``: a setting."""
        base = self.store.get_version(parent.policy, 0)
        if base.version == parent.version:
            return backend.logprobs(rows)
        if not Path(base.path).is_dir():
            raise TrainingError(
                f"[train] {wanted_by} needs the weights of version 0, which are gone from {base.path}"
            )
        self.progress("computing the logprobs of version 0")
        reference = open_backend(self.settings.train, Path(base.path))
        try:
            return reference.logprobs(rows)
        finally:
            reference.close()


@dataclass(frozen=True, slots=True)
class Batch:
    """What a pass trains on, as rows and as what they were made of."""

    rows: Rows
    trajectories: Sequence[Trajectory]


class Chosen(Protocol):
    """What of the drained can be trained on."""

    @property
    def subject(self) -> str:
        """What that is, in words."""

    @property
    def for_later(self) -> Sequence[str]:
        """Rollouts whose return a later run may make more of."""

    @property
    def keys(self) -> Mapping[str, str]:
        """The group that each rollout was compared in, as the store remembers it."""

    @property
    def look(self) -> Look | None:
        """At what the parent version did; ``None`` where that is too little."""

    @property
    def mixed(self) -> int:
        """Groups whose returns differ; with :attr:`equal`, where that decides over a gradient."""

    @property
    def equal(self) -> int:
        """Groups whose returns do not."""

    def trajectories(self) -> list[Trajectory]:
        """The rows that will be."""

    def for_report(self) -> dict[str, Any]:
        """What a report says of it, by the report's own names."""


ChosenT = TypeVar("ChosenT", bound=Chosen)


class Algorithm(Protocol[ChosenT]):
    """One way to learn, as the steps of a pass that differ from one to another."""

    def choose(self, recorded: Sequence[RecordedRollout], parent: PolicyVersion | None) -> ChosenT:
        """What of the drained can be trained on; the rest is counted. Needs neither torch nor verl."""

    def batch(self, chosen: ChosenT) -> Batch | None:
        """Rows; ``None`` where there is nothing to train on."""

    def compare(self, backend: Backend, rows: Rows, parent: PolicyVersion) -> Rows:
        """The rows with what the loss needs of the weights before the update."""

    def weigh(self, rows: Rows, mini_batches: int) -> Rows:
        """The rows with each token's share of the loss of a mini-batch."""

    def step(self, backend: Backend, rows: Rows) -> Mapping[str, float]:
        """One optimiser step on a mini-batch of these rows; its metrics."""

    def after(self, backend: Backend, rows: Rows) -> Mapping[str, float]:
        """What is measured on all rows after the update; empty: nothing."""

    def in_words(self, means: Mapping[str, float]) -> str:
        """The means of the steps' metrics, as a line of progress has them."""
