"""The fake engine of these tests serves the model that the demo's agent asks for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_proxy.demo.agent import MODEL
from tests.engine import EngineThread, FakeEngine, Model


@pytest.fixture
def engine() -> Iterator[EngineThread]:
    """A fake vLLM on a free port."""
    thread = EngineThread(FakeEngine(name=MODEL, model=Model(bytes_per_token=4)))
    yield thread
    thread.stop()
