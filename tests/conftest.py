"""Fixtures that tests of several rooms share: a fake engine, proxies before it, a clean environment."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from aiohttp import web
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from lightning_proxy.config import Settings
from lightning_proxy.store import Store
from tests.engine import EngineThread, FakeEngine

_FOREIGN = re.compile(r"(OPENAI|ANTHROPIC|LIGHTNING|VLLM|HF)_|((HTTPS?|ALL|NO)_PROXY)$", re.IGNORECASE)

# How long an example takes says how busy the machine is, not whether the code is right.
hypothesis_settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("busy")

# Tests read the database as soon as they have an answer. By default a store that does not commit within
# two seconds is no longer waited for, and a busy machine may need more.
COMMIT_TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep keys, base URLs, settings and proxies of the developer's shell out of every test."""
    for name in os.environ:
        if _FOREIGN.match(name):
            monkeypatch.delenv(name)


@pytest.fixture
def engine() -> Iterator[EngineThread]:
    """A fake vLLM on a free port."""
    thread = EngineThread(FakeEngine())
    yield thread
    thread.stop()


@pytest.fixture
def make_engine() -> Iterator[Callable[[FakeEngine], EngineThread]]:
    """Start fake engines that differ from the plain one: ``make_engine(FakeEngine(owner="openai"))``."""
    started: list[EngineThread] = []

    def make(engine: FakeEngine) -> EngineThread:
        started.append(EngineThread(engine))
        return started[-1]

    yield make
    for thread in started:
        thread.stop()


class ProxyThread:
    """A proxy on a free port, in this process, in a thread and loop of its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._runner, self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)

    @property
    def base_url(self) -> str:
        """What an agent puts into OPENAI_BASE_URL."""
        return f"{self.url}/v1"

    @property
    def db(self) -> Path:
        """The database file."""
        return self.settings.store.db

    def store(self) -> Store:
        """A connection to the database of its own."""
        return Store.open(self.db)

    def hold(self, reason: str) -> None:
        """Close the gate before the main upstream, as a change of weights does."""
        from lightning_proxy.proxy.app import PARTS

        async def close() -> None:
            self._runner.app[PARTS].hold.close(reason)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(10)

    async def _start(self) -> tuple[web.AppRunner, str]:
        from lightning_proxy.proxy.app import PARTS, create_app, listen, runner_of

        app = create_app(self.settings)
        runner = runner_of(app, self.settings)
        await runner.setup()
        await listen(runner, self.settings, app[PARTS])
        return runner, app[PARTS].base_url

    def stop(self) -> None:
        """Stop it as a SIGTERM would."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        """Clean up, and as ``asyncio.run`` does, leave no task behind: litellm keeps one of its own."""
        await self._runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


@dataclass(slots=True)
class ProxyProcess:
    """A real ``lightning-proxy serve``."""

    process: subprocess.Popen[str]
    url: str
    db: Path
    log: Path

    @property
    def base_url(self) -> str:
        """What an agent puts into OPENAI_BASE_URL."""
        return f"{self.url}/v1"

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self.process.wait(30)

    def terminate(self, timeout_s: float = 60.0) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


class MakeProxy(Protocol):
    """Start a proxy before an upstream; keyword arguments are table names of the settings."""

    def __call__(self, upstream: str, **tables: Any) -> ProxyThread: ...


class MakeProxyProcess(Protocol):
    """Start ``lightning-proxy serve --upstream URL`` with further flags."""

    def __call__(
        self, upstream: str, *flags: str, db: Path | None = None, env: dict[str, str] | None = None
    ) -> ProxyProcess: ...


@pytest.fixture
def make_proxy(tmp_path: Path) -> Iterator[MakeProxy]:
    """Start proxies in this process: ``make_proxy(engine.base_url, proxy={"token": "s"})``."""
    started: list[ProxyThread] = []

    def make(upstream: str, **tables: Any) -> ProxyThread:
        given: dict[str, object] = dict(tables)
        plain = {"upstream": upstream, "port": 0, "commit_timeout_s": COMMIT_TIMEOUT_S}
        given["proxy"] = {**plain, **tables.get("proxy", {})}
        given["store"] = {"db": tmp_path / "lightning.db", **tables.get("store", {})}
        started.append(ProxyThread(Settings.model_validate(given)))
        return started[-1]

    yield make
    for proxy in started:
        proxy.stop()


@pytest.fixture
def proxy(make_proxy: MakeProxy, engine: EngineThread) -> ProxyThread:
    """A proxy before the ``engine`` fixture, in this process."""
    return make_proxy(engine.base_url)


@pytest.fixture
def make_proxy_process(tmp_path: Path) -> Iterator[MakeProxyProcess]:
    """Start real ``lightning-proxy serve`` processes; they are ended after the test."""
    started: list[ProxyProcess] = []

    def make(
        upstream: str, *flags: str, db: Path | None = None, env: dict[str, str] | None = None
    ) -> ProxyProcess:
        db = db or tmp_path / "lightning.db"
        log = tmp_path / f"proxy-{len(started)}.log"
        started.append(start_proxy(upstream, db, log, *flags, env=env))
        return started[-1]

    yield make
    for proxy in started:
        if proxy.process.poll() is None:
            proxy.kill()
        if proxy.process.stdout is not None:
            proxy.process.stdout.close()


@pytest.fixture
def proxy_process(make_proxy_process: MakeProxyProcess, engine: EngineThread) -> ProxyProcess:
    """A real ``lightning-proxy serve`` before the ``engine`` fixture."""
    return make_proxy_process(engine.base_url)


def start_proxy(
    upstream: str, db: Path, log: Path, *flags: str, env: dict[str, str] | None = None
) -> ProxyProcess:
    """Start ``serve`` on a free port and wait until it listens and answers."""
    command = [str(Path(sys.executable).with_name("lightning-proxy")), "serve", "--upstream", upstream]
    command += ["--port", "0", "--db", str(db), *flags]
    with log.open("a") as errors:
        process = subprocess.Popen(
            command,
            cwd=db.parent,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "LIGHTNING_PROXY__COMMIT_TIMEOUT_S": str(COMMIT_TIMEOUT_S), **(env or {})},
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://[^\s/]+", line)
    if found is None:
        process.kill()
        raise AssertionError(f"serve did not say where it listens: {line!r}\n{log.read_text()}")
    url = found.group()
    urllib.request.urlopen(f"{url}/healthz", timeout=60).close()
    return ProxyProcess(process, url, db, log)


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Block until a condition holds. Raises ``TimeoutError``; the limit is there for what hangs."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so within {timeout_s} s")
        time.sleep(0.005)
