"""Credit assignment: what each transition is credited with of its rollout's return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning_proxy.trainer.transitions import TrainableRollout, Transition

Credit = Callable[[TrainableRollout], tuple[Transition, ...]]


def identical(rollout: TrainableRollout) -> tuple[Transition, ...]:
    """Every transition is credited with the whole return: ``r_t = R`` for all t (its ``part`` of it).

    The credit assignment of LightningRL as published (arXiv 2508.03680). It assumes that all calls
    of a rollout share in its outcome alike; it is not a return-to-go and does not discount.
    """
    return tuple(
        replace(transition, credit=rollout.value * transition.part) for transition in rollout.transitions
    )
