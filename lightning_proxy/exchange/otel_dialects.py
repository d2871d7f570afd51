"""The attributes that tracers have for one and the same model call. No I/O.

========================  ==============================================================================
GenAI conventions         ``gen_ai.input.messages``, ``gen_ai.output.messages`` ..., on the span or in its
                          event ``gen_ai.client.inference.operation.details``
... before v1.37          events ``gen_ai.user.message``, ``gen_ai.choice`` ..., or ``gen_ai.content.prompt``
OpenLLMetry (Traceloop)   ``gen_ai.prompt.0.role``, ``gen_ai.completion.0.content`` ...
OpenInference (Phoenix)   ``llm.input_messages.0.message.role``, ``llm.output_messages.0.message.content`` ...
========================  ==============================================================================

Each is read into the messages of a chat request and the choices of its answer, OpenAI's way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from .messages import Json, to_json

_CALL_OPERATIONS = frozenset(("chat", "text_completion", "generate_content", "completion"))
_OLD_EVENTS = {
    "gen_ai.system.message": "system",
    "gen_ai.user.message": "user",
    "gen_ai.assistant.message": "assistant",
    "gen_ai.tool.message": "tool",
}
_FINISH = {"tool_call": "tool_calls"}
_SAMPLING = {
    "gen_ai.request.temperature": "temperature",
    "gen_ai.request.top_p": "top_p",
    "gen_ai.request.top_k": "top_k",
    "gen_ai.request.max_tokens": "max_tokens",
    "gen_ai.request.presence_penalty": "presence_penalty",
    "gen_ai.request.frequency_penalty": "frequency_penalty",
    "gen_ai.request.seed": "seed",
    "gen_ai.request.stop_sequences": "stop",
    "gen_ai.request.choice.count": "n",
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened within a traced span."""

    name: str
    at: float
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TracedSpan:
    """A span as some tracer wrote it. Ids are hex digits, times Unix seconds."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    started_at: float
    ended_at: float
    attributes: Mapping[str, Any]
    events: Sequence[Event] = ()
    failed: bool = False
    message: str = ""

    def first(self, *names: str) -> Any:
        """The first of these attributes that it has."""
        return next((self.attributes[name] for name in names if self.attributes.get(name) is not None), None)


@dataclass(slots=True)
class TracedCall:
    """What a span says of a model call."""

    messages: list[Json] = field(default_factory=list)
    choices: list[Json] = field(default_factory=list)
    tools: list[Json] = field(default_factory=list)


def kind_of(span: TracedSpan) -> str | None:
    """``"call"`` for a model call, another word for another step of an agent, ``None`` for what is none."""
    kind = span.first("openinference.span.kind")
    if kind is not None:
        return "call" if kind == "LLM" else str(kind).lower()
    operation = span.first("gen_ai.operation.name", "llm.request.type")
    if operation is not None:
        return "call" if operation in _CALL_OPERATIONS else str(operation)
    if span.first("gen_ai.prompt.0.role", "gen_ai.prompt.0.content", "gen_ai.input.messages") is not None:
        return "call"
    if span.first("gen_ai.system", "gen_ai.provider.name") and span.first("gen_ai.request.model"):
        return "call"
    kind = span.first("traceloop.span.kind")
    return None if kind is None else str(kind)


def read_call(span: TracedSpan) -> TracedCall:
    """Messages, choices and tools, from the first way of telling them that the span has."""
    for read in (_current, _events, _traceloop, _openinference):
        call = read(span)
        if call.messages or call.choices:
            return call
    return TracedCall()


def sampling_of(span: TracedSpan) -> Json:
    """The sampling parameters, by the names that Chat Completions has for them."""
    invocation = _json(span.first("llm.invocation_parameters"))
    known = (*_SAMPLING.values(), "max_completion_tokens")
    given = {k: v for k, v in invocation.items() if k in known} if isinstance(invocation, dict) else {}
    return given | {
        ours: span.attributes[theirs] for theirs, ours in _SAMPLING.items() if theirs in span.attributes
    }


def usage_of(span: TracedSpan) -> Json | None:
    """Tokens read and written; ``None`` where the span does not say."""
    read = span.first("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt")
    written = span.first(
        "gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.token_count.completion"
    )
    if read is None and written is None:
        return None
    return {"prompt_tokens": read, "completion_tokens": written}


# -- the GenAI conventions -------------------------------------------------------------------------------


def _current(span: TracedSpan) -> TracedCall:
    given: Mapping[str, Any] = span.attributes
    if "gen_ai.input.messages" not in given and "gen_ai.output.messages" not in given:
        details = (e.attributes for e in span.events if e.name == "gen_ai.client.inference.operation.details")
        given = next(details, {})
    call = TracedCall()
    instructions = _json(given.get("gen_ai.system_instructions"))
    if instructions:
        parts = instructions if isinstance(instructions, list) else [instructions]
        call.messages += _from_parts("system", parts)
    for message in _list(given.get("gen_ai.input.messages")):
        call.messages += _from_parts(str(message.get("role") or "user"), message.get("parts") or ())
    for number, message in enumerate(_list(given.get("gen_ai.output.messages"))):
        made = list(_from_parts("assistant", message.get("parts") or ())) or [
            {"role": "assistant", "content": ""}
        ]
        call.choices.append(_choice(number, made[0], message.get("finish_reason")))
    call.tools = [_tool(tool) for tool in _list(given.get("gen_ai.tool.definitions"))]
    return call


def _from_parts(role: str, parts: Iterable[Any]) -> Iterator[Json]:
    """One message, or one per tool result that it holds."""
    texts, reasoning, calls, others = [], [], [], []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "content": part}
        kind = part.get("type")
        if kind == "text":
            texts.append(str(part.get("content") or ""))
        elif kind == "reasoning":
            reasoning.append(str(part.get("content") or ""))
        elif kind == "tool_call":
            calls.append(_tool_call(part.get("id"), part.get("name"), part.get("arguments")))
        elif kind == "tool_call_response":
            result = part.get("response", part.get("result"))
            yield {"role": "tool", "tool_call_id": part.get("id"), "content": _text(result)}
        else:
            others.append(part)
    if not (texts or reasoning or calls or others):
        return
    content: Any = "".join(texts)
    if others:
        content = [*({"type": "text", "text": text} for text in texts), *others]
    message: Json = {"role": role, "content": content}
    if reasoning:
        message["reasoning_content"] = "\n".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    yield message


def _events(span: TracedSpan) -> TracedCall:
    """Before v1.37: one event per message, its fields as attributes or in a body."""
    call = TracedCall()
    for event in span.events:
        fields = {**event.attributes, **(_object(event.attributes.get("event.body")))}
        if event.name == "gen_ai.content.prompt":
            call.messages += [_plain(message) for message in _list(fields.get("gen_ai.prompt"))]
        elif event.name == "gen_ai.content.completion":
            for message in _list(fields.get("gen_ai.completion")):
                call.choices.append(_choice(len(call.choices), _plain(message), message.get("finish_reason")))
        elif event.name == "gen_ai.choice":
            message = _object(fields.get("message")) or fields
            call.choices.append(
                _choice(
                    len(call.choices), _plain({**message, "role": "assistant"}), fields.get("finish_reason")
                )
            )
        elif event.name in _OLD_EVENTS:
            call.messages.append(_plain({**fields, "role": fields.get("role") or _OLD_EVENTS[event.name]}))
    return call


def _plain(message: Json) -> Json:
    """A message in nearly OpenAI's form."""
    role = str(message.get("role") or "user")
    made: Json = {"role": role, "content": _text(message.get("content"))}
    calls = _list(message.get("tool_calls"))
    if calls:
        made["tool_calls"] = [
            _tool_call(call.get("id"), inner.get("name"), inner.get("arguments"))
            for call in calls
            for inner in (call.get("function") or call,)
        ]
    if role == "tool":
        made["tool_call_id"] = message.get("tool_call_id") or message.get("id")
    return made


