"""One call on its way through: attribute, hold, prepare, relay, commit, last byte.

What the agent gets is what it would have got without us: bytes, status, headers, errors, timing.
The last byte of an answer leaves after its span is committed, so that an answer which arrived
whole is a span that survives us.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace

import aiohttp
from aiohttp import HttpVersion11, StreamReader, hdrs, web

from lightning_proxy.redaction import Redactor
from lightning_proxy.store import ErrorClass, Span

from .attribution import SplitPath, split_path
from .call import Call, parse_request
from .encoded import EncodedAnswer
from .encoding import decoded
from .exploration import EXPLORED, Exploration, explored
from .failures import class_without_answer
from .findings import Findings
from .keys import Attributor
from .metrics import Metrics
from .problem import problem, unreachable
from .recorder import Recorder
from .redaction import REDACTED, secrets_of
from .served import Policies
from .tasks import Tasks
from .upstream import Upstream, read_out, reset_at_the_end, response_headers
from .upstreams import Endpoint, Upstreams
from .websocket import WebSockets, is_upgrade
from .wires import Wire, wire_for
from .wires.base import Json, Prepared, Untranslatable, shaped

log = logging.getLogger(__name__)
_SMALL_BODY = 2**20  # bytes
# What the engine answers to a request that it does not take, before it has done anything.
_REFUSED = frozenset((400, 404, 405, 413, 415, 422, 501))


class UpstreamCut(Exception):
    """The upstream's answer ended before it was whole."""


@dataclass(frozen=True, slots=True)
class _Received:
    """A request's body."""

    body: bytes  # as it came
    plain: bytes  # without its content encoding; the same object where it has none
    request: Json  # that, parsed; {} where it is no JSON object


