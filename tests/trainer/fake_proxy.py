"""The proxy's promote route, on a real socket, over the real store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from aiohttp import web

from lightning_proxy.errors import Conflict
from lightning_proxy.store import Store

Mode = Literal["promotes", "rejects", "refuses", "forgets to answer"]


class FakeProxy:
    """What was asked of it, and how it answers."""

    def __init__(self, db: Path, mode: Mode) -> None:
        self.mode: Mode = mode
        self.url = ""
        self.asked: list[tuple[str, int]] = []
        self.authorization: list[str | None] = []
        self._db = db

    async def promote(self, request: web.Request) -> web.StreamResponse:
        policy, version = request.match_info["policy"], int(request.match_info["version"])
        self.asked.append((policy, version))
        self.authorization.append(request.headers.get("Authorization"))
        if self.mode == "refuses":
            return web.json_response({"error": {"code": "busy", "message": "another swap runs"}}, status=409)
        with Store.open(self._db) as store:
            if self.mode == "rejects":
                store.reject_version(policy, version, "logprobs of the probe differ by 3.0")
                return web.json_response({"error": {"code": "rejected", "message": "differs"}}, status=502)
            try:
                store.activate_version(policy, version)
            except Conflict as error:
                return web.json_response({"error": {"code": "conflict", "message": str(error)}}, status=409)
        if self.mode == "forgets to answer":
            assert request.transport is not None
            request.transport.close()
        return web.json_response(
            {"policy": policy, "version": version, "status": "active", "swap_s": 0.1, "verify_max_diff": 1e-6}
        )

    async def roll_back(self, request: web.Request) -> web.StreamResponse:
        policy, version = request.match_info["policy"], int((await request.json())["version"])
        self.asked.append((f"{policy} back", version))
        with Store.open(self._db) as store:
            store.activate_version(policy, version)
        return web.json_response({"policy": policy, "version": version, "status": "active"})


@contextmanager
def fake_proxy(db: Path, mode: Mode = "promotes") -> Iterator[FakeProxy]:
    """Serve on a free port, in a thread."""
    proxy = FakeProxy(db, mode)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/api/policies/{policy}/versions/{version}/promote", proxy.promote)
        app.router.add_post("/api/policies/{policy}/rollback", proxy.roll_back)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        proxy.url = f"http://{host}:{port}"
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
