"""A file of tasks, one JSON object a line, and how a task's fields get into a command (no processes)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_proxy.errors import InvalidInput
from lightning_proxy.store.task_records import new_task

_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_.-]*)\}")
_NO_VARIABLE = re.compile(r"[^A-Z0-9_]")
_LONGEST_VALUE = 100_000  # bytes; Linux takes 131,071 for one variable or argument


def read_tasks(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tasks of a JSONL file, as ``POST /api/tasks`` takes them; empty lines are passed over.

    ``settings`` (``group_size`` and so on) are for lines that do not say otherwise; None is "not given".
    Raises ``InvalidInput`` naming the line and what is wrong with it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: U+2028 may stand in a text
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read {path}: {error}") from None
    given = {name: value for name, value in settings.items() if value is not None}
    tasks: dict[str, dict[str, Any]] = {}
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}:"
        task = _task(line, given, where)
        if task["task_id"] in seen:
            raise InvalidInput(
                f"{where} the task {task['task_id']!r} stands in line {seen[task['task_id']]} already; "
                "for several rollouts of it give it a group_size"
            )
        seen[task["task_id"]] = number
        tasks[task["task_id"]] = task
    if not tasks:
        raise InvalidInput(f"{path} holds no task: one JSON object a line is needed")
    return list(tasks.values())


def _task(line: str, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise InvalidInput(f"{where} no JSON: {error}") from None
    task = new_task(item, f"{where} the task")
    own = {f.name: value for f in fields(task) if (value := getattr(task, f.name)) is not None}
    return {**settings, **own}


def fields_of(task: Mapping[str, Any]) -> dict[str, Any]:
    """What ``{...}`` in a command can name: the input's fields, and ``task_id``."""
    return {"task_id": task["task_id"], **task["input"]}


def check_command(argv: Sequence[str], tasks: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``InvalidInput`` where a task lacks a field that the command names."""
    for task in tasks:
        fill_in(argv, task)


def fill_in(argv: Sequence[str], task: Mapping[str, Any]) -> list[str]:
    """The command with ``{field}`` replaced, and ``{{`` and ``}}`` for braces.

    Texts are taken as they are, everything else as JSON. Raises ``InvalidInput`` for an unknown field.
    """
    named = fields_of(task)

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        if name not in named:
            raise InvalidInput(
                f"the command says {{{name}}}, and task {task['task_id']!r} has no such field; it has "
                f"{', '.join(sorted(named))} (write {{{{{name}}}}} for braces that are meant)"
            )
        return as_text(named[name])

    return [_FIELD.sub(value, word) for word in argv]


def task_environment(assignment: Mapping[str, Any]) -> dict[str, str]:
    """``LIGHTNING_TASK`` (the input as JSON), ``TASK_<FIELD>`` for its scalars, and the resources.

    What is too long for a variable is left out; see ``LIGHTNING_TASK_FILE`` in worker.py.
    """
    env = {
        "LIGHTNING_TASK_ID": assignment["task_id"],
        "LIGHTNING_TASK": json.dumps(assignment["input"], ensure_ascii=False),
    }
    if assignment.get("resources") is not None:
        env["LIGHTNING_RESOURCES"] = json.dumps(assignment["resources"], ensure_ascii=False)
    for name, value in assignment["input"].items():
        if isinstance(value, str | int | float | bool):
            env["TASK_" + _NO_VARIABLE.sub("_", name.upper())] = as_text(value)
    return {
        name: value
        for name, value in env.items()
        if len(value.encode()) <= _LONGEST_VALUE and "\0" not in value
    }


def as_text(value: Any) -> str:
    """A field as an argument or a variable."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
