"""The losses of SFT and DPO against plain torch, by their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lightning_proxy.config.settings import Settings
from lightning_proxy.store import Store
from lightning_proxy.trainer.algorithms.base import Bench
from lightning_proxy.trainer.algorithms.dpo import Dpo
from lightning_proxy.trainer.algorithms.sft import Sft
from lightning_proxy.trainer.backend import Backend, open_backend
from lightning_proxy.trainer.batches import Rows
from lightning_proxy.trainer.report import Stopwatch
from tests.trainer.conftest import recipe
from tests.trainer.gradients import assert_same_gradients, gradients
from tests.trainer.rows import random_rows

if TYPE_CHECKING:
    import torch

    from tests.trainer.plain import PlainModel

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # verl and torch warn about themselves

BETA = 0.4


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Store.open(tmp_path / "store.db") as store:
        settings = Settings(train=recipe(dpo_beta=BETA))
        yield Bench(settings, store, lambda line, done=None: None, Stopwatch(), lambda **values: None)


def engine(model: Path, micro_batch_tokens: int, algorithm: str = "sft") -> Backend:
    return open_backend(recipe(algorithm=algorithm, micro_batch_tokens=micro_batch_tokens), model)


def signed_rows() -> Rows:
    """Three pairs: two of two rows, one whose chosen side is two rows. Nobody told logprobs."""
    rows = random_rows([9, 17, 6, 12, 8, 11, 7], seed=3, share=0.7)
    sign_N = np.array([1, -1, 1, -1, 1, 1, -1])
    sign_T = np.repeat(sign_N, rows.lengths)
    return replace(
        rows,
        advantages=np.where(rows.mask, sign_T, 0).astype(np.float32),
        logprobs=np.where(rows.mask, np.nan, 0).astype(np.float32),
        rollouts=("p0", "p0", "p1", "p1", "p2", "p2", "p2"),
    )


def plain_sums(plain: PlainModel, rows: Rows) -> list[torch.Tensor]:
    """Log-probability of each row's trained tokens, with its graph."""
    import torch

    sums = []
    for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        ids = torch.from_numpy(rows.tokens[start:end])
        log_softmax = torch.log_softmax(plain.model(ids[None]).logits[0, :-1].float(), -1)
        own = log_softmax.gather(1, ids[1:, None]).squeeze(1)
        sums.append(own[torch.from_numpy(rows.mask[start + 1 : end])].sum())
    return sums


def backward(plain: PlainModel, loss: torch.Tensor) -> dict[str, Any]:
    plain.model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: parameter.grad.numpy().copy()
        for name, parameter in plain.model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("micro_batch_tokens", [24, 1000])
def test_sft_is_the_mean_over_tokens_however_rows_are_cut_into_micro_batches(
    tiny_model: Path, plain: PlainModel, bench: Bench, micro_batch_tokens: int
) -> None:
    import torch

    rows = replace(signed_rows(), advantages=signed_rows().mask.astype(np.float32))
    backend = engine(tiny_model, micro_batch_tokens)
    try:
        metrics, found = gradients(backend, Sft(bench).weigh(rows, 1))
    finally:
        backend.close()
    loss = -torch.stack(plain_sums(plain, rows)).sum() / rows.trained_tokens
    assert metrics == {"nll": pytest.approx(loss.item(), abs=1e-5)}
    assert_same_gradients(found, backward(plain, loss))


class Recorder:
    """A backend that keeps the gradients in place of taking the step."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.found: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def update(self, rows: Rows) -> dict[str, float]:
        metrics, self.found = gradients(self._backend, rows)
        return {**metrics, "grad_norm": 0.0}


@pytest.mark.parametrize("micro_batch_tokens", [24, 1000])
def test_dpo_is_equation_7_wherever_the_rows_of_a_pair_lie(
    tiny_model: Path, plain: PlainModel, bench: Bench, micro_batch_tokens: int
) -> None:
    import torch

    rows = signed_rows()
    generator = np.random.default_rng(1)
    reference = generator.normal(-4, 0.5, len(rows.tokens)).astype(np.float32)
    rows = rows.with_reference(reference)
    dpo = Dpo(bench)
    backend = engine(tiny_model, micro_batch_tokens, "dpo")
    recorder = Recorder(backend)
    try:
        metrics = dpo.step(recorder, dpo.weigh(rows, 1))
        after = dpo.after(backend, rows)
    finally:
        backend.close()

    of_reference = [
        float(rows.reference[a:b].sum()) for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)
    ]
    ratio = [own - known for own, known in zip(plain_sums(plain, rows), of_reference, strict=True)]
    margins = torch.stack([ratio[0] - ratio[1], ratio[2] - ratio[3], ratio[4] + ratio[5] - ratio[6]])
    loss = -torch.nn.functional.logsigmoid(BETA * margins).mean()
    assert metrics["dpo_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["margin"] == pytest.approx(BETA * margins.mean().item(), abs=1e-5)
    assert metrics["accuracy"] == pytest.approx((margins > 0).float().mean().item())
    assert after == {name: pytest.approx(metrics[name]) for name in ("dpo_loss", "margin", "accuracy")}
    assert_same_gradients(recorder.found, backward(plain, loss))


def test_dpo_about_the_weights_themselves_begins_at_log_2(tiny_model: Path, bench: Bench) -> None:
    from lightning_proxy.store import PolicyVersion, VersionStatus

    dpo = Dpo(bench)
    backend = engine(tiny_model, 1000, "dpo")
    try:
        parent = PolicyVersion("policy", 0, str(tiny_model), VersionStatus.ACTIVE)
        rows = dpo.compare(backend, signed_rows(), parent)
        metrics = [dict(dpo.step(backend, dpo.weigh(rows, 1))) for _ in range(2)]
    finally:
        backend.close()
    assert metrics[0]["dpo_loss"] == pytest.approx(np.log(2))
    assert (metrics[0]["accuracy"], metrics[0]["margin"]) == (0, 0)
    assert metrics[1]["margin"] > 0
    assert metrics[1]["dpo_loss"] < metrics[0]["dpo_loss"]
