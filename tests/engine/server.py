"""The fake vLLM's routes.

Routes of vLLM 0.31: ``/v1/models``, ``/v1/chat/completions``, ``/v1/completions``, ``/v1/messages``,
``/v1/messages/count_tokens``, ``/v1/responses`` (and GET of one), ``/health``, ``/version``,
``/openapi.json``, ``/pause``, ``/resume``, ``/collective_rpc`` (reload_weights),
``/reset_prefix_cache``.
Routes of its own: ``/_script`` (POST, DELETE), ``/_requests`` (GET, DELETE), ``/_drop_idle`` (POST).
Anything else is echoed: body and content headers as they came, method and target as headers.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from uuid import uuid4

import orjson

from tests.engine import messages, responses, shapes
from tests.engine.connection import Connection, Request, chunk_of, head_of
from tests.engine.model import Model, Reply, weights_of
from tests.engine.rules import Rule
from tests.engine.script import HEADER, Script

PLAIN = Script()
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
MODEL_CALLS = ("/v1/chat/completions", "/v1/completions", MESSAGES, RESPONSES)
_ID = "0123456789abcdef" * 2  # stands in a prepared answer until the answer goes out
_CREATED = 1_700_000_000
KEPT_REQUESTS = 10_000
LOOK_AGAIN_S = 0.005  # for what a test opens in another thread


class FakeEngine:
    """One engine. Everything runs on the loop that ``start`` was called on."""

    def __init__(
        self,
        *,
        model: Model | None = None,
        name: str = "policy",
        also: Sequence[str] = (),
        owner: str = "vllm",
        weights: Path | None = None,
        refuse_token_ids: bool = False,
        store_responses: bool = False,
        script: Script = PLAIN,
        rules: Sequence[Rule] = (),
    ) -> None:
        base = model or Model()
        loaded = weights_of(weights) if weights else base.weights
        self.model = Model(base.tokens, base.bytes_per_token, loaded)
        self.name = name  # which answers show, as vLLM's show the first of --served-model-name
        self.also = tuple(also)
        self.owner = owner
        self.root = str(weights) if weights else name
        self.refuse_token_ids = refuse_token_ids
        self.stored: dict[str, bytes] | None = {} if store_responses else None  # responses by their id
        self.default = script
        self.rules = rules  # for requests that no script was prescribed for
        self.requests: deque[Request] = deque(maxlen=KEPT_REQUESTS)
        self.poisoned = False  # a bad reload: the next inference takes the engine down, as vLLM's does
        self.on_death: Callable[[], None] = self.stop
        self._scripts: deque[tuple[str, Script]] = deque()
        self._running = asyncio.Event()
        self._running.set()
        self._pause_mode = "keep"
        self._busy = 0
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._control: dict[tuple[str, str], Callable[[Request, Connection], Coroutine[Any, Any, None]]] = {
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/messages/count_tokens"): self._count_tokens,
            ("GET", "/health"): self._health,
            ("GET", "/version"): self._version,
            ("GET", "/openapi.json"): self._openapi,
            ("POST", "/pause"): self._pause,
            ("POST", "/resume"): self._resume,
            ("POST", "/collective_rpc"): self._collective_rpc,
            ("POST", "/reset_prefix_cache"): self._reset_prefix_cache,
            ("POST", "/_script"): self._add_script,
            ("DELETE", "/_script"): self._clear_scripts,
            ("GET", "/_requests"): self._list_requests,
            ("DELETE", "/_requests"): self._clear_requests,
            ("POST", "/_drop_idle"): self._drop_idle_route,
        }

    async def start(self, port: int = 0, host: str = "127.0.0.1") -> int:
        """Listen; returns the port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self._handle, self._connections), host, port
        )
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    def stop(self) -> None:
        """Stop listening and break every connection, as a process that ends does."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.reset()

    def script(self, script: Script, *, times: int = 1, path: str = "/v1/") -> None:
        """Prescribe what becomes of the next ``times`` requests whose path starts with ``path``."""
        self._scripts.extend([(path, script)] * times)

    def drop_idle(self) -> int:
        """Close the connections that wait for a next request; returns how many."""
        idle = [connection for connection in self._connections if connection.idle]
        for connection in idle:
            connection.close()
        return len(idle)

    async def _handle(self, request: Request, connection: Connection) -> None:
        route = self._control.get((request.method, request.path))
        own = request.path.startswith("/_")
        if not own:
            self.requests.append(request)
        try:
            script = PLAIN if own else self._script_of(request)
        except ValueError as error:
            await connection.answer_json(400, shapes.error(400, f"bad {HEADER}: {error}"))
            return
        await connection.sleep(script.delay_s)
        while script.until is not None and not script.until.is_set():
            await connection.sleep(LOOK_AGAIN_S)
        if script.reset:
            connection.reset()
        elif script.status is not None:
            body = shapes.error(script.status, "scripted") if script.body is None else None
            raw = orjson.dumps(body) if body else (script.body or "").encode()
            await self._send_whole(connection, script, raw, script.status)
        elif route is not None:
            await route(request, connection)
        elif request.method == "POST" and request.path in MODEL_CALLS:
            await self._infer(request, connection, script)
        elif request.method == "GET" and request.path.startswith(f"{RESPONSES}/"):
            await self._stored_response(request, connection)
        else:
            await self._echo(request, connection, script)

    def _script_of(self, request: Request) -> Script:
        header = request.header(HEADER)
        if header is not None:
            return self.default.with_(orjson.loads(header))
        for i, (path, script) in enumerate(self._scripts):
            if request.path.startswith(path):
                del self._scripts[i]
                return script
        body = request.body.decode(errors="replace") if self.rules else ""
        chosen = (rule.script(body, self.default) for rule in self.rules)
        return next((script for script in chosen if script is not None), self.default)

    # -- model calls ---------------------------------------------------------------------------

    async def _infer(self, request: Request, connection: Connection, script: Script) -> None:
        try:
            body = request.json
        except ValueError as error:
            await connection.answer_json(400, shapes.error(400, f"{error}", "Bad Request"))
            return
        refusal = self._refusal(request.path, body)
        if refusal is not None:
            await connection.answer_json(*refusal)
            return
        if self.poisoned:
            self.on_death()
            return
        try:
            if body.get("stream"):
                self._events(request, script, [])
            else:
                _whole_answer(request.path, request.body, script, self.model, (), self.name)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            await connection.answer_json(400, shapes.error(400, f"{type(error).__name__}: {error}"))
            return
        if not self._running.is_set():
            await connection.wait(self._running.wait())
        self._busy += 1
        try:
            if body.get("stream"):
                await self._stream(request, connection, script)
            else:
                await self._whole(request, connection, script)
        finally:
            self._busy -= 1

    def _refusal(self, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
        for unknown in ("return_token_ids", "enable_response_messages"):
            if self.refuse_token_ids and unknown in body:
                return 400, shapes.error(400, f"Unrecognized request argument supplied: {unknown}")
        if path == MESSAGES and type(body.get("max_tokens")) is not int:
            return 400, shapes.error(400, "1 validation error:\n  max_tokens", "Bad Request")
        if path == RESPONSES and (wrong := responses.refusal(body)) is not None:
            return 400, shapes.error(400, wrong)
        wanted = body.get("model")
        if wanted is not None and wanted not in (self.name, *self.also):
            why, kind = f"The model `{wanted}` does not exist.", "NotFoundError"
            return 404, messages.error(why, kind) if path == MESSAGES else shapes.error(404, why, kind)
        return None

    async def _whole(self, request: Request, connection: Connection, script: Script) -> None:
        switches: list[tuple[int, int]] = []
        if script.chunk_delay_s or script.pace is not None:
            length = len(self._reply(request, script, ()).choices[0].steps)
            async for step in self._paced(connection, script, length):
                self._note_switch(switches, step)
        answer_id = _fresh_id(request.path)
        raw = _whole_answer(request.path, request.body, script, self.model, tuple(switches), self.name)
        raw = raw.replace(_ID.encode(), answer_id, 1)
        if self.stored is not None and request.path == RESPONSES:
            self.stored[orjson.loads(raw)["id"]] = raw
        await self._send_whole(connection, script, raw, 200)

    async def _stored_response(self, request: Request, connection: Connection) -> None:
        response_id = request.path.removeprefix(f"{RESPONSES}/")
        raw = (self.stored or {}).get(response_id)
        if raw is None:
            await connection.answer_json(404, responses.not_found(response_id))
        else:
            await connection.answer(200, raw, {"content-type": "application/json"})

    async def _stream(self, request: Request, connection: Connection, script: Script) -> None:
        answer_id, mark = _fresh_id(request.path), _ID.encode()
        head = {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"}
        await connection.write(head_of(200, {**head, **script.headers}))
        switches: list[tuple[int, int]] = []
        events = self._events(request, script, switches)
        out = _Pieces(connection, script)
        done = b"" if script.without_done else _done(request.path)
        async for i in self._paced(connection, script, len(events)):
            if self._note_switch(switches, i - 1):  # event 0 names the role, event k is token k
                events = self._events(request, script, switches)
            if script.cut_after == i:
                await out.cut()
                return
            if script.error_after == i:
                await out.event(_failure(request.path, "the engine failed", i))
                done = b"" if request.path == MESSAGES else done
                break
            if script.without_done and request.path == RESPONSES and i == len(events) - 1:
                break
            await out.event(events[i].replace(mark, answer_id, 1))
            if script.garbage and i == 1:
                await out.event(b'data: {"choices": [{"delta"\n\n')
            if self._aborting() and request.path not in (MESSAGES, RESPONSES):
                await out.event(shapes.sse(shapes.aborted(events[0])).replace(mark, answer_id, 1))
                break
        if done:
            await out.event(done)
        await out.end()

    def _aborting(self) -> bool:
        return not self._running.is_set() and self._pause_mode == "abort"

    async def _paced(self, connection: Connection, script: Script, count: int) -> AsyncIterator[int]:
        """0 .. count - 1, each after its delay and not while paused."""
        for i in range(count):
            if script.chunk_delay_s:
                await connection.sleep(script.chunk_delay_s)
            while script.pace is not None and not script.pace.acquire(blocking=False):
                await connection.sleep(LOOK_AGAIN_S)
            if not self._running.is_set() and self._pause_mode == "keep":
                await connection.wait(self._running.wait())
            yield i

    def _note_switch(self, switches: list[tuple[int, int]], step: int) -> bool:
        """Whether the weights have changed by this step of an answer; notes it in ``switches``."""
        last = switches[-1][1] if switches else None
        if last is None:
            switches.append((0, self.model.weights))
            return False
        if last == self.model.weights:
            return False
        switches.append((max(step, 0), self.model.weights))
        return True

    def _reply(self, request: Request, script: Script, switches: tuple[tuple[int, int], ...]) -> Reply:
        return _reply(request.path, request.body, script, self.model, switches)

    def _events(self, request: Request, script: Script, switches: list[tuple[int, int]]) -> tuple[bytes, ...]:
        return _stream_events(request.path, request.body, script, self.model, tuple(switches), self.name)

    # -- sending -------------------------------------------------------------------------------

    async def _send_whole(self, connection: Connection, script: Script, raw: bytes, status: int) -> None:
        headers = {"content-type": "application/json", **script.headers}
        if script.garbage:
            raw = raw[: len(raw) // 2]
        if script.hidden_length or script.split:
            out = _Pieces(connection, script)
            await connection.write(head_of(status, {**headers, "transfer-encoding": "chunked"}))
            await out.raw(raw if script.cut_after is None else raw[: script.cut_after])
            await (out.end() if script.cut_after is None else out.cut())
            return
        await connection.write(head_of(status, {"content-length": str(len(raw)), **headers}))
        if script.cut_after is None:
            await connection.write(raw)
            return
        await connection.write(raw[: script.cut_after])
        await _Pieces(connection, script).cut()

    async def _echo(self, request: Request, connection: Connection, script: Script) -> None:
        headers = {"x-echo-method": request.method, "x-echo-target": request.target}
        for name in ("content-type", "content-encoding"):
            if (value := request.header(name)) is not None:
                headers[name] = value
        script = script.with_({"headers": {**headers, **script.headers}})
        body = b"" if request.method == "HEAD" else request.body
        await self._send_whole(connection, script, body, 200)

    # -- control -------------------------------------------------------------------------------

    async def _models(self, request: Request, connection: Connection) -> None:
        await connection.answer_json(200, shapes.models(self.name, self.owner, self.root))

    async def _count_tokens(self, request: Request, connection: Connection) -> None:
        try:
            read = len(self.model.prompt_ids(messages.as_chat(json.loads(request.body))))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            await connection.answer_json(400, shapes.error(400, f"{type(error).__name__}: {error}"))
            return
        counted = {"input_tokens": read, "context_management": {"original_input_tokens": read}}
        await connection.answer_json(200, counted)

    async def _health(self, request: Request, connection: Connection) -> None:
        await connection.answer(200, b"")

    async def _version(self, request: Request, connection: Connection) -> None:
        await connection.answer_json(200, {"version": "0.31.0"})

    async def _openapi(self, request: Request, connection: Connection) -> None:
        paths = [path for _, path in self._control if not path.startswith("/_")]
        await connection.answer_json(200, {"paths": {path: {} for path in (*paths, *MODEL_CALLS)}})

    async def _pause(self, request: Request, connection: Connection) -> None:
        self._pause_mode = parse_qs(request.target.partition("?")[2]).get("mode", ["abort"])[0]
        if self._pause_mode not in ("abort", "wait", "keep"):
            await connection.answer_json(400, {"error": f"invalid mode {self._pause_mode}"})
            return
        self._running.clear()
        while self._busy and self._pause_mode == "wait":
            await connection.sleep(0.005)
        await connection.answer_json(200, {"status": "paused"})

    async def _resume(self, request: Request, connection: Connection) -> None:
        self._running.set()
        await connection.answer_json(200, {"status": "resumed"})

    async def _collective_rpc(self, request: Request, connection: Connection) -> None:
        body = request.json
        if body.get("method") != "reload_weights":
            await connection.answer_json(500, shapes.error(500, f"no method {body.get('method')!r}"))
            return
        path = Path(body.get("kwargs", {}).get("weights_path", self.root))
        try:
            weights = weights_of(path)
        except OSError as error:
            self.poisoned = True
            await connection.answer_json(500, shapes.error(500, str(error), "InternalServerError"))
            return
        self.model = Model(self.model.tokens, self.model.bytes_per_token, weights)
        self.root = str(path)
        await connection.answer_json(200, {"results": [None]})

    async def _reset_prefix_cache(self, request: Request, connection: Connection) -> None:
        await connection.answer_json(200, {"success": True})

    async def _add_script(self, request: Request, connection: Connection) -> None:
        body = dict(request.json)
        times, path = body.pop("times", 1), body.pop("path", "/v1/")
        try:
            self.script(PLAIN.with_(body), times=times, path=path)
        except ValueError as error:
            await connection.answer_json(400, shapes.error(400, str(error)))
            return
        await connection.answer_json(200, {"waiting": len(self._scripts)})

    async def _clear_scripts(self, request: Request, connection: Connection) -> None:
        self._scripts.clear()
        await connection.answer_json(200, {"waiting": 0})

    async def _list_requests(self, request: Request, connection: Connection) -> None:
        listed = [
            {
                "method": seen.method,
                "target": seen.target,
                "headers": seen.headers,
                "body": seen.body.decode(errors="replace"),
                "answered": seen.answered,
                "aborted": seen.aborted,
            }
            for seen in self.requests
        ]
        await connection.answer_json(200, {"requests": listed})

    async def _clear_requests(self, request: Request, connection: Connection) -> None:
        self.requests.clear()
        await connection.answer_json(200, {"requests": []})

    async def _drop_idle_route(self, request: Request, connection: Connection) -> None:
        await connection.answer_json(200, {"closed": self.drop_idle()})


class _Pieces:
    """A chunked body, cut into HTTP chunks as the script wants it."""

    def __init__(self, connection: Connection, script: Script) -> None:
        self._connection = connection
        self._script = script

    async def event(self, data: bytes) -> None:
        """One server-sent event."""
        script = self._script
        if script.comments:
            data = b": keep-alive\n\n" + data
        if script.line_end != "\n":
            data = data.replace(b"\n", script.line_end.encode())
        await self.raw(data)

    async def raw(self, data: bytes) -> None:
        """Bytes, split as the script says."""
        if self._script.split is None:
            if data:
                await self._connection.write(chunk_of(data))
            return
        for i in range(0, len(data), self._script.split):
            await self._connection.write(chunk_of(data[i : i + self._script.split]))
            await asyncio.sleep(0)

    async def end(self) -> None:
        """The end of a whole body."""
        await self._connection.write(b"0\r\n\r\n")

    async def cut(self) -> None:
        """The end of the connection, in mid-body."""
        if self._script.cut_by == "reset":
            await asyncio.sleep(0.02)  # let what was written leave: a reset throws it away
            self._connection.reset()
        else:
            self._connection.close()


def _fresh_id(path: str) -> bytes:
    return uuid4().hex.encode()


def _head(path: str, name: str) -> shapes.Head:
    if path == RESPONSES:
        return shapes.Head(f"resp_{_ID}", _CREATED, name)
    return shapes.Head(f"{'cmpl' if path == '/v1/completions' else 'chatcmpl'}-{_ID}", _CREATED, name)


def _done(path: str) -> bytes:
    return {MESSAGES: messages.STOP, RESPONSES: b""}.get(path, b"data: [DONE]\n\n")


def _failure(path: str, message: str, number: int) -> bytes:
    if path == MESSAGES:
        return messages.failed(message)
    if path == RESPONSES:
        return responses.sse(responses.broken(number))
    return shapes.sse(shapes.error(500, message, "InternalServerError"))


def _parsed(path: str, body: bytes) -> dict[str, Any]:
    """A request as the model reads it."""
    if path == MESSAGES:
        return messages.as_chat(json.loads(body))  # integers of any length, as in vLLM
    parsed: dict[str, Any] = orjson.loads(body)
    return responses.as_chat(parsed) if path == RESPONSES else parsed


# Preparing an answer costs more than sending it. A benchmark sends few different requests, so
# that with these caches the fake engine costs little beside what is measured.


@lru_cache(maxsize=256)
def _reply(
    path: str, body: bytes, script: Script, model: Model, switches: tuple[tuple[int, int], ...]
) -> Reply:
    return model.generate(
        _parsed(path, body),
        text=script.text,
        tool_calls=script.tool_calls,
        tokens=script.tokens,
        switches=switches,
    )


@lru_cache(maxsize=256)
def _whole_answer(
    path: str, body: bytes, script: Script, model: Model, switches: tuple[tuple[int, int], ...], name: str
) -> bytes:
    parsed, reply = _parsed(path, body), _reply(path, body, script, model, switches)
    if path == MESSAGES:
        return orjson.dumps(messages.whole(_head(path, name), reply))
    if path.startswith("/v1/chat/"):
        return orjson.dumps(shapes.chat(_head(path, name), parsed, reply))
    if path == RESPONSES:
        return orjson.dumps(responses.response(_head(path, name), orjson.loads(body), reply))
    return orjson.dumps(shapes.completion(_head(path, name), parsed, reply, model))


@lru_cache(maxsize=256)
def _stream_events(
    path: str, body: bytes, script: Script, model: Model, switches: tuple[tuple[int, int], ...], name: str
) -> tuple[bytes, ...]:
    parsed, reply = _parsed(path, body), _reply(path, body, script, model, switches)
    if path == RESPONSES:
        made = responses.events(_head(path, name), orjson.loads(body), reply, script.tokens_per_chunk)
        return tuple(responses.sse(event) for event in made)
    if path == MESSAGES:
        return tuple(messages.events(_head(path, name), reply, script.tokens_per_chunk))
    make = shapes.chat_chunks if path.startswith("/v1/chat/") else shapes.completion_chunks
    return tuple(
        shapes.sse(chunk) for chunk in make(_head(path, name), parsed, reply, script.tokens_per_chunk)
    )