# -- OpenLLMetry -------------------------------------------------------------------------------------


def _traceloop(span: TracedSpan) -> TracedCall:
    call = TracedCall()
    call.messages = [_plain(message) for message in _unflattened(span.attributes, "gen_ai.prompt.")]
    for message in _unflattened(span.attributes, "gen_ai.completion."):
        made = _plain({**message, "role": "assistant"})
        call.choices.append(_choice(len(call.choices), made, message.get("finish_reason")))
    call.tools = [_tool(tool) for tool in _unflattened(span.attributes, "llm.request.functions.")]
    return call


# -- OpenInference -----------------------------------------------------------------------------------


def _openinference(span: TracedSpan) -> TracedCall:
    call = TracedCall()
    call.messages = [_of_inference(m) for m in _unflattened(span.attributes, "llm.input_messages.")]
    reason = span.first("llm.finish_reason")
    for message in _unflattened(span.attributes, "llm.output_messages."):
        call.choices.append(_choice(len(call.choices), _of_inference(message), reason))
    schemas = (tool.get("tool") or {} for tool in _unflattened(span.attributes, "llm.tools."))
    call.tools = [_tool(_object(tool.get("json_schema")) | _named(tool)) for tool in schemas]
    return call


def _named(tool: Json) -> Json:
    return {key: tool[key] for key in ("name", "description") if tool.get(key)}


