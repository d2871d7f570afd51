"""Training runs: what they hold under a lease, what they have consumed, what waits for the next.

A rollout is consumed by a policy while a run of that policy that is running or committed has it
in ``consumptions``. So a run's change of state hands over, or gives back, everything at once.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import orjson

from lightning_proxy.errors import Conflict, InvalidInput, LeaseHeld, LeaseLost, UnknownTarget
from lightning_proxy.store.policies import Policies
from lightning_proxy.store.records import (
    Backlog,
    PolicyVersion,
    RecordedRollout,
    RunState,
    TrainingRun,
    VersionStatus,
)
from lightning_proxy.store.rewards import Rewards
from lightning_proxy.store.rollouts import encode

# Rollouts with a span of the policy in their last attempt that no run of the policy has consumed. One of
# the task pool only once it has ended: until then its last attempt may be followed by another.
_UNCONSUMED = """
FROM rollouts AS r
JOIN attempts AS a ON a.rollout_id = r.rollout_id
  AND NOT EXISTS (SELECT 1 FROM attempts AS b WHERE b.rollout_id = a.rollout_id AND b.number > a.number)
WHERE EXISTS (SELECT 1 FROM spans AS s
              WHERE s.rollout_id = r.rollout_id AND s.attempt = a.number AND s.policy = :policy)
  AND NOT EXISTS (SELECT 1 FROM consumptions AS c JOIN training_runs AS t USING (run_id)
                  WHERE c.rollout_id = r.rollout_id AND t.policy = :policy
                    AND t.state IN ('running', 'committed'))
  AND NOT EXISTS (SELECT 1 FROM task_rollouts AS p
                  WHERE p.rollout_id = r.rollout_id AND p.state IN ('running', 'waiting'))
"""
# A reward for that attempt, for one of its spans, or for the rollout as a whole.
_REWARDED = """
EXISTS (SELECT 1 FROM rewards AS w LEFT JOIN spans AS s ON s.span_id = w.span_id
        WHERE w.rollout_id = r.rollout_id AND (w.attempt IS NULL OR w.attempt = a.number)
          AND (s.span_id IS NULL OR s.attempt = a.number))
