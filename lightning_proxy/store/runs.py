"""Training runs: what they hold under a lease, what they have consumed, what waits for the next.

A rollout is consumed by a policy while a run of that policy that is running or committed has it
in ``consumptions``. So a run's change of state hands over, or gives back, everything at once.

A consumption remembers the last entry of the ledger and the last call that the run knew. A rollout that a
committed run has consumed waits again as soon as its return, with what was entered since, is another one than
that run knew (or as soon as there are rewards for a later attempt). Both returns are taken by the same
weights, so that changing a weight opens nothing. For the same return it waits again as soon as there are
later calls and an entry that counts, and then for those calls alone (``trained_until``).

Demonstrations are consumed apart from returns, by the runs that ask for them (``demonstrated``): each
once, by whichever run comes first, and again only where a later entry for its target and name corrects it.
So a run that takes the return leaves the demonstrations of the rollout for one that can learn from them.
"""

from __future__ import annotations

import functools
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
    PolicyVersion,
    RecordedRollout,
    Reward,
    RunState,
    TrainingRun,
)
from lightning_proxy.store.rollouts import encode
from lightning_proxy.store.rounds import REWARDED, Rounds

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
SELECT r.rollout_id, a.number, c.run_id, c.attempt, c.last_reward_id, c.last_span_id,
  {_SHOWN_UNTIL} AS shown_until,
  (SELECT json_array(p.task_id, p.round) FROM task_rollouts AS p WHERE p.rollout_id = r.rollout_id) AS round,
  (c.run_id IS NULL OR {_LATE}) AND {REWARDED} AS rewarded, {_DEMONSTRATED} AS demonstrated
{OF_POLICY} AND (((c.run_id IS NULL OR {_LATE}) AND {REWARDED}) OR {_DEMONSTRATED})
ORDER BY r.created_at, r.rollout_id
"""
_UNREWARDED = f"SELECT count(*) {OF_POLICY} AND c.run_id IS NULL AND NOT {REWARDED}"
_CONSUME = """
INSERT INTO consumptions (run_id, rollout_id, attempt, for_return, last_reward_id, last_demonstration_id,
  last_span_id)
SELECT :run_id, :rollout_id, :attempt, :for_return, max(reward_id), iif(:demonstrated, max(reward_id), NULL),
  (SELECT max(s.span_id) FROM spans AS s WHERE s.rollout_id = :rollout_id AND s.attempt = :attempt)
FROM rewards WHERE rollout_id = :rollout_id RETURNING last_reward_id, last_span_id"""
# Of a running baseline (`recent_members`) nobody is a companion for good. Left alone, SQLite reads the whole
# run for each.
_COMPANIONS = """
SELECT other.rollout_id, max(other.attempt) AS attempt
FROM consumptions AS mine JOIN training_runs AS t USING (run_id)
JOIN consumptions AS other INDEXED BY consumptions_by_key
  ON other.run_id = mine.run_id AND other.group_key = mine.group_key
WHERE mine.rollout_id = :rollout_id AND t.policy = :policy AND t.state = 'committed'
  AND other.rollout_id <> mine.rollout_id
  AND mine.group_key NOT LIKE 'running:%'
GROUP BY other.rollout_id"""
# Newest runs first: the index over (group_key, run_id) has them in this order, and the first rows are all
# that is read.
_RECENT = """
SELECT c.rollout_id, c.attempt FROM consumptions AS c CROSS JOIN training_runs AS t ON t.run_id = c.run_id
WHERE c.group_key = :group_key AND t.policy = :policy AND t.state = 'committed'
ORDER BY c.run_id DESC, c.rollout_id"""
_RECENT_OF_VERSIONS = f"""
SELECT * FROM ({_RECENT} LIMIT :limit) AS c
WHERE EXISTS (SELECT 1 FROM spans AS s JOIN json_each(:versions) AS v ON s.policy_version IS v.value
              WHERE s.rollout_id = c.rollout_id AND s.attempt = c.attempt AND s.policy = :policy)"""
_REWARDS_SEEN = """
SELECT report FROM training_runs
WHERE policy = ? AND state = 'committed' AND report ->> '$.rewards' IS NOT NULL
ORDER BY run_id DESC LIMIT ?"""
# Calls that the run did not have, and an entry that counts to go with them.
_GOES_ON = """
SELECT EXISTS (SELECT 1 FROM spans AS s WHERE s.rollout_id = :rollout_id AND s.attempt = :attempt
               AND s.span_id > :last_span_id AND s.policy = :policy AND s.error_class IS NULL)
