"""Anthropic Messages: what the agent gets is the engine's own answer, what we keep is exact."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from lightning_proxy.proxy.attribution import Attribution
from lightning_proxy.proxy.call import Call as ProxyCall
from lightning_proxy.proxy.call import parse_request
from lightning_proxy.proxy.wires import wire_for
from lightning_proxy.proxy.wires.base import Prepared
from lightning_proxy.store import Fidelity, Span
from tests.conftest import MakeProxy, ProxyThread, wait_until
from tests.engine import EngineThread, FakeEngine, Script, messages
from tests.proxy.raw_http import CHAT, CUT, JSON, Answer, Call, chosen_sampling, recorded, send

MakeEngine = Callable[[FakeEngine], EngineThread]
Json = dict[str, Any]

MESSAGES = "/v1/messages"
ASK: Json = {"role": "user", "content": "hello"}
HELLO: Json = {"model": "policy", "max_tokens": 100, "messages": [ASK]}
SQL: Json = {"name": "sql", "description": "d", "input_schema": {"properties": {"q": {"type": "string"}}}}
CALLS = Script(tool_calls=(("sql", '{"query": "SELECT \'é\'", "n": [1, null]}'), ("sql", "{}")))
TURNS: list[Json] = [
    ASK,
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "sql", "input": {"q": "é", "n": 10**20, "f": 1e16}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "and now?"},
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "7"}]},
        ],
    },
]

# As Claude Code puts its reminders; the first block is a note that no model reads.
BILLING = {"type": "text", "text": "x-anthropic-billing-header: 1"}
REMINDER: Json = {"role": "system", "content": [BILLING, {"type": "text", "text": "be brief"}]}
REMINDED: list[Json] = [ASK, REMINDER, ASK, {"role": "system", "content": "!"}]

# name: (fields, script); all of these are translated
TRANSLATED: dict[str, tuple[Json, Script]] = {
    "text": ({}, Script()),
    "blocks": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "é😀"}]}]}, Script()),
    "system": ({"system": "be brief"}, Script()),
    "system blocks": ({"system": [{"type": "text", "text": "a", "cache_control": {}}]}, Script()),
    "turns": ({"messages": TURNS, "tools": [SQL]}, Script()),
    "a system message among the others": ({"system": "a", "messages": REMINDED}, Script()),
    "unicode": ({}, Script(text='naïve 漢字 😀 \u2028 "\\" \x7f\x01')),
    "nothing": ({}, Script(text="")),
    "cut by max_tokens": ({"max_tokens": 3}, Script()),
    "tool calls": ({"tools": [SQL]}, CALLS),
    "text and tool calls": ({"tools": [SQL]}, CALLS.with_({"text": "é: "})),
    "big pieces": ({"tools": [SQL]}, CALLS.with_({"text": "é: ", "tokens_per_chunk": 9})),
    "all at once": ({"tools": [SQL]}, CALLS.with_({"tokens_per_chunk": 500})),
    "byte by byte": ({}, Script(text="naïve 漢字 😀", split=1)),
    "CRLF": ({}, Script(line_end="\r\n")),
    "unknown length": ({}, Script(hidden_length=True)),
}
NATIVE: dict[str, Json] = {
    "thinking disabled": {"thinking": {"type": "disabled"}},
    "unknown field": {"unheard_of": 1},
    "unknown field of a block": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]
    },
    "no tools": {"tools": []},
    "a choice without tools": {"tool_choice": {"type": "auto"}},
    "a number as text": {"temperature": "0.5"},
    "a whole number as a fraction": {"max_tokens": 7.0},
    "a truth as a number": {"temperature": True},
    "vLLM's own fields": {"cache_salt": "s"},
}  # fmt: skip


def body_of(fields: Json, stream: bool = False) -> bytes:
    return json.dumps({**HELLO, "stream": stream, **fields}, ensure_ascii=False).encode()


def both(engine: EngineThread, proxy: ProxyThread, body: bytes, script: Script) -> Answer:
    """The answer through the proxy, which is the engine's own."""
    headers = [*JSON, *script.to_header().items()]
    straight = send(engine.url, MESSAGES, body, headers)
    through = send(proxy.url, f"{MESSAGES}?beta=true", body, headers)
    assert through.end_to_end[:3] == straight.end_to_end[:3]
    assert unfolded(through.end_to_end[3]) == unfolded(straight.end_to_end[3])
    return through


def unfolded(body: bytes) -> list[bytes] | Any:
    if body.startswith(b"event:"):
        return body.replace(b"\r\n", b"\n").split(b"\n\n")
    return json.loads(body) if body.startswith(b"{") else body


