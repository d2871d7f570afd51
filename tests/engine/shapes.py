"""What vLLM 0.31 answers, field for field: names, order, and which nulls are there.

Source: vllm/entrypoints/openai/{chat_completion,completion}/{protocol,serving}.py. Whole answers
hold every field (``model_dump``); streamed chunks hold those that were set, null or not
(``exclude_unset``). So without ``return_token_ids`` a chunk still says ``"token_ids": null``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tests.engine.model import Choice, Model, Reply, Step

FINGERPRINT = "vllm-0.31.0-fa4efa4e"
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Head:
    """What all chunks of one answer share."""

    response_id: str
    created: int
    model: str


def chat(head: Head, body: Mapping[str, Any], reply: Reply) -> Json:
    """A whole Chat Completions answer."""
    ids = bool(body.get("return_token_ids"))
    return {
        "id": head.response_id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [
            {
                "index": index,
                "message": _message(choice),
                "logprobs": _chat_logprobs(body, choice.steps),
                "finish_reason": choice.finish_reason,
                "stop_reason": None,
                "token_ids": choice.token_ids if ids else None,
                "routed_experts": None,
            }
            for index, choice in enumerate(reply.choices)
        ],
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": _whole_usage(reply),
        "prompt_logprobs": None,
        "prompt_token_ids": list(reply.prompt_token_ids) if ids else None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def chat_chunks(head: Head, body: Mapping[str, Any], reply: Reply, per_chunk: int = 1) -> Iterator[Json]:
    """The chunks of a streamed Chat Completions answer, the ``[DONE]`` left out."""
    ids = bool(body.get("return_token_ids"))
    base = {
        "id": head.response_id,
        "object": "chat.completion.chunk",
        "created": head.created,
        "model": head.model,
    }
    for index in range(len(reply.choices)):
        role = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": role, "logprobs": None, "finish_reason": None}
        prompt = list(reply.prompt_token_ids) if ids else None
        usage = _running_usage(body, reply, 0)
        yield {**base, "choices": [choice], **usage, "prompt_token_ids": prompt, "prompt_text": None}
    written = [0] * len(reply.choices)
    for index, steps, delta, finish in in_turn(reply, per_chunk):
        written[index] += len(steps)
        logprobs = _chat_logprobs(body, steps)
        if delta is None and finish is None and logprobs is None and not ids:
            continue  # the tool parser had nothing to say, and nobody wants the tokens
        chunk: Json = {"index": index, "delta": delta or {}, "logprobs": logprobs, "finish_reason": finish}
        if finish is not None:
            chunk["stop_reason"] = None
        chunk["token_ids"] = [step.token_id for step in steps] if ids else None
        usage = _running_usage(body, reply, written[index])
        yield _stamped({**base, "choices": [chunk], **usage}, body, finish)
    if _wants_usage(body):
        yield {**base, "choices": [], "usage": _usage(reply), "system_fingerprint": FINGERPRINT}


def completion(head: Head, body: Mapping[str, Any], reply: Reply, model: Model) -> Json:
    """A whole Completions answer."""
    ids = bool(body.get("return_token_ids"))
    return {
        "id": head.response_id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "choices": [
            {
                "index": index,
                "text": choice.content,
                "logprobs": _completion_logprobs(body, choice.steps, 0),
                "finish_reason": choice.finish_reason,
                "stop_reason": None,
                "token_ids": choice.token_ids if ids else None,
                "prompt_logprobs": _prompt_logprobs(body, reply.prompt_token_ids, model),
                "prompt_token_ids": list(reply.prompt_token_ids) if ids else None,
                "routed_experts": None,
            }
            for index, choice in enumerate(reply.choices)
        ],
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": _whole_usage(reply),
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def completion_chunks(
    head: Head, body: Mapping[str, Any], reply: Reply, per_chunk: int = 1
) -> Iterator[Json]:
    """The chunks of a streamed Completions answer, the ``[DONE]`` left out."""
    ids = bool(body.get("return_token_ids"))
    base = {
        "id": head.response_id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
    }
    offsets = [0] * len(reply.choices)
    for index, steps, _, finish in in_turn(reply, per_chunk):
        first = steps[0] is reply.choices[index].steps[0]
        chunk: Json = {
            "index": index,
            "text": "".join(step.text for step in steps),
            "logprobs": _completion_logprobs(body, steps, offsets[index]),
            "finish_reason": finish,
            "stop_reason": None,
            "prompt_token_ids": list(reply.prompt_token_ids) if ids and first else None,
            "token_ids": [step.token_id for step in steps] if ids else None,
        }
        offsets[index] += len(chunk["text"])
        yield _stamped({**base, "choices": [chunk]}, body, finish)
    if _wants_usage(body):
        yield {**base, "choices": [], "usage": _usage(reply), "system_fingerprint": FINGERPRINT}


def models(name: str, owner: str, root: str) -> Json:
    """The answer of ``/v1/models``."""
    card = {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": owner, "root": root}
    return {"object": "list", "data": [{**card, "parent": None, "max_model_len": 32768, "permission": []}]}


def error(status: int, message: str, kind: str = "BadRequestError") -> Json:
    """vLLM's error body."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def aborted(first: bytes) -> Json:
    """The last chunk of a stream that ``/pause?mode=abort`` ended, made from its first event."""
    chunk: Json = orjson.loads(first.removeprefix(b"data: "))
    head = {key: chunk[key] for key in ("id", "object", "created", "model")}
    said: Json = {"delta": {}} if "chat" in chunk["object"] else {"text": ""}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": "abort", "stop_reason": None}
    return {**head, "choices": [{**choice, "token_ids": None}], "system_fingerprint": FINGERPRINT}


