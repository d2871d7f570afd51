"""A conversation's normal form: what clients were seen to change makes no difference, all else does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_proxy.proxy.conversation import (
    CALL,
    Hasher,
    Turn,
    looks_unique,
    reply_ids,
    reply_of,
    request_of,
    system_of,
    tools_of,
    unique_ids_in,
)

Json = dict[str, Any]


def digest(turns: list[Turn]) -> bytes:
    hasher = Hasher()
    for turn in turns:
        hasher.add(turn)
    return hasher.digest()


def of_request(wire: str, request: Json) -> bytes:
    read = request_of(wire, request)
    assert read is not None
    return digest(read.turns)


def of_chat(*messages: Json) -> bytes:
    return of_request("chat", {"messages": list(messages)})


def called(arguments: object, **more: Any) -> Json:
    function = {"name": "search", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    } | more


USER: Json = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("sent", "resent"),
    [
        (called('{"q": "x", "n": 1}', content=None), called('{"n":1,"q":"x"}')),
        (called('{"q": "x"}', content=None), called('{\n  "q": "x"\n}', content="")),
        (called('{"x": 1.0, "y": [2.0]}'), called('{"x":1,"y":[2]}')),
        (called('{"q": "ü"}'), called('{"q": "\\u00fc"}')),
        (called("{}"), called("")),
        (called("{}"), called(None)),
        (called('{"q": 1}'), called({"q": 1})),
        (called("{}", content="Let me look."), called("{}", content=None)),
        (called("{}", reasoning_content="hmm", refusal=None), called("{}", name="bot", extra={"a": 1})),
        (
            called("{}"),
            {"role": "assistant", "function_call": {"name": "search", "arguments": "{}"}},
        ),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        ({"role": "assistant", "content": ""}, {"role": "assistant"}),
        (
            {"role": "assistant", "content": "a b "},
            {"role": "assistant", "content": [{"type": "text", "text": "a b"}]},
        ),
        (
            {"role": "assistant", "content": "<think>hm</think>\n\nyes"},
            {"role": "assistant", "content": "yes"},
        ),
        ({"role": "developer", "content": "be kind"}, {"role": "system", "content": "be kind"}),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            },
            {"role": "user", "content": "a"},
        ),
        (
            {"role": "tool", "tool_call_id": "x" * 46, "content": "42", "name": "search"},
            {"role": "tool", "tool_call_id": "x" * 40, "content": [{"type": "text", "text": "42"}]},
        ),
    ],
)
def test_what_clients_change_when_they_send_a_message_again_makes_no_difference(
    sent: Json, resent: Json
) -> None:
    assert of_chat(USER, sent) == of_chat(USER, resent)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (called('{"q": "x"}'), called('{"q": "y"}')),
        (called('{"q": 1}'), called('{"q": "1"}')),
        (called('{"q": true}'), called('{"q": 1}')),
        (called("not json"), called("other")),
        (called("{}"), called("{}", tool_calls=[])),
        ({"role": "user", "content": "a"}, {"role": "user", "content": "b"}),
        ({"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}),
        ({"role": "tool", "content": "a"}, {"role": "user", "content": "a"}),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:1"}}]},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:2"}}]},
        ),
    ],
)
def test_what_was_said_makes_a_difference(one: Json, other: Json) -> None:
    assert of_chat(USER, one) != of_chat(USER, other)


def test_where_one_message_ends_makes_a_difference() -> None:
    first = of_chat({"role": "user", "content": "ab"}, {"role": "user", "content": "c"})
    assert first != of_chat({"role": "user", "content": "a"}, {"role": "user", "content": "bc"})


def test_a_reply_is_the_same_turns_as_when_it_is_sent_again_on_every_wire() -> None:
    arguments = '{"q": "x"}'
    id_ = "c" * 20 + "42"
    call = {"id": id_, "type": "function", "function": {"name": "f", "arguments": arguments}}
    chat = {"choices": [{"message": {"role": "assistant", "content": "Well", "tool_calls": [call]}}]}
    [chat_turns] = reply_of(chat)
    responses = {
        "output": [
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Well"}]},
            {"type": "function_call", "call_id": id_, "name": "f", "arguments": arguments},
        ]
    }
    [responses_turns] = reply_of(responses)
    messages = {
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "text", "text": "Well"},
            {"type": "tool_use", "id": id_, "name": "f", "input": {"q": "x"}},
        ]
    }
    [messages_turns] = reply_of(messages)
    expected = Turn(CALL, 'f\n{"q":"x"}', id_, "Well")
    assert chat_turns == responses_turns == messages_turns == [expected]


def test_a_responses_conversation_is_known_again_without_ids_status_and_reasoning() -> None:
    asked = {"role": "user", "content": [{"type": "input_text", "text": "go"}]}
    output = [
        {"type": "reasoning", "id": "rs_1", "summary": [], "status": None},
        {"type": "function_call", "id": "fc_1", "call_id": "call_a", "name": "f", "arguments": '{"a": 1}',
         "status": "completed"},
    ]  # fmt: skip
    again = [
        {"type": "message", **asked},
        {"type": "function_call", "call_id": "call_b", "name": "f", "arguments": '{"a":1}'},
    ]
    first = request_of("responses", {"instructions": "sys", "input": "go"})
    assert first is not None
    [reply] = reply_of({"output": output})
    second = of_request("responses", {"instructions": "sys", "input": again})
    assert digest([*first.turns, *reply]) == second
    in_list = of_request("responses", {"input": [{"role": "system", "content": "sys"}, *again]})
    assert in_list == second


def test_a_responses_request_that_only_refers_to_its_history_is_not_whole() -> None:
    known = "resp_0123456789abcdef0123"
    linked = request_of("responses", {"input": "go", "previous_response_id": known})
    assert linked is not None
    assert (linked.whole, linked.ids) == (False, (known,))
    item = "msg_0123456789abcdef0123"
    referred = request_of("responses", {"input": [{"type": "item_reference", "id": item}]})
    assert referred is not None
    assert (referred.whole, referred.ids) == (False, (item,))


def test_tools_of_the_server_are_turns_of_the_conversation() -> None:
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"query": "x"}}
    [turns] = reply_of({"output": [search]})
    [again] = reply_of({"output": [{**search, "id": "ws_2", "status": None}]})
    [other] = reply_of({"output": [{**search, "action": {"query": "y"}}]})
    assert [turn.kind for turn in turns] == [CALL]
    assert digest(turns) == digest(again) != digest(other)


def test_a_messages_conversation_is_known_again_when_cache_control_moves_and_thinking_goes() -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    request = {
        "system": [{"type": "text", "text": "sys", **cached}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "go", **cached}]}],
    }
    answer = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"b": 1, "a": 2.0}}
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    [reply] = reply_of({"content": [thought, {"type": "text", "text": "Well"}, answer]})
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "42"}]}
    first = request_of("messages", request)
    again = request_of(
        "messages",
        {
            "system": "sys",
            "messages": [
                {"role": "user", "content": "go"},
                {"role": "assistant", "content": [{**answer, "input": {"a": 2, "b": 1}}]},
                {"role": "user", "content": [{**result, **cached}, {"type": "text", "text": "and now?"}]},
            ],
        },
    )
    assert first is not None
    assert again is not None
    assert digest([*first.turns, *reply]) == digest(again.turns[:3])
    assert [turn.text for turn in again.turns[3:]] == ["42", "and now?"]
    assert again.turns[3].id == "toolu_1"


@pytest.mark.parametrize(
    "id_",
    [
        "chatcmpl-tool-7f9a3d5c1e8b4f60a2c4e6f8091b3d5f",
        "call_jUO9cZQ3nOqRtVBxG1sDfKpL",
        "toolu_01A09q90qw90lq917835lq9",
        "VvvODy9mT",
        "550e8400-e29b-41d4-a716-446655440000",
        "resp_68f0c1a2b3d44e5f",
    ],
)
def test_an_id_drawn_at_random_names_one_thing(id_: str) -> None:
    assert looks_unique(id_)


@pytest.mark.parametrize(
    "id_",
    ["", "call_0", "functions.search:0", "functions.get_the_weather_information:12", "tool-1", "functions",
     "call_00000000000000000001", "search_documents_for_the_user"],
)  # fmt: skip
def test_an_id_that_is_counted_names_nobody(id_: str) -> None:
    assert not looks_unique(id_)


def test_ids_are_found_in_text_the_last_one_first() -> None:
    first, last = "call_jUO9cZQ3nOqRtVBxG1sDfKpL", "call_aB1cD2eF3gH4iJ5kL6"
    text = f"Calling tools:\n[{{'id': '{first}'}}, {{'id': 'call_0'}}, {{'id': '{last}'}}]"
    assert list(unique_ids_in(text)) == [last, first]


def test_an_answer_is_referred_to_by_its_own_id_and_its_items() -> None:
    ids = ["resp_0123456789abcdef", "msg_0123456789abcdefa", "fc_0123456789abcdefab"]
    answer = {"id": ids[0], "output": [{"id": ids[1]}, {"id": ids[2]}, {"id": "fc_1"}, {}]}
    assert reply_ids(answer) == ids
    assert reply_ids({"choices": []}) == []


@pytest.mark.parametrize(
    ("wire", "request_"),
    [
        (
            "chat",
            {"messages": [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, USER]},
        ),
        ("responses", {"instructions": "a", "input": [{"role": "developer", "content": "b"}, USER]}),
        (
            "messages",
            {"system": [{"type": "text", "text": "a\n"}, {"type": "text", "text": "b"}], "messages": [USER]},
        ),
        (
            "messages",
            {
                "system": [
                    {"type": "text", "text": "x-anthropic-billing-header: cch=ab;"},
                    {"type": "text", "text": "a\nb"},
                ],
                "messages": [USER],
            },
        ),
    ],
)
def test_the_system_prompt_is_found_on_every_wire(wire: str, request_: Json) -> None:
    assert system_of(wire, request_) == "a\nb"
    assert system_of(wire, {}) == ""


def test_tools_are_named_on_every_wire() -> None:
    chat = {
        "tools": [
            {"type": "function", "function": {"name": "b"}},
            {"type": "function", "function": {"name": "a"}},
        ]
    }
    assert (
        tools_of(chat)
        == tools_of({"tools": [{"type": "function", "name": "a"}, {"name": "b"}]})
        == ("a", "b")
    )
    assert tools_of({"functions": [{"name": "f"}]}) == ("f",)
    assert tools_of({"tools": [{"type": "web_search"}]}) == ("web_search",)
    assert tools_of({"tools": "none"}) == ()


def test_equal_arguments_stay_equal_through_any_client_that_reads_and_writes_json() -> None:
    arguments = {"text": 'ä \u2028 \\ "', "deep": [{"b": [1, 2.5, None, True], "a": -0.25}], "n": 10**14}
    spelt = [
        json.dumps(arguments),
        json.dumps(arguments, ensure_ascii=False, indent=2),
        json.dumps(arguments, sort_keys=True),
    ]
    assert len({of_chat(called(text)) for text in spelt}) == 1