def reply_of(engine: EngineThread, body: bytes, script: Script) -> Any:
    chat = messages.as_chat(json.loads(body))
    return engine.model.generate(chat, text=script.text, tool_calls=script.tool_calls, tokens=script.tokens)


# -- the same answers, and exact spans -----------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", TRANSLATED)
def test_an_answer_is_the_engines_own_and_its_tokens_are_recorded(
    engine: EngineThread, proxy: ProxyThread, name: str, stream: bool
) -> None:
    fields, script = TRANSLATED[name]
    body = body_of(fields, stream)
    answer = both(engine, proxy, body, script)
    (span,) = recorded(proxy)
    assert (span.wire, span.status, span.streamed, span.request) == ("messages", 200, stream, body)
    assert (span.error_class, span.fidelity) == (None, Fidelity.EXACT)
    (generation,) = span.generations
    reply = reply_of(engine, body, script)
    (choice,) = reply.choices
    assert generation.prompt_token_ids.tolist() == list(reply.prompt_token_ids)
    assert generation.response_token_ids.tolist() == choice.token_ids
    assert generation.logprobs.tolist() == pytest.approx(choice.logprobs, abs=1e-6)
    assert generation.finish_reason == choice.finish_reason
    check_record(engine, span, answer, body, script)


def check_record(engine: EngineThread, span: Span, answer: Answer, body: bytes, script: Script) -> None:
    """What is recorded is the whole message, with the id that the agent saw."""
    whole = body.replace(b'"stream": true', b'"stream": false')
    plain = script.with_({"line_end": "\n", "split": None})
    expected = send(engine.url, MESSAGES, whole, [*JSON, *plain.to_header().items()]).json
    kept = json.loads(span.response or b"")
    if span.streamed:
        assert kept.pop("stop_sequence") is None
        # A stream without text has no block of text; a whole answer has an empty one.
        expected["content"] = [block for block in expected["content"] if block.get("text") != ""]
    assert {**kept, "id": ""} == {**expected, "id": ""}
    assert f'"{span.response_id}"'.encode() in answer.body
    assert span.usage == expected["usage"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", NATIVE)
def test_what_is_not_understood_throughout_goes_to_the_engines_own_api(
    engine: EngineThread, proxy: ProxyThread, name: str, stream: bool
) -> None:
    body = body_of(NATIVE[name], stream)
    straight = send(engine.url, MESSAGES, body)
    through = send(proxy.url, f"{MESSAGES}?beta=true", body)
    assert through.end_to_end == straight.end_to_end
    first, second = engine.calls
    assert (second.target, second.body) == (f"{MESSAGES}?beta=true", first.body)
    (span,) = recorded(proxy)
    if through.status == 200:
        assert (span.error_class, span.fidelity, span.generations) == (None, Fidelity.TEXT, ())
        assert f'"{span.response_id}"'.encode() in through.body
        assert span.usage == json.loads(span.response or b"")["usage"]
    else:
        assert span.error_class == "upstream_refused"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{", b"\xff", b'{"a": NaN}',
        body_of({"max_tokens": None}),
        body_of({"model": "gpt-x"}),
        body_of({"model": "gpt-x", "thinking": {"type": "disabled"}}),
    ],
)  # fmt: skip
def test_a_refusal_is_the_engines_own(engine: EngineThread, proxy: ProxyThread, body: bytes) -> None:
    assert both(engine, proxy, body, Script()).status >= 400
    assert recorded(proxy)[0].error_class == "upstream_refused"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            '{"error": {"message": "too long: é", "type": "BadRequestError", "param": null, "code": 400}}',
            {"type": "error", "error": {"type": "BadRequestError", "message": "too long: é"}},
        ),
        # Errors of the server, not of its handler, have the same shape on every path.
        ('{"error": {"message": "1 validation error", "type": "Bad Request"}} ', None),
        ('{"error": "Unauthorized"}', None),
        ('{"error": {"code": "rate"}} ', None),
        ('{"error": {"message": null, "type": "InternalServerError"}}', None),
        ("Internal Server Error", None),
        ("", None),
        ("[1]", None),
    ],
)  # fmt: skip
def test_a_refusal_of_chat_is_put_into_the_words_of_messages(
    engine: EngineThread, proxy: ProxyThread, body: str, expected: Any, stream: bool
) -> None:
    script = Script(status=429, body=body, headers={"retry-after": "7", "request-id": "q"})
    answer = send(proxy.url, MESSAGES, body_of({}, stream), [*JSON, *script.to_header().items()])
    assert (answer.status, answer.header("retry-after"), answer.header("request-id")) == (429, "7", "q")
    assert (answer.json if expected else answer.body) == (expected or body.encode())
    assert recorded(proxy)[0].error_class == "rate_limited"


