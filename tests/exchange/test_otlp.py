"""Export over OTLP to a real collector: the conventions, the ids, and a collector in trouble."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.errors import ExportFailed, InvalidInput
from lightning_proxy.exchange.formats import Target, export
from lightning_proxy.exchange.messages import exchange_of, same_turn
from lightning_proxy.exchange.otel_import import import_files
from lightning_proxy.exchange.otlp import Sender, endpoint_of
from lightning_proxy.exchange.records import Selection
from lightning_proxy.store import ErrorClass, RolloutState, Span, Store
from lightning_proxy.words import ExportFormat

from .collector import Collector, Refusal, running_collector
from .support import QUESTION, agent_rollout, chat_span

EVERYTHING = Selection()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


def send(store: Store, collector: Collector, **how: Any) -> str:
    return export(ExportFormat.OTLP, store, EVERYTHING, Target(endpoint=collector.url, **how)).message


def attributes_of(span: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in span.attributes}


def _value(value: Any) -> Any:
    if value.HasField("array_value"):
        return [_value(item) for item in value.array_value.values]
    return getattr(value, value.WhichOneof("value"))


def test_a_rollout_is_a_trace_by_the_conventions(store: Store, collector: Collector) -> None:
    ids = agent_rollout(store, "r-1", task_id="t-1", reward=0.75, role="writer")
    store.add_reward(value=0.5, span_id=ids[1], name="style")
    send(store, collector, content=True)
    first, second, root = collector.spans
    assert len({span.trace_id for span in collector.spans}) == 1
    assert {len(span.span_id) for span in collector.spans} == {8}
    assert (root.name, root.kind, root.parent_span_id) == ("invoke_agent writer", 1, b"")
    assert first.parent_span_id == second.parent_span_id == root.span_id
    assert (first.name, first.kind) == ("chat policy", 3)
    assert root.start_time_unix_nano <= first.start_time_unix_nano < first.end_time_unix_nano
    assert second.end_time_unix_nano <= root.end_time_unix_nano
    said = attributes_of(second)
    assert said["gen_ai.operation.name"] == "chat"
    assert said["gen_ai.provider.name"] == "openai"
    assert said["gen_ai.request.model"] == said["gen_ai.response.model"] == "policy"
    assert said["gen_ai.conversation.id"] == "r-1"
    assert said["gen_ai.agent.name"] == "writer"
    assert said["gen_ai.response.id"] == "chatcmpl-r-1-1"
    assert said["gen_ai.response.finish_reasons"] == ["stop"]
    assert said["gen_ai.request.temperature"] == 0.5
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (3, 2)
    assert said["gen_ai.response.time_to_first_chunk"] == pytest.approx(0.1, abs=1e-6)
    assert json.loads(said["gen_ai.input.messages"])[2:] == [
        {
            "role": "assistant",
            "parts": [{"type": "tool_call", "id": "call_1", "name": "sql", "arguments": {"q": "SELECT 1"}}],
        },
        {
            "role": "tool",
            "parts": [{"type": "tool_call_response", "id": "call_1", "response": "42 rows"}],
        },
    ]
    assert json.loads(said["gen_ai.output.messages"]) == [
        {"role": "assistant", "parts": [{"type": "text", "content": "42"}], "finish_reason": "stop"}
    ]
    assert json.loads(said["gen_ai.tool.definitions"])[0]["name"] == "sql"
    [event] = root.events
    assert event.name == "gen_ai.evaluation.result"
    assert attributes_of(event) == {
        "gen_ai.evaluation.name": "reward",
        "gen_ai.evaluation.score.value": 0.75,
        "gen_ai.evaluation.explanation": "as it should be",
        "lightning.reward.source": "grader",
    }
    [of_call] = second.events
    assert attributes_of(of_call)["gen_ai.evaluation.name"] == "style"


def test_every_name_is_one_of_the_conventions_or_our_own(store: Store, collector: Collector) -> None:
    semconv = pytest.importorskip("opentelemetry.semconv._incubating.attributes.gen_ai_attributes")
    known = {value for name, value in vars(semconv).items() if name.startswith("GEN_AI_")}
    known |= {"error.type", "http.response.status_code"}
    [span_id, _] = agent_rollout(
        store, "r-1", task_id="t", reward=1.0, role="a",
        sampling={
            "temperature": 1, "top_p": 0.5, "top_k": 3, "max_tokens": 9, "presence_penalty": 0.1, "seed": 1,
            "frequency_penalty": 0.2, "n": 2, "stop": ["x"], "response_format": {"type": "json_schema"},
        },
    )  # fmt: skip
    store.add_reward(value=1.0, span_id=span_id)
    send(store, collector, content=True)
    with_attributes = [each for span in collector.spans for each in (span, *span.events)]
    names = {name for each in with_attributes for name in attributes_of(each)}
    assert {name for name in names if not name.startswith("lightning.")} <= known
    said = attributes_of(collector.spans[0])
    assert (said["gen_ai.output.type"], said["gen_ai.request.choice.count"]) == ("json", 2)
    assert isinstance(said["gen_ai.request.top_k"], float)
    assert isinstance(said["gen_ai.request.seed"], int)


def test_what_was_said_goes_out_only_when_asked_for(store: Store, collector: Collector) -> None:
    agent_rollout(store, "r-1")
    assert "without what was said" in send(store, collector)
    assert b"How many?" not in b"".join(request.SerializeToString() for request in collector.requests)
    assert b"sql" not in b"".join(request.SerializeToString() for request in collector.requests)


def test_system_instructions_that_come_apart_stay_apart(store: Store, collector: Collector) -> None:
    request = {"model": "m", "system": "Be brief.", "messages": [{"role": "user", "content": "hi"}]}
    response = {"id": "msg_1", "content": [{"type": "text", "text": "yo"}], "stop_reason": "end_turn"}
    bodies: dict[str, Any] = {
        "request": json.dumps(request).encode(),
        "response": json.dumps(response).encode(),
    }
    store.add_span(chat_span("r", [], {}, wire="messages", **bodies))
    send(store, collector, content=True)
    said = attributes_of(collector.spans[0])
    assert said["gen_ai.provider.name"] == "anthropic"
    assert json.loads(said["gen_ai.system_instructions"]) == [{"type": "text", "content": "Be brief."}]
    assert [message["role"] for message in json.loads(said["gen_ai.input.messages"])] == ["user"]
    assert said["gen_ai.response.finish_reasons"] == ["stop"]


def test_errors_are_errors(store: Store, collector: Collector) -> None:
    failed: dict[str, Any] = {
        "response": None,
        "error_class": "rate_limited",
        "error": "slow down",
        "status": 429,
    }
    store.add_span(chat_span("r", QUESTION, {}, generations=(), **failed))
    store.finish_rollout("r", RolloutState.FAILED, "gave up", ErrorClass.AGENT_CRASH)
    send(store, collector)
    call, root = collector.spans
    assert attributes_of(call)["error.type"] == "rate_limited"
    assert (call.status.code, call.status.message) == (2, "slow down")
    assert attributes_of(root)["error.type"] == "agent_crash"
    assert (root.status.code, root.status.message) == (2, "gave up")


def test_the_same_call_has_the_same_id_in_every_export(store: Store, collector: Collector) -> None:
    agent_rollout(store, "r-1")
    send(store, collector)
    send(store, collector)
    ids = [(span.trace_id, span.span_id) for span in collector.spans]
    assert len(ids) == 6
    assert len(set(ids)) == 3


def test_many_spans_go_in_several_requests(store: Store, collector: Collector) -> None:
    with store.transaction():
        for number in range(700):
            store.add_span(chat_span("r", QUESTION, {"content": "x" * 100}, number))
    assert send(store, collector, content=True).startswith("701 spans")
    assert len(collector.requests) > 1
    assert len(collector.spans) == 701


def test_headers_are_sent(store: Store, collector: Collector) -> None:
    agent_rollout(store, "r-1")
    send(store, collector, headers={"x-api-key": "k"})
    assert collector.headers[0]["x-api-key"] == "k"
    assert collector.headers[0]["content-encoding"] == "gzip"


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_collector_that_is_busy_is_asked_again_when_it_says(
    store: Store, collector: Collector, status: int
) -> None:
    agent_rollout(store, "r-1")
    collector.refusals = [Refusal(status, {"Retry-After": "7"}), Refusal(status)]
    pauses: list[float] = []
    sender = Sender(endpoint_of(collector.url), sleep=pauses.append)
    assert sender.send(_spans(store)) == 3
    assert pauses[0] == 7
    assert 0 < pauses[1] <= 30
    assert len(collector.spans) == 3


def test_patience_has_an_end(store: Store, collector: Collector) -> None:
    agent_rollout(store, "r-1")
    collector.refusals = [Refusal(503, {"Retry-After": "600"}, b"later")]
    with pytest.raises(ExportFailed, match=r"answered 503: 'later'"):
        Sender(endpoint_of(collector.url), sleep=lambda _: None).send(_spans(store))


@pytest.mark.parametrize(("status", "hint"), [(401, "--header"), (404, "4318"), (400, "answered 400")])
def test_a_refusal_says_what_would_be_right(
    store: Store, collector: Collector, status: int, hint: str
) -> None:
    agent_rollout(store, "r-1")
    collector.refusals = [Refusal(status, body=b"no")]
    with pytest.raises(ExportFailed, match=hint):
        send(store, collector)


def test_where_nobody_answers_it_is_said(store: Store) -> None:
    agent_rollout(store, "r-1")
    with pytest.raises(ExportFailed, match=r"no collector answers at http://127\.0\.0\.1:9/v1/traces"):
        Sender(endpoint_of("http://127.0.0.1:9"), patience_s=0.1).send(_spans(store))


def test_spans_that_were_rejected_are_reported(store: Store, collector: Collector) -> None:
    agent_rollout(store, "r-1")
    collector.rejects = 2
    assert "it rejected 2 of them: too old" in send(store, collector)


def test_an_endpoint_is_a_base_or_the_whole_address() -> None:
    assert endpoint_of("http://c:4318") == endpoint_of("http://c:4318/v1/traces") == "http://c:4318/v1/traces"
    with pytest.raises(InvalidInput, match=r"http://127\.0\.0\.1:4318"):
        endpoint_of("c:4318")


# -- there and back ----------------------------------------------------------------------------------


def spans_in_order(store: Store) -> list[Span]:
    return sorted(store.list_spans(limit=1000), key=lambda span: (span.rollout_id, span.started_at))


@pytest.mark.parametrize("framed", [False, True])
def test_what_was_exported_comes_back_the_same(
    store: Store, collector: Collector, tmp_path: Path, framed: bool
) -> None:
    agent_rollout(store, "r-1", task_id="t-1", reward=0.75, role="writer")
    agent_rollout(store, "r-2", reward=-1.0)
    request = {"model": "m", "system": "Be brief.", "messages": [{"role": "user", "content": "hi"}]}
    thought = {"type": "thinking", "thinking": "hm"}
    response = {
        "id": "msg_1",
        "content": [thought, {"type": "text", "text": "yo"}],
        "stop_reason": "end_turn",
    }
    bodies: dict[str, Any] = {
        "request": json.dumps(request).encode(),
        "response": json.dumps(response).encode(),
    }
    store.add_span(chat_span("r-3", [], {}, wire="messages", response_id="msg_1", **bodies))
    failed: dict[str, Any] = {"response": None, "error_class": "timeout", "error": "too slow", "status": None}
    store.add_span(chat_span("r-3", QUESTION, {}, 9, generations=(), **failed))
    send(store, collector, content=True)
    messages = [request.SerializeToString() for request in collector.requests]
    file = tmp_path / "traces.pb"
    file.write_bytes(
        b"".join(len(m).to_bytes(4, "big") + m for m in messages) if framed else b"".join(messages)
    )
    with Store.open(tmp_path / "other.db") as other:
        report = import_files(other, [file])
        assert (report.calls, report.rewards, report.known) == (6, 2, 0)
        for ours, theirs in zip(spans_in_order(store), spans_in_order(other), strict=True):
            assert (ours.rollout_id, ours.role, ours.model) == (theirs.rollout_id, theirs.role, theirs.model)
            assert (ours.error_class, ours.error) == (theirs.error_class, theirs.error)
            assert ours.response_id == theirs.response_id
            assert ours.started_at == pytest.approx(theirs.started_at, abs=1e-6)
            before, after = exchange_of(ours), exchange_of(theirs)
            assert list(map(same_turn, before.messages)) == list(map(same_turn, after.messages))
            assert [r.message.content for r in before.replies] == [r.message.content for r in after.replies]
            assert [r.message.reasoning for r in before.replies] == [
                r.message.reasoning for r in after.replies
            ]
            assert before.tools == after.tools
        assert other.get_rollout("r-1").task_id == "t-1"
        assert [reward.value for reward in other.counting_rewards("r-1")] == [0.75]
        again = import_files(other, [file])
        assert (again.calls, again.rewards, again.known) == (0, 0, 6)
    back_home = import_files(store, [file])
    assert (back_home.calls, back_home.rewards, back_home.known) == (0, 0, 6)


def _spans(store: Store) -> Any:
    from lightning_proxy.exchange.otel import trace_of
    from lightning_proxy.exchange.records import attempts, spans_of

    for recorded in attempts(store, EVERYTHING):
        yield from trace_of(recorded, spans_of(store, recorded, EVERYTHING))
