"""JSON that stands in a text, and what reading it once does not show.

Of a name that stands twice in an object, readers keep the last value; what is stored as it was sent still
holds the first. And a text that is no JSON, for it was cut or others stand around it, may be spelt in
JSON's escapes all the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import orjson

_ESCAPES = re.compile(r"(?:\\+u[0-9a-fA-F]{4})+")  # of texts in texts too, where each backslash is two
_BACKSLASHES = re.compile(r"\\+")


def json_inside(text: str) -> Any:
    """The object or list that a text is in JSON; ``None`` where it is none.

    What strict readers refuse is read as well: half a surrogate pair, which models write, and ``NaN``.
    Raises ``RecursionError`` where it is nested too deeply to be read.
    """
    if text.lstrip(" \t\r\n")[:1] + text.rstrip(" \t\r\n")[-1:] not in ("{}", "[]"):
        return None
    for read in (orjson.loads, json.loads):
        try:
            return read(text)
        except ValueError:
            pass
    return None


def changed_inside(text: str, change: Callable[[Any], Any]) -> str:
    """``text`` with the JSON that it is changed; the same object where it is none, or nothing was changed.

    Where a name stands twice in it, it is written anew with the last value, which alone was seen.
    """
    inner = json_inside(text)
    if inner is None:
        return text
    new = change(inner)
    return text if new is inner and not names_twice(text, inner) else _written(new)


def names_twice(raw: str | bytes, value: Any) -> bool:
    """Whether an object in ``raw``, which was read as ``value``, has two values of one name."""
    try:
        if orjson.dumps(value) == (raw.encode() if isinstance(raw, str) else raw):
            return False
    except (TypeError, UnicodeEncodeError):
        pass  # half a surrogate pair; nested deeper than it writes
    try:
        json.loads(raw, object_pairs_hook=_object)
    except _NameTwice:
        return True
    return False


def unescaped(text: str) -> str:
    r"""``text`` with what is spelt ``\u0040`` in it as it reads; halves of surrogate pairs become U+FFFD."""
    return _ESCAPES.sub(_read, text) if "\\u" in text else text


class _NameTwice(Exception):
    """An object has two values of one name."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _NameTwice
    return made


def _read(escapes: re.Match[str]) -> str:
    text: str = json.loads('"' + _BACKSLASHES.sub(r"\\", escapes.group()) + '"')
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _written(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # half a surrogate pair; nested deeper than it writes
        return json.dumps(value)
