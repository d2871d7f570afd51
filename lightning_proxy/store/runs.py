"""Training runs: what they hold under a lease, what they have consumed, what waits for the next.

A rollout is consumed by a policy while a run of that policy that is running or committed has it
in ``consumptions``. So a run's change of state hands over, or gives back, everything at once.

A consumption remembers the last entry of the ledger that the run knew. A rollout that a committed run
has consumed waits again as soon as its return, with what was entered since, is another one than that
run knew (or as soon as there are rewards for a later attempt). Both returns are taken by the same
weights, so that changing a weight opens nothing.

Demonstrations are consumed apart from returns, by the runs that ask for them (``demonstrated``): each
once, by whichever run comes first, and again only where a later entry for its target and name corrects it.
So a run that takes the return leaves the demonstrations of the rollout for one that can learn from them.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import orjson

from lightning_proxy.errors import Conflict, InvalidInput, LeaseHeld, LeaseLost, UnknownTarget
from lightning_proxy.store.policies import Policies
from lightning_proxy.store.records import (
    Backlog,
    Companion,
    PolicyVersion,
    RecordedRollout,
    Reward,
    RunState,
    TrainingRun,
)
from lightning_proxy.store.rewards import Rewards
from lightning_proxy.store.rollouts import encode

# Rollouts with a span of the policy in their last attempt; ``c``: the last run of the policy, running or
# committed, that has their return. One of the task pool only once it has ended: until then its last attempt
# may be followed by another.
OF_POLICY = """
FROM rollouts AS r
JOIN attempts AS a ON a.rollout_id = r.rollout_id
  AND NOT EXISTS (SELECT 1 FROM attempts AS b WHERE b.rollout_id = a.rollout_id AND b.number > a.number)
LEFT JOIN consumptions AS c ON c.rollout_id = r.rollout_id AND c.run_id = (
  SELECT max(d.run_id) FROM consumptions AS d JOIN training_runs AS t USING (run_id)
  WHERE d.rollout_id = r.rollout_id AND d.for_return AND t.policy = :policy
    AND t.state IN ('running', 'committed'))
WHERE EXISTS (SELECT 1 FROM spans AS s
              WHERE s.rollout_id = r.rollout_id AND s.attempt = a.number AND s.policy = :policy)
  AND NOT EXISTS (SELECT 1 FROM task_rollouts AS p
                  WHERE p.rollout_id = r.rollout_id AND p.state IN ('running', 'waiting'))
"""
# A value for that attempt, for one of its spans, or for the rollout as a whole.
REWARDED = """
EXISTS (SELECT 1 FROM rewards AS w LEFT JOIN spans AS s ON s.span_id = w.span_id
        WHERE w.rollout_id = r.rollout_id AND (w.attempt IS NULL OR w.attempt = a.number)
          AND (s.span_id IS NULL OR s.attempt = a.number)
          AND w.value IS NOT NULL AND w.name NOT IN (SELECT value FROM json_each(:ignored)))
"""
# A committed run has it, and values came later than it knew. Whether they make another return is for
# `RewardRule` to say.
_LATE = """
(:late AND EXISTS (SELECT 1 FROM rewards AS w WHERE w.rollout_id = r.rollout_id
                   AND w.reward_id > coalesce(c.last_reward_id, 0) AND w.value IS NOT NULL)
 AND (SELECT t.state FROM training_runs AS t WHERE t.run_id = c.run_id) = 'committed')
"""
# Up to which entry runs have taken the demonstrations of a rollout; and whether later ones have some.
_SHOWN_UNTIL = """
coalesce((SELECT max(d.last_demonstration_id)
          FROM consumptions AS d JOIN training_runs AS t USING (run_id)
          WHERE d.rollout_id = r.rollout_id AND t.policy = :policy
            AND t.state IN ('running', 'committed')), 0)
"""
_DEMONSTRATED = f"""
(:demonstrated AND EXISTS (SELECT 1 FROM rewards AS w WHERE w.rollout_id = r.rollout_id
                           AND w.demonstration IS NOT NULL AND w.reward_id > {_SHOWN_UNTIL}))
