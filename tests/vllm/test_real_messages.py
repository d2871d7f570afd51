"""Anthropic Messages through us and straight at real vLLM: the same answers, and exact spans."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any

import pytest

from lightning_proxy.store import Fidelity, Span
from tests.vllm.conftest import MODEL, TRIES, Served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

Json = dict[str, Any]
MESSAGES = "/v1/messages"
SQL: Json = {
    "name": "sql",
    "description": "Run a query.",
    "input_schema": {
        "type": "object",
        "properties": {"query": {"type": "string"}},
        "required": ["query"],
    },
}
ASK: Json = {"role": "user", "content": "What is the highest price?"}
SYSTEM: Json = {"system": "items(price, stock)"}
TURNS: list[Json] = [
    ASK,
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "toolu_1", "name": "sql", "input": {"query": "SELECT 'é'", "n": 1e3}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "7"}]},
            {"type": "text", "text": "and now?", "cache_control": {"type": "ephemeral"}},
        ],
    },
]
BLOCKS: list[Json] = [
    {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=0;"},
    {"type": "text", "text": "items", "cache_control": {"type": "ephemeral"}},
    {"type": "text", "text": "(price, stock)"},
]

# What is translated: each is an exact span.
EXACT: list[Json] = [
    {},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is the lowest price?"}]}]},
    {"messages": [ASK, {"role": "assistant", "content": "7"}, {"role": "user", "content": "and stock?"}]},
    {"messages": [ASK, {"role": "assistant", "content": "The highest"}]},
    SYSTEM,
    {"system": BLOCKS},
    {"tools": [SQL], **SYSTEM},
    {"tools": [SQL], **SYSTEM, "max_tokens": 200},
    {"tools": [SQL, {**SQL, "name": "finish", "input_schema": {}}], "tool_choice": {"type": "auto"}},
    {"tools": [SQL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, **SYSTEM},
    {"tools": [SQL], "tool_choice": {"type": "none"}, **SYSTEM},
    {"tools": [SQL], "tool_choice": {"type": "any"}, **SYSTEM, "max_tokens": 200},
    {"tools": [SQL], "tool_choice": {"type": "tool", "name": "sql"}, **SYSTEM, "max_tokens": 200},
    {"tools": [SQL], "messages": TURNS, **SYSTEM},
    {"messages": TURNS, **SYSTEM},
    {"messages": [ASK, {"role": "system", "content": "be brief"}, ASK]},
    {"messages": [ASK, {"role": "system", "content": BLOCKS}], "tools": [SQL], **SYSTEM},
    {"stop_sequences": ["e"]},
    {"stop_sequences": ["e", "a", "never said"], "tools": [SQL]},
    {"stop_sequences": ["never said"]},
    {"max_tokens": 3},
    {"max_tokens": 1},
    {"temperature": 0.0, "top_p": 1.0, "top_k": 5},
    {"metadata": {"user_id": "u"}, "context_management": {"edits": []}, "service_tier": "auto"},
    {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
    {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
    {"chat_template_kwargs": {"enable_thinking": False}},
]
# What goes to the engine's own Messages API.
NATIVE: list[Json] = [
    {"thinking": {"type": "disabled"}},
    {"unheard_of": 1},
    {"tool_choice": {"type": "any"}},
    {"tools": []},
    {"temperature": "0"},
    {"tools": [SQL], "tool_choice": {"type": "auto"}, "stream": None, "vllm_xargs": {"a": 1}},
]
LONG = {"role": "user", "content": "price " * 3000}
REFUSED: list[Json] = [
    {"max_tokens": None},
    {"max_tokens": 0},
    {"max_tokens": "many"},
    {"max_tokens": 99_999},
    {"model": None},
    {"model": ""},
    {"model": "nobody"},
    {"messages": None},
    {"messages": []},
    {"messages": "no list"},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
    {"messages": [LONG]},
    {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]},
    {"temperature": -1},
    {"top_p": 2},
    {"top_k": -5},
    {"stop_sequences": ["a", "b", "c", "d", "e"]},
    {"stop_sequences": [""]},
    {"stop_sequences": "e"},
    {"thinking": {"type": "enabled", "budget_tokens": 5}},
    {"thinking": {"type": "enabled", "budget_tokens": 2000}},
    {"tools": [{"name": "web_search", "type": "web_search_20250305"}]},
    {"tools": [SQL, {"name": "undescribed", "input_schema": {}}], **SYSTEM},
    {"tools": [SQL], "tool_choice": {"type": "tool", "name": "other"}},
    {"tools": [SQL], "tool_choice": {"type": "tool"}},
]


def request_of(fields: Json, stream: bool) -> Json:
    body = {"model": MODEL, "messages": [ASK], "max_tokens": 40, "temperature": 0, "stream": stream, **fields}
    return {name: value for name, value in body.items() if value is not None or name not in fields}


def post(url: str, body: bytes, content_type: str = "application/json") -> tuple[int, dict[str, str], str]:
    headers = {"Content-Type": content_type, "anthropic-version": "2023-06-01", "x-api-key": "sk-ant-1"}
    request = urllib.request.Request(url, body, headers)
    try:
        answer = urllib.request.urlopen(request, timeout=120)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        kept = {name.lower(): value for name, value in answer.headers.items()}
        return answer.status, {k: v for k, v in kept.items() if k != "date"}, answer.read().decode()


def comparable(text: str) -> Any:
    """An answer without what chance decides: ids drawn, and how many tokens share an event."""
    text = re.sub(r"chatcmpl-[0-9a-f-]{16,}", "chatcmpl-drawn", text)
    text = re.sub(r"(chatcmpl-tool-|call_)[0-9a-zA-Z]{8,}", r"\1drawn", text)
    if not text.startswith("event:"):
        return text
    events: list[tuple[str, Any]] = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = re.fullmatch(r"event: (.*)\ndata: (.*)", block).groups()  # type: ignore[union-attr]
        event = json.loads(data)
        assert event["type"] == name
        delta = event.get("delta", {})
        grows = {"text_delta": "text", "input_json_delta": "partial_json"}.get(delta.get("type"))
        last = events[-1][1] if events else {}
        if grows and last.get("delta", {}).get("type") == delta["type"] and last["index"] == event["index"]:
            last["delta"][grows] += delta[grows]
        else:
            # The order of fields is part of what is compared, but for the deltas that are joined.
            events.append((data if not grows else name, event))
    return events


def both(served: Served, body: bytes, rollout: str, **more: str) -> tuple[tuple[int, str], Span]:
    """The answer through us, compared with vLLM's own, and its span."""
    own: list[tuple[int, Any]] = []
    for _ in range(TRIES if b'"stream": true' in body else 1):
        status, headers, text = post(served.engine_url + MESSAGES, body, **more)
        own.append((status, comparable(text)))
        through = post(f"{served.url}/rollout/{rollout}{MESSAGES}?beta=true", body, **more)
        said = (through[0], comparable(through[2]))
        if said in own:
            break
    assert said == next((one for one in own if one == said), own[-1])
    skip = {"content-length", "transfer-encoding"}
    assert {k: v for k, v in through[1].items() if k not in skip} == {
        k: v for k, v in headers.items() if k not in skip
    }
    with served.store() as store:
        span = store.list_spans(rollout_id=rollout)[0]
    assert (span.wire, span.request, span.status) == ("messages", body, status)
    return (through[0], through[2]), span


