"""What is wrong in calls that ended well: as a table, and on real traffic of all four APIs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest

from lightning_proxy.config.settings import FailureSettings
from lightning_proxy.proxy.findings import Findings, awaits_result
from lightning_proxy.proxy.tool_schemas import misfit
from lightning_proxy.store import ErrorClass, Fidelity, Finding, Span
from tests.conftest import MakeProxy, ProxyThread
from tests.engine import EngineThread, Script
from tests.proxy.raw_http import JSON, metric, recorded, send

Json = dict[str, Any]
SEARCH = {
    "type": "object",
    "properties": {"q": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["q"],
}
CHAT_TOOL = {"type": "function", "function": {"name": "search", "parameters": SEARCH}}
CHAT: Json = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [CHAT_TOOL]}
MESSAGES: Json = {**CHAT, "tools": [{"name": "search", "input_schema": SEARCH}]}
RESPONSES: Json = {"input": "hi", "tools": [{"type": "function", "name": "search", "parameters": SEARCH}]}
OK = '{"q": "x"}'


def chat(
    text: str | None = "hello", ending: str = "stop", calls: Sequence[tuple[str, str]] = (), **more: Any
) -> Json:
    made = [{"id": f"c{i}", "function": {"name": n, "arguments": a}} for i, (n, a) in enumerate(calls)]
    message = {"role": "assistant", "content": text, "tool_calls": made, **more}
    return {"choices": [{"index": 0, "message": message, "finish_reason": ending}]}


def text(ending: str) -> Json:
    return {"choices": [{"text": "a", "finish_reason": ending}]}


def message(*blocks: Json, stop_reason: str = "end_turn") -> Json:
    return {"type": "message", "content": list(blocks), "stop_reason": stop_reason}


def used(arguments: Json) -> Json:
    return message({"type": "tool_use", "name": "search", "input": arguments}, stop_reason="tool_use")


def output(*items: Json, incomplete: str | None = None) -> Json:
    return {"output": list(items), "incomplete_details": {"reason": incomplete} if incomplete else None}


def span(wire: str, request: Json, response: Json | None, at: float = 0.0, **changes: Any) -> Span:
    made = Span(
        "r", 1, wire, at, at + 0.5, orjson.dumps(request), Fidelity.EXACT,
        response=None if response is None else orjson.dumps(response),
    )  # fmt: skip
    return replace(made, **changes)


def found(wire: str, request: Json, response: Json | None, **settings: Any) -> list[ErrorClass]:
    findings = Findings(FailureSettings(**settings))
    return [each.error_class for each in findings.of(span(wire, request, response), request)]


REFUSAL, TRUNCATED = ErrorClass.REFUSAL, ErrorClass.TRUNCATED
MALFORMED, TOOL = ErrorClass.MALFORMED_TOOL_CALL, ErrorClass.TOOL_FAILURE
ANSWERS: dict[str, tuple[str, Json, Json, list[ErrorClass]]] = {
    "chat": ("chat", CHAT, chat(), []),
    "chat tool": ("chat", CHAT, chat(None, "tool_calls", [("search", OK)]), []),
    "chat refusal": ("chat", CHAT, chat(None, refusal="I can't"), [REFUSAL]),
    "chat filter": ("chat", CHAT, chat("", "content_filter"), [REFUSAL]),
    "chat sorry": ("chat", CHAT, chat("I'm sorry, I can't."), []),
    "chat length": ("chat", CHAT, chat(ending="length"), [TRUNCATED]),
    "chat cut call": ("chat", CHAT, chat(None, "length", [("search", '{"q')]), [TRUNCATED]),
    "chat unknown": ("chat", CHAT, chat(None, "tool_calls", [("find", OK)]), [MALFORMED]),
    "chat not json": ("chat", CHAT, chat(None, "tool_calls", [("search", "q=x")]), [MALFORMED]),
    "chat two bad": ("chat", CHAT, chat(None, "tool_calls", [("x", OK), ("search", "[]"), ("search", OK)]),
                     [MALFORMED, MALFORMED]),
    "completion": ("completions", {"prompt": "x"}, text("stop"), []),
    "completion length": ("completions", {"prompt": "x"}, text("length"), [TRUNCATED]),
    "messages": ("messages", MESSAGES, message({"type": "text", "text": "a"}), []),
    "messages refusal": ("messages", MESSAGES, message(stop_reason="refusal"), [REFUSAL]),
    "messages cut": ("messages", MESSAGES, message(stop_reason="max_tokens"), [TRUNCATED]),
    "messages window": ("messages", MESSAGES, message(stop_reason="model_context_window_exceeded"),
                        [TRUNCATED]),
    "messages tool": ("messages", MESSAGES, used({"q": "x"}), []),
    "messages lacks": ("messages", MESSAGES, used({}), [MALFORMED]),
    "responses": ("responses", RESPONSES, output({"type": "message", "content": [{"text": "a"}]}), []),
    "responses refusal": ("responses", RESPONSES,
                          output({"type": "message", "content": [{"type": "refusal", "refusal": "no"}]}),
                          [REFUSAL]),
    "responses cut": ("responses", RESPONSES, output(incomplete="max_output_tokens"), [TRUNCATED]),
    "responses filter": ("responses", RESPONSES, output(incomplete="content_filter"), [REFUSAL]),
    "responses tool": ("responses", RESPONSES,
                       output({"type": "function_call", "name": "search", "arguments": OK}), []),
    "responses type": ("responses", RESPONSES,
                       output({"type": "function_call", "name": "search", "arguments": '{"q": 1}'}),
                       [MALFORMED]),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_has_what_its_own_fields_say(name: str) -> None:
    wire, request, response, expected = ANSWERS[name]
    assert found(wire, request, response) == expected


@pytest.mark.parametrize("name", ANSWERS)
def test_a_long_answer_has_the_same(name: str) -> None:
    wire, request, response, expected = ANSWERS[name]
    long = {**response, "logprobs": [0.5] * 10_000}
    if "choices" in response:
        long["choices"] = [{**choice, "logprobs": [0.5] * 10_000} for choice in response["choices"]]
    assert found(wire, request, long) == expected


def test_words_are_guessed_at_only_where_the_settings_say_which() -> None:
    sorry = chat("I'm sorry, but I cannot help.")
    assert found("chat", CHAT, sorry) == []
    assert found("chat", CHAT, sorry, refusal_patterns=["(?i)i'm sorry"]) == [REFUSAL]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("search", OK, None),
        ("search", {"q": "x", "n": 3}, None),
        ("search", '{"q": "x", "n": 3.0}', None),
        ("search", '{"q": "x", "n": true}', "n is true, and should be of type integer"),
        ("search", '{"q": "x", "n": "3"}', "should be of type integer"),
        ("search", "{}", "search lacks q"),
        ("search", "", "search lacks q"),
        ("search", "null", "no JSON object"),
        ("search", "{'q': 1}", "no JSON"),
        ("search", '{"q": "x", "more": 1}', None),
        ("find", OK, "there is no tool 'find'; offered are search"),
        (None, OK, "there is no tool"),
    ],
)  # fmt: skip
def test_a_tool_call_fits_or_it_is_said_why_not(name: Any, arguments: Any, said: str | None) -> None:
    for request in (CHAT, MESSAGES, RESPONSES, {"functions": [CHAT_TOOL["function"]]}):
        got = misfit(request, name, arguments)
        assert got is None if said is None else said in (got or "")


@pytest.mark.parametrize(
    "request_",
    [
        {"tools": [CHAT_TOOL, {"type": "web_search"}]},
        {"tools": [{"type": "namespace", "name": "x", "tools": []}]},
        {"tools": [CHAT_TOOL], "mcp_servers": [{"url": "x"}]},
        {"prompt": {"id": "pmpt_1"}},
    ],
)
def test_where_a_request_does_not_tell_all_names_no_name_is_wrong(request_: Json) -> None:
    assert misfit(request_, "other", OK) is None


def test_what_cannot_be_read_has_no_findings() -> None:
    odd: list[Any] = [{"choices": 3}, {"choices": [3]}, {"output": [1]}, {"content": [[]]}, [], {}]
    for response in odd:
        assert found("chat", CHAT, response) == []
    assert found("chat", {"messages": [3]}, chat()) == []
    assert found("chat", {}, chat(None, "tool_calls", [("x", OK)])) == []


# -- results of tools ----------------------------------------------------------------------------

CALL = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "search", "arguments": OK}}]}


def turn(result: Any, id_: str = "c1") -> list[Json]:
    return [CALL, {"role": "tool", "tool_call_id": id_, "content": result}]


@pytest.mark.parametrize(
    ("result", "fails"),
    [
        ("42", False),
        ("no Error here", False),
        ('{"errors": 0, "ok": true}', False),
        ('{"error": null}', False),
        ("Error: no such file", True),
        ("  error in lower case is a word", False),
        ("Errors are counted elsewhere", False),
        ("Traceback (most recent call last):\n  ...", True),
        ('{"error": "no such file"}', True),
        ('{"ok": false}', True),
        ('{"success": false, "x": 1}', True),
        ('{"isError": true}', True),
        ('{"error": ', False),
        ([{"type": "text", "text": "Error: x"}], True),
        (None, False),
    ],
)
def test_a_result_that_reports_an_error_is_a_failure_of_the_tool(result: Any, fails: bool) -> None:
    request = {**CHAT, "messages": [*CHAT["messages"], *turn(result)]}
    assert found("chat", request, chat()) == ([TOOL] if fails else [])


def test_the_patterns_for_results_are_a_setting() -> None:
    request = {**CHAT, "messages": [*CHAT["messages"], *turn("FEHLER 7")]}
    assert found("chat", request, chat(), tool_error_patterns=["FEHLER"]) == [TOOL]
    request = {**CHAT, "messages": [*CHAT["messages"], *turn("Error")]}
    assert found("chat", request, chat(), tool_error_patterns=[]) == []


def test_the_messages_api_says_it_itself() -> None:
    blocks = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "fine"},
        {"type": "tool_result", "tool_use_id": "t2", "content": "not found", "is_error": True},
    ]
    request = {
        **MESSAGES,
        "messages": [{"role": "assistant", "content": []}, {"role": "user", "content": blocks}],
    }
    findings = Findings(FailureSettings()).of(span("messages", request, message()), request)
    assert findings == (Finding(TOOL, "not found", "t2"),)


def test_each_result_counts_once_however_often_it_is_sent_again() -> None:
    findings = Findings(FailureSettings())
    history = list(CHAT["messages"])
    counts = []
    for number in range(4):
        history += turn("Error: x", f"call_{number}")
        request = {**CHAT, "messages": list(history)}
        # The client's SDK tries each call twice, the agent itself a third time.
        counts += [
            len(_tools(findings, span("chat", request, chat(), retry=retry), request)) for retry in (0, 1, 0)
        ]
    assert counts == [1, 0, 0] * 4


@pytest.mark.parametrize("alternating", [False, True])
def test_results_of_one_turn_all_count_on_responses(alternating: bool) -> None:
    findings = Findings(FailureSettings())
    items: list[Json] = [{"role": "user", "content": "hi"}]
    counts = []
    for number in range(3):
        calls = [{"type": "function_call", "call_id": f"{number}{k}", "name": "search"} for k in "ab"]
        results = [
            {"type": "function_call_output", "call_id": f"{number}{k}", "output": "Error"} for k in "ab"
        ]
        pairs = zip(calls, results, strict=True)
        items += [each for pair in pairs for each in pair] if alternating else [*calls, *results]
        request = {**RESPONSES, "input": list(items)}
        counts.append(len(_tools(findings, span("responses", request, output()), request)))
    # Of a turn that came before the agent was known, only what stands behind its last call is sure.
    assert counts == ([1, 2, 2] if alternating else [2, 2, 2])


def _tools(findings: Findings, recorded_: Span, request: Json) -> list[Finding]:
    return [each for each in findings.of(recorded_, request) if each.error_class is TOOL]


# -- loops ---------------------------------------------------------------------------------------


def talk(
    findings: Findings, replies: Sequence[str], *, grows: bool = True, role: str | None = None, **changes: Any
) -> list[bool]:
    """For each reply in a conversation, whether a loop was found."""
    history, loops = list(CHAT["messages"]), []
    for number, text in enumerate(replies):
        request = {**CHAT, "messages": list(history) if grows else [{"role": "user", "content": f"{number}"}]}
        call = span("chat", request, chat(text), at=float(number), role=role, **changes)
        loops.append(any(f.error_class is ErrorClass.AGENT_LOOP for f in findings.of(call, request)))
        history += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
    return loops


def test_the_same_reply_five_times_in_a_row_is_a_loop_until_something_else_is_said() -> None:
    said = ["a"] * 6 + ["b"] + ["a"] * 4
    assert talk(Findings(FailureSettings()), said) == [*[False] * 4, True, True, *[False] * 5]
    assert not any(talk(Findings(FailureSettings(loop_after=0)), ["a"] * 9))
    assert talk(Findings(FailureSettings(loop_after=2)), ["a", "a"]) == [False, True]


def test_a_checker_that_says_ok_to_one_text_after_another_is_in_no_loop() -> None:
    assert not any(talk(Findings(FailureSettings()), ["ok"] * 9, grows=False))


def test_tool_calls_are_the_same_whatever_their_ids_and_spelling() -> None:
    findings, loops = Findings(FailureSettings()), []
    history = list(CHAT["messages"])
    for number in range(5):
        spelling = ['{"q": "x", "n": 1}', '{"n":1,"q":"x"}'][number % 2]
        answer = chat(None, "tool_calls", [("search", spelling)])
        answer["choices"][0]["message"]["tool_calls"][0]["id"] = f"call_{number}"
        request = {**CHAT, "messages": list(history)}
        loops += [f.error_class for f in findings.of(span("chat", request, answer, float(number)), request)]
        history += turn("none")
    assert loops == [ErrorClass.AGENT_LOOP]


def test_two_roles_do_not_repeat_one_another() -> None:
    findings = Findings(FailureSettings(loop_after=3))
    assert not any(talk(findings, ["a", "a"], role="writer"))
    assert not any(talk(findings, ["a", "a"], role="checker"))


def test_equal_requests_are_a_loop_whatever_the_answers_but_not_tries_of_an_sdk_nor_in_an_outage() -> None:
    def ask(**changes: Any) -> list[ErrorClass]:
        findings, loops = Findings(FailureSettings()), list[ErrorClass]()
        for number in range(5):
            call = span("chat", CHAT, chat(str(number)), at=float(number))
            loops += [f.error_class for f in findings.of(replace(call, **changes), CHAT)]
        return loops

    assert ask() == [ErrorClass.AGENT_LOOP]
    assert ask(response=None, error_class=ErrorClass.CONTEXT_OVERFLOW) == [ErrorClass.AGENT_LOOP]
    assert ask(retry=1) == []
    assert ask(response=None, error_class=ErrorClass.UPSTREAM_ERROR) == []
    assert ask(started_at=0.0, ended_at=9.0) == [], "side by side, as in best of n"


# -- an answer that is waited for ----------------------------------------------------------------


def test_a_tool_call_waits_for_its_result_unless_it_was_forced() -> None:
    call = span("chat", CHAT, chat(None, "tool_calls", [("search", OK)]))
    assert awaits_result(call, CHAT)
    assert not awaits_result(span("chat", CHAT, chat()), CHAT)
    assert not awaits_result(call, {**CHAT, "tool_choice": "required"})
    forced = {"type": "function", "function": {"name": "search"}}
    assert not awaits_result(call, {**CHAT, "tool_choice": forced})
    assert awaits_result(call, {**CHAT, "tool_choice": "auto"})


# -- on real traffic -----------------------------------------------------------------------------

TRAFFIC: dict[str, Json] = {
    "/v1/chat/completions": {"model": "policy", **{k: CHAT[k] for k in ("messages", "tools")}},
    "/v1/messages": {"model": "policy", "max_tokens": 500, **{k: MESSAGES[k] for k in ("messages", "tools")}},
    "/v1/responses": {"model": "policy", **RESPONSES},
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", TRAFFIC)
@pytest.mark.parametrize(
    ("call", "detail"), [(("find", OK), "there is no tool"), (("search", "{}"), "lacks q")]
)
def test_a_malformed_tool_call_is_found_on_every_api(
    engine: EngineThread, proxy: ProxyThread, path: str, call: tuple[str, str], detail: str, streamed: bool
) -> None:
    script = Script(tool_calls=(call, ("search", OK)))
    answer = send(
        proxy.url, path, {**TRAFFIC[path], "stream": streamed}, [*JSON, *script.to_header().items()]
    )
    assert answer.status == 200
    kept = recorded(proxy)[0]
    assert kept.error_class is None
    assert [each.error_class for each in kept.findings] == [MALFORMED]
    assert detail in kept.findings[0].detail
    assert metric(proxy.url, 'lightning_findings_total{error_class="malformed_tool_call"}') == 1.0


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", [*TRAFFIC, "/v1/completions"])
def test_an_answer_at_its_limit_is_found_on_every_api(
    engine: EngineThread, proxy: ProxyThread, path: str, streamed: bool
) -> None:
    body = dict(TRAFFIC.get(path, {"model": "policy", "prompt": "x"}))
    body.pop("tools", None)
    limit = {"/v1/responses": "max_output_tokens"}.get(path, "max_tokens")
    send(proxy.url, path, {**body, "stream": streamed, limit: 2})
    assert [each.error_class for each in recorded(proxy)[0].findings] == [TRUNCATED]


def answered(path: str, body: Json) -> Json:
    """The request that brings a tool's error, in the words of its API."""
    if path == "/v1/messages":
        asked = {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "c1", "name": "search", "input": {}}],
        }
        result = {"type": "tool_result", "tool_use_id": "c1", "content": "not found", "is_error": True}
        return {**body, "messages": [*body["messages"], asked, {"role": "user", "content": [result]}]}
    if path == "/v1/responses":
        asked = {"type": "function_call", "call_id": "c1", "name": "search", "arguments": OK}
        output_ = {"type": "function_call_output", "call_id": "c1", "output": "Error: not found"}
        return {**body, "input": [{"role": "user", "content": "hi"}, asked, output_]}
    return {**body, "messages": [*body["messages"], *turn("Error: not found")]}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", TRAFFIC)
