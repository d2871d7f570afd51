"""Rollouts and calls as OpenTelemetry spans, by the semantic conventions for generative AI.

https://github.com/open-telemetry/semantic-conventions-genai: ``docs/gen-ai/gen-ai-spans.md`` and
``gen-ai-agent-spans.md``. One trace per attempt of a rollout: a root span ``invoke_agent``, below it one
span ``chat MODEL`` per call, rewards as events ``gen_ai.evaluation.result`` of what they are for. What the
conventions have no word for is under ``lightning.``. No I/O.

Trace and span ids are digests of our own ids, so that the same call has the same id in every export.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtelSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from lightning_proxy.store import Reward, RolloutState, Span

from .messages import SYSTEM, Exchange, Json, Message, Reply, exchange_of, parsed
from .records import RecordedAttempt
from .rows import usage_of

SCOPE = "lightning_proxy"
_OPERATIONS = {"completions": "text_completion"}
_PROVIDERS = {"messages": "anthropic"}  # of the API that was spoken, as the conventions mean it
_INSTRUCTIONS_APART = frozenset(("messages", "responses"))  # wires that have them beside the messages
_SAMPLING = {
    "temperature": ("gen_ai.request.temperature", float),
    "top_p": ("gen_ai.request.top_p", float),
    "top_k": ("gen_ai.request.top_k", float),
    "max_tokens": ("gen_ai.request.max_tokens", int),
    "max_completion_tokens": ("gen_ai.request.max_tokens", int),
    "presence_penalty": ("gen_ai.request.presence_penalty", float),
    "frequency_penalty": ("gen_ai.request.frequency_penalty", float),
    "seed": ("gen_ai.request.seed", int),
    "n": ("gen_ai.request.choice.count", int),
}
_OUTPUTS = {"text": "text", "json_object": "json", "json_schema": "json"}
_FINISH = {
    "tool_calls": "tool_call", "function_call": "tool_call", "tool_use": "tool_call", "end_turn": "stop",
    "stop_sequence": "stop", "completed": "stop", "max_tokens": "length", "max_output_tokens": "length",
    "refusal": "content_filter",
}  # fmt: skip


def resource() -> Resource:
    """Who sends them."""
    return Resource(attributes=attributes({"service.name": "lightning-proxy"}))


def scope(version: str) -> InstrumentationScope:
    """By what they were made."""
    return InstrumentationScope(name=SCOPE, version=version)


def trace_of(recorded: RecordedAttempt, spans: Iterable[Span], *, content: bool = True) -> Iterator[OtelSpan]:
    """An attempt as a trace: its calls as they come, its root last.

    ``content``: with messages, instructions and tools, which the conventions leave to whoever sends.
    """
    begun, ended = recorded.attempt.started_at, recorded.attempt.ended_at
    roles: set[str | None] = set()
    for span in spans:
        yield _call(recorded, span, content=content)
        begun = min(begun, span.started_at)
        ended = max(ended or 0.0, span.ended_at)
        roles.add(span.role)
    yield _root(recorded, begun, begun if ended is None else ended, roles)


def trace_id(rollout_id: str, attempt: int) -> bytes:
    """16 bytes, the same for the same attempt."""
    return hashlib.sha256(f"lightning\0{rollout_id}\0{attempt}".encode()).digest()[:16]


def span_id(rollout_id: str, attempt: int, number: int | None) -> bytes:
    """8 bytes, the same for the same call (by its span id), or for the attempt itself (``None``)."""
    text = f"lightning\0{rollout_id}\0{attempt}\0{'' if number is None else number}"
    return hashlib.sha256(text.encode()).digest()[:8]


def attributes(values: Mapping[str, Any]) -> list[KeyValue]:
    """Attributes; what is ``None`` is left out."""
    return [KeyValue(key=key, value=_any(value)) for key, value in values.items() if value is not None]


def _any(value: Any) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case list() | tuple():
            return AnyValue(array_value=ArrayValue(values=[_any(item) for item in value]))
        case _:
            return AnyValue(string_value=str(value))


# -- the attempt -----------------------------------------------------------------------------------------


def _root(recorded: RecordedAttempt, begun: float, ended: float, roles: set[str | None]) -> OtelSpan:
    rollout, attempt = recorded.rollout, recorded.attempt
    agent = next(iter(roles)) if len(roles) == 1 else None
    failed = attempt.state is RolloutState.FAILED
    error_type = (attempt.error_class.value if attempt.error_class else "_OTHER") if failed else None
    return OtelSpan(
        trace_id=trace_id(rollout.rollout_id, attempt.number),
        span_id=span_id(rollout.rollout_id, attempt.number, None),
        name=f"invoke_agent {agent}" if agent else "invoke_agent",
        kind=OtelSpan.SPAN_KIND_INTERNAL,
        start_time_unix_nano=_nanoseconds(begun),
        end_time_unix_nano=_nanoseconds(ended),
        attributes=attributes(
            {
                "gen_ai.operation.name": "invoke_agent",
                "gen_ai.conversation.id": rollout.rollout_id,
                "gen_ai.agent.name": agent,
                "error.type": error_type,
                **_of_attempt(recorded),
                "lightning.rollout.state": attempt.state.value,
                "lightning.rollout.metadata": _json(rollout.metadata) if rollout.metadata else None,
                "lightning.rollout.incomplete": rollout.incomplete,
                "lightning.reward": recorded.reward,
            }
        ),
        events=[_evaluation(reward, None) for reward in _valued(recorded) if reward.span_id is None],
        status=Status(code=Status.STATUS_CODE_ERROR, message=attempt.reason or "") if failed else None,
    )


def _of_attempt(recorded: RecordedAttempt) -> Json:
    return {
        "lightning.rollout.id": recorded.rollout.rollout_id,
        "lightning.rollout.attempt": recorded.attempt.number,
        "lightning.task.id": recorded.rollout.task_id,
    }


# -- a call ----------------------------------------------------------------------------------------------


def _call(recorded: RecordedAttempt, span: Span, *, content: bool) -> OtelSpan:
    operation = _OPERATIONS.get(span.wire, "chat")
    said = exchange_of(span)
    error = span.error_class
    return OtelSpan(
        trace_id=trace_id(span.rollout_id, span.attempt),
        span_id=span_id(span.rollout_id, span.attempt, span.span_id),
        parent_span_id=span_id(span.rollout_id, span.attempt, None),
        name=f"{operation} {span.model}" if span.model else operation,
        kind=OtelSpan.SPAN_KIND_CLIENT,
        start_time_unix_nano=_nanoseconds(span.started_at),
        end_time_unix_nano=_nanoseconds(span.ended_at),
        attributes=attributes(
            {
                "gen_ai.operation.name": operation,
                **_request_of(span),
                **_response_of(span, said),
                **(_content(span, said) if content else {}),
                **_of_attempt(recorded),
                **_ours(span),
            }
        ),
        events=[
            _evaluation(reward, span.response_id)
            for reward in _valued(recorded)
            if reward.span_id == span.span_id
        ],
        status=Status(code=Status.STATUS_CODE_ERROR, message=(span.error or "")[:1024]) if error else None,
    )


def _request_of(span: Span) -> Json:
    sampling = span.sampling
    given = {
        name: kind(value)
        for key, (name, kind) in _SAMPLING.items()
        if isinstance(value := sampling.get(key), int | float) and not (key == "n" and value == 1)
    }
    stop = sampling.get("stop")
    wanted = sampling.get("response_format")
    wanted = wanted.get("type") if isinstance(wanted, dict) else None
    return {
        "gen_ai.output.type": _OUTPUTS.get(str(wanted)),
        "gen_ai.provider.name": _PROVIDERS.get(span.wire, "openai"),
        "gen_ai.conversation.id": span.rollout_id,
        "gen_ai.agent.name": span.role,
        "gen_ai.request.model": span.model,
        "gen_ai.request.stream": span.streamed,
        "gen_ai.request.stop_sequences": [stop] if isinstance(stop, str) else stop,
        **given,
    }


def _response_of(span: Span, said: Exchange) -> Json:
    read, written = usage_of(span)
    model = parsed(span.response).get("model")
    reasons = [_finish(reply.finish_reason) for reply in said.replies if reply.finish_reason]
    first = None if span.first_byte_at is None else span.first_byte_at - span.started_at
    return {
        "gen_ai.response.id": span.response_id,
        "gen_ai.response.model": model if isinstance(model, str) else None,
        "gen_ai.response.finish_reasons": reasons or None,
        "gen_ai.response.time_to_first_chunk": first if span.streamed else None,
        "gen_ai.usage.input_tokens": read,
        "gen_ai.usage.output_tokens": written,
        "error.type": span.error_class,
    }


def _ours(span: Span) -> Json:
    return {
        "http.response.status_code": span.status,
        "lightning.span.id": span.span_id,
        "lightning.wire": span.wire,
        "lightning.policy": span.policy,
        "lightning.policy.version": span.policy_version,
        "lightning.fidelity": span.fidelity.value,
        "lightning.redacted": span.redacted,
        "lightning.attributed_by": span.attributed_by,
        "lightning.attribution_confidence": span.attribution_confidence,
        "lightning.retry": span.retry or None,
    }


def _content(span: Span, said: Exchange) -> Json:
    messages = list(said.messages)
    instructions = None
    if span.wire in _INSTRUCTIONS_APART and messages and messages[0].role == SYSTEM:
        instructions = [{"type": "text", "content": messages.pop(0).content}]
    tools = [
        {
            "type": tool.type,
            "name": tool.name,
            "description": tool.description or "",
            "parameters": orjson.loads(tool.parameters) if tool.parameters else None,
        }
        for tool in said.tools
    ]
    return {
        "gen_ai.system_instructions": _json(instructions) if instructions else None,
        "gen_ai.input.messages": _json([_input(message) for message in messages]) if messages else None,
        "gen_ai.output.messages": _json([_output(reply) for reply in said.replies]) if said.replies else None,
        "gen_ai.tool.definitions": _json(tools) if tools else None,
    }


def _input(message: Message) -> Json:
    return {"role": message.role, "parts": list(_parts(message))}


def _output(reply: Reply) -> Json:
    return {**_input(reply.message), "finish_reason": _finish(reply.finish_reason or "stop")}


def _parts(message: Message) -> Iterator[Json]:
    if message.role == "tool":
        yield {"type": "tool_call_response", "id": message.tool_call_id, "response": message.content}
    else:
        if message.reasoning:
            yield {"type": "reasoning", "content": message.reasoning}
        if message.content:
            yield {"type": "text", "content": message.content}
    for call in message.tool_calls:
        yield {"type": "tool_call", "id": call.id, "name": call.name, "arguments": _arguments(call.arguments)}
    for part in orjson.loads(message.parts) if message.parts else ():
        yield part if isinstance(part, dict) and "type" in part else {"type": "other", "content": part}


def _arguments(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _valued(recorded: RecordedAttempt) -> list[Reward]:
    """Rewards; comments and demonstrations alone evaluate nothing."""
    return [reward for reward in recorded.counting if reward.value is not None]


def _evaluation(reward: Reward, response_id: str | None) -> OtelSpan.Event:
    return OtelSpan.Event(
        name="gen_ai.evaluation.result",
        time_unix_nano=_nanoseconds(reward.created_at),
        attributes=attributes(
            {
                "gen_ai.evaluation.name": reward.name,
                "gen_ai.evaluation.score.value": reward.value,
                "gen_ai.evaluation.explanation": reward.comment,
                "gen_ai.response.id": response_id,
                "lightning.reward.source": reward.source,
            }
        ),
    )


def _finish(reason: str) -> str:
    return _FINISH.get(reason, reason)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()
