"""A tiny model and the update engine on it, made once: importing verl alone takes ten seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lightning_proxy.config.train import TrainSettings
from lightning_proxy.store import Store
from tests.trainer.fake_proxy import FakeProxy, fake_proxy
from tests.trainer.recording import Logprobs

if TYPE_CHECKING:
    from tests.trainer.plain import PlainModel

# The recipe of the closed loop (constant AdamW, eps 1e-5, clip 1), on one thread, by itself on the CPU.
RECIPE = {"learning_rate": 2e-4, "adam_eps": 1e-5, "threads": 1, "device": "cpu", "mini_batch_rows": 32}


def recipe(**changes: object) -> TrainSettings:
    """The recipe with changes."""
    return TrainSettings.model_validate(RECIPE | changes)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A new database."""
    with Store.open(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
def proxy(store: Store) -> Iterator[FakeProxy]:
    """What takes versions over, on that database."""
    with fake_proxy(store.path) as serving:
        yield serving


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Qwen3, float32."""
    from tests.trainer.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def plain(tiny_model: Path) -> PlainModel:
    """The same model in plain transformers: what the update engine is compared with."""
    from tests.trainer.plain import PlainModel

    return PlainModel(tiny_model)


@pytest.fixture(scope="session")
def sampler_logprobs(plain: PlainModel) -> Logprobs:
    """Logprobs that an engine with the tiny model's weights would have reported."""

    def logprobs(prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        return plain.logprobs([*prompt, *response])[len(prompt) - 1 :]

    return logprobs
