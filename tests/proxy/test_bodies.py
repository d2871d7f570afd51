"""Bodies: compressed either way, large, chunked, and on their way to somebody who does not read."""

from __future__ import annotations

import gzip
import importlib
import json
import logging
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from lightning_proxy.proxy import encoding
from lightning_proxy.proxy.encoding import Undecodable, decoded, decoder_for
from lightning_proxy.store import Fidelity
from tests.conftest import MakeProxy, MakeProxyProcess, ProxyThread
from tests.engine import EngineThread, Model, shapes
from tests.proxy.raw_http import (
    CHAT,
    CUT,
    HELLO,
    JSON,
    STREAM_HEAD,
    Call,
    chosen_sampling,
    http_answer,
    http_chunks,
    raw_upstream,
    recorded,
    send,
)

STREAM: dict[str, Any] = {**HELLO, "stream": True}
HEAD = shapes.Head("chatcmpl-1", 1, "policy")
WITH_TOKENS = {"return_token_ids": True, "logprobs": True}  # as capture asks


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)  # the same bytes whenever it runs


def bare_deflate(data: bytes) -> bytes:
    made = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return made.compress(data) + made.flush()


def brotli(data: bytes) -> bytes:
    return bytes(pytest.importorskip("brotli").compress(data))


def zstd(data: bytes) -> bytes:
    return bytes(pytest.importorskip("backports.zstd").compress(data))


# name: (Content-Encoding, how)
CODINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzipped),
    "x-gzip": ("X-GZip", gzipped),
    "gzip in two members": ("gzip", lambda data: gzipped(data[:5]) + gzipped(data[5:])),
    "deflate": ("deflate", zlib.compress),
    "bare deflate": ("deflate", bare_deflate),
    "br": ("br", brotli),
    "zstd": ("zstd", zstd),
    "two": ("deflate, gzip", lambda data: gzipped(zlib.compress(data))),
}


@pytest.fixture(params=CODINGS)
def coding(request: pytest.FixtureRequest) -> tuple[str, Callable[[bytes], bytes]]:
    name, pack = CODINGS[request.param]
    pack(b"skips where its library is not installed")
    return name, pack


# -- decoding by itself --------------------------------------------------------------------------


def test_a_body_cut_anywhere_decodes_to_the_same(coding: tuple[str, Callable[[bytes], bytes]]) -> None:
    name, pack = coding
    plain = json.dumps(HELLO).encode() * 50
    packed = pack(plain)
    assert decoded(packed, name) == plain
    for size in (1, 7, 100):
        decoder = decoder_for(name)
        assert decoder is not None
        assert b"".join(decoder.feed(packed[i : i + size]) for i in range(0, len(packed), size)) == plain
        assert decoder.ended


