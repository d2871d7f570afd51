"""What holds for every test of the proxy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_unhandled_exception(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever agents and engines do, no exception of a handler ends up in the server's log."""
    yield
    errors = [record for record in caplog.get_records("call") if record.name == "aiohttp.server"]
    assert [(record.getMessage(), record.exc_info) for record in errors if record.exc_info] == []
