"""Up to which call a run had a rollout; the members of a group, found by its key."""

from __future__ import annotations

from sqlite_utils import Database

from lightning_proxy.store.migrations.registry import migrations, statements

# By key first: a group's members are looked for in all runs, those of one run never in all groups.
# last_span_id NULL: of a run from before, nobody knows which calls it had.
_GROUPS = """
ALTER TABLE consumptions ADD COLUMN last_span_id INTEGER;
CREATE INDEX consumptions_by_key ON consumptions (group_key, run_id) WHERE group_key IS NOT NULL;
DROP INDEX consumptions_by_group;
"""


@migrations()
def groups_and_calls_of_runs(db: Database) -> None:
    """Up to which call a run had a rollout; the members of a group, found by its key."""
    for statement in statements(_GROUPS):
        db.execute(statement)
