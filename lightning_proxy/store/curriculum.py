"""Which tasks are worth another group: those whose rollouts still disagree.

A group whose returns are all equal has no advantage: GRPO learns nothing from it. DAPO's dynamic
sampling (arXiv 2503.14476, section 3.2) draws prompts until the batch holds only groups with an
accuracy strictly between 0 and 1. Here a group costs an agent's whole run, so it is decided before
it is begun, from what the task's last rollouts earned; it is *not* DAPO's filter after the fact.

Pure functions, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_proxy.store.task_records import Standing

GROUPS_LOOKED_AT = 2  # a task's standing is that of its last 2 x group_size rewarded rollouts
FIRST_SEEN = 2  # rewarded rollouts from which on there is something to compare
RETRIED_ONE_IN = 10  # rounds of a solved or hopeless task that are carried out all the same
_SAME = 1e-9  # largest difference of returns that are equal, as in the advantages


def standing_of(returns: Sequence[float]) -> Standing:
    """What the returns of a task's last rewarded rollouts say of it.

    For rewards of 0 and 1 ``MIXED`` is a success rate strictly between 0 and 1.
    """
    if len(returns) < FIRST_SEEN:
        return Standing.UNSEEN
    if max(returns) - min(returns) > _SAME:
        return Standing.MIXED
    return Standing.SOLVED if min(returns) > 0 else Standing.HOPELESS


def is_skipped(standing: Standing, position: int, round_: int) -> bool:
    """Whether a task's round is left out.

    Solved and hopeless tasks are carried out in one round of ten, each task in its own turn by its
    position in the pool, so that none is lost for ever and a tenth of them is in every round.
    """
    if standing in (Standing.UNSEEN, Standing.MIXED):
        return False
    return (position + round_) % RETRIED_ONE_IN != 0
