"""What vLLM 0.31 answers on ``/v1/responses``, field for field. No I/O.

Source: vllm/entrypoints/openai/responses/{protocol,serving,streaming_events}.py. Where it differs
from what one would expect: the items of a stream have other ids than those of its last event, and
so have tool calls.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from tests.engine.model import Choice, Reply, Step
from tests.engine.shapes import Head, Json, in_turn

MAX_MODEL_LEN = 32768
_TOOL_DEFAULTS: Json = {
    "name": None, "parameters": None, "strict": None, "type": "function", "allowed_callers": None,
    "async": None, "defer_loading": None, "description": None, "output_schema": None,
}  # fmt: skip
_NAMESPACED_DEFAULTS = {key: value for key, value in _TOOL_DEFAULTS.items() if key != "async"}
_SEARCH_DEFAULTS: Json = {"type": None, "filters": None, "search_context_size": None, "user_location": None}
_REASONING_DEFAULTS: Json = {
    "context": None, "effort": None, "generate_summary": None, "mode": None, "summary": None,
}  # fmt: skip
LOGPROBS = "message.output_text.logprobs"
_Name = tuple[str, str | None]  # a function's, and its namespace


def as_chat(body: Mapping[str, Any]) -> Json:
    """The Chat Completions request that the engine makes of a Responses request."""
    messages: list[Json] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    given = body.get("input", "")
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given:
        _add(messages, item)
    chat: Json = {"messages": messages, "max_tokens": body.get("max_output_tokens")}
    if body.get("tools"):
        chat["tools"] = [
            {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
            for tool in _functions(body["tools"])
        ]
    return chat


def _functions(tools: Sequence[Json]) -> Iterator[Json]:
    """The functions that the model sees: the others are not shown to it."""
    for tool in tools:
        if tool["type"] == "function":
            yield tool
        elif tool["type"] == "namespace":
            inner = (one for one in tool["tools"] if one["type"] == "function")
            yield from ({**one, "name": f"{tool['name']}__{one['name']}"} for one in inner)


def _echoed(tool: Json) -> Json:
    """A tool with all the fields that it has."""
    if tool["type"] == "namespace":
        return {**tool, "tools": [{**_NAMESPACED_DEFAULTS, **inner} for inner in tool["tools"]]}
    defaults = {"function": _TOOL_DEFAULTS, "web_search": _SEARCH_DEFAULTS}
    return {**defaults.get(tool["type"], {}), **tool}


def refusal(body: Mapping[str, Any]) -> str | None:
    """Why a request is refused, if it is."""
    if not isinstance(body.get("input"), str | list):
        return "1 validation error:\n  {'type': 'missing', 'loc': 'body.input', 'msg': 'Field required'}"
    if body.get("tool_choice") == "required" and not body.get("tools"):
        return "Tool choice 'required' must be specified with 'tools' parameter. (parameter=tool_choice)"
    for tool in body.get("tools") or ():
        if not isinstance(tool.get("type"), str) or (tool["type"] == "function" and "name" not in tool):
            return "2 validation errors:\n  {'type': 'missing', 'loc': 'body.tools.0.FunctionTool.name'}"
    limit = body.get("max_output_tokens")
    if limit is not None and limit > MAX_MODEL_LEN:
        return f"max_output_tokens={limit} cannot be greater than max_model_len={MAX_MODEL_LEN}."
    return None


def response(head: Head, body: Mapping[str, Any], reply: Reply) -> Json:
    """A whole answer."""
    choice = reply.choices[0]
    status = "incomplete" if choice.finish_reason == "length" else "completed"
    made = _shell(head, body, reply, status)
    made["output"] = _items(body, reply, choice)
    made["usage"] = _usage(reply)
    if body.get("enable_response_messages"):
        made["input_messages"] = [_raw("the prompt", list(reply.prompt_token_ids))]
        made["output_messages"] = [_raw("".join(s.text for s in choice.steps), choice.token_ids)]
    return made


def events(head: Head, body: Mapping[str, Any], reply: Reply, per_chunk: int = 1) -> Iterator[Json]:
    """The events of a streamed answer."""
    numbered = _events(head, body, reply, per_chunk)
    for number, event in enumerate(numbered):
        event["sequence_number"] = number
        yield {key: event[key] for key in sorted(event, key=lambda key: (key == "name", key))}


def sse(event: Json) -> bytes:
    """One event as vLLM writes it."""
    name: str = event["type"]
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"


def broken(number: int) -> Json:
    """The event by which OpenAI's own servers say that a stream has failed."""
    said = {"type": "error", "code": "server_error", "message": "the engine failed", "param": None}
    return {**said, "sequence_number": number}


