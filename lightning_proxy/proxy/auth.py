"""Who may do what, where a token is set. Without one, only this machine can reach us."""

from __future__ import annotations

import hmac

from aiohttp import web

from .attribution import KEY_PREFIX, api_key
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
        sent = api_key(request.headers)
        if sent is None:
            return False
        if hmac.compare_digest(sent.encode(), self._token.encode()):
            return True
        return model_call and sent.startswith(KEY_PREFIX) and await self._attributor.owner(sent) is not None
