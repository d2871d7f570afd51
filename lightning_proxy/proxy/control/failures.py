"""``/api/failures``: what failed, how often, since when."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from lightning_proxy.store import as_json, seconds_of

from .access import Access
from .requests import answer


class FailureRoutes:
    """Failures in numbers."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def routes(self) -> list[web.RouteDef]:
        """The routes of this file."""
        return [web.get("/api/failures", self.list_failures)]

    async def list_failures(self, request: web.Request) -> web.Response:
        """Per class, most frequent first; ``since`` (``24h``), ``by`` (role, model or policy_version)."""
        window = request.query.get("since")
        since = 0.0 if window is None else time.time() - seconds_of(window)
        by: Any = request.query.get("by")  # checked by the store
        found = await self._access.read(lambda store: store.failures(since=since, by=by))
        return answer({"since": since or None, "by": by, "failures": as_json(found)})