def not_found(response_id: str) -> Json:
    """The answer to a question for a response that was not stored."""
    message = f"Response with id '{response_id}' not found."
    return {
        "error": {
            "message": message,
            "type": "invalid_request_error",
            "param": "response_id",
            "code": 404,
        }
    }


def _add(messages: list[Json], item: Json) -> None:
    """One input item as a message, or added to the assistant's last one."""
    kind = item.get("type", "message")
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if kind == "function_call":
        spaced = f"{item['namespace']}__" if item.get("namespace") else ""
        function = {"name": spaced + item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        if last is None:
            messages.append({"role": "assistant", "tool_calls": [call]})
        else:
            last["tool_calls"] = [*last.get("tool_calls", ()), call]
    elif kind == "function_call_output":
        messages.append({"role": "tool", "content": item["output"], "tool_call_id": item["call_id"]})
    elif kind == "reasoning":
        if last is None:
            messages.append({"role": "assistant", "reasoning": item["content"][0]["text"]})
    elif item["role"] == "assistant":
        content = item["content"] if isinstance(item["content"], str) else item["content"][0]["text"]
        if last is not None and last.get("content") is None:
            last["content"] = content
        else:
            messages.append({"role": "assistant", "content": content})
    else:
        messages.append({"role": item["role"], "content": item["content"]})


def _shell(head: Head, body: Mapping[str, Any], reply: Reply, status: str) -> Json:
    """Everything of a response but what was generated."""
    tools = [_echoed(tool) for tool in body.get("tools") or ()]
    room = MAX_MODEL_LEN - len(reply.prompt_token_ids)
    asked = LOGPROBS in (body.get("include") or ())
    reasoning, text = body.get("reasoning"), body.get("text")
    forced = body.get("tool_choice", "auto") not in ("auto", "none")  # a grammar takes its place
    temperature, top_p = _number(body.get("temperature"), 0.7), _number(body.get("top_p"), 0.9)
    if temperature < 0.01:  # as vLLM's SamplingParams have it
        temperature, top_p = (0.01, top_p) if temperature else (0.0, 1.0)
    return {
        "id": head.response_id,
        "created_at": head.created,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata"),
        "model": head.model,
        "object": "response",
        "output": [],
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "temperature": temperature,
        "tool_choice": body.get("tool_choice", "auto") if tools else "none",
        "tools": tools,
        "top_p": top_p,
        "background": False,
        "max_output_tokens": min(body.get("max_output_tokens") or room, room),
        "max_tool_calls": body.get("max_tool_calls"),
        "previous_response_id": body.get("previous_response_id"),
        "prompt": None,
        "reasoning": None if reasoning is None else {**_REASONING_DEFAULTS, **reasoning},
        "service_tier": body.get("service_tier", "auto"),
        "status": status,
        "text": None if text is None or forced else {"format": None, "verbosity": None, **text},
        "top_logprobs": (body.get("top_logprobs") or 0) if asked else None,
        "truncation": body.get("truncation", "disabled"),
        "usage": None,
        "user": body.get("user"),
        "presence_penalty": float(body.get("presence_penalty") or 0.0),
        "frequency_penalty": float(body.get("frequency_penalty") or 0.0),
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    }


def _items(body: Mapping[str, Any], reply: Reply, choice: Choice) -> list[Json]:
    items: list[Json] = []
    if choice.content:
        logprobs = _logprobs(choice.steps, spelled=True) if LOGPROBS in (body.get("include") or ()) else None
        part = {"annotations": [], "text": choice.content, "type": "output_text", "logprobs": logprobs}
        items.append(_message(f"msg_{_id(reply, 'm')}", [part], "completed"))
    for number, call in enumerate(choice.tool_calls):
        item_id, name = f"fc_{_id(reply, f'c{number}')}", _resolved(body, call["name"])
        items.append(_call(item_id, call["id"], name, call["arguments"], "completed"))
    return items


def _events(head: Head, body: Mapping[str, Any], reply: Reply, per_chunk: int) -> Iterator[Json]:
    begun = _shell(head, body, reply, "in_progress")
    yield {"response": begun, "type": "response.created"}
    yield {"response": begun, "type": "response.in_progress"}
    stream = _Stream(body, reply)
    for _, steps, delta, _ in in_turn(reply, per_chunk):
        if delta and delta.get("content"):
            yield from stream.text(delta["content"], steps)
        for call in (delta or {}).get("tool_calls", ()):
            yield from stream.call(call)
    yield from stream.close()
    yield {"response": response(head, body, reply), "type": "response.completed"}


class _Stream:
    """The items of a stream, one open at a time."""

    def __init__(self, body: Mapping[str, Any], reply: Reply) -> None:
        self._body = body
        self._reply = reply
        self._logprobs = LOGPROBS in (body.get("include") or ())
        self._at = 0
        self._open: str | int | None = None  # "text", or the index of a call
        self._name: _Name = ("", None)
        self._written = ""

    @property
    def _item_id(self) -> str:
        return _id(self._reply, f"s{self._at}")

    @property
    def _call_id(self) -> str:
        return f"call_{_id(self._reply, f'k{self._at}')}"

    def text(self, delta: str, steps: Sequence[Step]) -> Iterator[Json]:
        where = {"content_index": 0, "output_index": self._at}
        if self._open != "text":
            yield from self.close()
            where["output_index"] = self._at
            self._open = "text"
            item = _message(self._item_id, [], "in_progress")
            yield {"item": item, "output_index": self._at, "type": "response.output_item.added"}
            part = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
            yield {**where, "item_id": self._item_id, "part": part, "type": "response.content_part.added"}
        self._written += delta
        logprobs = _logprobs(steps, spelled=False) if self._logprobs else []
        said = {"delta": delta, "item_id": self._item_id, "logprobs": logprobs}
        yield {**where, **said, "type": "response.output_text.delta"}

    def call(self, delta: Json) -> Iterator[Json]:
        if self._open != delta["index"]:
            yield from self.close()
            self._open, self._name = delta["index"], _resolved(self._body, delta["function"]["name"])
            item = _call(self._item_id, self._call_id, self._name, "", "in_progress")
            yield {"item": item, "output_index": self._at, "type": "response.output_item.added"}
        if piece := delta["function"].get("arguments"):
            self._written += piece
            where = {"item_id": self._item_id, "output_index": self._at}
            yield {**where, "delta": piece, "type": "response.function_call_arguments.delta"}

    def close(self) -> Iterator[Json]:
        if self._open is None:
            return
        where: Json = {"item_id": self._item_id, "output_index": self._at}
        if self._open == "text":
            part: Json = {"annotations": [], "text": self._written, "type": "output_text", "logprobs": None}
            done = {**where, "content_index": 0}
            yield {**done, "logprobs": [], "text": self._written, "type": "response.output_text.done"}
            yield {**done, "part": part, "type": "response.content_part.done"}
            item = {**_message(self._item_id, [part], "completed"), "summary": []}
        else:
            said = {"arguments": self._written, "name": self._name[0]}
            if self._written:
                yield {**where, **said, "type": "response.function_call_arguments.done"}
            item = _call(self._item_id, self._call_id, self._name, self._written, "completed")
        yield {"item": item, "output_index": self._at, "type": "response.output_item.done"}
        self._at, self._open, self._written = self._at + 1, None, ""


def _message(item_id: str, content: list[Json], status: str) -> Json:
    item = {"id": item_id, "content": content, "role": "assistant", "status": status}
    return {**item, "type": "message", "phase": None}


def _resolved(body: Mapping[str, Any], name: str) -> _Name:
    """The name and namespace of what the model calls ``name``."""
    for tool in body.get("tools") or ():
        for inner in tool["tools"] if tool["type"] == "namespace" else ():
            if inner["type"] == "function" and name == f"{tool['name']}__{inner['name']}":
                return inner["name"], tool["name"]
    return name, None


def _call(item_id: str, call_id: str, name: _Name, arguments: str, status: str) -> Json:
    return {
        "arguments": arguments,
        "call_id": call_id,
        "name": name[0],
        "type": "function_call",
        "id": item_id,
        "async": None,
        "caller": None,
        "namespace": name[1],
        "status": status,
    }


def _logprobs(steps: Sequence[Step], *, spelled: bool) -> list[Json]:
    made = []
    for step in steps:
        entry: Json = {"token": step.text, "logprob": step.logprob, "top_logprobs": []}
        if spelled:
            entry["bytes"] = list(step.text.encode())
        made.append(entry)
    return made


def _raw(text: str, ids: list[int]) -> Json:
    return {"message": text, "tokens": ids, "type": "raw_message_tokens"}


def _usage(reply: Reply) -> Json:
    read, written = len(reply.prompt_token_ids), len(reply.choices[0].steps)
    cached = {"cached_tokens": 0, "cache_write_tokens": 0}
    turns: Json = {"output_tokens_per_turn": [], "tool_output_tokens_per_turn": []}
    return {
        "input_tokens": read,
        "input_tokens_details": {**cached, "input_tokens_per_turn": [], "cached_tokens_per_turn": []},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0, "tool_output_tokens": 0, **turns},
        "total_tokens": read + written,
    }


def _number(given: float | None, default: float) -> float:
    return default if given is None else float(given)


def _id(reply: Reply, what: str) -> str:
    """16 hexadecimal digits, always the same for the same answer."""
    seed = repr((reply.prompt_token_ids, what)).encode()
    return f"{zlib.crc32(seed):08x}{zlib.adler32(seed):08x}"