def test_arguments_that_are_no_json_are_refused_as_by_the_engine_and_kept_as_tokens(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    script = Script(tool_calls=(("sql", '{"q": '),))
    answer = send(proxy.url, MESSAGES, body_of({"tools": [SQL]}), [*JSON, *script.to_header().items()])
    assert (answer.status, answer.reason) == (400, "Bad Request")
    message = "Expecting value: line 1 column 7 (char 6)"
    assert answer.json == {"type": "error", "error": {"type": "BadRequestError", "message": message}}
    (span,) = recorded(proxy)
    assert (span.status, span.error_class, span.fidelity) == (400, "malformed_tool_call", Fidelity.INCOMPLETE)
    assert len(span.generations) == 1


def test_a_chain_of_turns_reads_what_was_written(engine: EngineThread, proxy: ProxyThread) -> None:
    turns: list[Json] = [ASK]
    for _ in range(3):
        script = Script(tool_calls=(("sql", '{"q": 1}'),))
        answer = send(
            proxy.url,
            f"/rollout/r1{MESSAGES}",
            body_of({"messages": turns, "tools": [SQL]}),
            [*JSON, *script.to_header().items()],
        ).json
        (call,) = answer["content"]
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": "7"}
        turns += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}]
    first, second, third = (span.generations[0] for span in recorded(proxy, 3))
    for earlier, later in ((first, second), (second, third)):
        read = [*earlier.prompt_token_ids, *earlier.response_token_ids]
        assert list(later.prompt_token_ids[: len(read)]) == read


def test_the_headers_of_the_agent_reach_the_engine_and_its_sampling_is_recorded(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    agents = [
        ("x-api-key", "sk-ant-1"),
        ("authorization", "Bearer t"),
        ("anthropic-version", "2023-06-01"),
        ("anthropic-beta", "a-1,b-2"),
    ]
    choice = {"type": "any"}
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop_sequences": ["x"], "tools": [SQL]}
    send(proxy.url, f"{MESSAGES}?beta=true", body_of({**fields, "tool_choice": choice}), [*JSON, *agents])
    (seen,) = [call for call in engine.calls if call.target == CHAT]  # others ask how logprobs are told
    assert seen.method == "POST"
    assert [pair for pair in seen.headers if pair[0] in dict(agents)] == agents
    (span,) = recorded(proxy)
    assert chosen_sampling(span) == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 3, "max_tokens": 100, "tool_choice": choice, "stop": ["x"],
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_a_reward_finds_its_call_by_the_id_that_the_agent_saw(
    engine: EngineThread, proxy: ProxyThread, stream: bool
) -> None:
    answer = send(proxy.url, f"/rollout/r1{MESSAGES}", body_of({}, stream))
    seen = (answer.events[0]["message"] if stream else answer.json)["id"]
    given = send(proxy.url, "/reward", {"value": 1, "response_id": seen})
    (span,) = recorded(proxy)
    assert (given.status, given.json["span_id"], given.json["rollout_id"]) == (201, span.span_id, "r1")


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (200, ["system: a", "user: hello", "system: be brief", "user: hello", "system: !"]),
        (400, ["system: abe brief!", "user: hello", "user: hello"]),
    ],
)
def test_system_messages_stand_where_the_engines_template_takes_them(
    engine: EngineThread, proxy: ProxyThread, status: int, expected: list[str]
) -> None:
    engine.script(Script(status=status, body="{}"), path="/tokenize")
    for _ in range(2):  # the engine is asked once
        send(proxy.url, MESSAGES, body_of({"system": "a", "messages": REMINDED}))
    read = [json.loads(call.body)["messages"] for call in engine.calls if call.path == CHAT]
    assert [f"{turn['role']}: {turn['content']}" for turn in read[0]] == expected
    assert read[1] == read[0]
    assert [request.path for request in engine.requests].count("/tokenize") == 1


