"""A client that shows an answer as it came, and an upstream that answers with any bytes at all."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from lightning_proxy.store import Span
from tests.conftest import ProxyThread, wait_until

Headers = Sequence[tuple[str, str]]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
JSON: Headers = (("Content-Type", "application/json"),)
HELLO: dict[str, Any] = {"model": "policy", "messages": [{"role": "user", "content": "hello"}]}
VLLM_MODELS = b'{"object":"list","data":[{"id":"policy","object":"model","owned_by":"vllm"}]}'

# What an engine draws at random, and what a transport may change.
_DRAWN = re.compile(rb"\b(chatcmpl|cmpl)-[0-9a-f]{32}\b")
_TRANSPORT = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass(frozen=True)
class Answer:
    """A whole answer: header names in lower case, the body without its transfer encoding."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """The first value of a header."""
        return next((value for key, value in self.headers if key == name), None)

    def headers_without(self, names: set[str]) -> list[tuple[str, str]]:
        """The headers in their order, without some."""
        return [pair for pair in self.headers if pair[0] not in names]

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The body as server-sent events of one data line each, parsed; ``[DONE]`` as it is."""
        lines = re.split(rb"\r\n|\n|\r", self.body)
        data = [line.removeprefix(b"data:").strip() for line in lines if line.startswith(b"data:")]
        return [json.loads(one) if one != b"[DONE]" else "[DONE]" for one in data]

    @property
    def end_to_end_headers(self) -> list[tuple[str, str]]:
        """The headers that must not change on the way, in their order."""
        return self.headers_without(_TRANSPORT)

    @property
    def end_to_end(self) -> tuple[int, str, list[tuple[str, str]], bytes]:
        """What must not change on the way, with what the engine drew at random put to one value."""
        kept = sorted(pair for pair in self.headers if pair[0] not in _TRANSPORT)
        return self.status, self.reason, kept, _DRAWN.sub(rb"\1-drawn", self.body)


def events_or_bytes(body: bytes) -> list[bytes] | bytes:
    """A stream as its blocks, whatever ends their lines: the standard holds line ends to be equal."""
    lines = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return lines.split(b"\n\n") if lines.startswith((b"data:", b":", b"event:")) else body


class Call:
    """One request on a connection of its own, whose answer can be read piece by piece."""

    def __init__(
        self,
        url: str,
        target: str,
        body: object = None,
        headers: Headers = JSON,
        *,
        method: str | None = None,
        chunks: Iterable[bytes] | None = None,
        timeout: float = 30.0,
    ) -> None:
        parts = urlsplit(url)
        target = parts.path + target
        self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
        try:
            self._send(method, target, body, headers, chunks)
            self.response = self.connection.getresponse()
        except BaseException:
            self.connection.close()
            raise

    def _send(
        self,
        method: str | None,
        target: str,
        body: object,
        headers: Headers,
        chunks: Iterable[bytes] | None,
    ) -> None:
        raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        sends = raw is not None or chunks is not None
        self.connection.putrequest(method or ("POST" if sends else "GET"), target, skip_accept_encoding=True)
        for name, value in headers:
            self.connection.putheader(name, value)
        if chunks is not None:
            self.connection.putheader("Transfer-Encoding", "chunked")
        elif raw is not None:
            self.connection.putheader("Content-Length", str(len(raw)))
        self.connection.endheaders(chunks if chunks is not None else raw, encode_chunked=chunks is not None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.response.close()
        self.connection.close()

    def read_until(self, mark: bytes) -> bytes:
        """Read until ``mark`` has come; returns everything up to what came with it."""
        got = b""
        while mark not in got:
            piece = self.response.read1(65536)
            if not piece:
                raise AssertionError(f"the answer ended without {mark!r}: {got[-200:]!r}")
            got += piece
        return got

    def drain(self, into: bytearray) -> None:
        """Read to the end, keeping what came even where the end is not clean."""
        while piece := self.response.read1(65536):
            into += piece

    def rest(self) -> bytes:
        """Read to the end. Raises as http.client does where the end is not clean."""
        return self.response.read()

    def hang_up(self, *, reset: bool = False) -> None:
        """Close the connection in the middle of things."""
        sock = self.connection.sock
        if sock is not None and reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.response.close()
        self.connection.close()


def send(
    url: str,
    target: str,
    body: object = None,
    headers: Headers = JSON,
    *,
    method: str | None = None,
    chunks: Iterable[bytes] | None = None,
    timeout: float = 30.0,
) -> Answer:
    """Send one request and read its whole answer. Raises as http.client does where it is cut."""
    with Call(url, target, body, headers, method=method, chunks=chunks, timeout=timeout) as call:
        response = call.response
        head = [(name.lower(), value) for name, value in response.getheaders()]
        return Answer(response.status, response.reason, head, call.rest())


def leave_early(
    url: str, target: str, body: object = b"", headers: Headers = JSON, *, once: Callable[[], bool]
) -> None:
    """Post a request, and hang up without an answer as soon as something has come about."""
    parts = urlsplit(url)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {target} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in headers)]
    lines += [f"Content-Length: {len(raw)}", "", ""]
    with socket.create_connection((parts.hostname or "", parts.port)) as agent:
        agent.sendall("\r\n".join(lines).encode() + raw)
        wait_until(once)


