"""How Messages calls are translated, piece by piece and whatever comes. No sockets."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_proxy.proxy.wires import wire_for
from lightning_proxy.proxy.wires.base import Untranslatable
from tests.proxy.raw_http import CHAT
from tests.proxy.test_messages import HELLO, MESSAGES, begin, body_of, prepared

Json = dict[str, Any]

# -- what the fake engine never says or is asked -------------------------------------------------


def chunk_of(delta: Json, **choice: Any) -> Json:
    choices = [{"index": 0, "delta": delta, "finish_reason": None, **choice}]
    return {"id": "chatcmpl-1", "model": "m", "choices": choices, "usage": {"prompt_tokens": 7}}


def call_delta(index: int, arguments: str, call_id: str | None = None) -> Json:
    named = {"id": call_id, "type": "function"} if call_id else {}
    function = {"name": "sql", "arguments": arguments} if call_id else {"arguments": arguments}
    return {"index": index, **named, "function": function}


def test_thoughts_text_and_calls_are_blocks_one_after_the_other() -> None:
    call = begin(body_of({}, True))
    chunks = [
        chunk_of({"role": "assistant", "content": ""}),
        chunk_of({"reasoning": "hm"}),
        chunk_of({"reasoning": "", "content": "I look."}),
        chunk_of({"tool_calls": [call_delta(0, '{"q"', "c0")]}),
        chunk_of({"content": "meanwhile"}),
        chunk_of({"tool_calls": [call_delta(0, ": 1}"), call_delta(1, "{}", "c1")]}),
        chunk_of({}, finish_reason="stop", stop_reason="END"),
        {
            **chunk_of({}),
            "choices": [],
            "usage": {
                "prompt_tokens": 7,
                "completion_tokens": 9,
                "prompt_tokens_details": {"cached_tokens": 4, "created_cache_tokens": 1},
            },
        },
    ]
    stream = b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks)
    got = call.feed(stream + b"data: [DONE]\n\n").decode()
    signature = re.search(r'"signature":"([0-9a-f]{32})"', got)
    assert signature is not None
    events = [
        json.loads(line.removeprefix("data: ")) for line in got.split("\n") if line.startswith("data: ")
    ]
    spoken = [(e["type"].removeprefix("content_block_"), e.get("index"), told(e)) for e in events]
    usage = {"input_tokens": 2, "output_tokens": 9}
    usage |= {"cache_creation_input_tokens": 1, "cache_read_input_tokens": 4}
    assert spoken == [
        ("message_start", None, {"input_tokens": 7, "output_tokens": 0}),
        ("start", 0, {"type": "thinking", "thinking": ""}),
        ("delta", 0, {"type": "thinking_delta", "thinking": "hm"}),
        ("delta", 0, {"type": "signature_delta", "signature": signature.group(1)}),
        ("stop", 0, None),
        ("start", 1, {"type": "text", "text": ""}),
        ("delta", 1, {"type": "text_delta", "text": "I look."}),
        ("stop", 1, None),
        ("start", 2, {"type": "tool_use", "id": "c0", "name": "sql", "input": {}}),
        ("delta", 2, {"type": "input_json_delta", "partial_json": '{"q"'}),
        ("delta", 2, {"type": "input_json_delta", "partial_json": ": 1}"}),
        ("stop", 2, None),
        ("start", 3, {"type": "text", "text": ""}),
        ("delta", 3, {"type": "text_delta", "text": "meanwhile"}),
        ("stop", 3, None),
        ("start", 4, {"type": "tool_use", "id": "c1", "name": "sql", "input": {}}),
        ("delta", 4, {"type": "input_json_delta", "partial_json": "{}"}),
        ("stop", 4, None),
        ("message_delta", None, {"stop_reason": "stop_sequence", "stop_sequence": "END"}),
        ("message_stop", None, None),
    ]
    assert events[-2]["usage"] == usage
    kept = json.loads(call.span(policy_version_end=0).response or b"")
    assert [block["type"] for block in kept["content"]] == [
        "thinking",
        "text",
        "tool_use",
        "text",
        "tool_use",
    ]
    assert (kept["content"][2]["input"], kept["stop_sequence"]) == ({"q": 1}, "END")


def told(event: Json) -> Any:
    """The part of an event that is its own."""
    message = event.get("message")
    return message["usage"] if message else event.get("content_block") or event.get("delta")


def test_a_whole_answer_with_thoughts_and_a_stop_sequence() -> None:
    call = begin(body_of({}), streamed=False)
    function = {"name": "sql", "arguments": '{"n": 100000000000000000000, "é": null}'}
    message: Json = {"role": "assistant", "content": "t", "reasoning": "hm"}
    message["tool_calls"] = [{"id": "c0", "type": "function", "function": function}]
    answer = chunk_of({}) | {"choices": [{"message": message, "finish_reason": "stop", "stop_reason": "x"}]}
    got = call.whole(orjson.dumps(answer))
    made = json.loads(got)
    assert len(made["content"][0].pop("signature")) == 32
    assert made == {
        "id": "chatcmpl-1",
        "type": "message",
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "hm"},
            {"type": "text", "text": "t"},
            {"type": "tool_use", "id": "c0", "name": "sql", "input": {"n": 10**20, "é": None}},
        ],
        "model": "m",
        "stop_reason": "stop_sequence",
        "stop_sequence": "x",
        "usage": {"input_tokens": 7, "output_tokens": 0},
    }
    assert call.span(policy_version_end=0).response == got


def test_every_block_that_a_request_may_hold_finds_its_place() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}
    linked = {"type": "image", "source": {"type": "url", "url": "https://x"}}
    result: Json = {"type": "tool_result", "tool_use_id": "t1", "is_error": True}
    result["content"] = [{"type": "text", "text": "1"}, linked, {"type": "text", "text": "2"}]
    result["content"].append({"type": "tool_reference", "tool_name": "sql"})
    use = {"type": "tool_use", "id": "t1", "name": "sql", "input": {"é": 1e16}, "caller": {"type": "direct"}}
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    fields = {
        "system": [{"type": "text", "text": "x-anthropic-billing-header: 1"}, {"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": [image, {"type": "text", "text": ""}, {"type": "text", "text": "q"}]},
            {"role": "assistant", "content": [thought, {"type": "redacted_thinking", "data": "x"}, use]},
            {"role": "user", "content": [result]},
        ],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "max_tokens": 2000,
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"a": 1}}},
    }
    chat = orjson.loads(prepared(body_of(fields)).body)
    function = {"name": "sql", "arguments": '{"\\u00e9": 1e+16}'}
    assert chat["messages"] == [
        {"role": "system", "content": "s"},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
                {"type": "text", "text": "q"},
            ],
        },
        {
            "role": "assistant",
            "reasoning": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "1\n2"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x"}}]},
        {"role": "tool", "tool_call_id": "t1", "content": [{"type": "tool_reference", "name": "sql"}]},
    ]
    named = {"name": "json_schema", "schema": {"a": 1}}
    assert chat["response_format"] == {"type": "json_schema", "json_schema": named}
    assert (chat["reasoning_effort"], chat["thinking_token_budget"]) == ("low", 1024)
    assert chat["max_tokens"] == chat["max_completion_tokens"] == 2000


# -- whatever comes ------------------------------------------------------------------------------


def test_only_a_post_to_messages_itself_is_captured() -> None:
    paths = [MESSAGES, f"{MESSAGES}/", f"{MESSAGES}/count_tokens", f"{MESSAGES}/batches"]
    found = [(m, path) for m in ("GET", "HEAD", "POST") for path in paths if wire_for(m, path)]
    assert found == [("POST", MESSAGES)]


def test_an_engine_that_cannot_be_asked_gets_the_agents_own_bytes() -> None:
    body = b' {"model" : "policy", "max_tokens":1,"messages":[{"role":"user","content":"\\u00e9"}]}\n'
    assert (prepared(body, tokens=False).body, prepared(body, tokens=False).path) == (body, None)
    assert prepared(body).path == CHAT


@pytest.mark.parametrize("depth", [300, 900, 1100, 20_000])
def test_a_request_of_any_depth_is_prepared(depth: int) -> None:
    nest = b'{"a":' * depth + b"1" + b"}" * depth
    tool = b'{"name":"t","input_schema":' + nest + b"}"
    body = body_of({})[:-1] + b',"tools":[' + tool + b"]}"
    ready = prepared(body)
    assert nest in ready.body
    assert (ready.path is None) == (ready.body == body)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2000) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "text",
                    "role",
                    "content",
                    "name",
                    "input",
                    "input_schema",
                    "source",
                    "thinking",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "model",
        "messages",
        "max_tokens",
        "metadata",
        "output_config",
        "thinking",
        "stop_sequences",
        "stream",
        "system",
        "temperature",
        "tool_choice",
        "tools",
        "top_k",
        "top_p",
        "chat_template_kwargs",
    ]
)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(FIELDS, VALUES, max_size=3))
def test_no_shape_of_a_request_makes_preparing_fail(fields: Json) -> None:
    body = json.dumps({**HELLO, **fields}, allow_nan=True).encode()
    ready = prepared(body)
    if ready.path is None:
        assert ready.body == body
    else:
        chat = orjson.loads(ready.body)
        assert chat["return_token_ids"] is chat["logprobs"] is True


TEXTS = st.sampled_from([None, "", "a", "é\n\n"])
CALL_DELTA = st.fixed_dictionaries(
    {"index": st.integers(0, 1)},
    optional={
        "id": TEXTS,
        "function": st.none() | st.fixed_dictionaries({}, optional={"name": TEXTS, "arguments": TEXTS}),
    },
)
GOOD_DELTA = st.fixed_dictionaries(
    {}, optional={"content": TEXTS, "reasoning": TEXTS, "tool_calls": st.lists(CALL_DELTA, max_size=3)}
)
ANY = st.one_of(
    VALUES, st.dictionaries(st.sampled_from(["content", "tool_calls", "reasoning"]), VALUES, max_size=3)
)
CHOICE = st.fixed_dictionaries(
    {"index": st.just(0) | VALUES},
    optional={
        "delta": GOOD_DELTA | GOOD_DELTA | ANY,
        "finish_reason": st.sampled_from([None, "stop", 7]),
        "stop_reason": st.sampled_from([None, 3, "x", []]),
        "token_ids": st.lists(st.integers(0, 9), max_size=2) | VALUES,
    },
)
CHUNK = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {
            "id": st.just("x") | VALUES,
            "model": st.just("m") | VALUES,
            "choices": st.lists(CHOICE, max_size=2),
        },
        optional={"usage": VALUES, "error": VALUES},
    ),
    st.fixed_dictionaries({"error": st.fixed_dictionaries({"message": VALUES})}),
)
FIRST: Json = {
    "id": "x",
    "model": "m",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
}


@settings(deadline=None, max_examples=400)
@given(st.booleans(), st.lists(CHUNK, max_size=6))
def test_no_shape_of_a_chunk_makes_half_an_event_or_a_false_end(begun: bool, chunks: list[Any]) -> None:
    call = begin(body_of({}, True))
    got, cut = b"", False
    try:
        for chunk in [FIRST] * begun + chunks:
            got += call.feed(b"data: " + orjson.dumps(chunk) + b"\n\n")
        got += call.feed(b"data: [DONE]\n\n") + call.finish_stream()
    except Untranslatable:
        cut = True
    *events, rest = got.split(b"\n\n")
    assert rest == b""
    kinds = []
    for event in events:
        matched = re.fullmatch(rb"event: (\w+)\ndata: (.*)", event)
        assert matched is not None, event
        kinds.append(json.loads(matched.group(2))["type"])
        assert kinds[-1] == matched.group(1).decode()
    # The end is said exactly where everything was understood and nothing failed.
    assert ("message_stop" in kinds) == (not cut and "error" not in kinds)
    assert kinds.count("message_start") <= 1
    opened = kinds.count("content_block_start") - kinds.count("content_block_stop")
    assert opened == 0 if "message_stop" in kinds else 0 <= opened <= 1
    call.span(policy_version_end=0)


@settings(deadline=None, max_examples=200)
@given(VALUES | st.fixed_dictionaries({"id": VALUES, "model": VALUES, "choices": VALUES, "usage": VALUES}))
def test_no_shape_of_an_answer_is_passed_on_untranslated(answer: Any) -> None:
    call = begin(body_of({}), streamed=False)
    try:
        got = json.loads(call.whole(orjson.dumps(answer)))
    except Untranslatable:
        assert not call.ended
    else:
        assert got["type"] in ("message", "error")
    call.span(policy_version_end=0)
