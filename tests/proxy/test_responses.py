"""The Responses wire: what the agent gets, what the engine is asked, what is recorded."""

from __future__ import annotations

import json
import socket
from array import array
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from lightning_proxy.proxy.wires.responses import ResponsesWire
from lightning_proxy.proxy.wires.responses_request import LOGPROBS
from lightning_proxy.store import Fidelity, Span
from tests.conftest import MakeProxy, ProxyThread, wait_until
from tests.engine import EngineThread, FakeEngine, Script, responses
from tests.proxy.raw_http import (
    CHAT,
    CUT,
    JSON,
    STREAM_HEAD,
    Answer,
    Call,
    http_answer,
    http_chunks,
    raw_upstream,
    recorded,
    send,
)
from tests.responses_compare import comparable

Json = dict[str, Any]
MakeEngine = Callable[[FakeEngine], EngineThread]

PATH = "/v1/responses"
PLAIN: Json = {"model": "policy", "input": "hello"}
TOOL: Json = {
    "type": "function",
    "name": "sql",
    "description": "Run a query.",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
}
TOOLS: Json = {**PLAIN, "tools": [TOOL]}
USER: Json = {"role": "user", "content": "What is the highest price?"}
CALL: Json = {"type": "function_call", "call_id": "call_1", "name": "sql", "arguments": '{"query": "é"}'}
OUTPUT: Json = {"type": "function_call_output", "call_id": "call_1", "output": "33"}
SAID: Json = {
    "type": "message",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
}
SPACE: Json = {"type": "namespace", "name": "db", "description": "A database.", "tools": [
    {**TOOL, "strict": False}, {"type": "custom", "name": "raw"}]}  # fmt: skip
SEARCH: Json = {"type": "web_search", "external_web_access": True}
MIXED: Json = {**PLAIN, "tools": [TOOL, SPACE, {**TOOL, "name": "other"}, SEARCH]}
# Codex adds this to every item.
PASSED: Json = {"internal_chat_message_metadata_passthrough": {"turn_id": "1"}}
ASKED: Json = {"enable_response_messages": True, "include": [LOGPROBS]}
CALLS = Script(tool_calls=(("sql", '{"query": "SELECT 1"}'), ("sql", '{"query": "é"}')))

REQUESTS: dict[str, Json] = {
    "plain": PLAIN,
    "instructions": {**PLAIN, "instructions": "Be brief.", "temperature": 0.5, "top_p": 0.25},
    "items": {**PLAIN, "input": [USER, SAID, USER]},
    "cut": {**PLAIN, "max_output_tokens": 5},
    "asked for logprobs": {**PLAIN, "include": [LOGPROBS], "top_logprobs": 2},
    "asked for messages": {**PLAIN, "enable_response_messages": True},
    "asked for both": {**PLAIN, **ASKED},
    "lonely top_logprobs": {**PLAIN, "top_logprobs": 2},
    "tools": TOOLS,
    "tools, cut": {**TOOLS, "max_output_tokens": 5},
    "tools, cold": {**TOOLS, "temperature": 0.001, "top_p": 0.5, "presence_penalty": 1},
    "a tool answered": {**TOOLS, "input": [USER, SAID, CALL, OUTPUT]},
    "a tool forced": {**TOOLS, "tool_choice": "required"},
    "a tool named": {**TOOLS, "tool_choice": {"type": "function", "name": "sql"}},
    "everything": {
        **TOOLS,
        "text": {"verbosity": "low"},
        "reasoning": {"effort": "low"},
        "metadata": {"a": "b"},
        "user": "u",
        "parallel_tool_calls": False,
        "include": ["reasoning.encrypted_content"],
    },
    "mixed tools": MIXED,
    "mixed tools, none of them plain": {**PLAIN, "tools": [SEARCH, SPACE]},
    "mixed tools, answered": {
        **MIXED,
        "input": [
            {**USER, **PASSED},
            {**SAID, **PASSED},
            {**CALL, **PASSED, "namespace": "db"},
            {**OUTPUT, **PASSED},
        ],
    },
    "mixed tools, forced": {**MIXED, "tool_choice": "required"},
    "unheard of": {**TOOLS, "unheard_of": 1},
    "built-in": {**PLAIN, "tools": [{"type": "web_search"}]},
}
SCRIPTS: dict[str, Script] = {
    "text": Script(),
    "three tokens at a time": Script(text="naïve 漢字 😀", tokens_per_chunk=3),
    "calls": CALLS,
    "text and calls": CALLS.with_({"text": "Well: é"}),
    "calls in one piece": CALLS.with_({"tokens_per_chunk": 1000}),
    "one token": Script(tokens=1),
    "namespaced calls": Script(text="Well.", tool_calls=(("db__sql", '{"query": "é"}'), ("sql", "{}"))),
}


