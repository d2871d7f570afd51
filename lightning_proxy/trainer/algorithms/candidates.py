"""What SFT and DPO have in common: what was drained, as far as likelihood can be learnt from it.

Both learn how likely the model should make tokens, not how a sampler should choose. So it does not matter
at which temperature a call was made, nor whether the engine told its logprobs; token ids are needed, the
engine's own or verified ones (``Fidelity.RETOKENIZED``). All is taken from the model's own distribution.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_proxy.config.settings import Settings
from lightning_proxy.errors import TrainingError
from lightning_proxy.store import PolicyVersion, RecordedRollout
from lightning_proxy.trainer.algorithms.base import Batch
from lightning_proxy.trainer.algorithms.demonstrations import Demonstrated, demonstrations_of
from lightning_proxy.trainer.backend import Answers, open_answers
from lightning_proxy.trainer.batches import pack
from lightning_proxy.trainer.failures import Consequences, FailureCounts
from lightning_proxy.trainer.grouped import look_at, terms_of
from lightning_proxy.trainer.groups import group_of
from lightning_proxy.trainer.guard import Look
from lightning_proxy.trainer.trajectories import Trajectory
from lightning_proxy.trainer.transitions import Group, LeftOut, TrainableRollout, trainable_rollouts


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rewarded rollouts and demonstrations that can be trained on; what is left out so far, and why."""

    rollouts: Sequence[TrainableRollout]
    demonstrations: Sequence[Demonstrated]
    left_out: LeftOut = field(default_factory=LeftOut)
    failures: FailureCounts = field(default_factory=FailureCounts)
    reward_mean: float | None = None  # of all rollouts drained for their return
    parent: int | None = None  # the version that the pass begins with

    def by_group(self) -> dict[Group, list[TrainableRollout]]:
        """The rollouts of each group (``groups``), in order."""
        members: dict[Group, list[TrainableRollout]] = {}
        for rollout in self.rollouts:
            members.setdefault(group_of(rollout), []).append(rollout)
        return members


@dataclass(frozen=True, slots=True)
class Picked:
    """A ``Chosen`` of SFT or DPO: the rows are made already."""

    subject: str
    rows: Sequence[Trajectory]
    candidates: Candidates
    counts: Mapping[str, int]  # the algorithm's own
    keys: Mapping[str, str]
    for_later: Sequence[str] = ()
    # Here a group without spread is no loss of gradient that the guard should hear of.
    mixed: int = 0
    equal: int = 0

    @property
    def look(self) -> Look | None:
        """At what the parent version did."""
        found = self.candidates
        if found.parent is None:
            return None
        look = look_at(found.rollouts, found.parent, but=frozenset(self.for_later))
        return None if look is None else replace(look, entropy=None)  # greedy calls say nothing of it

    def trajectories(self) -> list[Trajectory]:
        """The rows."""
        return list(self.rows)

    def batch(self) -> Batch | None:
        """The rows, packed; ``None`` where there are none."""
        return Batch(pack(self.rows), self.rows) if self.rows else None

    def for_report(self) -> dict[str, Any]:
        """What a report says of it, by the report's own names."""
        transitions = [piece.transition for row in self.rows for piece in row.pieces]
        used = {transition.rollout_id for transition in transitions}
        rewarded = [each for each in self.candidates.rollouts if each.rollout_id in used]
        methods = Counter(group_of(each).method for each in rewarded)
        look = self.look
        return {
            "counts": {
                "rollouts": len(used),
                "transitions": len(transitions),
                "given_back": len(self.for_later),
                "again": sum(each.again for each in rewarded),
                **self.counts,
            },
            "left_out": self.candidates.left_out.as_dict(),
            "failures": self.candidates.failures.as_dict(),
            "grouped_by": dict(methods),
            "reward_mean": self.candidates.reward_mean,
            "rewards": None if look is None else look.rewards,
        }


def candidates(
    recorded: Sequence[RecordedRollout],
    settings: Settings,
    parent: PolicyVersion | None,
    versions: Iterable[PolicyVersion] = (),
) -> Candidates:
    """What of the drained can be trained on; everything else is counted.

    ``parent`` and ``versions`` as for ``grouped``. What failures do (``failures``) is about returns and what
    earned them: a demonstration stands whatever went wrong, and however old the call is.
    """
    left_out = LeftOut()
    terms = terms_of(settings, parent, versions, sampled=False)
    for_return = [each for each in recorded if each.for_return]
    consequences = Consequences(settings.failures.training, terms, left_out)
    rollouts = trainable_rollouts(consequences.keep(for_return), terms, left_out)
    rollouts = consequences.apply(rollouts)
    shown = demonstrations_of(recorded, terms, functools.cache(lambda: _answers(settings, parent)), left_out)
    values = [each.value for each in for_return if each.value is not None]
    return Candidates(
        rollouts,
        shown,
        left_out,
        consequences.counts,
        float(np.mean(values)) if values else None,
        None if parent is None else parent.version,
    )


def key_of(group: Group) -> str:
    """The group as the store remembers it."""
    return f"{group.method}:{group.key}"


def _answers(settings: Settings, parent: PolicyVersion | None) -> Answers:
    model = settings.policy.model if parent is None else Path(parent.path)
    if model is None:
        raise TrainingError(
            "demonstrations need the model's tokenizer: give [policy] model in lightning.toml"
        )
    return open_answers(model)
