"""Reading what was sent to our own routes, and answering it."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, TypeVar

import orjson
from aiohttp import web

from lightning_proxy.errors import (
    EngineError,
    InvalidInput,
    LightningError,
    PublishFailed,
    RequestError,
    StoreUnavailable,
)

Choice = TypeVar("Choice", bound=StrEnum)

_DEEPEST = 100  # levels; what is stored is answered some levels further down, and orjson writes 254


async def read_json(request: web.Request, *, empty: Any = None) -> Any:
    """The body as JSON; ``empty`` where there is none. Raises InvalidInput."""
    body = await request.read()
    if not body and empty is not None:
        return empty
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the body is no JSON: {error}") from None
    if _is_deeper(value, _DEEPEST):
        raise InvalidInput(f"the body is nested too deeply: {_DEEPEST} levels are possible")
    return value


def _is_deeper(value: Any, most: int) -> bool:
    """Whether objects and lists stand in one another more than ``most`` times; one level after another."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        level = [
            item
            for each in level
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, dict | list)
        ]
    return bool(level)


def text_of(posted: dict[str, Any], name: str) -> str | None:
    """A text that may be missing. Raises InvalidInput."""
    value = posted.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidInput(f"{name} is {value!r:.80}: a text is needed")
    return value


def fields_of(item: Any, known: frozenset[str], what: str) -> dict[str, Any]:
    """``item`` as an object with none but the ``known`` fields. Raises InvalidInput."""
    if not isinstance(item, dict):
        raise InvalidInput(f"{what} must be a JSON object, and is {str(item)[:80]!r}")
    unknown = sorted(set(item) - known)
    if unknown:
        raise InvalidInput(
            f"{what} has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    return item


def whole(text: str, what: str) -> int:
    """A whole number that is not negative. Raises InvalidInput."""
    if not text.isdecimal() or len(text) > 18:
        raise InvalidInput(f"{text[:80]!r} cannot be {what}: a whole number is needed")
    return int(text)


def choice_of(kind: type[Choice], text: object, what: str) -> Choice:
    """The member of ``kind`` that ``text`` names. Raises InvalidInput, which lists them."""
    try:
        return kind(str(text))
    except ValueError:
        known = ", ".join(each.value for each in kind)
        raise InvalidInput(f"{text!r:.80} is no {what}; there are {known}") from None


def optional_choice(kind: type[Choice], text: object, what: str) -> Choice | None:
    """The same, where nothing may be said."""
    return None if text is None else choice_of(kind, text, what)


def limit_of(request: web.Request) -> int:
    """The ``limit`` of a list. Raises InvalidInput."""
    limit = whole(request.query.get("limit", "100"), "limit")
    if not 1 <= limit <= 10_000:
        raise InvalidInput(f"limit is {limit}: 1 to 10000 is possible")
    return limit


def answer(value: Any, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")


def http_status(error: LightningError) -> tuple[int, str]:
    """The status and code with which an error of ours leaves the house."""
    match error:
        case RequestError():
            return error.status, error.code
        case StoreUnavailable():
            return 503, "store_unavailable"
        case PublishFailed():
            return 409, "version_rejected"
        case EngineError():
            return 502, "engine_error"
        case _:
            return 500, "internal_error"
