"""Our way between Messages and Chat Completions beside vLLM's own, without an engine."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import re
import warnings
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_proxy.proxy.wires.messages_answer import MessagesTranslation
from lightning_proxy.proxy.wires.messages_request import NotTranslated, chat_request
from lightning_proxy.proxy.wires.translated import Refused
from tests.engine import Model, messages, shapes

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
_IMPORTED = importlib.util.find_spec("vllm") is not None
pytestmark.append(pytest.mark.skipif(not _IMPORTED, reason="needs vLLM's own code"))

Json = dict[str, Any]
RELAXED = settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@cache
def vllms(module: str) -> Any:
    """A module of vLLM. Imported late, for it takes seconds, and quietly, for torch warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"vllm.entrypoints.{module}")


# -- requests ----------------------------------------------------------------------------------------

TEXTS = st.sampled_from(["", "a", "é😀", "x-anthropic-billing-header: cch=1", 'say "hi"\n'])
CACHE = {"cache_control": st.just({"type": "ephemeral"})}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=3)


def block(kind: str, *, may: dict[str, Any] | None = None, **fields: Any) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries({"type": st.just(kind), **fields}, optional={**CACHE, **(may or {})})


TEXT = block("text", text=TEXTS, may={"citations": st.none()})
SOURCES = st.fixed_dictionaries({"type": st.just("url"), "url": st.just("https://x/y.png")}) | (
    st.fixed_dictionaries(
        {"type": st.just("base64"), "media_type": st.just("image/png"), "data": st.just("AA")}
    )
)
IMAGE = block("image", source=SOURCES)
REFERENCE = block("tool_reference", tool_name=st.sampled_from(["a", "b"]))
RESULT = block(
    "tool_result",
    tool_use_id=st.sampled_from(["t1", "t2"]),
    may={
        "content": TEXTS | st.none() | st.lists(TEXT | IMAGE | REFERENCE, max_size=3),
        "is_error": st.booleans() | st.none(),
    },
)
USE = block("tool_use", id=st.sampled_from(["t1", "t2"]), name=st.sampled_from(["a", "b"]), input=OBJECTS)
THOUGHT = block("thinking", thinking=TEXTS, may={"signature": st.just("s") | st.none()})
REDACTED = block("redacted_thinking", data=st.just("x"))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.just("user"), "content": TEXTS | st.lists(TEXT | IMAGE | RESULT, max_size=4)}
    )
    | st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": TEXTS | st.lists(TEXT | USE | THOUGHT | REDACTED, max_size=4),
        }
    ),
    min_size=1,
    max_size=4,
)
SCHEMAS = st.sampled_from(
    [{}, {"type": "object", "properties": {"q": {"type": "string"}}}, {"properties": {}, "required": []}]
)
TOOL = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b"]), "input_schema": SCHEMAS},
    optional={
        "description": TEXTS | st.none(),
        "strict": st.booleans() | st.none(),
        "defer_loading": st.booleans() | st.none(),
        "type": st.just("custom"),
        "input_examples": st.just([{}]),
        **CACHE,
    },
)
CHOICE = st.fixed_dictionaries(
    {"type": st.sampled_from(["auto", "any", "none", "tool"])},
    optional={"name": st.sampled_from(["a", "b"]), "disable_parallel_tool_use": st.booleans() | st.none()},
)
FORMAT = st.fixed_dictionaries({"type": st.just("json_schema"), "schema": SCHEMAS})
OPTIONAL: dict[str, Any] = {
    "system": TEXTS | st.none() | st.lists(TEXT, max_size=3),
    "stop_sequences": st.none() | st.lists(TEXTS, max_size=5),
    "stream": st.booleans() | st.none(),
    "temperature": st.sampled_from([None, 0, 0.5, 1]),
    "top_p": st.sampled_from([None, 0.5, 1]),
    "top_k": st.sampled_from([None, 5, -1]),
    "tools": st.none() | st.lists(TOOL, max_size=2),
    "tool_choice": st.none() | CHOICE,
    "metadata": st.none() | OBJECTS,
    "thinking": st.sampled_from(
        [
            None,
            {"type": "adaptive"},
            {"type": "adaptive", "display": "omitted"},
            {"type": "enabled", "budget_tokens": 1024},
            {"type": "enabled", "budget_tokens": 2048, "display": None},
            {"type": "disabled"},
        ]
    ),
    "output_config": st.none()
    | st.fixed_dictionaries(
        {}, optional={"effort": st.sampled_from([None, "low", "max"]), "format": st.none() | FORMAT}
    ),
    "chat_template_kwargs": st.none() | st.just({"enable_thinking": False}),
    "context_management": OBJECTS,
    "service_tier": st.just("auto"),
}
REQUESTS = st.fixed_dictionaries(
    {"model": st.just("m"), "messages": MESSAGES, "max_tokens": st.sampled_from([1, 40, 4096])},
    optional=OPTIONAL,
)


