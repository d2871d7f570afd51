"""A fake engine in a thread of its own, as tests use it."""

from __future__ import annotations

import asyncio
import threading
import time

from tests.engine.connection import Request
from tests.engine.model import Model
from tests.engine.script import Script
from tests.engine.server import MODEL_CALLS, FakeEngine


class EngineThread:
    """A fake engine in a thread of its own, so that blocking tests can talk to it too."""

    def __init__(self, engine: FakeEngine, port: int = 0) -> None:
        self.engine = engine
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-engine", daemon=True)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(engine.start(port), self._loop).result(30)

    @property
    def url(self) -> str:
        """The root, as control routes are asked."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """What one would put into OPENAI_BASE_URL."""
        return f"{self.url}/v1"

    @property
    def model(self) -> Model:
        """The model as loaded: ``model.generate(body)`` says what a request gets."""
        return self.engine.model

    @property
    def requests(self) -> list[Request]:
        """The requests so far, oldest first."""
        return list(self.engine.requests)

    @property
    def calls(self) -> list[Request]:
        """The model calls among them."""
        return [request for request in self.requests if request.path in MODEL_CALLS]

    def script(self, script: Script, *, times: int = 1, path: str = "/v1/chat/completions") -> None:
        """Prescribe what becomes of the next ``times`` requests to ``path``."""
        self._loop.call_soon_threadsafe(lambda: self.engine.script(script, times=times, path=path))

    def drop_idle(self) -> int:
        """Close idle connections, as uvicorn does after a pause; returns how many."""

        async def drop() -> int:
            return self.engine.drop_idle()

        return asyncio.run_coroutine_threadsafe(drop(), self._loop).result(10)

    def wait_for_calls(self, count: int, timeout_s: float = 60.0) -> list[Request]:
        """Block until that many model calls have come. Raises ``TimeoutError``."""
        deadline = time.monotonic() + timeout_s
        while len(self.calls) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self.calls)} of {count} model calls after {timeout_s} s")
            time.sleep(0.005)
        return self.calls

    def stop(self) -> None:
        """Break every connection and end the thread. Done before: no effect."""
        if self._loop.is_closed():
            return

        async def stop() -> None:
            self.engine.stop()
            await asyncio.sleep(0)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
