"""A rollout's return: the one formula, wherever a return is computed or shown."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lightning_proxy.store.records import Reward

_LARGEST = sys.float_info.max


@dataclass(frozen=True, slots=True)
class Payment:
    """What one reward adds to a return: weight x value."""

    value: float
    span_id: int | None = None  # the call that it is for; None: the rollout or attempt as a whole
    roles: tuple[str, ...] = ()  # whose return it adds to; none: everybody's

    def goes_to(self, role: str | None) -> bool:
        """Whether it is part of this role's return."""
        return not self.roles or role in self.roles


@dataclass(frozen=True, slots=True)
class RewardRule:
    """How the rewards that count make up a return, and whether late ones open a rollout again.

    ``weights`` has a signed weight by the reward's name, negative where less is better; a name that is
    not in it has weight 1, and one of weight 0 is kept in the ledger only. ``roles`` has the roles that a
    reward is for, by its name; one that is not in it is for all. With ``late`` a rollout that
    was trained on waits for a run again once later rewards give it another return. ``wait_s``: how long the
    rollouts of a round of the task pool wait for those that nobody carries out, and for their rewards.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    late: bool = True
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    wait_s: float = 600.0

    def weight_of(self, name: str) -> float:
        """The signed weight of a reward."""
        return self.weights.get(name, 1.0)

    def payments(self, rewards: Iterable[Reward]) -> tuple[Payment, ...]:
        """What each of these adds to the return, in their order; without comments and weight 0."""
        return tuple(
            Payment(weight * reward.value, reward.span_id, self.roles.get(reward.name, ()))
            for reward in rewards
            if reward.value is not None and (weight := self.weight_of(reward.name))
        )

    def return_of(self, rewards: Iterable[Reward]) -> float | None:
        """The overall return, with the rewards of all roles. ``None`` where there is nothing to add up."""
        return add_up(self.payments(rewards))

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of weight 0."""
        return tuple(name for name, weight in self.weights.items() if not weight)


def add_up(payments: Iterable[Payment]) -> float | None:
    """The sum of what they add, as :func:`total` makes it."""
    return total(payment.value for payment in payments)


def total(paid: Iterable[float]) -> float | None:
    """The sum, rounded once, so that the order of the rewards makes no difference.

    ``None`` where there is nothing to add up: a missing reward is not a reward of 0. What is beyond a
    float is its largest number, so that no post can make a rollout unreadable.
    """
    values = list(paid)
    if not values:
        return None
    try:
        added = math.fsum(values)
    except (OverflowError, ValueError):  # beyond a float on the way, or infinities of both signs
        added = sum(max(-_LARGEST, min(_LARGEST, value)) for value in values)
    return max(-_LARGEST, min(_LARGEST, added))