"""
_READY = f"SELECT r.rollout_id, a.number {_UNCONSUMED} AND {_REWARDED}"
_OLDEST_READY = f"{_READY} ORDER BY r.created_at, r.rollout_id LIMIT :limit"


class Runs(Rewards, Policies):
    """The training runs' part of the store."""

    def begin_run(self, policy: str, *, owner: str, lease_s: float) -> TrainingRun:
        """Start a training run, alone on this policy until ``lease_s`` seconds of silence.

        A run whose lease is over is failed first, which gives back what it drained.
        Raises ``LeaseHeld`` with who holds the lease, since when and until when.
        """
        expires_at = lease_end(lease_s)
        now = time.time()
        with self.transaction():
            self.connection.execute(
                "UPDATE training_runs SET state = 'failed', ended_at = ?, error = 'its lease ran out' "
                "WHERE policy = ? AND state = 'running' AND lease_expires_at <= ?",
                (now, policy, now),
            )
            held = self.row("SELECT * FROM training_runs WHERE policy = ? AND state = 'running'", (policy,))
            if held is not None:
                raise LeaseHeld(
                    f"{held['owner']} is training {policy!r} since {_clock(held['started_at'])} "
                    f"(run {held['run_id']}); unless it is renewed, its lease runs out at "
                    f"{_clock(held['lease_expires_at'])}"
                )
            run_id = self.connection.execute(
                "INSERT INTO training_runs (policy, state, owner, started_at, lease_expires_at) "
                "VALUES (?, 'running', ?, ?, ?)",
                (policy, owner, now, expires_at),
            ).lastrowid
            assert run_id is not None  # an INSERT into a table with a rowid has one
            return self.get_run(run_id)

    def drain(self, run_id: int, *, limit: int) -> list[RecordedRollout]:
        """Take up to ``limit`` rollouts for this run, oldest first.

        Those that have a reward and a span of the run's policy in their last attempt and that no
        other run of the policy holds or has consumed. Raises ``UnknownTarget``, ``LeaseLost``.
        """
        with self.transaction():
            run = self._leased(run_id)
            taken = self._oldest_ready(run.policy, limit)
            self.connection.executemany(
                "INSERT INTO consumptions (run_id, rollout_id) VALUES (?, ?)",
                [(run_id, rollout_id) for rollout_id, _ in taken],
            )
        return [self._recorded(rollout_id, attempt) for rollout_id, attempt in taken]

    def preview(self, policy: str, limit: int) -> list[RecordedRollout]:
        """What :meth:`drain` would give, left where it is."""
        ready = self._oldest_ready(policy, limit)
        return [self._recorded(rollout_id, attempt) for rollout_id, attempt in ready]

    def give_back(self, run_id: int, rollout_ids: Iterable[str]) -> None:
        """Leave these rollouts of the run to a later one. Raises ``UnknownTarget``, ``LeaseLost``.

        The order of draining does not change: the next drain meets them first.
        """
        with self.transaction():
            self._leased(run_id)
            self.connection.executemany(
                "DELETE FROM consumptions WHERE run_id = ? AND rollout_id = ?",
                [(run_id, rollout_id) for rollout_id in rollout_ids],
            )

    def renew_lease(self, run_id: int, lease_s: float) -> None:
        """Let the lease run out ``lease_s`` seconds from now. Raises ``UnknownTarget``, ``LeaseLost``."""
        expires_at = lease_end(lease_s)
        with self.transaction():
            self._leased(run_id)
            self.connection.execute(
                "UPDATE training_runs SET lease_expires_at = ? WHERE run_id = ?", (expires_at, run_id)
            )

    def commit_run(self, run_id: int, *, report: Mapping[str, Any], version: PolicyVersion | None) -> None:
        """Consume what was drained and stage the version made from it, in one transaction.

        ``version=None``: it was consumed without an update. Raises ``UnknownTarget``, ``LeaseLost``,
        ``Conflict`` where the version's number is taken.
        """
        encoded = encode(report)
        with self.transaction():
            run = self._leased(run_id)
            self.connection.execute(
                "UPDATE training_runs SET state = 'committed', ended_at = ?, report = ? WHERE run_id = ?",
                (time.time(), encoded, run_id),
            )
            if version is not None:
                if version.policy != run.policy:
                    raise InvalidInput(f"run {run_id} trains {run.policy!r}, not {version.policy!r}")
                self.insert_version(replace(version, status=VersionStatus.STAGED, run_id=run_id))

    def fail_run(self, run_id: int, error: str, report: Mapping[str, Any] | None = None) -> None:
        """End a run without a result, which gives back what it drained.

        One that has failed already (its lease ran out) stays as it is. Raises ``UnknownTarget``,
        ``Conflict`` for a committed one.
        """
        with self.transaction():
            run = self.get_run(run_id)
            if run.state is RunState.COMMITTED:
                raise Conflict(f"run {run_id} is committed: reject its version instead")
            self.connection.execute(
                "UPDATE training_runs SET state = 'failed', ended_at = ?, error = ?, report = ? "
                "WHERE run_id = ? AND state = 'running'",
                (time.time(), error, encode(report or {}), run_id),
            )

    def get_run(self, run_id: int) -> TrainingRun:
        """One training run. Raises ``UnknownTarget``."""
        row = self.row("SELECT * FROM training_runs WHERE run_id = ?", (run_id,))
        if row is None:
            raise UnknownTarget(f"no training run {run_id}")
        return _run_from(row)

    def list_runs(self, policy: str | None = None, limit: int = 100) -> list[TrainingRun]:
        """Training runs, newest first."""
        where, parameters = ("WHERE policy = ?", (policy,)) if policy is not None else ("", ())
        sql = f"SELECT * FROM training_runs {where} ORDER BY run_id DESC LIMIT ?"
        rows = self.rows(sql, (*parameters, limit))
        return [_run_from(row) for row in rows]

    def backlog(self, policy: str) -> Backlog:
        """What waits for the policy's next run. A run in progress holds what it drained: not counted."""
        named = {"policy": policy}
        ready, spans = self.rows(
            f"SELECT count(*), coalesce(sum((SELECT count(*) FROM spans AS s "
            f"WHERE s.rollout_id = ready.rollout_id AND s.attempt = ready.number "
            f"AND s.policy = :policy)), 0) FROM ({_READY}) AS ready",
            named,
        )[0]
        unrewarded = self.scalar(f"SELECT count(*) {_UNCONSUMED} AND NOT {_REWARDED}", named)
        return Backlog(rollouts_ready=ready, rollouts_unrewarded=unrewarded, spans=spans)

    def _leased(self, run_id: int) -> TrainingRun:
        run = self.get_run(run_id)
        if run.state is not RunState.RUNNING:
            raise LeaseLost(f"run {run_id} is {run.state.value}" + (f": {run.error}" if run.error else ""))
        if run.lease_expires_at <= time.time():
            raise LeaseLost(f"the lease of run {run_id} ran out at {_clock(run.lease_expires_at)}")
        return run

    def _oldest_ready(self, policy: str, limit: int) -> list[tuple[str, int]]:
        rows = self.rows(_OLDEST_READY, {"policy": policy, "limit": limit})
        return [(row["rollout_id"], row["number"]) for row in rows]

    def _recorded(self, rollout_id: str, attempt: int) -> RecordedRollout:
        return RecordedRollout(
            rollout=self.get_rollout(rollout_id),
            attempt=attempt,
            spans=self.spans_of_attempt(rollout_id, attempt),
            rewards=self.counting_rewards_of_attempt(rollout_id, attempt),
        )


def _run_from(row: sqlite3.Row) -> TrainingRun:
    values = dict(row)
    values["state"] = RunState(values["state"])
    values["report"] = orjson.loads(values["report"])
    return TrainingRun(**values)


def lease_end(lease_s: float) -> float:
    """When a lease of this many seconds from now runs out. Raises ``InvalidInput``."""
    if not (math.isfinite(lease_s) and lease_s > 0):
        raise InvalidInput(f"a lease is a positive number of seconds, not {lease_s!r}")
    return time.time() + lease_s


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(sep=" ", timespec="seconds")
