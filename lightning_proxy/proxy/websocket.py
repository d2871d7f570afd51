"""WebSockets: the handshake is the upstream's own, and so is every byte after it.

The relay does not read frames: pings, close codes, subprotocols and extensions (compression) are
settled between the agent and the upstream. What goes through one is not recorded: spans are of
calls over HTTP, which agents fall back to where an upstream has no WebSocket.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import aiohttp
from aiohttp import StreamReader, hdrs, web
from aiohttp.http import StreamWriter

from .metrics import Metrics
from .problem import problem, unreachable
from .tasks import Tasks
from .upstream import Upstream, response_headers

log = logging.getLogger(__name__)

_BUFFERED = 2**16  # bytes on their way, per direction, before the sender has to wait
_LONGEST_REFUSAL = 2**20  # bytes
_OWN_REFUSALS = frozenset((401, 403, 426, 429))


def is_upgrade(request: web.Request) -> bool:
    """Whether a request asks for a WebSocket (RFC 6455 section 4.1)."""
    headers = request.headers
    if headers.get(hdrs.UPGRADE, "").lower() != "websocket" or request.method != "GET":
        return False
    return "upgrade" in ",".join(headers.getall(hdrs.CONNECTION, ())).lower()


class WebSockets:
    """Relays upgrades where the upstream takes them."""

    def __init__(self, upstream: Upstream, metrics: Metrics, tasks: Tasks) -> None:
        self._upstream = upstream
        self._metrics = metrics
        self._tasks = tasks
        self._said = False

    async def handle(self, request: web.Request, path: str) -> web.StreamResponse:
        """Ask the upstream; relay until either side is done, or say no as it does.

        Agents take 426 as "there is no WebSocket here" and go on over HTTP; on most other statuses
        they try again. So 426 stands for every refusal but those that HTTP would meet as well:
        a key that is not good (401, 403), too many calls (429), an engine in trouble (5xx).
        """
        headers = self._upstream.request_headers(request.headers, captured=False)
        headers[hdrs.CONNECTION], headers[hdrs.UPGRADE] = "Upgrade", "websocket"
        try:
            answer = await self._upstream.open("GET", path, headers, None)
        except (aiohttp.ClientError, TimeoutError) as error:
            self._count("5xx")
            return unreachable(self._upstream.base, error)
        async with answer:
            if answer.status == 101 and answer.connection is not None:
                self._count("1xx")
                self._say_once()
                return await self._relay(request, answer, answer.connection)
            response = await _refusal(answer)
            self._count(f"{response.status // 100}xx")
            return response

    async def _relay(
        self, request: web.Request, answer: aiohttp.ClientResponse, upstream: Any
    ) -> web.StreamResponse:
        agent = cast(Any, request.protocol)
        loop = asyncio.get_running_loop()
        headers = response_headers(answer.headers, rewritten=False)
        headers[hdrs.CONNECTION], headers[hdrs.UPGRADE] = "Upgrade", "websocket"
        response = web.StreamResponse(status=101, reason=answer.reason, headers=headers)
        await response.prepare(request)
        from_agent, from_upstream = _Tap(agent, loop), _Tap(upstream.protocol, loop)
        agent.set_parser(from_agent)
        upstream.protocol.set_parser(from_upstream, from_upstream.bytes)
        to_upstream = StreamWriter(upstream.protocol, loop)
        transport = upstream.transport  # gone from the connection once it is lost
        upwards = self._tasks.spawn("a WebSocket", _pump(from_agent.bytes, to_upstream.write))
        upwards.add_done_callback(lambda _: transport.close())  # the agent is done: so are we
        try:
            await _pump(from_upstream.bytes, response.write)
        finally:
            upwards.cancel()
            # The agent's last words (its close frame) may have come with its end.
            if (rest := from_agent.bytes.read_nowait()) and not transport.is_closing():
                transport.write(rest)
        response.force_close()
        return response

    def _count(self, status: str) -> None:
        self._metrics.calls.labels("websocket", status).inc()

    def _say_once(self) -> None:
        if not self._said:
            self._said = True
            log.warning("a WebSocket is relayed: what goes through it is not recorded as spans")


class _Tap:
    """Stands where aiohttp expects a parser of frames, and passes the bytes on as they are."""

    def __init__(self, protocol: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.bytes = StreamReader(protocol, _BUFFERED, loop=loop)

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        if data:
            self.bytes.feed_data(data)
        return False, b""

    def feed_eof(self) -> None:
        self.bytes.feed_eof()


async def _pump(source: StreamReader, write: Any) -> None:
    try:
        async for piece in source.iter_any():
            await write(piece)
    except ConnectionError:
        pass  # the receiver has left; its own end of the relay sees that too


async def _refusal(answer: aiohttp.ClientResponse) -> web.Response:
    status = answer.status
    if status not in _OWN_REFUSALS and status < 500:
        return _no_websocket()
    body = await answer.content.read(_LONGEST_REFUSAL)
    if status == 403 and not body:
        # What uvicorn, vLLM's server, says of a WebSocket on a path that has none.
        return _no_websocket()
    headers = response_headers(answer.headers, rewritten=True)
    return web.Response(status=status, reason=answer.reason, headers=headers, body=body)


def _no_websocket() -> web.Response:
    return problem(
        426, "upgrade_required", "the model endpoint has no WebSocket here: use HTTP with server-sent events"
    )
