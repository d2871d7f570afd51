"""Reinforcement learning on what was sampled: LightningRL with a group-relative advantage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lightning_proxy.store import PolicyVersion, RecordedRollout
from lightning_proxy.trainer.advantages import assign
from lightning_proxy.trainer.algorithms.base import Batch, Bench
from lightning_proxy.trainer.backend import Backend, estimator
from lightning_proxy.trainer.batches import Floats, Rows, pack, weigh
from lightning_proxy.trainer.grouped import Grouped, credit_of, grouped
from lightning_proxy.trainer.trajectories import merge


class Rl:
    """Policy gradient over transitions (LightningRL, arXiv 2508.03680), in an ``Algorithm``'s steps.

    Loss: verl's, by ``[train] policy_loss``; by default PPO's clipped objective (arXiv 1707.06347, equation
    7) with GRPO's advantage (arXiv 2402.03300). It assumes that each response was sampled from a
    distribution that can be computed again: what was not is left out. It does not learn from demonstrations.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._train = bench.settings.train

    def choose(self, recorded: Sequence[RecordedRollout], parent: PolicyVersion | None) -> Grouped:
        """The rollouts that can be compared with one another, in groups."""
        bench = self._bench
        return grouped(recorded, bench.settings, parent, bench.versions(), self._members)

    def _members(self, key: str, versions: Iterable[int | None] | None = None) -> Sequence[RecordedRollout]:
        """The last rollouts that were trained on in this group."""
        name, most = self._bench.settings.policy.name, self._train.baseline_window
        return self._bench.store.recent_members(name, key, most, versions=versions)

    def batch(self, chosen: Grouped) -> Batch | None:
        """Advantages, trajectories, rows; ``None`` where there is nothing to train on."""
        grouping = chosen.grouping
        if not grouping.groups:
            return None
        with self._bench.clock.phase("load"):  # the estimator is verl's: this imports it
            estimate = estimator(self._train)
        with self._bench.clock.phase("prepare"):
            rollouts = assign(
                grouping.groups,
                credit=credit_of(self._bench.settings),
                estimator=estimate,
                least=self._train.min_group_size,
            )
            trajectories = [row for rollout in rollouts for row in merge(rollout.transitions)]
            batch = Batch(pack(trajectories), trajectories)
        advantages = np.array([value for rollout in rollouts for value in rollout.advantages])
        self._bench.note(
            advantages={
                "mean": float(advantages.mean()),
                "std": float(advantages.std()),
                "min": float(advantages.min()),
                "max": float(advantages.max()),
            }
        )
        return batch

    def compare(self, backend: Backend, rows: Rows, parent: PolicyVersion) -> Rows:
        """Engine's against trainer's logprobs, and the rows as the update takes them.

        The difference is taken where the parent's weights sampled: nothing else can explain it. Then old
        logprobs are completed where the engine told those of the model's own distribution only, and what
        other weights sampled is weighed (``[train] importance``).
        """
        with self._bench.clock.phase("compare"):
            computed = backend.logprobs(rows.as_told())
            fresh = rows.of_version(parent.version)
            difference = np.abs(computed - rows.logprobs)[fresh]
            if rows.raw.any():
                computed = np.where(rows.raw, backend.logprobs(rows), computed)
                rows = rows.with_logprobs(np.where(rows.raw, computed, rows.logprobs))
            if self._train.importance == "decoupled":
                rows = rows.decoupled(computed, self._train.importance_cap)
        self._note_difference(difference, parent)
        return self._refer(backend, rows, parent)

    def weigh(self, rows: Rows, mini_batches: int) -> Rows:
        """Every trained token, or every rollout, the same, but for importance (``batches.weigh``)."""
        return weigh(rows, mini_batches, by_rollout=self._train.weigh == "rollout")

    def step(self, backend: Backend, rows: Rows) -> Mapping[str, float]:
        """See ``Backend.update``."""
        return backend.update(rows)

    def after(self, backend: Backend, rows: Rows) -> Mapping[str, float]:
        """Nothing: what the new weights do, their own rollouts will tell."""
        return {}

    def in_words(self, means: Mapping[str, float]) -> str:
        """Loss and clipping."""
        return f"loss {means['pg_loss']:.4g}, clipped {means['clip_frac']:.2%}"

    def _note_difference(self, difference: Floats, parent: PolicyVersion) -> None:
        if not len(difference):
            return
        progress = self._bench.progress
        found = {"max": float(difference.max()), "mean": float(difference.mean()), "tokens": len(difference)}
        self._bench.note(logprob_difference=found)
        progress(f"engine's and trainer's logprobs differ by at most {found['max']:.2g}")
        if found["mean"] > self._train.verify_tolerance:
            progress(
                f"  that is too much for the same weights: does the engine serve version {parent.version}?"
            )

    def _refer(self, backend: Backend, rows: Rows, parent: PolicyVersion) -> Rows:
        """The rows with the logprobs of version 0, where the loss keeps the policy near to it."""
        if not self._train.kl_coef:
            return rows
        with self._bench.clock.phase("reference"):
            return rows.with_reference(self._bench.base_logprobs(backend, rows, parent, "kl_coef"))
