"""From when on a rollout of the task pool may be tried again."""

from __future__ import annotations

from sqlite_utils import Database

from lightning_proxy.store.migrations.registry import migrations, statements

_NOT_BEFORE = """
ALTER TABLE task_rollouts ADD COLUMN not_before REAL;
CREATE INDEX task_rollouts_waiting ON task_rollouts (not_before) WHERE state = 'waiting';
"""


@migrations()
def retries_after_a_pause(db: Database) -> None:
    """From when on a rollout of the task pool may be tried again; NULL: at once."""
    for statement in statements(_NOT_BEFORE):
        db.execute(statement)
