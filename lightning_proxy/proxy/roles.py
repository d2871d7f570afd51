"""Which agent of a multi-agent system is calling, told by its system prompt and its tools. No I/O."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Sequence

from lightning_proxy.config.settings import RoleSettings

from .conversation import Json, system_of, tools_of

_CACHED = 1_000
# Words that may change from call to call: dates, numbers, ids, versions, paths, URLs.
_VOLATILE = re.compile(
    r"\S*[0-9/\\]\S*"
    r"|\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b"
    r"|\b(?:january|february|march|april|may|june|july|august|september|october|november|december)\b"
    r"|\b[ap]m\b"
)


def fingerprint(system: str, tools: Sequence[str]) -> str:
    """Eight hex digits that stand for an agent: its system prompt's lasting words and its tools.

    Letter case, white space, and every word with a digit or a slash make no difference, nor do names
    of weekdays and months: so a date, an id, a version or a path in the prompt does not change it.
    """
    words = _VOLATILE.sub(" ", system.lower()).split()
    text = "\n".join([" ".join(words), *sorted(tools)])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


class Roles:
    """The configured roles; the first that fits a call names it."""

    def __init__(self, roles: Sequence[RoleSettings] = ()) -> None:
        self._roles = tuple(roles)
        self._known: OrderedDict[tuple[str, tuple[str, ...]], str | None] = OrderedDict()

    def role_of(self, wire: str, request: Json) -> str | None:
        """The role of a call; ``None`` where none of the configured ones fits."""
        if not self._roles:
            return None
        try:
            key = (system_of(wire, request), tools_of(request))
        except (TypeError, ValueError, AttributeError, RecursionError):  # a request of an odd shape
            return None
        if key in self._known:
            return self._known[key]
        role = self.role_for(*key)
        self._known[key] = role
        if len(self._known) > _CACHED:
            self._known.popitem(last=False)
        return role

    def role_for(self, system: str, tools: tuple[str, ...]) -> str | None:
        """The role of an agent with this system prompt and these tools."""
        mark = fingerprint(system, tools)
        return next((role.name for role in self._roles if _fits(role, mark, system, tools)), None)


def _fits(role: RoleSettings, mark: str, system: str, tools: tuple[str, ...]) -> bool:
    return (
        role.fingerprint in (None, mark)
        and (role.system_contains is None or role.system_contains in system)
        and set(role.tools) <= set(tools)
    )
