"""The proxy process: its parts, put together, and their life.

``create_app`` builds an application for an engine that runs; ``serve`` is the whole process,
with vLLM as its child where the settings name a model and no upstream.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web

from lightning_proxy.config import Settings
from lightning_proxy.errors import ConfigError, EngineError, LightningError, PublishFailed
from lightning_proxy.redaction import Redactor
from lightning_proxy.store import RewardRule, Store, VersionStatus, Writer

from .attribution import api_keys
from .auth import Guard
from .control.access import Access
from .control.failures import FailureRoutes
from .control.policies import PolicyRoutes
from .control.requests import http_status
from .control.retention import RetentionRoutes
from .control.rewards import RewardRoutes
from .control.rollouts import RolloutRoutes
from .control.state import StateRoutes
from .control.tasks import TaskRoutes
from .engine import Engine
from .engine_process import EngineProcess
from .exploration import Exploration
from .findings import Findings
from .forward import Forwarder
from .hold import Hold
from .keys import Attributor
from .metrics import Metrics
from .problem import problem
from .recorder import Recorder
from .retention import Retention
from .roles import Roles
from .sweep import watch_for_silence
from .switch import Switch
from .tasks import Tasks
from .upstream import Upstream, only_the_upstreams
from .upstreams import Endpoint, Upstreams, endpoint_of

log = logging.getLogger(__name__)
STARTING = "the engine is starting"
RESTORING = "the active version is being restored"


class Reader:
    """One connection for questions to the store, used by one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._store: Store | None = None

    def __call__(self, question: Callable[[Store], Any]) -> Any:
        """Ask the store. Blocking: call it off the loop."""
        with self._lock:
            if self._store is None:
                self._store = open_store(self._settings)
            return question(self._store)

    def close(self) -> None:
        """Close the connection, if there is one."""
        with self._lock:
            if self._store is not None:
                self._store.close()


@dataclass(slots=True)
class Parts:
    """What a running proxy consists of."""

    settings: Settings
    metrics: Metrics
    hold: Hold
    writer: Writer
    reader: Reader  # for the control routes
    lookups: Reader  # for attribution, so that no call waits for a long list
    upstreams: Upstreams
    engine: Engine
    switch: Switch
    attributor: Attributor
    tasks: Tasks
    forwarder: Forwarder
    retention: Retention
    redactor: Redactor | None = None
    base_url: str = ""


PARTS: web.AppKey[Parts] = web.AppKey("parts", Parts)


def create_app(settings: Settings, *, engine_process: EngineProcess | None = None) -> web.Application:
    """The application; its parts are under ``PARTS``. The store opens when it starts up."""
    parts = _build(settings, engine_process.url if engine_process else settings.proxy.upstream)
    guard = Guard(settings.proxy.token, parts.attributor, keys_reward=settings.proxy.rollout_keys_reward)
    app = web.Application(client_max_size=settings.proxy.max_body_mb * 2**20, middlewares=[_door(guard)])
    app[PARTS] = parts
    access = Access(parts.writer, parts.reader, parts.redactor)
    pool = TaskRoutes(access, parts.attributor, lambda: parts.base_url)
    app.add_routes(_own_routes(parts, guard, access, pool))
    for path in ("/reward", "/api/{unknown:.*}"):  # with a method that our own routes do not have
        app.router.add_route("*", path, _no_such_route)
    app.router.add_route("*", "/{anything:.*}", parts.forwarder.handle)
    app.on_response_prepare.append(only_the_upstreams)
    app.cleanup_ctx.append(_life(parts, pool, engine_process))
    return app


def _own_routes(parts: Parts, guard: Guard, access: Access, pool: TaskRoutes) -> list[web.RouteDef]:
    """Every route that is ours; all others are forwarded."""
    of_each_kind = (
        RewardRoutes(access, parts.metrics, guard.bound_to),
        RolloutRoutes(access, parts.attributor, lambda: parts.base_url),
        pool,
        FailureRoutes(access),
        RetentionRoutes(parts.retention),
        PolicyRoutes(access, parts.switch),
        StateRoutes(
            access,
            writer=parts.writer,
            switch=parts.switch,
            hold=parts.hold,
            engine=parts.engine,
            metrics=parts.metrics,
        ),
    )
    return [route for kind in of_each_kind for route in kind.routes()]


