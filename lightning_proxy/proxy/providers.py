"""Providers that do not speak the OpenAI API, made to speak it by litellm.

A provider is served on a Unix socket of our own, inside this process: to the forwarder it is one more
OpenAI-compatible endpoint, so that capture, streaming and errors go the one way that they always
go. litellm takes seconds to import and is imported with the first call.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import orjson
from aiohttp import web

from lightning_proxy.errors import ConfigError

from .attribution import api_keys

log = logging.getLogger(__name__)

# What litellm calls each of our paths, and how the pieces of its streams are written.
_FUNCTIONS = {
    "/v1/chat/completions": "acompletion",
    "/v1/completions": "atext_completion",
    "/v1/embeddings": "aembedding",
    "/v1/responses": "aresponses",
    "/v1/messages": "anthropic_messages",
}
_WITH_DONE = ("/v1/chat/completions", "/v1/completions")  # streams that end in [DONE]


@cache
def litellm() -> ModuleType:
    """The package, set up so that it tries once, keeps quiet and calls nobody else.

    Raises ConfigError where it is not installed.
    """
    # Else it fetches a list of prices from the internet, which it needs for nothing of ours.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        import litellm as package
    except ImportError as error:
        raise ConfigError(
            "an upstream with a `provider` needs litellm: pip install 'lightning-proxy[providers]'"
        ) from error
    package.suppress_debug_info = True
    package.telemetry = False
    package.num_retries = 0
    made: ModuleType = package
    return made


class ProviderServer:
    """One provider of litellm's (``anthropic``, ``bedrock``, ``gemini`` ...) as an OpenAI endpoint.

    ``key`` and ``base`` go to litellm as ``api_key`` and ``api_base``. Without a key the agent's own
    is taken; without either, litellm looks into the environment, as it always does.
    """

    def __init__(self, provider: str, *, key: str | None, base: str | None, models: Sequence[str]) -> None:
        self._provider = provider
        self._options = {"api_key": key, "api_base": base}
        self._models = [name for name in models if not set(name) & set("*?[")]
        self._folder: Path | None = None
        self._runner: web.AppRunner | None = None

    async def start(self) -> Path:
        """Listen; returns the path of the socket, which only this user can open."""
        app = web.Application(client_max_size=2**30)  # the proxy's own limit applies before
        app.router.add_get("/v1/models", self._list_models)
        for path, function in _FUNCTIONS.items():
            app.router.add_post(path, self._route(path, function))
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await self._runner.setup()
        self._folder = Path(tempfile.mkdtemp(prefix="lightning-provider-"))
        socket = self._folder / "socket"
        await web.UnixSite(self._runner, str(socket)).start()
        return socket

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _list_models(self, request: web.Request) -> web.Response:
        models = [{"id": name, "object": "model", "owned_by": self._provider} for name in self._models]
        return _json(200, {"object": "list", "data": models})

    def _route(self, path: str, function: str) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                body = orjson.loads(await request.read())
                if not isinstance(body, dict):
                    raise ValueError("it is no object")
            except ValueError as error:
                return _error(400, f"the request cannot be read as JSON: {error}", "invalid_request_error")
            try:
                package = await asyncio.to_thread(litellm)
                answer = await getattr(package, function)(**self._arguments(body, request))
                # A provider's refusal of a stream may come with the stream's first piece only.
                first = await anext(answer, None) if body.get("stream") else None
            except ConfigError as error:
                return _error(501, str(error), "lightning_proxy_error")
            except Exception as error:  # noqa: BLE001 - litellm raises whatever its providers make it raise
                return _refusal(error)
            if body.get("stream"):
                return await _stream(request, path, first, answer)
            return _json(200, _plain(answer))

        return handle

    def _arguments(self, body: Mapping[str, Any], request: web.Request) -> dict[str, Any]:
        options = {name: value for name, value in self._options.items() if value is not None}
        if keys := api_keys(request.headers):
            options.setdefault("api_key", keys[0])
        return {**body, **options, "model": f"{self._provider}/{body.get('model', '')}"}


async def _stream(
    request: web.Request, path: str, first: Any, rest: AsyncIterator[Any]
) -> web.StreamResponse:
    """A stream as server-sent events. A provider that breaks off is a connection that breaks off."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    try:
        piece = first
        while piece is not None:
            await response.write(_event(piece))
            piece = await anext(rest, None)
    except ConnectionError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        log.warning("a provider's stream broke off: %r", error)
        if request.transport is not None:
            request.transport.abort()
        return response
    if path in _WITH_DONE:
        await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _event(piece: Any) -> bytes:
    """A piece of one of litellm's streams: events already, or an object to be made one."""
    if isinstance(piece, bytes):
        return piece
    if isinstance(piece, str):
        return piece.encode()
    data = _plain(piece)
    kind = data.get("type")
    name = b"event: " + kind.encode() + b"\n" if isinstance(kind, str) else b""
    return name + b"data: " + orjson.dumps(data, default=str) + b"\n\n"


def _plain(answer: Any) -> dict[str, Any]:
    if isinstance(answer, dict):
        return answer
    plain: dict[str, Any] = answer.model_dump(mode="json", exclude_none=True)
    return plain


def _refusal(error: Exception) -> web.Response:
    """A provider's refusal, with the status and the advice on retrying that came with it."""
    status = getattr(error, "status_code", None)
    response = _error(
        status if isinstance(status, int) and 400 <= status < 600 else 502,
        str(getattr(error, "message", error)),
        str(getattr(error, "type", None) or type(error).__name__),
        getattr(error, "code", None),
    )
    came_with = getattr(error, "litellm_response_headers", None) or {}
    for name in ("retry-after", "x-request-id", "request-id"):
        if name in came_with:
            response.headers[name] = str(came_with[name])
    return response


def _error(status: int, message: str, kind: str, code: object = None) -> web.Response:
    return _json(status, {"error": {"message": message, "type": kind, "param": None, "code": code}})


def _json(status: int, body: Mapping[str, Any]) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(body, default=str), content_type="application/json")
