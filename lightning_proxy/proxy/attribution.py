"""Whose call is it? What the path and the headers say. No I/O.

``keys.Attributor`` has all the ways and their order. What no way settles gets a rollout of its own, so
that nobody's rollout ever holds somebody else's call.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote

from multidict import istr

from lightning_proxy.errors import InvalidInput

if TYPE_CHECKING:
    from .lineage import Strand

_PREFIX = re.compile(
    r"/(?:rollout|sessions)/(?P<rollout>[^/?]+)"
    r"(?:/attempt/(?P<attempt>[^/?]+))?"
    r"(?:/role/(?P<role>[^/?]+))?"
    r"(?P<rest>/v1(?:[/?].*)?|/?(?:\?.*)?)"
)
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,199}")
_LONGEST_NUMBER = 10  # digits of an attempt
_ROLLOUT, _SESSION = istr("X-Rollout-Id"), istr("X-Session-Id")
_RETRY_COUNT = istr("X-Stainless-Retry-Count")
KEY_PREFIX = "lp-"  # of the keys that Store.issue_key makes


@dataclass(frozen=True, slots=True)
class Attribution:
    """Rollout, attempt and role of a call, how they were found, and how surely (0 to 1)."""

    rollout_id: str
    attempt: int = 1
    role: str | None = None
    by: str = "none"
    confidence: float = 0.0
    retry: int = 0  # which try of its client's SDK it is, beyond the first
    doubt: str | None = field(default=None, compare=False)  # why it may be another rollout's after all
    # The conversation it is part of, where that had to be looked at.
    strand: Strand | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class SplitPath:
    """A request path without its attribution prefix, and what the prefix said."""

    path: str
    attribution: Attribution | None


def split_path(target: str) -> SplitPath:
    """Take ``/rollout/{id}[/attempt/{n}][/role/{role}]`` off the path that a request is for.

    Raises InvalidInput for an id or attempt that cannot be one, and for a target that has no path.
    """
    path = origin_form(target)
    match = _PREFIX.fullmatch(path)
    if match is None:
        return SplitPath(path, None)
    rollout_id = checked_id(unquote(match["rollout"]), "rollout id")
    role = match["role"] and checked_id(unquote(match["role"]), "role")
    attempt = checked_attempt(match["attempt"] or "1")
    rest = match["rest"] if match["rest"].startswith("/") else "/" + match["rest"]
    return SplitPath(rest, Attribution(rollout_id, attempt, role, "path", 1.0))


def origin_form(target: str) -> str:
    """Path and query of a request's target (RFC 9112 section 3.2).

    Of a whole URL too, as clients send it that take us for a proxy of theirs: whatever host it names, the
    answer is the upstream's. What has no path (``*``, the target of CONNECT) is for no upstream, and must
    not become a part of its address. Raises InvalidInput.
    """
    if target.startswith("/"):
        return target
    match = _ABSOLUTE.match(target)
    if match is None:
        raise InvalidInput(f"{target[:80]!r} is no path: only requests for a path are forwarded")
    rest = target[match.end() :]
    return rest if rest.startswith("/") else "/" + rest


def from_headers(headers: Mapping[str, str]) -> Attribution | None:
    """``X-Rollout-Id`` (with ``X-Attempt``, ``X-Role``), else ``rollout_id`` in W3C ``baggage``.

    An id that cannot be one is no attribution: the header may be meant for somebody else.
    """
    return _from_headers(headers, _ROLLOUT, ("rollout_id",))


def from_session_headers(headers: Mapping[str, str]) -> Attribution | None:
    """The same by ``X-Session-Id`` or a session in ``baggage``, which agents also send for others' sake."""
    return _from_headers(headers, _SESSION, ("session_id", "session.id"))


def _from_headers(headers: Mapping[str, str], name: str, in_baggage: Sequence[str]) -> Attribution | None:
    bag: Mapping[str, str] = {}
    rollout_id, by = headers.get(name), "header"
    if not rollout_id and "baggage" in headers:
        bag = parse_baggage(headers["baggage"])
        rollout_id, by = next((bag[key] for key in in_baggage if bag.get(key)), None), "baggage"
    if not rollout_id or not _ID.fullmatch(rollout_id):
        return None
    attempt = headers.get("X-Attempt") or bag.get("attempt") or "1"
    number = int(attempt) if _is_attempt(attempt) else 1
    return Attribution(rollout_id, number, role_or_none(bag.get("role")), by, 1.0)


def role_or_none(value: str | None) -> str | None:
    """A role that a header names; ``None`` where it cannot be one."""
    return value if value and _ID.fullmatch(value) else None


def retry_of(headers: Mapping[str, str]) -> int:
    """How often the client's SDK had tried this call before, as OpenAI's and Anthropic's SDKs say."""
    count = headers.get(_RETRY_COUNT)
    return int(count) if count is not None and count.isdecimal() and len(count) <= 4 else 0


def parse_baggage(header: str) -> dict[str, str]:
    """W3C Baggage (https://www.w3.org/TR/baggage/): ``k=v;properties, k=v``."""
    pairs: dict[str, str] = {}
    for member in header.split(","):
        name, separator, value = member.split(";", 1)[0].partition("=")
        if separator:
            pairs[name.strip()] = unquote(value.strip())
    return pairs


def own_rollout() -> Attribution:
    """A rollout of its own for a call that nothing attributes.

    Its id begins with the time, so that neighbours in time are neighbours in the database's indexes.
    """
    return Attribution(f"auto-{time.time_ns():x}-{random.getrandbits(32):08x}")


def api_keys(headers: Mapping[str, str]) -> list[str]:
    """The keys that an agent sent, by either convention; Claude Code, for one, may send both."""
    authorization = headers.get("Authorization", "")
    keys = [authorization[7:].strip()] if authorization[:7].lower() == "bearer " else []
    if "x-api-key" in headers:
        keys.append(headers["x-api-key"])
    return keys


def checked_id(value: str, what: str) -> str:
    """Return ``value`` if it can be an id, else raise InvalidInput."""
    if not _ID.fullmatch(value):
        raise InvalidInput(
            f"{value[:80]!r} cannot be a {what}: 1 to 200 letters, digits or ._:@- are needed, "
            "beginning with a letter or digit"
        )
    return value


def checked_attempt(value: str) -> int:
    """Return an attempt number, counted from 1, else raise InvalidInput."""
    if not _is_attempt(value):
        raise InvalidInput(f"{value[:80]!r} cannot be an attempt: a whole number from 1 is needed")
    return int(value)


def _is_attempt(value: str) -> bool:
    return value.isdecimal() and len(value) <= _LONGEST_NUMBER and 0 < int(value) < 2**31
