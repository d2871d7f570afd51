"""The messages of all four APIs, of real calls through the proxy."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from lightning_proxy.exchange.messages import Exchange, Message, exchange_of, same_turn
from lightning_proxy.store import Span
from tests.conftest import ProxyThread
from tests.engine import Script
from tests.proxy.raw_http import JSON, recorded, send
from tests.store.support import make_span

Json = dict[str, Any]

SCHEMA: Json = {"type": "object", "properties": {"q": {"type": "string"}}}
FUNCTION: Json = {"name": "sql", "description": "Ask.", "parameters": SCHEMA}
ARGUMENTS = '{"q": "é"}'
# Each API's way of saying the same: a system prompt, a question, a call, its result.
BODIES: dict[str, tuple[str, Json]] = {
    "chat": (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "You help."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "How many"}, {"type": "text", "text": "?"}],
                },
                {
                    "role": "assistant",
                    "content": "Let me see.",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "sql", "arguments": ARGUMENTS}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "42"},
            ],
            "tools": [{"type": "function", "function": FUNCTION}],
        },
    ),
    "responses": (
        "/v1/responses",
        {
            "instructions": "You help.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "How many?"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
                {
                    "type": "message",
                    "role": "assistant",
                    "id": "m1",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
                },
                {"type": "function_call", "call_id": "c1", "name": "sql", "arguments": ARGUMENTS},
                {"type": "function_call_output", "call_id": "c1", "output": "42"},
            ],
            "tools": [{"type": "function", **FUNCTION}],
        },
    ),
    "messages": (
        "/v1/messages",
        {
            "max_tokens": 1000,
            "system": [{"type": "text", "text": "You help."}],
            "messages": [
                {"role": "user", "content": "How many?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "Let me see."},
                        {"type": "tool_use", "id": "c1", "name": "sql", "input": {"q": "é"}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "42"}]},
            ],
            "tools": [{"name": "sql", "description": "Ask.", "input_schema": SCHEMA}],
        },
    ),
}


def call(proxy: ProxyThread, wire: str, script: Script, **more: Any) -> Span:
    path, body = BODIES[wire]
    answer = send(proxy.url, path, {"model": "policy", **body, **more}, [*JSON, *script.to_header().items()])
    assert answer.status == 200, answer.body
    return recorded(proxy)[0]


def check(said: Exchange) -> None:
    roles = [message.role for message in said.messages]
    assert roles == ["system", "user", "assistant", "tool"]
    assert [m.content for m in said.messages] == ["You help.", "How many?", "Let me see.", "42"]
    [used] = said.messages[2].tool_calls
    assert (used.id, used.name, json.loads(used.arguments)) == ("c1", "sql", {"q": "é"})
    assert said.messages[3].tool_call_id == "c1"
    [tool] = said.tools
    assert (tool.type, tool.name, tool.description) == ("function", "sql", "Ask.")
    assert json.loads(tool.parameters or "") == SCHEMA


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wire", BODIES)
def test_the_same_call_on_each_api_is_the_same(proxy: ProxyThread, wire: str, stream: bool) -> None:
    said = exchange_of(call(proxy, wire, Script(text="It is 42."), stream=stream))
    check(said)
    [reply] = said.replies
    assert reply.message == Message("assistant", "It is 42.")
    assert reply.finish_reason in ("stop", "completed", "end_turn")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wire", BODIES)
def test_tool_calls_of_replies(proxy: ProxyThread, wire: str, stream: bool) -> None:
    script = Script(tool_calls=(("sql", ARGUMENTS), ("sql", "{}")))
    [reply] = exchange_of(call(proxy, wire, script, stream=stream)).replies
    assert reply.message.content == ""
    assert [c.name for c in reply.message.tool_calls] == ["sql", "sql"]
    assert [json.loads(c.arguments) for c in reply.message.tool_calls] == [{"q": "é"}, {}]
    assert all(c.id for c in reply.message.tool_calls)


def test_completions(proxy: ProxyThread) -> None:
    send(proxy.url, "/v1/completions", {"model": "policy", "prompt": "once", "n": 2})
    said = exchange_of(recorded(proxy)[0])
    assert said.messages == (Message("user", "once"),)
    assert len(said.replies) == 2
    assert all(reply.message.content for reply in said.replies)


def test_what_is_no_text_is_kept_as_it_is() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, image]}]}
    [message] = exchange_of(make_span(request=json.dumps(body).encode())).messages
    assert message.content == "see"
    assert json.loads(message.parts or "") == [image]


def test_several_tool_results_in_one_message_are_several_messages() -> None:
    results = [{"type": "tool_result", "tool_use_id": f"c{n}", "content": str(n)} for n in range(3)]
    body = {"messages": [{"role": "user", "content": [*results, {"type": "text", "text": "and?"}]}]}
    said = exchange_of(make_span(wire="messages", request=json.dumps(body).encode())).messages
    assert [(m.role, m.content, m.tool_call_id) for m in said] == [
        ("tool", "0", "c0"), ("tool", "1", "c1"), ("tool", "2", "c2"), ("user", "and?", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "body", [b"", b"no json", b"[1]", b'{"messages": 7}', b'{"messages": [7]}', b'{"input": {"a": 1}}']
)
@pytest.mark.parametrize("wire", ["chat", "completions", "responses", "messages", "another"])
def test_a_body_of_an_odd_shape_has_no_messages(wire: str, body: bytes) -> None:
    said = exchange_of(replace(make_span(wire=wire), request=body, response=body))
    assert (said.messages, said.replies) == ((), ())


def test_a_turn_stays_the_same_however_it_is_sent_again() -> None:
    def turn(arguments: str, **changes: Any) -> object:
        function = {"name": "sql", "arguments": arguments}
        message = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a", "function": function}],
            **changes,
        }
        body = {"messages": [message]}
        return same_turn(exchange_of(make_span(request=json.dumps(body).encode())).messages[0])

    first = turn('{"a": 1, "b": 2}', content="Let me see.", reasoning="hm")
    assert first == turn('{"b":2,"a":1}') == turn('{"b":2,"a":1}', content="")
    assert first != turn('{"a": 1}')
