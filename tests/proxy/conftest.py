"""What holds for every test of the proxy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeProxy, ProxyThread
from tests.engine import EngineThread, FakeEngine

MakeEngine = Callable[[FakeEngine], EngineThread]


@pytest.fixture(autouse=True)
def no_unhandled_exception(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever agents and engines do, no exception of a handler ends up in the server's log."""
    yield
    errors = [record for record in caplog.get_records("call") if record.name == "aiohttp.server"]
    assert [(record.getMessage(), record.exc_info) for record in errors if record.exc_info] == []


@pytest.fixture
def weights(tmp_path: Path) -> list[Path]:
    """Directories with different weights in Hugging Face's layout."""
    made = []
    for number in range(3):
        directory = tmp_path / f"weights-{number}"
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(b"weights %d" % number)
        made.append(directory)
    return made


@pytest.fixture
def served(make_engine: MakeEngine, weights: list[Path]) -> EngineThread:
    """An engine that was started on ``weights[0]``."""
    return make_engine(FakeEngine(weights=weights[0]))


@pytest.fixture
def policy_proxy(served: EngineThread, make_proxy: MakeProxy, weights: list[Path]) -> ProxyThread:
    """A proxy that knows the weights which the engine began with as version 0."""
    return make_proxy(served.base_url, policy={"model": weights[0]})
