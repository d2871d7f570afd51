"""The distribution that tokens were sampled from, against NumPy written out token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lightning_proxy.trainer.backend import Backend, open_backend
from lightning_proxy.trainer.batches import Rows
from lightning_proxy.trainer.sampling import PLAIN, Sampling
from tests.trainer.conftest import recipe
from tests.trainer.gradients import gradients
from tests.trainer.rows import random_rows

if TYPE_CHECKING:
    from tests.trainer.plain import PlainModel

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # verl and torch warn about themselves

SAMPLINGS = (
    PLAIN,
    Sampling(0.7),
    Sampling(1.3, top_p=0.9),
    Sampling(0.7, top_k=5),
    Sampling(1.0, min_p=0.1),
    Sampling(0.8, top_k=20, top_p=0.8, min_p=0.01),
)


def shaped_logprobs(logits: np.ndarray[Any, Any], sampling: Sampling, sampled: int) -> float:
    """Logprob of a token: sort, walk down, stop; the renormalised rest."""
    scaled = logits.astype(np.float64) / sampling.temperature
    likeliest_first = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    probability = np.exp(scaled - scaled.max())
    kept = [t for t in likeliest_first if probability[t] >= sampling.min_p * probability.max()]
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    nucleus: list[int] = []
    total, mass = probability[kept].sum(), 0.0
    for token in kept:
        if nucleus and mass >= sampling.top_p:
            break
        nucleus.append(token)
        mass += probability[token] / total
    if sampled not in nucleus:
        nucleus.append(sampled)
    return float(np.log(probability[sampled] / probability[nucleus].sum()))


@pytest.fixture(scope="module")
def backend(tiny_model: Path) -> Iterator[Backend]:
    opened = open_backend(recipe(micro_batch_tokens=64), tiny_model)
    yield opened
    opened.close()


def some_rows(count: int = 9) -> Rows:
    """Rows of different lengths in which each token was sampled from one of SAMPLINGS."""
    lengths = np.random.default_rng(4).integers(5, 30, count).tolist()
    return random_rows(lengths, seed=4, share=0.7, samplings=SAMPLINGS)


def expected_logprobs(rows: Rows, plain: PlainModel) -> np.ndarray[Any, Any]:
    import torch

    found = np.zeros(len(rows.tokens), dtype=np.float32)
    for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        with torch.no_grad():
            logits = plain.model(torch.from_numpy(rows.tokens[start:end])[None]).logits[0].double().numpy()
        for place in range(start + 1, end):
            sampling = rows.samplings[rows.sampling[place]]
            found[place] = shaped_logprobs(logits[place - start - 1], sampling, rows.tokens[place])
    return found


def test_logprobs_are_those_of_each_tokens_own_distribution(backend: Backend, plain: PlainModel) -> None:
    rows = some_rows()
    assert set(rows.sampling.tolist()) == set(range(len(SAMPLINGS)))
    np.testing.assert_allclose(
        backend.logprobs(rows)[rows.mask], expected_logprobs(rows, plain)[rows.mask], atol=2e-5
    )


def test_the_first_step_on_fresh_data_has_ratio_one_whatever_it_was_sampled_from(
    tiny_model: Path, plain: PlainModel
) -> None:
    rows = some_rows()
    rows = replace(rows, logprobs=np.where(rows.mask, expected_logprobs(rows, plain), 0).astype(np.float32))
    fresh = open_backend(recipe(micro_batch_tokens=64), tiny_model)
    try:
        metrics = fresh.update(rows)
    finally:
        fresh.close()
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["clip_frac"] == 0


def test_the_gradient_is_that_of_the_distribution_that_was_sampled_from(
    backend: Backend, plain: PlainModel
) -> None:
    """Temperature 0.5 in plain torch: the gradient of log softmax(2 x logits), weighed by the advantage."""
    import torch

    rows = some_rows(count=3)
    rows = replace(
        rows,
        sampling=np.where(rows.mask, 1, 0).astype(np.int16),
        samplings=(PLAIN, Sampling(0.5)),
        logprobs=np.zeros_like(rows.logprobs),
    )
    rows = replace(rows, logprobs=np.where(rows.mask, backend.logprobs(rows), 0).astype(np.float32))
    _, found = gradients(backend, rows)
    plain.model.zero_grad()
    for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        ids = torch.from_numpy(rows.tokens[start:end])
        logprobs = torch.log_softmax(2 * plain.model(ids[None]).logits[0, :-1].float(), -1)
        chosen = logprobs.gather(1, ids[1:, None]).squeeze(1)
        factor = torch.from_numpy(
            np.where(rows.mask, rows.weights * rows.advantages, 0)[start + 1 : end].astype(np.float32)
        )
        (-factor * chosen).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in plain.model.named_parameters():
        if parameter.grad is not None:
            np.testing.assert_allclose(found[name], parameter.grad.numpy(), atol=1e-5, err_msg=name)