"""
_CANDIDATES = f"""
SELECT r.rollout_id, a.number, c.run_id, c.attempt, c.last_reward_id, {_SHOWN_UNTIL} AS shown_until,
  (c.run_id IS NULL OR {_LATE}) AND {REWARDED} AS rewarded, {_DEMONSTRATED} AS demonstrated
{OF_POLICY} AND (((c.run_id IS NULL OR {_LATE}) AND {REWARDED}) OR {_DEMONSTRATED})
ORDER BY r.created_at, r.rollout_id
"""
_UNREWARDED = f"SELECT count(*) {OF_POLICY} AND c.run_id IS NULL AND NOT {REWARDED}"
_CONSUME = """
INSERT INTO consumptions (run_id, rollout_id, attempt, for_return, last_reward_id, last_demonstration_id)
SELECT :run_id, :rollout_id, :attempt, :for_return, max(reward_id), iif(:demonstrated, max(reward_id), NULL)
FROM rewards WHERE rollout_id = :rollout_id RETURNING last_reward_id"""
# Of a running baseline (`recent_members`) nobody is a companion for good.
_COMPANIONS = """
SELECT other.rollout_id, max(other.attempt) AS attempt
FROM consumptions AS mine JOIN training_runs AS t USING (run_id)
JOIN consumptions AS other ON other.run_id = mine.run_id AND other.group_key = mine.group_key
WHERE mine.rollout_id = ? AND t.policy = ? AND t.state = 'committed' AND other.rollout_id <> mine.rollout_id
  AND mine.group_key NOT LIKE 'running:%'
