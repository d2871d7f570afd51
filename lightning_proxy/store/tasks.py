"""The task pool: what there is to do, how far it is. ``claims.py`` hands it out.

A task is carried out ``group_size`` times in each of its rounds. A round ends with its last rollout;
then the task's next round may begin, or the task is done. A cancelled rollout does not count: the
pool hands out another in its place.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from lightning_proxy.errors import Conflict, UnknownTarget
from lightning_proxy.store.curriculum import GROUPS_LOOKED_AT, standing_of
from lightning_proxy.store.failures import Failures
from lightning_proxy.store.records import ErrorClass, Rollout
from lightning_proxy.store.rollouts import encode
from lightning_proxy.store.rounds import LACKING
from lightning_proxy.store.task_records import (
    RETRIED_BY_DEFAULT,
    NewTask,
    PoolProgress,
    Standing,
    Task,
    TaskSummary,
    canonical,
)
from lightning_proxy.words import RolloutState, TaskState

_ADD = """
INSERT INTO tasks (task_id, input, metadata, resources, group_size, rounds, priority, max_attempts, retry_on,
  timeout_s, silence_s, state, created_at, round, standing, skipped_solved, skipped_hopeless)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'open', ?, 1, 'unseen', 0, 0)"""
_CHANGE = """
UPDATE tasks SET metadata = coalesce(?, metadata), resources = coalesce(?, resources),
  group_size = coalesce(?, group_size), rounds = coalesce(?, rounds), priority = coalesce(?, priority),
  max_attempts = coalesce(?, max_attempts), retry_on = coalesce(?, retry_on),
  timeout_s = coalesce(?, timeout_s), silence_s = coalesce(?, silence_s)
WHERE task_id = ?"""
_COUNTS = "SELECT state, count(*) AS n FROM task_rollouts WHERE task_id = ? GROUP BY state"
# Rollouts that an open task is still to have: groups and rounds may have been made fewer meanwhile.
_LEFT = f"(max(0, {LACKING}) + max(0, t.rounds - t.round) * t.group_size)"
_TO_DO = f"SELECT {_LEFT} FROM tasks AS t WHERE t.task_id = ? AND t.state = 'open'"
_ENDED = """
SELECT rollout_id, attempt FROM task_rollouts
WHERE task_id = ? AND state IN ('succeeded', 'failed') ORDER BY ended_at DESC, rollout_id"""
_PROGRESS = f"""
SELECT count(*) AS tasks, total(state = 'open') AS tasks_open, total(state = 'cancelled') AS tasks_cancelled,
  total(CASE WHEN state = 'open' THEN {_LEFT} END) AS to_do,
  total(skipped_solved) AS skipped_solved, total(skipped_hopeless) AS skipped_hopeless
