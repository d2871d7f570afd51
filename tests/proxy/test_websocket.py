"""A WebSocket through the proxy is the upstream's WebSocket, byte for byte, or a refusal that helps."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web

from tests.conftest import MakeProxy, ProxyThread, wait_until
from tests.engine import EngineThread
from tests.proxy.raw_http import Headers, http_answer, metric, raw_upstream, send

RESPONSES = "/v1/responses"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
UPGRADE: Headers = (
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", KEY),
)
ACCEPTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nX-Model: m\r\n\r\n"
)


# -- with a real client and a real server --------------------------------------------------------


@asynccontextmanager
async def websocket_server(handler: Any) -> AsyncIterator[str]:
    """An upstream that takes WebSockets on any path; gives its base URL."""
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("compress", [0, 15])
async def test_messages_go_both_ways(make_proxy: MakeProxy, compress: int) -> None:
    seen: list[web.Request] = []

    async def upper(request: web.Request) -> web.WebSocketResponse:
        seen.append(request)
        ws = web.WebSocketResponse(protocols=["b", "a"])
        await ws.prepare(request)
        async for message in ws:
            if message.type is WSMsgType.TEXT:
                await ws.send_str(message.data.upper())
            else:
                await ws.send_bytes(message.data[::-1])
        return ws

    async with websocket_server(upper) as base, aiohttp.ClientSession() as session:
        proxy = make_proxy(base)
        async with session.ws_connect(
            f"{proxy.url}/rollout/r1/role/w{RESPONSES}?x=%20",
            protocols=["a", "c"],
            headers={"Authorization": "Bearer sk-agent", "X-Far": "1", "X-Rollout-Id": "r"},
            compress=compress,
        ) as ws:
            assert (ws.protocol, ws.compress) == ("a", compress)
            for text in ("hello", "", "é" * 100_000):
                await ws.send_str(text)
                assert await ws.receive_str() == text.upper()
            await ws.send_bytes(bytes(range(256)))
            assert await ws.receive_bytes() == bytes(range(256))[::-1]
    (request,) = seen
    assert request.raw_path == f"{RESPONSES}?x=%20"
    assert request.headers["Authorization"] == "Bearer sk-agent"
    assert ("X-Far" in request.headers, "X-Rollout-Id" in request.headers) == (True, False)
    assert metric(proxy.url, 'lightning_calls_total{status="1xx",wire="websocket"}') == 1.0
    with proxy.store() as store:
        assert store.list_spans() == []


async def test_pings_and_close_codes_are_those_of_the_other_side(make_proxy: MakeProxy) -> None:
    closed: list[Any] = []

    async def close(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(autoping=False)
        await ws.prepare(request)
        while (message := await ws.receive()).type is not WSMsgType.CLOSE:
            if message.data == "close":
                await ws.close(code=4001, message=b"enough")
                break
            await ws.pong(message.data + b" seen upstream")
        closed.append((message.type, message.data, message.extra))
        return ws

    async with websocket_server(close) as base, aiohttp.ClientSession() as session:
        proxy = make_proxy(base)
        async with session.ws_connect(proxy.url + RESPONSES, autoping=False) as ws:
            await ws.ping(b"p")
            message = await ws.receive()
            assert (message.type, message.data) == (WSMsgType.PONG, b"p seen upstream")
            await ws.send_str("close")
            message = await ws.receive()
            assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 4001, "enough")
        async with session.ws_connect(proxy.url + RESPONSES, autoping=False) as ws:
            await ws.close(code=4002, message=b"that is all")
    await asyncio.to_thread(wait_until, lambda: len(closed) == 2)
    assert closed[1] == (WSMsgType.CLOSE, 4002, "that is all")


async def test_a_key_of_ours_does_not_travel_and_the_upstreams_own_does(make_proxy: MakeProxy) -> None:
    seen: list[str | None] = []

    async def note(request: web.Request) -> web.WebSocketResponse:
        seen.append(request.headers.get("Authorization"))
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        await ws.close()
        return ws

    async with websocket_server(note) as base, aiohttp.ClientSession() as session:
        proxy = make_proxy(base, proxy={"upstream_api_key": "sk-upstream", "token": "s3cret"})
        key = {"Authorization": "Bearer s3cret"}
        async with session.ws_connect(proxy.url + RESPONSES, headers=key) as ws:
            await ws.receive()
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect(proxy.url + RESPONSES)
        assert refused.value.status == 401
    assert seen == ["Bearer sk-upstream"]


# -- byte for byte -------------------------------------------------------------------------------


@contextmanager
def upgraded(proxy: ProxyThread, early: bytes = b"") -> Iterator[socket.socket]:
    """An agent's connection that has asked for an upgrade, and sent ``early`` without waiting."""
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=60) as agent:
        lines = [f"GET {RESPONSES} HTTP/1.1", "Host: x", *(f"{k}: {v}" for k, v in UPGRADE), "", ""]
        agent.sendall("\r\n".join(lines).encode() + early)
        yield agent