def _of_inference(item: Json) -> Json:
    message = item.get("message") or {}
    contents = [content.get("message_content") or {} for content in _items(message.get("contents"))]
    text = message.get("content")
    if text is None:
        text = "".join(str(content.get("text") or "") for content in contents)
    calls = [
        {"id": call.get("id"), **(call.get("function") or {})}
        for each in _items(message.get("tool_calls"))
        for call in (each.get("tool_call") or {},)
    ]
    return _plain({**message, "content": text, "tool_calls": calls})


# -- what they share --------------------------------------------------------------------------------


def _unflattened(attributes: Mapping[str, Any], prefix: str) -> list[Json]:
    """``a.0.b.1.c = x`` as lists and mappings; numbers become keys until :func:`_items` orders them."""
    tree: Json = {}
    for name, value in attributes.items():
        if name.startswith(prefix):
            at = tree
            *path, last = name.removeprefix(prefix).split(".")
            for step in path:
                inner = at.setdefault(step, {})
                at = inner if isinstance(inner, dict) else {}
            at[last] = value
    return _items(tree)


def _items(numbered: Any) -> list[Json]:
    if isinstance(numbered, list):
        return [item for item in numbered if isinstance(item, dict)]
    if not isinstance(numbered, dict):
        return []
    numbers = sorted(int(key) for key in numbered if key.isdecimal())
    items = [item for number in numbers if isinstance(item := numbered[str(number)], dict)]
    return [{**i, "tool_calls": _items(i["tool_calls"])} if "tool_calls" in i else i for i in items]


def _choice(number: int, message: Json, reason: Any) -> Json:
    reason = None if reason is None else _FINISH.get(str(reason), str(reason))
    return {"index": number, "message": {**message, "role": "assistant"}, "finish_reason": reason}


def _tool_call(id_: Any, name: Any, arguments: Any) -> Json:
    text = arguments if isinstance(arguments, str) else to_json({} if arguments is None else arguments)
    return {"id": id_, "type": "function", "function": {"name": str(name or ""), "arguments": text}}


def _tool(tool: Json) -> Json:
    """A definition in OpenAI's form, whichever it came in."""
    inner = tool.get("function") if isinstance(tool.get("function"), dict) else tool
    assert inner is not None  # one or the other
    parameters = inner.get("parameters", inner.get("input_schema"))
    function = {
        "name": inner.get("name") or tool.get("name"),
        "description": inner.get("description"),
        "parameters": _json(parameters),
    }
    return {
        "type": "function",
        "function": {key: value for key, value in function.items() if value is not None},
    }


def _text(value: Any) -> Any:
    """Content as OpenAI has it: a text, or a list of parts; JSON for anything else."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value):
        return value
    return to_json(value)


def _json(value: Any) -> Any:
    """A value that may have been put into JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return value


def _list(value: Any) -> list[Json]:
    found = _json(value)
    if isinstance(found, dict):
        found = [found]
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _object(value: Any) -> Json:
    found = _json(value)
    return found if isinstance(found, dict) else {}
