"""Refuses an update that must not be published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_proxy.errors import CheckpointInvalid


def check_steps(steps: Sequence[Mapping[str, float]]) -> None:
    """Raise ``CheckpointInvalid`` where a step's loss or gradient was not finite."""
    for number, metrics in enumerate(steps, start=1):
        for name in ("pg_loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise CheckpointInvalid(
                    f"{name} was {metrics[name]} in step {number} of {len(steps)}: nothing is published. "
                    "Lower [train] learning_rate, or look for broken logprobs among the drained spans"
                )


def check_probe(logprobs: Sequence[float]) -> None:
    """Raise ``CheckpointInvalid`` where the new weights give the fixed prompt no finite logprobs."""
    if not all(map(math.isfinite, logprobs)):
        raise CheckpointInvalid("the new weights give logprobs that are not finite: nothing is published")
