"""Logits as the engine shaped them before it sampled: temperature, top-k, top-p, min-p.

verl knows one temperature per row and no cut. Here the logits of each token that was sampled otherwise are
shaped, so that their log-softmax gives the logprob, and the gradient, of the distribution that it came from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_proxy.trainer.sampling import Sampling


def shape_logits(
    logits: torch.Tensor, sampled: torch.Tensor, codes: torch.Tensor, samplings: Sequence[Sampling]
) -> torch.Tensor:
    """Logits (n x vocabulary, float32) whose softmax is the distribution that each token came from.

    ``codes`` (n): which of ``samplings`` it was. In vLLM's order: temperature, min-p (arXiv 2407.01082),
    top-k, nucleus (arXiv 1904.09751). Which tokens are cut is decided by these logits and has no gradient.
    The token that was ``sampled`` (n) is never cut: under other weights, or by the last bit, it might be, and
    its probability would be 0.
    """
    temperatures = torch.tensor([each.temperature for each in samplings], device=logits.device)
    scaled = logits / temperatures[codes].unsqueeze(-1)
    if not any(each.cuts for each in samplings):
        return scaled
    cut = torch.zeros_like(scaled, dtype=torch.bool)
    for number, sampling in enumerate(samplings):
        places = (codes == number).nonzero()[:, 0]
        if sampling.cuts and len(places):
            cut[places] = _cut(scaled[places].detach(), sampling, sampled[places])
    # Not -inf: 0 x inf would make the entropy no number.
    return scaled.masked_fill(cut, torch.finfo(scaled.dtype).min)


def _cut(scaled: torch.Tensor, sampling: Sampling, sampled: torch.Tensor) -> torch.Tensor:
    """True: this token cannot come."""
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
    return cut.scatter(-1, sampled.unsqueeze(-1), False)