def vllms_request(request: Json) -> Any:

    # A copy: vLLM writes into what it is given.
    parsed = vllms("anthropic.protocol").AnthropicMessagesRequest(**json.loads(json.dumps(request)))
    return vllms("anthropic.serving").AnthropicServingMessages.to_chat_completion_request(parsed)


def dumped(request: Any) -> Json:
    made: Json = request.model_dump(mode="python", warnings=False)
    # Ids of their own, drawn per request.
    return {key: value for key, value in made.items() if key not in ("request_id",)}


def check_request(request: Json) -> bool:
    """Whether the request was translated; if so, exactly as vLLM does it."""

    try:
        ours = chat_request(json.loads(json.dumps(request)))
    except NotTranslated:
        return False
    through_http = vllms("openai.chat_completion.protocol").ChatCompletionRequest(
        **json.loads(orjson.dumps(ours))
    )
    assert dumped(through_http) == dumped(vllms_request(request))
    return True


@RELAXED
@given(REQUESTS)
def test_what_is_translated_is_what_vllm_makes_of_it(request_: Json) -> None:
    check_request(request_)


BASE: Json = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4096}
SQL = {"name": "a", "input_schema": {"properties": {}}, "cache_control": {"type": "ephemeral"}}
TRANSLATED: list[Json] = [
    {},
    {"system": "s"},
    {"system": [{"type": "text", "text": "x-anthropic-billing-header: 1"}, {"type": "text", "text": "s"}]},
    {"system": [{"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": "b"}]},
    {"stream": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "stop_sequences": ["a", "b"]},
    {"tools": [SQL]},
    {"tools": [SQL], "tool_choice": {"type": "tool", "name": "a", "disable_parallel_tool_use": True}},
    {"tools": [SQL], "tool_choice": {"type": "any"}},
    {"tools": [SQL], "tool_choice": {"type": "none"}},
    {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}},
    {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
    {"metadata": {"user_id": "u"}, "context_management": {"edits": []}},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": []}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "t"},
                    {"type": "tool_use", "id": "t1", "name": "a", "input": {"n": 10**30, "é": 1e16}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "before"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t1",
                        "content": [
                            {"type": "text", "text": "1"},
                            {"type": "text", "text": "2"},
                            {"type": "tool_reference", "tool_name": "a"},
                            {"type": "image", "source": {"type": "url", "url": "https://x"}},
                        ],
                    },
                ],
            },
        ]
    },
]


@pytest.mark.parametrize("fields", TRANSLATED, ids=lambda fields: json.dumps(fields)[:60])
def test_what_agents_send_is_translated(fields: Json) -> None:
    assert check_request({**BASE, **fields})


@RELAXED
@given(REQUESTS, st.sampled_from([*OPTIONAL, "model", "messages", "max_tokens", "seed"]), VALUES)
def test_nothing_is_translated_that_vllm_would_refuse(request_: Json, name: str, value: Any) -> None:
    # vLLM's validation raises where check_request asks for its view; a refusal must have come first.
    check_request({**request_, name: value})


# -- answers -----------------------------------------------------------------------------------------

