"""The store: everything that is recorded, in one SQLite file (WAL).

Read first ``records.py`` (what there is, in the field's words), then ``schema.py`` (the same as
tables), then the part that you are after::

    connection.py   opening, migrating, transactions, SQLite's errors in our words
    rollouts.py     rollouts, attempts, keys
    spans.py        spans; adding one is the hot path
    content.py      what a span holds, told by an earlier one: encoding and decoding, no SQL
    archive.py      where that lies, written and read back
    recent.py       the last spans' content, in memory: what the next ones are told by
    packing.py      token ids and logprobs as bytes
    rewards.py      the ledger of rewards
    policies.py     versions of policies: staged, active, retired, rejected
    runs.py         training runs: leases, draining, committing
    store.py        `Store`, all of the above in one class, with the lists and counts across them
    retention.py    deleting rollouts, emptying the log, VACUUM
    json_view.py    records as JSON values
    writer.py       `Writer`, the one writer thread of an asyncio process, with group commit

May import ``errors`` and nothing else of this package. sqlite-utils is imported only where a
database is made or migrated.
"""

from lightning_proxy.store.json_view import as_json
from lightning_proxy.store.records import (
    Attempt,
    Backlog,
    ConversationEnd,
    ErrorClass,
    Fidelity,
    Generation,
    KeyOwner,
    PolicyVersion,
    RecordedRollout,
    Reward,
    Rollout,
    RolloutState,
    RolloutSummary,
    RunState,
    Span,
    TrainingRun,
    VersionStatus,
)
from lightning_proxy.store.store import Store
from lightning_proxy.store.writer import Writer

__all__ = [
    "Attempt",
    "Backlog",
    "ConversationEnd",
    "ErrorClass",
    "Fidelity",
    "Generation",
    "KeyOwner",
    "PolicyVersion",
    "RecordedRollout",
    "Reward",
    "Rollout",
    "RolloutState",
    "RolloutSummary",
    "RunState",
    "Span",
    "Store",
    "TrainingRun",
    "VersionStatus",
    "Writer",
    "as_json",
]
