"""The loss with all its terms, against plain torch row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lightning_proxy.trainer.backend import open_backend
from lightning_proxy.trainer.batches import Rows, weigh
from tests.trainer.conftest import recipe
from tests.trainer.gradients import assert_same_gradients, gradients
from tests.trainer.rows import random_rows

if TYPE_CHECKING:
    import torch

    from tests.trainer.plain import PlainModel

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # verl and torch warn about themselves

Terms = Callable[["torch.Tensor", "torch.Tensor", dict[str, "torch.Tensor"]], "torch.Tensor"]


def rows_near(plain: PlainModel, *, noise: float = 0.2, seed: int = 5) -> Rows:
    """Random rows whose old and reference logprobs are near the model's own, and whose importance differs."""
    rows = random_rows([9, 17, 6, 12], seed=seed, share=0.7)
    own = np.concatenate(
        [
            [0, *plain.logprobs(rows.tokens[a:b].tolist())]
            for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)
        ]
    )
    generator = np.random.default_rng(seed)

    def near() -> Any:
        return np.where(rows.mask, own + generator.normal(scale=noise, size=len(own)), 0).astype(np.float32)

    importance = np.where(rows.mask, generator.uniform(0.5, 2, len(own)), 0).astype(np.float32)
    return weigh(replace(rows, logprobs=near(), importance=importance).with_reference(near()), mini_batches=1)


def plain_gradients(plain: PlainModel, rows: Rows, terms: Terms) -> dict[str, Any]:
    """Gradients of the sum over trained tokens of weight x terms(log softmax, own logprob, arrays)."""
    import torch

    plain.model.zero_grad()
    for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        ids = torch.from_numpy(rows.tokens[start:end])
        log_softmax = torch.log_softmax(plain.model(ids[None]).logits[0, :-1].float(), -1)
        own = log_softmax.gather(1, ids[1:, None]).squeeze(1)
        arrays = {
            name: torch.from_numpy(getattr(rows, name)[start + 1 : end])
            for name in ("logprobs", "advantages", "weights", "reference", "mask")
        }
        loss = torch.where(arrays["mask"], arrays["weights"] * terms(log_softmax, own, arrays), 0.0)
        loss.sum().backward()  # type: ignore[no-untyped-call]
    return {
        name: parameter.grad.numpy().copy()
        for name, parameter in plain.model.named_parameters()
        if parameter.grad is not None
    }


def clipped(
    own: torch.Tensor, arrays: dict[str, torch.Tensor], low: float = 0.2, high: float = 0.2
) -> torch.Tensor:
    """arXiv 1707.06347, equation 7, with the two bounds of arXiv 2503.14476, section 3.1."""
    import torch

    ratio = torch.exp(own - arrays["logprobs"])
    advantage = arrays["advantages"]
    return torch.maximum(-ratio * advantage, -ratio.clamp(1 - low, 1 + high) * advantage)


def engine_gradients(model: Path, rows: Rows, **settings: object) -> tuple[dict[str, float], dict[str, Any]]:
    backend = open_backend(recipe(micro_batch_tokens=24, **settings), model)
    try:
        return gradients(backend, rows)
    finally:
        backend.close()


def test_importance_weighs_each_token_and_the_clip_range_may_differ_upwards(
    tiny_model: Path, plain: PlainModel
) -> None:
    rows = rows_near(plain)
    metrics, found = engine_gradients(tiny_model, rows, clip_ratio=0.1, clip_ratio_high=0.3)
    assert metrics["clip_frac"] > 0
    expected = plain_gradients(plain, rows, lambda _, own, arrays: clipped(own, arrays, 0.1, 0.3))
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+", "abs"])
def test_the_divergence_from_the_reference_is_in_the_loss(
    tiny_model: Path, plain: PlainModel, estimator: str
) -> None:
    import torch

    def divergence(own: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        difference = own - reference
        return {  # by the gradient: that of k3+ is k2's
            "k1": difference,
            "k2": difference**2 / 2,
            "k3+": difference**2 / 2,
            "k3": torch.exp(-difference) + difference - 1,
            "abs": difference.abs(),
        }[estimator]

    rows = rows_near(plain)
    metrics, found = engine_gradients(tiny_model, rows, kl_coef=0.3, kl_estimator=estimator)
    expected = plain_gradients(
        plain, rows, lambda _, own, arrays: clipped(own, arrays) + 0.3 * divergence(own, arrays["reference"])
    )
    assert_same_gradients(found, expected)
    assert metrics["kl_loss"] != 0


def test_the_entropy_bonus_is_in_the_loss(tiny_model: Path, plain: PlainModel) -> None:
    rows = rows_near(plain)
    metrics, found = engine_gradients(tiny_model, rows, entropy_coef=0.2)

    def terms(log_softmax: torch.Tensor, own: torch.Tensor, arrays: dict[str, torch.Tensor]) -> torch.Tensor:
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        return clipped(own, arrays) - 0.2 * entropy

    assert_same_gradients(found, plain_gradients(plain, rows, terms))
    assert metrics["entropy_loss"] > 0


def test_decoupled_rows_weigh_what_other_weights_sampled(plain: PlainModel) -> None:
    rows = rows_near(plain)
    proximal = (rows.logprobs + np.linspace(-2, 2, len(rows.tokens))).astype(np.float32)
    seen = rows.decoupled(proximal, cap=2.0)
    expected = [
        min(float(np.exp(np.float64(new) - np.float64(old))), 2.0) if trained else 0.0
        for new, old, trained in zip(proximal, rows.logprobs, rows.mask, strict=True)
    ]
    np.testing.assert_allclose(seen.importance, expected, rtol=1e-6)
    np.testing.assert_array_equal(seen.logprobs, np.where(rows.mask, proximal, 0))
    fresh = rows.decoupled(rows.logprobs, cap=2.0)
    np.testing.assert_array_equal(fresh.importance, rows.mask.astype(np.float32))