class Forwarder:
    """Takes every request that is not one of our own routes."""

    def __init__(
        self,
        *,
        upstreams: Upstreams,
        policies: Policies,
        attributor: Attributor,
        recorder: Recorder,
        findings: Findings,
        metrics: Metrics,
        tasks: Tasks,
        hold_timeout_s: float,
        exploration: Exploration | None = None,
        redactor: Redactor | None = None,
    ) -> None:
        self._upstreams = upstreams
        self._policies = policies
        self._attributor = attributor
        self._recorder = recorder
        self._findings = findings
        self._metrics = metrics
        self._tasks = tasks
        self._websockets = WebSockets(upstreams.main.upstream, metrics, tasks)
        self._hold_timeout_s = hold_timeout_s
        self._exploration = exploration or Exploration()
        self._redactor = redactor

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Forward one request."""
        try:
            return await self._forward(request)
        except ConnectionError as gone:
            # Where the engine broke off, the agent's connection is cut as ours was: a clean end
            # would pass a piece for the whole. Where the agent left, nobody is there to be told.
            log.info("a call broke off: %s", gone)
            _break_off(request)
            return web.Response()

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        split = split_path(request.raw_path)
        if is_upgrade(request):
            if (refusal := await self._held_too_long(self._upstreams.main)) is not None:
                return refusal
            return await self._websockets.handle(request, split.path)
        wire = wire_for(request.method, split.path.partition("?")[0])
        if wire is None:
            return await self._untouched(request, split)
        with self._recorder.call_under_way():
            return await self._captured(request, split, wire)

    async def _held_too_long(self, endpoint: Endpoint) -> web.Response | None:
        """Wait while the policy at an endpoint cannot take calls; the refusal, where that took too long."""
        if endpoint.served is None or await endpoint.served.hold.passed(self._hold_timeout_s):
            return None
        why = " and ".join(endpoint.served.hold.reasons)
        answer = problem(503, "held_too_long", f"the model did not become available in time: {why}")
        answer.headers["Retry-After"] = "5"
        return answer

    # -- calls that we do not read -----------------------------------------------------------

    async def _untouched(self, request: web.Request, split: SplitPath) -> web.StreamResponse:
        body = await _body_of(request)
        # A body that is streamed is not looked into: its model cannot be told.
        model = (
            parse_request(body).get("model") if self._upstreams.others and isinstance(body, bytes) else None
        )
        endpoint = self._upstreams.of(model)
        if (refusal := await self._held_too_long(endpoint)) is not None:
            return refusal
        upstream = endpoint.upstream
        headers = upstream.request_headers(request.headers, captured=False)
        try:
            answer = await upstream.open(request.method, split.path, headers, body)
        except (aiohttp.ClientError, TimeoutError) as error:
            self._metrics.calls.labels("other", "5xx").inc()
            return unreachable(upstream.base, error)
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
        received = await self._receive(request)
        endpoint = await self._endpoint_for(request, split, wire, received.request)
        refusal = await self._held_too_long(endpoint)
        upstream = endpoint.upstream
        headers = upstream.request_headers(request.headers, captured=True)
        call = await self._begin(request, split, wire, received, endpoint, headers, goes=refusal is None)
        if refusal is not None:
            call.status = refusal.status
            await self._commit(call, ErrorClass.UPSTREAM_UNREACHABLE, refusal.text)
            return refusal
        try:
            try:
                answer = await self._open(request, split, call, upstream, headers)
            except (aiohttp.ClientError, TimeoutError) as error:
                endpoint.broke(error)
                call.status = 502
                await self._commit(call, class_without_answer(error), str(error) or repr(error))
                return unreachable(upstream.base, error)
            try:
                return await self._relay(request, answer, call)
            finally:
                self._let_go(answer, call)
        except (UpstreamCut, Untranslatable) as cut:
            if isinstance(cut, UpstreamCut):
                endpoint.broke(cut)
            if not call.ended:
                self._submit(call, ErrorClass.CUT_STREAM, str(cut))
            raise ConnectionResetError(f"the upstream was cut: {cut}") from cut
        except BaseException as gone:  # also the cancellation that a vanished agent causes
            if not call.ended:
                left = _agent_left(gone)
                self._submit(
                    call, ErrorClass.CLIENT_DISCONNECT if left else ErrorClass.PROXY_FAULT, repr(gone)
                )
            raise

    async def _endpoint_for(
        self, request: web.Request, split: SplitPath, wire: Wire, asked: Json
    ) -> Endpoint:
        """By the model; by the role too, where the roles of one model are served by several policies."""
        model = asked.get("model")
        if not self._upstreams.role_matters(model):
            return self._upstreams.of(model)
        role = await self._attributor.role_of(
            split.attribution, request.headers, wire=wire.name, request=asked
        )
        return self._upstreams.of(model, role)

    async def _open(
        self,
        request: web.Request,
        split: SplitPath,
        call: Call,
        upstream: Upstream,
        headers: Mapping[str, str],
    ) -> aiohttp.ClientResponse:
        """Send the call. What we made of it and the engine refuses, is sent as the agent meant it."""
        while True:
            prepared = call.prepared
            path = _redirected(split.path, prepared.path)
            answer = await upstream.open(request.method, path, headers, prepared.body)
            if prepared.fallback is None or answer.status not in _REFUSED:
                return answer
            await answer.read()  # so that its connection can be used again
            call.prepared = prepared.fallback
            call.altered = call.prepared.body is not call.body or call.prepared.path is not None

    async def _receive(self, request: web.Request) -> _Received:
        body = await request.read()
        if hdrs.CONTENT_ENCODING not in request.headers:
            return _Received(body, body, parse_request(body))
        plain = await asyncio.to_thread(_plain, request, body)
        return _Received(body, plain, parse_request(plain))

    async def _begin(
        self,
        request: web.Request,
        split: SplitPath,
        wire: Wire,
        received: _Received,
        endpoint: Endpoint,
        headers: Mapping[str, str],
        *,
        goes: bool,
    ) -> Call:
        """The call, whose it is and how it is sent. ``goes``: that it is sent at all."""
        policy, _ = endpoint.policy_of(received.request.get("model"))
        attribution = await self._attributor.attribute(
            split.attribution,
            request.headers,
            wire=wire.name,
            request=received.request,
            body=received.plain,
        )
        if attribution.doubt is not None:
            self._recorder.mark_incomplete(attribution.rollout_id, attribution.doubt)
        temperature = None
        if policy is not None:
            temperature = self._exploration.temperature(attribution.rollout_id, attribution.role)
        if goes:
            prepared = await self._prepare(wire, received, endpoint, headers, temperature)
        else:
            prepared = wire.prepare(received.body, received.request, tokens=False)
        policy, version = endpoint.policy_of(received.request.get("model"))  # it may have changed meanwhile
        return Call(
            wire=wire,
            body=received.plain,
            request=received.request,
            prepared=prepared,
            altered=prepared.body is not received.body or prepared.path is not None,
            secrets=secrets_of(request.headers, endpoint.upstream.key),
            attribution=attribution,
            redactor=self._redactor,
            policy=policy,
            policy_version=version,
        )

    async def _prepare(
        self,
        wire: Wire,
        received: _Received,
        endpoint: Endpoint,
        headers: Mapping[str, str],
        temperature: float | None,
    ) -> Prepared:
        """The call as it goes to the engine. ``temperature``: in place of the agent's."""
        body, asked = received.body, received.request
        # An encoded body goes on as it came, for not every engine decodes: so nothing can be changed.
        changeable = bool(asked) and received.plain is body
        if temperature is not None and changeable:
            body, asked = explored(body, asked, temperature)
        tokens = changeable and await endpoint.gives_tokens(headers)
        if tokens:
            wire = await endpoint.informed(wire, asked, headers)
        prepared = wire.prepare(body, asked, tokens=tokens)
        if asked is not received.request:
            prepared.sampling[EXPLORED] = True
        if tokens and shaped(prepared.sampling):
            endpoint.note_logprobs_mode(prepared.sampling, asked, headers)
        return prepared

    async def _relay(
        self, request: web.Request, answer: aiohttp.ClientResponse, call: Call
    ) -> web.StreamResponse:
        call.status = answer.status
        call.streamed = answer.content_type == "text/event-stream" and answer.status < 400
        headers = response_headers(answer.headers, rewritten=True)
        taker: Call | EncodedAnswer = call
        if hdrs.CONTENT_ENCODING in headers:
            taker = EncodedAnswer(call, headers)
        if not call.streamed and not call.altered:
            return await self._passed_on(request, answer, call, taker)
        if not call.streamed:
            body = taker.whole(b"".join([chunk async for chunk in _chunks(answer)]))
            await self._commit(call)
            status = call.status  # a translation may have changed it
            reason = answer.reason if status == answer.status else None
            return web.Response(status=status, reason=reason, headers=headers, body=body)
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        await response.prepare(request)
        committed = False
        async for chunk in _chunks(answer):
            piece = taker.feed(chunk)
            if call.ended and not committed:
                committed = True
                await self._commit(call)
            if piece:
                await response.write(piece)
        rest = taker.finish_stream()
        if not committed:
            await self._commit(call)
        if rest:
            await response.write(rest)
        await response.write_eof()
        return response

    async def _passed_on(
        self, request: web.Request, answer: aiohttp.ClientResponse, call: Call, taker: Call | EncodedAnswer
    ) -> web.StreamResponse:
        """A whole answer that stays as it is: it goes on as it comes, and its last piece after the commit.

        Some upstreams keep a long call alive by headers and white space before the answer.
        """
        headers = response_headers(answer.headers, rewritten=False)
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        await response.prepare(request)
        came: list[bytes] = []
        async for piece in _chunks(answer):
            if came:
                await response.write(came[-1])
            came.append(piece)
        taker.whole(b"".join(came))
        await self._commit(call)
        await response.write_eof(came[-1] if came else b"")
        return response

    # -- records -----------------------------------------------------------------------------

    async def _commit(
        self, call: Call, error_class: ErrorClass | None = None, error: str | None = None
    ) -> None:
        await self._recorder.commit(self._span_of(call, error_class, error))

    def _submit(self, call: Call, error_class: ErrorClass, error: str) -> None:
        self._recorder.submit(self._span_of(call, error_class, error))

    def _span_of(self, call: Call, error_class: ErrorClass | None, error: str | None) -> Span:
        span = call.span(
            policy_version_end=self._policies.version_of(call.policy), error_class=error_class, error=error
        )
        if findings := self._findings.of(span, call.request):
            if span.redacted is not None:  # their words are out of what was taken out
                findings = tuple(replace(each, detail=REDACTED) for each in findings)
            span = replace(span, findings=findings)
        self._count(call, span)
        return span

    def _let_go(self, answer: aiohttp.ClientResponse, call: Call) -> None:
        """Give the connection back. An answer that is not at its end is broken off, so that the
        engine stops; one that has said its last word is read out, whoever has left meanwhile.
        """
        if call.ended and not answer.content.at_eof():
            self._tasks.spawn("the rest of an answer", read_out(answer))
        else:
            answer.release()

    def _count(self, call: Call, span: Span) -> None:
        self._metrics.count_call(call.wire.name, _status_class(call.status), span.ended_at - span.started_at)
        if span.error_class is not None:
            self._metrics.upstream_errors.labels(span.error_class).inc()
        for found in span.findings:
            self._metrics.findings.labels(found.error_class.value).inc()
        if span.redacted is not None:
            for rule in span.redacted.split(","):
                self._metrics.redacted.labels(rule).inc()
        if call.fault is not None:
            self._metrics.capture_faults.labels("unreadable_answer").inc()
            fault = call.fault if self._redactor is None else self._redactor.text(call.fault)
            self._recorder.mark_incomplete(span.rollout_id, f"a call could not be read: {fault}")