def sse(event: Json) -> bytes:
    """One event as vLLM writes it."""
    return b"data: " + orjson.dumps(event) + b"\n\n"


def in_turn(reply: Reply, per_chunk: int) -> Iterator[tuple[int, Sequence[Step], Json | None, str | None]]:
    """Choices take turns, ``per_chunk`` tokens each: index, steps, chat delta, finish reason."""
    deltas = [_deltas(choice) for choice in reply.choices]
    longest = max(len(choice.steps) for choice in reply.choices)
    for start in range(0, longest, per_chunk):
        for index, choice in enumerate(reply.choices):
            steps = choice.steps[start : start + per_chunk]
            if not steps:
                continue
            last = start + per_chunk >= len(choice.steps)
            delta = _joined(deltas[index][start : start + per_chunk])
            yield index, steps, delta, choice.finish_reason if last else None


def _deltas(choice: Choice) -> list[Json | None]:
    """What each token adds to the message; None where vLLM's tool parser swallows it."""
    if not choice.tool_calls:
        return [{"content": step.text} for step in choice.steps]
    content, deltas = len(choice.content or ""), list[Json | None]()
    written = "".join(step.text for step in choice.steps)
    starts = []  # per call: where its arguments start and end in the text
    at = content
    for call in choice.tool_calls:
        begin = written.index('"arguments": ', at) + len('"arguments": ')
        starts.append((begin, begin + len(call["arguments"])))
        at = begin + len(call["arguments"])
    position, named = 0, 0
    for step in choice.steps:
        end = position + len(step.text)
        if end <= content and step.text:
            deltas.append({"content": step.text})
        elif named < len(starts) and end >= starts[named][0] > position:
            call = choice.tool_calls[named]
            function = {
                "name": call["name"],
                "arguments": written[starts[named][0] : min(end, starts[named][1])],
            }
            item = {"id": call["id"], "type": "function", "index": named, "function": function}
            deltas.append({"tool_calls": [item]})
            named += 1
        elif named and position < starts[named - 1][1] and step.text:
            piece = written[position : min(end, starts[named - 1][1])]
            deltas.append({"tool_calls": [{"index": named - 1, "function": {"arguments": piece}}]})
        else:
            deltas.append(None)
        position = end
    return deltas


