"""The tables, as migrations of sqlite-utils: one function per change, never edited once landed."""

from __future__ import annotations

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

# connection.py has the number of migrations as SCHEMA_VERSION, so that a database that is up to
# date is opened without importing this file (and sqlite-utils).
migrations = Migrations("lightning_proxy")

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
    for statement in _statements(_FIRST):
        db.execute(statement)


@migrations()
def retries_and_conversations(db: Database) -> None:
    """Which try a span is, and by which digest its conversation is found again."""
    db.execute("ALTER TABLE spans ADD COLUMN retry INTEGER NOT NULL DEFAULT 0")
    db.execute("ALTER TABLE spans ADD COLUMN conversation BLOB")  # 16 bytes; see proxy/conversation.py
    db.execute("CREATE INDEX spans_by_conversation ON spans (conversation) WHERE conversation IS NOT NULL")


@migrations()
def failures(db: Database) -> None:
    """Why an attempt ended as it did, and which class of failure it was."""
    for table in ("rollouts", "attempts"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN error_class TEXT")
    db.execute("ALTER TABLE attempts ADD COLUMN reason TEXT")


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
    for statement in _statements(_LEDGER):
        db.execute(statement)
    # No id is given out twice, even where the newest entries are gone.
    db.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'rewards'", [newest])


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
    for statement in _statements(_FINDINGS):
        db.execute(statement)


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
    for statement in _statements(_TASK_POOL):
        db.execute(statement)


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
    for statement in _statements(_CONTENTS):
        db.execute(statement)
    # NULL where the span has no generations, or is from before these columns.
    db.execute("ALTER TABLE spans ADD COLUMN prompt_tokens INTEGER")
    db.execute("ALTER TABLE spans ADD COLUMN response_tokens INTEGER")


@migrations()
def redaction(db: Database) -> None:
    """By which rules a span lost what must not be kept."""
    db.execute("ALTER TABLE spans ADD COLUMN redacted TEXT")


@migrations()
def imports(db: Database) -> None:
    """Which spans of other tracers have been imported: trace id and span id, 24 bytes."""
    db.execute("CREATE TABLE imported (origin BLOB PRIMARY KEY) WITHOUT ROWID")


def _statements(script: str) -> list[str]:
    """Split a script on ';' at line end, so that it can run inside the migration's transaction."""
    parts = [part.strip() for part in script.split(";\n")]
    return [part for part in parts if part]
