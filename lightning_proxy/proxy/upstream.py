"""Connections to the model endpoint, and which headers travel either way."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.http import StreamWriter
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from lightning_proxy.errors import ConfigError, InvalidInput

from .attribution import KEY_PREFIX, api_keys

# RFC 9110 section 7.6.1, with the headers that older proxies send.
_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
     "te", "trailer", "trailers", "transfer-encoding", "upgrade")
)  # fmt: skip
_OUR_OWN = frozenset(("x-rollout-id", "x-attempt", "x-role"))
_AUTO_HEADERS = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
# Where an upstream sends none of these, the agent gets none either: aiohttp's server would add them.
_NOT_ADDED = ("Content-Type", "Server")

# uvicorn, vLLM's server, closes idle connections after 5 s, and at once after a pause: a pooled
# connection is dropped well before that.
_IDLE_S = 2.0
_AT_ONCE_S = 1.0  # in which a request meets a connection that was closed before it
_READ_OUT_S = 5.0  # for what comes after the last word: a comment, the end
LONGEST_LINE = 2**16  # bytes of a request's or status line, or of a header, either way
_LARGE_BODY = 2**20  # bytes; aiohttp warns of larger ones in one piece

_connected: ContextVar[bool] = ContextVar("connected", default=False)


class _Telling(aiohttp.BaseConnector):
    """Tells whether the request under way got a connection of its own, or one from the pool."""

    async def _create_connection(self, *args: Any, **kwargs: Any) -> Any:
        _connected.set(True)
        return await super()._create_connection(*args, **kwargs)


class _Connector(_Telling, aiohttp.TCPConnector):
    """Over TCP."""


class _UnixConnector(_Telling, aiohttp.UnixConnector):
    """To a Unix socket."""


class _Every(set[str]):
    def __contains__(self, _: object) -> bool:
        return True


class _Request(aiohttp.ClientRequest):
    """A request without a body says nothing of its length, whatever its method."""

    GET_METHODS = _Every()


class _Response(aiohttp.ClientResponse):
    """A response that still knows its connection when its body is over."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        self.arrived_on = connection.protocol
        return await super().start(connection)


class Upstream:
    """The endpoint that calls are forwarded to: ``/v1/X`` goes to ``{base}/X``."""

    def __init__(self, base: str, key: str | None, token: str | None = None) -> None:
        if not base.startswith(("http://", "https://")):
            raise ConfigError(f"upstream {base!r} is no URL: it should look like http://127.0.0.1:8000/v1")
        self.base = base.rstrip("/")
        self.key = key
        self._token = token
        self._session: aiohttp.ClientSession | None = None

    async def start(self, socket: Path | None = None) -> None:
        """Open the connection pool: over TCP, or to a Unix socket."""
        connector = (
            _Connector(limit=0, keepalive_timeout=_IDLE_S)
            if socket is None
            else _UnixConnector(str(socket), limit=0, keepalive_timeout=_IDLE_S)
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            request_class=_Request,
            response_class=_Response,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=_AUTO_HEADERS,
            max_line_size=LONGEST_LINE,
            max_field_size=LONGEST_LINE,
        )

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()

    def url(self, path_and_query: str) -> URL:
        """Where a request goes: ``/v1/X`` to ``{base}/X``, anything else to the endpoint's root."""
        if path_and_query == "/v1" or path_and_query.startswith(("/v1/", "/v1?")):
            return URL(self.base + path_and_query[3:], encoded=True)
        return URL(self.base.removesuffix("/v1") + path_and_query, encoded=True)

    async def open(
        self, method: str, path_and_query: str, headers: Mapping[str, str], body: Any
    ) -> aiohttp.ClientResponse:
        """Send a request; return once the response's headers are there.

        A connection that the engine closed while it lay in the pool fails before a byte comes
        back, and at once: that one case is tried again, once. A connection that was made for this
        request and breaks, or one that breaks later, while the engine may be at work on the request, is
        the answer that the agent would have got. Raises aiohttp.ClientError.
        """
        url = self.url(path_and_query)
        _connected.set(False)
        begun = time.monotonic()
        try:
            return await self._request(method, url, headers, body)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            at_once = time.monotonic() - begun < _AT_ONCE_S
            if _connected.get() or not at_once or not (body is None or isinstance(body, bytes)):
                raise
            return await self._request(method, url, headers, body)

    async def _request(
        self, method: str, url: URL, headers: Mapping[str, str], body: Any
    ) -> aiohttp.ClientResponse:
        assert self._session is not None, "start() comes first"
        if isinstance(body, bytes) and len(body) > _LARGE_BODY:
            body = io.BytesIO(body)  # sent in pieces, so that other calls get their turn
        return await self._session.request(method, url, headers=headers, data=body, allow_redirects=False)

    def request_headers(self, headers: CIMultiDictProxy[str], *, captured: bool) -> CIMultiDict[str]:
        """What of an agent's headers goes to the upstream.

        Raises InvalidInput for one that aiohttp's client would alter without a word.
        """
        kept = _end_to_end(headers)
        kept.popall("Host", None)
        kept.popall("Expect", None)  # the agent was told to go on by us
        for name in _OUR_OWN:
            kept.popall(name, None)
        if captured:
            # The body's length may change, and an answer that we must read comes uncompressed.
            kept.popall("Content-Length", None)
            kept["Accept-Encoding"] = "identity"
        self._set_key(kept)
        for name, value in kept.items():
            if not _is_utf8(value):
                raise InvalidInput(
                    f"the header {name} holds bytes that are no UTF-8, and cannot be passed on"
                )
        return kept

    def _set_key(self, headers: CIMultiDict[str]) -> None:
        """A key of ours must not travel; the upstream's own replaces whatever the agent sent."""
        as_x_api_key = "x-api-key" in headers
        for name in ("Authorization", "x-api-key"):
            keys = api_keys({name: headers[name]}) if name in headers else []
            if self.key is not None or any(key.startswith(KEY_PREFIX) or key == self._token for key in keys):
                headers.popall(name, None)
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
            if as_x_api_key:
                headers["x-api-key"] = self.key


