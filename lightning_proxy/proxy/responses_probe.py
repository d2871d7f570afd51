"""Learns how an engine answers on ``/v1/responses``: what its echo repeats, and with which defaults.

Tiny requests of our own, once per engine: one generates a single token, the others are dropped at
their first event. One more of these for each set of tools that are not all plain functions.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, TypeVar

import aiohttp
import orjson

from .wires.base import CAPTURE_FAULTS, Json
from .wires.responses_request import LOGPROBS, Habits

log = logging.getLogger(__name__)
_PATIENCE = aiohttp.ClientTimeout(total=10)
_AGAIN_S = 30.0  # after a failure
_SETS = 256  # of tools; the echo of Codex's is 10 kB
_Told = TypeVar("_Told")
_PASSING = frozenset((401, 403, 404, 408, 429))

# What vLLM 0.31 repeats: another shape is not imitated.
_SHELL = frozenset(
    ("id", "created_at", "incomplete_details", "instructions", "metadata", "model", "object", "output",
     "parallel_tool_calls", "temperature", "tool_choice", "tools", "top_p", "background",
     "max_output_tokens", "max_tool_calls", "previous_response_id", "prompt", "reasoning",
     "service_tier", "status", "text", "top_logprobs", "truncation", "usage", "user",
     "presence_penalty", "frequency_penalty", "kv_transfer_params", "ec_transfer_params",
     "input_messages", "output_messages")
)  # fmt: skip
_TOOL = frozenset(
    ("name", "parameters", "strict", "type", "allowed_callers", "defer_loading", "description",
     "output_schema")
)  # fmt: skip
_NEWER = frozenset(("async",))  # where the engine's openai package is 3.0 or later
_MESSAGE = frozenset(("id", "content", "role", "status", "type", "phase"))


class _Refused(Exception):
    """The engine answered with an error. ``passing``: another moment, or another key, may differ."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.passing = status in _PASSING or status >= 500


