"""What vLLM 0.31 answers on Anthropic's Messages API, written out from the made-up model.

Source: vllm/entrypoints/anthropic/{protocol,serving}.py. Events hold the fields that were set, null
or not; whole answers leave nulls out. Written without a look at the proxy's own translation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from tests.engine.model import Reply
from tests.engine.shapes import Head, Json, in_turn

STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def as_chat(body: Mapping[str, Any]) -> Json:
    """A Messages request as the chat request that its prompt is rendered from."""
    system = body.get("system") or ""
    if not isinstance(system, str):
        system = "".join(block["text"] for block in system)
    chat: Json = {
        "model": body.get("model"),
        "max_tokens": body.get("max_tokens"),
        "messages": [{"role": "system", "content": system}] if system else [],
    }
    for message in body.get("messages", ()):
        chat["messages"] += _turn(message["role"], message["content"])
    if body.get("tools"):
        chat["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool["name"],
                    "description": tool.get("description"),
                    "parameters": _schema(tool["input_schema"]),
                    "strict": tool.get("strict"),
                    "defer_loading": tool.get("defer_loading"),
                },
            }
            for tool in body["tools"]
        ]
    return chat


def _schema(schema: Json) -> Json:
    return schema if "type" in schema else {**schema, "type": "object"}


def _turn(role: str, content: Any) -> list[Json]:
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    results = [
        {"role": "tool", "content": _text(block.get("content") or "")}
        for block in content
        if block["type"] == "tool_result"
    ]
    texts = [block["text"] for block in content if block["type"] == "text"]
    if role == "system":
        texts = [text for text in texts if not text.startswith("x-anthropic-billing-header")]
    said = "".join(texts)
    calls = [
        {"function": {"name": block["name"], "arguments": json.dumps(block["input"])}}
        for block in content
        if block["type"] == "tool_use"
    ]
    own: Json = {"role": role, "content": said, **({"tool_calls": calls} if calls else {})}
    return [*results, own] if said or calls else results


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def whole(head: Head, reply: Reply) -> Json:
    """A whole answer."""
    choice = reply.choices[0]
    blocks: list[Json] = [{"type": "text", "text": choice.content}] if choice.content else []
    for call in choice.tool_calls:
        parsed = json.loads(call["arguments"])
        blocks.append({"type": "tool_use", "id": call["id"], "name": call["name"], "input": parsed})
    return {
        "id": head.response_id,
        "type": "message",
        "role": "assistant",
        "content": blocks or [{"type": "text", "text": ""}],
        "model": head.model,
        "stop_reason": _REASONS[choice.finish_reason],
        "usage": {"input_tokens": len(reply.prompt_token_ids), "output_tokens": len(choice.steps)},
    }


def events(head: Head, reply: Reply, per_chunk: int = 1) -> Iterator[bytes]:
    """The events of a streamed answer, ``message_stop`` left out."""
    read = len(reply.prompt_token_ids)
    message: Json = {"id": head.response_id, "type": "message", "role": "assistant", "content": []}
    message |= {"model": head.model, "stop_reason": None, "stop_sequence": None}
    message["usage"] = {"input_tokens": read, "output_tokens": 0}
    yield event({"type": "message_start", "message": message})
    index = 0
    open_: int | None = None  # number of the tool call of the open block, -1: text
    for _, _, delta, _ in in_turn(reply, per_chunk):
        delta = delta or {}
        if delta.get("content"):
            if open_ is None:
                yield _start(index, {"type": "text", "text": ""})
                open_ = -1
            yield _delta(index, {"type": "text_delta", "text": delta["content"]})
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                if open_ is not None:
                    yield event({"type": "content_block_stop", "index": index})
                    index += 1
                name = call["function"]["name"]
                yield _start(index, {"type": "tool_use", "id": call["id"], "name": name, "input": {}})
                open_ = call["index"]
            if call["function"]["arguments"]:
                yield _delta(
                    index, {"type": "input_json_delta", "partial_json": call["function"]["arguments"]}
                )
    if open_ is not None:
        yield event({"type": "content_block_stop", "index": index})
    choice = reply.choices[0]
    stop = {"stop_reason": _REASONS[choice.finish_reason], "stop_sequence": None}
    usage = {"input_tokens": read, "output_tokens": len(choice.steps)}
    yield event({"type": "message_delta", "delta": stop, "usage": usage})


def error(message: str, kind: str) -> Json:
    """An error of vLLM's handler of this API."""
    return {"type": "error", "error": {"type": kind, "message": message}}


def failed(message: str) -> bytes:
    """The event for an engine that failed inside a stream: nothing follows it."""
    return event({"type": "error", "error": {"type": "internal_error", "message": message}})


def event(data: Json) -> bytes:
    """One event as vLLM writes it."""
    name: str = data["type"]
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"


def _start(index: int, block: Json) -> bytes:
    return event({"type": "content_block_start", "content_block": block, "index": index})


def _delta(index: int, delta: Json) -> bytes:
    return event({"type": "content_block_delta", "delta": delta, "index": index})
