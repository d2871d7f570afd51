"""Chat Completions answers in the words of Responses, as vLLM 0.31 itself would have put them.

A stream is one item after the other; each is opened, grows, and is closed when another kind of
content begins. Its last event holds the whole response anew, for which vLLM parses the whole text
again: the items there have other ids, arguments are JSON written anew, and a tool call that cannot
be read is text.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import msgspec
import orjson

from .base import CAPTURE_FAULTS, Json
from .choices import ChoicesCollector
from .responses_request import Habits, Translated
from .translated import TranslatedCollector, Translation

_TOOL_CALL = "<tool_call>"
_NO_CHARACTERS = re.compile("\ufffd+")
_TOOL_CALLS = re.compile(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.DOTALL)


@dataclass(slots=True)
class _Item:
    """The item of a stream that is open."""

    kind: str  # "content", "reasoning" or "tool_call"
    index: int | None = None  # of a tool call, as the engine counts them
    name: str = ""  # as the model calls it
    call_id: str = ""  # as the engine calls it
    item_id: str = field(default_factory=lambda: _hex())
    public_call_id: str = field(default_factory=lambda: f"call_{_hex()}")
    text: str = ""
    grown: bool = False


class ResponsesTranslation(Translation):
    """One call's answer on its way back."""

    def __init__(self, asked: Translated, habits: Habits) -> None:
        assert habits.shell is not None
        self._echo = asked.echo
        self._names = asked.names
        self._shell = habits.shell
        self._habits = habits
        self._id = f"resp_{_hex()}"
        self._created = int(time.time())
        self._model: str | None = None
        self._prompt_tokens: int | None = None
        self._tokens: list[str] = []  # what was generated, as the engine spells it
        self._finish: str | None = None
        self._stop: object = None
        self._usage: Json | None = None
        self._number = 0  # of the next event
        self._items: list[_Item] = []
        self._open = False  # the last item is not closed yet
        self._response: Json | None = None

    # -- what capture sees and the agent does not ----------------------------------------------

    def hear(self, data: bytes) -> None:
        """Take an answer or a chunk as the engine sent it."""
        heard = _HEARD.decode(data)
        if heard.prompt_token_ids is not None:
            self._prompt_tokens = len(heard.prompt_token_ids)
        for choice in heard.choices or ():
            if choice.logprobs is not None:
                self._tokens += [token.token for token in choice.logprobs.content or ()]

    # -- the ways in -----------------------------------------------------------------------------

    def whole(self, answer: Json) -> Json:
        """See :class:`Translation`."""
        self._begin(answer)
        (choice,) = answer["choices"]
        message, self._finish, self._usage = choice["message"], choice["finish_reason"], answer["usage"]
        if not isinstance(self._finish, str):
            raise ValueError("the answer has no finish reason")
        calls = [
            (call["id"], call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls") or ()
        ]
        output = self._output(message.get("reasoning"), message.get("content"), calls)
        self._response = self._made(output, self._status(), self._told_usage())
        return self._response

    def chunk(self, chunk: Json) -> bytes:
        """See :class:`Translation`."""
        events: list[Json] = []
        if self._model is None:
            self._begin(chunk)
            events += self._first_events()
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0) != 0:
                raise ValueError("more than one choice")
            for part in _parts(choice.get("delta") or {}):
                events += self._grow(part)
            if choice.get("finish_reason") is not None:
                self._finish, self._stop = str(choice["finish_reason"]), choice.get("stop_reason")
        return self._sent(events)

    def done(self) -> bytes:
        """See :class:`Translation`. Raises ValueError where the answer is not whole."""
        if self._finish is None or self._usage is None:
            raise ValueError("the stream ended without a finish reason, or without its usage")
        events = list(self._close())
        self._response = self._made(self._final_output(), self._status(), self._told_usage())
        events.append({"response": self._response, "sequence_number": 0, "type": "response.completed"})
        return self._sent(events)

    def failed(self, error: Json) -> bytes:
        """See :class:`Translation`. vLLM breaks a Responses stream off where its engine fails."""
        raise ValueError(f"the engine failed: {error}")

    def refusal(self, body: Json) -> Json:
        """See :class:`Translation`. Errors have one shape on both routes."""
        return body

    def response(self) -> Json:
        """See :class:`Translation`."""
        if self._response is None:
            return self._made(self._final_output(), "in_progress", None)
        return self._response

    # -- the response ----------------------------------------------------------------------------

    def _begin(self, answer: Json) -> None:
        self._model, self._created = str(answer["model"]), int(answer["created"])

    def _made(self, output: list[Json], status: str, usage: Json | None) -> Json:
        limit = self._echo["max_output_tokens"]
        if limit is None:
            room = self._habits.max_model_len - (self._prompt_tokens or 0)
            limit = room if self._habits.limit is None else min(room, self._habits.limit)
        made = {
            **self._shell,
            **self._echo,
            "id": self._id,
            "created_at": self._created,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._model,
            "output": output,
            "max_output_tokens": limit,
            "status": status,
            "usage": usage,
        }
        return {**made, "top_logprobs": None, "input_messages": None, "output_messages": None}

    def _status(self) -> str:
        return "incomplete" if self._finish == "length" else "completed"

    def _told_usage(self) -> Json:
        usage = self._usage or {}
        read, written = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        cached = usage.get("prompt_tokens_details") or {}
        made = usage.get("completion_tokens_details") or {}
        return {
            "input_tokens": read,
            "input_tokens_details": {
                "cached_tokens": cached.get("cached_tokens") or 0,
                "cache_write_tokens": cached.get("created_cache_tokens") or 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": written,
            "output_tokens_details": {
                "reasoning_tokens": made.get("reasoning_tokens") or 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": read + written,
        }

    def _final_output(self) -> list[Json]:
        """The items of a stream as its last event holds them."""
        reasoning = "".join(item.text for item in self._items if item.kind == "reasoning")
        content = "".join(item.text for item in self._items if item.kind == "content")
        calls = [item for item in self._items if item.kind == "tool_call"]
        if self._echo["tool_choice"] == "none":
            return self._output(reasoning, content, [])
        text = self._text()
        spelled = not reasoning and text.startswith(content)
        made: list[tuple[str, str, str]]
        if spelled and _TOOL_CALL in text:
            content, made = _parsed(text)
        elif spelled and not calls and _TOOL_CALL.startswith(text[len(content) :]):
            content, made = text, []  # the stream held back what might have become a call
        else:
            try:
                made = [(call.call_id, call.name, _rewritten(call.text)) for call in calls]
            except ValueError:
                content, made = text or content, []
        return self._output(reasoning, "" if made and not content.strip() else content, made)

    def _text(self) -> str:
        """The whole text that was generated, tool calls and all.

        Put together from the engine's spelling of the tokens, and from the stream, whose texts are
        exact, but lack what became of no item.
        """
        stopped = isinstance(self._stop, str)
        ended = self._finish == "length" or stopped  # else the last token is one that is no text
        text = _spelled(self._tokens if ended else self._tokens[:-1])
        if isinstance(self._stop, str) and self._stop in text:
            text = text[: text.rindex(self._stop)]
        at = 0
        for item in self._items:
            pieces = [re.escape(piece) for piece in _NO_CHARACTERS.split(item.text)]
            if (found := re.compile("\ufffd*".join(pieces)).search(text, at)) is not None:
                text = text[: found.start()] + item.text + text[found.end() :]
                at = found.start() + len(item.text)
        return text

    # -- the events ------------------------------------------------------------------------------

    def _first_events(self) -> Iterator[Json]:
        begun = self._made([], "in_progress", None)
        for kind in ("response.created", "response.in_progress"):
            yield {"response": begun, "sequence_number": 0, "type": kind}

    def _grow(self, part: Json) -> Iterator[Json]:
        kind, delta, call = part["kind"], part["text"], part.get("call") or {}
        item = self._items[-1] if self._open else None
        if item is None or item.kind != kind or (kind == "tool_call" and item.index != call["index"]):
            yield from self._close()
            item = _Item(kind)
            if kind == "tool_call":
                item.index, item.call_id = call["index"], call["id"]
                item.name = call["function"]["name"]
            self._items.append(item)
            self._open = True
            yield from self._opened(item)
        item.text += delta
        if kind != "tool_call" or delta:
            item.grown = True
            yield self._delta(item, delta)

    def _opened(self, item: _Item) -> Iterator[Json]:
        at = len(self._items) - 1
        begun: Json
        if item.kind == "tool_call":
            begun = self._call(item.item_id, item.public_call_id, item.name, "", "in_progress")
        elif item.kind == "content":
            begun = _message(item.item_id, [], "in_progress")
        else:
            begun = _thought(item.item_id, None, "in_progress")
        yield {"item": begun, "output_index": at, "sequence_number": 0, "type": "response.output_item.added"}
        part: Json
        if item.kind == "content":
            part = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
            yield self._at(item, {"part": part}, "response.content_part.added")
        elif item.kind == "reasoning":
            part = {"text": "", "type": "reasoning_text"}
            yield self._at(item, {"part": part}, "response.reasoning_part.added")

    def _delta(self, item: _Item, delta: str) -> Json:
        if item.kind == "content":
            return self._at(item, {"delta": delta, "logprobs": []}, "response.output_text.delta")
        if item.kind == "reasoning":
            return self._at(item, {"delta": delta}, "response.reasoning_text.delta")
        return self._at(item, {"delta": delta}, "response.function_call_arguments.delta")

    def _close(self) -> Iterator[Json]:
        if not self._open:
            return
        item, self._open = self._items[-1], False
        whole: Json
        part: Json
        if item.kind == "content":
            part = {"annotations": [], "text": item.text, "type": "output_text", "logprobs": None}
            yield self._at(item, {"logprobs": [], "text": item.text}, "response.output_text.done")
            yield self._at(item, {"part": part}, "response.content_part.done")
            content = [part] if item.text else []
            whole = {**_message(item.item_id, content, "completed"), "summary": []}
        elif item.kind == "reasoning":
            part = {"text": item.text, "type": "reasoning_text"}
            yield self._at(item, {"text": item.text}, "response.reasoning_text.done")
            yield self._at(item, {"part": part}, "response.reasoning_part.done")
            whole = _thought(item.item_id, [part], "completed")
        else:
            if item.grown:
                said = {"arguments": item.text, "name": self._named(item.name)["name"]}
                yield self._at(item, said, "response.function_call_arguments.done")
            whole = self._call(item.item_id, item.public_call_id, item.name, item.text, "completed")
        at = len(self._items) - 1
        yield {"item": whole, "output_index": at, "sequence_number": 0, "type": "response.output_item.done"}

    def _output(
        self, reasoning: str | None, content: str | None, calls: list[tuple[str, str, str]]
    ) -> list[Json]:
        """The items of a whole response; ``calls`` are (call id, name, arguments)."""
        items: list[Json] = []
        if reasoning:
            items.append(_thought(f"rs_{_hex()}", [{"text": reasoning, "type": "reasoning_text"}], None))
        if content:
            part: Json = {"annotations": [], "text": content, "type": "output_text", "logprobs": None}
            items.append(_message(f"msg_{_hex()}", [part], "completed"))
        for call_id, name, arguments in calls:
            items.append(self._call(f"fc_{_hex()}", call_id, name, arguments, "completed"))
        return items

    def _call(self, item_id: str, call_id: str, name: str, arguments: str, status: str) -> Json:
        named = self._named(name)
        item = {"arguments": arguments, "call_id": call_id, "name": named["name"], "type": "function_call"}
        unset = ("async", "caller") if self._habits.newer else ("caller",)
        late = {**dict.fromkeys(unset), "namespace": named["namespace"], "status": status}
        return {**item, "id": item_id, **late}

    def _named(self, name: str) -> Json:
        """The ``name`` and ``namespace`` of what the model calls ``name``."""
        return self._names.get(name) or {"name": name, "namespace": None}

    def _at(self, item: _Item, said: Json, kind: str) -> Json:
        place: Json = {"item_id": item.item_id, "output_index": len(self._items) - 1}
        if item.kind != "tool_call":
            place["content_index"] = 0
        return {**place, **said, "sequence_number": 0, "type": kind}

    def _sent(self, events: list[Json]) -> bytes:
        sent = []
        for event in events:
            event["sequence_number"] = self._number
            self._number += 1
            ordered = dict(sorted(event.items()))
            if "name" in ordered and self._habits.newer:  # a field that this event's type lacks
                ordered["name"] = ordered.pop("name")
            sent.append(b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(ordered) + b"\n\n")
        return b"".join(sent)


class ResponsesTranslated(TranslatedCollector):
    """A translated collector whose translation hears what capture takes out as well."""

    def __init__(self, chat: ChoicesCollector, translation: ResponsesTranslation) -> None:
        super().__init__(chat, translation)
        self._hears = translation

    def _recorded(self, take: Any, data: bytes) -> bytes | None:
        try:
            self._hears.hear(data)
        except CAPTURE_FAULTS as error:
            self.fault = self.fault or error
        return super()._recorded(take, data)


class _Token(msgspec.Struct):
    token: str


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None


class _HeardChoice(msgspec.Struct):
    logprobs: _Logprobs | None = None


class _Heard(msgspec.Struct):
    choices: list[_HeardChoice] | None = None
    prompt_token_ids: list[int] | None = None


_HEARD = msgspec.json.Decoder(_Heard)


# -- pieces --------------------------------------------------------------------------------------


def _parts(delta: Json) -> Iterator[Json]:
    """What one delta adds, one kind and one tool call at a time, in the order that vLLM keeps."""
    if delta.get("reasoning") is not None:
        yield {"kind": "reasoning", "text": delta["reasoning"]}
    if delta.get("content"):
        yield {"kind": "content", "text": delta["content"]}
    calls: dict[int, Json] = {}
    for call in delta.get("tool_calls") or ():
        known = calls.setdefault(call["index"], {"kind": "tool_call", "text": "", "call": call})
        known["text"] += (call.get("function") or {}).get("arguments") or ""
    yield from calls.values()


def _message(item_id: str, content: list[Json], status: str) -> Json:
    item = {"id": item_id, "content": content, "role": "assistant", "status": status}
    return {**item, "type": "message", "phase": None}


def _thought(item_id: str, content: list[Json] | None, status: str | None) -> Json:
    item = {"id": item_id, "summary": [], "type": "reasoning", "content": content}
    return {**item, "encrypted_content": None, "status": status}


def _spelled(tokens: list[str]) -> str:
    """The text of tokens, of which those that end within a character are spelled as nothing.

    The one that completes it spells all of it; where none does, the text has U+FFFD for each.
    """
    made, waiting = [], 0
    for token in tokens:
        if not token:
            waiting += 1
            continue
        made.append("\ufffd" * waiting + token if token.isascii() else token)
        waiting = 0
    return "".join(made)


def _parsed(text: str) -> tuple[str, list[tuple[str, str, str]]]:
    """Content and calls of a whole text with tagged calls; all of it content where one is broken."""
    try:
        calls = []
        for closed, open_ended in _TOOL_CALLS.findall(text):
            call = json.loads(closed or open_ended)
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            calls.append((f"chatcmpl-tool-{_hex()}", str(call["name"]), arguments))
    except (ValueError, KeyError, TypeError, RecursionError):
        return text, []
    return text[: text.index(_TOOL_CALL)], calls


def _rewritten(arguments: str) -> str:
    """Arguments as vLLM's parsers write them. Raises ValueError where they are no JSON."""
    return json.dumps(json.loads(arguments), ensure_ascii=False)


def _hex() -> str:
    return uuid4().hex[:16]
