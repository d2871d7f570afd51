"""What is recorded of a call, when, and for whom."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import time
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from lightning_proxy.store import Fidelity, RolloutState, Span, Store
from tests.conftest import MakeProxy, ProxyProcess, ProxyThread, wait_until
from tests.engine import EngineThread, FakeEngine, Reply, Script
from tests.proxy.raw_http import (
    CHAT,
    COMPLETIONS,
    HELLO,
    JSON,
    Call,
    Headers,
    chat,
    chosen_sampling,
    metric,
    recorded,
    send,
)

MakeEngine = Callable[[FakeEngine], EngineThread]


def check_tokens(span: Span, reply: Reply) -> None:
    for generation, choice in zip(span.generations, reply.choices, strict=True):
        assert generation.prompt_token_ids == array("i", reply.prompt_token_ids)
        assert generation.response_token_ids == array("i", choice.token_ids)
        assert generation.logprobs == array("f", choice.logprobs)
        assert generation.finish_reason == choice.finish_reason


# -- what a span holds ---------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_span_holds_the_whole_call(
    engine: EngineThread, proxy: ProxyThread, path: str, streamed: bool
) -> None:
    body = {**HELLO, "prompt": "x", "temperature": 0.5, "seed": 3, "n": 2, "stream": streamed}
    raw = json.dumps(body, indent=1).encode()
    before = time.time()
    answer = send(proxy.url, path, raw)
    after = time.time()
    span = recorded(proxy)[0]
    assert span.request == raw
    assert (span.wire, span.model) == ("chat" if path == CHAT else "completions", "policy")
    assert (span.policy, span.policy_version, span.policy_version_end) == ("policy", 0, 0)
    assert (span.status, span.streamed, span.fidelity) == (200, streamed, Fidelity.EXACT)
    assert (span.error_class, span.error) == (None, None)
    assert chosen_sampling(span) == {"temperature": 0.5, "seed": 3, "n": 2}
    assert span.first_byte_at is not None
    assert before <= span.started_at <= span.first_byte_at <= span.ended_at <= after
    check_tokens(span, engine.model.generate(body))
    assert span.response_id == (answer.events[0] if streamed else answer.json)["id"]
    if not streamed:
        assert span.response is not None
        assert json.loads(span.response) == answer.json
        assert span.usage == answer.json["usage"]


def test_a_call_for_another_model_is_not_the_policys(make_engine: MakeEngine, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(make_engine(FakeEngine(name="judge")).base_url)
    assert chat(proxy, model="judge").status == 200
    span = recorded(proxy)[0]
    assert (span.model, span.policy, span.policy_version) == ("judge", None, None)
    assert span.fidelity is Fidelity.EXACT


def test_a_policy_may_have_any_name_that_the_engine_serves(
    make_engine: MakeEngine, make_proxy: MakeProxy
) -> None:
    proxy = make_proxy(make_engine(FakeEngine(name="org/Tiny-1.5")).base_url, policy={"name": "org/Tiny-1.5"})
    chat(proxy, model="org/Tiny-1.5")
    assert recorded(proxy)[0].policy == "org/Tiny-1.5"


@pytest.mark.parametrize("request_", [{"logprobs": True, "top_logprobs": 3}, {"return_token_ids": True}])
def test_who_asks_for_token_data_gets_it_and_it_is_recorded_all_the_same(
    engine: EngineThread, proxy: ProxyThread, request_: dict[str, Any]
) -> None:
    answer = chat(proxy, **request_).json
    choice = answer["choices"][0]
    assert (choice["logprobs"] is not None) == ("logprobs" in request_)
    assert (choice["token_ids"] is not None) == ("return_token_ids" in request_)
    check_tokens(recorded(proxy)[0], engine.model.generate(HELLO))


def test_a_conversation_of_several_turns_is_one_rollout_in_order(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    messages: list[Any] = [*HELLO["messages"]]
    engine.script(Script(tool_calls=(("sql", '{"q": 1}'),)))
    for _ in range(3):
        answer = chat(proxy, prefix="/rollout/r1", messages=messages)
        message = answer.json["choices"][0]["message"]
        messages += [message, {"role": "user", "content": "go on"}]
    spans = recorded(proxy, 3)
    assert {span.rollout_id for span in spans} == {"r1"}
    for earlier, later in itertools.pairwise(spans):
        first, second = earlier.generations[0], later.generations[0]
        read = [*first.prompt_token_ids, *first.response_token_ids]
        assert list(second.prompt_token_ids[: len(read)]) == read


# -- whose it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "headers", "expected"),
    [
        ("/rollout/r1/attempt/2/role/writer", [], ("r1", 2, "writer", "path")),
        ("/sessions/s%3A1", [("X-Rollout-Id", "other"), ("X-Role", "w")], ("s:1", 1, "w", "path")),
        (
            "",
            [("X-Rollout-Id", "r2"), ("X-Attempt", "3"), ("X-Role", "critic")],
            ("r2", 3, "critic", "header"),
        ),
        ("", [("X-Session-Id", "s2")], ("s2", 1, None, "header")),
        ("", [("baggage", "a=b,rollout_id=r3,role=w")], ("r3", 1, "w", "baggage")),
        ("", [("X-Rollout-Id", "r4"), ("X-Role", "\xff\xfe")], ("r4", 1, None, "header")),
        ("", [("X-Rollout-Id", "r5"), ("X-Attempt", "9" * 30)], ("r5", 1, None, "header")),
    ],
)
def test_a_call_belongs_to_whom_it_names(
    engine: EngineThread, proxy: ProxyThread, prefix: str, headers: Headers, expected: tuple[object, ...]
) -> None:
    assert chat(proxy, headers, prefix).status == 200
    span = recorded(proxy)[0]
    assert (span.rollout_id, span.attempt, span.role, span.attributed_by) == expected
    assert span.attribution_confidence == 1.0
    seen = dict(engine.calls[0].headers)
    assert not {"x-rollout-id", "x-attempt", "x-role"} & seen.keys()


def test_calls_that_name_nobody_each_get_a_rollout_of_their_own(proxy: ProxyThread) -> None:
    chat(proxy)
    chat(proxy, [("X-Rollout-Id", "not an id")])
    first, second = recorded(proxy, 2)
    assert first.rollout_id != second.rollout_id
    assert (first.attributed_by, first.attribution_confidence) == ("none", 0.0)


@pytest.mark.parametrize("path", ["/rollout/%20/v1/models", "/rollout/r1/attempt/0" + CHAT])
def test_an_id_that_cannot_be_one_is_a_400_that_says_what_would_be_right(
    engine: EngineThread, proxy: ProxyThread, path: str
) -> None:
    answer = send(proxy.url, path, HELLO)
    assert (answer.status, answer.json["error"]["code"]) == (400, "invalid_input")
    assert "needed" in answer.json["error"]["message"]
    assert engine.requests == []


@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
def test_a_key_that_was_issued_for_a_rollout_names_it(
    engine: EngineThread, proxy: ProxyThread, header: str
) -> None:
    made = send(proxy.url, "/api/rollouts", {"task_id": "t", "role": "writer"}).json
    key = made["api_key"]
    chat(proxy, [(header, f"Bearer {key}" if header == "Authorization" else key)])
    span = recorded(proxy)[0]
    assert (span.rollout_id, span.role, span.attributed_by) == (made["rollout_id"], "writer", "key")
    with proxy.store() as store:
        assert store.get_rollout(span.rollout_id).task_id == "t"


def test_a_key_is_known_to_the_next_proxy_as_well(engine: EngineThread, make_proxy: MakeProxy) -> None:
    made = send(make_proxy(engine.base_url).url, "/api/rollouts", {}).json
    later = make_proxy(engine.base_url)
    chat(later, [("Authorization", f"Bearer {made['api_key']}")])
    assert recorded(later)[0].rollout_id == made["rollout_id"]


def test_the_base_url_of_a_rollout_leads_to_it(proxy: ProxyThread) -> None:
    made = send(proxy.url, "/api/rollouts", {"rollout_id": "r1", "role": "writer"}).json
    assert made["base_url"] == f"{proxy.url}/rollout/r1/role/writer/v1"
    chat(proxy, prefix=made["base_url"].removeprefix(proxy.url).removesuffix("/v1"))
    span = recorded(proxy)[0]
    assert (span.rollout_id, span.role) == ("r1", "writer")


def test_a_call_after_its_rollout_has_ended_still_goes_through(proxy: ProxyThread) -> None:
    with proxy.store() as store:
        store.create_rollout(rollout_id="r1")
        store.finish_rollout("r1", RolloutState.SUCCEEDED)
    assert chat(proxy, prefix="/rollout/r1").status == 200
    assert recorded(proxy)[0].rollout_id == "r1"


# -- when it is there ----------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_whoever_has_the_last_byte_finds_the_span_in_the_database(
    engine: EngineThread, proxy: ProxyThread, path: str, streamed: bool
) -> None:
    body = {**HELLO, "prompt": "x", "stream": streamed}
    with proxy.store() as store:
        for count in range(1, 31):
            with Call(proxy.url, path, body) as call:
                last = b"data: [DONE]" if streamed else b'"metrics":null}'
                call.read_until(last)
                spans = store.list_spans(limit=100)
                assert len(spans) == count, "the answer was there before its span"
                assert spans[0].fidelity is Fidelity.EXACT


def test_an_error_is_on_record_before_the_agent_has_it(engine: EngineThread, proxy: ProxyThread) -> None:
    engine.script(Script(status=500), times=10)
    with proxy.store() as store:
        for count in range(1, 11):
            assert chat(proxy).status == 500
            assert len(store.list_spans()) == count


def test_a_stream_without_done_is_on_record_before_it_ends(engine: EngineThread, proxy: ProxyThread) -> None:
    chat(proxy, list(Script(without_done=True).to_header().items()), stream=True)
    with proxy.store() as store:
        (span,) = store.list_spans()
    assert (span.error_class, span.fidelity) == (None, Fidelity.EXACT)


def test_an_orderly_stop_lets_calls_under_way_finish_and_keeps_their_spans(
    engine: EngineThread, proxy_process: ProxyProcess
) -> None:
    engine.script(Script(chunk_delay_s=0.02))
    with Call(proxy_process.url, CHAT, {**HELLO, "stream": True}) as call:
        call.read_until(b'"content":"')
        proxy_process.process.send_signal(signal.SIGTERM)
        assert call.rest().endswith(b"data: [DONE]\n\n")
    assert proxy_process.process.wait(60) == 0
    with Store.open(proxy_process.db) as store:
        (span,) = store.list_spans()
    assert (span.error_class, span.fidelity) == (None, Fidelity.EXACT)


# -- secrets -------------------------------------------------------------------------------------


def test_no_secret_is_anywhere_in_the_database(engine: EngineThread, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(engine.base_url, proxy={"upstream_api_key": "up-secret-1"})
    made = send(proxy.url, "/api/rollouts", {}).json
    headers = [
        ("Authorization", "Bearer sk-secret-2"),
        ("x-api-key", "sk-secret-3"),
        ("Cookie", "session=secret-4"),
        ("Proxy-Authorization", "Basic secret-5"),
    ]
    for streamed in (False, True):
        chat(proxy, headers, stream=streamed)
        chat(proxy, [("Authorization", f"Bearer {made['api_key']}")], stream=streamed)
        chat(proxy, [*headers, *Script(status=500).to_header().items()], stream=streamed)
        chat(proxy, [*headers, *Script(reset=True).to_header().items()], stream=streamed)
    send(proxy.url, "/v1/embeddings", {}, [*JSON, *headers])
    spans = recorded(proxy, 8)
    stored = b"".join(path.read_bytes() for path in proxy.db.parent.glob("lightning.db*"))
    stored += b"".join(span.request + (span.response or b"") for span in spans)  # packed, in the file
    assert b"hello" in stored
    for secret in (b"secret-", made["api_key"].encode()):
        assert secret not in stored


# -- counts --------------------------------------------------------------------------------------


def test_the_metrics_count_what_happened(engine: EngineThread, proxy: ProxyThread) -> None:
    chat(proxy)
    chat(proxy, stream=True)
    engine.script(Script(status=429))
    chat(proxy)
    send(proxy.url, "/v1/embeddings", {})
    counts = {
        'lightning_calls_total{status="2xx",wire="chat"}': 2,
        'lightning_calls_total{status="4xx",wire="chat"}': 1,
        'lightning_calls_total{status="2xx",wire="other"}': 1,
        'lightning_spans_total{fidelity="exact",wire="chat"}': 2,
        'lightning_spans_total{fidelity="incomplete",wire="chat"}': 1,
        'lightning_upstream_errors_total{error_class="rate_limited"}': 1,
        "lightning_call_seconds_count": 3,
        "lightning_commit_seconds_count": 3,
        'lightning_policy_version{policy="policy"}': 0,
        "lightning_held_calls": 0,
        "lightning_spans_pending": 0,
    }
    wait_until(lambda: metric(proxy.url, "lightning_spans_pending") == 0)
    assert {name: metric(proxy.url, name) for name in counts} == counts


def test_agents_on_one_connection_are_served_one_after_the_other(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    raw = json.dumps(HELLO).encode()
    one = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(raw)) + raw
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=60) as agent:
        agent.sendall(one * 5)  # pipelined
        got = b""
        while got.count(b'"metrics":null}') < 5:
            got += agent.recv(65536)
    assert got.count(b"HTTP/1.1 200 OK") == 5
    assert len(recorded(proxy, 5)) == 5