GROUP BY other.rollout_id"""
# Newest runs first: the index over (run_id, group_key) finds what each of them has, and the first rows
# are all that is read.
_RECENT = """
SELECT c.rollout_id, c.attempt FROM training_runs AS t CROSS JOIN consumptions AS c
ON c.run_id = t.run_id AND c.group_key = ?
WHERE t.policy = ? AND t.state = 'committed' ORDER BY t.run_id DESC, c.rollout_id"""
_REWARDS_SEEN = """
SELECT report FROM training_runs
WHERE policy = ? AND state = 'committed' AND report ->> '$.rewards' IS NOT NULL
ORDER BY run_id DESC LIMIT ?"""
_CALLS = """
SELECT span_id, role FROM spans
WHERE rollout_id = ? AND attempt = ? AND policy = ? AND error_class IS NULL ORDER BY started_at, span_id"""
_LAST_COMMITTED = "SELECT max(run_id) FROM training_runs WHERE policy = ? AND state = 'committed'"
_LAST_ENTRIES = """
SELECT (SELECT max(reward_id) FROM rewards WHERE rollout_id = ?1),
  (SELECT max(span_id) FROM spans WHERE rollout_id = ?1 AND attempt = ?2)"""
_SPANS_OF = """
SELECT count(*) FROM json_each(?) AS ready JOIN spans AS s
ON s.rollout_id = ready.value ->> 0 AND s.attempt = ready.value ->> 1 AND s.policy = ?"""


@dataclass(frozen=True, slots=True)
class _Ready:
    """A rollout that waits: its last attempt, and what of it."""

    rollout_id: str
    attempt: int
    for_return: bool  # its return waits
    again: bool  # a committed run has trained on another return of it
    demonstrations: tuple[Reward, ...] = ()  # those that wait


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

    def drain(self, run_id: int, *, limit: int, demonstrated: bool = False) -> list[RecordedRollout]:
        """Take up to ``limit`` rollouts for this run, oldest first.

        Those that have a reward and a span of the run's policy in their last attempt and that no
        other run of the policy holds or has consumed; and those that one has consumed, if late rewards
        gave them another return. With ``demonstrated`` also those with a demonstration, for that attempt,
        that no run has taken, rewarded or not. Raises ``UnknownTarget``, ``LeaseLost``.
        """
        with self.transaction():
            run = self._leased(run_id)
            taken = list(islice(self._ready(run.policy, demonstrated), limit))
            known = [
                self.scalar(
                    _CONSUME,
                    {
                        "run_id": run_id,
                        "rollout_id": one.rollout_id,
                        "attempt": one.attempt,
                        "for_return": one.for_return,
                        "demonstrated": demonstrated,
                    },
                )
                for one in taken
            ]
        return [self._recorded(run.policy, one, until) for one, until in zip(taken, known, strict=True)]

    def preview(self, policy: str, limit: int, *, demonstrated: bool = False) -> list[RecordedRollout]:
        """What :meth:`drain` would give, left where it is."""
        ready = list(islice(self._ready(policy, demonstrated), limit))
        return [self._recorded(policy, one) for one in ready]

    def name_of_ready(self, policy: str, limit: int, *, demonstrated: bool = False) -> str:
        """A name for what :meth:`drain` would give and what the policy's runs have consumed before: another
        one as soon as anything of that changes.
        """
        ready = [
            (
                one.rollout_id,
                one.attempt,
                one.for_return,
                *self.rows(_LAST_ENTRIES, (one.rollout_id, one.attempt))[0],
            )
            for one in islice(self._ready(policy, demonstrated), limit)
        ]
        consumed = self.scalar(_LAST_COMMITTED, (policy,))
        return hashlib.sha256(orjson.dumps((consumed, ready))).hexdigest()

    def give_back(self, run_id: int, rollout_ids: Iterable[str]) -> None:
        """Leave the returns of these rollouts to a later run. Raises ``UnknownTarget``, ``LeaseLost``.

        Demonstrations that this run took stay taken. The order of draining does not change: the next
        drain meets them first.
        """
        pairs = [(run_id, rollout_id) for rollout_id in rollout_ids]
        with self.transaction():
            self._leased(run_id)
            self.connection.executemany(
                "UPDATE consumptions SET for_return = 0 WHERE run_id = ? AND rollout_id = ?", pairs
            )
            self.connection.executemany(
                "DELETE FROM consumptions WHERE run_id = ? AND rollout_id = ? "
                "AND last_demonstration_id IS NULL",
                pairs,
            )

    def renew_lease(self, run_id: int, lease_s: float) -> None:
        """Let the lease run out ``lease_s`` seconds from now. Raises ``UnknownTarget``, ``LeaseLost``."""
        expires_at = lease_end(lease_s)
        with self.transaction():
            self._leased(run_id)
            self.connection.execute(
                "UPDATE training_runs SET lease_expires_at = ? WHERE run_id = ?", (expires_at, run_id)
            )

    def commit_run(
        self,
        run_id: int,
        *,
        report: Mapping[str, Any],
        version: PolicyVersion | None,
        groups: Mapping[str, str] | None = None,
    ) -> None:
        """Consume what was drained and stage the version made from it, in one transaction.

        ``version=None``: it was consumed without an update. ``groups``: the group that a rollout was
        compared in, by its id, so that it finds its companions should it come again. Raises
        ``UnknownTarget``, ``LeaseLost``, ``Conflict`` where the version cannot follow what serves
        (:meth:`stage_version`).
        """
        encoded = encode(report)
        with self.transaction():
            run = self._leased(run_id)
            self.connection.execute(
                "UPDATE training_runs SET state = 'committed', ended_at = ?, report = ? WHERE run_id = ?",
                (time.time(), encoded, run_id),
            )
            self.connection.executemany(
                "UPDATE consumptions SET group_key = ? WHERE run_id = ? AND rollout_id = ?",
                [(group, run_id, rollout_id) for rollout_id, group in (groups or {}).items()],
            )
            if version is not None:
                if version.policy != run.policy:
                    raise InvalidInput(f"run {run_id} trains {run.policy!r}, not {version.policy!r}")
                self.stage_version(replace(version, run_id=run_id))

    def drop_run(self, run_id: int) -> bool:
        """Forget a run that has given back all that it drained; False, and nothing done, where it has not.

        Raises ``UnknownTarget``, ``LeaseLost``.
        """
        with self.transaction():
            self._leased(run_id)
            if self.rows("SELECT 1 FROM consumptions WHERE run_id = ? LIMIT 1", (run_id,)):
                return False
            self.connection.execute("DELETE FROM training_runs WHERE run_id = ?", (run_id,))
            return True

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

    def reports_with_rewards(self, policy: str, limit: int) -> list[Mapping[str, Any]]:
        """Reports of committed runs that say what rewards they saw, newest first."""
        rows = self.rows(_REWARDS_SEEN, (policy, limit))
        return [orjson.loads(row["report"]) for row in rows]

    def backlog(self, policy: str, *, demonstrated: bool = False) -> Backlog:
        """What waits for the policy's next run. A run in progress holds what it drained: not counted.

        ``demonstrated``: as in :meth:`drain`.
        """
        ready = list(self._ready(policy, demonstrated))
        pairs = orjson.dumps([(one.rollout_id, one.attempt) for one in ready]).decode()
        return Backlog(
            rollouts_ready=len(ready),
            rollouts_unrewarded=self.scalar(_UNREWARDED, self.named(policy)),
            spans=self.scalar(_SPANS_OF, (pairs, policy)),
            rollouts_again=sum(one.again for one in ready),
        )

    def _leased(self, run_id: int) -> TrainingRun:
        run = self.get_run(run_id)
        if run.state is not RunState.RUNNING:
            raise LeaseLost(f"run {run_id} is {run.state.value}" + (f": {run.error}" if run.error else ""))
        if run.lease_expires_at <= time.time():
            raise LeaseLost(f"the lease of run {run_id} ran out at {_clock(run.lease_expires_at)}")
        return run

    def _ready(self, policy: str, demonstrated: bool) -> Iterator[_Ready]:
        """What waits, oldest first."""
        for row in self.each(_CANDIDATES, {**self.named(policy), "demonstrated": demonstrated}):
            rollout_id, attempt = row["rollout_id"], row["number"]
            again = row["run_id"] is not None
            for_return = bool(row["rewarded"]) and (not again or self._differs(row))
            shown = (
                self.demonstrations_of_attempt(rollout_id, attempt, after=row["shown_until"])
                if row["demonstrated"]
                else ()
            )
            if for_return or shown:
                yield _Ready(rollout_id, attempt, for_return, again and for_return, shown)

    def _differs(self, row: sqlite3.Row) -> bool:
        """Whether what was entered later makes another return, or is for another attempt."""
        rollout_id, attempt = row["rollout_id"], row["number"]
        if row["attempt"] not in (None, attempt):
            return True
        known = self.counting_rewards_of_attempt(rollout_id, attempt, row["last_reward_id"] or 0)
        present = self.counting_rewards_of_attempt(rollout_id, attempt)
        return self.rule.return_of(known) != self.rule.return_of(present)

    def named(self, policy: str) -> dict[str, Any]:
        """What the queries over waiting rollouts are given."""
        ignored = orjson.dumps(self.rule.ignored).decode()
        return {"policy": policy, "late": self.rule.late, "ignored": ignored}

    def _recorded(self, policy: str, ready: _Ready, until: int | None = None) -> RecordedRollout:
        rewards = self.counting_rewards_of_attempt(ready.rollout_id, ready.attempt, until)
        return RecordedRollout(
            rollout=self.get_rollout(ready.rollout_id),
            attempt=ready.attempt,
            spans=self.spans_of_attempt(ready.rollout_id, ready.attempt),
            rewards=rewards,
            value=self.rule.return_of(rewards),
            again=ready.again,
            for_return=ready.for_return,
            demonstrations=ready.demonstrations,
            companions=tuple(self._companions(policy, ready.rollout_id)) if ready.again else (),
        )

    def recent_members(self, policy: str, group_key: str, limit: int) -> list[Companion]:
        """The rollouts that committed runs trained on last in this group, newest run first, each once."""
        found: dict[str, Companion] = {}
        for row in self.each(_RECENT, (group_key, policy)):
            if len(found) >= limit:
                break
            if row["rollout_id"] not in found and (companion := self._companion(policy, row)) is not None:
                found[companion.rollout_id] = companion
        return list(found.values())

    def _companions(self, policy: str, rollout_id: str) -> Iterator[Companion]:
        """Those that committed runs compared with this rollout, with their returns as they are now."""
        for row in self.rows(_COMPANIONS, (rollout_id, policy)):
            if (companion := self._companion(policy, row)) is not None:
                yield companion

    def _companion(self, policy: str, row: sqlite3.Row) -> Companion | None:
        rewards = self.counting_rewards_of_attempt(row["rollout_id"], row["attempt"])
        value = self.rule.return_of(rewards)
        if value is None:
            return None
        calls = self.rows(_CALLS, (row["rollout_id"], row["attempt"], policy))
        return Companion(
            row["rollout_id"],
            value,
            rewards,
            tuple((call["span_id"], call["role"]) for call in calls),
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