def _build(settings: Settings, upstream_url: str | None) -> Parts:
    if upstream_url is None:
        raise ConfigError(
            "nothing to forward to: give --upstream URL (an engine that runs) or --model PATH (we start vLLM)"
        )
    proxy = settings.proxy
    metrics, hold, tasks = Metrics(), Hold(), Tasks()
    writer = Writer(
        settings.store.db,
        synchronous=settings.store.synchronous,
        busy_timeout_s=settings.store.busy_timeout_s,
    )
    reader, lookups = Reader(settings), Reader(settings)
    engine = Engine(upstream_url, proxy.upstream_api_key)
    upstreams = _endpoints(settings, upstream_url, engine)
    switch = Switch(
        policy=settings.policy.name,
        engine=engine,
        hold=hold,
        writer=writer,
        metrics=metrics,
        tasks=tasks,
        tolerance=settings.train.verify_tolerance,
    )
    redactor = Redactor.of(settings.redaction)
    attributor = Attributor(
        lambda key: lookups(lambda store: store.owner_of_key(key)),
        lambda digests, ids: lookups(lambda store: store.conversation_ends(digests, ids)),
        Roles(settings.roles),
    )
    forwarder = Forwarder(
        upstreams=upstreams,
        hold=hold,
        switch=switch,
        attributor=attributor,
        recorder=Recorder(writer, metrics, timeout_s=proxy.commit_timeout_s),
        findings=Findings(settings.failures),
        metrics=metrics,
        tasks=tasks,
        hold_timeout_s=proxy.hold_timeout_s,
        exploration=Exploration(settings.exploration),
        redactor=redactor,
    )
    _watch(metrics, hold, writer, lambda: switch.version_of(settings.policy.name))
    return Parts(
        settings,
        metrics,
        hold,
        writer,
        reader,
        lookups,
        upstreams,
        engine,
        switch,
        attributor,
        tasks,
        forwarder,
        Retention(lambda: open_store(settings), settings.store.keep_days),
        redactor,
    )


def _endpoints(settings: Settings, upstream_url: str, engine: Engine) -> Upstreams:
    proxy = settings.proxy
    upstream = Upstream(upstream_url, proxy.upstream_api_key, proxy.token)
    return Upstreams(
        Endpoint(upstream, engine, proxy.capture),
        [endpoint_of(one, proxy.token) for one in settings.upstreams],
    )


def _watch(metrics: Metrics, hold: Hold, writer: Writer, version: Callable[[], int | None]) -> None:
    """Numbers that are read when somebody looks."""
    metrics.watch("held_calls", "Calls waiting for the engine", lambda: hold.waiting)
    metrics.watch("spans_pending", "Spans waiting to be committed", lambda: writer.pending)
    metrics.watch("spans_dropped", "Spans given up because too many waited", lambda: writer.dropped)
    metrics.watch("policy_version", "Version that the engine runs, -1 where unknown",
                  lambda: -1 if (v := version()) is None else v)  # fmt: skip


def open_store(settings: Settings) -> Store:
    """The store that the settings name."""
    store = Store.open(
        settings.store.db,
        synchronous=settings.store.synchronous,
        busy_timeout_s=settings.store.busy_timeout_s,
    )
    store.rule = RewardRule(
        settings.reward_weights, settings.train.late_rewards == "retrain", settings.reward_roles
    )
    return store


# -- life --------------------------------------------------------------------------------------


def _life(
    parts: Parts, pool: TaskRoutes, engine_process: EngineProcess | None
) -> Callable[[web.Application], Any]:
    async def life(app: web.Application) -> Any:
        parts.writer.start()
        await parts.upstreams.start()
        await _register_model(parts)
        if engine_process is None:
            await _begin_with_active(parts)
        silence_s = parts.settings.failures.silence_s
        parts.tasks.spawn("silent rollouts", watch_for_silence(parts.writer, silence_s))
        parts.tasks.spawn("look after the task pool", pool.sweep_now_and_then())
        if parts.retention.keep_days:
            parts.tasks.spawn("delete old rollouts", parts.retention.keep())
        yield
        parts.retention.close()
        await parts.tasks.close()
        await parts.upstreams.close()
        await parts.writer.close()
        parts.reader.close()
        parts.lookups.close()

    return life


async def _register_model(parts: Parts) -> None:
    """The weights that the user brought are version 0."""
    policy = parts.settings.policy
    if policy.model is not None:
        path = str(policy.model.resolve())
        await parts.writer.submit(lambda store: store.add_base_version(policy.name, path))


async def _begin_with_active(parts: Parts) -> None:
    """Version 0 is what the engine was started with; any other has to be loaded again.

    So has version 0 where there are others: a proxy that died in mid-change leaves the engine
    paused, or on weights that are not the active ones.
    """
    policy = parts.settings.policy.name
    versions = await parts.writer.submit(lambda store: store.list_versions(policy))
    active = next((version for version in versions if version.status is VersionStatus.ACTIVE), None)
    if active is None or len(versions) == 1:
        parts.switch.started_with(active)
        return
    parts.hold.close(RESTORING)
    parts.tasks.spawn("restore the active version", _restore(parts))


