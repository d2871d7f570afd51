"""Rollouts, attempts, keys, spans, generations, rewards, runs, consumptions, versions."""

from __future__ import annotations

from sqlite_utils import Database

from lightning_proxy.store.migrations.registry import migrations, statements

_FIRST = """
CREATE TABLE rollouts (
  rollout_id TEXT PRIMARY KEY,
  task_id    TEXT,
  state      TEXT NOT NULL,
  created_at REAL NOT NULL,
  ended_at   REAL,
  reason     TEXT,
  incomplete TEXT,
  metadata   TEXT NOT NULL DEFAULT '{}'
) WITHOUT ROWID;
CREATE INDEX rollouts_by_time ON rollouts (created_at);
CREATE INDEX rollouts_by_task ON rollouts (task_id) WHERE task_id IS NOT NULL;

CREATE TABLE attempts (
  rollout_id TEXT NOT NULL REFERENCES rollouts,
  number     INTEGER NOT NULL,
  started_at REAL NOT NULL,
  ended_at   REAL,
  state      TEXT NOT NULL,
  PRIMARY KEY (rollout_id, number)
) WITHOUT ROWID;

-- A key that an agent sends in place of the provider's names its rollout. Only its hash is kept.
CREATE TABLE rollout_keys (
  key_sha256 BLOB PRIMARY KEY,
  rollout_id TEXT NOT NULL REFERENCES rollouts,
  attempt    INTEGER NOT NULL,
  role       TEXT
) WITHOUT ROWID;

CREATE TABLE spans (
  span_id            INTEGER PRIMARY KEY,
  rollout_id         TEXT NOT NULL REFERENCES rollouts,
  attempt            INTEGER NOT NULL,
  role               TEXT,
  wire               TEXT NOT NULL,
  model              TEXT,
  policy             TEXT,
  policy_version     INTEGER,
  policy_version_end INTEGER,
  attributed_by      TEXT NOT NULL,
  attribution_confidence REAL NOT NULL,
  started_at         REAL NOT NULL,
  first_byte_at      REAL,
  ended_at           REAL NOT NULL,
  streamed           INTEGER NOT NULL,
  status             INTEGER,
  response_id        TEXT,
  fidelity           TEXT NOT NULL,
  error_class        TEXT,
  error              TEXT,
  usage              TEXT,
  sampling           TEXT NOT NULL,
  request            BLOB NOT NULL,
  response           BLOB,
  -- A span ends in a response or in an error, never both and never neither.
  CHECK ((response IS NULL) <> (error_class IS NULL))
);
CREATE INDEX spans_by_rollout ON spans (rollout_id, attempt);
CREATE INDEX spans_by_response ON spans (response_id) WHERE response_id IS NOT NULL;
-- The few that are not as they should be, so that counting them does not read the table.
CREATE INDEX spans_failed ON spans (error_class) WHERE error_class IS NOT NULL;
CREATE INDEX spans_not_exact ON spans (fidelity) WHERE fidelity <> 'exact';

CREATE TABLE generations (
  span_id            INTEGER NOT NULL REFERENCES spans,
  choice             INTEGER NOT NULL,
  finish_reason      TEXT,
  prompt_token_ids   BLOB NOT NULL,  -- int32, little-endian
  response_token_ids BLOB NOT NULL,  -- int32, little-endian
  logprobs           BLOB NOT NULL,  -- float32, little-endian
  PRIMARY KEY (span_id, choice)  -- with a rowid: rows of some KB in the key's own tree cost a third more
);

CREATE TABLE rewards (
  reward_id       INTEGER PRIMARY KEY AUTOINCREMENT,
  rollout_id      TEXT NOT NULL REFERENCES rollouts,
  attempt         INTEGER,
  span_id         INTEGER REFERENCES spans,
  name            TEXT NOT NULL,
  value           REAL NOT NULL,
  source          TEXT,
  comment         TEXT,
  idempotency_key TEXT UNIQUE,
  created_at      REAL NOT NULL
);
CREATE INDEX rewards_by_rollout ON rewards (rollout_id);

CREATE TABLE training_runs (
  run_id           INTEGER PRIMARY KEY AUTOINCREMENT,
  policy           TEXT NOT NULL,
  state            TEXT NOT NULL,
  owner            TEXT NOT NULL,
  started_at       REAL NOT NULL,
  lease_expires_at REAL NOT NULL,
  ended_at         REAL,
  report           TEXT NOT NULL DEFAULT '{}',
  error            TEXT
);
-- Two runs of one policy at once cannot exist, whatever the processes do.
CREATE UNIQUE INDEX one_running_per_policy ON training_runs (policy) WHERE state = 'running';

-- What a run drained. It counts as consumed while the run is running or committed:
-- one change of the run's state hands all of it over, or gives all of it back.
CREATE TABLE consumptions (
  run_id     INTEGER NOT NULL REFERENCES training_runs,
  rollout_id TEXT NOT NULL REFERENCES rollouts,
  PRIMARY KEY (run_id, rollout_id)
) WITHOUT ROWID;
CREATE INDEX consumptions_by_rollout ON consumptions (rollout_id);

CREATE TABLE policy_versions (
  policy     TEXT NOT NULL,
  version    INTEGER NOT NULL,
  path       TEXT NOT NULL,
  status     TEXT NOT NULL,
  created_at REAL NOT NULL,
  parent     INTEGER,
  run_id     INTEGER REFERENCES training_runs,
  probe      TEXT,
  note       TEXT,
  PRIMARY KEY (policy, version)
) WITHOUT ROWID;
CREATE UNIQUE INDEX one_active_per_policy ON policy_versions (policy) WHERE status = 'active';
"""


@migrations()
def first_schema(db: Database) -> None:
    """Rollouts, attempts, keys, spans, generations, rewards, runs, consumptions, versions."""
    for statement in statements(_FIRST):
        db.execute(statement)
