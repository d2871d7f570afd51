"""HTTP/1.1 on one socket, written out by hand, because its job includes breaking the rules."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

_REASONS = {200: "OK", 201: "Created", 400: "Bad Request", 404: "Not Found", 500: "Internal Server Error"}


class ClientGone(Exception):
    """The client closed the connection before its answer was whole."""


@dataclass(slots=True)
class Request:
    """A request as it came."""

    method: str
    target: str  # path and query, as sent
    headers: list[tuple[str, str]]  # names in lower case
    body: bytes
    aborted: bool = False  # the client left before the answer was whole
    answered: bool = False
    _json: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, name: str) -> str | None:
        """The last value of a header."""
        return next((value for key, value in reversed(self.headers) if key == name), None)

    @property
    def json(self) -> dict[str, Any]:
        """The body as a JSON object. Raises ``ValueError``."""
        if self._json is None:
            parsed = orjson.loads(self.body)
            if not isinstance(parsed, dict):
                raise ValueError("not a JSON object")
            self._json = parsed
        return self._json


class Connection(asyncio.Protocol):
    """One client. ``handle`` is called for each request, one after the other."""

    def __init__(
        self, handle: Callable[[Request, Connection], Awaitable[None]], open_: set[Connection]
    ) -> None:
        self._handle = handle
        self._open = open_
        self._data = bytearray()
        self._more = asyncio.Event()
        self._writable = asyncio.Event()
        self.lost = asyncio.Event()
        self.idle = True
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._writable.set()
        self._open.add(self)
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        self._data += data
        self._more.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self)
        self.lost.set()
        self._more.set()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def _serve(self) -> None:
        try:
            while True:
                self.idle = True
                request = await self._next_request()
                self.idle = False
                try:
                    await self._handle(request, self)
                    request.answered = True
                except ClientGone:
                    request.aborted = True
                    raise
                if request.header("connection") == "close":
                    self._transport.close()
        except ClientGone:
            self._transport.abort()
        except BaseException:
            self._transport.abort()  # a fault of our own must not keep a client waiting
            raise

    async def _next_request(self) -> Request:
        head = await self._until(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = [(key.lower(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
        request = Request(method, target, headers, b"")
        if request.header("expect"):
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.header("transfer-encoding"):
            request.body = await self._chunked_body()
        else:
            request.body = await self._exactly(int(request.header("content-length") or 0))
        return request

    async def _until(self, mark: bytes) -> bytes:
        while (at := self._data.find(mark)) < 0:
            await self._wait_for_more()
        found = bytes(self._data[:at])
        del self._data[: at + len(mark)]
        return found

    async def _exactly(self, count: int) -> bytes:
        while len(self._data) < count:
            await self._wait_for_more()
        found = bytes(self._data[:count])
        del self._data[:count]
        return found

    async def _chunked_body(self) -> bytes:
        body = bytearray()
        while size := int((await self._until(b"\r\n")).partition(b";")[0], 16):
            body += await self._exactly(size)
            await self._exactly(2)
        while await self._until(b"\r\n"):
            pass  # trailers
        return bytes(body)

    async def _wait_for_more(self) -> None:
        if self.lost.is_set():
            raise ClientGone
        self._more.clear()
        await self._more.wait()

    async def write(self, data: bytes) -> None:
        """Send bytes, waiting for a slow reader. Raises ``ClientGone``."""
        if self.lost.is_set():
            raise ClientGone
        self._transport.write(data)
        if not self._writable.is_set():
            await self._writable.wait()

    async def sleep(self, seconds: float) -> None:
        """Wait, unless the client leaves. Raises ``ClientGone``."""
        if seconds > 0:
            await self.wait(asyncio.sleep(seconds))
        if self.lost.is_set():
            raise ClientGone

    async def wait(self, awaitable: Awaitable[object]) -> None:
        """Wait for something, unless the client leaves. Raises ``ClientGone``."""
        work = asyncio.ensure_future(awaitable)
        lost = asyncio.ensure_future(self.lost.wait())
        await asyncio.wait((work, lost), return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        if not work.done():
            work.cancel()
            raise ClientGone
        work.result()

    async def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A whole answer with its length."""
        await self.write(head_of(status, {"content-length": str(len(body)), **(headers or {})}) + body)

    async def answer_json(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        """A whole answer in JSON."""
        await self.answer(
            status, orjson.dumps(value), {"content-type": "application/json", **(headers or {})}
        )

    def close(self) -> None:
        """End the connection in good order; what was written still goes out."""
        self._transport.close()

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


def head_of(status: int, headers: Mapping[str, str]) -> bytes:
    """Status line and headers, the empty line included."""
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}", "server: uvicorn"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def chunk_of(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)
