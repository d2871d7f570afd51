"""Who may do what, where a token is set. Without one, only this machine can reach us."""

from __future__ import annotations

import hmac

from aiohttp import web

from .attribution import KEY_PREFIX, api_keys
from .keys import Attributor

_OPEN_PATHS = frozenset(("/healthz", "/readyz"))


class Guard:
    """The token, or a key issued for a rollout, opens model calls; only the token opens the rest."""

    def __init__(self, token: str | None, attributor: Attributor) -> None:
        self._token = token
        self._attributor = attributor

    async def admits(self, request: web.Request, *, model_call: bool) -> bool:
        """Whether a request may go on."""
        if self._token is None or request.path in _OPEN_PATHS:
            return True
        keys = api_keys(request.headers)
        if any(hmac.compare_digest(_bytes(key), _bytes(self._token)) for key in keys):
            return True
        if not model_call:
            return False
        for key in keys:
            if key.startswith(KEY_PREFIX) and await self._attributor.owner(key) is not None:
                return True
        return False


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")  # as aiohttp decodes what a header holds
