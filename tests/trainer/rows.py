"""Rows of random tokens, for tests of the update engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_proxy.trainer.batches import Rows
from lightning_proxy.trainer.sampling import PLAIN, Sampling


def random_rows(
    lengths: Sequence[int], *, seed: int = 0, share: float = 1.0, samplings: tuple[Sampling, ...] = (PLAIN,)
) -> Rows:
    """Rows of these lengths: two tokens of context, then tokens of which a ``share`` is trained.

    Each trained token is from one of ``samplings``; old logprobs are -4, weights sum to 1.
    """
    generator = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    mask = generator.random(total) < share
    mask[offsets[:-1]] = mask[offsets[:-1] + 1] = False
    return Rows(
        tokens=generator.integers(2, 64, total),
        mask=mask,
        logprobs=np.where(mask, -4, 0).astype(np.float32),
        advantages=np.where(mask, generator.normal(size=total), 0).astype(np.float32),
        weights=(mask / mask.sum()).astype(np.float32),
        sampling=np.where(mask, generator.integers(0, len(samplings), total), 0).astype(np.int16),
        raw=np.zeros(total, dtype=np.bool_),
        importance=mask.astype(np.float32),
        reference=np.zeros(total, dtype=np.float32),
        versions=np.zeros(total, dtype=np.int64),
        offsets=offsets,
        rollouts=tuple(map(str, range(len(lengths)))),
        samplings=samplings,
    )
