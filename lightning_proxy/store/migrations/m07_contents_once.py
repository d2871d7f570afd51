"""Content in a table of its own, a conversation's once; token counts in the span's head."""

from __future__ import annotations

from sqlite_utils import Database

from lightning_proxy.store.migrations.registry import migrations, statements

_CONTENTS = """
-- What a span holds beside its head; content.py says how. Where it is here, its spans.request and
-- spans.response are empty and it has no rows in generations. Spans from before this table have theirs there.
CREATE TABLE contents (
  span_id  INTEGER PRIMARY KEY REFERENCES spans,
  base     INTEGER,           -- an earlier span of the same attempt, without which this cannot be read
  root     INTEGER,           -- the first of the chain of bases; NULL: this is it
  depth    INTEGER NOT NULL,  -- how many spans have to be read before this one
  chain    INTEGER NOT NULL,  -- bytes of theirs and its own that have to be read
  response BLOB,              -- first, for it is read without the others
  request  BLOB NOT NULL,
  tokens   BLOB
);
-- Deleted spans keep their ids to themselves: a late reward must not meet somebody else's span.
CREATE TABLE deletions (count INTEGER NOT NULL, last_span_id INTEGER NOT NULL);
INSERT INTO deletions VALUES (0, 0);
-- Without these, each deleted row of spans and rollouts would be looked for in the whole of these tables.
CREATE INDEX rewards_by_span ON rewards (span_id) WHERE span_id IS NOT NULL;
CREATE INDEX rollout_keys_by_rollout ON rollout_keys (rollout_id);
"""


@migrations()
def contents_once(db: Database) -> None:
    """Content in a table of its own, a conversation's once; token counts in the span's head."""
    for statement in statements(_CONTENTS):
        db.execute(statement)
    # NULL where the span has no generations, or is from before these columns.
    db.execute("ALTER TABLE spans ADD COLUMN prompt_tokens INTEGER")
    db.execute("ALTER TABLE spans ADD COLUMN response_tokens INTEGER")
