"""The proxy process: its parts, put together, and their life.

``create_app`` builds an application for an engine that runs; ``serve`` is the whole process,
with vLLM as its child where the settings name a model and no upstream.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import uvloop
from aiohttp import web

from lightning_proxy.config import Settings, UpstreamSettings, for_policy, policy_names
from lightning_proxy.config.policies import FurtherPolicySettings
from lightning_proxy.errors import ConfigError, LightningError
from lightning_proxy.redaction import Redactor
from lightning_proxy.store import Writer

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
from .reader import Reader, open_store
from .recorder import Recorder
from .retention import Retention
from .roles import Roles
from .served import Policies, Served, engine_process
from .sweep import watch_for_silence
from .switch import Switch
from .tasks import Tasks
from .upstream import LONGEST_LINE, Upstream, only_the_upstreams
from .upstreams import Endpoint, Upstreams, endpoint_of

log = logging.getLogger(__name__)
_AT_ONCE_S = 1.0  # after a second signal, for what is quickly done in order
_NONE: Mapping[str, EngineProcess] = MappingProxyType({})


@dataclass(slots=True)
class Parts:
    """What a running proxy consists of."""

    settings: Settings
    metrics: Metrics
    writer: Writer
    reader: Reader  # for the control routes
    lookups: Reader  # for attribution, so that no call waits for a long list
    upstreams: Upstreams
    policies: Policies
    attributor: Attributor
    tasks: Tasks
    forwarder: Forwarder
    retention: Retention
    redactor: Redactor | None = None
    base_url: str = ""

    @property
    def hold(self) -> Hold:
        """Where calls of ``[policy]`` wait."""
        return self.policies.main.hold

    @property
    def engine(self) -> Engine:
        """The engine of ``[policy]``."""
        return self.policies.main.engine


PARTS: web.AppKey[Parts] = web.AppKey("parts", Parts)


def create_app(settings: Settings, *, processes: Mapping[str, EngineProcess] = _NONE) -> web.Application:
    """The application; its parts are under ``PARTS``. The store opens when it starts up.

    ``processes``: the engines that are our children, by the policy that they serve.
    """
    parts = _build(settings, processes)
    guard = Guard(settings.proxy.token, parts.attributor, keys_reward=settings.proxy.rollout_keys_reward)
    app = web.Application(
        client_max_size=settings.proxy.max_body_mb * 2**20, middlewares=[_door(guard, parts.forwarder)]
    )
    app[PARTS] = parts
    access = Access(parts.writer, parts.reader, parts.redactor)
    pool = TaskRoutes(access, parts.attributor, lambda: parts.base_url)
    app.add_routes(_own_routes(parts, guard, access, pool))
    for path in ("/reward", "/api/{unknown:.*}"):  # with a method that our own routes do not have
        app.router.add_route("*", path, _no_such_route)
    app.router.add_route("*", "/{anything:.*}", parts.forwarder.handle)
    app.on_response_prepare.append(only_the_upstreams)
    app.cleanup_ctx.append(_life(parts, pool))
    return app


def _own_routes(parts: Parts, guard: Guard, access: Access, pool: TaskRoutes) -> list[web.RouteDef]:
    """Every route that is ours; all others are forwarded."""
    of_each_kind = (
        RewardRoutes(access, parts.metrics, guard.bound_to),
        RolloutRoutes(access, parts.attributor, lambda: parts.base_url),
        pool,
        FailureRoutes(access),
        RetentionRoutes(parts.retention),
        PolicyRoutes(access, parts.policies),
        StateRoutes(access, writer=parts.writer, policies=parts.policies, metrics=parts.metrics),
    )
    return [route for kind in of_each_kind for route in kind.routes()]


def _build(settings: Settings, processes: Mapping[str, EngineProcess]) -> Parts:
    proxy = settings.proxy
    metrics, tasks = Metrics(), Tasks()
    writer = Writer(
        settings.store.db,
        synchronous=settings.store.synchronous,
        busy_timeout_s=settings.store.busy_timeout_s,
    )
    reader, lookups = Reader(settings), Reader(settings)
    upstreams = _endpoints(settings, processes)
    policies = _policies(settings, upstreams, processes, writer=writer, metrics=metrics, tasks=tasks)
    redactor = Redactor.of(settings.redaction)
    attributor = Attributor(
        lambda key: lookups(lambda store: store.owner_of_key(key)),
        lambda digests, ids: lookups(lambda store: store.conversation_ends(digests, ids)),
        Roles(settings.roles),
        redacted=None if redactor is None else redactor.part,
    )
    forwarder = Forwarder(
        upstreams=upstreams,
        policies=policies,
        attributor=attributor,
        recorder=Recorder(writer, metrics, timeout_s=proxy.commit_timeout_s),
        findings=Findings(settings.failures),
        metrics=metrics,
        tasks=tasks,
        hold_timeout_s=proxy.hold_timeout_s,
        exploration=Exploration(settings.exploration),
        redactor=redactor,
    )
    _watch(metrics, policies, writer)
    return Parts(
        settings,
        metrics,
        writer,
        reader,
        lookups,
        upstreams,
        policies,
        attributor,
        tasks,
        forwarder,
        Retention(lambda: open_store(settings), settings.store.keep_days),
        redactor,
    )


def _endpoints(settings: Settings, processes: Mapping[str, EngineProcess]) -> Upstreams:
    """Where calls go: first by role, then by the policies' names, then by other models."""
    proxy, main = settings.proxy, settings.policy.name
    url = processes[main].url if main in processes else proxy.upstream
    if url is None:
        raise ConfigError(
            "nothing to forward to: give --upstream URL (an engine that runs) or --model PATH (we start vLLM)"
        )
    engine = Engine(url, proxy.upstream_api_key)
    further = {
        each.name: endpoint_of(_upstream_of(each, processes.get(each.name)), proxy.token)
        for each in settings.policies
    }
    by_role = {role: further[each.name] for each in settings.policies if each.route for role in each.roles}
    for endpoint in by_role.values():
        endpoint.also_for = main
    return Upstreams(
        Endpoint(Upstream(url, proxy.upstream_api_key, proxy.token), engine, proxy.capture),
        [*further.values(), *(endpoint_of(one, proxy.token) for one in settings.upstreams)],
        by_role,
    )


