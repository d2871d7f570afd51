"""The ways of attribution in their order, and the keys among them."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_proxy.errors import StoreError
from lightning_proxy.store import ConversationEnd, KeyOwner

from .attribution import (
    KEY_PREFIX,
    Attribution,
    api_keys,
    from_headers,
    from_session_headers,
    retry_of,
    role_or_none,
)
from .conversation import Json
from .lineage import Lineage
from .native_ids import from_native_ids
from .roles import Roles
from .threads import OneThread

log = logging.getLogger(__name__)
_REMEMBERED = 10_000
_MOST_POINTS = 64  # of a conversation that are looked for in the store, the latest ones
_NOTHING: Json = {}

FindEnds = Callable[[Sequence[bytes], Sequence[str]], Sequence[ConversationEnd]]


class Attributor:
    """Path, header, key, session, the agent's own ids, the conversation; else a rollout of its own.

    ``look_up`` finds a key's owner in the store (blocking; in a thread of our own, once per key), and
    ``find_ends`` the calls in which conversations with these digests or response ids ended (likewise;
    where this process does not remember them).
    """

    def __init__(
        self,
        look_up: Callable[[str], KeyOwner | None],
        find_ends: FindEnds = lambda digests, response_ids: (),
        roles: Roles | None = None,
        *,
        redacted: Callable[[Json], Any] | None = None,
        patience_s: float = 1.0,
    ) -> None:
        """``redacted``: a part of a request without what must not be kept.

        ``patience_s``: how long a call may wait for ``find_ends`` before it goes on alone.
        """
        self._look_up = look_up
        self._find_ends = find_ends
        self._roles = roles or Roles()
        self._redacted = redacted
        self._patience_s = patience_s
        self._late: asyncio.Future[Sequence[ConversationEnd]] | None = (
            None  # a look-up that was not waited for
        )
        self._lookups = OneThread("lookups")
        self._lineage = Lineage()
        self._owners: OrderedDict[str, KeyOwner] = OrderedDict()
        self._nowhere: OrderedDict[bytes, None] = OrderedDict()  # histories that the store does not have

    async def attribute(
        self,
        by_path: Attribution | None,
        headers: Mapping[str, str],
        *,
        wire: str = "",
        request: Json = _NOTHING,
        body: bytes = b"",
    ) -> Attribution:
        """Whose call it is. A store in trouble is no reason to fail: the call goes by what else there is."""
        retry, doubt = retry_of(headers), None
        found = by_path or from_headers(headers)
        if found is None:
            found, doubt = await self._by_key(headers)
        if found is None:
            found = from_session_headers(headers) or from_native_ids(headers, request, self._redacted)
        if found is None:
            found = await self._by_conversation(wire, request, body, retry)
        role = found.role or self._named_role(headers, wire, request)
        if role == found.role and retry == found.retry and doubt is None:
            return found
        return replace(found, role=role, retry=retry, doubt=doubt)

    async def role_of(
        self, by_path: Attribution | None, headers: Mapping[str, str], *, wire: str, request: Json
    ) -> str | None:
        """The role that :meth:`attribute` will find, told before the call is anybody's: it may have to wait.

        Neither the agents' own ids nor conversations name roles.
        """
        found = by_path or from_headers(headers)
        if found is None:
            found, _ = await self._by_key(headers)
        found = found or from_session_headers(headers)
        return (found and found.role) or self._named_role(headers, wire, request)

    def _named_role(self, headers: Mapping[str, str], wire: str, request: Json) -> str | None:
        return role_or_none(headers.get("X-Role")) or self._roles.role_of(wire, request)

    async def _by_conversation(self, wire: str, request: Json, body: bytes, retry: int) -> Attribution:
        lineage = self._lineage
        place = lineage.place_of(wire, request)
        if lineage.needs_store(place):
            digests = [digest for digest, _ in reversed(place.points)][:_MOST_POINTS]
            if place.references or digests[0] not in self._nowhere:
                lineage.learn(await self._ends(digests, place.references[:_MOST_POINTS]))
        return lineage.begin(wire, body, place, retry)

    async def _ends(self, digests: Sequence[bytes], references: Sequence[str]) -> Sequence[ConversationEnd]:
        """What the store has of a conversation; nothing while it is in trouble, or slower than we wait."""
        if self._late is not None and not self._late.done():
            return ()
        asked = self._lookups.run(self._find_ends, digests, references)
        asked.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, whatever it was
        await asyncio.wait((asked,), timeout=self._patience_s)
        if not asked.done():
            self._late = asked
            log.warning("a conversation was not looked up within %g s", self._patience_s)
            return ()
        try:
            ends = asked.result()
        except StoreError as error:
            log.warning("a conversation could not be looked up: %s", error)
            return ()
        if not ends and digests:
            self._nowhere[digests[0]] = None
            if len(self._nowhere) > _REMEMBERED:
                self._nowhere.popitem(last=False)
        return ends

    async def _by_key(self, headers: Mapping[str, str]) -> tuple[Attribution | None, str | None]:
        """Whose call it is by its key; else why that cannot be told, if it cannot."""
        try:
            owner = await self.sender(headers)
        except StoreError as error:
            log.warning("a key could not be looked up: %s", error)
            return None, f"the key of a call could not be looked up: {error}"
        if owner is None:
            return None, None
        return Attribution(owner.rollout_id, owner.attempt, owner.role, "key", 1.0), None

    async def sender(self, headers: Mapping[str, str]) -> KeyOwner | None:
        """Who the first key that we know was issued for; ``None`` without one. Raises StoreError."""
        for key in api_keys(headers):
            if key.startswith(KEY_PREFIX) and (owner := await self.owner(key)) is not None:
                return owner
        return None

    async def owner(self, key: str) -> KeyOwner | None:
        """Who a key was issued for; ``None`` if nobody. Raises StoreError where that cannot be told."""
        owner = self._owners.get(key)
        if owner is None:
            owner = await self._lookups.run(self._look_up, key)
            if owner is not None:
                self.remember(key, owner)
        return owner

    def remember(self, key: str, owner: KeyOwner) -> None:
        """Know a key without looking it up."""
        self._owners[key] = owner
        if len(self._owners) > _REMEMBERED:
            self._owners.popitem(last=False)
