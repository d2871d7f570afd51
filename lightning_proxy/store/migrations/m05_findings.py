"""What was found in calls that ended well, and rollouts that ended in silence."""

from __future__ import annotations

from sqlite_utils import Database

from lightning_proxy.store.migrations.registry import migrations, statements

_FINDINGS = """
-- What is wrong in a call beside its error: few calls have any. Goes with its span.
CREATE TABLE findings (
  span_id     INTEGER NOT NULL REFERENCES spans ON DELETE CASCADE,
  error_class TEXT NOT NULL,
  detail      TEXT NOT NULL,
  call_id     TEXT,
  at          REAL NOT NULL
);
CREATE INDEX findings_by_span ON findings (span_id);
CREATE INDEX rollouts_failed ON rollouts (error_class) WHERE error_class IS NOT NULL;

-- One row: up to which span silent rollouts have been looked for. What was there before is left alone.
CREATE TABLE silence (examined INTEGER NOT NULL);
INSERT INTO silence SELECT coalesce(max(span_id), 0) FROM spans;
ALTER TABLE rollouts ADD COLUMN presumed INTEGER NOT NULL DEFAULT 0;
"""


@migrations()
def findings(db: Database) -> None:
    """What was found in calls that ended well, and rollouts that ended in silence."""
    for statement in statements(_FINDINGS):
        db.execute(statement)
