"""A fresh database for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_proxy.store import Store


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where the test's database is, or will be."""
    return tmp_path / "lightning.db"


@pytest.fixture
def store(db: Path) -> Iterator[Store]:
    """An open store on ``db``."""
    with Store.open(db) as opened:
        yield opened
