"""What the agents of the examples need: an engine that serves their model, and their own environment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from examples.environment import agents_python
from tests.engine import EngineThread, FakeEngine, Model


@pytest.fixture
def engine() -> Iterator[EngineThread]:
    """A fake vLLM that serves the agents' model."""
    thread = EngineThread(FakeEngine(name="policy", model=Model(bytes_per_token=4)))
    yield thread
    thread.stop()


@pytest.fixture(scope="session")
def python() -> str:
    """Takes a minute where it is not made yet. Of the session, so that pip finds its proxy variables."""
    return agents_python()
