"""``/api/policies`` and ``/api/runs``: versions, their comparison, promotion, rollback, training runs."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from lightning_proxy.errors import InvalidInput
from lightning_proxy.proxy.served import Policies
from lightning_proxy.store import against_from, as_json, seconds_of

from .access import Access
from .requests import answer, fields_of, limit_of, read_json, whole


class PolicyRoutes:
    """Policies and the runs that made their versions."""

    def __init__(self, access: Access, policies: Policies) -> None:
        self._access = access
        self._policies = policies

    def routes(self) -> list[web.RouteDef]:
        """The routes of this file."""
        return [
            web.get("/api/policies", self.list_policies),
            web.get("/api/policies/{policy}/comparison", self.compare),
            web.post("/api/policies/{policy}/versions/{version}/promote", self.promote),
            web.post("/api/policies/{policy}/rollback", self.rollback),
            web.get("/api/runs", self.list_runs),
        ]

    async def list_policies(self, request: web.Request) -> web.Response:
        """Every policy, its active version and all its versions."""
        versions = await self._access.read(lambda store: store.list_versions())
        policies: dict[str, dict[str, Any]] = {}
        for version in versions:
            entry = policies.setdefault(
                version.policy, {"policy": version.policy, "active": None, "versions": []}
            )
            entry["versions"].append(as_json(version))
            if version.status == "active":
                entry["active"] = version.version
        return answer({"policies": list(policies.values())})

    async def compare(self, request: web.Request) -> web.Response:
        """Mean return of each version and its difference to another, with 95% intervals.

        ``against`` (``first``, ``parent`` or a version), ``since`` (``24h``), ``reward`` (a name).
        """
        policy, reward = request.match_info["policy"], request.query.get("reward")
        against = against_from(request.query.get("against", "first"))
        window = request.query.get("since")
        since = 0.0 if window is None else time.time() - seconds_of(window)
        found = await self._access.read(
            lambda store: store.compare_versions(policy, against=against, since=since, reward=reward)
        )
        return answer(as_json(found))

    async def promote(self, request: web.Request) -> web.Response:
        """Let a version take over; answers when it has, or says why it could not."""
        version = whole(request.match_info["version"], "a version")
        return answer(as_json(await self._policies.of(request.match_info["policy"]).switch.promote(version)))

    async def rollback(self, request: web.Request) -> web.Response:
        """Go back to ``{"version": n}``, by default to the parent of the active version."""
        posted = fields_of(await read_json(request, empty={}), frozenset(("version",)), "the rollback")
        version = posted.get("version")
        if version is not None and (not isinstance(version, int) or isinstance(version, bool)):
            raise InvalidInput(f"version is {version!r}: a whole number is needed")
        return answer(as_json(await self._policies.of(request.match_info["policy"]).switch.rollback(version)))

    async def list_runs(self, request: web.Request) -> web.Response:
        """Training runs, newest first."""
        limit = limit_of(request)
        runs = await self._access.read(lambda store: store.list_runs(limit=limit))
        return answer({"runs": as_json(runs)})