def _joined(deltas: Sequence[Json | None]) -> Json | None:
    """Several tokens' deltas as one."""
    joined: Json = {}
    for delta in deltas:
        if delta is None:
            continue
        if "content" in delta:
            joined["content"] = joined.get("content", "") + delta["content"]
        for call in delta.get("tool_calls", ()):
            calls = joined.setdefault("tool_calls", [])
            if calls and calls[-1]["index"] == call["index"]:
                function = calls[-1]["function"]
                calls[-1]["function"] = {
                    **function,
                    "arguments": function["arguments"] + call["function"]["arguments"],
                }
            else:
                calls.append(dict(call))
    return joined or None


def _message(choice: Choice) -> Json:
    message: Json = {
        "role": "assistant",
        "content": choice.content,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
    }
    if choice.tool_calls:
        message["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in choice.tool_calls
        ]
    return {**message, "reasoning": None}


def _token(body: Mapping[str, Any], step: Step) -> str:
    return f"token_id:{step.token_id}" if body.get("return_tokens_as_token_ids") else step.text


def _chat_logprobs(body: Mapping[str, Any], steps: Sequence[Step]) -> Json | None:
    if not body.get("logprobs"):
        return None
    top = body.get("top_logprobs") or 0
    content = []
    for step in steps:
        token, spelled = _token(body, step), list(step.text.encode())
        others = [
            {"token": token if i == 0 else f"~{i}", "logprob": step.logprob - i, "bytes": spelled}
            for i in range(top)
        ]
        content.append({"token": token, "logprob": step.logprob, "bytes": spelled, "top_logprobs": others})
    return {"content": content}


def _completion_logprobs(body: Mapping[str, Any], steps: Sequence[Step], offset: int) -> Json | None:
    top = body.get("logprobs")
    if top is None or top is False:
        return None
    tokens = [_token(body, step) for step in steps]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "text_offset": offsets,
        "token_logprobs": [step.logprob for step in steps],
        "tokens": tokens,
        "top_logprobs": [
            {token: step.logprob, **{f"~{i}": step.logprob - i for i in range(1, int(top) + 1)}}
            for token, step in zip(tokens, steps, strict=True)
        ],
    }


def _prompt_logprobs(body: Mapping[str, Any], ids: Sequence[int], model: Model) -> list[Json | None] | None:
    if body.get("prompt_logprobs") is None:
        return None
    entries: list[Json | None] = [None]  # nothing comes before the first token
    for position, token_id in enumerate(ids[1:], start=1):
        logprob = {"logprob": model.logprob(position, token_id), "rank": 1, "decoded_token": "?"}
        entries.append({str(token_id): logprob})
    return entries


def _usage(reply: Reply) -> Json:
    written = sum(len(choice.steps) for choice in reply.choices)
    read = len(reply.prompt_token_ids)
    return {"prompt_tokens": read, "total_tokens": read + written, "completion_tokens": written}


def _running_usage(body: Mapping[str, Any], reply: Reply, written: int) -> Json:
    """The usage on each chunk of a chat stream, for who asked for it."""
    if not (_wants_usage(body) and body["stream_options"].get("continuous_usage_stats")):
        return {}
    read = len(reply.prompt_token_ids)
    usage = {"prompt_tokens": read, "total_tokens": read + written, "completion_tokens": written}
    return {"usage": {**usage, "completion_tokens_details": None}}


def _whole_usage(reply: Reply) -> Json:
    return {**_usage(reply), "prompt_tokens_details": None, "completion_tokens_details": None}


def _wants_usage(body: Mapping[str, Any]) -> bool:
    return bool((body.get("stream_options") or {}).get("include_usage"))


def _stamped(chunk: Json, body: Mapping[str, Any], finish: str | None) -> Json:
    """The fingerprint stands on the last chunk only; the usage chunk is that, if there is one."""
    if finish is not None and not _wants_usage(body):
        chunk["system_fingerprint"] = FINGERPRINT
    return chunk