def short(fields: Json) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", json.dumps(fields).lower())[:50]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", EXACT, ids=short)
def test_an_agent_gets_vllms_own_message_and_its_tokens_are_on_record(
    served: Served, fields: Json, stream: bool
) -> None:
    request = request_of(fields, stream)
    rollout = f"m-{EXACT.index(fields)}-{stream}"
    (status, text), span = both(served, json.dumps(request).encode(), rollout)
    assert status == 200, text
    assert (span.error_class, span.fidelity) == (None, Fidelity.EXACT)
    (generation,) = span.generations
    # The prompt is the one that the engine counts for the agent's own request.
    counted = {
        k: v for k, v in request.items() if k in ("model", "messages", "system", "tools", "tool_choice")
    }
    counted |= {k: v for k, v in request.items() if k == "chat_template_kwargs"}
    count = json.loads(post(served.engine_url + MESSAGES + "/count_tokens", json.dumps(counted).encode())[2])
    assert len(generation.prompt_token_ids) == count["input_tokens"]
    check_message(served, span, text)
    if fields.get("tool_choice", {}).get("type") not in ("any", "tool") and "output_config" not in fields:
        check_logprobs(served, span)


def check_message(served: Served, span: Span, text: str) -> None:
    """What is on record is what the agent got, and is what the tokens say."""
    message = json.loads(span.response or b"")
    (generation,) = span.generations
    assert f'"{span.response_id}"' in text
    assert span.usage == message["usage"]
    assert message["usage"] == {
        "input_tokens": len(generation.prompt_token_ids),
        "output_tokens": len(generation.response_token_ids),
    }
    tokens = {"model": MODEL, "tokens": generation.response_token_ids.tolist()}
    said = json.loads(post(f"{served.engine_url}/detokenize", json.dumps(tokens).encode())[2])["prompt"]
    for block in message["content"]:
        if block["type"] == "text":
            assert block["text"] in said
        else:
            assert block["name"] in said
            for value in block["input"].values():
                assert str(value) in said or json.dumps(value)[1:-1] in said


