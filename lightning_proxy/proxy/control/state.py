"""``/api/stats``, ``/healthz``, ``/readyz`` and ``/metrics``: the state of things."""

from __future__ import annotations

from aiohttp import web

from lightning_proxy.proxy.engine import Engine
from lightning_proxy.proxy.hold import Hold
from lightning_proxy.proxy.metrics import Metrics
from lightning_proxy.proxy.switch import Switch
from lightning_proxy.store import Writer

from .access import Access
from .requests import answer


class StateRoutes:
    """Counts, health and metrics."""

    def __init__(
        self, access: Access, *, writer: Writer, switch: Switch, hold: Hold, engine: Engine, metrics: Metrics
    ) -> None:
        self._access = access
        self._writer = writer
        self._switch = switch
        self._hold = hold
        self._engine = engine
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
        serving = self._switch.serving
        return answer(
            {
                **counts,
                "policy": self._switch.policy,
                "serving_version": serving.version if serving else None,
                "held_calls": self._hold.waiting,
                "held_because": list(self._hold.reasons),
                "spans_pending": self._writer.pending,
                "spans_dropped": self._writer.dropped,
            }
        )

    async def healthz(self, request: web.Request) -> web.Response:
        """The process answers."""
        return answer({"status": "ok"})

    async def readyz(self, request: web.Request) -> web.Response:
        """Calls go straight through to an engine that answers, and spans are written."""
        waits_for = list(self._hold.reasons)
        if not self._writer.healthy:
            waits_for.append(f"the store: {self._writer.last_error}")
        if not waits_for and not await self._engine.healthy():
            waits_for.append("the engine does not answer")
        return answer({"ready": not waits_for, "waits_for": waits_for}, 503 if waits_for else 200)

    async def show_metrics(self, request: web.Request) -> web.Response:
        """Prometheus' text format."""
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})
