"""Advantages: credit relative to the group's baseline, computed once per rollout.

A rollout counts once in its group's mean and standard deviation however many calls it made
(arXiv 2508.03680: credit first, then the advantage of a single-turn method).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_proxy.errors import TrainingError
from lightning_proxy.trainer.credit import Credit
from lightning_proxy.trainer.transitions import TrainableRollout

Returns = NDArray[np.float64]


class AdvantageEstimator(Protocol):
    """Advantages of ``R`` rollouts from their credits, given the group and the trained tokens of each."""

    def __call__(self, credits_R: Returns, groups_R: Sequence[int], lengths_R: Sequence[int]) -> Returns:
        """One finite advantage per rollout."""


def assign(
    groups: Sequence[Sequence[TrainableRollout]], *, credit: Credit, estimator: AdvantageEstimator
) -> list[TrainableRollout]:
    """The rollouts of all groups with credit and advantage (its ``part`` of it) on each transition.

    Those that are ``baseline_only`` count in their group's statistics and are left out of what is returned.
    Raises ``TrainingError`` where the estimator gives something that is not finite.
    """
    rollouts = [replace(rollout, transitions=credit(rollout)) for members in groups for rollout in members]
    groups_R = [number for number, members in enumerate(groups) for _ in members]
    lengths_R = [rollout.trained_tokens for rollout in rollouts]
    advantages_R = estimator(np.array([rollout.value for rollout in rollouts]), groups_R, lengths_R)
    if not np.isfinite(advantages_R).all():
        raise TrainingError("the advantage estimator gave a value that is not finite")
    return [
        replace(
            rollout,
            transitions=tuple(
                replace(each, advantage=float(value) * each.part) for each in rollout.transitions
            ),
        )
        for rollout, value in zip(rollouts, advantages_R, strict=True)
        if not rollout.baseline_only
    ]
