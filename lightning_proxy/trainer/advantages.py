"""Advantages: credit relative to the group's baseline, computed once per rollout, or once per step.

A rollout counts once in its group's mean and standard deviation however many calls it made
(arXiv 2508.03680: credit first, then the advantage of a single-turn method). Where each step is compared
by itself it counts once per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_proxy.errors import TrainingError
from lightning_proxy.trainer.credit import Credit, Place
from lightning_proxy.trainer.transitions import TrainableRollout

Returns = NDArray[np.float64]
_SAME = 1e-9  # largest difference, as a share of the numbers from 1 on, of credits that are equal


class AdvantageEstimator(Protocol):
    """Advantages of ``R`` credits, given what each is compared within and the trained tokens of each."""

    def __call__(self, credits_R: Returns, groups_R: Sequence[int], lengths_R: Sequence[int]) -> Returns:
        """One finite advantage per credit. In order of group, so that a batch's order makes no difference."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Credits that are compared with one another: of each member of a group at most one."""

    place: Place
    credits: Mapping[str, float]  # by rollout id

    @property
    def differs(self) -> bool:
        """Whether there is anything to learn from it."""
        values = self.credits.values()
        largest = max(map(abs, values))
        return max(values) - min(values) > _SAME * max(1.0, largest)


def compare(members: Sequence[TrainableRollout], credit: Credit, least: int) -> list[Comparison]:
    """What is compared within a group, by place.

    Of a role that fewer than ``least`` members have a return for, nothing is. A step that fewer than
    ``least`` reached is compared with the deepest step that as many reached: members that did not get
    further stand for themselves with that one.
    """
    credits = {member.rollout_id: credit.credits_of(member) for member in members}
    if not credit.by_step:
        at: dict[Place, dict[str, float]] = {}
        for rollout_id, of in credits.items():
            for place, value in of.items():
                at.setdefault(place, {})[rollout_id] = value
        return [Comparison(place, of) for place, of in at.items() if len(of) >= least or not credit.by_role]
    steps: dict[str | None, dict[str, list[float]]] = {}
    for rollout_id, of in credits.items():
        for place, value in of.items():  # in order of step
            steps.setdefault(place.role, {}).setdefault(rollout_id, []).append(value)
    return [
        comparison
        for role, of_members in steps.items()
        if len(of_members) >= least or not credit.by_role
        for comparison in _by_step(role, of_members, least)
    ]


def _by_step(role: str | None, values: Mapping[str, Sequence[float]], least: int) -> list[Comparison]:
    depths = sorted(map(len, values.values()), reverse=True)
    deepest = depths[min(least, len(depths)) - 1] - 1  # that `least` members reached
    found = []
    for step in range(depths[0]):
        credits = {
            rollout_id: of[step] if len(of) > step else of[deepest]
            for rollout_id, of in values.items()
            if len(of) > min(step, deepest)
        }
        found.append(Comparison(Place(role, step), credits))
    return found


def assign(
    groups: Sequence[Sequence[TrainableRollout]],
    *,
    credit: Credit,
    estimator: AdvantageEstimator,
    least: int = 2,
) -> list[TrainableRollout]:
    """The rollouts of all groups with credit and advantage (their ``part`` of it) on each transition.

    Those that are ``baseline_only`` count in their group's statistics and are left out of what is returned.
    Raises ``TrainingError`` where the estimator gives something that is not finite.
    """
    comparisons = sorted(
        ((_name(members), each) for members in groups for each in compare(members, credit, least)),
        key=lambda pair: (pair[0], _order(pair[1].place)),
    )
    entries = [
        (number, rollout_id, comparison.place, value)
        for number, (_, comparison) in enumerate(comparisons)
        for rollout_id, value in sorted(comparison.credits.items())
    ]
    lengths = _lengths(groups, credit)
    advantages_R = estimator(
        np.array([value for *_, value in entries]),
        [number for number, *_ in entries],
        [lengths.get((rollout_id, place), 0) for _, rollout_id, place, _ in entries],
    )
    if not np.isfinite(advantages_R).all():
        raise TrainingError("the advantage estimator gave a value that is not finite")
    found = {
        (rollout_id, place): (value, float(advantage))
        for (_, rollout_id, place, value), advantage in zip(entries, advantages_R, strict=True)
    }
    return [
        _assigned(rollout, credit, found)
        for members in groups
        for rollout in members
        if not rollout.baseline_only
    ]


def _assigned(
    rollout: TrainableRollout, credit: Credit, found: Mapping[tuple[str, Place], tuple[float, float]]
) -> TrainableRollout:
    transitions = []
    for each, place in zip(rollout.transitions, credit.places_of(rollout), strict=True):
        value, advantage = found[rollout.rollout_id, place]
        factor = credit.factor_of(rollout, each)
        transitions.append(replace(each, credit=value * factor, advantage=advantage * factor))
    return replace(rollout, transitions=tuple(transitions))


def _lengths(groups: Sequence[Sequence[TrainableRollout]], credit: Credit) -> Mapping[tuple[str, Place], int]:
    """Trained tokens, by rollout id and place."""
    lengths: dict[tuple[str, Place], int] = {}
    for members in groups:
        for rollout in members:
            for each, place in zip(rollout.transitions, credit.places_of(rollout), strict=True):
                key = rollout.rollout_id, place
                lengths[key] = lengths.get(key, 0) + len(each.response_ids)
    return lengths


def _name(members: Sequence[TrainableRollout]) -> tuple[str, str]:
    """What tells a group from others, wherever it stands in the batch."""
    group = next((each.group for member in members for each in member.transitions), None)
    return ("", min(member.rollout_id for member in members)) if group is None else (group.method, group.key)


def _order(place: Place) -> tuple[bool, str, int]:
    return place.role is not None, place.role or "", place.step or 0
