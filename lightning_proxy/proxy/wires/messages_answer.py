"""A Chat Completions answer as the Messages answer that vLLM makes of it, event for event.

Source of the mapping: vllm/entrypoints/anthropic/{protocol,serving}.py of vLLM 0.31, down to the
order of fields and to which of them are left out.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import msgspec
import orjson

from .base import Json
from .messages_native import MessageRecord
from .translated import Refused, Translation

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _DeltaCall(msgspec.Struct):
    index: int
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_DeltaCall] = []  # msgspec copies it


class _DeltaChoice(msgspec.Struct):
    delta: _Delta
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None
    created_cache_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _Cached | None = None


class _Chunk(msgspec.Struct):
    id: str
    model: str
    choices: list[_DeltaChoice]
    usage: _Usage | None = None


class _WholeFunction(msgspec.Struct):
    name: str
    arguments: str


class _WholeCall(msgspec.Struct):
    id: str
    function: _WholeFunction


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_WholeCall] = []  # msgspec copies it


class _WholeChoice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Answer(msgspec.Struct):
    id: str
    model: str
    choices: list[_WholeChoice]
    usage: _Usage
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None


class MessagesTranslation(Translation):
    """The way back of one call.

    A stream's state is the content block that is open: at most one, and all deltas are its own.
    """

    def __init__(self) -> None:
        self._record = MessageRecord()
        self._whole: Json | None = None
        self._started = False
        self._failed = False
        self._index = 0  # of the open block, or of the next one
        self._open: str | None = None  # type of the open block
        self._open_call: str | None = None  # id of the tool call that the open block is
        self._held: list[str] = []  # text that came while a tool call was open
        self._calls: dict[int, str] = {}  # ids of tool calls, by the index that names them later
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None

    # -- whole answers -----------------------------------------------------------------------

    def whole(self, answer: Json) -> Json:
        """See :class:`Translation`."""
        chat = msgspec.convert(answer, _Answer)
        choice = chat.choices[0]
        message: Json = {
            "id": chat.id,
            "type": "message",
            "role": "assistant",
            "content": _blocks(choice.message),
            "model": chat.model,
        }
        if choice.finish_reason == "stop" and isinstance(choice.stop_reason, str):
            message |= {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
        elif choice.finish_reason in _STOP_REASONS:
            message["stop_reason"] = _STOP_REASONS[choice.finish_reason]
        message["usage"] = _usage(chat.usage)
        for name in ("kv_transfer_params", "ec_transfer_params"):
            if answer.get(name) is not None:
                message[name] = answer[name]
        self._whole = message
        return message

    # -- streams -----------------------------------------------------------------------------

    def chunk(self, chunk: Json) -> bytes:
        """See :class:`Translation`. Nothing is written of a chunk that is not understood throughout."""
        if self._failed:
            return b""
        chat = msgspec.convert(chunk, _Chunk)
        if not self._started:
            return self._start(chat)
        if not chat.choices:
            return self._close() + self._end(chat.usage)
        choice = chat.choices[0]
        if choice.finish_reason is not None:
            self._finish_reason, self._stop_reason = choice.finish_reason, choice.stop_reason
        delta, made = choice.delta, b""
        if delta.reasoning:
            made += self._thought(delta.reasoning)
        if delta.content:
            made += self._text(delta.content)
        return made + b"".join([self._call(call) for call in delta.tool_calls])

    def done(self) -> bytes:
        """See :class:`Translation`."""
        return b"" if self._failed else self._close() + self._event({"type": "message_stop"})

    def failed(self, error: Json) -> bytes:
        """See :class:`Translation`. vLLM says nothing more after an error, nor closes what is open."""
        self._failed = True
        said = {"type": "internal_error", "message": str(error["message"])}
        return self._event({"type": "error", "error": said})

    def _start(self, chat: _Chunk) -> bytes:
        self._started = True
        message: Json = {
            "id": chat.id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": chat.model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(chat.usage),
        }
        return self._event({"type": "message_start", "message": message})

    def _end(self, usage: _Usage | None) -> bytes:
        if isinstance(self._stop_reason, str):
            delta: Json = {"stop_reason": "stop_sequence", "stop_sequence": self._stop_reason}
        else:
            reason = _STOP_REASONS.get(self._finish_reason or "stop")
            delta = {"stop_reason": reason, "stop_sequence": None}
        return self._event({"type": "message_delta", "delta": delta, "usage": _usage(usage)})

    def _thought(self, text: str) -> bytes:
        made = b""
        if self._open != "thinking":
            made = self._close() + self._begin({"type": "thinking", "thinking": ""})
        return made + self._delta({"type": "thinking_delta", "thinking": text})

    def _text(self, text: str) -> bytes:
        if self._open == "tool_use":
            # More of the call may follow: the text waits until its block is closed.
            self._held.append(text)
            return b""
        made = b""
        if self._open != "text":
            made = self._close() + self._begin({"type": "text", "text": ""})
        return made + self._delta({"type": "text_delta", "text": text})

    def _call(self, call: _DeltaCall) -> bytes:
        made, function = b"", call.function or _Function()
        if call.id is None:
            call_id = self._calls.get(call.index)
        else:
            call_id = self._calls[call.index] = call.id
            if function.name is not None and self._open_call != call_id:
                made = self._close() + self._begin(
                    {"type": "tool_use", "id": call_id, "name": function.name, "input": {}}
                )
        if function.arguments and call_id is not None and self._open_call == call_id:
            made += self._delta({"type": "input_json_delta", "partial_json": function.arguments})
        return made

    # -- blocks ------------------------------------------------------------------------------

    def _begin(self, block: Json) -> bytes:
        self._open, self._open_call = block["type"], block.get("id")
        return self._event({"type": "content_block_start", "content_block": block, "index": self._index})

    def _delta(self, delta: Json) -> bytes:
        return self._event({"type": "content_block_delta", "delta": delta, "index": self._index})

    def _close(self) -> bytes:
        """Close the open block, if there is one, and say the text that waited for that."""
        made = self._stop()
        if self._held:
            text, self._held = "".join(self._held), []
            made += self._begin({"type": "text", "text": ""})
            made += self._delta({"type": "text_delta", "text": text})
            made += self._stop()
        return made

    def _stop(self) -> bytes:
        if self._open is None:
            return b""
        made = b""
        if self._open == "thinking":
            made = self._delta({"type": "signature_delta", "signature": uuid.uuid4().hex})
        made += self._event({"type": "content_block_stop", "index": self._index})
        self._open = self._open_call = None
        self._index += 1
        return made

    def _event(self, event: Json) -> bytes:
        self._record.take(event)
        name: str = event["type"]
        return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"

    # -- the rest ----------------------------------------------------------------------------

    def refusal(self, body: Json) -> Json:
        """See :class:`Translation`.

        Errors of vLLM's handlers have a shape of their own here; those of its server (a wrong
        content type, a missing key) have the same one everywhere, and raise ValueError.
        """
        error = body["error"]
        kind, message = error["type"], error["message"]
        if not kind.endswith("Error") or not isinstance(message, str):
            raise ValueError("an error of the server")
        return {"type": "error", "error": {"type": kind, "message": message}}

    def response(self) -> Json:
        """See :class:`Translation`."""
        return self._record.whole() if self._whole is None else self._whole


def _blocks(message: _Message) -> list[Json]:
    blocks: list[Json] = []
    if message.reasoning:
        thought = {"type": "thinking", "thinking": message.reasoning, "signature": uuid.uuid4().hex}
        blocks.append(thought)
    if message.content:
        blocks.append({"type": "text", "text": message.content})
    # All are read before one is written: that is the order in which vLLM fails.
    for call, parsed in [(call, _parsed(call.function.arguments)) for call in message.tool_calls]:
        block: Json = {"type": "tool_use", "id": call.id, "name": call.function.name}
        blocks.append(block if parsed is None else {**block, "input": _written(parsed)})
    return blocks or [{"type": "text", "text": ""}]


def _parsed(arguments: str) -> Json | None:
    """A call's arguments; None for null, which vLLM leaves out.

    Raises Refused where vLLM fails on them, and so answers with an error in place of the message.
    """
    try:
        parsed = json.loads(arguments)
    except ValueError as error:
        raise Refused(400, _error(str(error))) from error
    if parsed is not None and not isinstance(parsed, dict):
        raise Refused(400, _error("the input of a tool call is not an object"))
    return parsed


def _written(arguments: Json) -> orjson.Fragment:
    """Arguments as Python's own JSON writes them: integers of any length. Raises Refused."""
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return orjson.Fragment(text.encode())
    except ValueError as error:  # numbers and characters that JSON has no word for
        said = {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}
        raise Refused(400, {"error": said}) from error


def _error(message: str) -> Json:
    return {"type": "error", "error": {"type": "BadRequestError", "message": message}}


def _usage(usage: _Usage | None) -> Json:
    """Tokens read and written; of those read, the cached ones apart where the engine tells them."""
    if usage is None:
        return {"input_tokens": 0, "output_tokens": 0}
    cached = usage.prompt_tokens_details or _Cached()
    read = usage.prompt_tokens - (cached.cached_tokens or 0) - (cached.created_cache_tokens or 0)
    made = {"input_tokens": max(0, read), "output_tokens": usage.completion_tokens or 0}
    if cached.created_cache_tokens is not None:
        made["cache_creation_input_tokens"] = cached.created_cache_tokens
    if cached.cached_tokens is not None:
        made["cache_read_input_tokens"] = cached.cached_tokens
    return made
