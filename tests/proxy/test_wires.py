"""What each wire adds to a request, takes out of the answer, and records. No sockets."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_proxy.proxy.attribution import Attribution
from lightning_proxy.proxy.call import Call, parse_request
from lightning_proxy.proxy.wires import wire_for
from lightning_proxy.proxy.wires.base import Prepared
from lightning_proxy.proxy.wires.choices import merge_delta
from lightning_proxy.store import Fidelity, Span, Store
from tests.engine import Model, Reply, shapes

Json = dict[str, Any]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HEAD = shapes.Head("chatcmpl-1", 1, "policy")
MODEL = Model(tokens=9)
TOOLS = (("sql", '{"query": "SELECT \\"é\\""}'), ("finish", "{}"))


def prepared(path: str, body: bytes, *, tokens: bool = True) -> Prepared:
    wire = wire_for("POST", path)
    assert wire is not None
    request = parse_request(body)
    return wire.prepare(body, request, tokens=tokens and bool(request))


def begin(path: str, body: bytes, *, tokens: bool = True, status: int = 200, streamed: bool = False) -> Call:
    wire = wire_for("POST", path)
    assert wire is not None
    ready = prepared(path, body, tokens=tokens)
    call = Call(wire, body, parse_request(body), ready, Attribution("r1"), policy="policy", policy_version=0)
    call.status, call.streamed = status, streamed
    return call


def engine_reply(path: str, body: bytes, script: Json) -> Reply:
    return MODEL.generate(orjson.loads(body), **{k: v for k, v in script.items() if k != "per_chunk"})


def engine_whole(path: str, body: bytes, script: Json) -> bytes:
    parsed, reply = orjson.loads(body), engine_reply(path, body, script)
    if path == CHAT:
        return orjson.dumps(shapes.chat(HEAD, parsed, reply))
    return orjson.dumps(shapes.completion(HEAD, parsed, reply, MODEL))


def engine_stream(path: str, body: bytes, script: Json) -> bytes:
    parsed, reply = orjson.loads(body), engine_reply(path, body, script)
    make = shapes.chat_chunks if path == CHAT else shapes.completion_chunks
    chunks = make(HEAD, parsed, reply, script.get("per_chunk", 1))
    return b"".join(shapes.sse(chunk) for chunk in chunks) + b"data: [DONE]\n\n"


def check_exact(span: Span, reply: Reply) -> None:
    assert (span.error_class, span.fidelity) == (None, Fidelity.EXACT)
    assert len(span.generations) == len(reply.choices)
    for generation, choice in zip(span.generations, reply.choices, strict=True):
        assert generation.prompt_token_ids == array("i", reply.prompt_token_ids)
        assert generation.response_token_ids == array("i", choice.token_ids)
        assert generation.logprobs == array("f", choice.logprobs)
        assert generation.finish_reason == choice.finish_reason


def requests() -> list[tuple[str, Json, Json]]:
    """Paths, requests and what the engine says to them: every way of asking with every kind of answer."""
    asks: list[Json] = [{}, {"return_token_ids": True}, {"return_token_ids": False}, {"n": 3}]
    chat_asks: list[Json] = [{"logprobs": True}, {"logprobs": None}, {"logprobs": True, "top_logprobs": 2}]
    chat_asks.append({"logprobs": True, "return_token_ids": True})
    whole_asks: list[Json] = [{"logprobs": 0}, {"logprobs": 3}, {"logprobs": None, "n": 2}]
    scripts: list[Json] = [{}, {"per_chunk": 4}, {"tool_calls": TOOLS}, {"tool_calls": TOOLS, "per_chunk": 7}]
    scripts += [{"text": "naïve 😀", "tool_calls": TOOLS}, {"tokens": 1}]
    messages = {"model": "policy", "messages": [{"role": "user", "content": "hi"}]}
    made = [(CHAT, {**messages, **ask}, script) for ask in asks + chat_asks for script in scripts]
    prompt = {"model": "policy", "prompt": "hi"}
    plain = [script for script in scripts if "tool_calls" not in script]
    return made + [(COMPLETIONS, {**prompt, **ask}, s) for ask in asks + whole_asks for s in plain]


@pytest.mark.parametrize(("path", "request_", "script"), requests())
def test_a_whole_answer_is_what_it_would_have_been_and_its_tokens_are_recorded(
    path: str, request_: Json, script: Json
) -> None:
    body = orjson.dumps(request_)
    call = begin(path, body)
    answer = call.whole(engine_whole(path, call.prepared.body, script))
    assert orjson.loads(answer) == orjson.loads(engine_whole(path, body, script))
    span = call.span(policy_version_end=0)
    check_exact(span, engine_reply(path, body, script))
    assert span.response is not None
    assert orjson.loads(span.response) == orjson.loads(answer)
    assert (span.request, span.response_id) == (body, "chatcmpl-1")


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize(("path", "request_", "script"), requests())
def test_a_stream_has_the_events_that_it_would_have_had_and_its_tokens_are_recorded(
    path: str, request_: Json, script: Json, usage: bool
) -> None:
    request_ = {**request_, "stream": True, **({"stream_options": {"include_usage": True}} if usage else {})}
    body = orjson.dumps(request_)
    call = begin(path, body, streamed=True)
    stream = engine_stream(path, call.prepared.body, script)
    got = b"".join(call.feed(stream[i : i + 37]) for i in range(0, len(stream), 37))
    assert got.split(b"\n\n") == engine_stream(path, body, script).split(b"\n\n")
    assert call.ended
    span = call.span(policy_version_end=0)
    reply = engine_reply(path, body, script)
    check_exact(span, reply)
    assert (span.usage is not None) == usage
    check_assembled(path, orjson.loads(span.response or b""), reply)


def check_assembled(path: str, response: Json, reply: Reply) -> None:
    """The stored response of a stream is that of a whole answer, as far as a client reads it."""
    assert response["id"] == HEAD.response_id
    for choice, expected in zip(response["choices"], reply.choices, strict=True):
        assert choice["finish_reason"] == expected.finish_reason
        if path == COMPLETIONS:
            assert choice["text"] == expected.content
            continue
        message = choice["message"]
        assert message["role"] == "assistant"
        assert message["content"] == (expected.content or "")
        calls = message.get("tool_calls", [])
        assert [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in calls] == [
            (c["id"], c["name"], c["arguments"]) for c in expected.tool_calls
        ]


ODD_BODIES = [
    b'{"model":"policy","temperature":1.0000000000000001e-2,"messages":[]}',
    b' {"seed" : 123456789012345678901234567890 , "messages" : [ ] }\n\t ',
    b'{"messages":[{"role":"user","content":"\\u00e9\\ud83d\\ude00 \\/"}],"x":1E5,"x":2}',
    '{"messages":[{"role":"user","content":"é😀"}]}'.encode(),
]


@pytest.mark.parametrize("body", ODD_BODIES)
@pytest.mark.parametrize(("path", "asked"), [(CHAT, b'"logprobs":true'), (COMPLETIONS, b'"logprobs":0')])
def test_what_is_added_is_spliced_in_behind_the_agents_own_bytes(
    path: str, asked: bytes, body: bytes
) -> None:
    ready = prepared(path, body)
    assert ready.body == body.rstrip()[:-1] + b',"return_token_ids":true,' + asked + b"}"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"{}", b"\xff\xfe", b'{"a": NaN}'])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_is_no_json_object_goes_on_as_it_is(path: str, body: bytes) -> None:
    ready = prepared(path, body)
    assert ready.body == body


@pytest.mark.parametrize("given", [False, None])
@pytest.mark.parametrize(("path", "asked"), [(CHAT, True), (COMPLETIONS, 0)])
def test_a_field_that_says_no_is_set_once_and_not_doubled(path: str, asked: object, given: object) -> None:
    request = {"model": "m", "return_token_ids": given, "logprobs": None, "x": [1.5, "é"]}
    ready = prepared(path, orjson.dumps(request))
    assert orjson.loads(ready.body) == {**request, "return_token_ids": True, "logprobs": asked}
    assert ready.body.count(b'"logprobs"') == ready.body.count(b'"return_token_ids"') == 1


def test_who_asked_for_everything_is_left_alone() -> None:
    body = b'{"messages":[], "logprobs": true, "return_token_ids": true}'
    assert prepared(CHAT, body).body == body
    body = b'{"prompt":"", "logprobs": 2, "return_token_ids": true}'
    assert prepared(COMPLETIONS, body).body == body


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"top_logprobs": 2}),
        (CHAT, {"top_logprobs": 2, "logprobs": False}),
        (CHAT, {"use_beam_search": True}),
        (CHAT, {"echo": True}),
        (CHAT, {"include_reasoning": False}),
        (COMPLETIONS, {"echo": True}),
        (COMPLETIONS, {"use_beam_search": True, "n": 2}),
    ],
)
def test_nothing_is_asked_where_asking_would_change_the_answer(path: str, fields: Json) -> None:
    body = orjson.dumps({"model": "policy", "messages": [], "prompt": "x", **fields})
    assert prepared(path, body).body == body


def test_nothing_is_asked_of_an_engine_that_does_not_know_the_question() -> None:
    body = b'{"model":"policy","messages":[]}'
    assert prepared(CHAT, body, tokens=False).body == body


def test_only_generating_posts_are_captured() -> None:
    paths = [CHAT, COMPLETIONS, "/v1/embeddings", "/v1/models", "/", "/v1/chat/completions/"]
    captured = [
        (method, path) for method in ("GET", "POST", "HEAD") for path in paths if wire_for(method, path)
    ]
    assert captured == [("POST", CHAT), ("POST", COMPLETIONS)]


def test_without_tokens_the_answer_is_recorded_as_text_and_its_bytes_are_not_touched() -> None:
    body = b'{"model":"policy","messages":[]}'
    call = begin(CHAT, body, tokens=False)
    sent = b' {"id": "x", "choices": [{"index": 0, "finish_reason": "stop", "message": {"x": "\\u00e9"}}]}\n'
    assert call.whole(sent) is sent
    span = call.span(policy_version_end=None)
    assert (span.fidelity, span.generations, span.response_id) == (Fidelity.TEXT, (), "x")


def test_without_tokens_a_streams_bytes_are_not_touched() -> None:
    body = b'{"model":"policy","messages":[],"stream":true}'
    call = begin(CHAT, body, tokens=False, streamed=True)
    chunk = b'{ "id":"x", "choices":[{"index":0,"finish_reason":"stop","delta":{}}]}'
    sent = b"event: a\r\nid:1\r\ndata:" + chunk + b"\r\n\r\n: c\n\ndata: [DONE]\n\n"
    assert b"".join(call.feed(sent[i : i + 1]) for i in range(len(sent))) == sent
    assert call.span(policy_version_end=None).fidelity is Fidelity.TEXT


def test_fields_and_comments_beside_a_rewritten_event_stay() -> None:
    call = begin(CHAT, b'{"messages":[],"stream":true}', streamed=True)
    chunk = '{"id":"x","choices":[{"index":0,"delta":{"content":"a"},"token_ids":[5],"finish_reason":null}]}'
    got = call.feed(f": ping\nevent: chunk\nid: 7\ndata: {chunk}\nretry: 5\n\n".encode())
    assert got == f": ping\nevent: chunk\nid: 7\ndata: {chunk.replace('[5]', 'null')}\nretry: 5\n\n".encode()


@pytest.mark.parametrize(
    "choices",
    [
        [
            {
                "index": 0,
                "token_ids": [1, 2],
                "logprobs": {"content": [{"logprob": -1.0}]},
                "finish_reason": "stop",
            }
        ],
        [{"index": 0, "token_ids": [1], "logprobs": None, "finish_reason": "stop"}],
        [{"index": 0, "token_ids": [], "logprobs": {"content": []}, "finish_reason": "stop"}],
        [{"index": 0, "token_ids": [1], "logprobs": {"content": [{"logprob": -1.0}]}, "finish_reason": None}],
    ],
)
def test_an_answer_with_gaps_in_its_tokens_is_not_called_exact(choices: list[Json]) -> None:
    call = begin(CHAT, b'{"messages":[]}')
    call.whole(orjson.dumps({"id": "x", "prompt_token_ids": [1], "choices": choices}))
    span = call.span(policy_version_end=0)
    assert (span.error_class, span.fidelity) == (None, Fidelity.TEXT)
    assert span.response is not None


def test_sampling_parameters_are_recorded_as_they_were_sent() -> None:
    request = {"temperature": 0, "top_p": 0.5, "seed": None, "stop": ["x"], "messages": [], "user": "u"}
    assert prepared(CHAT, orjson.dumps(request)).sampling == {"temperature": 0, "top_p": 0.5, "stop": ["x"]}


# -- whatever the engine sends -------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with Store.open(":memory:") as opened:
        yield opened


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
KEYS = st.sampled_from(
    [
        "id",
        "choices",
        "index",
        "delta",
        "message",
        "text",
        "logprobs",
        "content",
        "token_logprobs",
        "logprob",
        "token_ids",
        "prompt_token_ids",
        "finish_reason",
        "usage",
        "error",
        "tool_calls",
        "function",
        "arguments",
    ]
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
CHOICE = st.dictionaries(KEYS, JSON, max_size=6)
CHUNK = st.one_of(
    JSON,
    st.fixed_dictionaries({"choices": st.lists(CHOICE, max_size=3)}, optional={"id": JSON, "error": JSON}),
)
ASKS = st.sampled_from([b'{"messages":[]}', b'{"messages":[],"logprobs":true}', b"{}", b"nonsense"])


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([CHAT, COMPLETIONS]), ASKS, st.lists(CHUNK, max_size=4))
def test_no_shape_of_a_stream_can_make_capture_fail(
    store: Store, path: str, body: bytes, chunks: list[Any]
) -> None:
    call = begin(path, body, streamed=True)
    stream = b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks)
    got = call.feed(stream) + call.feed(b"data: [DONE]\n\n") + call.finish_stream()
    span = call.span(policy_version_end=0)
    store.add_span(span)
    assert got.endswith(b"data: [DONE]\n\n")
    if call.prepared.body == body:
        assert got == stream + b"data: [DONE]\n\n"


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([CHAT, COMPLETIONS]), ASKS, CHUNK)
def test_no_shape_of_an_answer_can_make_capture_fail(
    store: Store, path: str, body: bytes, answer: Any
) -> None:
    call = begin(path, body)
    raw = orjson.dumps(answer)
    got = call.whole(raw)
    span = call.span(policy_version_end=0)
    store.add_span(span)
    assert isinstance(json.loads(got), type(answer))
    if call.prepared.body == body:
        assert got == raw


@pytest.mark.parametrize("depth", [200, 300, 1000])
@pytest.mark.parametrize("streamed", [True, False])
def test_deeply_nested_json_goes_through_both_ways(depth: int, streamed: bool) -> None:
    nest = b'{"a":' * depth + b"1" + b"}" * depth
    call = begin(CHAT, b'{"messages":[],"logprobs":null,"logit_bias":' + nest + b"}", streamed=streamed)
    assert nest in call.prepared.body
    answer = b'{"id":"x","choices":[{"index":0,"finish_reason":"stop","delta":' + nest + b',"message":{}}]}'
    got = call.feed(b"data: " + answer + b"\n\n") if streamed else call.whole(answer)
    assert nest in got
    assert call.span(policy_version_end=0).fidelity in (Fidelity.TEXT, Fidelity.INCOMPLETE)


# -- deltas --------------------------------------------------------------------------------------

TEXTS = st.text(max_size=3)
FUNCTIONS = st.fixed_dictionaries({}, optional={"arguments": TEXTS})


@st.composite
def deltas(draw: st.DrawFn) -> list[Json]:
    """Deltas as engines send them: ids, names and types once, indices ascending, text in pieces."""
    made: list[Json] = [{"role": "assistant", "content": draw(st.sampled_from(["", None]))}]
    for field in draw(st.lists(st.sampled_from(["content", "refusal", "reasoning_content"]), max_size=6)):
        made += [{field: draw(TEXTS)}]
    for index in range(draw(st.integers(0, 3))):
        head = {"index": index, "id": f"call-{index}", "type": "function"}
        made.append({"tool_calls": [{**head, "function": {"name": draw(TEXTS), "arguments": draw(TEXTS)}}]})
        for piece in draw(st.lists(FUNCTIONS, max_size=3)):
            made += [{"tool_calls": [{"index": index, "function": piece}]}]
    return made


@settings(deadline=None)  # the first one imports openai
@given(deltas())
def test_deltas_add_up_as_openais_own_client_adds_them(pieces: list[Json]) -> None:
    accumulate_delta = pytest.importorskip("openai.lib.streaming._deltas").accumulate_delta
    ours: Json = {}
    theirs: dict[object, object] = {}
    for piece in pieces:
        merge_delta(ours, json.loads(json.dumps(piece)))
        theirs = accumulate_delta(theirs, json.loads(json.dumps(piece)))
    assert ours == theirs


def test_tool_calls_whose_pieces_are_interleaved_come_apart_again() -> None:
    into: Json = {}
    for index, piece in itertools.product(range(2), "ab"):
        merge_delta(into, {"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    for index in (1, 0):
        merge_delta(into, {"tool_calls": [{"index": index, "function": {"arguments": "!"}}]})
    assert [call["function"]["arguments"] for call in into["tool_calls"]] == ["ab!", "ab!"]


def test_an_id_that_is_repeated_with_each_delta_is_not_doubled() -> None:
    into: Json = {}
    for _ in range(2):
        merge_delta(into, {"role": "assistant", "tool_calls": [{"index": 0, "id": "c", "type": "function"}]})
    assert into == {"role": "assistant", "tool_calls": [{"index": 0, "id": "c", "type": "function"}]}


def test_two_pieces_of_a_tool_call_in_one_chunk_reach_the_agent_as_they_came() -> None:
    # vLLM's hermes parser sends the name and the beginning of the arguments as two items.
    pieces = [
        {"index": 0, "id": "call-1", "type": "function", "function": {"name": "sql", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"query": "'}},
    ]
    delta = {"tool_calls": pieces}
    before = orjson.dumps(delta)
    message: dict[str, Any] = {}
    merge_delta(message, delta)
    merge_delta(message, {"tool_calls": [{"index": 0, "function": {"arguments": 'x"}'}}]})
    assert orjson.dumps(delta) == before
    assert message["tool_calls"][0]["function"] == {"name": "sql", "arguments": '{"query": "x"}'}
