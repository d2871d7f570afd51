"""``/api/stats``, ``/healthz``, ``/readyz`` and ``/metrics``: the state of things."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from lightning_proxy.proxy.metrics import Metrics
from lightning_proxy.proxy.served import Policies, Served
from lightning_proxy.store import Writer

from .access import Access
from .requests import answer


class StateRoutes:
    """Counts, health and metrics."""

    def __init__(self, access: Access, *, writer: Writer, policies: Policies, metrics: Metrics) -> None:
        self._access = access
        self._writer = writer
        self._policies = policies
        self._metrics = metrics

    def routes(self) -> list[web.RouteDef]:
        """The routes of this file."""
        return [
            web.get("/api/stats", self.stats),
            web.get("/healthz", self.healthz),
            web.get("/readyz", self.readyz),
            web.get("/metrics", self.show_metrics),
        ]

    async def stats(self, request: web.Request) -> web.Response:
        """Counts of everything, and what the proxy is doing."""
        counts = await self._access.read(lambda store: store.stats())
        return answer(
            {
                **counts,
                **_served(self._policies.main),
                "held_calls": self._policies.waiting,
                "held_because": self._policies.held_because,
                "policies": [_served(each) for each in self._policies],
                "spans_pending": self._writer.pending,
                "spans_dropped": self._writer.dropped,
            }
        )

    async def healthz(self, request: web.Request) -> web.Response:
        """The process answers."""
        return answer({"status": "ok"})

    async def readyz(self, request: web.Request) -> web.Response:
        """Calls go straight through to an engine that answers, and spans are written."""
        waits_for = self._policies.held_because
        if not self._writer.healthy:
            waits_for.append(f"the store: {self._writer.last_error}")
        if not waits_for:
            engines = list(self._policies)
            healthy = await asyncio.gather(*(each.engine.healthy() for each in engines))
            waits_for = [
                self._policies.about(each, "the engine does not answer")
                for each, answers in zip(engines, healthy, strict=True)
                if not answers
            ]
        return answer({"ready": not waits_for, "waits_for": waits_for}, 503 if waits_for else 200)

    async def show_metrics(self, request: web.Request) -> web.Response:
        """Prometheus' text format."""
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})


def _served(policy: Served) -> dict[str, Any]:
    serving = policy.switch.serving
    return {
        "policy": policy.policy,
        "serving_version": serving.version if serving else None,
        "held_calls": policy.hold.waiting,
        "held_because": list(policy.hold.reasons),
    }