async def _chunks(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body as it comes. Raises UpstreamCut, so that it is told apart from the agent's end."""
    try:
        async for chunk in answer.content.iter_any():
            yield chunk
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise UpstreamCut(repr(error)) from error
    if (reset := reset_at_the_end(answer)) is not None:
        raise UpstreamCut(repr(reset))


def _redirected(path_and_query: str, path: str | None) -> str:
    """Where a call goes: to the agent's own path, or to the one that its translation speaks."""
    return path_and_query if path is None else path


def _plain(request: web.Request, body: bytes) -> bytes:
    """A body without its encoding, or as it is where that cannot be undone. Blocks while it computes."""
    plain = decoded(body, request.headers[hdrs.CONTENT_ENCODING], request.client_max_size)
    return body if plain is None else plain


async def _body_of(request: web.Request) -> bytes | StreamReader | None:
    """The body as it comes; a small one whole, for only that can be sent again on a fresh connection."""
    if not request.body_exists:
        return None
    length = request.content_length
    return await request.read() if length is not None and length <= _SMALL_BODY else request.content


def _break_off(request: web.Request) -> None:
    """End the agent's connection so that the answer under way is seen to be cut, after what came of it."""
    transport = request.transport
    if transport is None:
        return
    if request.version < HttpVersion11 and (sock := transport.get_extra_info("socket")) is not None:
        # An answer to HTTP/1.0 ends with the connection: only a reset tells a cut from an end.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()


def _agent_left(error: BaseException) -> bool:
    return isinstance(error, (ConnectionError, asyncio.CancelledError))


def _status_class(status: int | None) -> str:
    return "none" if status is None else f"{status // 100}xx"
