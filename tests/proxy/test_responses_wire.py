"""The Responses wire without sockets: what is translated, and that it is what vLLM makes of the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_proxy.proxy.attribution import Attribution
from lightning_proxy.proxy.call import Call as WireCall
from lightning_proxy.proxy.wires.base import Prepared, Untranslatable
from lightning_proxy.proxy.wires.responses import ResponsesWire
from lightning_proxy.proxy.wires.responses_request import LOGPROBS, Habits, translate
from lightning_proxy.store import Fidelity
from tests.engine import Model, responses, shapes
from tests.proxy.raw_http import CHAT
from tests.proxy.test_responses import (
    ASKED,
    CALL,
    MIXED,
    OUTPUT,
    PASSED,
    PLAIN,
    SAID,
    SEARCH,
    SPACE,
    TOOL,
    TOOLS,
    USER,
)
from tests.responses_compare import comparable

Json = dict[str, Any]
HEAD = shapes.Head("resp_1", 1, "policy")
MODEL = Model(tokens=9)
PROBE: Json = {"model": "policy", "input": "x", "max_output_tokens": 1, "tools": [TOOL], "reasoning": {}}
SHELL = responses.response(HEAD, {**PROBE, "text": {}}, MODEL.generate(responses.as_chat(PROBE)))
HABITS = Habits(
    asks=True,
    shell=SHELL,
    tool={**dict.fromkeys(SHELL["tools"][0]), "type": "function"},
    max_model_len=32768,
    forces_tools=True,
)


def prepared(request: Json, habits: Habits = HABITS) -> Prepared:
    return ResponsesWire(habits).prepare(orjson.dumps(request), request, tokens=True)


NATIVE: list[Json] = [
    {"tools": []},
    {"tools": None},
    {"tools": [{**TOOL, "defer_loading": True}]},
    {"tools": [{"type": "custom", "name": "x"}]},
    {"tools": [TOOL, {"type": "mcp", "server_label": "x"}]},
    {"tool_choice": None},
    {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
    {"tool_choice": {"type": "function", "name": "other"}},
    {"previous_response_id": "resp_0"},
    {"background": True},
    {"background": 0},
    {"conversation": "conv_1"},
    {"prompt": {"id": "x"}},
    {"truncation": "auto"},
    {"truncation": None},
    {"include": [LOGPROBS]},
    {"include": "x"},
    {"include": ["nothing known"]},
    {"enable_response_messages": True},
    {"include_reasoning": False},
    {"temperature": "1"},
    {"temperature": True},
    {"temperature": -1},
    {"presence_penalty": 3},
    {"seed": 2**63},
    {"max_output_tokens": 0},
    {"max_output_tokens": 1.5},
    {"max_output_tokens": 32769},
    {"stop": [1]},
    {"stream": "yes"},
    {"text": {"format": {"type": "json_object"}}},
    {"text": {"format": {"type": "text"}}, "tools": [{**TOOL, "strict": True}]},
    {"reasoning": {"effort": "much"}},
    {"reasoning": {"context": "auto"}},
    {"metadata": {"a": 1}},
    {"input": []},
    {"input": [{**USER, "name": "x"}]},
    {"input": [{"role": "tool", "content": "x"}]},
    {"input": [{**USER, "content": [{"type": "input_image", "image_url": "data:,"}]}]},
    {"input": [{**USER, "content": []}]},
    {"input": [USER, {**SAID, "status": "in_progress"}]},
    {"input": [{**SAID, "content": [{"type": "refusal", "refusal": "no"}]}]},
    {"input": [{**CALL, "namespace": 3}]},
    {"input": [{**CALL, "caller": {"type": "direct"}}]},
    {"input": [{"type": "item_reference", "id": "x"}]},
    {"input": [{"type": "reasoning", "id": "x", "summary": [], "encrypted_content": "x"}]},
    {"input": ["x"]},
    {"unheard_of": None},
]


@pytest.mark.parametrize("fields", NATIVE, ids=repr)
def test_what_might_mean_something_else_goes_as_it_is(fields: Json) -> None:
    assert translate(TOOLS, HABITS) is not None
    assert translate({**TOOLS, **fields}, HABITS) is None
    assert prepared({**TOOLS, **fields}).path is None


ECHO: list[Json] = [SPACE, SEARCH]  # what it says does not matter here
NATIVE_MIXED: list[Json] = [
    {"tool_choice": "required"},
    {"tool_choice": {"type": "function", "name": "sql"}},
    {"tool_choice": {"type": "web_search"}},
    {"tools": [{**TOOL, "strict": True}, SPACE, SEARCH]},
    {"tools": [SEARCH, {**SPACE, "tools": [{**TOOL, "strict": True}]}]},
    {"tools": [SEARCH, {**SPACE, "tools": [{**TOOL, "defer_loading": True}]}]},
    {"tools": [SEARCH, {**SPACE, "tools": [{"type": "custom", "name": "x"}]}]},
    {"tools": [SEARCH, {**SPACE, "tools": None}]},
    {"tools": [SEARCH, {**SPACE, "name": ""}]},
    {"tools": [TOOL, SEARCH, {"type": "mcp", "server_label": "x"}]},
    {"tools": [TOOL, SEARCH, {"type": "code_interpreter", "container": "x"}]},
    {"tools": [TOOL, SEARCH, {"type": "web_search_preview"}]},
    {"tools": [TOOL, SEARCH, {"type": "unheard_of"}]},
    {"tools": [TOOL, SEARCH, {"type": ["web_search"]}]},
    {"tools": [TOOL, SEARCH, SPACE, SEARCH]},
]


@pytest.mark.parametrize("fields", NATIVE_MIXED, ids=repr)
def test_mixed_tools_that_might_mean_something_else_go_as_they_are(fields: Json) -> None:
    assert translate(MIXED, HABITS, ECHO) is not None
    assert translate({**MIXED, **fields}, HABITS, ECHO) is None
    assert translate(MIXED, HABITS) is None


@pytest.mark.parametrize(
    "habits",
    [
        Habits(asks=True),
        Habits(asks=True, shell=SHELL, tool=HABITS.tool),
        Habits(asks=False),
    ],
)
def test_an_engine_that_is_not_known_well_is_not_imitated(habits: Habits) -> None:
    ready = prepared(TOOLS, habits)
    assert ready.path is None
    assert (ready.body == orjson.dumps(TOOLS)) is not habits.asks


def test_a_forced_tool_goes_as_it_is_where_it_changes_the_echo() -> None:
    habits = Habits(asks=True, shell=SHELL, tool=HABITS.tool, max_model_len=32768)
    assert prepared({**TOOLS, "tool_choice": "required"}, habits).path is None
    assert prepared({**TOOLS, "tool_choice": "none"}, habits).path == CHAT


def test_what_is_added_is_spliced_in_behind_the_agents_own_bytes() -> None:
    body = (
        b' {"input" : "\\u00e9", "temperature":1.0000000000000001e-2, "seed":123456789012345678901234567890} '
    )
    ready = ResponsesWire(HABITS).prepare(body, orjson.loads(body), tokens=True)
    added = b',"enable_response_messages":true,"include":["message.output_text.logprobs"]}'
    assert ready.body == body.rstrip()[:-1] + added
    assert ready.fallback is not None
    assert ready.fallback.body is body


def test_who_asked_for_everything_is_left_alone() -> None:
    request = {**PLAIN, **ASKED}
    assert prepared(request).body == orjson.dumps(request)


@pytest.mark.parametrize("fields", [{"background": True}, {"include": "x"}, {"include": {}}])
def test_nothing_is_asked_where_asking_would_change_the_answer(fields: Json) -> None:
    request = {**PLAIN, **fields}
    assert prepared(request).body == orjson.dumps(request)


def begin(
    request: Json, *, streamed: bool, habits: Habits = HABITS, special: Sequence[Json] = ()
) -> WireCall:
    wire = ResponsesWire(habits, special)
    body = orjson.dumps(request)
    call = WireCall(wire, body, request, wire.prepare(body, request, tokens=True), Attribution("r1"))
    call.status, call.streamed = 200, streamed
    return call


def test_a_response_that_is_queued_is_no_answer_yet() -> None:
    call = begin({**PLAIN, "background": True}, streamed=False)
    sent = b'{"id": "resp_1", "status": "queued", "output": [], "usage": null}'
    assert call.whole(sent) == sent
    span = call.span(policy_version_end=0)
    assert (span.response_id, span.fidelity, span.error_class) == ("resp_1", Fidelity.TEXT, None)


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=3))
KEYS = st.sampled_from(
    ["id", "model", "created", "choices", "index", "delta", "logprobs", "content", "token", "logprob",
     "token_ids", "prompt_token_ids", "finish_reason", "stop_reason", "usage", "error", "tool_calls",
     "function", "name", "arguments", "reasoning", "type", "response", "output", "status", "tokens",
     "input_messages", "output_messages", "prompt_tokens", "completion_tokens"]
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


@st.composite
def chunks(draw: st.DrawFn) -> list[Any]:
    """A good stream of chat chunks, with some of them lost, doubled, or replaced by anything."""
    request = {**responses.as_chat(TOOLS), "stream_options": {"include_usage": True}}
    asked: Json = {"return_token_ids": True, "logprobs": True}
    tool_calls = draw(st.sampled_from([(), (("sql", '{"query": "é"}'),)]))
    reply = MODEL.generate(request, tool_calls=tool_calls)
    good = list(shapes.chat_chunks(HEAD, {**request, **asked}, reply, draw(st.integers(1, 9))))
    made: list[Any] = []
    for chunk in good:
        fate = draw(st.sampled_from(["kept"] * 12 + ["lost", "doubled", "replaced"]))
        made += [chunk] * {"kept": 1, "doubled": 2}.get(fate, 0)
        if fate == "replaced":
            made.append(draw(ANYTHING))
    return made


@settings(deadline=None, max_examples=300)
@given(chunks(), st.booleans())
def test_no_shape_of_a_stream_makes_a_half_answer_end_cleanly(made: list[Any], done: bool) -> None:
    call = begin({**TOOLS, "stream": True}, streamed=True)
    stream = b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in made)
    got = b""
    try:
        got += call.feed(stream) + call.feed(b"data: [DONE]\n\n" if done else b"") + call.finish_stream()
    except Untranslatable:
        assert not call.ended
        assert b"response.completed" not in got
        return
    finishes = [
        choice.get("finish_reason")
        for chunk in made
        if isinstance(chunk, dict) and isinstance(chunk.get("choices"), list)
        for choice in chunk["choices"]
        if isinstance(choice, dict)
    ]
    assert done
    assert any(finishes)
    assert got.count(b"event: response.completed\n") == 1
    assert json.loads(got.removesuffix(b"\n\n").rpartition(b"data: ")[2])["response"]["usage"] is not None
    call.span(policy_version_end=0)


@settings(deadline=None, max_examples=100)
@given(st.lists(ANYTHING, max_size=4), st.booleans())
def test_no_shape_of_a_native_stream_can_make_capture_fail(made: list[Any], whole: bool) -> None:
    call = begin({**PLAIN, "stream": True}, streamed=True)
    events = [*made, {"type": "response.completed", "response": made[0] if made else {}}]
    stream = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events)
    got = call.feed(stream) + call.finish_stream()
    assert got.count(b"data: ") == len(events)
    call.span(policy_version_end=0)


# -- against vLLM's own code ---------------------------------------------------------------------

TEXTS = st.text(max_size=4)
THOUGHT = st.builds(
    lambda text, where: {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [{"type": "summary_text", "text": text}] if where else [],
        "content": None if where else [{"type": "reasoning_text", "text": text}],
    },
    TEXTS,
    st.booleans(),
)
ITEMS = st.one_of(
    st.builds(lambda text: {"role": "user", "content": text}, TEXTS),
    st.builds(lambda text: {"type": "message", "role": "developer", "content": text}, TEXTS),
    st.builds(
        lambda texts: {"role": "user", "content": [{"type": "input_text", "text": text} for text in texts]},
        st.lists(TEXTS, min_size=1, max_size=2),
    ),
    st.builds(lambda text: {"role": "assistant", "content": text}, TEXTS),
    st.builds(lambda text: {**SAID, "content": [{"type": "output_text", "text": text}]}, TEXTS),
    st.builds(lambda name: {**CALL, "name": name}, TEXTS),
    st.builds(lambda name, space: {**CALL, "name": name, "namespace": space}, TEXTS, st.none() | TEXTS),
    st.builds(lambda text: {**OUTPUT, "output": text}, TEXTS),
    THOUGHT,
)
ITEMS = st.builds(lambda item, passed: item | passed, ITEMS, st.sampled_from([{}, PASSED]))


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's own imports warn
@settings(deadline=None, max_examples=300)
@given(st.lists(ITEMS, min_size=1, max_size=6), st.sampled_from([None, "", "Be brief."]))
def test_messages_are_those_that_vllm_makes_of_the_same_items(
    items: list[Json], instructions: str | None
) -> None:
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.utils import construct_input_messages

    request = {**TOOLS, "input": items, "instructions": instructions}
    translated = translate(request, HABITS)
    assert translated is not None
    parsed = ResponsesRequest.model_validate(json.loads(json.dumps(request)))
    theirs = construct_input_messages(request_instructions=instructions, request_input=parsed.input)
    assert [_bare(message) for message in translated.chat["messages"]] == [
        _bare(json.loads(json.dumps(message, default=lambda value: value.model_dump()))) for message in theirs
    ]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's own imports warn
@pytest.mark.parametrize("tools", [MIXED["tools"], [SEARCH, SPACE], [SPACE, {**SPACE, "name": "x"}, TOOL]])
def test_the_model_is_shown_the_tools_that_vllm_itself_would_show_it(tools: list[Json]) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.utils import construct_tool_dicts

    request = {**MIXED, "tools": tools}
    special = [tool for tool in tools if tool["type"] != "function"]
    translated = translate(request, HABITS, special)
    assert translated is not None
    theirs = construct_tool_dicts(ResponsesRequest.model_validate(request).tools, "auto")
    ours = ChatCompletionRequest.model_validate(translated.chat).tools
    assert [tool.model_dump() for tool in ours or ()] == theirs


def _bare(message: Json) -> Json:
    """A message as the template sees it: whatever a text part is called."""
    made = {key: value for key, value in message.items() if key != "type" and key not in PASSED}
    if isinstance(made.get("content"), list):
        made["content"] = [part["text"] for part in made["content"]]
    return made


PIECES = st.one_of(
    st.builds(lambda text: {"content": text}, TEXTS),
    st.builds(lambda text: {"reasoning": text}, TEXTS),
    st.builds(lambda text, thought: {"content": text, "reasoning": thought}, TEXTS, TEXTS),
    st.builds(lambda at, text: {"tool_calls": [_piece(at, "sql", text)]}, st.integers(0, 2), TEXTS),
    st.builds(
        lambda at, text: {"content": None, "tool_calls": [_piece(at, "sql", ""), _piece(at, None, text)]},
        st.integers(0, 2),
        TEXTS,
    ),
    st.builds(
        lambda text, more: {
            "content": more,
            "tool_calls": [_piece(0, "db__sql", text), _piece(1, "b", text)],
        },
        TEXTS,
        TEXTS,
    ),
)


def _piece(index: int, name: str | None, arguments: str) -> Json:
    function: Json = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
    return {"index": index, "function": function} | ({"id": "c", "type": "function"} if name else {})


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's own imports warn
@settings(deadline=None, max_examples=300)
@given(st.lists(PIECES, max_size=6))
def test_events_are_those_that_vllm_makes_of_the_same_deltas(deltas: list[Json]) -> None:
    from vllm.entrypoints.generate.base.protocol import DeltaMessage
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.streaming_events import (
        SimpleStreamingEventProcessor,
        _StateType,
        split_delta,
    )

    tools = ResponsesRequest.model_validate(MIXED).tools
    processor = SimpleStreamingEventProcessor(tools=tools)
    theirs: list[Any] = []
    for delta in deltas:
        for part in split_delta(DeltaMessage.model_validate(delta)):
            state, call = processor.resolve_target_state(part)
            if state == _StateType.NONE:
                continue
            if processor.needs_transition(state, call):
                theirs += [*processor.close_current(), *processor.open(state, call)]
            theirs += processor.emit_delta(part, None)  # type: ignore[arg-type]  # for logprobs only
    theirs += processor.close_current()

    habits = habits_of_the_installed_types()
    call_ = begin({**MIXED, "stream": True}, streamed=True, habits=habits, special=ECHO)
    head: Json = {"id": "x", "created": 1, "model": "policy", "prompt_token_ids": [1]}
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    endings: list[Json] = [
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": usage},
    ]
    sent = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    stream = b"".join(b"data: " + orjson.dumps({**head, **chunk}) + b"\n\n" for chunk in [*sent, *endings])
    ours = call_.feed(stream + b"data: [DONE]\n\n").split(b"\n\n")[2:-2]

    written = [f"event: {event.type}\ndata: {event.model_dump_json(by_alias=True)}" for event in theirs]
    assert comparable(_numbered([event.decode() for event in ours])) == comparable(_numbered(written))


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's own imports warn
def test_a_whole_answers_items_are_those_that_vllm_makes_of_the_same_parts() -> None:
    from vllm.entrypoints.generate.base.protocol import FunctionCall
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.utils import build_response_output_items

    calls = [
        {"id": f"call_{'0' * 16}", "name": name, "arguments": "{}"} for name in ("sql", "db__sql", "x__y")
    ]
    tools = ResponsesRequest.model_validate(MIXED).tools
    made = [FunctionCall.model_validate(call) for call in calls]
    theirs = build_response_output_items("Hm.", "é", made, tools=tools)

    message = {"content": "é", "reasoning": "Hm.", "tool_calls": [
        {"id": call["id"], "type": "function", "function": call} for call in calls]}  # fmt: skip
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    answer = {"model": "policy", "created": 1, "choices": [choice], "usage": usage}
    call = begin(MIXED, streamed=False, habits=habits_of_the_installed_types(), special=ECHO)
    ours = json.loads(call.whole(orjson.dumps(answer)))["output"]
    written = [item.model_dump(mode="json", by_alias=True) for item in theirs]
    assert comparable(json.dumps(ours)) == comparable(json.dumps(written))


def habits_of_the_installed_types() -> Habits:
    """As of a vLLM in this environment: a tool's fields are those of the openai package."""
    from openai.types.responses import FunctionTool

    fields = {field.alias or name for name, field in FunctionTool.model_fields.items()}
    assert HABITS.tool is not None
    return replace(HABITS, tool={name: value for name, value in HABITS.tool.items() if name in fields})


def _numbered(events: list[str]) -> str:
    numbered = []
    for number, event in enumerate(events):
        name, _, data = event.partition("\ndata: ")
        numbered.append(f"{name}\ndata: {json.dumps({**json.loads(data), 'sequence_number': number})}\n\n")
    return "".join(numbered) or 'event: none\ndata: {"type": "none", "sequence_number": 0}\n\n'
