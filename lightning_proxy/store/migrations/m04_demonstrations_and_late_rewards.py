"""Entries without a value; what a run knew of the ledger when it drained; automatic rewards."""

from __future__ import annotations

from sqlite_utils import Database

from lightning_proxy.store.migrations.registry import migrations, statements

# A new table in place of the old one, for SQLite cannot drop a NOT NULL.
_LEDGER = """
CREATE TABLE new_rewards (
  reward_id       INTEGER PRIMARY KEY AUTOINCREMENT,
  rollout_id      TEXT NOT NULL REFERENCES rollouts,
  attempt         INTEGER,
  span_id         INTEGER REFERENCES spans,
  name            TEXT NOT NULL,
  value           REAL,  -- NULL: a comment or a demonstration alone
  source          TEXT,
  comment         TEXT,
  idempotency_key TEXT UNIQUE,
  created_at      REAL NOT NULL,
  demonstration   TEXT,  -- JSON: a text or a message
  CHECK (value IS NOT NULL OR comment IS NOT NULL OR demonstration IS NOT NULL)
);
INSERT INTO new_rewards (reward_id, rollout_id, attempt, span_id, name, value, source, comment,
  idempotency_key, created_at)
SELECT reward_id, rollout_id, attempt, span_id, name, value, source, comment, idempotency_key, created_at
FROM rewards;
DROP TABLE rewards;
ALTER TABLE new_rewards RENAME TO rewards;
CREATE INDEX rewards_by_rollout ON rewards (rollout_id);
CREATE INDEX rewards_with_demonstration ON rewards (reward_id) WHERE demonstration IS NOT NULL;

-- What a run knew of a rollout: its ledger up to last_reward_id, for this attempt. So the return that it
-- was trained on can be told from the one that it has now. The group is the one that it was compared in.
ALTER TABLE consumptions ADD COLUMN attempt INTEGER;
ALTER TABLE consumptions ADD COLUMN last_reward_id INTEGER;
ALTER TABLE consumptions ADD COLUMN group_key TEXT;
CREATE INDEX consumptions_by_group ON consumptions (run_id, group_key) WHERE group_key IS NOT NULL;

-- Attempts that automatic rewards were entered for: which kinds, and up to which call and state.
CREATE TABLE judgements (
  rollout_id   TEXT NOT NULL REFERENCES rollouts,
  attempt      INTEGER NOT NULL,
  kinds        TEXT NOT NULL,
  last_span_id INTEGER NOT NULL,
  state        TEXT NOT NULL,
  PRIMARY KEY (rollout_id, attempt)
) WITHOUT ROWID;
UPDATE consumptions SET
  attempt = (SELECT max(number) FROM attempts AS a WHERE a.rollout_id = consumptions.rollout_id),
  last_reward_id = (SELECT max(reward_id) FROM rewards AS w WHERE w.rollout_id = consumptions.rollout_id);
"""


@migrations()
def demonstrations_and_late_rewards(db: Database) -> None:
    """Entries without a value; what a run knew of the ledger when it drained; automatic rewards."""
    newest = next(iter(db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'rewards'")), (0,))[0]
    for statement in statements(_LEDGER):
        db.execute(statement)
    # No id is given out twice, even where the newest entries are gone.
    db.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'rewards'", [newest])