def read_exactly(connection: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        piece = connection.recv(min(65536, count - len(got)))
        assert piece, f"the connection ended after {len(got)} of {count} bytes"
        got += piece
    return got


def read_head(connection: socket.socket) -> bytes:
    got = b""
    while not got.endswith(b"\r\n\r\n"):
        got += read_exactly(connection, 1)
    return got


def test_every_byte_passes_and_so_does_the_end(make_proxy: MakeProxy) -> None:
    early, greeting = b"\x81\x85not a frame", b"\xff\x00greeting in the same packet as the head"
    big = bytes(range(256)) * 8192  # 2 MiB
    got: dict[str, bytes] = {}
    over = threading.Event()

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        got["head"] = head
        connection.sendall(ACCEPTED + greeting)
        got["early"] = body + read_exactly(connection, len(early) - len(body))
        got["big"] = read_exactly(connection, len(big))
        connection.sendall(big[::-1])
        got["last"] = read_exactly(connection, 4)
        got["end"] = connection.recv(1)
        over.set()
        return False

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        with upgraded(proxy, early) as agent:
            head = read_head(agent)
            assert read_exactly(agent, len(greeting)) == greeting
            agent.sendall(big)
            assert read_exactly(agent, len(big)) == big[::-1]
            agent.sendall(b"last")
        assert over.wait(60)
    assert sorted(head.lower().split(b"\r\n")[1:]) == sorted(
        line
        for line in ACCEPTED.lower().split(b"\r\n")[1:] + re.findall(rb"(?m)^date: .*(?=\r)", head.lower())
    )
    assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert KEY.encode() in got["head"]
    assert (got["early"], got["big"], got["last"], got["end"]) == (early, big, b"last", b"")


def test_what_the_upstream_said_before_it_went_arrives(make_proxy: MakeProxy) -> None:
    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(ACCEPTED + b"x" * 1_000_000)
        return False

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        with upgraded(proxy) as agent:
            read_head(agent)
            assert read_exactly(agent, 1_000_000) == b"x" * 1_000_000
            assert agent.recv(1) == b""


@pytest.mark.parametrize("slow", ["agent", "upstream"])
def test_who_does_not_read_makes_the_other_side_wait(make_proxy: MakeProxy, slow: str) -> None:
    blocked, sent = threading.Event(), [0]

    def push(connection: socket.socket) -> None:
        connection.settimeout(1.0)  # nothing taken for a second: the way is full
        try:
            while sent[0] < 2**28:
                sent[0] += connection.send(b"x" * 65536)
        except TimeoutError:
            blocked.set()

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(ACCEPTED)
        if slow == "agent":
            push(connection)
        blocked.wait(60)
        return False

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        with upgraded(proxy) as agent:
            read_head(agent)
            if slow == "upstream":
                push(agent)
            assert blocked.wait(60)
            assert sent[0] < 2**25, "more went off than sockets' buffers hold"


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        ("200 OK", b"{}", 426),
        ("400 Bad Request", b"{}", 426),
        ("403 Forbidden", b"", 426),
        ("404 Not Found", b"{}", 426),
        ("405 Method Not Allowed", b"{}", 426),
        ("401 Unauthorized", b"who?", 401),
        ("403 Forbidden", b"no", 403),
        ("426 Upgrade Required", b"theirs", 426),
        ("429 Too Many Requests", b"later", 429),
        ("500 Internal Server Error", b"", 500),
        ("503 Service Unavailable", b"busy", 503),
    ],
)
def test_a_refusal_is_426_or_what_a_call_over_http_would_get_as_well(
    make_proxy: MakeProxy, status: str, body: bytes, expected: int
) -> None:
    def answer(connection: socket.socket, head: bytes, _: bytes) -> bool:
        connection.sendall(http_answer(body, "Retry-After: 7", "X-Request-Id: q", status=status))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        got = send(proxy.url, RESPONSES, None, UPGRADE)
        assert got.status == expected
        if got.status == int(status[:3]):
            assert (got.body, got.header("retry-after"), got.header("x-request-id")) == (body, "7", "q")
            assert got.header("content-type") is None
        else:
            assert json.loads(got.body)["error"]["code"] == "upgrade_required"
        assert (
            metric(proxy.url, f'lightning_calls_total{{status="{expected // 100}xx",wire="websocket"}}')
            == 1.0
        )


def test_an_upstream_that_is_down_is_a_502(make_proxy: MakeProxy) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        proxy = make_proxy(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
        assert send(proxy.url, RESPONSES, None, UPGRADE).status == 502


def test_the_connection_is_good_for_a_call_over_http_after_a_refusal(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=60) as agent:
        for expected in (b"426", b"200", b"426", b"200"):
            upgrade = [f"{k}: {v}" for k, v in UPGRADE] if expected == b"426" else []
            agent.sendall("\r\n".join([f"GET {RESPONSES} HTTP/1.1", "Host: x", *upgrade, "", ""]).encode())
            head = read_head(agent)
            assert head.split(b" ")[1] == expected
            length = re.search(rb"(?i)content-length: (\d+)", head)
            read_exactly(agent, int(length.group(1)) if length else 0)


def test_only_a_get_that_asks_for_it_is_an_upgrade(engine: EngineThread, proxy: ProxyThread) -> None:
    assert send(proxy.url, RESPONSES, None, [("Upgrade", "websocket")]).status == 200
    assert send(proxy.url, RESPONSES, None, [("Connection", "Upgrade"), ("Upgrade", "h2c")]).status == 200


async def test_an_upgrade_is_held_while_weights_change(make_proxy: MakeProxy) -> None:
    from lightning_proxy.proxy.app import PARTS

    arrived: list[str] = []

    async def note(request: web.Request) -> web.WebSocketResponse:
        arrived.append(request.path)
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        await ws.close()
        return ws

    async with websocket_server(note) as base, aiohttp.ClientSession() as session:
        proxy = make_proxy(base)
        hold = proxy._runner.app[PARTS].hold
        proxy._loop.call_soon_threadsafe(hold.close, "a test")
        await asyncio.to_thread(wait_until, lambda: not hold.is_open)
        connecting = asyncio.ensure_future(session.ws_connect(proxy.url + RESPONSES))
        await asyncio.to_thread(wait_until, lambda: hold.waiting == 1)
        assert arrived == []
        proxy._loop.call_soon_threadsafe(hold.release, "a test")
        await (await connecting).close()
        assert arrived == [RESPONSES]