def test_what_is_broken_cut_or_boundless_is_not_decoded(coding: tuple[str, Callable[[bytes], bytes]]) -> None:
    name, pack = coding
    packed = pack(b"0123456789" * 100)
    assert decoded(packed[: len(packed) // 2], name) is None
    assert decoded(b"this is no compressed data at all", name) is None
    assert decoded(packed, name, largest=999) is None
    bomb = decoder_for(name, largest=2**20)
    assert bomb is not None
    with pytest.raises(Undecodable):
        bomb.feed(pack(bytes(2**22)))


def test_an_encoding_without_a_library_is_left_alone_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def not_installed(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", not_installed)
    encoding._maker.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [decoded(b"x", name) for name in ("br", "zstd", "rot13", "br", "gzip, br")] == [None] * 5
    encoding._maker.cache_clear()
    assert [record.getMessage().split("'")[1] for record in caplog.records] == ["br", "zstd", "rot13"]


# -- compressed requests -------------------------------------------------------------------------


def test_a_compressed_request_goes_on_as_it_came_and_is_read_for_the_record(
    engine: EngineThread, proxy: ProxyThread, coding: tuple[str, Callable[[bytes], bytes]]
) -> None:
    name, pack = coding
    plain = json.dumps({**HELLO, "temperature": 0.5}).encode()
    body, headers = pack(plain), [*JSON, ("Content-Encoding", name)]
    straight = send(engine.url, CHAT, body, headers)
    assert send(proxy.url, f"/rollout/r1{CHAT}", body, headers).end_to_end == straight.end_to_end
    assert [request.body for request in engine.calls] == [body, body]
    assert engine.calls[1].header("content-encoding") == name
    span = recorded(proxy)[0]
    assert (span.request, span.model, span.rollout_id) == (plain, "policy", "r1")
    assert chosen_sampling(span) == {"temperature": 0.5}
    assert span.error_class == "upstream_refused", "the fake engine decodes as little as vLLM does"


def test_an_engine_that_decodes_answers_a_compressed_request_for_the_record_as_well(
    make_proxy: MakeProxy,
) -> None:
    answered = json.dumps(shapes.chat(HEAD, HELLO, Model().generate(HELLO))).encode()

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        assert json.loads(gzip.decompress(body)) == HELLO
        connection.sendall(http_answer(answered, "Content-Type: application/json"))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        body = gzip.compress(json.dumps(HELLO).encode())
        assert send(proxy.url, CHAT, body, [*JSON, ("Content-Encoding", "gzip")]).body == answered
        span = recorded(proxy)[0]
        assert (span.fidelity, span.response_id) == (Fidelity.TEXT, "chatcmpl-1")


def test_a_compressed_request_that_cannot_be_read_is_recorded_as_it_came(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    body, headers = b"\x1f\x8b broken", [*JSON, ("Content-Encoding", "gzip")]
    assert send(proxy.url, CHAT, body, headers).status == 400
    assert engine.calls[0].body == body
    assert recorded(proxy)[0].request == body


# -- compressed answers --------------------------------------------------------------------------


def whole_answer(request: dict[str, Any]) -> bytes:
    return json.dumps(shapes.chat(HEAD, request, Model().generate(request))).encode()


def streamed_answer(request: dict[str, Any]) -> bytes:
    chunks = shapes.chat_chunks(HEAD, request, Model().generate(request), 1)
    return b"".join(shapes.sse(chunk) for chunk in chunks) + b"data: [DONE]\n\n"


def packing_upstream(
    name: str, pack: Callable[[bytes], bytes], cut: int | None = None
) -> Callable[[socket.socket, bytes, bytes], bool]:
    """Compresses though nobody asked for it; ``cut``: bytes of the compressed body, cleanly ended."""

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        request = json.loads(body)
        encoded = f"Content-Encoding: {name}"
        if request.get("stream"):
            packed = pack(streamed_answer(request))[:cut]
            pieces = [packed[i : i + 50] for i in range(0, len(packed), 50)]
            connection.sendall(STREAM_HEAD[:-2] + f"{encoded}\r\n\r\n".encode() + http_chunks(*pieces))
        else:
            packed = pack(whole_answer(request))[:cut]
            connection.sendall(http_answer(packed, "Content-Type: application/json", encoded))
        return True

    return answer


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["whole", "streamed"])
def test_a_compressed_answer_goes_through_as_it_is_and_is_read_for_the_record(
    make_proxy: MakeProxy, coding: tuple[str, Callable[[bytes], bytes]], body: dict[str, Any]
) -> None:
    name, pack = coding
    with raw_upstream(packing_upstream(name, pack)) as upstream:
        proxy = make_proxy(upstream.base_url, proxy={"capture": "text"})
        for target in ("/v1/embeddings", CHAT):
            straight = send(upstream.url, target, body)
            assert send(proxy.url, target, body).end_to_end == straight.end_to_end
        span = recorded(proxy)[0]
        assert (span.error_class, span.fidelity) == (None, Fidelity.TEXT)
        assert span.response is not None
        content = json.loads(span.response)["choices"][0]["message"]["content"]
        assert content == Model().generate(HELLO).choices[0].content


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["whole", "streamed"])
def test_what_capture_added_comes_out_of_a_compressed_answer_too(
    make_proxy: MakeProxy, coding: tuple[str, Callable[[bytes], bytes]], body: dict[str, Any]
) -> None:
    with raw_upstream(packing_upstream(*coding)) as upstream:
        got = send(make_proxy(upstream.base_url).url, CHAT, body)
        assert got.header("content-encoding") is None
        if body is STREAM:
            assert got.body == streamed_answer(STREAM)
        else:
            assert got.json == json.loads(whole_answer(HELLO))


def test_a_compressed_answer_without_anything_to_take_out_stays_compressed(make_proxy: MakeProxy) -> None:
    body = {**HELLO, **WITH_TOKENS}
    with raw_upstream(packing_upstream("gzip", gzipped)) as upstream:
        proxy = make_proxy(upstream.base_url)
        got = send(proxy.url, CHAT, body)
        assert (got.header("content-encoding"), json.loads(gzip.decompress(got.body))["id"]) == (
            "gzip",
            "chatcmpl-1",
        )
        assert recorded(proxy)[0].fidelity is Fidelity.EXACT


@pytest.mark.parametrize("capture", ["text", "auto"])
@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["whole", "streamed"])
def test_a_compressed_answer_that_is_not_complete_is_never_taken_for_whole(
    make_proxy: MakeProxy, capture: str, body: dict[str, Any]
) -> None:
    with raw_upstream(packing_upstream("gzip", gzipped, cut=300)) as upstream:
        proxy = make_proxy(upstream.base_url, proxy={"capture": capture})
        if capture == "text":
            assert len(send(proxy.url, CHAT, body).body) == 300, "as it came: the agent's library sees it"
        else:
            with pytest.raises(CUT):
                send(proxy.url, CHAT, body)
        span = recorded(proxy)[0]
        assert (span.fidelity, span.response) == (Fidelity.INCOMPLETE, None)
        assert span.error_class in ("capture_fault", "cut_stream")


def test_an_answer_in_an_unknown_encoding_goes_through_unread(make_proxy: MakeProxy) -> None:
    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(http_answer(b"{}", "Content-Type: application/json", "Content-Encoding: rot13"))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        got = send(proxy.url, CHAT, HELLO)
        assert (got.body, got.header("content-encoding")) == (b"{}", "rot13")
        span = recorded(proxy)[0]
        assert (span.error_class, span.fidelity) == ("capture_fault", Fidelity.INCOMPLETE)


def test_captured_calls_ask_for_plain_answers_and_no_others(engine: EngineThread, proxy: ProxyThread) -> None:
    accept = [*JSON, ("Accept-Encoding", "br, gzip")]
    send(proxy.url, CHAT, HELLO, accept)
    send(proxy.url, "/v1/embeddings", HELLO, accept)
    sent = [request.header("accept-encoding") for request in engine.requests if request.method == "POST"]
    assert sent == ["identity", "br, gzip"]


# -- large bodies --------------------------------------------------------------------------------

LARGE = 64 * 2**20


def test_sixty_four_mebibytes_pass_and_one_byte_more_is_told_what_to_do(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    frame = b'{"model": "policy", "messages": [], "x": "%b"}'
    body = frame % (b"x" * (LARGE - len(frame) + 2))
    assert len(body) == LARGE
    assert send(proxy.url, CHAT, body, timeout=60).status == 200
    assert engine.calls[0].body[: LARGE - 1] == body[:-1]
    pieces = (body[i : i + 2**20] for i in range(0, LARGE, 2**20))
    assert send(proxy.url, CHAT, chunks=pieces, timeout=60).status == 200
    assert engine.calls[1].body[: LARGE - 1] == body[:-1]
    refused = send(proxy.url, CHAT, b" " + body, timeout=60)
    assert (refused.status, refused.json["error"]["code"]) == (413, "too_large")
    assert "proxy.max_body_mb" in refused.json["error"]["message"]
    assert send(proxy.url, "/v1/files", b" " + body, timeout=60).status == 200, "not read, so not limited"


# -- slow readers, on a real process -------------------------------------------------------------

MOST = 200 * 2**20  # bytes: an answer, or an upload, of this size
HELD = 32 * 2**20  # bytes: what sockets and the proxy may hold back of it
GROWTH = 48 * 2**20  # bytes of memory


def memory_of(proxy: Any) -> int:
    return int(psutil.Process(proxy.process.pid).memory_info().rss)


def push(connection: socket.socket, pieces: Iterator[bytes], blocked: threading.Event) -> int:
    """Send until nobody takes anything for a second; how much went off, one piece more or less."""
    sent = 0
    connection.settimeout(1.0)
    try:
        for piece in pieces:
            sent += len(piece)
            connection.sendall(piece)
    except TimeoutError:
        pass
    blocked.set()
    return sent


def deltas() -> Iterator[bytes]:
    content = "x" * 4000
    event = {"id": "x", "choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}]}
    chunk = http_chunks(b"data: " + json.dumps(event).encode() + b"\n\n", end=False)
    for _ in range(MOST // len(chunk)):
        yield chunk


@pytest.mark.parametrize("target", ["/v1/files", CHAT])
def test_a_reader_that_sleeps_makes_the_engine_wait_and_takes_no_memory(
    make_proxy_process: MakeProxyProcess, target: str
) -> None:
    blocked, sent = threading.Event(), [0]

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(STREAM_HEAD)
        sent[0] = push(connection, deltas(), blocked)
        return False

    with raw_upstream(answer) as upstream:
        proxy = make_proxy_process(upstream.base_url)
        send(proxy.url, "/healthz")
        before = memory_of(proxy)
        with Call(proxy.url, target, STREAM) as call:
            call.read_until(b"\n\n")
            assert blocked.wait(60)
            assert sent[0] < HELD
            assert memory_of(proxy) - before < GROWTH


def test_an_engine_that_does_not_read_makes_the_uploader_wait_and_takes_no_memory(
    make_proxy_process: MakeProxyProcess,
) -> None:
    over = threading.Event()

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        over.wait(60)
        return False

    with raw_upstream(answer) as upstream:
        proxy = make_proxy_process(upstream.base_url)
        before = memory_of(proxy)
        with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2]))) as agent:
            agent.sendall(b"PUT /v1/files HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            pieces = (http_chunks(b"x" * 2**16, end=False) for _ in range(MOST // 2**16))
            assert push(agent, pieces, threading.Event()) < HELD
            assert memory_of(proxy) - before < GROWTH
        over.set()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_long_untouched_body_passes_with_flat_memory(
    make_proxy_process: MakeProxyProcess, direction: str
) -> None:
    piece = bytes(2**16)

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        if direction == "up":  # the rest of the chunked upload
            tail = body
            while not tail.endswith(b"0\r\n\r\n"):
                got[0] += len(data := connection.recv(2**20))
                tail = (tail + data)[-5:]
            connection.sendall(http_answer(b"{}"))
            return True
        connection.sendall(STREAM_HEAD)
        for _ in range(MOST // len(piece)):
            connection.sendall(http_chunks(piece, end=False))
        connection.sendall(http_chunks())
        return True

    got = [0]
    with raw_upstream(answer) as upstream:
        proxy = make_proxy_process(upstream.base_url)
        before, most = memory_of(proxy), 0
        if direction == "up":
            send(proxy.url, "/v1/files", chunks=(piece for _ in range(MOST // len(piece))), timeout=60)
        else:
            with Call(proxy.url, "/v1/files", timeout=60) as call:
                while data := call.response.read1(2**20):
                    got[0] += len(data)
                    if got[0] % 64 == 0:
                        most = max(most, memory_of(proxy))
        assert got[0] >= MOST - 2**20
        assert max(most, memory_of(proxy)) - before < GROWTH