def test_an_engine_that_does_not_tell_of_its_template_gets_system_messages_as_they_are(
    engine: EngineThread, proxy: ProxyThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_proxy.proxy.question._AGAIN_S", 0.0)
    engine.script(Script(status=404), path="/tokenize")
    send(proxy.url, MESSAGES, body_of({"messages": REMINDED}))
    send(proxy.url, MESSAGES, body_of({"messages": REMINDED}))  # beside it, the engine is asked again
    wait_until(lambda: sum(request.path == "/tokenize" for request in engine.requests) == 2)
    time.sleep(0.1)
    send(proxy.url, MESSAGES, body_of({"messages": REMINDED}))
    assert [call.path for call in engine.calls] == [MESSAGES, MESSAGES, CHAT]
    fidelities = [Fidelity.TEXT, Fidelity.TEXT, Fidelity.EXACT]
    assert [span.fidelity for span in recorded(proxy, 3)] == fidelities


def test_tokens_are_counted_as_they_are_read(engine: EngineThread, proxy: ProxyThread) -> None:
    body = body_of({"messages": TURNS, "tools": [SQL], "system": "s"})
    counted = send(proxy.url, f"{MESSAGES}/count_tokens?beta=true", body).json["input_tokens"]
    assert send(proxy.url, MESSAGES, body).json["usage"]["input_tokens"] == counted
    (span,) = recorded(proxy)
    assert len(span.generations[0].prompt_token_ids) == counted
    assert [request.target for request in engine.requests if request.path != "/v1/models"] == [
        f"{MESSAGES}/count_tokens?beta=true",
        CHAT,
    ]


# -- trouble -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["close", "reset"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{}, {"unheard_of": 1}], ids=["translated", "native"])
def test_an_answer_that_is_cut_is_cut_for_the_agent_too(
    engine: EngineThread, proxy: ProxyThread, fields: Json, by: Any, stream: bool
) -> None:
    script = Script(cut_after=9, cut_by=by)
    with pytest.raises(CUT):
        send(proxy.url, MESSAGES, body_of(fields, stream), [*JSON, *script.to_header().items()])
    (span,) = recorded(proxy)
    assert (span.error_class, span.fidelity, span.response) == ("cut_stream", Fidelity.INCOMPLETE, None)


TROUBLE = {
    "garbage": (Script(garbage=True), True),
    "garbage in place of a whole answer": (Script(garbage=True), False),
    "no [DONE]": (Script(without_done=True), True),
    "no chat at all": (Script(status=200, body='{"object": "list"}'), False),
    "an answer without choices": (
        Script(status=200, body='{"id": "x", "model": "m", "choices": [], "usage": {}}'),
        False,
    ),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_an_answer_that_cannot_be_translated_is_no_clean_end(
    engine: EngineThread, proxy: ProxyThread, name: str
) -> None:
    script, stream = TROUBLE[name]
    got = bytearray()
    headers = [*JSON, *script.to_header().items()]
    with pytest.raises(CUT), Call(proxy.url, MESSAGES, body_of({}, stream), headers) as call:
        call.drain(got)
    assert b"message_stop" not in got
    assert b"choices" not in got
    (span,) = recorded(proxy)
    assert (span.error_class, span.fidelity) == ("cut_stream", Fidelity.INCOMPLETE)


def test_an_error_inside_a_stream_is_an_error_event_and_no_end(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    script = Script(error_after=4)
    answer = send(proxy.url, MESSAGES, body_of({}, True), [*JSON, *script.to_header().items()])
    kinds = [event["type"] for event in answer.events]
    assert kinds == ["message_start", "content_block_start", *["content_block_delta"] * 3, "error"]
    assert answer.events[-1]["error"] == {"type": "internal_error", "message": "the engine failed"}
    assert recorded(proxy)[0].error_class == "engine_error"


@pytest.mark.parametrize("fields", [{}, {"unheard_of": 1}], ids=["translated", "native"])
def test_an_agent_that_hangs_up_stops_the_generation(
    engine: EngineThread, proxy: ProxyThread, fields: Json
) -> None:
    engine.script(Script(chunk_delay_s=0.05, tokens=2000), path=MESSAGES if fields else CHAT)
    with Call(proxy.url, MESSAGES, body_of(fields, True)) as call:
        call.read_until(b"text_delta")
        call.hang_up()
    wait_until(lambda: engine.calls[0].aborted)
    assert recorded(proxy)[0].error_class == "client_disconnect"


def test_an_agent_that_hangs_up_after_the_end_has_had_a_whole_answer(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    with Call(proxy.url, MESSAGES, body_of({}, True)) as call:
        call.read_until(b'data: {"type":"message_stop"}\n\n')
        call.hang_up()
    wait_until(lambda: engine.calls[0].answered)
    (span,) = recorded(proxy)
    assert (span.error_class, span.fidelity) == (None, Fidelity.EXACT)


# -- other engines -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_is_no_vllm_is_never_asked_for_tokens(
    make_engine: MakeEngine, make_proxy: MakeProxy, stream: bool
) -> None:
    engine = make_engine(FakeEngine(owner="anthropic", refuse_token_ids=True))
    proxy = make_proxy(engine.base_url)
    body, script = body_of({"tools": [SQL]}, stream), CALLS.with_({"text": "é: "})
    headers = [*JSON, *script.to_header().items()]
    straight = send(engine.url, MESSAGES, body, headers)
    through = send(proxy.url, f"{MESSAGES}?beta=true", body, headers)
    assert through.end_to_end == straight.end_to_end
    assert (engine.calls[1].target, engine.calls[1].body) == (f"{MESSAGES}?beta=true", body)
    (span,) = recorded(proxy)
    assert (span.fidelity, span.error_class, span.generations) == (Fidelity.TEXT, None, ())
    check_record(engine, span, through, body, script)


ANTHROPICS = """\
event: message_start
data: {"type": "message_start", "message": {"id": "msg_1", "type": "message", "role": "assistant", \
"content": [], "model": "claude", "stop_reason": null, "usage": {"input_tokens": 5, "output_tokens": 1}}}

event: content_block_start
data: {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}}

event: ping
data: {"type": "ping"}

event: content_block_delta
data: {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}}

event: content_block_delta
data: {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "s"}}

event: content_block_stop
data: {"type": "content_block_stop", "index": 0}

event: content_block_start
data: {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}}

event: content_block_delta
data: {"type": "content_block_delta", "index": 1, "delta": {"type": "citations_delta", "citation": {"n": 1}}}

event: content_block_delta
data: {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "a"}}

event: content_block_delta
data: {"type": "content_block_delta", "index": 1, "delta": {"type": "of_tomorrow", "x": 1}}

event: content_block_stop
data: {"type": "content_block_stop", "index": 1}

event: content_block_start
data: {"type": "content_block_start", "index": 2, "content_block": {"type": "tool_use", "id": "t", \
"name": "sql", "input": {}}}

event: content_block_delta
data: {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", \
"partial_json": "{\\"q\\""}}

event: content_block_delta
data: {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", \
"partial_json": ": 1}"}}

event: content_block_stop
data: {"type": "content_block_stop", "index": 2}

event: message_delta
data: {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": null}, \
"usage": {"output_tokens": 9}}

event: message_stop
data: {"type": "message_stop"}

"""


def prepared(body: bytes, *, tokens: bool = True) -> Prepared:
    wire = wire_for("POST", MESSAGES)
    assert wire is not None
    request = parse_request(body)
    return wire.prepare(body, request, tokens=tokens and bool(request))


def begin(body: bytes, *, tokens: bool = True, streamed: bool = True) -> ProxyCall:
    wire = wire_for("POST", MESSAGES)
    assert wire is not None
    ready = prepared(body, tokens=tokens)
    call = ProxyCall(wire, body, parse_request(body), ready, Attribution("r1"))
    call.status, call.streamed = 200, streamed
    return call


def test_a_stream_of_anthropics_own_is_put_together_for_the_record() -> None:
    call = begin(body_of({}, True), tokens=False)
    raw = ANTHROPICS.encode()
    assert b"".join(call.feed(raw[i : i + 50]) for i in range(0, len(raw), 50)) == raw
    assert call.ended
    span = call.span(policy_version_end=None)
    assert (span.error_class, span.fidelity, span.response_id) == (None, Fidelity.TEXT, "msg_1")
    assert span.usage == {"input_tokens": 5, "output_tokens": 9}
    message = json.loads(span.response or b"")
    assert (message["stop_reason"], message["model"]) == ("tool_use", "claude")
    assert message["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "a", "citations": [{"n": 1}]},
        {"type": "tool_use", "id": "t", "name": "sql", "input": {"q": 1}},
    ]


@pytest.mark.parametrize("end", [b"", b'event: error\ndata: {"type": "error", "error": {"type": "o"}}\n\n'])
def test_a_stream_of_anthropics_own_that_breaks_off_is_not_taken_for_whole(end: bytes) -> None:
    call = begin(body_of({}, True), tokens=False)
    raw = ANTHROPICS.encode()
    raw = raw[: raw.index(b"event: message_delta")] + end
    assert call.feed(raw) + call.finish_stream() == raw
    span = call.span(policy_version_end=None)
    assert (span.error_class, span.response) == ("engine_error" if end else "cut_stream", None)
