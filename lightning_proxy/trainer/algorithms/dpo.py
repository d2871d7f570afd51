"""Direct preference optimisation, on pairs from demonstrations and from groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightning_proxy.store import PolicyVersion, RecordedRollout
from lightning_proxy.trainer.algorithms.base import Batch, Bench
from lightning_proxy.trainer.algorithms.candidates import Candidates, Picked, candidates, key_of
from lightning_proxy.trainer.algorithms.demonstrations import Demonstrated
from lightning_proxy.trainer.backend import Backend
from lightning_proxy.trainer.batches import Floats, Ints, Rows
from lightning_proxy.trainer.trajectories import Trajectory, merge
from lightning_proxy.trainer.transitions import Reason, TrainableRollout, Transition


class Dpo:
    """``L = -log sigmoid(beta m)``, ``m = log p(chosen)/p_ref(chosen) - log p(rejected)/p_ref(rejected)``.

    arXiv 2305.18290, equation 7, as the mean over pairs. A row's advantage is 1 where it is chosen and -1
    where it is rejected, and a pair's rows share its name in ``Rows.rollouts``. Of a rollout with several
    calls the log-ratios of all that the policy generated are summed, what it read is context: the trajectory
    as a whole is preferred (arXiv 2403.02502; arXiv 2409.02392 on why what was read has to be left out).
    Longer trajectories are not normalised. It assumes that both of a pair answer the same first prompt.

    The gradient is computed as section 4 of the paper writes it, ``-beta sigmoid(-beta m) (grad log p(chosen)
    - grad log p(rejected))``: the margins by one pass forward, then likelihood with signed weights. So the
    rows of a pair need not fit into memory together, and any number of workers will do. (With dropout, which
    current models do not have, the two passes would be of two models.) TRL's trainer would
    bring a loop of its own, without our lease, optimiser state and publishing; the loss is these few lines.

    The reference is the parent version by default: each pass is held near to the weights that made its data,
    as PPO's clipping does, and no second model is loaded. With ``base`` all passes are held near version 0.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._train = bench.settings.train

    def choose(self, recorded: Sequence[RecordedRollout], parent: PolicyVersion | None) -> Picked:
        """The pairs."""
        train = self._train
        found = candidates(recorded, self._bench.settings, parent, self._bench.versions())
        return paired(
            found,
            min_gap=train.dpo_min_gap,
            min_size=train.min_group_size,
            may_wait=len(recorded) < train.max_rollouts,
            max_tokens=train.max_row_tokens,
        )

    def batch(self, chosen: Picked) -> Batch | None:
        """Rows; ``None`` where there is no pair."""
        return chosen.batch()

    def compare(self, backend: Backend, rows: Rows, parent: PolicyVersion) -> Rows:
        """The rows with the logprobs of the reference policy."""
        with self._bench.clock.phase("reference"):
            if self._train.dpo_reference == "parent":
                return rows.with_reference(backend.logprobs(rows))
            return rows.with_reference(self._bench.base_logprobs(backend, rows, parent, "dpo_reference"))

    def weigh(self, rows: Rows, mini_batches: int) -> Rows:
        """Every pair the same, with the mean number of pairs of a mini-batch as its denominator."""
        share = mini_batches / max(len(set(rows.rollouts)), 1)
        return replace(rows, weights=rows.advantages * np.float32(share))

    def step(self, backend: Backend, rows: Rows) -> Mapping[str, float]:
        """One step; the metrics are of before it: ``dpo_loss, accuracy, margin, grad_norm``."""
        pair_T, margins_P = self._margins(backend, rows)
        beta = self._train.dpo_beta
        slope_P = beta / (1 + np.exp(beta * margins_P))  # beta sigmoid(-beta m)
        weighed = replace(rows, weights=(rows.weights * slope_P[pair_T]).astype(np.float32))
        return {**self._metrics(margins_P), "grad_norm": backend.update(weighed)["grad_norm"]}

    def after(self, backend: Backend, rows: Rows) -> Mapping[str, float]:
        """Loss, accuracy and margin of all pairs: about the parent those of the first step say nothing."""
        return self._metrics(self._margins(backend, rows)[1])

    def in_words(self, means: Mapping[str, float]) -> str:
        """Loss, accuracy and margin."""
        return (
            f"loss {means['dpo_loss']:.4g}, {means['accuracy']:.0%} of pairs right, "
            f"margin {means['margin']:.4g}"
        )

    def _margins(self, backend: Backend, rows: Rows) -> tuple[Ints, NDArray[np.float64]]:
        """T; each token's pair. P; each pair's m under the present weights."""
        _, pair_N = np.unique(rows.rollouts, return_inverse=True)
        pair_T: Ints = np.repeat(pair_N, rows.lengths).astype(np.int64)
        ratio_T = _signed(rows) * (backend.logprobs(rows).astype(np.float64) - rows.reference)
        return pair_T, np.bincount(pair_T, ratio_T).astype(np.float64)

    def _metrics(self, margins_P: NDArray[np.float64]) -> dict[str, float]:
        """``margin`` is beta m, the difference of the implicit rewards (section 5.1 of the paper)."""
        scaled_P = self._train.dpo_beta * margins_P
        return {
            "dpo_loss": float(np.logaddexp(0, -scaled_P).mean()),
            "accuracy": float((scaled_P > 0).mean()),
            "margin": float(scaled_P.mean()),
        }


