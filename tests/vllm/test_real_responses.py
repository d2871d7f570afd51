"""Responses on real vLLM: what an agent gets through us is what vLLM gives, and every span is exact."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI

from lightning_proxy.store import Fidelity, Span
from tests.responses_compare import comparable
from tests.vllm.compare import Close, post
from tests.vllm.conftest import MODEL, TRIES, Served
from tests.vllm.test_real_engine import spans_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PATH = "/v1/responses"
TOOL: Any = {
    "type": "function",
    "name": "sql",
    "description": "Run a query.",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
}
TASK: dict[str, Any] = {"instructions": "items(price, stock)", "input": "What is the highest price?"}
TOOLS: dict[str, Any] = {**TASK, "tools": [TOOL]}
NAMED: dict[str, Any] = {"tool_choice": {"type": "function", "name": "sql"}}
SPACE: dict[str, Any] = {"type": "namespace", "name": "db", "description": "A database.", "tools": [
    {**TOOL, "strict": False}, {"type": "custom", "name": "raw"}]}  # fmt: skip
SEARCH: dict[str, Any] = {"type": "web_search", "external_web_access": True}
MIXED: dict[str, Any] = {**TASK, "tools": [{**TOOL, "strict": False}, SPACE, SEARCH]}
# Codex adds this to every item.
PASSED: dict[str, Any] = {"internal_chat_message_metadata_passthrough": {"turn_id": "1"}}
SERVED_BY_OPENAI: list[dict[str, Any]] = [
    {"type": "apply_patch"},
    {"type": "custom", "name": "x", "format": {"type": "text"}},
    {"type": "file_search", "vector_store_ids": ["x"]},
    {"type": "image_generation"},
    {"type": "local_shell"},
    {"type": "shell"},
    {"type": "tool_search"},
]
USER: dict[str, Any] = {"role": "user", "content": "What is the highest price?"}
CALL: dict[str, Any] = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call_1",
    "name": "sql",
    "arguments": '{"query": "SELECT MAX(price) FROM items"}',
    "status": "completed",
}
OUTPUT: dict[str, Any] = {"type": "function_call_output", "call_id": "call_1", "output": "33"}
SAID: dict[str, Any] = {
    "type": "message",
    "role": "assistant",
    "id": "msg_1",
    "status": "completed",
    "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
}
THOUGHT: dict[str, Any] = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "Hm."}],
}
JSON_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "name": "a",
    "schema": {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
}
EVERYTHING: dict[str, Any] = {
    **TOOLS,
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "top_logprobs": 2,
    "metadata": {"a": "b"},
    "user": "u",
    "store": False,
    "service_tier": "flex",
    "parallel_tool_calls": False,
    "max_tool_calls": 3,
    "prompt_cache_key": "k",
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "top_p": 0.5,
    "top_k": 3,
    "seed": 4,
}

# What generates. Each is sent streamed and not.
ANSWERED: dict[str, dict[str, Any]] = {
    "text": {"input": "hello"},
    "instructions": TASK,
    "cut text": {"input": "hello", "max_output_tokens": 2},
    "stop": {"input": "x " * 40, "stop": ["11111"], "max_output_tokens": 20},
    "nothing said": {"input": "hello", "stop": ["3"]},
    "conversation": {"input": [USER, {"role": "assistant", "content": "33"}, USER]},
    "items": {"input": [{**USER, "type": "message"}, SAID, {"role": "user", "content": [
        {"type": "input_text", "text": "And "}, {"type": "input_text", "text": "now?"}]}]},
    "asked for logprobs": {"input": "hello", "include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "asked for messages": {"input": "hello", "enable_response_messages": True},
    "lonely top_logprobs": {"input": "hello", "top_logprobs": 3},
    "structured": {"input": "hello", "text": {"format": JSON_FORMAT}},
    "tool called": TOOLS,
    "tool called, small temperature": {**TOOLS, "temperature": 0.001, "seed": 1},
    "tool called, no limit": {**TOOLS, "max_output_tokens": None},
    "tool call cut": {**TOOLS, "max_output_tokens": 9},
    "tool call cut at its name": {**TOOLS, "max_output_tokens": 1},
    "tool call stopped": {**TOOLS, "stop": ["price"]},
    "tool call stopped early": {**TOOLS, "stop": "name"},
    "tool not called": {"input": "hello", "tools": [TOOL]},
    "tool forbidden": {**TOOLS, "tool_choice": "none"},
    "tool required": {**TOOLS, "tool_choice": "required"},
    "tool required, text": {**TOOLS, "tool_choice": "required", "text": {"format": {"type": "text"}}},
    "tool named": {**TOOLS, **NAMED},
    "tool strict": {**TASK, "tools": [{**TOOL, "strict": True}]},
    "two tools": {**TASK, "tools": [TOOL, {**TOOL, "name": "other", "parameters": None}]},
    "tool answered": {**TOOLS, "input": [USER, CALL, OUTPUT]},
    "tools answered": {**TOOLS, "input": [USER, SAID, CALL, {**CALL, "call_id": "call_2"}, OUTPUT,
                                          {**OUTPUT, "call_id": "call_2"}]},
    "thought, said, called": {**TOOLS, "input": [USER, THOUGHT, SAID, CALL, OUTPUT]},
    "called, then said": {**TOOLS, "input": [USER, CALL, SAID, OUTPUT, USER]},
    "said again and again": {**TOOLS, "input": [USER, SAID, {"role": "assistant", "content": "x"}, USER]},
    "tool answered in parts": {**TOOLS, "input": [
        {**USER, "content": [{"type": "input_text", "text": "How many?"}]}, CALL,
        {**OUTPUT, "output": [{"type": "input_text", "text": "3"}, {"type": "input_text", "text": "4"}]}]},
    "developer": {**TOOLS, "input": [{"role": "developer", "content": "Be brief."}, USER]},
    "everything": EVERYTHING,
    "built-in tool": {"input": "hello", "tools": [{"type": "web_search"}]},
    "built-in tool and ours": {**TASK, "tools": [TOOL, {"type": "web_search"}]},
    "built-in tool that a server may run": {**TASK, "tools": [TOOL, {"type": "web_search_preview"}]},
    "mixed tools": MIXED,
    "mixed tools, none of them plain": {**MIXED, "tools": [SEARCH, SPACE]},
    "mixed tools, forbidden": {**MIXED, "tool_choice": "none"},
    "mixed tools, forced": {**MIXED, "tool_choice": "required"},
    "mixed tools of all kinds": {**MIXED, "tools": [TOOL, *SERVED_BY_OPENAI]},
    "mixed tools answered": {**MIXED, "input": [
        {**USER, "type": "message", "id": "msg_0", **PASSED}, {**CALL, "namespace": "db", **PASSED},
        {**OUTPUT, "id": "fco_1", **PASSED}, {**SAID, **PASSED}, {**USER, **PASSED}]},
    "broken arguments": {**TOOLS, "input": [USER, {**CALL, "arguments": "{"}, OUTPUT]},
    "an odd schema": {"input": "x", "tools": [{**TOOL, "parameters": {"type": "nonsense"}}],
                      "tool_choice": "required"},
    "unheard of": {**TOOLS, "unheard_of": {"by": "vLLM"}},
}  # fmt: skip

REFUSED: dict[str, dict[str, Any]] = {
    "no input": {},
    "input of a wrong type": {"input": 3, "tools": [TOOL]},
    "an item of no type": {"input": [{"type": "nothing"}], "tools": [TOOL]},
    "unknown model": {"input": "x", "model": "nobody"},
    "unknown model with tools": {**TOOLS, "model": "nobody"},
    "too long": {"input": "x " * 5000},
    "too long with tools": {**TOOLS, "input": "x " * 5000},
    "too many tokens": {**TOOLS, "max_output_tokens": 5000},
    "no tokens": {**TOOLS, "max_output_tokens": 0},
    "tools without a name": {"input": "x", "tools": [{"type": "function"}]},
    "a forced tool without tools": {"input": "x", "tool_choice": "required"},
    "an unknown tool forced": {**TOOLS, "tool_choice": {"type": "function", "name": "nope"}},
    "an unknown choice": {**TOOLS, "tool_choice": "maybe"},
    "no such response": {**TOOLS, "previous_response_id": "resp_1"},
    "in the background": {**TOOLS, "background": True},
    "a cold temperature": {**TOOLS, "temperature": -1},
    "a strange seed": {**TOOLS, "seed": "x"},
    "a foreign format": {**TOOLS, "text": {"format": {"type": "nothing"}}},
    "a prompt": {**TOOLS, "prompt": {"id": "x"}},
}  # fmt: skip


def asked(case: dict[str, Any], stream: bool) -> dict[str, Any]:
    body = {"model": MODEL, "temperature": 0, "max_output_tokens": 40, **case, "stream": stream}
    return {key: value for key, value in body.items() if value is not None}


def both(served: Served, body: dict[str, Any], prefix: str = "") -> tuple[Any, Any]:
    direct = post(served.engine_url + PATH, body)
    through_us = post(f"{served.url}{prefix}{PATH}", body)
    assert through_us[0] == direct[0]
    skip = {"content-length"} if "logprobs" in json.dumps(body) else set()
    assert {k: v for k, v in through_us[1].items() if k not in skip} == {
        k: v for k, v in direct[1].items() if k not in skip
    }
    return comparable(direct[2], Close), comparable(through_us[2], Close)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", ANSWERED)
def test_an_agent_gets_what_vllm_itself_would_have_answered(served: Served, name: str, stream: bool) -> None:
    directs: list[Any] = []
    for tries in range(TRIES if stream else 1):
        rollout = f"responses-{name}-{stream}-{tries}".replace(" ", "-").replace(",", "")
        direct, through_us = both(served, asked(ANSWERED[name], stream), f"/rollout/{rollout}")
        directs.append(direct)
        if through_us in directs:
            break
    assert through_us == next((one for one in directs if one == through_us), direct)
    (span,) = spans_of(served, rollout)
    assert span.error_class is None, span.error
    if name in ("built-in tool that a server may run", "mixed tools, forced"):
        assert span.fidelity is Fidelity.TEXT  # as it is, and a tool call has no place for logprobs
        assert len(span.generations[0].response_token_ids) > 0
    elif name in ("unheard of", "nothing said"):
        assert span.fidelity is Fidelity.TEXT
    else:
        assert span.fidelity is Fidelity.EXACT
        matches_the_engine(served, span)


def matches_the_engine(served: Served, span: Span) -> None:
    """Ids are those that the engine itself reads and writes, logprobs those of its own recount."""
    (generation,) = span.generations
    request = json.loads(span.request)
    told = {key: value for key, value in request.items() if key not in ("stream", "stop")}
    told |= {"enable_response_messages": True, "max_output_tokens": 1}
    native = json.loads(post(served.engine_url + PATH, told)[2])
    prompt = generation.prompt_token_ids.tolist()
    assert prompt == native["input_messages"][0]["tokens"]
    response = generation.response_token_ids.tolist()
    assert len(response) == len(generation.logprobs) > 0
    if span.usage is not None:
        assert (span.usage["input_tokens"], span.usage["output_tokens"]) == (len(prompt), len(response))
    free = request.get("tool_choice", "auto") in ("auto", "none") and "text" not in request
    if not free or any(tool.get("strict") for tool in request.get("tools", ())):
        return  # under a grammar, what was sampled from is not what the model itself thinks
    recount = {"model": MODEL, "prompt": prompt + response, "max_tokens": 1, "prompt_logprobs": 0}
    entries = json.loads(post(f"{served.engine_url}/v1/completions", recount)[2])["choices"][0][
        "prompt_logprobs"
    ]
    expected = [
        entry[str(token)]["logprob"] for entry, token in zip(entries[len(prompt) :], response, strict=True)
    ]
    assert generation.logprobs.tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_whatever_a_wild_model_makes_of_a_tool_call_arrives_as_vllm_tells_it(
    served: Served, temperature: float
) -> None:
    """Half calls, calls that are no JSON, text around them: vLLM's last word on a stream is a new parse.

    What the deltas of a broken call say depends on how many tokens share a chunk, so that only
    their number and kind are compared.
    """
    kinds = set()
    for seed in range(40):
        tools = MIXED if seed % 3 == 2 else TOOLS
        body = asked({**tools, "temperature": temperature, "seed": seed, "max_output_tokens": 24}, True)
        body["input"] = [USER, CALL, OUTPUT] if seed % 4 == 3 else TASK["input"]
        direct, through_us = both(served, body, f"/rollout/responses-wild-{temperature}")
        assert through_us[0] == direct[0], seed
        assert through_us[1][-1] == direct[1][-1], seed
        kinds.add(tuple(item["type"] for item in direct[1][-1]["response"]["output"]))
    assert {("message",), ("function_call",)} & kinds
    spans = spans_of(served, f"responses-wild-{temperature}")
    assert {span.fidelity for span in spans} == {Fidelity.EXACT}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", REFUSED)
def test_an_agents_mistakes_are_told_in_vllms_own_words(served: Served, name: str, stream: bool) -> None:
    direct, through_us = both(served, asked(REFUSED[name], stream))
    assert through_us == direct
    assert "error" in json.dumps(through_us)


def test_the_response_that_the_agent_saw_is_on_the_span(served: Served) -> None:
    client = OpenAI(base_url=f"{served.url}/rollout/responses-ids/v1", api_key="any")
    seen = []
    for tools in ([], [TOOL]):
        seen.append(client.responses.create(model=MODEL, input="hello", tools=tools).id)
        with client.responses.stream(model=MODEL, input="hello", tools=tools) as stream:
            seen.append(stream.get_final_response().id)
    spans = spans_of(served, "responses-ids")
    assert [span.response_id for span in spans] == seen
    assert [json.loads(span.response or b"{}")["id"] for span in spans] == seen


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_sdk_calls_a_tool_and_sends_back_what_came_out(served: Served, stream: bool) -> None:
    """Two turns, straight and through us: the second sends the first's items back as the SDK has them."""
    finals = []
    for url in (served.engine_url, f"{served.url}/rollout/responses-sdk-{stream}"):
        client = OpenAI(base_url=f"{url}/v1", api_key="any")
        items: list[Any] = [{"role": "user", "content": TASK["input"]}]
        for _ in range(2):
            wanted: Any = {"model": MODEL, "input": items, "instructions": TASK["instructions"],
                           "tools": [TOOL], "temperature": 0, "max_output_tokens": 64}  # fmt: skip
            if stream:
                with client.responses.stream(**wanted) as events:
                    final: Any = events.get_final_response()
            else:
                final = client.responses.create(**wanted)
            for item in final.output:
                items.append(item.model_dump(exclude_none=True, by_alias=True))
                if item.type == "function_call":
                    items.append({"type": "function_call_output", "call_id": item.call_id, "output": "33"})
        finals.append(comparable(final.model_dump_json()))
    assert finals[0] == finals[1]
    spans = spans_of(served, f"responses-sdk-{stream}")
    assert [span.fidelity for span in spans] == [Fidelity.EXACT] * 2
    first, second = (span.generations[0] for span in spans)
    begun = first.prompt_token_ids.tolist() + first.response_token_ids.tolist()
    assert second.prompt_token_ids.tolist()[: len(begun)] == begun


def test_questions_for_a_response_go_through(served: Served) -> None:
    """vLLM keeps none, unless told to; its own words come back."""
    import urllib.error
    import urllib.request

    for method, path in (
        ("GET", f"{PATH}/resp_1"),
        ("POST", f"{PATH}/resp_1/cancel"),
        ("DELETE", f"{PATH}/x"),
    ):
        answers = []
        for url in (served.engine_url, served.url):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(urllib.request.Request(url + path, method=method), timeout=30)
            with error.value as answer:
                answers.append((answer.code, answer.read()))
        assert answers[0] == answers[1]