CUT = (http.client.IncompleteRead, http.client.RemoteDisconnected, ConnectionError)


def chat(proxy: ProxyThread, headers: Headers = (), prefix: str = "", **fields: object) -> Answer:
    """A Chat Completions call through a proxy; ``prefix`` is an attribution in the path."""
    return send(proxy.url, prefix + CHAT, {**HELLO, **fields}, [*JSON, *headers])


def recorded(proxy: ProxyThread, count: int = 1) -> list[Span]:
    """Wait until that many spans are in the database; return them all, oldest first."""
    spans: list[Span] = []
    with proxy.store() as store:

        def there() -> bool:
            spans[:] = store.list_spans(limit=10_000)[::-1]
            return len(spans) >= count

        wait_until(there)
    assert len(spans) == count, [(span.error_class, span.error) for span in spans]
    return spans


def chosen_sampling(span: Span) -> dict[str, Any]:
    """What was chosen for a call; which logprobs were told is asked beside it, and known at any time."""
    return {name: value for name, value in span.sampling.items() if name != "logprobs_mode"}


def metric(proxy_url: str, name: str) -> float:
    """One number of ``/metrics``, by its name with labels; 0 where it is not there."""
    text = send(proxy_url, "/metrics").body.decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


class RawUpstream:
    """An upstream whose every byte a test writes: ``answer(connection, head, body)`` per request.

    ``/v1/models`` is answered as vLLM would. The connection stays open as long as ``answer`` returns True.
    """

    def __init__(self, answer: Callable[[socket.socket, bytes, bytes], bool], *, models: bool = True) -> None:
        self._answer = answer
        self._models = models
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.base_url = f"{self.url}/v1"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._open: list[socket.socket] = []
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            data = b""
            while True:
                while b"\r\n\r\n" not in data:
                    if not (more := connection.recv(65536)):
                        return
                    data += more
                head, _, body = data.partition(b"\r\n\r\n")
                length = re.search(rb"(?im)^content-length: *(\d+)", head)
                while len(body) < (int(length.group(1)) if length else 0):
                    body += connection.recv(65536)
                data = b""
                if self._models and b" /v1/models " in head.split(b"\r\n")[0]:
                    connection.sendall(http_answer(VLLM_MODELS, "Content-Type: application/json"))
                elif not self._answer(connection, head, body):
                    return

    def stop(self) -> None:
        """Close everything."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)


def http_answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """A whole HTTP answer with its length."""
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def http_chunks(*pieces: bytes, end: bool = True) -> bytes:
    """Pieces as HTTP chunks; with ``end`` the last, empty one too."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + (
        b"0\r\n\r\n" if end else b""
    )


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@contextlib.contextmanager
def raw_upstream(
    answer: Callable[[socket.socket, bytes, bytes], bool], *, models: bool = True
) -> Iterator[RawUpstream]:
    """A :class:`RawUpstream` for the length of a block; without ``models`` it answers ``/v1/models`` too."""
    upstream = RawUpstream(answer, models=models)
    try:
        yield upstream
    finally:
        upstream.stop()
