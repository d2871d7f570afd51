"""The load: so many calls by so many clients, each on a connection of its own, one after the other.

Written on a bare protocol, so that it takes little of the CPU that the measured process needs.
Prints one JSON object: ``{"calls", "failed", "seconds", "latency_ms": [...], "first_byte_ms": [...]}``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import uvloop

PROMPTS = 8  # different prompts, in turn
PROMPT_TOKENS = 1000
BYTES_PER_TOKEN = 4
_TEMPLATE_TOKENS = 12  # what the fake engine's chat template adds


@dataclass(slots=True)
class Result:
    """What came of a load."""

    calls: int = 0
    failed: int = 0
    seconds: float = 0.0
    latency_ms: list[float] = field(default_factory=list)
    first_byte_ms: list[float] = field(default_factory=list)


def request_bodies(*, stream: bool) -> list[bytes]:
    """The bodies that are sent in turn: prompts of 1,000 tokens at the engine's 4 bytes a token."""
    length = (PROMPT_TOKENS - _TEMPLATE_TOKENS) * BYTES_PER_TOKEN
    words = " ".join(f"word{i:04d}" for i in range(length // 9 + 2))
    bodies = []
    for i in range(PROMPTS):
        content = words[i : i + length]
        body = {"model": "policy", "messages": [{"role": "user", "content": content}], "stream": stream}
        bodies.append(json.dumps(body).encode())
    return bodies


class _Client(asyncio.Protocol):
    """One connection: a request, its answer, the next request."""

    def __init__(self, requests: Iterator[bytes], result: Result, streamed: bool) -> None:
        self._requests = requests
        self._result = result
        self._streamed = streamed
        self._data = bytearray()
        self._wanted: int | None = None  # length of the whole answer, where it is known
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def _next(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self.done.set_result(None)
            self._transport.close()
            return
        self._data.clear()
        self._wanted = None
        self._first_byte = 0.0
        self._started = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if not self._data:
            self._first_byte = time.perf_counter()
        self._data += data
        if self._streamed:
            if self._data.endswith(b"0\r\n\r\n"):
                self._finished(b"data: [DONE]" in self._data)
            return
        if self._wanted is None:
            self._wanted = _whole_length(self._data)
        if self._wanted is not None and len(self._data) >= self._wanted:
            self._finished(self._data.endswith(b"}"))

    def _finished(self, whole: bool) -> None:
        ended = time.perf_counter()
        result = self._result
        result.calls += 1
        result.failed += not (whole and self._data.startswith(b"HTTP/1.1 200"))
        result.latency_ms.append((ended - self._started) * 1000)
        result.first_byte_ms.append((self._first_byte - self._started) * 1000)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._result.failed += 1
            self.done.set_exception(exc or ConnectionError("the server closed the connection"))


def _whole_length(data: bytearray) -> int | None:
    head_end = data.find(b"\r\n\r\n")
    if head_end < 0:
        return None
    for line in bytes(data[:head_end]).lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return head_end + 4 + int(line.partition(b":")[2])
    raise ValueError("an answer without Content-Length")


def _requests(host: str, calls: int, streamed: bool, first_rollout: int) -> Iterator[bytes]:
    bodies = request_bodies(stream=streamed)
    for i in range(calls):
        body = bodies[i % PROMPTS]
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"X-Rollout-Id: bench-{first_rollout + i // 10}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        yield head.encode() + body


async def run_load(url: str, *, calls: int, clients: int, streamed: bool, first_rollout: int) -> Result:
    """Put the load on a server and wait for the last answer. Raises OSError where it breaks."""
    where = urlsplit(url)
    host, port = where.hostname or "127.0.0.1", where.port or 80
    loop = asyncio.get_running_loop()
    result = Result()
    requests = _requests(where.netloc, calls, streamed, first_rollout)
    started = time.perf_counter()
    pairs = [
        await loop.create_connection(lambda: _Client(requests, result, streamed), host, port)
        for _ in range(clients)
    ]
    await asyncio.gather(*(client.done for _, client in pairs))
    result.seconds = time.perf_counter() - started
    return result


def main() -> None:
    """Run one load and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--first-rollout", type=int, default=0)
    args = parser.parse_args()
    result = uvloop.run(
        run_load(
            args.url,
            calls=args.calls,
            clients=args.clients,
            streamed=args.stream,
            first_rollout=args.first_rollout,
        )
    )
    fields = ("calls", "failed", "seconds", "latency_ms", "first_byte_ms")
    print(json.dumps({name: getattr(result, name) for name in fields}))


if __name__ == "__main__":
    main()
