"""Request lines and headers of every kind: what is passed on, and what is refused."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import pytest

from tests.conftest import MakeProxy, ProxyThread
from tests.engine import EngineThread
from tests.proxy.raw_http import CHAT, HELLO, JSON, raw_upstream, send


def exchange(url: str, request: bytes) -> bytes:
    """The answer to a request, both byte for byte; the request must ask for the connection to end."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def get(target: bytes, *headers: bytes, method: bytes = b"GET") -> bytes:
    lines = [method + b" " + target + b" HTTP/1.1", b"Host: x", b"Connection: close", *headers, b"", b""]
    return b"\r\n".join(lines)


@pytest.mark.parametrize("size", [9_000, 60_000])
@pytest.mark.parametrize("target", ["/v1/models", CHAT])
def test_long_headers_and_long_queries_pass(
    engine: EngineThread, proxy: ProxyThread, target: str, size: int
) -> None:
    body = HELLO if target == CHAT else None
    answer = send(proxy.url, f"{target}?q={'a' * size}", body, [*JSON, ("X-Long", "b" * size)])
    assert answer.status == 200
    arrived = engine.requests[-1]
    assert ("x-long", "b" * size) in arrived.headers
    assert len(arrived.target) > size


def test_a_whole_url_as_target_is_answered_by_the_upstream(engine: EngineThread, proxy: ProxyThread) -> None:
    """As clients send it that were told of us as their HTTP proxy."""
    answer = exchange(proxy.url, get(b"http://api.example.com/v1/models?limit=1"))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert engine.requests[-1].target == "/v1/models?limit=1"
    answer = exchange(proxy.url, get(b"http://api.example.com/healthz"))
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("method", "target"),
    [(b"CONNECT", b"api.example.com:443"), (b"CONNECT", b"@api.example.com:443"), (b"OPTIONS", b"*")],
)
def test_a_target_without_a_path_goes_nowhere(
    engine: EngineThread, proxy: ProxyThread, method: bytes, target: bytes
) -> None:
    answer = exchange(proxy.url, get(target, method=method))
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 "))
    assert engine.requests == []


@pytest.mark.parametrize(("method", "target"), [(b"GET", b"/v1/models"), (b"POST", CHAT.encode())])
def test_bytes_that_cannot_be_passed_on_are_refused_and_not_left_out(
    engine: EngineThread, proxy: ProxyThread, method: bytes, target: bytes
) -> None:
    headers = (b"X-Name: caf\xe9!", b"Content-Length: 0")
    answer = exchange(proxy.url, get(target, *headers, method=method))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"the header X-Name holds bytes that are no UTF-8" in answer
    assert engine.requests == []


def test_utf_8_in_headers_passes(engine: EngineThread, proxy: ProxyThread) -> None:
    exchange(proxy.url, get(b"/v1/models", "X-Name: caf\u00e9!".encode()))
    assert ("x-name", "caf\u00e9!") in [
        (name, value.encode("latin-1").decode()) for name, value in engine.requests[-1].headers
    ]


@pytest.mark.parametrize("target", [b"/v1/files/f/content", CHAT.encode()])
def test_an_answers_bytes_pass_whatever_they_are(make_proxy: MakeProxy, target: bytes) -> None:
    head = b'HTTP/1.1 200 Tr\xe8s bien\r\nContent-Disposition: x; filename="caf\xe9"\r\nX-Other: \xc3\xa9\r\n'

    def answer(connection: socket.socket, _head: bytes, _body: bytes) -> bool:
        connection.sendall(head + b"Content-Length: 2\r\n\r\n{}")
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        got = exchange(proxy.url, get(target, b"Content-Length: 0", method=b"POST"))
    assert got.startswith(head)
    assert got.endswith(b"\r\n\r\n{}")
