"""By which rules a span lost what must not be kept."""

from __future__ import annotations

from sqlite_utils import Database

from lightning_proxy.store.migrations.registry import migrations


@migrations()
def redaction(db: Database) -> None:
    """By which rules a span lost what must not be kept."""
    db.execute("ALTER TABLE spans ADD COLUMN redacted TEXT")
