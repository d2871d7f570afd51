"""Handing out the task pool: claims under a lease, signs of life, ends, and what becomes of the lost.

A rollout of the pool is ``running`` (an attempt is leased to a worker), ``waiting`` (for its next
attempt), or has ended. Every change is one transaction, so that workers in any number of processes
never get the same attempt, and no round gets more rollouts than its task asks for.

What counts against ``max_attempts``: attempts that failed. What does not: attempts that were given
back, and the first ``FORGIVEN_LOSSES`` of a rollout whose worker was lost, for that says nothing of
the agent (unless it is the agent that takes its worker down, time and again).

After a failure that counts, the next attempt is handed out after a pause that doubles with each: what is
overloaded, or just starting, gets time to recover. What was given back or lost follows at once.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Sequence
from typing import Any

import orjson

from lightning_proxy.errors import Conflict, InvalidInput, UnknownTarget
from lightning_proxy.store.curriculum import is_skipped
from lightning_proxy.store.records import ErrorClass, Rollout
from lightning_proxy.store.rounds import LACKING
from lightning_proxy.store.runs import lease_end
from lightning_proxy.store.task_records import Assignment, LeaseState, Prefer, Standing
from lightning_proxy.store.tasks import Tasks, task_from
from lightning_proxy.words import RolloutState, TaskState

FORGIVEN_LOSSES = 10
FIRST_PAUSE_S = 0.5  # before the second try; twice as long before each further one
LONGEST_PAUSE_S = 60.0

_RANKS = "CASE t.standing WHEN 'mixed' THEN 0 WHEN 'unseen' THEN 1 ELSE 2 END, "
_CANDIDATES = f"""
SELECT t.*, {LACKING} AS lacking,
  EXISTS (SELECT 1 FROM task_rollouts AS p WHERE p.task_id = t.task_id AND p.round = t.round) AS begun
FROM tasks AS t WHERE t.state = 'open' {{only}}
  AND ({LACKING} > 0 OR EXISTS (SELECT 1 FROM task_rollouts AS p
                                WHERE p.task_id = t.task_id AND p.state = 'waiting'
                                  AND coalesce(p.not_before, 0) <= ?))
ORDER BY t.priority DESC, {{ranks}}t.round, t.position LIMIT ?"""
_ONLY = "AND t.task_id IN (SELECT value FROM json_each(?))"
_WAITING = """
SELECT rollout_id, attempt FROM task_rollouts
WHERE task_id = ? AND state = 'waiting' AND coalesce(not_before, 0) <= ? ORDER BY round, rollout_id LIMIT ?"""
_NEXT_RETRY = "SELECT min(not_before) FROM task_rollouts WHERE state = 'waiting' AND not_before > ?"
_ADD = """
INSERT INTO task_rollouts (rollout_id, task_id, round, state, attempt, tries, losses, worker, claimed_at,
  lease_s, lease_expires_at, alive_at)