AND EXISTS (SELECT 1 FROM rewards AS w WHERE w.rollout_id = :rollout_id AND w.reward_id > :last_reward_id
            AND w.value IS NOT NULL AND w.name NOT IN (SELECT value FROM json_each(:ignored)))"""
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
    for_return: bool  # its return waits for a run
    held: bool  # it has one, and waits for the rest of its round of the task pool
    again: bool  # a committed run has trained on another return of it, or on fewer calls
    trained_until: int | None  # where it is for the same return: up to which call
    demonstrations: tuple[Reward, ...] = ()  # those that wait


class Runs(Rounds, Policies):
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
        gave them another return. Of the task pool once their round is over (``rounds.py``). With
        ``demonstrated`` also those with a demonstration, for that attempt, that no run has taken, rewarded or
        not. Raises ``UnknownTarget``, ``LeaseLost``.
        """
        with self.transaction():
            run = self._leased(run_id)
            taken = list(islice(self._ready(run.policy, demonstrated), limit))
            known = [
                self.row(
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
        waiting = list(self._waiting(policy, demonstrated))
        ready = [one for one in waiting if one.for_return or one.demonstrations]
        pairs = orjson.dumps([(one.rollout_id, one.attempt) for one in ready]).decode()
        return Backlog(
            rollouts_ready=len(ready),
            rollouts_unrewarded=self.scalar(_UNREWARDED, self.named(policy)),
            spans=self.scalar(_SPANS_OF, (pairs, policy)),
            rollouts_again=sum(one.again for one in ready),
            rollouts_held=sum(one.held for one in waiting),
        )

    def _leased(self, run_id: int) -> TrainingRun:
        run = self.get_run(run_id)
        if run.state is not RunState.RUNNING:
            raise LeaseLost(f"run {run_id} is {run.state.value}" + (f": {run.error}" if run.error else ""))
        if run.lease_expires_at <= time.time():
            raise LeaseLost(f"the lease of run {run_id} ran out at {_clock(run.lease_expires_at)}")
        return run

    def _ready(self, policy: str, demonstrated: bool) -> Iterator[_Ready]:
        """What waits for a run, oldest first."""
        return (one for one in self._waiting(policy, demonstrated) if one.for_return or one.demonstrations)

    def _waiting(self, policy: str, demonstrated: bool) -> Iterator[_Ready]:
        """The same, with what waits for the rest of its round first."""
        is_open = functools.cache(lambda of: self.round_is_open(policy, *orjson.loads(of)))
        for row in self.each(_CANDIDATES, {**self.named(policy), "demonstrated": demonstrated}):
            rollout_id, attempt = row["rollout_id"], row["number"]
            again = row["run_id"] is not None
            differs = again and self._differs(row)
            due = bool(row["rewarded"]) and (not again or differs or self._goes_on(policy, row))
            held = due and not again and row["round"] is not None and is_open(row["round"])
            shown = (
                self.demonstrations_of_attempt(rollout_id, attempt, after=row["shown_until"])
                if row["demonstrated"]
                else ()
            )
            if due or shown:
                for_return = due and not held
                until = row["last_span_id"] if again and not differs else None
                yield _Ready(rollout_id, attempt, for_return, held, again and for_return, until, shown)

    def _differs(self, row: sqlite3.Row) -> bool:
        """Whether what was entered later makes another return, or is for another attempt."""
        rollout_id, attempt = row["rollout_id"], row["number"]
        if row["attempt"] not in (None, attempt):
            return True
        known = self.counting_rewards_of_attempt(rollout_id, attempt, row["last_reward_id"] or 0)
        present = self.counting_rewards_of_attempt(rollout_id, attempt)
        return self.rule.return_of(known) != self.rule.return_of(present)

    def _goes_on(self, policy: str, row: sqlite3.Row) -> bool:
        """Whether there are calls that the run did not have, and rewards that came since."""
        if row["last_span_id"] is None:
            return False
        asked = {
            "rollout_id": row["rollout_id"],
            "attempt": row["number"],
            "last_span_id": row["last_span_id"],
            "last_reward_id": row["last_reward_id"] or 0,
        }
        return bool(self.scalar(_GOES_ON, {**self.named(policy), **asked}))

    def named(self, policy: str) -> dict[str, Any]:
        """What the queries over waiting rollouts are given."""
        ignored = orjson.dumps(self.rule.ignored).decode()
        return {"policy": policy, "late": self.rule.late, "ignored": ignored}

    def _recorded(self, policy: str, ready: _Ready, until: sqlite3.Row | None = None) -> RecordedRollout:
        """As it is now, or as it was when it was consumed, ``until`` this entry and this call."""
        spans = self.spans_of_attempt(ready.rollout_id, ready.attempt)
        last_reward_id = None
        if until is not None:
            last_reward_id, last_span_id = until
            spans = tuple(span for span in spans if (span.span_id or 0) <= (last_span_id or 0))
        rewards = self.counting_rewards_of_attempt(ready.rollout_id, ready.attempt, last_reward_id)
        return RecordedRollout(
            rollout=self.get_rollout(ready.rollout_id),
            attempt=ready.attempt,
            spans=spans,
            rewards=rewards,
            value=self.rule.return_of(rewards),
            again=ready.again,
            for_return=ready.for_return,
            demonstrations=ready.demonstrations,
            trained_until=ready.trained_until,
            companions=tuple(self._companions(policy, ready.rollout_id)) if ready.again else (),
        )

    def recent_members(
        self, policy: str, group_key: str, limit: int, *, versions: Iterable[int | None] | None = None
    ) -> list[RecordedRollout]:
        """The rollouts that committed runs trained on last in this group, newest run first, each once.

        With ``versions`` those of the last ``limit`` that one of these answered. They come with the rewards
        that count now, and with calls as heads only, but where what these hold says which of them count:
        where one was tried again, or something was found in one.
        """
        asked: dict[str, Any] = {"policy": policy, "group_key": group_key}
        sql = _RECENT
        if versions is not None:
            asked |= {"limit": limit, "versions": orjson.dumps(list(versions)).decode()}
            sql = _RECENT_OF_VERSIONS
        found: dict[str, RecordedRollout] = {}
        for row in self.each(sql, asked):
            if len(found) >= limit:
                break
            if row["rollout_id"] not in found and (companion := self._companion(row)) is not None:
                found[row["rollout_id"]] = companion
        return list(found.values())

    def _companions(self, policy: str, rollout_id: str) -> Iterator[RecordedRollout]:
        """Those that committed runs compared with this rollout, as :meth:`recent_members` has them."""
        for row in self.rows(_COMPANIONS, {"rollout_id": rollout_id, "policy": policy}):
            if (companion := self._companion(row)) is not None:
                yield companion

    def _companion(self, row: sqlite3.Row) -> RecordedRollout | None:
        rollout_id, attempt = row["rollout_id"], row["attempt"]
        rewards = self.counting_rewards_of_attempt(rollout_id, attempt)
        value = self.rule.return_of(rewards)
        if value is None:
            return None
        spans = self.heads_of_attempt(rollout_id, attempt)
        if any(span.retry or span.findings for span in spans):
            spans = self.spans_of_attempt(rollout_id, attempt)
        return RecordedRollout(self.get_rollout(rollout_id), attempt, spans, rewards, value)


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
