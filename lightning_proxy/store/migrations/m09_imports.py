"""Which spans of other tracers have been imported: trace id and span id, 24 bytes."""

from __future__ import annotations

from sqlite_utils import Database

from lightning_proxy.store.migrations.registry import migrations


@migrations()
def imports(db: Database) -> None:
    """Which spans of other tracers have been imported: trace id and span id, 24 bytes."""
    db.execute("CREATE TABLE imported (origin BLOB PRIMARY KEY) WITHOUT ROWID")
