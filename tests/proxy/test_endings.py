"""How answers end: a cut is a cut, an end is an end, and who left when decides what goes on."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import threading
from itertools import product
from typing import Any

import pytest

from lightning_proxy.store import Fidelity
from tests.conftest import MakeProxy, ProxyThread, wait_until
from tests.engine import EngineThread, Script
from tests.proxy.raw_http import (
    CHAT,
    CUT,
    HELLO,
    STREAM_HEAD,
    Call,
    http_answer,
    http_chunks,
    raw_upstream,
    recorded,
    send,
)

STREAM: dict[str, Any] = {**HELLO, "stream": True}
DELTA = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
LAST = b'data: {"id":"x","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
TARGETS = [CHAT, "/v1/other"]

Framing = tuple[bytes, bytes]  # head, and the body's beginning
WHOLE = b'{"id":"x","choices":[]}'
FRAMINGS: dict[str, Framing] = {
    "chunked stream": (STREAM_HEAD, http_chunks(DELTA, end=False)),
    "chunked stream in mid-chunk": (STREAM_HEAD, http_chunks(DELTA, DELTA, end=False)[:-30]),
    "chunked": (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
        http_chunks(WHOLE, end=False),
    ),
    "of a known length": (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n",
        WHOLE,
    ),
    "stream of a known length": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 999\r\n\r\n",
        DELTA,
    ),
    "compressed": (
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n",
        http_chunks(gzip.compress(WHOLE), end=False),
    ),
    "compressed stream": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n",
        http_chunks(gzip.compress(DELTA), end=False),
    ),
    "an error": (b"HTTP/1.1 500 Oh\r\nContent-Length: 99\r\n\r\n", b'{"error"'),
}
UNTIL_CLOSED: dict[str, Framing] = {
    "until closed": (b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n", WHOLE),
    "stream until closed": (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", DELTA),
}


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_to_end(connection: socket.socket) -> tuple[bytes, bool]:
    """Everything that comes, and whether it ended in a reset."""
    got = b""
    try:
        while piece := connection.recv(65536):
            got += piece
    except ConnectionResetError:
        return got, True
    return got, False


def cutting(framing: Framing, by: str) -> Any:
    """An upstream that sends what there is, and breaks off."""

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(framing[0] + framing[1])
        if by == "reset":
            reset(connection)
        return False

    return raw_upstream(answer)


@pytest.mark.parametrize("target", TARGETS)
# An answer that ends with its connection ends well where that is closed: nobody can tell.
@pytest.mark.parametrize(("framing", "by"), [*product(FRAMINGS, ["close", "reset"]),
                                             *product(UNTIL_CLOSED, ["reset"])])  # fmt: skip
def test_however_an_answer_is_cut_it_is_cut_for_the_agent(
    make_proxy: MakeProxy, framing: str, by: str, target: str
) -> None:
    with cutting({**FRAMINGS, **UNTIL_CLOSED}[framing], by) as upstream:
        proxy = make_proxy(upstream.base_url)
        with pytest.raises(CUT):
            send(proxy.url, target, HELLO)
        if target == CHAT:
            span = recorded(proxy)[0]
            assert (span.fidelity, span.response) == (Fidelity.INCOMPLETE, None)
            assert span.error_class == "cut_stream"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("by", ["close", "reset"])
@pytest.mark.parametrize("framing", ["chunked stream", "of a known length", "stream of a known length"])
def test_an_agent_of_http_1_0_sees_a_cut_as_well(
    make_proxy: MakeProxy, framing: str, by: str, target: str
) -> None:
    with cutting(FRAMINGS[framing], by) as upstream:
        proxy = make_proxy(upstream.base_url)
        with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=60) as agent:
            raw = json.dumps(HELLO).encode()
            agent.sendall(f"POST {target} HTTP/1.0\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
            got, was_reset = read_to_end(agent)
            assert was_reset or b"content-length" in got.lower(), "a clean end, and no length to tell"


def test_an_answer_until_the_end_of_the_connection_ends_well(make_proxy: MakeProxy) -> None:
    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(UNTIL_CLOSED["stream until closed"][0] + DELTA + LAST)
        return False

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        for target in TARGETS:
            assert send(proxy.url, target, STREAM).body == DELTA + LAST
        assert recorded(proxy)[0].error_class is None


# -- the agent leaves ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["whole", "streamed"])
def test_an_agent_that_leaves_before_the_end_stops_the_generation(
    engine: EngineThread, proxy: ProxyThread, how: str, body: dict[str, Any]
) -> None:
    engine.script(Script(chunk_delay_s=0.05, tokens=2000))
    raw = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=60) as agent:
        agent.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
        got = b""
        while body is STREAM and got.count(b'"content":"') < 3:  # the first one only names the role
            got += agent.recv(65536)
        engine.wait_for_calls(1)
        if how == "half-close":  # taken for gone by uvicorn, vLLM's server, as well
            agent.shutdown(socket.SHUT_WR)
        elif how == "reset":
            reset(agent)
        else:
            agent.close()
        wait_until(lambda: engine.calls[0].aborted)
    span = recorded(proxy)[0]
    assert (span.error_class, span.fidelity) == ("client_disconnect", Fidelity.INCOMPLETE)
    ids = [list(generation.response_token_ids) for generation in span.generations]
    if body is STREAM:
        expected = engine.model.generate(HELLO, tokens=2000).choices[0].token_ids
        assert ids == [expected[: len(ids[0])]]
        assert ids[0], "what came so far is on record"


@pytest.mark.parametrize("how", ["close", "reset"])
def test_an_answer_that_has_said_its_last_word_is_read_out_though_the_agent_has_left(
    make_proxy: MakeProxy, how: str
) -> None:
    left = threading.Event()
    calls: list[socket.socket] = []

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        calls.append(connection)
        connection.sendall(STREAM_HEAD + http_chunks(DELTA, LAST, end=False))
        left.wait(60)
        connection.sendall(http_chunks(b": one more comment\n\n"))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        with Call(proxy.url, CHAT, STREAM) as call:
            call.read_until(b"[DONE]\n\n")
            call.hang_up(reset=how == "reset")
        wait_until(lambda: not proxy._runner.server or not proxy._runner.server.connections)
        left.set()
        span = recorded(proxy)[0]
        assert (span.error_class, span.status) == (None, 200)
        # The connection is given back whole, a moment after the answer's end.
        wait_until(lambda: send(proxy.url, CHAT, STREAM).status == 200 and calls[-1] is calls[0])


def test_an_answer_that_does_not_end_after_its_last_word_is_left_once_the_agent_has_left(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_proxy.proxy.upstream._READ_OUT_S", 0.5)
    left = threading.Event()

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(STREAM_HEAD + http_chunks(DELTA, LAST, end=False))
        connection.settimeout(20)
        if connection.recv(1) == b"":
            left.set()
        return False

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        with Call(proxy.url, CHAT, STREAM) as call:
            call.read_until(b"[DONE]\n\n")
            assert not left.wait(1), "the agent is there: the stream is as the upstream has it"
            call.hang_up()
        assert left.wait(10)
        assert recorded(proxy)[0].error_class is None


# -- at once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_every_piece_goes_out_at_once(make_proxy: MakeProxy, target: str) -> None:
    seen = threading.Semaphore(0)

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(STREAM_HEAD)
        for _ in range(50):
            assert seen.acquire(timeout=60), "a piece was held back"
            connection.sendall(http_chunks(DELTA, end=False))
        assert seen.acquire(timeout=60)
        connection.sendall(http_chunks(LAST))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        with Call(proxy.url, target, STREAM) as call:  # the headers have come: nothing else has
            for _ in range(50):
                seen.release()
                assert call.read_until(b"\n\n") == DELTA
            seen.release()
            assert call.rest() == LAST


# -- rarely seen HTTP ----------------------------------------------------------------------------

RARE = {
    "trailers": STREAM_HEAD + http_chunks(DELTA, LAST)[:-2] + b"X-Checksum: 1\r\n\r\n",
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" + http_answer(WHOLE, "Content-Type: a/b"),
    "chunks with extensions": STREAM_HEAD + b"3;x=y\r\nabc\r\n0\r\n\r\n",
    "no content type": http_answer(WHOLE, "Server: x"),
    "no server": http_answer(WHOLE, "Content-Type: a/b"),
    "an empty body": http_answer(b"", "Content-Type: a/b"),
    "headers twice": http_answer(WHOLE, "Content-Type: a/b", "X-A: 1", "Vary: a", "X-A: 2", "Vary: b"),
    "ids and limits": http_answer(
        b"slow down", "Retry-After: 7", "x-request-id: q", "request-id: r", "x-ratelimit-reset-tokens: 1s",
        status="429 Too Many Requests",
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", RARE)
def test_rarely_seen_answers_arrive_with_their_headers_in_order_and_no_others(
    make_proxy: MakeProxy, name: str, target: str
) -> None:
    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(RARE[name])
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        straight, through = send(upstream.url, target, HELLO), send(proxy.url, target, HELLO)
        transport = {"date", "connection", "transfer-encoding", "content-length"}
        assert through.headers_without(transport) == straight.headers_without(transport)
        assert (through.status, through.reason, through.body) == (
            straight.status,
            straight.reason,
            straight.body,
        )


def test_an_early_hint_is_not_taken_for_the_answer(make_proxy: MakeProxy) -> None:
    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" + http_answer(WHOLE, "X-A: 1"))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        for target in TARGETS:
            got = send(proxy.url, target, HELLO)
            assert (got.status, got.body, got.header("x-a"), got.header("link")) == (200, WHOLE, "1", None)


@pytest.mark.parametrize("target", TARGETS)
def test_an_upload_that_waits_for_100_continue_passes_an_engine_that_does_not_know_it(
    make_proxy: MakeProxy, target: str
) -> None:
    heads: list[bytes] = []

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        heads.append(head)
        connection.sendall(http_answer(body, "Content-Type: a/b"))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=60) as agent:
            agent.sendall(f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
                          "Expect: 100-continue\r\n\r\n".encode())  # fmt: skip
            assert agent.recv(1000).startswith(b"HTTP/1.1 100")
            agent.sendall(b"[]")
            assert agent.recv(1000).startswith(b"HTTP/1.1 200")
    assert b"expect" not in heads[-1].lower()


@pytest.mark.parametrize("target", TARGETS)
def test_trailers_of_an_upload_do_no_harm(engine: EngineThread, proxy: ProxyThread, target: str) -> None:
    raw = json.dumps(HELLO).encode()
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=60) as agent:
        agent.sendall(f"POST {target} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        agent.sendall(http_chunks(raw)[:-2] + b"X-Checksum: 1\r\n\r\n")
        assert agent.recv(1000).startswith(b"HTTP/1.1 200")
    (request,) = [request for request in engine.requests if request.method == "POST"]
    assert request.body[: len(raw) - 1] == raw[:-1]


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified", "200 OK"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
def test_answers_without_a_body_keep_the_length_that_they_would_have(
    make_proxy: MakeProxy, status: str, method: str
) -> None:
    bodiless = method == "HEAD" or not status.startswith("200")

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        length = "Content-Length: 5\r\n" if not status.startswith("204") else ""
        said = b"" if bodiless else b"hello"
        connection.sendall(f"HTTP/1.1 {status}\r\nServer: x\r\nX-A: 1\r\n{length}\r\n".encode() + said)
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        for _ in range(2):  # the second one finds the connection in good order
            straight = send(upstream.url, "/v1/x", None, [], method=method)
            through = send(proxy.url, "/v1/x", None, [], method=method)
            kept = {"date", "connection"}
            if status.startswith("304"):
                kept.add("content-length")  # aiohttp leaves it out, as RFC 9110 section 8.6 allows
            assert through.headers_without(kept) == straight.headers_without(kept)
            assert (through.status, through.body) == (straight.status, straight.body)
