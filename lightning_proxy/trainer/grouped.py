"""From what was drained to groups that can be compared: everything that comes before the update engine.

``grouped`` is the summary; the result says of itself what a report has to say of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lightning_proxy.config.settings import Settings
from lightning_proxy.store import PolicyVersion, RecordedRollout, RewardRule
from lightning_proxy.trainer.ages import Ages
from lightning_proxy.trainer.credit import Credit
from lightning_proxy.trainer.drift import drifts
from lightning_proxy.trainer.failures import Consequences, FailureCounts
from lightning_proxy.trainer.groups import Grouping, form_groups, groups_of_recorded
from lightning_proxy.trainer.guard import Look
from lightning_proxy.trainer.sampling import engine_defaults
from lightning_proxy.trainer.trajectories import Trajectory, merge
from lightning_proxy.trainer.transitions import (
    LeftOut,
    Terms,
    TrainableRollout,
    Transition,
    trainable_rollouts,
)


@dataclass(frozen=True, slots=True)
class Grouped:
    """What can be trained on, in groups; what is left out, and why; what the parent version did."""

    grouping: Grouping
    left_out: LeftOut
    failures: FailureCounts
    reward_mean: float | None  # of all rollouts drained that have a return
    look: Look | None  # at what the parent version did; None where that is too little

    @property
    def subject(self) -> str:
        """What is trained on, in words."""
        return f"{len(self.grouping.trained)} rollouts of {self.mixed} groups"

    @property
    def for_later(self) -> tuple[str, ...]:
        """Rollouts whose group may still grow."""
        return self.grouping.for_later

    @property
    def keys(self) -> Mapping[str, str]:
        """Groups as the store remembers them."""
        return self.grouping.keys

    @property
    def mixed(self) -> int:
        """Groups whose returns differ."""
        return len(self.grouping.groups)

    @property
    def equal(self) -> int:
        """Groups whose returns do not."""
        return self.grouping.all_equal

    def trajectories(self) -> list[Trajectory]:
        """The rows that will be."""
        return [row for rollout in self.grouping.trained for row in merge(rollout.transitions)]

    def for_report(self) -> dict[str, Any]:
        """What a report says of it, by the report's own names."""
        trained = self.grouping.trained
        transitions = [transition for rollout in trained for transition in rollout.transitions]
        methods = Counter(
            group.method for rollout in trained if (group := rollout.transitions[0].group) is not None
        )
        return {
            "counts": {
                "rollouts": len(trained),
                "groups": len(self.grouping.groups),
                "groups_all_equal": self.grouping.all_equal,
                "transitions": len(transitions),
                "given_back": len(self.grouping.for_later),
                "again": sum(rollout.again for rollout in trained),
                "baseline_only": sum(map(len, self.grouping.groups)) - len(trained),
            },
            "groups": self.grouping.counts.as_dict(),
            "left_out": self.left_out.as_dict(),
            "failures": self.failures.as_dict(),
            "drift": _by_name(drifts(transitions)),
            "grouped_by": dict(methods),
            "policy_versions": _by_name(Counter(transition.policy_version for transition in transitions)),
            "reward_mean": self.reward_mean,
            "rewards": None if self.look is None else self.look.rewards,
            "entropy": None if self.look is None else self.look.entropy,
        }


class Members(Protocol):
    """Asks who was last trained on in a group."""

    def __call__(self, key: str, versions: Iterable[int | None] | None = None) -> Sequence[RecordedRollout]:
        """By its key in the store; with ``versions`` those that one of these answered."""


def grouped(
    recorded: Sequence[RecordedRollout],
    settings: Settings,
    parent: PolicyVersion | None,
    versions: Iterable[PolicyVersion],
    members: Members,
) -> Grouped:
    """The rollouts that can be trained on, in groups; every other one is counted.

    What failed by no fault of the policy is dropped first, so that groups never hold it against anybody.
    ``parent``: the version whose weights the update begins with, where that is known; ``versions``
    are all of the policy's. ``members``: who was last trained on in a group.
    """
    train, terms = settings.train, terms_of(settings, parent, versions)
    left_out = LeftOut()
    consequences = Consequences(settings.failures.training, terms, left_out)
    rollouts = trainable_rollouts(consequences.keep(recorded), terms, left_out)
    rollouts = consequences.apply(rollouts)
    # A full drain must not be blocked for ever by groups that never grow.
    may_wait = len(recorded) < train.max_rollouts
    here = {rollout.rollout_id for rollout in rollouts}
    near = None if terms.ages is None else terms.ages.near

    def recent(key: str) -> list[TrainableRollout]:
        return consequences.compared_with(members(key))

    def former(key: str, versions: Collection[int | None] | None) -> list[TrainableRollout]:
        return consequences.compared_with(members(key, near if versions is None else versions))

    grouping = form_groups(
        rollouts,
        min_size=train.min_group_size,
        may_wait=may_wait,
        left_out=left_out,
        credit=credit_of(settings),
        recent=recent if train.running_baseline else None,
        former=former,
        lost=groups_of_recorded((each for each in recorded if each.rollout.rollout_id not in here), terms),
    )
    values = [each.value for each in recorded if each.value is not None]
    return Grouped(
        grouping,
        left_out,
        consequences.counts,
        float(np.mean(values)) if values else None,
        None if parent is None else look_at(rollouts, parent.version, but=frozenset(grouping.for_later)),
    )


def credit_of(settings: Settings) -> Credit:
    """The credit assignment that the settings name."""
    train = settings.train
    return Credit(train.credit, train.discount, train.group_by_role)


def terms_of(
    settings: Settings,
    parent: PolicyVersion | None,
    versions: Iterable[PolicyVersion],
    *,
    sampled: bool = True,
) -> Terms:
    """What calls must be to be trained on; ``sampled`` as in ``Terms``. ``versions``: all of the policy."""
    model = settings.policy.model if parent is None else Path(parent.path)
    return Terms(
        settings.policy.name,
        settings.train.max_row_tokens,
        roles=settings.train.roles,
        version=None if parent is None else parent.version,
        ages=None if parent is None else Ages(parent, versions, settings.train.max_version_age),
        sampling_defaults=engine_defaults(model) if sampled else {},
        rule=RewardRule(**settings.reward_rule),
        normalised_prompts=settings.train.group_prompts == "normalised",
        sampled=sampled,
    )


def look_at(rollouts: Iterable[TrainableRollout], version: int, *, but: Collection[str] = ()) -> Look | None:
    """At the rollouts of which every trainable call was answered by this version.

    Each is looked at once, by the first run that uses it: neither by those that give it back (``but``), nor
    by those to which a late reward brings it again.
    """
    own = [
        rollout
        for rollout in rollouts
        if rollout.rollout_id not in but
        and not rollout.again
        and all(transition.sampled_by == version for transition in rollout.transitions)
    ]
    if len(own) < 2:
        return None
    values = np.array([rollout.value for rollout in own])
    rewards = {
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)),
        "min": float(values.min()),
        "max": float(values.max()),
        "count": len(own),
    }
    return Look(version, rewards, _entropy([each for rollout in own for each in rollout.transitions]))


def _entropy(transitions: Iterable[Transition]) -> float:
    """Nats a token: the mean of -log p over what a policy sampled estimates its entropy."""
    return float(-np.concatenate([np.asarray(each.logprobs) for each in transitions]).mean())


def _by_name(counts: Mapping[Any, int]) -> dict[str, int]:
    return {str(name): number for name, number in counts.items()}
