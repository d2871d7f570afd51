"""Trouble at the engine and at the agent: what breaks for one breaks for the other, and no more."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lightning_proxy.proxy import question
from lightning_proxy.proxy.app import PARTS
from lightning_proxy.store import Fidelity, Store
from tests.conftest import MakeProxy, ProxyProcess, ProxyThread, wait_until
from tests.engine import EngineThread, FakeEngine, Script
from tests.proxy.raw_http import (
    CHAT,
    COMPLETIONS,
    CUT,
    HELLO,
    JSON,
    STREAM_HEAD,
    VLLM_MODELS,
    Call,
    chat,
    http_answer,
    http_chunks,
    metric,
    raw_upstream,
    recorded,
    send,
)

MakeEngine = Callable[[FakeEngine], EngineThread]
STREAM: dict[str, Any] = {**HELLO, "stream": True}
CHUNK = b'{"id":"x","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}'
FINISHED = b"data: " + CHUNK + b"\n\ndata: [DONE]\n\n"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# -- the engine's troubles -----------------------------------------------------------------------


@pytest.mark.parametrize("by", ["close", "reset"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/embeddings"])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_is_cut_is_cut_for_the_agent_too(
    engine: EngineThread, proxy: ProxyThread, path: str, by: Any, streamed: bool
) -> None:
    body = {**HELLO, "prompt": "x", "stream": streamed}
    with pytest.raises(CUT):
        send(proxy.url, path, body, [*JSON, *Script(cut_after=9, cut_by=by).to_header().items()])
    if path != "/v1/embeddings":
        span = recorded(proxy)[0]
        assert (span.error_class, span.fidelity, span.response) == ("cut_stream", Fidelity.INCOMPLETE, None)
        assert (span.status, span.streamed) == (200, streamed)


@pytest.mark.parametrize("by", ["close", "reset"])
def test_the_real_process_cuts_and_notices_hang_ups_as_well(
    engine: EngineThread, proxy_process: ProxyProcess, by: Any
) -> None:
    cut = Script(cut_after=9, cut_by=by).to_header()
    for streamed in (False, True):
        with pytest.raises(CUT):
            send(proxy_process.url, CHAT, {**HELLO, "stream": streamed}, [*JSON, *cut.items()])
    engine.script(Script(chunk_delay_s=0.05, tokens=2000))  # longer than anybody takes to notice
    with Call(proxy_process.url, CHAT, STREAM) as call:
        call.read_until(b'"content":"')
        call.hang_up(reset=by == "reset")
    wait_until(lambda: engine.calls[-1].aborted)
    with Store.open(proxy_process.db) as store:
        wait_until(lambda: len(store.list_spans()) == 3)
        classes = [span.error_class for span in store.list_spans()]
    assert classes == ["client_disconnect", "cut_stream", "cut_stream"]
    assert "Traceback" not in proxy_process.log.read_text()


def test_what_came_before_a_cut_reached_the_agent_and_the_record(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    script = Script(cut_after=6, chunk_delay_s=0.02)
    with Call(proxy.url, CHAT, STREAM, [*JSON, *script.to_header().items()]) as call:
        got = bytearray(call.read_until(b"\n\n"))
        with pytest.raises(CUT):
            call.drain(got)
    assert got.count(b"data: ") == 6
    expected = engine.model.generate(HELLO)
    generation = recorded(proxy)[0].generations[0]
    assert list(generation.response_token_ids) == expected.choices[0].token_ids[:5]
    assert generation.finish_reason is None


def test_a_stream_that_ends_without_a_finish_reason_is_not_taken_for_whole(make_proxy: MakeProxy) -> None:
    event = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(STREAM_HEAD + http_chunks(event))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        assert send(proxy.url, CHAT, STREAM).body == event
        span = recorded(proxy)[0]
        assert (span.error_class, span.fidelity) == ("cut_stream", Fidelity.INCOMPLETE)


@pytest.mark.parametrize("end", ["cut", "slow"])
def test_a_cut_after_done_leaves_one_whole_span(make_proxy: MakeProxy, end: str) -> None:
    over = threading.Event()

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(STREAM_HEAD + http_chunks(FINISHED, end=False))
        over.wait(60)
        return False  # the last, empty chunk never comes

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        with Call(proxy.url, CHAT, STREAM) as call:
            assert call.read_until(b"[DONE]\n\n").endswith(b"data: [DONE]\n\n")
            assert [span.error_class for span in recorded(proxy)] == [None]
            if end == "slow":
                call.hang_up()
                time.sleep(0.1)
            over.set()
            if end == "cut":
                with pytest.raises(CUT):
                    call.rest()
        time.sleep(0.1)
        assert [span.error_class for span in recorded(proxy)] == [None]


@pytest.mark.parametrize("pooled", [False, True])
def test_a_connection_that_is_reset_before_an_answer_is_a_502_after_one_more_try_if_it_was_an_old_one(
    engine: EngineThread, proxy: ProxyThread, pooled: bool
) -> None:
    if pooled:
        assert send(proxy.url, "/v1/embeddings", b"{}").status == 200
    else:
        assert send(proxy.url, "/healthz").status == 200
        proxy._loop.call_soon_threadsafe(proxy._runner.app[PARTS].engine._is_vllm.__setattr__, "answer", True)
    answer = chat(proxy, list(Script(reset=True).to_header().items()))
    check_502(answer.status, answer.json)
    assert len(engine.calls) == (2 if pooled else 1)
    span = recorded(proxy)[0]
    assert (span.error_class, span.status, span.fidelity) == (
        "upstream_unreachable",
        502,
        Fidelity.INCOMPLETE,
    )


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/embeddings"])
def test_an_engine_that_is_down_is_a_502_in_openais_shape(make_proxy: MakeProxy, path: str) -> None:
    proxy = make_proxy(f"http://127.0.0.1:{free_port()}/v1")
    answer = send(proxy.url, path, None if path == "/v1/models" else HELLO)
    check_502(answer.status, answer.json)
    assert (answer.header("content-type") or "").startswith("application/json")
    name = "chat" if path == CHAT else "other"
    assert metric(proxy.url, f'lightning_calls_total{{status="5xx",wire="{name}"}}') == 1.0


def check_502(status: int, body: Any) -> None:
    assert status == 502
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == "upstream_unreachable"
    assert "did not answer" in error["message"]


def test_an_engine_that_comes_back_is_used_at_once(make_proxy: MakeProxy, make_engine: MakeEngine) -> None:
    port = free_port()
    proxy = make_proxy(f"http://127.0.0.1:{port}/v1")
    assert chat(proxy).status == 502
    engine = EngineThread(FakeEngine(), port)
    try:
        assert chat(proxy).status == 200
        assert [span.fidelity for span in recorded(proxy, 2)] == [Fidelity.INCOMPLETE, Fidelity.EXACT]
    finally:
        engine.stop()


def test_garbage_inside_a_stream_passes_through_and_is_on_record(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    answer = chat(proxy, list(Script(garbage=True).to_header().items()), stream=True)
    assert b'data: {"choices": [{"delta"\n\n' in answer.body
    assert answer.body.endswith(b"data: [DONE]\n\n")
    span = recorded(proxy)[0]
    assert (span.error_class, span.fidelity) == ("capture_fault", Fidelity.INCOMPLETE)
    assert metric(proxy.url, 'lightning_capture_faults_total{kind="unreadable_answer"}') == 1.0


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_could_not_be_read_leaves_its_rollout_marked_by_the_time_the_agent_has_it(
    engine: EngineThread, proxy: ProxyThread, streamed: bool
) -> None:
    chat(proxy, prefix="/rollout/whole")
    chat(proxy, list(Script(garbage=True).to_header().items()), prefix="/rollout/broken", stream=streamed)
    with proxy.store() as store:
        assert store.get_rollout("whole").incomplete is None
        assert "DecodeError" in (store.get_rollout("broken").incomplete or "")


KEY = "sk-agent-0123456789abcdef"


@pytest.mark.parametrize("header", ["Authorization", "x-api-key", "api-key", "Cookie"])
@pytest.mark.parametrize("status", [401, 200])
def test_a_key_that_the_engine_repeats_reaches_the_agent_and_not_the_record(
    make_proxy: MakeProxy, header: str, status: int
) -> None:
    said = json.dumps({"id": "x", "choices": [], "error": f"Incorrect API key: {KEY}; short: EMPTY"}).encode()

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        assert KEY.encode() in head
        connection.sendall(http_answer(said, "Content-Type: application/json", status=f"{status} X"))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        value = {"Authorization": f"Bearer {KEY}", "Cookie": f"a=EMPTY; s={KEY}"}.get(header, KEY)
        assert chat(proxy, [(header, value)]).body == said
        span = recorded(proxy)[0]
        kept = span.error if status == 401 else (span.response or b"").decode()
        assert kept == said.decode().replace(KEY, "[redacted]")
    stored = [file.read_bytes() for file in proxy.db.parent.glob(f"{proxy.db.name}*")]
    assert stored
    assert not any(KEY.encode() in content for content in stored)


def test_the_upstreams_own_key_is_not_recorded_either(make_proxy: MakeProxy) -> None:
    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(http_answer(f"bad key {KEY}".encode(), status="401 Unauthorized"))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url, proxy={"upstream_api_key": KEY})
        chat(proxy)
        assert recorded(proxy)[0].error == "bad key [redacted]"


def test_an_error_event_inside_a_stream_is_an_error_on_record(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    answer = chat(proxy, list(Script(error_after=3).to_header().items()), stream=True)
    assert "error" in answer.events[3]
    span = recorded(proxy)[0]
    assert (span.error_class, span.response) == ("engine_error", None)
    assert "the engine failed" in (span.error or "")


@pytest.mark.parametrize(
    ("status", "error_class"),
    [(400, "upstream_refused"), (429, "rate_limited"), (500, "upstream_error")],
)
def test_an_error_of_the_engine_is_on_record_with_what_it_said(
    engine: EngineThread, proxy: ProxyThread, status: int, error_class: str
) -> None:
    engine.script(Script(status=status, body="too bad"))
    assert chat(proxy).body == b"too bad"
    span = recorded(proxy)[0]
    assert (span.status, span.error_class, span.error) == (status, error_class, "too bad")


@pytest.mark.parametrize("token_ids", [["a"], [2**40], "abc", {"x": 1}, [1.5]])
@pytest.mark.parametrize("streamed", [False, True])
def test_token_data_of_any_other_kind_is_no_trouble_for_the_agent(
    make_proxy: MakeProxy, token_ids: Any, streamed: bool
) -> None:
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "token_ids": token_ids,
        "message": {},
        "delta": {"content": "a"},
    }
    event = json.dumps({"id": "x", "prompt_token_ids": [1], "choices": [choice]}).encode()

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        stream = STREAM_HEAD + http_chunks(b"data: " + event + b"\n\ndata: [DONE]\n\n")
        connection.sendall(stream if streamed else http_answer(event, "Content-Type: application/json"))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        got = chat(proxy, stream=streamed)
        assert got.status == 200
        assert (got.events[-1] == "[DONE]") if streamed else (got.json["id"] == "x")
        span = recorded(proxy)[0]
        assert (span.error_class, span.fidelity) == ("capture_fault", Fidelity.INCOMPLETE)


# -- what kind of engine it is -------------------------------------------------------------------


def test_an_engine_that_is_not_vllm_is_asked_for_nothing(
    make_engine: MakeEngine, make_proxy: MakeProxy
) -> None:
    engine = make_engine(FakeEngine(owner="openai", refuse_token_ids=True))
    proxy = make_proxy(engine.base_url)
    assert chat(proxy).status == chat(proxy, stream=True).status == 200
    assert [call.json for call in engine.calls] == [HELLO, STREAM]
    assert [span.fidelity for span in recorded(proxy, 2)] == [Fidelity.TEXT] * 2
    assert len([r for r in engine.requests if r.path == "/v1/models"]) == 1, "asked once"


def test_an_engine_is_asked_for_nothing_where_the_settings_say_so(
    engine: EngineThread, make_proxy: MakeProxy
) -> None:
    proxy = make_proxy(engine.base_url, proxy={"capture": "text"})
    chat(proxy)
    assert [request.path for request in engine.requests] == [CHAT]
    assert engine.calls[0].json == HELLO


def test_an_engine_that_refuses_what_the_settings_insist_on_is_heard(
    make_engine: MakeEngine, make_proxy: MakeProxy
) -> None:
    engine = make_engine(FakeEngine(owner="openai", refuse_token_ids=True))
    proxy = make_proxy(engine.base_url, proxy={"capture": "tokens"})
    answer = chat(proxy)
    assert answer.status == 400
    assert "return_token_ids" in answer.json["error"]["message"]
    assert recorded(proxy)[0].error_class == "upstream_refused"


def test_an_engine_that_was_busy_when_asked_what_it_is_is_asked_again_beside_the_calls(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(question, "_AGAIN_S", 0.3)
    asked: list[str] = []

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(http_answer(b'{"id":"x","choices":[]}', "Content-Type: application/json"))
        return True

    def models(connection: socket.socket, head: bytes, body: bytes) -> bool:
        asked.append("models")
        busy = len(asked) == 1
        status = "503 Service Unavailable" if busy else "200 OK"
        connection.sendall(http_answer(VLLM_MODELS, "Content-Type: application/json", status=status))
        return True

    def both(connection: socket.socket, head: bytes, body: bytes) -> bool:
        if b"/v1/models" in head.split(b"\r\n")[0]:
            return models(connection, head, body)
        asked.append("tokens" if b"return_token_ids" in body else "text")
        return answer(connection, head, body)

    with raw_upstream(both, models=False) as upstream:
        proxy = make_proxy(upstream.base_url)
        assert [chat(proxy).status for _ in range(3)] == [200] * 3
        assert asked == ["models", *["text"] * 3], "not at each call"
        time.sleep(0.3)
        chat(proxy)
        wait_until(lambda: asked.count("models") == 2)
        wait_until(lambda: chat(proxy).status == 200 and asked[-1] == "tokens")
    assert asked.count("models") == 2


@pytest.mark.parametrize("fault", ["403", "429", "500", "hangs"])
def test_an_engine_that_does_not_say_what_it_is_delays_calls_once(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(question, "_PATIENCE_S", 0.5)
    asked: list[float] = []

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        if b"/v1/models" not in head.split(b"\r\n")[0]:
            connection.sendall(http_answer(b'{"id":"x","choices":[]}', "Content-Type: application/json"))
            return True
        asked.append(time.monotonic())
        time.sleep(3.0 if fault == "hangs" else 0.3)
        status = "200 OK" if fault == "hangs" else f"{fault} X"
        connection.sendall(http_answer(b"{}", "Content-Type: application/json", status=status))
        return True

    with raw_upstream(answer, models=False) as upstream, ThreadPoolExecutor(4) as pool:
        proxy = make_proxy(upstream.base_url)
        begun = time.monotonic()
        assert [one.status for one in pool.map(lambda _: chat(proxy), range(4))] == [200] * 4
        assert time.monotonic() - begun < 2
        assert len(asked) == 1, "one question at a time"
        begun = time.monotonic()
        assert [chat(proxy).status for _ in range(3)] == [200] * 3
        assert time.monotonic() - begun < 0.4
        assert len(asked) == 1


@pytest.mark.parametrize("processed", [True, False])
def test_which_logprobs_an_engine_tells_is_asked_beside_the_calls(
    make_proxy: MakeProxy, processed: bool
) -> None:
    answers_now = threading.Event()
    warm = {**HELLO, "temperature": 0.7}

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        said: Any = {"id": "x", "choices": []}
        if b"/v1/models" in head.split(b"\r\n")[0]:
            said = json.loads(VLLM_MODELS)
        elif b"/v1/completions" in head.split(b"\r\n")[0]:
            answers_now.wait(10)
            gap = 1.0 / json.loads(body)["temperature"] if processed else 1.0
            said = {"choices": [{"logprobs": {"top_logprobs": [{"a": -1.0, "b": -1.0 - gap}]}}]}
        elif b"while it is asked" in body:
            answers_now.set()
            time.sleep(0.5)
        connection.sendall(http_answer(json.dumps(said).encode(), "Content-Type: application/json"))
        return True

    with raw_upstream(answer, models=False) as upstream:
        proxy = make_proxy(upstream.base_url)
        begun = time.monotonic()
        assert send(proxy.url, CHAT, warm).status == 200
        assert time.monotonic() - begun < 3
        asked = {**warm, "messages": [{"role": "user", "content": "while it is asked"}]}
        assert send(proxy.url, CHAT, asked).status == 200
        assert send(proxy.url, CHAT, warm).status == 200
        modes = [span.sampling.get("logprobs_mode") for span in recorded(proxy, 3)]
    assert modes == [None, *["processed_logprobs" if processed else None] * 2]


def test_an_engine_that_answers_to_the_agents_key_only_is_asked_with_that(make_proxy: MakeProxy) -> None:
    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        known = b"authorization: bearer sk-agent" in head.lower()
        status = "200 OK" if known else "401 Unauthorized"
        models = b"/v1/models" in head.split(b"\r\n")[0]
        said = VLLM_MODELS if models else json.dumps({"choices": [], "asked": body.decode()}).encode()
        connection.sendall(http_answer(said, "Content-Type: application/json", status=status))
        return True

    with raw_upstream(answer, models=False) as upstream:
        proxy = make_proxy(upstream.base_url)
        for key in ("sk-stranger", "sk-agent"):
            got = chat(proxy, [("Authorization", f"Bearer {key}")]).json["asked"]
            assert ("return_token_ids" in got) == (key == "sk-agent")


@pytest.mark.parametrize(
    "models", [b"\xff{", b"[]", b"null", b'{"data": 7}', b'{"data": [{"owned_by": ["vllm"]}, 1]}']
)
def test_an_engine_that_says_nothing_sensible_about_itself_is_asked_for_nothing(
    make_proxy: MakeProxy, models: bytes
) -> None:
    bodies: list[bytes] = []

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        if body:
            bodies.append(body)
        connection.sendall(http_answer(models if not body else b"{}", "Content-Type: application/json"))
        return True

    with raw_upstream(answer, models=False) as upstream:
        proxy = make_proxy(upstream.base_url)
        assert chat(proxy).status == 200
    assert [json.loads(body) for body in bodies] == [HELLO]


# -- connections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/other"])
def test_connections_that_the_engine_closed_while_idle_are_not_the_agents_trouble(
    engine: EngineThread, proxy: ProxyThread, path: str
) -> None:
    body = None if path == "/v1/other" else HELLO
    for _ in range(5):
        assert send(proxy.url, path, body).status == 200
        engine.drop_idle()
    assert send(proxy.url, path, body).status == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/other"])
def test_a_connection_that_dies_just_as_it_is_used_again_is_not_the_agents_trouble(
    make_proxy: MakeProxy, path: str
) -> None:
    served: dict[int, int] = {}

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        number = served[connection.fileno()] = served.get(connection.fileno(), 0) + 1
        if number == 2:
            served.pop(connection.fileno())
            return False  # as uvicorn does when its keep-alive time is over at that very moment
        connection.sendall(http_answer(body or b"{}", "Content-Type: application/json"))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        for _ in range(6):
            assert send(proxy.url, path, None if path == "/v1/other" else HELLO).status == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
def test_a_call_that_the_engine_worked_on_is_not_sent_again(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr("lightning_proxy.proxy.upstream._AT_ONCE_S", 0.2)
    bodies: list[bytes] = []

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        bodies.append(body)
        if len(bodies) == 1:
            connection.sendall(http_answer(b"{}", "Content-Type: application/json"))
            return True
        time.sleep(0.5)
        return False

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url, proxy={"capture": "text"})
        assert send(proxy.url, path, HELLO).status == 200
        answer_ = send(proxy.url, path, HELLO)
        check_502(answer_.status, answer_.json)
    assert len(bodies) == 2


# -- the agent's troubles ------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
def test_an_agent_that_hangs_up_in_mid_stream_stops_the_generation(
    engine: EngineThread, proxy: ProxyThread, reset: bool
) -> None:
    engine.script(Script(chunk_delay_s=0.05, tokens=2000))  # longer than anybody takes to notice
    with Call(proxy.url, f"/rollout/r1{CHAT}", STREAM) as call:
        call.read_until(b'"content":"')
        call.hang_up(reset=reset)
    wait_until(lambda: engine.calls[0].aborted)
    span = recorded(proxy)[0]
    assert (span.error_class, span.fidelity, span.status) == ("client_disconnect", Fidelity.INCOMPLETE, 200)
    assert span.rollout_id == "r1"


def test_an_agent_that_hangs_up_before_a_whole_answer_stops_the_generation(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    engine.script(Script(delay_s=20))
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2]))) as agent:
        raw = json.dumps(HELLO).encode()
        agent.sendall(
            b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(raw)) + raw
        )
        engine.wait_for_calls(1)
    wait_until(lambda: engine.calls[0].aborted)
    span = recorded(proxy)[0]
    assert (span.error_class, span.status) == ("client_disconnect", None)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/models/slow"])
def test_an_agent_that_hangs_up_on_any_other_call_stops_it_too(
    engine: EngineThread, proxy: ProxyThread, path: str
) -> None:
    engine.script(Script(delay_s=20), path=path)
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2]))) as agent:
        agent.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        wait_until(lambda: any(request.path == path for request in engine.requests))
    wait_until(lambda: any(r.path == path and r.aborted for r in engine.requests))


@pytest.mark.parametrize("reset", [False, True])
def test_an_agent_that_hangs_up_after_done_has_had_a_whole_answer(
    engine: EngineThread, proxy: ProxyThread, reset: bool
) -> None:
    with Call(proxy.url, CHAT, STREAM) as call:
        call.read_until(b"data: [DONE]\n\n")
        call.hang_up(reset=reset)
    wait_until(lambda: engine.calls[0].answered)
    span = recorded(proxy)[0]
    assert (span.error_class, span.fidelity) == (None, Fidelity.EXACT)
    assert not engine.calls[0].aborted


def test_an_agent_that_reads_slowly_gets_everything(engine: EngineThread, proxy: ProxyThread) -> None:
    engine.script(Script(text="x" * 3000, tokens_per_chunk=1))
    with Call(proxy.url, CHAT, STREAM) as call:
        call.read_until(b"\n\n")
        time.sleep(0.5)
        assert call.rest().endswith(b"data: [DONE]\n\n")
    assert recorded(proxy)[0].fidelity is Fidelity.EXACT


def test_an_upload_that_breaks_off_is_no_call(engine: EngineThread, proxy: ProxyThread) -> None:
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2]))) as agent:
        agent.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())
    assert chat(proxy).status == 200
    assert len(engine.calls) == 1
    assert len(recorded(proxy)) == 1


def test_a_body_beyond_the_limit_is_refused_in_openais_shape(
    engine: EngineThread, make_proxy: MakeProxy
) -> None:
    proxy = make_proxy(engine.base_url, proxy={"max_body_mb": 1})
    answer = send(proxy.url, CHAT, b" " * (2**20 + 1))
    assert (answer.status, answer.json["error"]["code"]) == (413, "too_large")
    assert "max_body_mb" in answer.json["error"]["message"]
