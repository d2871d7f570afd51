"""The trainer computes the very distribution that vLLM sampled from: the ratio on fresh data is 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lightning_proxy.config.train import TrainSettings
from lightning_proxy.trainer.batches import Rows, pack
from lightning_proxy.trainer.trajectories import merge
from lightning_proxy.trainer.transitions import LeftOut, Terms, transitions_of
from tests.conftest import wait_until
from tests.vllm.compare import post
from tests.vllm.conftest import MODEL, WEIGHTS, Served, serving
from tests.vllm.test_real_engine import MESSAGES, TOOLS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.train,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # verl and torch warn about themselves
]

SAMPLINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "nucleus": {"top_p": 0.9},
    "all": {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.02},
    "hot": {"temperature": 1.3},
}


@pytest.fixture(scope="module")
def processed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An engine that tells the logprobs of what it sampled from."""
    with serving(tmp_path_factory.mktemp("processed"), "--logprobs-mode", "processed_logprobs") as running:
        until_the_mode_is_known(running)
        yield running


def until_the_mode_is_known(served: Served) -> None:
    """It is asked beside the first calls whose sampling is shaped; one that ends before is not trained on."""

    def known() -> bool:
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 1, "temperature": 0.5}
        post(f"{served.url}/rollout/warm-up/v1/chat/completions", body)
        with served.store() as store:
            (span,) = store.list_spans(rollout_id="warm-up", limit=1)
        return span.sampling.get("logprobs_mode") != "unknown"

    wait_until(known)


def sampled_rows(served: Served, rollout: str, sampling: dict[str, Any]) -> Rows:
    """A rollout of six calls with this sampling, as the trainer takes it."""
    for seed in range(6):
        body = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 40, "seed": seed}
        post(f"{served.url}/rollout/{rollout}/v1/chat/completions", {**body, **sampling})
    with served.store() as store:
        store.add_reward(value=1.0, rollout_id=rollout)
        [each] = [one for one in store.preview(MODEL, 100) if one.rollout.rollout_id == rollout]
    made = transitions_of(each, Terms(MODEL, 2048, version=0), LeftOut())
    assert len(made) == 6
    rows = pack(merge([replace(transition, advantage=1.0) for transition in made]))
    assert not (rows.sampling[rows.mask] == 0).any()
    return rows


@pytest.mark.parametrize("name", SAMPLINGS)
def test_what_the_engine_tells_of_a_shaped_distribution_is_what_the_trainer_computes(
    processed: Served, name: str
) -> None:
    from lightning_proxy.trainer.backend import open_backend

    rows = sampled_rows(processed, f"processed-{name}", SAMPLINGS[name])
    assert not rows.raw.any()
    backend = open_backend(TrainSettings(device="cpu", threads=1), WEIGHTS)
    try:
        computed = backend.logprobs(rows)
        metrics = backend.update(rows)
    finally:
        backend.close()
    np.testing.assert_allclose(computed[rows.mask], rows.logprobs[rows.mask], atol=1e-4)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["clip_frac"] == 0


def test_an_engine_as_it_is_tells_the_models_own_and_the_trainer_knows_it(served: Served) -> None:
    from lightning_proxy.trainer.backend import open_backend

    until_the_mode_is_known(served)
    rows = sampled_rows(served, "raw-all", SAMPLINGS["all"])
    assert rows.raw[rows.mask].all()
    backend = open_backend(TrainSettings(device="cpu", threads=1), WEIGHTS)
    try:
        told, shaped = backend.logprobs(rows.as_told()), backend.logprobs(rows)
    finally:
        backend.close()
    np.testing.assert_allclose(told[rows.mask], rows.logprobs[rows.mask], atol=1e-4)
    assert np.abs(shaped - told)[rows.mask].max() > 0.1