def reset_at_the_end(answer: aiohttp.ClientResponse) -> OSError | None:
    """The reset that ended a body which only the end of its connection delimits, if one did.

    aiohttp takes any end of the connection for the end of such a body.
    """
    if "Content-Length" in answer.headers or "Transfer-Encoding" in answer.headers:
        return None
    if answer.status in (204, 304) or answer.method == "HEAD":
        return None
    assert isinstance(answer, _Response)
    error = answer.arrived_on.exception()
    return error if isinstance(error, OSError) else None


async def read_out(answer: aiohttp.ClientResponse) -> None:
    """Read what is left of an answer that nobody waits for, and give its connection back.

    An upstream that does not end its answer is left: its connection would stay open for good.
    """
    try:
        async with asyncio.timeout(_READ_OUT_S):
            async for _ in answer.content.iter_any():
                pass
    except (aiohttp.ClientError, ConnectionError, TimeoutError):
        pass  # after its last word: nothing is missing
    finally:
        answer.release()  # which closes a connection whose answer is not at its end


def response_headers(headers: CIMultiDictProxy[str], *, rewritten: bool) -> CIMultiDict[str]:
    """What of the upstream's headers goes to the agent."""
    kept = _end_to_end(headers)
    if rewritten:
        kept.popall("Content-Length", None)
    for name in _NOT_ADDED:
        kept.setdefault(name, "")
    return kept


async def only_the_upstreams(request: web.Request, response: web.StreamResponse) -> None:
    """Before the headers of an answer go out: take out what ``response_headers`` has left empty.

    Bytes that are no UTF-8 go out as they came, where aiohttp's server would leave them out.
    """
    headers = response.headers
    for name in _NOT_ADDED:
        if headers.get(name) == "":
            del headers[name]
    if not (_is_utf8(response.reason or "") and all(map(_is_utf8, headers.values()))):
        writer: Any = request.writer
        writer.write_headers = partial(_write_headers, writer)


async def _write_headers(writer: Any, status_line: str, headers: CIMultiDict[str]) -> None:
    await StreamWriter.write_headers(writer, status_line, headers)  # which checks them, too
    lines = [status_line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    writer._headers_buf = "\r\n".join(lines).encode("utf-8", "surrogateescape")


def _is_utf8(text: str) -> bool:
    """Whether what aiohttp read of a line was UTF-8: other bytes are surrogates in it."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _end_to_end(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    dropped = _HOP_BY_HOP
    if "Connection" in headers:
        named = ",".join(headers.getall("Connection")).lower().split(",")
        dropped = dropped | {name.strip() for name in named if name.strip()}
    kept = CIMultiDict(headers)
    for name in dropped:
        kept.popall(name, None)
    return kept