async def _restore(parts: Parts) -> None:
    """Bring an engine that somebody else started to the active version, once it answers."""
    try:
        await parts.engine.answers()
        await parts.switch.restore_active()
    except (EngineError, PublishFailed) as error:
        log.error("the engine does not run the active version of the policy: %s", error)
        parts.switch.lost()
    finally:
        parts.hold.release(RESTORING)


# -- the door: errors of ours and tokens ---------------------------------------------------------


def _door(guard: Guard) -> Any:
    @web.middleware
    async def door(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            ours = request.path.startswith(("/api/", "/reward", "/metrics", "/ui"))
            if not await guard.admits(request, model_call=not ours):
                return _not_admitted(request)
            response: web.StreamResponse = await handler(request)
            return response
        except LightningError as error:
            return problem(*http_status(error), str(error))
        except web.HTTPRequestEntityTooLarge as error:
            return problem(413, "too_large", f"{error.text} Raise proxy.max_body_mb (lightning.toml), or "
                           "LIGHTNING_PROXY__MAX_BODY_MB, to let larger ones through.")  # fmt: skip

    return door


def _not_admitted(request: web.Request) -> web.Response:
    sent = "a key that is not known here" if api_keys(request.headers) else "no key"
    return problem(
        401,
        "invalid_api_key",
        f"the request carries {sent}: send the proxy's token as `Authorization: Bearer ...`",
    )


async def _no_such_route(request: web.Request) -> web.Response:
    return problem(404, "not_found", f"there is no {request.method} {request.path} here")


# -- the process ---------------------------------------------------------------------------------


def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Run until told to stop; ``announce`` gets one text, once calls can come.

    Raises ConfigError before it listens, EngineDied when vLLM is given up.
    """
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    uvloop.run(_serve(settings, announce))


async def _serve(settings: Settings, announce: Callable[[str], None]) -> None:
    engine_process = _engine_process(settings) if settings.proxy.upstream is None else None
    app = create_app(settings, engine_process=engine_process)
    parts = app[PARTS]
    runner = web.AppRunner(app, handler_cancellation=True, auto_decompress=False, access_log=None)
    await runner.setup()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        await listen(runner, settings, parts)
        announce(_greeting(parts, engine_process))
        waiting = [parts.tasks.spawn("until told to stop", stop.wait())]
        if engine_process is not None:
            waiting.append(parts.tasks.spawn("vLLM", _supervise(engine_process, parts)))
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for ended in done:
            ended.result()  # EngineDied, where the engine was given up
    finally:
        await runner.cleanup()


async def listen(runner: web.AppRunner, settings: Settings, parts: Parts) -> None:
    """Bind the port and learn our own address."""
    proxy = settings.proxy
    try:
        await web.TCPSite(runner, proxy.host, proxy.port, reuse_address=True).start()
    except OSError as error:
        raise ConfigError(f"cannot listen on {proxy.host}:{proxy.port}: {error.strerror or error}") from error
    port = runner.addresses[0][1]
    host = "127.0.0.1" if proxy.host in ("0.0.0.0", "::") else proxy.host
    parts.base_url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _greeting(parts: Parts, engine_process: EngineProcess | None) -> str:
    behind = "vLLM (starting)" if engine_process else parts.upstreams.main.upstream.base
    return (
        f"lightning-proxy listens on {parts.base_url} before {behind}; "
        f"spans go to {parts.settings.store.db}\n"
        f"  agents:  export OPENAI_BASE_URL={parts.base_url}/v1    # or ANTHROPIC_BASE_URL={parts.base_url}"
    )


def _engine_process(settings: Settings) -> EngineProcess:
    model = settings.policy.model
    if model is None:
        raise ConfigError(
            "nothing to forward to: give --upstream URL (an engine that runs) or --model PATH (we start vLLM)"
        )
    if not (model / "config.json").is_file():
        raise ConfigError(f"{model} holds no config.json: a directory in Hugging Face's layout is needed")

    def weights() -> Path:
        with open_store(settings) as store:
            active = store.active_version(settings.policy.name)
        return Path(active.path) if active is not None else model.resolve()

    return EngineProcess(settings.engine, policy=settings.policy.name, model=weights, port=_free_port())


async def _supervise(engine_process: EngineProcess, parts: Parts) -> None:
    parts.hold.close(STARTING)

    async def ready() -> None:
        policy = parts.settings.policy.name
        parts.switch.started_with(await parts.writer.submit(lambda store: store.active_version(policy)))
        parts.hold.release(STARTING)
        log.info("vLLM is ready")

    async def down() -> None:
        parts.hold.close(STARTING)

    engine_process.on_ready, engine_process.on_down = ready, down
    await engine_process.run()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
