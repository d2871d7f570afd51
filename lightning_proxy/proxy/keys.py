"""Attribution by key, and the order in which the ways of attribution apply."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace

from lightning_proxy.errors import StoreError
from lightning_proxy.store import KeyOwner

from .attribution import KEY_PREFIX, Attribution, api_keys, from_headers, own_rollout, role_or_none

log = logging.getLogger(__name__)
_REMEMBERED = 10_000


class Attributor:
    """Path, then headers, then key; else a rollout of its own.

    ``look_up`` finds a key's owner in the store (blocking; called off the loop, once per key).
    """

    def __init__(self, look_up: Callable[[str], KeyOwner | None]) -> None:
        self._look_up = look_up
        self._owners: OrderedDict[str, KeyOwner] = OrderedDict()

    async def attribute(self, by_path: Attribution | None, headers: Mapping[str, str]) -> Attribution:
        """Whose call it is. A store in trouble is no reason to fail: the call stands alone then."""
        found = by_path or from_headers(headers)
        if found is None:
            found = await self._by_key(headers) or own_rollout()
        role = role_or_none(headers.get("X-Role"))
        return replace(found, role=role) if role and found.role is None else found

    async def _by_key(self, headers: Mapping[str, str]) -> Attribution | None:
        for key in api_keys(headers):
            if key.startswith(KEY_PREFIX) and (owner := await self.owner(key)) is not None:
                return Attribution(owner.rollout_id, owner.attempt, owner.role, "key", 1.0)
        return None

    async def owner(self, key: str) -> KeyOwner | None:
        """Who a key was issued for; ``None`` if nobody."""
        owner = self._owners.get(key)
        if owner is None:
            try:
                owner = await asyncio.to_thread(self._look_up, key)
            except StoreError as error:
                log.warning("a key could not be looked up: %s", error)
            if owner is not None:
                self.remember(key, owner)
        return owner

    def remember(self, key: str, owner: KeyOwner) -> None:
        """Know a key without looking it up."""
        self._owners[key] = owner
        if len(self._owners) > _REMEMBERED:
            self._owners.popitem(last=False)
