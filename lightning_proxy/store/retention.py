"""Deleting rollouts with everything that was recorded of them, so that it is gone from the file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from lightning_proxy.store.store import Store
from lightning_proxy.words import RolloutState

# What happened last in a rollout: its beginning, its end, a call, a reward.
_SILENT = """
r.created_at < :before AND coalesce(r.ended_at, 0) < :before
AND NOT EXISTS (SELECT 1 FROM spans AS s WHERE s.rollout_id = r.rollout_id AND s.ended_at >= :before)
AND NOT EXISTS (SELECT 1 FROM rewards AS w WHERE w.rollout_id = r.rollout_id AND w.created_at >= :before)"""
_TAGGED = """
EXISTS (SELECT 1 FROM json_each(r.metadata) AS tag WHERE tag.key = :key{0}
        AND CASE tag.type WHEN 'true' THEN 'true' WHEN 'false' THEN 'false' WHEN 'null' THEN 'null'
            ELSE CAST(tag.value AS TEXT) END = :value{0})"""
_HELD = """
EXISTS (SELECT 1 FROM consumptions AS c JOIN training_runs AS t USING (run_id)
        WHERE c.rollout_id = r.rollout_id AND t.state = 'running'
          AND t.lease_expires_at > (julianday('now') - 2440587.5) * 86400)"""
# Every table with rows of a rollout, in an order in which nothing refers to what is gone.
# Spans go first, with their contents and generations.
# The pool keeps its view (task_rollouts), so that what was carried out is not carried out again.
TABLES_OF_A_ROLLOUT = ("judgements", "rewards", "consumptions", "rollout_keys", "attempts", "rollouts")
_SPANS_AT_A_TIME = (
    200  # deleted in one transaction, so that a call's span waits for some milliseconds at most
)
_SHORT_WAIT_MS = 100  # for readers, while the log is emptied: writers wait that long too


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rollouts: those to which everything that is given applies."""

    rollout_ids: tuple[str, ...] = ()  # one of these; empty: whichever
    silent_since: float | None = None  # Unix time since when nothing happened in them, open or not
    tags: Mapping[str, str] = field(default_factory=dict)  # of their metadata; values as JSON texts

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing, and so would mean every rollout."""
        return not self.rollout_ids and self.silent_since is None and not self.tags


@dataclass(frozen=True, slots=True)
class Found:
    """What a selection means at the moment."""

    rollout_ids: tuple[str, ...]  # oldest first
    held: tuple[str, ...]  # left alone: a training run that is running holds them under its lease


@dataclass(slots=True)
class Deleted:
    """What has been deleted."""

    rollouts: int = 0
    spans: int = 0
    held: list[str] = field(default_factory=list)  # left alone, as in :class:`Found`


def find_rollouts(store: Store, selection: Selection) -> Found:
    """The rollouts that a selection means. Raises ``UnknownTarget`` for an id that there is not."""
    for rollout_id in selection.rollout_ids:
        store.get_rollout(rollout_id)
    where, values = ["1"], dict[str, Any]()
    if selection.rollout_ids:
        where.append("r.rollout_id IN (SELECT value FROM json_each(:ids))")
        values["ids"] = orjson.dumps(selection.rollout_ids).decode()
    if selection.silent_since is not None:
        where.append(_SILENT)
        values["before"] = selection.silent_since
    for number, (key, value) in enumerate(selection.tags.items()):
        where.append(_TAGGED.format(number))
        values |= {f"key{number}": key, f"value{number}": value}
    sql = (
        f"SELECT r.rollout_id, {_HELD} AS held FROM rollouts AS r WHERE {' AND '.join(where)} "
        "ORDER BY r.created_at, r.rollout_id"
    )
    rows = store.rows(sql, values)
    return Found(
        tuple(row["rollout_id"] for row in rows if not row["held"]),
        tuple(row["rollout_id"] for row in rows if row["held"]),
    )


def delete_rollouts(
    store: Store, rollout_ids: Iterable[str], on_rollout: Callable[[str], None] = lambda _: None
) -> Deleted:
    """Delete these rollouts in small transactions, newest span first; calls ``on_rollout`` after each.

    What is freed is overwritten (``secure_delete``), so that it is gone from the database; the log
    still has it until :func:`empty_log`. A rollout that a running training run holds is left alone, also
    where the run takes it in the middle of this; one that is not there any more counts as nothing.
    """
    deleted = Deleted()
    for rollout_id in rollout_ids:
        if not _delete(store, rollout_id, deleted):
            deleted.held.append(rollout_id)
        on_rollout(rollout_id)
    return deleted


def _delete(store: Store, rollout_id: str, deleted: Deleted) -> bool:
    """Whether the rollout is gone."""
    gone: int | None = None
    while gone is None:
        started = time.monotonic()
        with store.transaction():
            if store.rows(f"SELECT 1 FROM rollouts AS r WHERE r.rollout_id = ? AND {_HELD}", (rollout_id,)):
                return False
            spans = store.delete_newest_spans(rollout_id, _SPANS_AT_A_TIME)
            deleted.spans += spans
            if spans < _SPANS_AT_A_TIME:
                _end_in_the_pool(store, rollout_id)
                for table in TABLES_OF_A_ROLLOUT:
                    sql = f"DELETE FROM {table} WHERE rollout_id = ?"
                    gone = store.connection.execute(sql, (rollout_id,)).rowcount
        time.sleep(time.monotonic() - started)  # others want to write too
    deleted.rollouts += gone
    return True


def _end_in_the_pool(store: Store, rollout_id: str) -> None:
    """The pool must neither hand it out again nor wait for its end; its worker is told to stop."""
    sql = "SELECT 1 FROM task_rollouts WHERE rollout_id = ? AND state IN ('running', 'waiting')"
    if store.rows(sql, (rollout_id,)):
        store.finish_rollout(rollout_id, RolloutState.CANCELLED, "deleted")


def empty_log(store: Store, tries: int = 10) -> bool:
    """Copy the log into the database and cut it to nothing; false where somebody kept reading from it."""
    patience = store.scalar("PRAGMA busy_timeout")
    store.scalar(f"PRAGMA busy_timeout={_SHORT_WAIT_MS}")
    try:
        return any(store.rows("PRAGMA wal_checkpoint(TRUNCATE)")[0][0] == 0 for _ in range(tries))
    finally:
        store.scalar(f"PRAGMA busy_timeout={patience}")


def vacuum(store: Store) -> None:
    """Write the file anew without what is free in it, and so make it smaller.

    Takes the room of the database once more while it runs, and lets nobody write. Raises
    ``StoreUnavailable`` where somebody else writes.
    """
    store.rows("VACUUM")


def room(store: Store) -> tuple[int, int]:
    """Bytes of the database, and how many of them are free for what will be recorded."""
    size = store.scalar("PRAGMA page_size")
    return size * store.scalar("PRAGMA page_count"), size * store.scalar("PRAGMA freelist_count")
