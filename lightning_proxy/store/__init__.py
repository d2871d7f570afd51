"""The store: everything that is recorded, in one SQLite file (WAL).

Read first ``records.py`` (what there is, in the field's words), then ``migrations/`` (the same as
tables), then the part that you are after::

    connection.py   opening, migrating, transactions, SQLite's errors in our words
    rollouts.py     rollouts, attempts, keys
    spans.py        spans; adding one is the hot path
    content.py      what a span holds, told by an earlier one: encoding and decoding, no SQL
    archive.py      where that lies, written and read back
    recent.py       the last spans' content, in memory: what the next ones are told by
    packing.py      token ids and logprobs as bytes
    rewards.py      the ledger of rewards
    returns.py      what the rewards of a rollout add up to
    rounds.py       rounds of the task pool: whether more of a group is to come
    policies.py     versions of policies: staged, active, retired, rejected
    runs.py         training runs: leases, draining, committing
    intervals.py    confidence intervals of mean returns (no I/O)
    comparison.py   versions compared by their returns
    judgements.py   which rollouts automatic rewards were entered for
    causes.py       why a rollout failed: the root cause (no SQL)
    failures.py     failed rollouts, silent ones, failures in numbers
    tasks.py        the task pool: what there is to do; task_records.py has its records
    claims.py       handing it out: leases, signs of life, retries, what became of the lost
    curriculum.py   which tasks are worth another group (a rule without I/O)
    store.py        `Store`, all of the above in one class, with the lists and counts across them
    retention.py    deleting rollouts, emptying the log, VACUUM
    json_view.py    records as JSON values
    writer.py       `Writer`, the one writer thread of an asyncio process, with group commit

May import ``errors`` and nothing else of this package. sqlite-utils is imported only where a
database is made or migrated.
"""

from lightning_proxy.store.causes import failed_by_infrastructure, last_call, root_cause
from lightning_proxy.store.comparison import Comparison, VersionReturns, against_from
from lightning_proxy.store.failures import By, seconds_of
from lightning_proxy.store.intervals import Estimate, Method
from lightning_proxy.store.json_view import as_json
from lightning_proxy.store.judgements import Unjudged
from lightning_proxy.store.records import (
    INFRASTRUCTURE,
    Attempt,
    Backlog,
    ConversationEnd,
    ErrorClass,
    FailureExample,
    FailureSummary,
    Finding,
    Generation,
    KeyOwner,
    PolicyVersion,
    RecordedRollout,
    Reward,
    Rollout,
    RolloutSummary,
    RunState,
    Span,
    TrainingRun,
    VersionStatus,
)
from lightning_proxy.store.returns import Payment, RewardRule, add_up
from lightning_proxy.store.store import Store
from lightning_proxy.store.task_records import (
    Assignment,
    LeaseState,
    NewTask,
    PoolProgress,
    Prefer,
    Standing,
    Task,
    TaskSummary,
    new_task,
)
from lightning_proxy.store.writer import Writer
from lightning_proxy.words import Fidelity, RolloutState, TaskState

__all__ = [
    "INFRASTRUCTURE",
    "Assignment",
    "Attempt",
    "Backlog",
    "By",
    "Comparison",
    "ConversationEnd",
    "ErrorClass",
    "Estimate",
    "FailureExample",
    "FailureSummary",
    "Fidelity",
    "Finding",
    "Generation",
    "KeyOwner",
    "LeaseState",
    "Method",
    "NewTask",
    "Payment",
    "PolicyVersion",
    "PoolProgress",
    "Prefer",
    "RecordedRollout",
    "Reward",
    "RewardRule",
    "Rollout",
    "RolloutState",
    "RolloutSummary",
    "RunState",
    "Span",
    "Standing",
    "Store",
    "Task",
    "TaskState",
    "TaskSummary",
    "TrainingRun",
    "Unjudged",
    "VersionReturns",
    "VersionStatus",
    "Writer",
    "add_up",
    "against_from",
    "as_json",
    "failed_by_infrastructure",
    "last_call",
    "new_task",
    "root_cause",
    "seconds_of",
]
