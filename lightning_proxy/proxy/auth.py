"""Who may do what, where a token is set. Without one, only this machine can reach us."""

from __future__ import annotations

import hmac

from aiohttp import web

from lightning_proxy.store import KeyOwner

from .attribution import KEY_PREFIX, api_keys
from .keys import Attributor

_OPEN_PATHS = frozenset(("/healthz", "/readyz"))
_REWARD_PATH = "/reward"


class Guard:
    """The token opens everything; a key issued for a rollout opens model calls.

    With ``keys_reward`` such a key opens ``POST /reward`` too, for its own rollout; ``bound_to`` tells the
    route which that is.
    """

    def __init__(self, token: str | None, attributor: Attributor, *, keys_reward: bool = False) -> None:
        self._token = token
        self._attributor = attributor
        self._keys_reward = keys_reward

    async def admits(self, request: web.Request, *, model_call: bool) -> bool:
        """Whether a request may go on."""
        if request.path in _OPEN_PATHS or self._has_token(request):
            return True
        if model_call or (self._keys_reward and request.path == _REWARD_PATH):
            return await self._owner(request) is not None
        return False

    async def bound_to(self, request: web.Request) -> str | None:
        """The only rollout that an admitted request may change; ``None``: any."""
        if self._has_token(request):
            return None
        owner = await self._owner(request)
        return None if owner is None else owner.rollout_id

    def _has_token(self, request: web.Request) -> bool:
        """Whether it came with the token, or there is none to come with."""
        token = self._token
        return token is None or any(
            hmac.compare_digest(_bytes(key), _bytes(token)) for key in api_keys(request.headers)
        )

    async def _owner(self, request: web.Request) -> KeyOwner | None:
        for key in api_keys(request.headers):
            if key.startswith(KEY_PREFIX) and (owner := await self._attributor.owner(key)) is not None:
                return owner
        return None


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")  # as aiohttp decodes what a header holds
