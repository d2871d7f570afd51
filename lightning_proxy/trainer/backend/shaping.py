"""Logits as the engine shaped them before it sampled: temperature, top-k, top-p, min-p.

verl knows one temperature per row and no cut. A hook on the model's output shapes the logits of each
token that was sampled otherwise, so that verl's own log-softmax gives the logprob, and the gradient,
of the distribution that the token came from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lightning_proxy.trainer.batches import Rows
from lightning_proxy.trainer.sampling import Sampling


class Shaper:
    """Shapes the logits of one micro-batch at a time; see :meth:`expect`."""

    def __init__(self, module: torch.nn.Module, *, packed: bool) -> None:
        self._packed = packed
        self._rows: Rows | None = None
        module.register_forward_hook(self._hook)

    def expect(self, rows: Rows) -> None:
        """The next forward pass is of these rows."""
        self._rows = rows

    def _hook(self, module: torch.nn.Module, inputs: object, output: Any) -> Any:
        rows = self._rows
        if rows is None or not rows.sampling.any():
            return output
        logits = output.logits  # rows x longest row x vocabulary; packed: 1 x tokens x vocabulary
        for number, sampling in enumerate(rows.samplings):
            # The logits at a token are those of the next one.
            sampled_T = np.flatnonzero(rows.mask & (rows.sampling == number)) if number else np.array([])
            if not len(sampled_T):
                continue
            row, column = self._places(rows, sampled_T)
            tokens = torch.as_tensor(rows.tokens[sampled_T], device=logits.device)
            logits = logits.index_put((row, column), shape_logits(logits[row, column], sampling, tokens))
        output.logits = logits
        return output

    def _places(self, rows: Rows, tokens: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self._packed:
            return torch.zeros(len(tokens), dtype=torch.int64), torch.from_numpy(tokens - 1)
        row = np.searchsorted(rows.offsets, tokens, side="right") - 1
        return torch.from_numpy(row), torch.from_numpy(tokens - rows.offsets[row] - 1)


def shape_logits(logits: torch.Tensor, sampling: Sampling, sampled: torch.Tensor) -> torch.Tensor:
    """Logits whose softmax is the distribution sampled from; ``logits`` is n x vocabulary.

    In vLLM's order: temperature, min-p (arXiv 2407.01082), top-k, nucleus (arXiv 1904.09751). Which
    tokens are cut is decided by these logits and has no gradient. The token that was ``sampled`` (n) is
    never cut: under other weights, or by the last bit, it might be, and its probability would be 0.
    """
    scaled = logits.float() / sampling.temperature
    if not sampling.cuts:
        return scaled.to(logits.dtype)
    with torch.no_grad():
        cut = torch.zeros_like(scaled, dtype=torch.bool)
        if sampling.min_p > 0:
            probabilities = scaled.softmax(-1)
            cut |= probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        if 0 < sampling.top_k < scaled.shape[-1]:
            kept = scaled.masked_fill(cut, -torch.inf)
            cut |= kept < kept.topk(sampling.top_k).values[:, -1:]
        if sampling.top_p < 1:
            ascending, order = scaled.masked_fill(cut, -torch.inf).sort(-1)
            outside = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
            outside[:, -1] = False
            cut |= torch.zeros_like(cut).scatter(-1, order, outside)
        cut.scatter_(-1, sampled.unsqueeze(-1), False)
    # Not -inf: 0 x inf would make the entropy no number.
    return scaled.masked_fill(cut, torch.finfo(logits.dtype).min).to(logits.dtype)