def ask(url: str, body: object, script: Script | None = None) -> Answer:
    return send(url, PATH, body, [*JSON, *(script.to_header().items() if script else ())])


def posts(engine: EngineThread) -> list[tuple[str, Json]]:
    """The model calls that were not our own probing ones."""
    sent = [(call.path, call.json) for call in engine.calls]
    return [(path, body) for path, body in sent if body.get("input") != "x" and body.get("prompt") != "1"]


def expected_span(engine: EngineThread, span: Span, body: Json, script: Script) -> None:
    reply = engine.model.generate(
        responses.as_chat(body), text=script.text, tool_calls=script.tool_calls, tokens=script.tokens
    )
    (generation,), (choice,) = span.generations, reply.choices
    assert generation.prompt_token_ids == array("i", reply.prompt_token_ids)
    assert generation.response_token_ids == array("i", choice.token_ids)
    assert generation.finish_reason == choice.finish_reason
    if span.fidelity is Fidelity.EXACT:
        assert generation.logprobs == array("f", choice.logprobs)


# -- what the agent gets, and what is recorded ---------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("how", SCRIPTS)
@pytest.mark.parametrize("name", REQUESTS)
def test_the_answer_is_the_engines_and_its_tokens_are_recorded(
    engine: EngineThread, proxy: ProxyThread, name: str, how: str, streamed: bool
) -> None:
    body, script = {**REQUESTS[name], "stream": streamed}, SCRIPTS[how]
    straight, through = ask(engine.url, body, script), ask(proxy.url, body, script)
    assert (through.status, through.end_to_end[2]) == (straight.status, straight.end_to_end[2])
    got = comparable(through.body.decode())
    assert got == comparable(straight.body.decode())
    span = recorded(proxy)[0]
    assert (span.wire, span.error_class, span.streamed) == ("responses", None, streamed)
    seen = json.loads(through.body) if not streamed else through.events[-1]["response"]
    assert span.response_id == seen["id"]
    assert (json.loads(span.response or b"{}"), span.usage) == (seen, seen["usage"])
    translated = "tools" in body and name not in ("unheard of", "built-in", "mixed tools, forced")
    has_text = any(item["type"] == "message" for item in seen["output"])
    assert span.fidelity is (Fidelity.EXACT if translated or has_text else Fidelity.TEXT)
    expected_span(engine, span, body, script)
    path = posts(engine)[-1][0]
    assert path == (CHAT if translated else PATH)


@pytest.mark.parametrize("split", [1, 7])
@pytest.mark.parametrize("body", [PLAIN, TOOLS])
def test_events_may_be_split_anywhere(
    engine: EngineThread, proxy: ProxyThread, body: Json, split: int
) -> None:
    script = CALLS.with_({"text": "é: ", "split": split, "line_end": "\r\n" if body is TOOLS else "\n"})
    through = ask(proxy.url, {**body, "stream": True}, script)
    straight = ask(engine.url, {**body, "stream": True}, script.with_({"line_end": "\n"}))
    assert comparable(through.body.decode()) == comparable(straight.body.decode())


def test_what_nobody_asked_for_is_not_there(engine: EngineThread, proxy: ProxyThread) -> None:
    for streamed in (False, True):
        answer = ask(proxy.url, {**PLAIN, "stream": streamed})
        assert b"raw_message_tokens" not in answer.body
        assert b'"logprob"' not in answer.body
        assert b'"top_logprobs":0' not in answer.body
    asked = posts(engine)[0][1]
    assert asked == {**PLAIN, "stream": False, **ASKED}