def check_logprobs(served: Served, span: Span) -> None:
    """Logprobs are those that the engine itself gives to these tokens after that prompt."""
    (generation,) = span.generations
    prompt, response = generation.prompt_token_ids.tolist(), generation.response_token_ids.tolist()
    body = {"model": MODEL, "prompt": prompt + response, "max_tokens": 1, "prompt_logprobs": 0}
    answer = json.loads(post(f"{served.engine_url}/v1/completions", json.dumps(body).encode())[2])
    entries = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
    expected = [entry[str(token)]["logprob"] for entry, token in zip(entries, response, strict=True)]
    assert generation.logprobs.tolist() == pytest.approx(expected, abs=1e-3)


def test_the_prompt_is_the_one_of_the_chat_template(served: Served) -> None:
    body = request_of({"messages": TURNS, "tools": [SQL], "system": BLOCKS}, False)
    _, span = both(served, json.dumps(body).encode(), "template")
    arguments = json.dumps({"query": "SELECT 'é'", "n": 1000.0})
    function = {"name": "sql", "arguments": arguments}
    chat = [
        {"role": "system", "content": "items(price, stock)"},
        ASK,
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [{"id": "toolu_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "7"},
        {"role": "user", "content": "and now?"},
    ]
    tool = {"name": SQL["name"], "description": SQL["description"], "parameters": SQL["input_schema"]}
    asked = {"model": MODEL, "messages": chat, "tools": [{"type": "function", "function": tool}]}
    tokenized = json.loads(post(f"{served.engine_url}/tokenize", json.dumps(asked).encode())[2])
    assert span.generations[0].prompt_token_ids.tolist() == tokenized["tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", NATIVE, ids=short)
def test_what_is_not_translated_is_vllms_own_answer_on_record_as_text(
    served: Served, fields: Json, stream: bool
) -> None:
    body = json.dumps(request_of({"stream": stream, **fields}, stream)).encode()
    (status, text), span = both(served, body, f"n-{NATIVE.index(fields)}-{stream}")
    assert (status, span.error_class, span.fidelity) == (200, None, Fidelity.TEXT), text
    assert f'"{span.response_id}"' in text
    assert span.usage == json.loads(span.response or b"")["usage"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", REFUSED, ids=short)
def test_a_refusal_is_vllms_own_word_for_word(served: Served, fields: Json, stream: bool) -> None:
    body = json.dumps(request_of(fields, stream)).encode()
    (status, _), span = both(served, body, f"r-{REFUSED.index(fields)}-{stream}")
    assert status >= 400
    assert span.error_class in ("upstream_refused", "upstream_error", "context_overflow")


def test_an_error_inside_a_stream_is_the_same_event_and_says_what_the_engine_said(served: Served) -> None:
    # The one known difference. vLLM fails to read its own error event and sends its parser's complaint
    # about that; we send the error that it is about.
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1200}
    body = json.dumps(request_of(thinking, True)).encode()
    why = json.loads(post(served.engine_url + MESSAGES, body.replace(b"true", b"false"))[2])["error"]
    (straight,) = comparable(post(served.engine_url + MESSAGES, body)[2])
    (through,) = comparable(post(f"{served.url}/rollout/error{MESSAGES}", body)[2])
    assert "validation errors" in straight[1]["error"].pop("message")
    assert through[1]["error"].pop("message") == why["message"]
    assert through[1] == straight[1]
    with served.store() as store:
        (span,) = store.list_spans(rollout_id="error")
    assert span.error_class == "engine_error"


GOOD = json.dumps(request_of({}, False)).encode()


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (GOOD[:-3], "application/json"),
        (b"[]", "application/json"),
        (b"", "application/json"),
        (GOOD, "text/plain"),
        (GOOD.replace(b'"temperature": 0', b'"temperature": NaN'), "application/json"),
    ],
)
def test_what_is_no_request_at_all_is_refused_as_by_vllm(
    served: Served, body: bytes, content_type: str
) -> None:
    both(served, body, f"b-{abs(hash(body + content_type.encode()))}", content_type=content_type)


def test_an_agent_counts_its_tokens_and_probes_as_without_us(served: Served) -> None:
    body = json.dumps({"model": MODEL, "messages": TURNS, **SYSTEM}).encode()
    target = f"{MESSAGES}/count_tokens?beta=true"
    assert post(served.url + target, body) == post(served.engine_url + target, body)
    refused = json.dumps({"model": "nobody", "messages": TURNS}).encode()
    assert post(served.url + target, refused) == post(served.engine_url + target, refused)