FROM tasks AS t WHERE {{which}}"""
_PROGRESS_OF_ROLLOUTS = """
SELECT p.state, p.error_class, count(*) AS n FROM task_rollouts AS p WHERE {which} GROUP BY 1, 2"""


class Tasks(Failures):
    """The part of the store that knows what there is to do."""

    def enqueue_tasks(self, tasks: Iterable[NewTask]) -> list[tuple[Task, bool]]:
        """Put tasks into the pool, all or none; true where one was not there before.

        One that is there takes over the settings that are given anew: more ``rounds`` or a larger
        ``group_size`` open it again, unless it was cancelled. Raises ``Conflict`` for another input.
        """
        with self.transaction():
            return [self._enqueue(task) for task in tasks]

    def get_task(self, task_id: str) -> TaskSummary:
        """One task. Raises ``UnknownTarget``."""
        return self._summary(self._task_row(task_id))

    def list_tasks(
        self, *, state: TaskState | None = None, limit: int = 100, after: str | None = None
    ) -> list[TaskSummary]:
        """Tasks in the order of their enqueuing; ``after`` is the task id to go on from."""
        begin = 0 if after is None else self._task_row(after)["position"]
        where, values = ("AND state = ?", (state.value,)) if state is not None else ("", ())
        rows = self.rows(
            f"SELECT * FROM tasks WHERE position > ? {where} ORDER BY position LIMIT ?",
            (begin, *values, limit),
        )
        return [self._summary(row) for row in rows]

    def rollouts_of_task(self, task_id: str) -> list[dict[str, Any]]:
        """What the pool knows of a task's rollouts, in the order of their rounds."""
        rows = self.rows(
            "SELECT * FROM task_rollouts WHERE task_id = ? ORDER BY round, claimed_at, rollout_id", (task_id,)
        )
        return [dict(row) for row in rows]

    def cancel_task(self, task_id: str, reason: str | None = None) -> TaskSummary:
        """Hand out nothing more of a task, and cancel its rollouts that have not ended.

        Their workers are told by the next heartbeat. One that is done or cancelled stays as it is.
        Raises ``UnknownTarget``.
        """
        with self.transaction():
            self._task_row(task_id)
            self.connection.execute(
                "UPDATE tasks SET state = 'cancelled' WHERE task_id = ? AND state = 'open'", (task_id,)
            )
            for row in self.rows(
                "SELECT rollout_id FROM task_rollouts WHERE task_id = ? AND state IN ('running', 'waiting')",
                (task_id,),
            ):
                self.finish_rollout(
                    row["rollout_id"], RolloutState.CANCELLED, reason or "its task was cancelled"
                )
            return self.get_task(task_id)

    def pool_progress(self, task_ids: Sequence[str] | None = None) -> PoolProgress:
        """How far these tasks are, or all."""
        which, values = "1", []
        if task_ids is not None:
            which, values = "task_id IN (SELECT value FROM json_each(?))", [_json(list(task_ids))]
        tasks = {
            name: int(value)
            for name, value in dict(self.rows(_PROGRESS.format(which=which), values)[0]).items()
        }
        states: dict[str, int] = dict.fromkeys(("running", "waiting", "succeeded", "failed", "cancelled"), 0)
        by_class: dict[str, int] = {}
        for state, error_class, count in self.rows(_PROGRESS_OF_ROLLOUTS.format(which=which), values):
            states[state] += count
            if state == "failed":
                by_class[error_class or "unknown"] = count
        rollouts = tasks.pop("to_do") + sum(states.values()) - states["cancelled"]
        return PoolProgress(**tasks, rollouts=rollouts, **states, failed_by_class=by_class)

    def returns_of_task(self, task_id: str, most: int) -> list[float]:
        """Returns of its last rewarded rollouts that have ended, newest first, ``most`` at most."""
        returns: list[float] = []
        for row in self.rows(_ENDED, (task_id,)):
            rewards = self.counting_rewards_of_attempt(row["rollout_id"], row["attempt"])
            if (value := self.rule.return_of(rewards)) is not None:
                returns.append(value)
            if len(returns) == most:
                break
        return returns

    def finish_rollout(
        self,
        rollout_id: str,
        state: RolloutState,
        reason: str | None = None,
        error_class: ErrorClass | None = None,
        *,
        presumed: bool = False,
    ) -> Rollout:
        """As :meth:`Rollouts.finish_rollout`; one of the pool ends there too, whoever ends it."""
        with self.transaction():
            ended = super().finish_rollout(rollout_id, state, reason, error_class, presumed=presumed)
            changed = self.connection.execute(
                "UPDATE task_rollouts SET state = ?, ended_at = ?, error_class = ? "
                "WHERE rollout_id = ? AND state IN ('running', 'waiting')",
                (
                    ended.state.value,
                    ended.ended_at,
                    ended.error_class and ended.error_class.value,
                    rollout_id,
                ),
            )
            if changed.rowcount:
                task_id = self.scalar("SELECT task_id FROM task_rollouts WHERE rollout_id = ?", (rollout_id,))
                self.settle_task(task_id)
            return ended

    def settle_task(self, task_id: str) -> None:
        """Begin the next round, or end the task, where the present round is complete.

        Runs in the caller's transaction.
        """
        row = self._task_row(task_id)
        if row["state"] == "cancelled":
            return
        complete = self._ended_in(task_id, row["round"]) >= row["group_size"] and not self.rows(
            "SELECT 1 FROM task_rollouts WHERE task_id = ? AND state IN ('running', 'waiting')", (task_id,)
        )
        if not complete:
            self._place(task_id, TaskState.OPEN, row["round"])
        elif row["round"] < row["rounds"]:
            self._place(task_id, TaskState.OPEN, row["round"] + 1, self.judge_task(row))
        else:
            self._place(task_id, TaskState.DONE, row["round"])

    def _open_again(self, before: sqlite3.Row) -> None:
        """After a task's settings may have changed: there may be more to do, or less.

        A last round that was left out (``skipped_*``) stays so; there may be rounds behind it.
        """
        row = self._task_row(before["task_id"])
        ended = self._ended_in(row["task_id"], row["round"])
        if row["state"] != TaskState.DONE or ended >= before["group_size"]:
            self.settle_task(row["task_id"])
        elif row["round"] < row["rounds"]:
            self._place(row["task_id"], TaskState.OPEN, row["round"] + 1)

    def _ended_in(self, task_id: str, round_: int) -> int:
        ended: int = self.scalar(
            "SELECT count(*) FROM task_rollouts WHERE task_id = ? AND round = ? "
            "AND state IN ('succeeded', 'failed')",
            (task_id, round_),
        )
        return ended

    def judge_task(self, row: sqlite3.Row) -> Standing:
        """What a task's last rewarded rollouts say of it."""
        return standing_of(self.returns_of_task(row["task_id"], GROUPS_LOOKED_AT * row["group_size"]))

    def _place(self, task_id: str, state: TaskState, round_: int, standing: Standing | None = None) -> None:
        self.connection.execute(
            "UPDATE tasks SET state = ?, round = ?, standing = coalesce(?, standing) WHERE task_id = ?",
            (state.value, round_, standing and standing.value, task_id),
        )

    def _enqueue(self, task: NewTask) -> tuple[Task, bool]:
        wanted = canonical(task.input)
        present = self.row("SELECT * FROM tasks WHERE task_id = ?", (task.task_id,))
        settings = (
            None if task.metadata is None else encode(task.metadata),
            None if task.resources is None else encode(task.resources),
            task.group_size,
            task.rounds,
            task.priority,
            task.max_attempts,
            None if task.retry_on is None else _json(task.retry_on),
            task.timeout_s,
            task.silence_s,
        )
        if present is None:
            defaults = ("{}", None, 1, 1, 0, 1, _json(RETRIED_BY_DEFAULT), None, None)
            chosen = [
                default if given is None else given for given, default in zip(settings, defaults, strict=True)
            ]
            self.connection.execute(_ADD, (task.task_id, wanted, *chosen, time.time()))
        elif present["input"] != wanted:
            raise Conflict(
                f"task {task.task_id!r} is in the pool with another input, {present['input']:.80}: "
                "give this one another task_id"
            )
        else:
            self.connection.execute(_CHANGE, (*settings, task.task_id))
            self._open_again(present)
        return task_from(self._task_row(task.task_id)), present is None

    def _task_row(self, task_id: str) -> sqlite3.Row:
        row = self.row("SELECT * FROM tasks WHERE task_id = ?", (task_id,))
        if row is None:
            raise UnknownTarget(f"no task {task_id!r} in the pool")
        return row

    def _summary(self, row: sqlite3.Row) -> TaskSummary:
        task_id = row["task_id"]
        counts = {each["state"]: each["n"] for each in self.rows(_COUNTS, (task_id,))}
        returns = self.returns_of_task(task_id, -1)
        return TaskSummary(
            task=task_from(row),
            to_do=self.scalar(_TO_DO, (task_id,)) or 0,
            waiting=counts.get("waiting", 0),
            running=counts.get("running", 0),
            succeeded=counts.get("succeeded", 0),
            failed=counts.get("failed", 0),
            cancelled=counts.get("cancelled", 0),
            rewarded=len(returns),
            success_rate=sum(one > 0 for one in returns) / len(returns) if returns else None,
            mean_reward=sum(returns) / len(returns) if returns else None,
        )


def task_from(row: sqlite3.Row) -> Task:
    """A row of ``tasks``."""
    return Task(
        task_id=row["task_id"],
        input=orjson.loads(row["input"]),
        metadata=orjson.loads(row["metadata"]),
        resources=None if row["resources"] is None else orjson.loads(row["resources"]),
        group_size=row["group_size"],
        rounds=row["rounds"],
        priority=row["priority"],
        max_attempts=row["max_attempts"],
        retry_on=tuple(ErrorClass(each) for each in orjson.loads(row["retry_on"])),
        timeout_s=row["timeout_s"],
        silence_s=row["silence_s"],
        state=TaskState(row["state"]),
        created_at=row["created_at"],
        round=row["round"],
        standing=Standing(row["standing"]),
        skipped_solved=row["skipped_solved"],
        skipped_hopeless=row["skipped_hopeless"],
    )


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()