def _signed(rows: Rows) -> Floats:
    return np.where(rows.mask, rows.advantages, np.float32(0))


@dataclass(frozen=True, slots=True)
class _Pair:
    chosen: Sequence[Transition]
    rejected: Sequence[Transition]

    def rows(self, name: str) -> list[Trajectory]:
        """Both sides, signed, under the pair's name."""
        return [
            replace(row, rollout_id=name)
            for sign, side in ((1.0, self.chosen), (-1.0, self.rejected))
            for row in merge([replace(each, advantage=sign) for each in side])
        ]


def paired(found: Candidates, *, min_gap: float, min_size: int, may_wait: bool, max_tokens: int) -> Picked:
    """Demonstrations over what was answered, and the best of each group over its worst.

    A group smaller than ``min_size`` is for a later run if it ``may_wait``: more of its task may come.
    ``max_tokens``: of a row.
    """
    shown = [pair for each in found.demonstrations if (pair := _corrected(each, max_tokens, found))]
    by_group: list[_Pair] = []
    keys: dict[str, str] = {}
    for_later: list[str] = []
    for group, members in found.by_group().items():
        if len(members) < min_size:
            found.left_out.rollouts[Reason.GROUP_TOO_SMALL] += len(members)
            # One that comes again has left its group behind: nobody will join it.
            for_later += [each.rollout_id for each in members if may_wait and not each.again]
        elif pair := _extremes(members, min_gap, found):
            by_group.append(pair)
        keys |= {rollout.rollout_id: key_of(group) for rollout in members}
    pairs = [*shown, *by_group]
    return Picked(
        f"{len(by_group)} pairs of groups and {len(shown)} of demonstrations",
        [row for number, pair in enumerate(pairs) for row in pair.rows(f"pair {number}")],
        found,
        {"groups": len(by_group), "pairs_by_group": len(by_group), "pairs_by_demonstration": len(shown)},
        {rollout_id: key for rollout_id, key in keys.items() if rollout_id not in for_later},
        for_later,
    )


def _corrected(shown: Demonstrated, max_tokens: int, found: Candidates) -> _Pair | None:
    right, answered = shown.right, shown.answered
    reason = None
    if right.response_ids == answered.response_ids:
        reason = Reason.SAME_ANSWER
    elif not answered.response_ids:
        reason = Reason.EMPTY
    elif len(answered.prompt_ids) + len(answered.response_ids) > max_tokens:
        reason = Reason.TOO_LONG
    if reason is not None:
        found.left_out.pairs[reason] += 1
        return None
    return _Pair([right], [answered])


def _extremes(members: Sequence[TrainableRollout], min_gap: float, found: Candidates) -> _Pair | None:
    """The best (first of equals) over the worst. The others of the group are counted."""
    best = max(members, key=lambda rollout: rollout.value)
    worst = min(members, key=lambda rollout: rollout.value)
    if best.value == worst.value:
        found.left_out.rollouts[Reason.GROUP_ALL_EQUAL] += len(members)
        return None
    if len(members) > 2:
        found.left_out.rollouts[Reason.NO_PAIR] += len(members) - 2
    reason = None
    if best.value - worst.value < min_gap:
        reason = Reason.SMALL_GAP
    # Of the calls that are trained on: in one group, too, these differ where one side's first was left out.
    elif best.transitions[0].prompt_ids != worst.transitions[0].prompt_ids:
        reason = Reason.PROMPT_DIFFERS
    elif _said(best) == _said(worst):
        reason = Reason.SAME_ANSWER
    if reason is not None:
        found.left_out.pairs[reason] += 1
        return None
    return _Pair(best.transitions, worst.transitions)


def _said(rollout: TrainableRollout) -> list[tuple[bytes, bytes]]:
    return [(each.prompt_ids.tobytes(), each.response_ids.tobytes()) for each in rollout.transitions]
