"""Learns how an engine answers on ``/v1/responses``: what its echo repeats, and with which defaults.

Tiny requests of our own, once per engine: one generates a single token, the others are dropped at
their first event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
import orjson

from .wires.base import CAPTURE_FAULTS, Json
from .wires.responses_request import LOGPROBS, Habits

log = logging.getLogger(__name__)
_PATIENCE = aiohttp.ClientTimeout(total=10)
_AGAIN_S = 30.0  # after a failure
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
    """Asks an engine at ``base`` (``http://host:port/v1``) once, and remembers."""

    def __init__(self, base: str, key: str | None = None) -> None:
        self._base = base.rstrip("/")
        self._key = {"Authorization": f"Bearer {key}"} if key else {}
        self._habits: Habits | None = None
        self._asked_at: float | None = None
        self._lock = asyncio.Lock()

    async def habits(self, model: object, headers: Mapping[str, str]) -> Habits | None:
        """The engine's habits; ``None`` while it does not tell. Asked until it does.

        ``model``: one that it serves; ``headers``: the agent's, for an engine that answers to its
        key only.
        """
        if self._habits is not None or not isinstance(model, str):
            return self._habits
        async with self._lock:
            if self._habits is None and self._is_time():
                key = {name: headers[name] for name in ("Authorization", "x-api-key") if name in headers}
                try:
                    async with aiohttp.ClientSession(headers={**key, **self._key}, timeout=_PATIENCE) as http:
                        self._habits = await self._learn(http, model)
                except _Refused as refusal:
                    if not refusal.passing:
                        self._habits = Habits(asks=False)
                except (aiohttp.ClientError, TimeoutError, *CAPTURE_FAULTS) as error:
                    self._asked_at = time.monotonic()
                    log.warning("%s/responses does not tell its habits: %r", self._base, error)
        return self._habits

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

    async def _begun(self, http: aiohttp.ClientSession, model: str, choice: str) -> Json:
        """The response in the first event of a stream that has no limit of its own."""
        form = {"text": {"format": {"type": "text"}}, "stream": True}
        body = {"model": model, "input": "x", "tools": [_FUNCTION], "tool_choice": choice, **form}
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