class ResponsesProbe:
    """Asks an engine at ``base`` (``http://host:port/v1``) once, and remembers.

    Everywhere, ``model`` is one that it serves, and ``headers`` are the agent's, for an engine that
    answers to its key only.
    """

    def __init__(self, base: str, key: str | None = None) -> None:
        self._base = base.rstrip("/")
        self._key = {"Authorization": f"Bearer {key}"} if key else {}
        self._habits: Habits | None = None
        self._echoes: OrderedDict[bytes, Sequence[Json]] = OrderedDict()  # the one last used at the end
        self._asked_at: float | None = None
        self._lock = asyncio.Lock()

    async def habits(self, model: object, headers: Mapping[str, str]) -> Habits | None:
        """The engine's habits; ``None`` while it does not tell. Asked until it does."""
        if self._habits is not None or not isinstance(model, str):
            return self._habits
        async with self._lock:
            if self._habits is None:
                refused = Habits(asks=False)
                self._habits = await self._ask(headers, lambda http: self._learn(http, model), refused)
        return self._habits

    async def echo(self, tools: list[Json], model: object, headers: Mapping[str, str]) -> Sequence[Json]:
        """How the engine repeats tools that are no plain functions.

        () where it does not tell, and where it does not answer with them as with plain functions.
        """
        if not tools or not isinstance(model, str):
            return ()
        try:
            digest = sha256(orjson.dumps(tools)).digest()
        except TypeError:  # nested deeper than orjson writes
            return ()
        async with self._lock:
            if digest not in self._echoes:
                no: Sequence[Json] = ()
                told = await self._ask(headers, lambda http: self._repeated(http, model, tools), no)
                if told is None:
                    return ()
                self._echoes[digest] = told
                if len(self._echoes) > _SETS:
                    self._echoes.popitem(last=False)
            self._echoes.move_to_end(digest)
            return self._echoes[digest]

    async def _ask(
        self,
        headers: Mapping[str, str],
        question: Callable[[aiohttp.ClientSession], Awaitable[_Told]],
        refused: _Told,
    ) -> _Told | None:
        """What the engine tells, ``refused`` where it never will, ``None`` where it may another time."""
        if not self._is_time():
            return None
        key = {name: headers[name] for name in ("Authorization", "x-api-key") if name in headers}
        try:
            async with aiohttp.ClientSession(headers={**key, **self._key}, timeout=_PATIENCE) as http:
                return await question(http)
        except _Refused as refusal:
            return None if refusal.passing else refused
        except (aiohttp.ClientError, TimeoutError, *CAPTURE_FAULTS) as error:
            self._asked_at = time.monotonic()
            log.warning("%s/responses does not tell its habits: %r", self._base, error)
        return None

    def _is_time(self) -> bool:
        return self._asked_at is None or time.monotonic() - self._asked_at > _AGAIN_S

    async def _learn(self, http: aiohttp.ClientSession, model: str) -> Habits:
        shell = await self._one_token(http, model)
        if not (shell.get("input_messages") and shell["input_messages"][0].get("tokens")):
            return Habits(asks=False)
        tool = shell["tools"][0]
        messages = [item for item in shell["output"] if item["type"] == "message"]
        known = shell.keys() == _SHELL and tool.keys() - _NEWER == _TOOL
        if not known or any(message.keys() != _MESSAGE for message in messages):
            log.info("%s/responses answers in a shape of its own: function tools go as they are", self._base)
            return Habits(asks=True)
        if await self._stores(http, shell["id"]):
            return Habits(asks=True)  # what it has not answered itself, it could not build upon
        try:
            forces = (await self._begun(http, model, "required"))["text"] is None  # a grammar replaces it
        except _Refused:
            forces = False
        limit = int((await self._begun(http, model, "auto"))["max_output_tokens"])
        length = await self._max_model_len(http, model)
        room = length - int(shell["usage"]["input_tokens"])
        return Habits(
            asks=True,
            shell=shell,
            tool={**dict.fromkeys(tool), "type": "function"},
            max_model_len=length,
            limit=None if limit >= room else limit,
            forces_tools=forces,
        )

    async def _one_token(self, http: aiohttp.ClientSession, model: str) -> Json:
        """A whole response, with every field shown that a request may set."""
        asked = {"enable_response_messages": True, "include": [LOGPROBS], "reasoning": {}, "text": {}}
        body = {"model": model, "input": "x", "max_output_tokens": 1, "tools": [_FUNCTION], **asked}
        return dict(await _json(http, "POST", f"{self._base}/responses", body))

    async def _repeated(self, http: aiohttp.ClientSession, model: str, tools: list[Json]) -> Sequence[Json]:
        begun = await self._begun(http, model, "auto", tools)
        told: list[Json] = begun["tools"][1:]
        same = [tool["type"] for tool in told] == [tool["type"] for tool in tools]
        return told if same and begun["text"] is not None else ()  # null: a grammar took its place

    async def _begun(
        self, http: aiohttp.ClientSession, model: str, choice: str, tools: Sequence[Json] = ()
    ) -> Json:
        """The response in the first event of a stream that has no limit of its own."""
        form = {"text": {"format": {"type": "text"}}, "stream": True}
        body = {"model": model, "input": "x", "tools": [_FUNCTION, *tools], "tool_choice": choice, **form}
        async with http.post(f"{self._base}/responses", json=body) as answer:
            if answer.status >= 400:
                raise _Refused(answer.status)
            async for line in answer.content:
                if line.startswith(b"data: "):
                    return dict(orjson.loads(line.removeprefix(b"data: "))["response"])
        raise ValueError("a stream without an event")

    async def _stores(self, http: aiohttp.ClientSession, response_id: str) -> bool:
        async with http.get(f"{self._base}/responses/{response_id}") as answer:
            return answer.status < 400

    async def _max_model_len(self, http: aiohttp.ClientSession, model: str) -> int:
        """Tokens of the longest prompt with its answer; an adapter has its base model's."""
        cards = (await _json(http, "GET", f"{self._base}/models"))["data"]
        of_model = [card for card in cards if card.get("id") == model] + cards
        lengths = [int(card["max_model_len"]) for card in of_model if card.get("max_model_len")]
        return lengths[0]


# Some templates want a description and parameters.
_FUNCTION = {
    "type": "function",
    "name": "f",
    "description": "x",
    "parameters": {"type": "object", "properties": {}},
}


async def _json(http: aiohttp.ClientSession, method: str, url: str, body: Json | None = None) -> Any:
    async with http.request(method, url, json=body) as answer:
        if answer.status >= 400:
            raise _Refused(answer.status)
        return orjson.loads(await answer.read())