def test_sampling_parameters_have_chats_names() -> None:
    request = {"temperature": 0, "max_output_tokens": 5, "text": {"format": {"type": "json_object"}}, "x": 1}
    sampling = ResponsesWire().prepare(b"{}", request, tokens=False).sampling
    assert sampling == {"temperature": 0, "max_tokens": 5, "response_format": {"type": "json_object"}}


# -- mistakes of the agent -----------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        {"input": None},
        {"input": 5, "tools": [TOOL]},
        {"model": "nobody"},
        {"model": "nobody", "tools": [TOOL]},
        {"tool_choice": "required"},
        {"max_output_tokens": 40_000, "tools": [TOOL]},
        {"tools": [{"type": "function"}]},
    ],
)
def test_a_request_that_is_refused_is_refused_as_the_agent_wrote_it(
    engine: EngineThread, proxy: ProxyThread, wrong: Json, streamed: bool
) -> None:
    body = json.dumps({**PLAIN, "stream": streamed, **wrong}, indent=1).encode()
    straight, through = ask(engine.url, body), ask(proxy.url, body)
    assert straight.status >= 400
    assert through.end_to_end == straight.end_to_end
    assert (engine.calls[-1].path, engine.calls[-1].body) == (PATH, body)
    span = recorded(proxy)[0]
    too_long = "max_output_tokens" in wrong
    error_class = "context_overflow" if too_long else "upstream_refused"
    assert (span.error_class, span.status) == (error_class, straight.status)


def test_an_engine_that_takes_none_of_our_questions_gets_none(
    make_engine: MakeEngine, make_proxy: MakeProxy
) -> None:
    engine = make_engine(FakeEngine(refuse_token_ids=True))
    proxy = make_proxy(engine.base_url)
    for body in (PLAIN, TOOLS, TOOLS):
        assert ask(proxy.url, body).status == 200
    assert posts(engine) == [(PATH, PLAIN), (PATH, TOOLS), (PATH, TOOLS)]
    assert {span.fidelity for span in recorded(proxy, 3)} == {Fidelity.TEXT}


def test_what_chat_refuses_is_sent_as_it_is(engine: EngineThread, proxy: ProxyThread) -> None:
    ask(proxy.url, PLAIN)
    engine.script(Script(status=400, body="no tool parser"), path=CHAT)
    answer = ask(proxy.url, TOOLS)
    assert answer.json["object"] == "response"
    assert [path for path, _ in posts(engine)] == [PATH, CHAT, PATH]
    assert recorded(proxy, 2)[1].fidelity is Fidelity.EXACT


@pytest.mark.parametrize("status", [401, 429, 500, 503])
@pytest.mark.parametrize("body", [PLAIN, TOOLS])
def test_a_refusal_that_is_not_about_the_request_is_passed_on_at_once(
    engine: EngineThread, proxy: ProxyThread, body: Json, status: int
) -> None:
    ask(proxy.url, PLAIN)
    before = len(engine.calls)
    path = CHAT if "tools" in body else PATH
    engine.script(Script(status=status, body='{"error":"busy"}', headers={"retry-after": "7"}), path=path)
    answer = ask(proxy.url, body)
    assert (answer.status, answer.header("retry-after"), answer.body) == (status, "7", b'{"error":"busy"}')
    assert len(engine.calls) == before + 1


# -- what kind of engine it is -------------------------------------------------------------------


def test_an_engine_is_asked_for_its_habits_once(engine: EngineThread, proxy: ProxyThread) -> None:
    for body in (PLAIN, TOOLS, PLAIN):
        ask(proxy.url, body)
    probes = [call for call in engine.calls if call.json.get("input") == "x"]
    assert len(probes) == 3
    assert [call.json.get("max_output_tokens") for call in probes] == [1, None, None]
    assert len(posts(engine)) == len(recorded(proxy, 3)) == 3


