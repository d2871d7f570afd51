"""The tiny model in plain transformers and torch, without verl: the independent computation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lightning_proxy.trainer.batches import Rows


class PlainModel:
    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """Of each token but the first, given those before it."""
        with torch.no_grad():
            values: list[float] = self._logprobs(torch.tensor(list(ids))).tolist()
        return values

    def _logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(ids[None]).logits[0, :-1].float()
        return torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None]).squeeze(1)

    def clipped_loss_gradients(self, rows: Rows, clip: float) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and gradients of sum w * max(-r A, -clip(r) A), written out row by row.

        PPO's clipped objective, arXiv 1707.06347, equation 7, without the dual clip (ratios below 3).
        """
        self.model.zero_grad()
        total = 0.0
        for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
            ids = torch.from_numpy(rows.tokens[start:end])
            new = self._logprobs(ids)
            old, advantage, weight = (
                torch.from_numpy(values[start + 1 : end])
                for values in (rows.logprobs, rows.advantages, rows.weights)
            )
            mask = torch.from_numpy(rows.mask[start + 1 : end])
            ratio = torch.exp(torch.where(mask, new - old, torch.zeros_like(new)))
            loss = torch.maximum(-ratio * advantage, -ratio.clamp(1 - clip, 1 + clip) * advantage)
            (weight * loss).sum().backward()  # type: ignore[no-untyped-call]
            total += float((weight * loss).sum())
        return total, {
            name: parameter.grad.clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
