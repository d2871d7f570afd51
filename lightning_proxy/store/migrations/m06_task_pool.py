"""Tasks, and the rollouts that were handed out for them."""

from __future__ import annotations

from sqlite_utils import Database

from lightning_proxy.store.migrations.registry import migrations, statements

_TASK_POOL = """
CREATE TABLE tasks (
  position         INTEGER PRIMARY KEY AUTOINCREMENT,  -- in the order of enqueuing
  task_id          TEXT NOT NULL UNIQUE,
  input            TEXT NOT NULL,
  metadata         TEXT NOT NULL,
  resources        TEXT,
  group_size       INTEGER NOT NULL,
  rounds           INTEGER NOT NULL,
  priority         INTEGER NOT NULL,
  max_attempts     INTEGER NOT NULL,
  retry_on         TEXT NOT NULL,
  timeout_s        REAL,
  silence_s        REAL,
  state            TEXT NOT NULL,
  created_at       REAL NOT NULL,
  round            INTEGER NOT NULL,
  standing         TEXT NOT NULL,
  skipped_solved   INTEGER NOT NULL,
  skipped_hopeless INTEGER NOT NULL
);
CREATE INDEX tasks_open ON tasks (priority DESC, round, position) WHERE state = 'open';

-- The pool's view of a rollout that it handed out. It outlives the rollout: a task whose rollouts were
-- deleted is not carried out again.
CREATE TABLE task_rollouts (
  rollout_id       TEXT PRIMARY KEY,
  task_id          TEXT NOT NULL REFERENCES tasks (task_id),
  round            INTEGER NOT NULL,
  state            TEXT NOT NULL,     -- running, waiting (for its next attempt), succeeded, failed, cancelled
  attempt          INTEGER NOT NULL,  -- the latest
  tries            INTEGER NOT NULL,  -- attempts that failed and count against max_attempts
  losses           INTEGER NOT NULL,  -- attempts whose worker was lost
  worker           TEXT NOT NULL,     -- of the latest attempt, as all of the following
  claimed_at       REAL NOT NULL,
  lease_s          REAL NOT NULL,
  lease_expires_at REAL NOT NULL,
  alive_at         REAL NOT NULL,     -- its last sign of life that was looked at
  ended_at         REAL,
  error_class      TEXT
) WITHOUT ROWID;
CREATE INDEX task_rollouts_by_task ON task_rollouts (task_id, round, state, error_class);
CREATE INDEX task_rollouts_running ON task_rollouts (worker) WHERE state = 'running';
"""


@migrations()
def task_pool(db: Database) -> None:
    """Tasks, and the rollouts that were handed out for them."""
    for statement in statements(_TASK_POOL):
        db.execute(statement)
