"""One call on its way through: attribute, hold, prepare, relay, commit, last byte.

What the agent gets is what it would have got without us: bytes, status, headers, errors, timing.
The last byte of an answer leaves after its span is committed, so that an answer which arrived
whole is a span that survives us.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping

import aiohttp
import orjson
from aiohttp import StreamReader, hdrs, web

from lightning_proxy.store import Span

from .attribution import SplitPath, split_path
from .call import Call, parse_request
from .engine import Engine
from .hold import Hold
from .keys import Attributor
from .metrics import Metrics
from .recorder import Recorder
from .switch import Switch
from .upstream import Upstream, response_headers
from .wires import Wire, wire_for
from .wires.base import Untranslatable

log = logging.getLogger(__name__)
_SMALL_BODY = 2**20  # bytes


class UpstreamCut(Exception):
    """The upstream's answer ended before it was whole."""


class Forwarder:
    """Takes every request that is not one of our own routes."""

    def __init__(
        self,
        *,
        upstream: Upstream,
        engine: Engine,
        hold: Hold,
        switch: Switch,
        attributor: Attributor,
        recorder: Recorder,
        metrics: Metrics,
        capture: str,
        hold_timeout_s: float,
    ) -> None:
        self._upstream = upstream
        self._engine = engine
        self._hold = hold
        self._switch = switch
        self._attributor = attributor
        self._recorder = recorder
        self._metrics = metrics
        self._capture = capture
        self._hold_timeout_s = hold_timeout_s

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Forward one request."""
        try:
            return await self._forward(request)
        except ConnectionError as gone:
            # Where the engine broke off, the agent's connection is cut as ours was: a clean end
            # would pass a piece for the whole. Where the agent left, nobody is there to be told.
            log.info("a call broke off: %s", gone)
            if request.transport is not None:
                request.transport.abort()
            return web.Response()

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get(hdrs.UPGRADE, "").lower() == "websocket":
            return problem(426, "upgrade_required", "no WebSocket here: use HTTP with server-sent events")
        split = split_path(request.raw_path)
        if not await self._hold.passed(self._hold_timeout_s):
            why = " and ".join(self._hold.reasons)
            answer = problem(503, "held_too_long", f"the model did not become available in time: {why}")
            answer.headers["Retry-After"] = "5"
            return answer
        wire = wire_for(request.method, split.path.partition("?")[0])
        if wire is None:
            return await self._untouched(request, split)
        with self._recorder.call_under_way():
            return await self._captured(request, split, wire)

    # -- calls that we do not read -----------------------------------------------------------

    async def _untouched(self, request: web.Request, split: SplitPath) -> web.StreamResponse:
        headers = self._upstream.request_headers(request.headers, captured=False)
        body = await _body_of(request)
        try:
            answer = await self._upstream.open(request.method, split.path, headers, body)
        except (aiohttp.ClientError, TimeoutError) as error:
            self._metrics.calls.labels("other", "5xx").inc()
            return self._unreachable(error)
        async with answer:
            self._metrics.calls.labels("other", _status_class(answer.status)).inc()
            response = web.StreamResponse(
                status=answer.status,
                reason=answer.reason,
                headers=response_headers(answer.headers, rewritten=False),
            )
            await response.prepare(request)
            try:
                async for chunk in _chunks(answer):
                    await response.write(chunk)
            except UpstreamCut as cut:
                raise ConnectionResetError(f"the upstream was cut: {cut}") from cut
            await response.write_eof()
            return response

    # -- calls that we capture ---------------------------------------------------------------

    async def _captured(self, request: web.Request, split: SplitPath, wire: Wire) -> web.StreamResponse:
        headers = self._upstream.request_headers(request.headers, captured=True)
        call = await self._begin(request, split, wire, headers)
        try:
            try:
                path = _redirected(split.path, call.prepared.path)
                answer = await self._upstream.open(request.method, path, headers, call.prepared.body)
            except (aiohttp.ClientError, TimeoutError) as error:
                call.status = 502
                await self._commit(call, "upstream_unreachable", str(error))
                return self._unreachable(error)
            async with answer:
                return await self._relay(request, answer, call)
        except (UpstreamCut, Untranslatable) as cut:
            if not call.ended:
                self._submit(call, "cut_stream", str(cut))
            raise ConnectionResetError(f"the upstream was cut: {cut}") from cut
        except BaseException as gone:  # also the cancellation that a vanished agent causes
            if not call.ended:
                error_class = "client_disconnect" if _agent_left(gone) else "proxy_fault"
                self._submit(call, error_class, repr(gone))
            raise

    async def _begin(
        self, request: web.Request, split: SplitPath, wire: Wire, headers: Mapping[str, str]
    ) -> Call:
        body = await request.read()
        encoded = hdrs.CONTENT_ENCODING in request.headers
        parsed = {} if encoded else parse_request(body)
        prepared = wire.prepare(body, parsed, tokens=bool(parsed) and await self._asks_for_tokens(headers))
        policy, version = self._switch.policy_of(parsed.get("model"))
        return Call(
            wire=wire,
            body=body,
            request=parsed,
            prepared=prepared,
            attribution=await self._attributor.attribute(split.attribution, request.headers),
            policy=policy,
            policy_version=version,
        )

    async def _asks_for_tokens(self, headers: Mapping[str, str]) -> bool:
        if self._capture == "auto":
            return bool(await self._engine.is_vllm(headers))
        return self._capture == "tokens"

    async def _relay(
        self, request: web.Request, answer: aiohttp.ClientResponse, call: Call
    ) -> web.StreamResponse:
        call.status = answer.status
        call.streamed = answer.content_type == "text/event-stream" and answer.status < 400
        headers = response_headers(answer.headers, rewritten=True)
        if not call.streamed:
            body = call.whole(b"".join([chunk async for chunk in _chunks(answer)]))
            await self._commit(call)
            return web.Response(status=answer.status, reason=answer.reason, headers=headers, body=body)
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        await response.prepare(request)
        committed = False
        async for chunk in _chunks(answer):
            piece = call.feed(chunk)
            if call.ended and not committed:
                committed = True
                await self._commit(call)
            if piece:
                await response.write(piece)
        rest = call.finish_stream()
        if not committed:
            await self._commit(call)
        if rest:
            await response.write(rest)
        await response.write_eof()
        return response

    # -- records -----------------------------------------------------------------------------

    async def _commit(self, call: Call, error_class: str | None = None, error: str | None = None) -> None:
        span = call.span(
            policy_version_end=self._switch.version_of(call.policy), error_class=error_class, error=error
        )
        self._count(call, span)
        await self._recorder.commit(span)

    def _submit(self, call: Call, error_class: str, error: str) -> None:
        span = call.span(
            policy_version_end=self._switch.version_of(call.policy), error_class=error_class, error=error
        )
        self._count(call, span)
        self._recorder.submit(span)

    def _count(self, call: Call, span: Span) -> None:
        self._metrics.count_call(call.wire.name, _status_class(call.status), span.ended_at - span.started_at)
        if span.error_class is not None:
            self._metrics.upstream_errors.labels(span.error_class).inc()
        if call.fault is not None:
            self._metrics.capture_faults.labels("unreadable_answer").inc()

    def _unreachable(self, error: Exception) -> web.Response:
        log.warning("upstream %s is not reachable: %r", self._upstream.base, error)
        return problem(
            502, "upstream_unreachable", f"the model endpoint {self._upstream.base} did not answer: {error}"
        )


async def _chunks(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body as it comes. Raises UpstreamCut, so that it is told apart from the agent's end."""
    try:
        async for chunk in answer.content.iter_any():
            yield chunk
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise UpstreamCut(repr(error)) from error


def _redirected(path_and_query: str, path: str | None) -> str:
    """Where a call goes: to the agent's own path, or to the one that its translation speaks."""
    return path_and_query if path is None else path


async def _body_of(request: web.Request) -> bytes | StreamReader | None:
    """The body as it comes; a small one whole, for only that can be sent again on a fresh connection."""
    if not request.body_exists:
        return None
    length = request.content_length
    return await request.read() if length is not None and length <= _SMALL_BODY else request.content


def _agent_left(error: BaseException) -> bool:
    return isinstance(error, (ConnectionError, asyncio.CancelledError))


def _status_class(status: int | None) -> str:
    return "none" if status is None else f"{status // 100}xx"


def problem(status: int, code: str, message: str) -> web.Response:
    """An error of our own, in the shape that OpenAI's clients read."""
    body = orjson.dumps({"error": {"message": message, "type": "lightning_proxy_error", "param": None,
                                   "code": code}})  # fmt: skip
    return web.Response(status=status, body=body, content_type="application/json")
