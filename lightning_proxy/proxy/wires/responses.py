"""Responses: ``POST /v1/responses``.

vLLM tells the prompt's and the answer's token ids in the response itself when asked
(``enable_response_messages``), and the logprobs of all tokens beside the answer's text
(``include``). An answer that only calls tools has no text, so that there is no place for logprobs:
calls with function tools go by way of Chat Completions where that means the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from lightning_proxy.proxy.sse import Event, with_data
from lightning_proxy.store import Fidelity, Generation

from .base import Captured, Collector, Json, Prepared, Wire, packed, sampling_of
from .chat import ChatWire
from .choices import SAMPLING_KEYS, Asked, with_fields
from .responses_answer import ResponsesTranslated, ResponsesTranslation
from .responses_request import LOGPROBS, Habits, translate

_CHAT = ChatWire()
_ENDS = frozenset(("response.completed", "response.incomplete", "response.failed"))
_HOLDS_RESPONSE = frozenset(("response.created", "response.in_progress", "response.queued", *_ENDS))


class ResponsesWire(Wire):
    """https://platform.openai.com/docs/api-reference/responses, with vLLM's ways to tell tokens.

    ``habits``: what is known of the engine; without them it is asked for nothing. ``special``: its
    echo of the request's tools that are no plain functions.
    """

    name = "responses"

    def __init__(self, habits: Habits | None = None, special: Sequence[Json] = ()) -> None:
        self._habits = habits
        self._special = special

    def prepare(self, body: bytes, request: Json, *, tokens: bool) -> Prepared:
        """See :class:`Wire`."""
        sampling = _sampling_of(request)
        plain = Prepared(body, NativeCollector(Asked()), sampling)
        habits = self._habits if tokens else None
        if habits is None:
            return plain
        native = _native(request, sampling, plain) if habits.asks else plain
        wanted = habits.translates and request.get("tools")
        translated = translate(request, habits, self._special) if wanted else None
        if translated is None:
            return native
        chat_body, asked = _CHAT.ask(orjson.dumps(translated.chat), translated.chat)
        answer = ResponsesTranslation(translated, habits)
        collector = ResponsesTranslated(_CHAT.collector(asked), answer)
        return Prepared(chat_body, collector, sampling, path="/v1/chat/completions", fallback=native)


def _native(request: Json, sampling: Json, plain: Prepared) -> Prepared:
    """The request as it is, asking for tokens as well where that leaves the answer as it was."""
    include = request.get("include")
    if request.get("background") or not isinstance(include, list | None):
        return plain
    asked = Asked(
        ids=not request.get("enable_response_messages"),
        logprobs=LOGPROBS not in (include or ()),
    )
    extra: Json = {"enable_response_messages": True} if asked.ids else {}
    if asked.logprobs:
        extra["include"] = [*(include or ()), LOGPROBS]
        if request.get("top_logprobs"):
            extra["top_logprobs"] = 0  # they count only for who asks for logprobs
    try:
        body = with_fields(plain.body, request, extra)
    except TypeError:  # nested deeper than orjson writes
        return plain
    return Prepared(body, NativeCollector(asked), sampling, fallback=plain)


def _sampling_of(request: Json) -> Json:
    """The parameters by the names that Chat Completions has for them."""
    sampling = sampling_of(request, SAMPLING_KEYS)
    if request.get("max_output_tokens") is not None:
        sampling["max_tokens"] = request["max_output_tokens"]
    text = request.get("text")
    if isinstance(text, dict) and text.get("format") is not None:
        sampling["response_format"] = text["format"]
    return sampling


class NativeCollector(Collector):
    """Records an answer of ``/v1/responses`` itself, and takes out what was asked for.

    Ids and logprobs come with the whole response only, which is the last event of a stream.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._response: Json | None = None
        self._whole: bytes | None = None
        self._prompt: list[int] = []
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._over = False
        self.ended = False
        self.failed = None
        self.fault = None

    def whole(self, body: bytes) -> bytes:
        """See :class:`Collector`."""
        response = orjson.loads(body)
        changed = self._take(response)
        self._over = response.get("status") in ("completed", "incomplete")
        self._whole = orjson.dumps(response) if changed else body
        return self._whole

    def event(self, event: Event) -> bytes:
        """See :class:`Collector`."""
        if event.data is None or event.data == b"[DONE]":
            return event.raw
        said = orjson.loads(event.data)
        kind = said.get("type")
        if kind == "error" or (kind is None and "error" in said):
            self.failed = event.data.decode()
            return event.raw
        changed = False
        if kind in _HOLDS_RESPONSE:
            changed = self._take(said["response"])
            if kind in _ENDS:
                self._end(said["response"])
        elif kind == "response.output_text.delta" and self._asked.logprobs and said.get("logprobs"):
            said["logprobs"], changed = [], True
        return with_data(event, orjson.dumps(said)) if changed else event.raw

    def _end(self, response: Json) -> None:
        self.ended = True
        self._over = response.get("status") != "failed"
        if not self._over:
            self.failed = orjson.dumps(response.get("error")).decode()

    def _take(self, response: Json) -> bool:
        """Record a response and strip it in place; whether that changed anything."""
        self._response = response
        self._prompt = _tokens_of(response.get("input_messages")) or self._prompt
        self._ids = _tokens_of(response.get("output_messages")) or self._ids
        changed = False
        if self._asked.ids and response.get("input_messages") is not None:
            response["input_messages"] = response["output_messages"] = None
            changed = True
        if self._asked.logprobs and response.get("top_logprobs") is not None:
            response["top_logprobs"] = None
            changed = True
        for item in response.get("output") or ():
            for part in (item.get("content") or ()) if item.get("type") == "message" else ():
                if (logprobs := part.get("logprobs")) is None:
                    continue
                self._logprobs = [entry["logprob"] for entry in logprobs]
                if self._asked.logprobs:
                    part["logprobs"] = None
                    changed = True
        return changed

    @property
    def finished(self) -> bool:
        """See :class:`Collector`."""
        return self._over

    def captured(self) -> Captured:
        """See :class:`Collector`."""
        response = self._response or {}
        generations = self.generations()
        exact = self._over and bool(generations) and len(generations[0].logprobs) > 0
        response_id, usage = response.get("id"), response.get("usage")
        return Captured(
            response=self._whole or orjson.dumps(self._response),
            response_id=response_id if isinstance(response_id, str) else None,
            fidelity=Fidelity.EXACT if exact else Fidelity.TEXT,
            usage=usage if isinstance(usage, dict) else None,
            generations=generations,
        )

    def generations(self) -> tuple[Generation, ...]:
        """See :class:`Collector`."""
        if not self._prompt or not self._ids:
            return ()
        logprobs = self._logprobs if len(self._logprobs) == len(self._ids) else []
        return (
            Generation(
                packed("i", self._prompt), packed("i", self._ids), packed("f", logprobs), self._finish()
            ),
        )

    def _finish(self) -> str | None:
        """Why it ended, in the words of Chat Completions."""
        if not self._over or self._response is None:
            return None
        if self._response.get("status") == "incomplete":
            return "length"
        kinds = {item.get("type") for item in self._response.get("output") or ()}
        return "tool_calls" if "function_call" in kinds else "stop"


def _tokens_of(messages: Any) -> list[int]:
    """The tokens of vLLM's ``input_messages`` or ``output_messages``; [] where they are not told."""
    if not messages or len(messages) != 1 or not isinstance(messages[0], dict):
        return []
    tokens = messages[0].get("tokens")
    return tokens if isinstance(tokens, list) else []
