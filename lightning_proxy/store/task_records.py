"""The records of the task pool, frozen, and the one reading of what describes a task.

Times are Unix seconds (float, UTC).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import orjson

from lightning_proxy.errors import InvalidInput
from lightning_proxy.store.records import ErrorClass
from lightning_proxy.words import TaskState

# What another try may change. A prompt that does not fit, or a request that is refused, stays that way.
RETRIED_BY_DEFAULT = (
    ErrorClass.AGENT_CRASH,
    ErrorClass.TIMEOUT,
    ErrorClass.SILENT_DEATH,
    ErrorClass.UPSTREAM_UNREACHABLE,
    ErrorClass.UPSTREAM_ERROR,
    ErrorClass.RATE_LIMITED,
    ErrorClass.ENGINE_ERROR,
    ErrorClass.CUT_STREAM,
)
_SETTINGS = frozenset(
    (
        "task_id",
        "metadata",
        "resources",
        "group_size",
        "rounds",
        "priority",
        "max_attempts",
        "retry_on",
        "timeout_s",
        "silence_s",
    )
)
_LARGEST = 2**31


class Standing(StrEnum):
    """What the last rewarded rollouts of a task say of it; ``curriculum.py`` has the rule."""

    UNSEEN = "unseen"  # too few were rewarded
    MIXED = "mixed"  # they differ: there is something to learn
    SOLVED = "solved"  # all the same, and above 0
    HOPELESS = "hopeless"  # all the same, and not above 0


class Prefer(StrEnum):
    """What a claim takes first, among tasks of one priority."""

    DISAGREEMENT = "disagreement"


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task as it is enqueued. ``None`` is "not said": the default, or what it has already."""

    task_id: str
    input: Mapping[str, Any]
    metadata: Mapping[str, Any] | None = None
    resources: Mapping[str, Any] | None = None
    group_size: int | None = None
    rounds: int | None = None
    priority: int | None = None
    max_attempts: int | None = None
    retry_on: tuple[ErrorClass, ...] | None = None
    timeout_s: float | None = None
    silence_s: float | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """An input, to be carried out ``group_size`` times in each of ``rounds`` rounds."""

    task_id: str
    input: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, Any] | None = None  # handed on to the agent as they are
    group_size: int = 1
    rounds: int = 1
    priority: int = 0  # higher ones first
    max_attempts: int = 1  # of a rollout; see claims.py for what does not count
    retry_on: tuple[ErrorClass, ...] = RETRIED_BY_DEFAULT
    timeout_s: float | None = None  # of one attempt, from its claim to its end
    silence_s: float | None = None  # without a call or another sign of life
    state: TaskState = TaskState.OPEN
    created_at: float = 0.0
    round: int = 1  # the one that is carried out, from 1; the last one, where it is done
    standing: Standing = Standing.UNSEEN
    skipped_solved: int = 0  # rounds that were left out because every rollout was right
    skipped_hopeless: int = 0  # ... or none


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """A task as a list shows it; the counts are of rollouts of all rounds."""

    task: Task
    to_do: int  # of this round, and of those to come
    waiting: int  # for their next attempt
    running: int
    succeeded: int
    failed: int
    cancelled: int
    rewarded: int
    success_rate: float | None  # of the rewarded ones, those with a return above 0; None: there are none
    mean_reward: float | None


@dataclass(frozen=True, slots=True)
class PoolProgress:
    """How far some tasks, or all of them, are."""

    tasks: int
    tasks_open: int
    tasks_cancelled: int
    rollouts: int  # that there are and will be, cancelled ones left out: those that have ended are never more
    running: int
    waiting: int
    succeeded: int
    failed: int
    cancelled: int
    failed_by_class: Mapping[str, int]
    skipped_solved: int
    skipped_hopeless: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """One attempt at a rollout of a task, leased to a worker."""

    rollout_id: str
    attempt: int
    task: Task
    api_key: str
    lease_expires_at: float


@dataclass(frozen=True, slots=True)
class LeaseState:
    """What a worker is told about its attempt: to go on, or to stop and why."""

    stop: bool
    reason: str | None
    lease_expires_at: float | None


def new_task(item: Any, what: str = "the task") -> NewTask:
    """A task from JSON: ``{"task_id"?, "input": {...}, settings...}``, or the input's fields beside these.

    Without ``task_id`` it is a digest of the input. Raises ``InvalidInput`` that begins with ``what``.
    """
    if not isinstance(item, Mapping):
        raise InvalidInput(f"{what} must be a JSON object, and is {str(item)[:80]!r}")
    if isinstance(item.get("input"), Mapping):
        given = item["input"]
        unknown = sorted(item.keys() - _SETTINGS - {"input"})
        if unknown:
            raise InvalidInput(
                f"{what} has unknown fields {', '.join(unknown)} beside input; known are "
                f"{', '.join(sorted(_SETTINGS))}"
            )
    else:
        given = {key: value for key, value in item.items() if key not in _SETTINGS}
    if not given:
        raise InvalidInput(f"{what} has no input: give 'input', an object, or the fields of the input")
    return NewTask(
        task_id=_task_id(item.get("task_id"), given, what),
        input=given,
        metadata=_object(item, "metadata", what),
        resources=_object(item, "resources", what),
        group_size=_whole(item, "group_size", what, least=1),
        rounds=_whole(item, "rounds", what, least=1),
        priority=_whole(item, "priority", what, least=-_LARGEST),
        max_attempts=_whole(item, "max_attempts", what, least=1),
        retry_on=_classes(item.get("retry_on"), what),
        timeout_s=_seconds(item, "timeout_s", what),
        silence_s=_seconds(item, "silence_s", what),
    )


def canonical(value: Mapping[str, Any]) -> str:
    """An object as JSON that is the same for equal objects. Raises ``InvalidInput``."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
    except TypeError as error:
        raise InvalidInput(f"not JSON: {error}") from error


def _task_id(given: object, of_input: Mapping[str, Any], what: str) -> str:
    if given is None:
        return "task-" + hashlib.sha256(canonical(of_input).encode()).hexdigest()[:16]
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)  # data sets number their lines
    if not isinstance(given, str) or not 1 <= len(given) <= 256 or "/" in given or not given.isprintable():
        raise InvalidInput(
            f"{what} has the task_id {given!r:.80}: 1 to 256 printable characters without '/' are needed"
        )
    return given


def _object(item: Mapping[str, Any], name: str, what: str) -> Mapping[str, Any] | None:
    value = item.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise InvalidInput(f"{what} has {name} {value!r:.80}: an object is needed")
    return value


def _whole(item: Mapping[str, Any], name: str, what: str, *, least: int) -> int | None:
    value = item.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _LARGEST:
        raise InvalidInput(f"{what} has {name} {value!r:.80}: a whole number of at least {least} is needed")
    return value


def _seconds(item: Mapping[str, Any], name: str, what: str) -> float | None:
    value = item.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidInput(f"{what} has {name} {value!r:.80}: a number of seconds above 0 is needed")
    return float(value)


def _classes(value: object, what: str) -> tuple[ErrorClass, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise InvalidInput(f"{what} has retry_on {value!r:.80}: a list of error classes is needed")
    try:
        return tuple(ErrorClass(str(each)) for each in value)
    except ValueError:
        known = ", ".join(each.value for each in ErrorClass)
        raise InvalidInput(f"{what} has retry_on {value!r:.80}; there are {known}") from None