def _upstream_of(policy: FurtherPolicySettings, process: EngineProcess | None) -> UpstreamSettings:
    url = process.url if process is not None else policy.upstream
    if url is None:
        raise ConfigError(f"nothing serves the policy {policy.name!r}: give its upstream in [[policies]]")
    return UpstreamSettings(
        models=(policy.name,),
        url=url,
        api_key_env=policy.api_key_env,
        api_key_file=policy.api_key_file,
        capture=policy.capture,
    )


def _policies(
    settings: Settings,
    upstreams: Upstreams,
    processes: Mapping[str, EngineProcess],
    *,
    writer: Writer,
    metrics: Metrics,
    tasks: Tasks,
) -> Policies:
    """The policies at their endpoints, that of ``[policy]`` first."""
    names = policy_names(settings)
    served = []
    for name, endpoint in zip(names, (upstreams.main, *upstreams.others), strict=False):
        own = for_policy(settings, name)
        hold = Hold()
        switch = Switch(
            policy=name,
            engine=endpoint.engine,
            hold=hold,
            writer=writer,
            metrics=metrics,
            tasks=tasks,
            tolerance=own.train.verify_tolerance,
        )
        endpoint.served = Served(own, endpoint.engine, hold, switch, processes.get(name))
        served.append(endpoint.served)
    return Policies(served[0], served[1:])


def _watch(metrics: Metrics, policies: Policies, writer: Writer) -> None:
    """Numbers that are read when somebody looks."""
    metrics.watch("held_calls", "Calls waiting for an engine", lambda: policies.waiting)
    metrics.watch("spans_pending", "Spans waiting to be committed", lambda: writer.pending)
    metrics.watch("spans_dropped", "Spans given up because too many waited", lambda: writer.dropped)

    def version(served: Served) -> float:
        return -1 if (runs := served.switch.version) is None else runs

    metrics.watch_each(
        "policy_version",
        "Version that the engine runs, -1 where unknown",
        "policy",
        {each.policy: functools.partial(version, each) for each in policies},
    )


