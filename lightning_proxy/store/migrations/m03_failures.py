"""Why an attempt ended as it did, and which class of failure it was."""

from __future__ import annotations

from sqlite_utils import Database

from lightning_proxy.store.migrations.registry import migrations


@migrations()
def failures(db: Database) -> None:
    """Why an attempt ended as it did, and which class of failure it was."""
    for table in ("rollouts", "attempts"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN error_class TEXT")
    db.execute("ALTER TABLE attempts ADD COLUMN reason TEXT")
