"""What is wrong in calls that ended well, and in what agents send back. No I/O.

Read from the protocols' own fields: refusals, answers cut at their token limit, tool calls that do not fit
the tools that were offered, results of tools that report an error (``tool_results``), agents that
repeat themselves (``loops``). Only what is configured is guessed at by words.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import orjson

from lightning_proxy.config.settings import FailureSettings
from lightning_proxy.store import INFRASTRUCTURE, ErrorClass, Finding, Span

from .conversation import Json, canonical, spoken
from .loops import Loops
from .tool_results import Results, failure_of
from .tool_schemas import misfit
from .wires.base import CAPTURE_FAULTS

log = logging.getLogger(__name__)

_LONGEST_DETAIL = 500
_LOOKED_INTO = 2000  # characters that a configured pattern is looked for in
_LONG = 32_768  # bytes
_READ = frozenset(
    ("message", "text", "finish_reason", "output", "incomplete_details", "content", "stop_reason")
)
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OBJECTS = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_ANY = msgspec.json.Decoder()
_TRUNCATED = frozenset(("length", "max_tokens", "max_output_tokens", "model_context_window_exceeded"))
# Who tries again after such an error is no agent in a loop; who repeats what was refused may be.
_NOT_ITS_DOING = INFRASTRUCTURE - {ErrorClass.UPSTREAM_REFUSED}
_REFUSED = frozenset(("content_filter", "refusal"))


class Choice(NamedTuple):
    """One choice of an answer, whatever API it came by."""

    ending: str | None  # why it ended, in the API's word
    text: str
    refusal: str | None
    calls: list[tuple[Any, Any, Any]]  # id, name, arguments (text, or a value)


class Findings:
    """Looks at each call once it has ended. Never raises: what cannot be read has no findings."""

    def __init__(self, settings: FailureSettings) -> None:
        self._loops = Loops(settings.loop_after)
        self._results = Results()
        self._tool_errors = [re.compile(pattern) for pattern in settings.tool_error_patterns]
        self._refusals = [re.compile(pattern) for pattern in settings.refusal_patterns]

    def of(self, span: Span, request: Json) -> tuple[Finding, ...]:
        """What is wrong in this call; ``request`` is its body, parsed."""
        if not request:  # of an encoding that we cannot read
            return ()
        found: list[Finding] = []
        try:
            choices = choices_of(_read(span.response)) if span.response is not None else []
            if choices:
                found += self._in_answer(span.wire, request, choices)
            found += self._in_request(span, request)
            found += self._repetition(span, request, choices)
        except CAPTURE_FAULTS as error:
            log.debug("a %s call cannot be looked through: %r", span.wire, error)
        return tuple(found)

    def _in_answer(self, wire: str, request: Json, choices: list[Choice]) -> Iterator[Finding]:
        for choice in choices:
            if choice.refusal or choice.ending in _REFUSED:
                yield _finding(ErrorClass.REFUSAL, choice.refusal or f"it ended by {choice.ending}")
            elif any(pattern.search(choice.text, 0, _LOOKED_INTO) for pattern in self._refusals):
                yield _finding(ErrorClass.REFUSAL, choice.text)
            if choice.ending in _TRUNCATED:
                yield _finding(ErrorClass.TRUNCATED, f"it ended by {choice.ending}")
                continue  # what is cut off cannot be well-formed
            for id_, name, arguments in choice.calls:
                if (wrong := misfit(request, name, arguments)) is not None:
                    yield _finding(ErrorClass.MALFORMED_TOOL_CALL, wrong, id_)

    def _in_request(self, span: Span, request: Json) -> Iterator[Finding]:
        if span.retry:  # what is sent again was seen before
            return
        for result in self._results.new(span, request):
            if (said := failure_of(result, self._tool_errors)) is not None:
                yield _finding(ErrorClass.TOOL_FAILURE, said, result.call_id)

    def _repetition(self, span: Span, request: Json, choices: list[Choice]) -> Iterator[Finding]:
        if span.retry or span.error_class in _NOT_ITS_DOING:
            return
        if (repeats := self._loops.seen(span, request, _normal(choices))) is not None:
            yield _finding(ErrorClass.AGENT_LOOP, repeats)


def _read(response: bytes) -> Json:
    """An answer; of a long one without the logprobs that make it long."""
    if len(response) <= _LONG:
        parsed: Json = orjson.loads(response)
        return parsed
    head = _OBJECT.decode(response)
    if "choices" not in head:
        return {key: _ANY.decode(value) for key, value in head.items() if key in _READ}
    choices = _OBJECTS.decode(head["choices"])
    return {"choices": [{k: _ANY.decode(v) for k, v in choice.items() if k in _READ} for choice in choices]}


def choices_of(response: Json) -> list[Choice]:
    """The choices of an answer; by its shape it is seen which API it is of. Raises as odd shapes do."""
    if "choices" in response:
        return [_chat_choice(choice) for choice in response["choices"] or ()]
    if "output" in response:
        return [_responses_choice(response)]
    return [_messages_choice(response)] if "content" in response else []


def _chat_choice(choice: Json) -> Choice:
    message = choice.get("message") or {}
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") or call.get("custom") or {}
        calls.append((call.get("id"), function.get("name"), function.get("arguments")))
    if not calls and (function := message.get("function_call")):
        calls.append((None, function.get("name"), function.get("arguments")))
    text = message.get("content") or choice.get("text") or ""
    return Choice(choice.get("finish_reason"), _plain(text), message.get("refusal"), calls)


def _responses_choice(response: Json) -> Choice:
    calls, texts, refusal = [], [], None
    for item in response["output"] or ():
        kind = item.get("type")
        if kind == "function_call":
            calls.append((item.get("call_id"), item.get("name"), item.get("arguments")))
        elif kind == "custom_tool_call":
            calls.append((item.get("call_id"), item.get("name"), None))
        elif kind == "message":
            for part in item.get("content") or ():
                texts.append(part.get("text") or "")
                refusal = part.get("refusal") or refusal
    ending = (response.get("incomplete_details") or {}).get("reason")
    return Choice(ending, "".join(texts), refusal, calls)


def _messages_choice(message: Json) -> Choice:
    blocks = message["content"] or ()
    calls = [(b.get("id"), b.get("name"), b.get("input")) for b in blocks if b.get("type") == "tool_use"]
    text = "".join([b.get("text") or "" for b in blocks if b.get("type") == "text"])
    return Choice(message.get("stop_reason"), text, None, calls)


def awaits_result(span: Span, request: Json) -> bool:
    """Whether the reply calls a tool whose result somebody has to send.

    Where the request forced the tool, the call itself was what the agent wanted.
    """
    forced = request.get("tool_choice")
    if isinstance(forced, dict) and forced.get("type") in ("function", "tool", "any", "custom"):
        return False
    if forced == "required" or span.response is None:
        return False
    try:
        return any(choice.calls for choice in choices_of(orjson.loads(span.response)))
    except CAPTURE_FAULTS:
        return False


def _normal(choices: list[Choice]) -> str:
    """An answer such that equal ones are equal, whatever ids and spaces they came with."""
    said = [spoken(choice.text) for choice in choices]
    said += [f"{name}\n{canonical(arguments)}" for choice in choices for _, name, arguments in choice.calls]
    return "\n".join(said)


def _plain(content: object) -> str:
    return content if isinstance(content, str) else repr(content)


def _finding(error_class: ErrorClass, detail: str, call_id: Any = None) -> Finding:
    return Finding(error_class, detail[:_LONGEST_DETAIL], call_id if isinstance(call_id, str) else None)