VALUES (?, ?, ?, 'running', 1, 0, 0, ?, ?, ?, ?, ?)"""
_CLAIM_AGAIN = """
UPDATE task_rollouts SET state = 'running', attempt = ?, worker = ?, claimed_at = ?, lease_s = ?,
  lease_expires_at = ?, alive_at = ? WHERE rollout_id = ?"""
_OVERDUE = """
SELECT p.*, t.timeout_s, t.silence_s FROM task_rollouts AS p JOIN tasks AS t USING (task_id)
WHERE p.state = 'running' AND (p.lease_expires_at <= :now OR p.claimed_at + t.timeout_s <= :now
                               OR p.alive_at + t.silence_s <= :now)"""
_END_ATTEMPT = """
UPDATE attempts SET state = ?, ended_at = ?, reason = ?, error_class = ?
WHERE rollout_id = ? AND number = ?"""


class Claims(Tasks):
    """The part of the store that hands out what there is to do."""

    def claim_tasks(
        self,
        worker: str,
        *,
        limit: int = 1,
        lease_s: float = 60.0,
        prefer: Prefer | None = None,
        task_ids: Sequence[str] | None = None,
    ) -> list[Assignment]:
        """Lease up to ``limit`` attempts to ``worker`` until ``lease_s`` seconds of silence.

        By priority, then round, then order of enqueuing, so that groups are filled one after another;
        of a task, attempts that are to be repeated come first. ``prefer`` puts tasks whose last
        rollouts disagree first and skips rounds of others (``curriculum.py``). ``task_ids``: these only.
        """
        if not worker:
            raise InvalidInput("worker must not be empty: it says who has the lease")
        expires_at = lease_end(lease_s)
        given: list[Assignment] = []
        with self.transaction():
            self.sweep_tasks()
            now = time.time()
            while len(given) < limit:
                rows = self._candidates(limit, now, prefer, task_ids)
                for row in rows:
                    if len(given) < limit and not (prefer and self._skip(row)):
                        given += self._claim(row, worker, limit - len(given), now, lease_s, expires_at)
                if not rows:
                    break
        return given

    def next_retry_at(self) -> float | None:
        """When the next pause before another attempt is over; ``None`` where there is none."""
        at: float | None = self.scalar(_NEXT_RETRY, (time.time(),))
        return at

    def heartbeat_attempt(
        self, rollout_id: str, attempt: int, *, lease_s: float | None = None, alive: bool = True
    ) -> LeaseState:
        """Keep the lease, for ``lease_s`` or what it was claimed for; told is whether to stop.

        ``alive``: that the agent lives too, not its worker alone. Raises ``UnknownTarget``.
        """
        now = time.time()
        if lease_s is not None:
            lease_end(lease_s)
        with self.transaction():
            self.connection.execute(
                "UPDATE task_rollouts SET lease_s = coalesce(:lease_s, lease_s), "
                "lease_expires_at = :now + coalesce(:lease_s, lease_s), "
                "alive_at = CASE WHEN :alive THEN :now ELSE alive_at END "
                "WHERE rollout_id = :rollout_id AND attempt = :attempt AND state = 'running'",
                {
                    "lease_s": lease_s,
                    "now": now,
                    "alive": alive,
                    "rollout_id": rollout_id,
                    "attempt": attempt,
                },
            )
            # Nobody else's lease: while the store was in trouble, their heartbeats may wait behind this one.
            now = time.time()
            for row in self.rows(
                f"{_OVERDUE} AND p.rollout_id = :rollout_id", {"now": now, "rollout_id": rollout_id}
            ):
                self._sweep(row, now)
            row = self._pool_row(rollout_id)
            if row["attempt"] == attempt and row["state"] == "running":
                return LeaseState(False, None, row["lease_expires_at"])
            # An agent that reports its own success may still have to clear up.
            stop = row["attempt"] != attempt or row["state"] != "succeeded"
            return LeaseState(stop, self._what_became_of(row, attempt), None)

    def finish_attempt(
        self,
        rollout_id: str,
        attempt: int,
        state: RolloutState,
        reason: str | None = None,
        error_class: ErrorClass | None = None,
    ) -> Rollout:
        """End an attempt; the same again changes nothing. A failed one may be followed by another.

        The worker's word counts as long as nobody else has the rollout, even after its lease ran out.
        Raises ``UnknownTarget``, ``InvalidInput`` as :meth:`finish_rollout`, ``Conflict`` where the attempt
        ended otherwise or was given to somebody else.
        """
        with self.transaction():
            row = self._pool_row(rollout_id)
            if state is RolloutState.FAILED:
                error_class, reason = self.cause_of_failure(
                    rollout_id, attempt, error_class or ErrorClass.AGENT_CRASH, reason
                )
            if row["attempt"] == attempt and row["state"] == "running":
                if state is RolloutState.FAILED:
                    self._fail(row, reason, error_class or ErrorClass.AGENT_CRASH, explained=True)
                else:
                    self.finish_rollout(rollout_id, state, reason, error_class)
            elif not self._ended_so(rollout_id, attempt, state, error_class):
                late = row["attempt"] == attempt and row["state"] == "waiting" and self._was_lost(row)
                if not (late and state is RolloutState.SUCCEEDED):
                    raise Conflict(
                        f"attempt {attempt} of rollout {rollout_id!r} cannot end as {state.value}: "
                        + self._what_became_of(row, attempt)
                    )
                self._end_attempt(row, state, reason, error_class)
                self.finish_rollout(rollout_id, state, reason, error_class)
            return self.get_rollout(rollout_id)

    def release_attempt(self, rollout_id: str, attempt: int, reason: str | None = None) -> str | None:
        """Give an attempt back, as if it had not been: another follows, and it does not count.

        One that has ended stays as it is, and how it ended is returned; ``None`` where it is given back,
        also where it was before. Raises ``UnknownTarget``.
        """
        with self.transaction():
            row = self._pool_row(rollout_id)
            if row["attempt"] == attempt and row["state"] == "running":
                self._end_attempt(row, RolloutState.CANCELLED, reason or "given back", None)
                self._wait(row, tries=row["tries"], losses=row["losses"])
                return None
            ended = self._what_became_of(row, attempt)
            sql = "SELECT state FROM attempts WHERE rollout_id = ? AND number = ?"
            cancelled = self.scalar(sql, (rollout_id, attempt)) == RolloutState.CANCELLED.value
            return None if cancelled and row["state"] != RolloutState.CANCELLED.value else ended

    def abandon_worker(self, worker: str) -> int:
        """What a worker holds is lost, as it says itself when it is back; returns how many attempts."""
        with self.transaction():
            held = self.rows("SELECT * FROM task_rollouts WHERE state = 'running' AND worker = ?", (worker,))
            for row in held:
                self._fail(
                    row, f"its worker {worker} ended without a word", ErrorClass.SILENT_DEATH, lost=True
                )
            return len(held)

    def sweep_tasks(self) -> int:
        """Fail attempts that took too long, are silent, or lost their worker; returns how many."""
        now = time.time()
        swept = 0
        with self.transaction():
            for row in self.rows(_OVERDUE, {"now": now}):
                swept += self._sweep(row, now)
        return swept

    def pool_is_overdue(self) -> bool:
        """Whether :meth:`sweep_tasks` has something to look at."""
        return bool(self.rows(f"{_OVERDUE} LIMIT 1", {"now": time.time()}))

    def forgive_downtime(self) -> None:
        """Count silence from now on: while there was no proxy, nobody could be heard."""
        now = time.time()
        with self.transaction():
            self.connection.execute(
                "UPDATE task_rollouts SET alive_at = ?, "
                "lease_expires_at = max(lease_expires_at, ? + lease_s) WHERE state = 'running'",
                (now, now),
            )

    # -- claiming --------------------------------------------------------------------------------

    def _candidates(
        self, limit: int, now: float, prefer: Prefer | None, task_ids: Sequence[str] | None
    ) -> list[sqlite3.Row]:
        values: list[Any] = [] if task_ids is None else [orjson.dumps(list(task_ids)).decode()]
        sql = _CANDIDATES.format(only="" if task_ids is None else _ONLY, ranks=_RANKS if prefer else "")
        return self.rows(sql, (*values, now, limit))

    def _skip(self, row: sqlite3.Row) -> bool:
        """Leave out a round that has not begun and promises nothing; true where it was left out."""
        if row["begun"]:
            return False
        standing = self.judge_task(row)
        skipped = is_skipped(standing, row["position"], row["round"])
        last = row["round"] >= row["rounds"]
        state = TaskState.DONE if skipped and last else TaskState.OPEN
        self.connection.execute(
            "UPDATE tasks SET standing = ?, state = ?, round = ?, skipped_solved = skipped_solved + ?, "
            "skipped_hopeless = skipped_hopeless + ? WHERE task_id = ?",
            (
                standing.value,
                state.value,
                row["round"] + (skipped and not last),
                skipped and standing is Standing.SOLVED,
                skipped and standing is Standing.HOPELESS,
                row["task_id"],
            ),
        )
        return skipped

    def _claim(
        self, row: sqlite3.Row, worker: str, limit: int, now: float, lease_s: float, expires_at: float
    ) -> list[Assignment]:
        task = task_from(row)
        given: list[tuple[str, int]] = []
        for waiting in self.rows(_WAITING, (task.task_id, now, limit)):
            attempt = waiting["attempt"] + 1
            self.connection.execute(
                _CLAIM_AGAIN, (attempt, worker, now, lease_s, expires_at, now, waiting["rollout_id"])
            )
            given.append((waiting["rollout_id"], attempt))
        for _ in range(min(row["lacking"], limit - len(given))):
            rollout, _ = self.create_rollout(task_id=task.task_id, metadata=task.metadata)
            values = (worker, now, lease_s, expires_at, now)
            self.connection.execute(_ADD, (rollout.rollout_id, task.task_id, task.round, *values))
            given.append((rollout.rollout_id, 1))
        return [
            Assignment(rollout_id, attempt, task, self.issue_key(rollout_id, attempt), expires_at)
            for rollout_id, attempt in given
        ]

    # -- ends ------------------------------------------------------------------------------------

    def _sweep(self, row: sqlite3.Row, now: float) -> bool:
        if row["timeout_s"] is not None and row["claimed_at"] + row["timeout_s"] <= now:
            self._fail(row, f"took longer than its {row['timeout_s']:g} s", ErrorClass.TIMEOUT)
            return True
        if row["lease_expires_at"] <= now:
            lost = f"its worker {row['worker']} was not heard of for {row['lease_s']:g} s"
            self._fail(row, lost, ErrorClass.SILENT_DEATH, lost=True)
            return True
        last_call = self.scalar(
            "SELECT max(ended_at) FROM spans WHERE rollout_id = ? AND attempt = ?",
            (row["rollout_id"], row["attempt"]),
        )
        if last_call is not None and last_call + row["silence_s"] > now:
            self.connection.execute(
                "UPDATE task_rollouts SET alive_at = ? WHERE rollout_id = ?", (last_call, row["rollout_id"])
            )
            return False
        silent = f"neither a call nor another sign of life for {row['silence_s']:g} s"
        self._fail(row, silent, ErrorClass.SILENT_DEATH)
        return True

    def _fail(
        self,
        row: sqlite3.Row,
        reason: str | None,
        error_class: ErrorClass,
        *,
        lost: bool = False,
        explained: bool = False,
    ) -> None:
        """End a running attempt as failed, and its rollout with it unless there may be another.

        A rollout ends by its root cause, whoever saw it fail, for training and comparisons go by that; it is
        looked for unless these tell it (``explained``). Before another attempt the class is what was seen: a
        worker that was silent may still be right.
        """
        task = self.row("SELECT * FROM tasks WHERE task_id = ?", (row["task_id"],))
        assert task is not None  # a foreign key holds it
        losses = row["losses"] + lost
        forgiven = lost and losses <= FORGIVEN_LOSSES
        tries = row["tries"] + (not forgiven)
        again = tries < task["max_attempts"] and error_class.value in orjson.loads(task["retry_on"])
        if forgiven or again:
            self._end_attempt(row, RolloutState.FAILED, reason, error_class)
            self._wait(row, tries=tries, losses=losses, pause_s=0.0 if forgiven else _pause_s(tries))
        else:
            cause: ErrorClass | None = error_class
            if not explained:
                cause, reason = self.cause_of_failure(row["rollout_id"], row["attempt"], error_class, reason)
            self.finish_rollout(row["rollout_id"], RolloutState.FAILED, reason, cause)

    def _end_attempt(
        self, row: sqlite3.Row, state: RolloutState, reason: str | None, error_class: ErrorClass | None
    ) -> None:
        failure = error_class and error_class.value
        values = (state.value, time.time(), reason, failure, row["rollout_id"], row["attempt"])
        self.connection.execute(_END_ATTEMPT, values)

    def _wait(self, row: sqlite3.Row, *, tries: int, losses: int, pause_s: float = 0.0) -> None:
        not_before = time.time() + pause_s if pause_s else None
        self.connection.execute(
            "UPDATE task_rollouts SET state = 'waiting', tries = ?, losses = ?, not_before = ? "
            "WHERE rollout_id = ?",
            (tries, losses, not_before, row["rollout_id"]),
        )

    # -- what there is -----------------------------------------------------------------------------

    def _pool_row(self, rollout_id: str) -> sqlite3.Row:
        row = self.row("SELECT * FROM task_rollouts WHERE rollout_id = ?", (rollout_id,))
        if row is None:
            raise UnknownTarget(f"no rollout {rollout_id!r} was handed out by the task pool")
        return row

    def _ended_so(
        self, rollout_id: str, attempt: int, state: RolloutState, error_class: ErrorClass | None
    ) -> bool:
        """Whether an attempt has ended this way already, so that saying it again changes nothing."""
        known = self.row(
            "SELECT state, error_class FROM attempts WHERE rollout_id = ? AND number = ?",
            (rollout_id, attempt),
        )
        if known is None:
            raise UnknownTarget(f"rollout {rollout_id!r} has no attempt {attempt}")
        failure = None if error_class is None else error_class.value
        return bool(known["state"] == state.value and known["error_class"] == failure)

    def _was_lost(self, row: sqlite3.Row) -> bool:
        pair = (row["rollout_id"], row["attempt"])
        sql = "SELECT error_class FROM attempts WHERE rollout_id = ? AND number = ?"
        return bool(self.scalar(sql, pair) == ErrorClass.SILENT_DEATH.value)

    def _what_became_of(self, row: sqlite3.Row, attempt: int) -> str:
        """In a sentence, for whoever still works on it."""
        sql = "SELECT state, reason FROM attempts WHERE rollout_id = ? AND number = ?"
        ended = self.row(sql, (row["rollout_id"], attempt))
        if ended is None and attempt <= row["attempt"]:
            return "it was deleted"
        if ended is None:
            raise UnknownTarget(f"rollout {row['rollout_id']!r} has no attempt {attempt}")
        how = f"it ended as {ended['state']}" + (f" ({ended['reason']})" if ended["reason"] else "")
        if row["attempt"] != attempt:
            how += f", and attempt {row['attempt']} was given to {row['worker']}"
        return how


def _pause_s(tries: int) -> float:
    """Before the next attempt, after so many that failed; drawn, so that those that failed together part."""
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(tries - 1, 30))
    return longest * random.uniform(0.5, 1.0)