REASONS = st.sampled_from([None, None, None, "stop", "length", "tool_calls", "abort"])
STOPS = st.sampled_from([None, None, 2, "x"])
ARGUMENTS = st.sampled_from([None, "", "{", '"q": 1', "}"])
DELTA_CALL = st.fixed_dictionaries(
    {"index": st.integers(0, 1)},
    optional={
        "id": st.sampled_from([None, "c0", "c1"]),
        "type": st.just("function"),
        "function": st.none()
        | st.fixed_dictionaries({}, optional={"name": st.sampled_from([None, "a"]), "arguments": ARGUMENTS}),
    },
)
DELTA = st.fixed_dictionaries(
    {},
    optional={
        "content": st.sampled_from([None, "", "t", "é\u2028\x7f\x00"]),
        "reasoning": st.sampled_from([None, "", "r"]),
        "tool_calls": st.lists(DELTA_CALL, max_size=2),
    },
)
DETAILS = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "cached_tokens": st.sampled_from([None, 0, 3]),
        "created_cache_tokens": st.sampled_from([None, 2]),
    },
)
USAGE = st.none() | st.fixed_dictionaries(
    {"prompt_tokens": st.integers(0, 9), "total_tokens": st.just(9)},
    optional={"completion_tokens": st.sampled_from([None, 4]), "prompt_tokens_details": DETAILS},
)
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
CHUNK = st.builds(
    lambda delta, reason, stop, usage: {
        **HEAD,
        "choices": [{"index": 0, "delta": delta, "finish_reason": reason, "stop_reason": stop}],
        "usage": usage,
    },
    DELTA,
    REASONS,
    STOPS,
    USAGE,
)
LAST = st.builds(lambda usage: {**HEAD, "choices": [], "usage": usage}, USAGE)


class OnlyItsMap:
    """As much of vLLM's server as its converters look at."""

    stop_reason_map = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}  # noqa: RUF012


def vllms_events(chunks: list[Json]) -> str:

    async def chat() -> AsyncIterator[str]:
        for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    async def collect() -> str:
        convert = vllms("anthropic.serving").AnthropicServingMessages.message_stream_converter
        return "".join([event async for event in convert(OnlyItsMap(), chat())])

    return asyncio.run(collect())


def without_chance(text: str) -> str:
    text = re.sub(r'"signature":"[0-9a-f]{32}"', '"signature":"drawn"', text)
    return re.sub(r"in position \d+", "somewhere", text)


@RELAXED
@given(st.lists(CHUNK, max_size=6), LAST)
def test_a_stream_is_what_vllm_makes_of_it_byte_for_byte(chunks: list[Json], last: Json) -> None:
    ours = MessagesTranslation()
    all_chunks = [*chunks, last]
    made = b"".join(ours.chunk(orjson.loads(orjson.dumps(chunk))) for chunk in all_chunks) + ours.done()
    assert without_chance(made.decode()) == without_chance(vllms_events(all_chunks))


ARGUMENTS_WHOLE = st.sampled_from(
    [
        "{}",
        '{"q": "é", "n": 1000000000000000000000000000000, "f": 1e16, "z": null, "m": -0, "d": {"a": [1.0]}}',
        "null",
        "{",
        "",
        '{"a": NaN}',
        '{"a": 1E400}',
    ]
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.just("assistant")},
    optional={
        "content": st.sampled_from([None, "", "t", "é\u2028\x7f\x00"]),
        "reasoning": st.sampled_from([None, "", "r"]),
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {
                    "id": st.sampled_from(["c0", "c1"]),
                    "type": st.just("function"),
                    "function": st.fixed_dictionaries(
                        {
                            "name": st.just("a"),
                            "arguments": ARGUMENTS_WHOLE,
                        }
                    ),
                }
            ),
            max_size=2,
        ),
    },
)


@RELAXED
@given(MESSAGE, REASONS, STOPS, USAGE.filter(bool))
def test_a_whole_answer_is_what_vllm_makes_of_it_byte_for_byte(
    message: Json, reason: str | None, stop: Any, usage: Json
) -> None:
    choice = {"index": 0, "message": message, "finish_reason": reason, "stop_reason": stop}
    check_answer({**HEAD, "object": "chat.completion", "choices": [choice], "usage": usage})