def test_a_failed_tool_is_found_once_on_every_api_and_the_answer_is_the_engines(
    engine: EngineThread, proxy: ProxyThread, path: str, streamed: bool
) -> None:
    body = {**answered(path, TRAFFIC[path]), "stream": streamed}
    straight = send(engine.url, path, body)
    for _ in range(2):
        through = send(proxy.url, f"/rollout/r1{path}", body)
        assert (through.status, len(through.events)) == (straight.status, len(straight.events))
    kept = recorded(proxy, 2)
    assert [[each.error_class for each in span_.findings] for span_ in kept] == [[TOOL], []]
    assert kept[0].findings[0].call_id == "c1"
    assert "not found" in kept[0].findings[0].detail


def test_an_agent_in_a_loop_is_found_and_served_as_before(engine: EngineThread, proxy: ProxyThread) -> None:
    history = list(CHAT["messages"])
    script = Script(tool_calls=(("search", OK),))
    for _ in range(6):
        body = {"model": "policy", "messages": history, "tools": CHAT["tools"]}
        answer = send(
            proxy.url, "/rollout/r1/v1/chat/completions", body, [*JSON, *script.to_header().items()]
        )
        assert answer.status == 200
        said = answer.json["choices"][0]["message"]
        history += [said, {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "none"}]
    loops = [[each.error_class for each in span_.findings] for span_ in recorded(proxy, 6)]
    assert loops == [[], [], [], [], [ErrorClass.AGENT_LOOP], [ErrorClass.AGENT_LOOP]]


def test_an_ordinary_call_has_no_findings(engine: EngineThread, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(engine.base_url)
    for path, body in TRAFFIC.items():
        send(proxy.url, path, body)
    assert [kept.findings for kept in recorded(proxy, 3)] == [(), (), ()]
