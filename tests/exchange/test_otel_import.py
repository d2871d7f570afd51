"""Import: traces as other tracers write them, each in its own words."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.config import RedactionSettings
from lightning_proxy.errors import InvalidInput
from lightning_proxy.exchange.messages import Exchange, exchange_of
from lightning_proxy.exchange.otel_import import ImportReport, import_files
from lightning_proxy.redaction import Redactor
from lightning_proxy.store import Fidelity, Span, Store

Json = dict[str, Any]
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALL_MESSAGES: list[Json] = [
    {"role": "user", "parts": [{"type": "text", "content": "Weather in Paris?"}]},
    {
        "role": "assistant",
        "parts": [
            {"type": "reasoning", "content": "look"},
            {"type": "tool_call", "id": "c1", "name": "weather", "arguments": {"city": "Paris"}},
        ],
    },
    {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "result": "rainy"}]},
]


def value_of(value: Any) -> Json:
    """As OTLP in JSON spells it: integers are texts."""
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case list():
            return {"arrayValue": {"values": [value_of(item) for item in value]}}
        case dict():
            return {"kvlistValue": {"values": [{"key": k, "value": value_of(v)} for k, v in value.items()]}}
        case _:
            return {"stringValue": value}


def span(
    number: int,
    attributes: Mapping[str, Any],
    *,
    parent: int = 0,
    trace: str = TRACE,
    name: str = "span",
    events: Iterable[tuple[str, Mapping[str, Any]]] = (),
    error: str | None = None,
) -> Json:
    def listed(given: Mapping[str, Any]) -> list[Json]:
        return [{"key": key, "value": value_of(value)} for key, value in given.items()]

    return {
        "traceId": trace,
        "spanId": f"{number:016x}",
        "parentSpanId": f"{parent:016x}" if parent else "",
        "name": name,
        "kind": 3,
        "startTimeUnixNano": str(1_700_000_000_000_000_000 + number * 10**9),
        "endTimeUnixNano": str(1_700_000_000_500_000_000 + number * 10**9),
        "attributes": listed(attributes),
        "events": [
            {"name": name, "timeUnixNano": "1700000000000000000", "attributes": listed(of)}
            for name, of in events
        ],
        "status": {"code": 2, "message": error} if error is not None else {},
    }


def request(*spans: Json) -> bytes:
    document = {"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {}, "spans": list(spans)}]}]}
    return json.dumps(document).encode() + b"\n"


def imported(store: Store, tmp_path: Path, *spans: Json, **how: Any) -> tuple[list[Span], ImportReport]:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b"".join(request(one) for one in spans))  # one request per span: parents may come later
    report = import_files(store, [path], **how)
    return store.list_spans(limit=100)[::-1], report


def said(span: Span) -> list[tuple[str, str]]:
    exchange: Exchange = exchange_of(span)
    return [(m.role, m.content) for m in (*exchange.messages, *(r.message for r in exchange.replies))]


WEATHER_CALL: Json = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "gpt-4o",
    "gen_ai.response.model": "gpt-4o-2024-08-06",
    "gen_ai.response.id": "chatcmpl-9",
    "gen_ai.response.finish_reasons": ["stop"],
    "gen_ai.request.temperature": 0.2,
    "gen_ai.request.max_tokens": 100,
    "gen_ai.usage.input_tokens": 12,
    "gen_ai.usage.output_tokens": 3,
    "gen_ai.system_instructions": json.dumps([{"type": "text", "content": "You help."}]),
    "gen_ai.input.messages": json.dumps(CALL_MESSAGES),
    "gen_ai.output.messages": json.dumps(
        [{"role": "assistant", "parts": [{"type": "text", "content": "Rain."}], "finish_reason": "stop"}]
    ),
    "gen_ai.tool.definitions": json.dumps([{"type": "function", "name": "weather", "description": "d"}]),
}
EXPECTED = [
    ("system", "You help."), ("user", "Weather in Paris?"), ("assistant", ""), ("tool", "rainy"),
    ("assistant", "Rain."),
]  # fmt: skip


def test_a_call_by_the_conventions(store: Store, tmp_path: Path) -> None:
    [call], report = imported(store, tmp_path, span(1, WEATHER_CALL))
    assert said(call) == EXPECTED
    exchange = exchange_of(call)
    assert exchange.messages[2].reasoning == "look"
    assert json.loads(exchange.messages[2].tool_calls[0].arguments) == {"city": "Paris"}
    assert exchange.messages[3].tool_call_id == "c1"
    assert exchange.replies[0].finish_reason == "stop"
    assert exchange.tools[0].name == "weather"
    assert (call.model, call.response_id, call.wire) == ("gpt-4o", "chatcmpl-9", "chat")
    assert call.usage == {"prompt_tokens": 12, "completion_tokens": 3}
    assert call.sampling == {"temperature": 0.2, "max_tokens": 100}
    assert (call.fidelity, call.generations, call.policy) == (Fidelity.TEXT, (), None)
    assert call.rollout_id == f"otel-{TRACE}"
    assert call.started_at == pytest.approx(1_700_000_001.0)
    assert (report.calls, report.rollouts) == (1, {f"otel-{TRACE}"})


def test_messages_as_structured_values_and_in_an_event(store: Store, tmp_path: Path) -> None:
    structured = {**WEATHER_CALL, "gen_ai.input.messages": CALL_MESSAGES}
    content = ("gen_ai.system_instructions", "gen_ai.input.messages", "gen_ai.output.messages")
    bare = {key: value for key, value in WEATHER_CALL.items() if key not in content}
    details = {key: WEATHER_CALL[key] for key in content}
    event = ("gen_ai.client.inference.operation.details", details)
    first, second = imported(store, tmp_path, span(1, structured), span(2, bare, events=[event]))[0]
    assert said(first) == said(second) == EXPECTED


def test_the_events_that_came_before_v1_37(store: Store, tmp_path: Path) -> None:
    calls = json.dumps([{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}])
    events: list[tuple[str, Mapping[str, Any]]] = [
        ("gen_ai.system.message", {"content": "You help."}),
        ("gen_ai.user.message", {"content": "Weather in Paris?"}),
        ("gen_ai.assistant.message", {"tool_calls": calls}),
        ("gen_ai.tool.message", {"id": "c1", "content": "rainy"}),
        ("gen_ai.choice", {"index": 0, "finish_reason": "stop", "message": json.dumps({"content": "Rain."})}),
    ]
    attributes = {"gen_ai.system": "openai", "gen_ai.operation.name": "chat", "gen_ai.request.model": "m"}
    [call], _ = imported(store, tmp_path, span(1, attributes, events=events))
    assert said(call) == EXPECTED
    assert exchange_of(call).messages[3].tool_call_id == "c1"


def test_prompts_in_events_of_their_own(store: Store, tmp_path: Path) -> None:
    prompt = json.dumps([{"role": "user", "content": "Hi"}])
    events = [
        ("gen_ai.content.prompt", {"gen_ai.prompt": prompt}),
        (
            "gen_ai.content.completion",
            {"gen_ai.completion": json.dumps([{"role": "assistant", "content": "Yo"}])},
        ),
    ]
    [call], _ = imported(store, tmp_path, span(1, {"gen_ai.operation.name": "chat"}, events=events))
    assert said(call) == [("user", "Hi"), ("assistant", "Yo")]


def test_openllmetry(store: Store, tmp_path: Path) -> None:
    attributes = {
        "gen_ai.system": "OpenAI",
        "llm.request.type": "chat",
        "gen_ai.request.model": "gpt-4o",
        "gen_ai.usage.prompt_tokens": 12,
        "gen_ai.usage.completion_tokens": 3,
        "gen_ai.prompt.0.role": "system",
        "gen_ai.prompt.0.content": "You help.",
        "gen_ai.prompt.1.role": "user",
        "gen_ai.prompt.1.content": json.dumps([{"type": "text", "text": "Weather in Paris?"}]),
        "gen_ai.prompt.2.role": "assistant",
        "gen_ai.prompt.2.tool_calls.0.id": "c1",
        "gen_ai.prompt.2.tool_calls.0.name": "weather",
        "gen_ai.prompt.2.tool_calls.0.arguments": '{"city": "Paris"}',
        "gen_ai.prompt.3.role": "tool",
        "gen_ai.prompt.3.tool_call_id": "c1",
        "gen_ai.prompt.3.content": "rainy",
        **{f"gen_ai.prompt.{n}.role": "user" for n in range(4, 12)},
        **{f"gen_ai.prompt.{n}.content": str(n) for n in range(4, 12)},
        "gen_ai.completion.0.role": "assistant",
        "gen_ai.completion.0.content": "Rain.",
        "gen_ai.completion.0.finish_reason": "stop",
        "llm.request.functions.0.name": "weather",
        "llm.request.functions.0.parameters": '{"type": "object"}',
        "traceloop.association.properties.session_id": "chat/7",
    }
    [call], _ = imported(store, tmp_path, span(1, attributes))
    turns = said(call)
    assert turns[0] == EXPECTED[0]
    assert turns[2:4] == EXPECTED[2:4]
    assert [text for _, text in turns[4:12]] == [str(n) for n in range(4, 12)]
    assert turns[-1] == EXPECTED[-1]
    exchange = exchange_of(call)
    assert exchange.messages[2].tool_calls[0].name == "weather"
    assert exchange.tools[0].parameters == '{"type":"object"}'
    assert call.rollout_id == "chat_7"
    assert call.usage == {"prompt_tokens": 12, "completion_tokens": 3}


def test_openinference(store: Store, tmp_path: Path) -> None:
    prefix = "llm.input_messages"
    attributes = {
        "openinference.span.kind": "LLM",
        "llm.model_name": "gpt-4o",
        "llm.invocation_parameters": json.dumps({"model": "gpt-4o", "temperature": 0.1}),
        "llm.token_count.prompt": 12,
        "llm.token_count.completion": 3,
        f"{prefix}.0.message.role": "system",
        f"{prefix}.0.message.content": "You help.",
        f"{prefix}.1.message.role": "user",
        f"{prefix}.1.message.contents.0.message_content.type": "text",
        f"{prefix}.1.message.contents.0.message_content.text": "Weather in Paris?",
        f"{prefix}.2.message.role": "assistant",
        f"{prefix}.2.message.tool_calls.0.tool_call.id": "c1",
        f"{prefix}.2.message.tool_calls.0.tool_call.function.name": "weather",
        f"{prefix}.2.message.tool_calls.0.tool_call.function.arguments": '{"city": "Paris"}',
        f"{prefix}.3.message.role": "tool",
        f"{prefix}.3.message.tool_call_id": "c1",
        f"{prefix}.3.message.content": "rainy",
        "llm.output_messages.0.message.role": "assistant",
        "llm.output_messages.0.message.content": "Rain.",
        "llm.tools.0.tool.json_schema": json.dumps({"type": "function", "function": {"name": "weather"}}),
        "session.id": "s-1",
    }
    [call], _ = imported(store, tmp_path, span(1, attributes))
    assert said(call) == EXPECTED
    exchange = exchange_of(call)
    assert (exchange.messages[2].tool_calls[0].id, exchange.messages[3].tool_call_id) == ("c1", "c1")
    assert exchange.tools[0].name == "weather"
    assert (call.rollout_id, call.sampling) == ("s-1", {"temperature": 0.1})


def test_rollout_and_role_come_from_the_steps_above(store: Store, tmp_path: Path) -> None:
    spans, report = imported(
        store,
        tmp_path,
        span(3, WEATHER_CALL, parent=2),
        span(4, {**WEATHER_CALL, "gen_ai.agent.name": "critic"}, parent=1),
        span(2, {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "writer"}, parent=1),
        span(1, {"gen_ai.operation.name": "invoke_workflow", "gen_ai.conversation.id": "conv-1"}),
        span(5, {"gen_ai.operation.name": "execute_tool"}, parent=2),
        span(6, {"http.request.method": "GET"}, parent=5),
    )
    assert [(call.rollout_id, call.role) for call in spans] == [("conv-1", "writer"), ("conv-1", "critic")]
    assert report.other_steps == {"invoke_agent": 1, "invoke_workflow": 1, "execute_tool": 1}
    assert report.unknown == 1


def test_a_call_that_two_tracers_saw_is_one_call(store: Store, tmp_path: Path) -> None:
    outer = span(1, {"openinference.span.kind": "LLM"}, name="ChatOpenAI")
    spans, report = imported(
        store, tmp_path, outer, span(2, {"foo": 1}, parent=1), span(3, WEATHER_CALL, parent=2)
    )
    assert [said(call) for call in spans] == [EXPECTED]
    assert (report.calls, report.wrappers) == (1, 1)


@pytest.mark.parametrize(
    ("kind", "error_class"),
    [
        ("429", "rate_limited"), ("503", "upstream_error"), ("400", "upstream_refused"),
        ("timeout", "timeout"),
        ("openai.APITimeoutError", "timeout"), ("RateLimitError", "rate_limited"),
        ("_OTHER", "upstream_error"),
        ("context_overflow", "context_overflow"), ("", "upstream_error"),
    ],
)  # fmt: skip
def test_errors_have_our_words(store: Store, tmp_path: Path, kind: str, error_class: str) -> None:
    attributes = {"gen_ai.operation.name": "chat", "error.type": kind}
    [call], _ = imported(store, tmp_path, span(1, attributes, error="it broke"))
    assert (call.error_class, call.error, call.response) == (error_class, "it broke", None)


def test_again_is_no_harm(store: Store, tmp_path: Path) -> None:
    first, _ = imported(store, tmp_path, span(1, WEATHER_CALL))
    second, report = imported(store, tmp_path, span(1, WEATHER_CALL), span(2, WEATHER_CALL))
    assert (report.calls, report.known) == (1, 1)
    assert len(first) == 1
    assert len(second) == 2


def test_a_call_without_content_is_kept_as_such(store: Store, tmp_path: Path) -> None:
    bare = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.usage.input_tokens": 5}
    [call], report = imported(store, tmp_path, span(1, bare))
    assert (call.fidelity, report.without_content) == (Fidelity.INCOMPLETE, 1)


def test_evaluations_become_rewards(store: Store, tmp_path: Path) -> None:
    def result(value: float) -> tuple[str, Json]:
        named = {"gen_ai.evaluation.name": "helpful", "gen_ai.evaluation.score.value": value}
        return ("gen_ai.evaluation.result", named)

    root = span(1, {"gen_ai.operation.name": "invoke_agent"}, events=[result(1.0)])
    [call], report = imported(store, tmp_path, span(2, WEATHER_CALL, parent=1, events=[result(0.5)]), root)
    rewards = store.list_rewards(call.rollout_id)
    assert [(reward.value, reward.span_id) for reward in rewards] == [(0.5, call.span_id), (1.0, None)]
    assert report.rewards == 2


def test_rules_hold_for_what_is_imported(store: Store, tmp_path: Path) -> None:
    redactor = Redactor.of([RedactionSettings(name="city", pattern="Paris")])
    [call], _ = imported(store, tmp_path, span(1, WEATHER_CALL), redactor=redactor)
    assert call.redacted == "city"
    assert (
        b"Paris"
        not in (tmp_path / "lightning.db").read_bytes() + (tmp_path / "lightning.db-wal").read_bytes()
    )


def test_a_document_over_many_lines_and_a_compressed_one(store: Store, tmp_path: Path) -> None:
    document = json.loads(request(span(1, WEATHER_CALL)))
    pretty, packed = tmp_path / "pretty.json", tmp_path / "packed.jsonl.gz"
    pretty.write_text(json.dumps(document, indent=2))
    packed.write_bytes(gzip.compress(request(span(2, WEATHER_CALL)) + request(span(3, WEATHER_CALL))))
    assert import_files(store, [pretty, packed]).calls == 3


@pytest.mark.parametrize(
    "content",
    [b"hello", b'{"a": 1}', b'{"resourceSpans": [{"scopeSpans": [{"spans": [{}]}]}]}', b'{"cut', b"\xff\xfe"],
)
def test_what_holds_no_traces_is_refused_by_name(store: Store, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"x\.json holds no OTLP traces"):
        import_files(store, [path])
    assert store.list_spans() == []