# -- life --------------------------------------------------------------------------------------


def _life(parts: Parts, pool: TaskRoutes) -> Callable[[web.Application], Any]:
    async def life(app: web.Application) -> Any:
        parts.writer.start()
        await parts.upstreams.start()
        for served in parts.policies:
            await served.begin(parts.writer, parts.tasks)
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


# -- the door: errors of ours and tokens ---------------------------------------------------------


def _door(guard: Guard, forwarder: Forwarder) -> Any:
    @web.middleware
    async def door(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            forwarded = request.match_info.handler == forwarder.handle
            if (refusal := await guard.refusal(request, forwarded=forwarded)) is not None:
                return refusal
            response: web.StreamResponse = await handler(request)
            return response
        except LightningError as error:
            return problem(*http_status(error), str(error))
        except web.HTTPRequestEntityTooLarge as error:
            return problem(413, "too_large", f"{error.text} Raise proxy.max_body_mb (lightning.toml), or "
                           "LIGHTNING_PROXY__MAX_BODY_MB, to let larger ones through.")  # fmt: skip

    return door


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
    processes = _engine_processes(settings)
    app = create_app(settings, processes=processes)
    parts = app[PARTS]
    runner = runner_of(app, settings)
    await runner.setup()
    stop = _stop_by_signals(runner)
    try:
        await listen(runner, settings, parts)
        announce(_greeting(parts))
        waiting = [parts.tasks.spawn("until told to stop", stop.wait())]
        waiting += [
            parts.tasks.spawn(f"vLLM of {served.policy}", served.supervise())
            for served in parts.policies
            if served.process is not None
        ]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for ended in done:
            ended.result()  # EngineDied, where the engine was given up
    finally:
        await runner.cleanup()


def _stop_by_signals(runner: web.AppRunner) -> asyncio.Event:
    """Set by the first signal, which ends us in order. The second one cuts whatever calls are under way,
    and soon after that ends us outright: what was acknowledged is in the store, and vLLM ends with us.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def told(number: int) -> None:
        if stop.is_set():
            log.warning("told to stop again: calls under way are cut")
            for connection in runner.server.connections if runner.server is not None else ():
                if connection.transport is not None:
                    connection.transport.abort()
            loop.call_later(_AT_ONCE_S, os._exit, 128 + number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told, number)
    return stop


def runner_of(app: web.Application, settings: Settings) -> web.AppRunner:
    """What serves an application: bodies as they came, and lines of the length that upstreams' may have."""
    return web.AppRunner(
        app,
        handler_cancellation=True,
        auto_decompress=False,
        access_log=None,
        max_line_size=LONGEST_LINE,
        max_field_size=LONGEST_LINE,
        shutdown_timeout=settings.proxy.shutdown_timeout_s / 2,  # once for uploads, once for answers
    )


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


def _greeting(parts: Parts) -> str:
    main, *others = parts.policies
    behind = "vLLM (starting)" if main.process else parts.upstreams.main.upstream.base
    further = f"\n  policies: {', '.join(each.policy for each in (main, *others))}" if others else ""
    return (
        f"lightning-proxy listens on {parts.base_url} before {behind}; "
        f"spans go to {parts.settings.store.db}{further}\n"
        f"  agents:  export OPENAI_BASE_URL={parts.base_url}/v1    # or ANTHROPIC_BASE_URL={parts.base_url}"
    )


def _engine_processes(settings: Settings) -> dict[str, EngineProcess]:
    """vLLM, not started yet, for each policy that no upstream serves."""
    main = settings.policy.name
    processes = {}
    if settings.proxy.upstream is None:
        processes[main] = engine_process(for_policy(settings, main))
    for each in settings.policies:
        if each.upstream is None:
            own = for_policy(settings, each.name)
            processes[each.name] = engine_process(own, shown_as=main if each.route else None)
    return processes