def test_an_engine_is_asked_once_how_it_repeats_a_set_of_special_tools(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    sets = [[TOOL, SPACE, SEARCH], [SPACE, {**TOOL, "name": "other"}, SEARCH], [TOOL, SEARCH]]
    for tools in [*sets, *sets]:
        ask(proxy.url, {**PLAIN, "tools": tools})
    asked = [call.json["tools"][1:] for call in engine.calls if call.json.get("input") == "x"]
    assert asked == [[], [], [], [SPACE, SEARCH], [SEARCH]]
    assert [path for path, _ in posts(engine)] == [CHAT] * 6
    assert {span.fidelity for span in recorded(proxy, 6)} == {Fidelity.EXACT}


def test_a_set_of_tools_that_was_not_used_for_long_is_asked_for_again(
    engine: EngineThread, proxy: ProxyThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_proxy.proxy.responses_probe._SETS", 2)
    for special in (SPACE, SEARCH, SPACE, {**SPACE, "name": "x"}, SPACE, SEARCH):
        ask(proxy.url, {**PLAIN, "tools": [TOOL, special]})
    asked = [call.json["tools"][1:] for call in engine.calls if call.json.get("input") == "x"][3:]
    assert asked == [[SPACE], [SEARCH], [{**SPACE, "name": "x"}], [SEARCH]]


@pytest.mark.parametrize(
    ("refusal", "later"),
    [(Script(status=400, body="no such tool"), PATH), (Script(status=503, body="busy"), CHAT)],
    ids=["for good", "for now"],
)
def test_an_engine_that_does_not_tell_how_it_repeats_tools_answers_itself(
    engine: EngineThread, proxy: ProxyThread, refusal: Script, later: str
) -> None:
    ask(proxy.url, PLAIN)
    engine.script(refusal, path=PATH)
    for _ in range(2):
        answer = ask(proxy.url, MIXED, CALLS)
        assert comparable(answer.body.decode()) == comparable(ask(engine.url, MIXED, CALLS).body.decode())
    assert [path for path, body in posts(engine)[1:]] == [PATH, PATH, later, PATH]


def test_an_engine_that_puts_a_grammar_on_special_tools_answers_itself(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    """It says so by a `text` that is null; the grammar would be another one in Chat Completions."""
    ask(proxy.url, PLAIN)
    begun = {"response": {"tools": [TOOL, SPACE, SEARCH], "text": None}, "type": "response.created"}
    engine.script(Script(status=200, body=responses.sse(begun).decode()), path=PATH)
    assert ask(proxy.url, MIXED).status == 200
    assert [path for path, _ in posts(engine)] == [PATH, PATH]


def test_an_engine_that_was_busy_when_asked_for_its_habits_still_answers(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    engine.script(Script(status=503, body="busy"), path=PATH)
    assert ask(proxy.url, TOOLS).status == 200
    assert ask(proxy.url, TOOLS).status == 200
    assert [span.fidelity for span in recorded(proxy, 2)] == [Fidelity.TEXT, Fidelity.EXACT]


def test_an_unknown_model_teaches_nothing(engine: EngineThread, proxy: ProxyThread) -> None:
    assert ask(proxy.url, {**TOOLS, "model": "nobody"}).status == 404
    ask(proxy.url, TOOLS)
    assert recorded(proxy, 2)[1].fidelity is Fidelity.EXACT


def test_an_engine_that_keeps_responses_answers_all_of_them_itself(
    make_engine: MakeEngine, make_proxy: MakeProxy
) -> None:
    engine = make_engine(FakeEngine(store_responses=True))
    proxy = make_proxy(engine.base_url)
    first = ask(proxy.url, TOOLS).json
    assert ask(engine.url, TOOLS).status == 200
    assert send(proxy.url, f"{PATH}/{first['id']}").json["id"] == first["id"]
    assert {path for path, _ in posts(engine)} == {PATH}
    assert recorded(proxy)[0].fidelity is Fidelity.EXACT


@pytest.mark.parametrize("streamed", [False, True])
def test_another_provider_is_asked_for_nothing_and_its_bytes_are_not_touched(
    make_engine: MakeEngine, make_proxy: MakeProxy, streamed: bool
) -> None:
    engine = make_engine(FakeEngine(owner="openai", refuse_token_ids=True))
    proxy = make_proxy(engine.base_url)
    body = {**TOOLS, "stream": streamed}
    straight, through = ask(engine.url, body, CALLS), ask(proxy.url, body, CALLS)
    assert [call.json for call in engine.calls] == [body, body]
    assert comparable(through.body.decode()) == comparable(straight.body.decode())
    span = recorded(proxy)[0]
    seen = through.events[-1]["response"] if streamed else through.json
    assert (span.fidelity, span.generations, span.error_class) == (Fidelity.TEXT, (), None)
    assert (span.response_id, json.loads(span.response or b"{}")) == (seen["id"], seen)
    assert span.usage == seen["usage"]


ENDS: list[tuple[Json, str | None]] = [
    ({"type": "response.completed", "response": {"id": "resp_1", "status": "completed", "output": []}}, None),
    ({"type": "response.incomplete", "response": {"id": "resp_1", "status": "incomplete"}}, None),
    ({"type": "response.failed", "response": {"id": "resp_1", "status": "failed", "error": {"code": "x"}}},
     "engine_error"),
    ({"type": "error", "code": "server_error", "message": "sorry"}, "engine_error"),
    ({"type": "response.output_text.delta", "delta": "x"}, "cut_stream"),
]  # fmt: skip


@pytest.mark.parametrize(("last", "error_class"), ENDS, ids=[end["type"] for end, _ in ENDS])
def test_every_end_that_openai_knows_is_told_apart(
    make_proxy: MakeProxy, last: Json, error_class: str | None
) -> None:
    created = {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}}
    stream = b"".join(responses.sse(event) for event in (created, last))

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(STREAM_HEAD + http_chunks(stream))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url, proxy={"capture": "text"})
        assert ask(proxy.url, {**PLAIN, "stream": True}).body == stream
        span = recorded(proxy)[0]
        assert span.error_class == error_class
        assert span.response_id == (None if error_class else "resp_1")


# -- trouble -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["close", "reset"])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("body", [PLAIN, TOOLS], ids=["native", "translated"])
def test_an_answer_that_is_cut_is_cut_for_the_agent_too(
    engine: EngineThread, proxy: ProxyThread, body: Json, streamed: bool, by: Any
) -> None:
    with pytest.raises(CUT):
        ask(proxy.url, {**body, "stream": streamed}, Script(cut_after=9, cut_by=by))
    span = recorded(proxy)[0]
    assert (span.error_class, span.fidelity, span.response) == ("cut_stream", Fidelity.INCOMPLETE, None)


@pytest.mark.parametrize(
    "script",
    [Script(error_after=4), Script(garbage=True), Script(without_done=True), Script(tokens=4, cut_after=5)],
    ids=["error", "garbage", "without done", "cut"],
)
def test_a_translated_stream_that_breaks_has_no_clean_end(
    engine: EngineThread, proxy: ProxyThread, script: Script
) -> None:
    got = bytearray()
    headers = [*JSON, *script.to_header().items()]
    with Call(proxy.url, PATH, {**TOOLS, "stream": True}, headers) as call, pytest.raises(CUT):
        call.drain(got)
    assert b"response.completed" not in got
    span = recorded(proxy)[0]
    assert (span.error_class, span.fidelity, span.response) == ("cut_stream", Fidelity.INCOMPLETE, None)


def test_garbage_inside_a_native_stream_passes_through_and_is_on_record(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    answer = ask(proxy.url, {**PLAIN, "stream": True}, Script(garbage=True))
    assert b'data: {"choices": [{"delta"\n\n' in answer.body
    assert answer.body.rstrip().endswith(b"}")
    span = recorded(proxy)[0]
    assert (span.error_class, span.fidelity) == ("capture_fault", Fidelity.INCOMPLETE)


def test_an_error_inside_a_native_stream_is_an_error_on_record(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    answer = ask(proxy.url, {**PLAIN, "stream": True}, Script(error_after=4))
    assert answer.events[-1]["type"] == "error"
    assert recorded(proxy)[0].error_class == "engine_error"


@pytest.mark.parametrize("body", [PLAIN, TOOLS], ids=["native", "translated"])
def test_an_agent_that_hangs_up_cancels_its_generation(
    engine: EngineThread, proxy: ProxyThread, body: Json
) -> None:
    ask(proxy.url, body)
    script = Script(chunk_delay_s=0.05, tokens=2000)  # longer than anybody takes to notice
    headers = [*JSON, *script.to_header().items()]
    with Call(proxy.url, PATH, {**body, "stream": True}, headers) as call:
        call.read_until(b"output_text.delta")
        call.hang_up()
    wait_until(lambda: engine.calls[-1].aborted)
    span = recorded(proxy, 2)[1]
    assert (span.error_class, span.fidelity) == ("client_disconnect", Fidelity.INCOMPLETE)
    if "tools" in body:
        assert len(span.generations[0].response_token_ids) > 0  # what came until then is known


@pytest.mark.parametrize("body", [PLAIN, TOOLS], ids=["native", "translated"])
def test_an_agent_that_leaves_after_the_last_event_leaves_a_whole_span(
    engine: EngineThread, proxy: ProxyThread, body: Json
) -> None:
    with Call(proxy.url, PATH, {**body, "stream": True}) as call:
        call.read_until(b'"type":"response.completed"}\n\n')
        call.hang_up()
    assert recorded(proxy)[0].fidelity is Fidelity.EXACT


ODD = [
    "[]", "null", '"x"', "{", '{"choices": []}', '{"output": 7}', '{"output": [7], "id": []}',
    '{"choices": [{"message": {"content": "x"}, "finish_reason": null}], "created": 1, "model": "m"}',
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_a_whole_answer_of_any_other_shape_goes_through(
    engine: EngineThread, proxy: ProxyThread, odd: str
) -> None:
    ask(proxy.url, PLAIN)
    engine.script(Script(status=200, body=odd), path=PATH)
    assert ask(proxy.url, PLAIN).body == odd.encode()
    assert recorded(proxy, 2)[1].fidelity in (Fidelity.TEXT, Fidelity.INCOMPLETE)


@pytest.mark.parametrize("odd", ODD)
def test_a_whole_answer_that_cannot_be_translated_is_a_cut(
    engine: EngineThread, proxy: ProxyThread, odd: str
) -> None:
    ask(proxy.url, PLAIN)
    engine.script(Script(status=200, body=odd), path=CHAT)
    with pytest.raises(CUT):
        ask(proxy.url, TOOLS)
    assert recorded(proxy, 2)[1].error_class == "cut_stream"


@pytest.mark.parametrize("tokens", [["a"], [1.5], [2**40], [None]])
def test_token_data_of_any_other_kind_is_no_trouble(
    engine: EngineThread, proxy: ProxyThread, tokens: list[Any]
) -> None:
    ask(proxy.url, PLAIN)
    told = [{"tokens": tokens}]
    response = {"status": "completed", "id": "resp_1", "input_messages": told, "output_messages": told}
    engine.script(Script(status=200, body=json.dumps(response)), path=PATH)
    assert ask(proxy.url, PLAIN).json == {**response, "input_messages": None, "output_messages": None}
    assert recorded(proxy, 2)[1].error_class == "capture_fault"


@pytest.mark.parametrize("nonsense", [b'{"output": 3}', b"[]", b"x", b'{"input_messages": [7]}'])
def test_upstreams_that_answer_the_probe_with_nonsense_are_asked_for_nothing(
    make_proxy: MakeProxy, nonsense: bytes
) -> None:
    seen: list[Json] = []

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        seen.append(orjson.loads(body))
        connection.sendall(http_answer(nonsense, "Content-Type: application/json"))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        assert ask(proxy.url, TOOLS).body == ask(proxy.url, TOOLS).body == nonsense
    assert seen[1:] == [TOOLS, TOOLS]
