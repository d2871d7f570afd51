"""JSON paths, as much of them as rules need: names, ``[3]``, ``[*]``, ``*`` and ``**``.

``messages[*].content``, ``metadata.email``, ``**.ssn``, ``**["odd name"]``; a leading ``$.`` may stand
there. A path goes on inside a text that is itself JSON, as tool arguments are:
``messages[*].tool_calls[*].function.arguments.password``.

(jsonpath-ng would be a dependency in the core; paths inside such texts it does not know.)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeAlias

import orjson

from .inside import changed_inside


class Every(Enum):
    """Steps that are no name and no number."""

    ITEM = "[*]"
    FIELD = "*"
    DEPTH = "**"  # this value and all below it


Step: TypeAlias = str | int | Every

_STEP = re.compile(
    r"""\.?(?:
        (?P<depth>\*\*) | (?P<any>\*) | (?P<name>[^\s.\[\]*"']+)
      | \[\s*(?: (?P<index>\d+) | (?P<every>\*) | "(?P<quoted>(?:[^"\\]|\\.)*)" | '(?P<single>[^']*)' )\s*\]
    )""",
    re.VERBOSE,
)


def parse_path(text: str) -> tuple[Step, ...]:
    """The steps of a path. Raises ``ValueError`` saying where it is wrong."""
    at = 1 if text.startswith("$") else 0
    steps: list[Step] = []
    while at < len(text):
        found = _STEP.match(text, at)
        if found is None or found.end() == at:
            raise ValueError(f'{text[at:]!r} is no step: there are .name, [3], [*], .*, ** and ["a name"]')
        steps.append(_step(found))
        at = found.end()
    if not steps or steps[-1] is Every.DEPTH:
        raise ValueError("it must end in the name or the place of what is taken out")
    return tuple(steps)


def _step(found: re.Match[str]) -> Step:
    kind, text = next((name, value) for name, value in found.groupdict().items() if value is not None)
    match kind:
        case "depth":
            return Every.DEPTH
        case "any":
            return Every.FIELD
        case "every":
            return Every.ITEM
        case "index":
            return int(text)
        case "quoted":
            return str(orjson.loads(f'"{text}"'))
        case _:
            return text


def changed_at(value: Any, steps: tuple[Step, ...], change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied wherever the path leads; the same object where it leads nowhere."""
    if not steps:
        return change(value)
    if isinstance(value, str):
        return changed_inside(value, lambda inner: changed_at(inner, steps, change))
    step, rest = steps[0], steps[1:]
    if step is Every.DEPTH:
        value = changed_at(value, rest, change)
        return _mapped(value, lambda _: True, lambda item: changed_at(item, steps, change))
    return _mapped(value, lambda key: _fits(step, key), lambda item: changed_at(item, rest, change))


def _fits(step: Step, key: str | int) -> bool:
    if step is Every.ITEM:
        return isinstance(key, int)
    if step is Every.FIELD:
        return isinstance(key, str)
    return step == key


def _mapped(value: Any, fits: Callable[[str | int], bool], change: Callable[[Any], Any]) -> Any:
    """A container with some of its items changed; the same object where none was."""
    if isinstance(value, dict):
        made = {key: change(item) if fits(key) else item for key, item in value.items()}
        return made if any(made[key] is not value[key] for key in made) else value
    if isinstance(value, list):
        items = [change(item) if fits(number) else item for number, item in enumerate(value)]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value
