"""What a run took of a rollout: its return, its demonstrations up to an entry of the ledger, or both."""

from __future__ import annotations

from sqlite_utils import Database

from lightning_proxy.store.migrations.registry import migrations, statements

# Runs before this took returns only.
_TAKEN = """
ALTER TABLE consumptions ADD COLUMN for_return INTEGER NOT NULL DEFAULT 1;
ALTER TABLE consumptions ADD COLUMN last_demonstration_id INTEGER;
"""


@migrations()
def demonstrations_consumed(db: Database) -> None:
    """What a run took of a rollout: its return, its demonstrations up to an entry of the ledger, or both."""
    for statement in statements(_TAKEN):
        db.execute(statement)
