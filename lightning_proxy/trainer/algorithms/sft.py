"""Supervised fine-tuning: on the best of what was sampled, and on what was demonstrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lightning_proxy.store import PolicyVersion, RecordedRollout
from lightning_proxy.trainer.algorithms.base import Batch, Bench
from lightning_proxy.trainer.algorithms.candidates import Candidates, Picked, candidates, key_of
from lightning_proxy.trainer.backend import Backend
from lightning_proxy.trainer.batches import Rows
from lightning_proxy.trainer.trajectories import Trajectory, merge
from lightning_proxy.trainer.transitions import LeftOut, Reason, TrainableRollout


class Sft:
    """Maximum likelihood: ``L = -sum_t log p(token_t | those before it) / T`` over all T trained tokens.

    By verl's own ``sft_loss``. Trained are the rollouts with the highest return of their group, if that is at
    least ``[train] sft_min_return``: with rewards of 0 and 1 all that were right (STaR, arXiv 2203.14465),
    with graded ones the best of those sampled (RAFT, arXiv 2304.06767); and demonstrations. What a
    demonstration corrects is not trained on. Online: each pass samples anew from what the last one made.

    It assumes that what is best is good: there is no baseline, and nothing is made less likely. A call that
    counts for a part only (``failures``) weighs that much. It is no policy gradient: what is trained on may
    have been sampled by anybody, at any temperature.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def choose(self, recorded: Sequence[RecordedRollout], parent: PolicyVersion | None) -> Picked:
        """The best rollouts and the demonstrations."""
        settings = self._bench.settings
        found = candidates(recorded, settings, parent, self._bench.versions())
        return picked(found, settings.train.sft_min_return)

    def batch(self, chosen: Picked) -> Batch | None:
        """Rows; ``None`` where there is nothing to train on."""
        return chosen.batch()

    def compare(self, backend: Backend, rows: Rows, parent: PolicyVersion) -> Rows:
        """Nothing: the loss is about the new weights alone."""
        return rows

    def weigh(self, rows: Rows, mini_batches: int) -> Rows:
        """Every trained token (its part of it) the same, as ``batches.weigh`` has it."""
        return replace(rows, weights=rows.advantages * np.float32(mini_batches / max(rows.trained_tokens, 1)))

    def step(self, backend: Backend, rows: Rows) -> Mapping[str, float]:
        """``nll``: the loss; ``grad_norm``."""
        return backend.update(rows)

    def after(self, backend: Backend, rows: Rows) -> Mapping[str, float]:
        """Nothing: the loss of the last epoch tells."""
        return {}

    def in_words(self, means: Mapping[str, float]) -> str:
        """The loss."""
        return f"{means['nll']:.4g} nats a token"


def picked(found: Candidates, min_return: float) -> Picked:
    """The best of each group, if good enough, and the demonstrations, as rows."""
    by_group = found.by_group()
    best = [
        rollout for members in by_group.values() for rollout in _best(members, min_return, found.left_out)
    ]
    corrected = frozenset(each.answered.span_id for each in found.demonstrations)
    by_reward = [row for rollout in best for row in _rows(rollout, corrected)]
    shown = [replace(each.right, advantage=each.right.part) for each in found.demonstrations]
    by_demonstration = [row for each in shown for row in merge([each])]
    return Picked(
        f"{len(best)} rollouts and {len(shown)} demonstrations",
        [*by_reward, *by_demonstration],
        found,
        {
            "groups": len(by_group),
            "rows_by_reward": len(by_reward),
            "rows_by_demonstration": len(by_demonstration),
        },
        {rollout.rollout_id: key_of(group) for group, members in by_group.items() for rollout in members},
    )


def _best(
    members: Sequence[TrainableRollout], min_return: float, left_out: LeftOut
) -> list[TrainableRollout]:
    """All that share the highest return, also of those that earlier runs compared these with."""
    former = [companion.value for rollout in members for companion in rollout.companions]
    highest = max([*former, *(rollout.value for rollout in members)])
    best = [rollout for rollout in members if rollout.value == highest]
    if len(best) < len(members):
        left_out.rollouts[Reason.BELOW_BEST] += len(members) - len(best)
    if best and highest < min_return:
        left_out.rollouts[Reason.BELOW_MIN_RETURN] += len(best)
        return []
    return best


def _rows(rollout: TrainableRollout, corrected: frozenset[int | None]) -> list[Trajectory]:
    return merge(
        [
            replace(each, advantage=each.part)
            for each in rollout.transitions
            if each.span_id is None or each.span_id not in corrected
        ]
    )