def test_characters_that_utf8_has_not_are_refused_as_by_vllm() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "a", "arguments": '{"a": "\\ud800"}'}}
    choice = {"index": 0, "message": {"role": "assistant", "tool_calls": [call]}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    assert check_answer({**HEAD, "object": "chat.completion", "choices": [choice], "usage": usage}) == 400


def check_answer(answer: Json) -> int:
    expected = vllms_answer(answer)
    try:
        made = orjson.dumps(MessagesTranslation().whole(orjson.loads(orjson.dumps(answer))))
        status = 200
    except Refused as refused:
        status, made = refused.status, orjson.dumps(refused.body)
    assert (status, without_chance(made.decode())) == (expected[0], without_chance(expected[1]))
    return status


def vllms_answer(answer: Json) -> tuple[int, str]:

    response = vllms("openai.chat_completion.protocol").ChatCompletionResponse
    error_of = vllms("serve.exception_handling.error_response").create_error_response
    try:
        convert = vllms("anthropic.serving").AnthropicServingMessages.messages_full_converter
        made = convert(OnlyItsMap(), response(**answer))
    except Exception as error:  # noqa: BLE001  # as in vLLM's router
        refused = vllms("anthropic.api_router").translate_error_response(error_of(error))
        return refused.status_code, bytes(refused.body).decode()
    try:
        return 200, as_starlette_writes(made.model_dump(exclude_none=True))
    except ValueError as error:  # as in vLLM's handler of what its routes do not catch
        said = error_of(error)
        return said.error.code, as_starlette_writes(said.model_dump())


def as_starlette_writes(content: Any) -> str:
    responses = importlib.import_module("starlette.responses")
    return bytes(responses.JSONResponse(content).body).decode()


# -- the fake engine ---------------------------------------------------------------------------------

SCRIPTS: list[Json] = [
    {},
    {"text": ""},
    {"text": "naïve 😀"},
    {"tool_calls": (("sql", '{"q": "é", "n": [1, null]}'), ("sql", "{}"))},
    {"text": "é: ", "tool_calls": (("sql", "{}"),)},
]


@pytest.mark.parametrize("per_chunk", [1, 9, 500])
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
@pytest.mark.parametrize("limit", [3, 1000])
def test_the_fake_engine_says_on_messages_what_vllm_would_make_of_its_chat(
    script: Json, per_chunk: int, limit: int
) -> None:
    body = {**BASE, "max_tokens": limit, "tools": [SQL]}
    chat = messages.as_chat(body) | {
        "stream_options": {"include_usage": True, "continuous_usage_stats": True}
    }
    reply, head = Model(tokens=20).generate(chat, **script), shapes.Head("chatcmpl-1", 1, "m")
    streamed = b"".join(messages.events(head, reply, per_chunk)) + messages.STOP
    assert streamed.decode() == vllms_events(list(shapes.chat_chunks(head, chat, reply, per_chunk)))
    whole = (200, orjson.dumps(messages.whole(head, reply)).decode())
    assert whole == vllms_answer(shapes.chat(head, chat, reply))


def test_the_fake_engine_reads_a_request_as_vllm_does() -> None:
    fields = {**TRANSLATED[-1], "tools": [SQL], "system": [{"type": "text", "text": "s"}]}
    body = json.loads(json.dumps({**BASE, **fields}))
    body["messages"][-1]["content"][-1]["content"] = [{"type": "text", "text": "1"}]
    theirs = vllms_request(body)
    told = [
        {key: said.get(key) for key in ("role", "content", "tool_calls") if said.get(key)}
        for said in theirs.messages
    ]
    for said in told:
        for call in said.get("tool_calls", ()):
            call.pop("id")
            call.pop("type")
    ours = messages.as_chat(body)
    assert [{k: v for k, v in said.items() if v} for said in ours["messages"]] == told
    assert ours["tools"][0]["function"] == theirs.tools[0].function.model_dump() | {
        "strict": None,
        "defer_loading": None,
    }
