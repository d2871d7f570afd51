"""Which class a call's failure is, by what the upstream did; and that the agent got its own answer."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from lightning_proxy.proxy.failures import class_of_event, class_of_status, class_without_answer
from lightning_proxy.store import ErrorClass
from tests.conftest import MakeProxy, ProxyThread
from tests.engine import EngineThread, Script
from tests.proxy.raw_http import (
    CUT,
    JSON,
    STREAM_HEAD,
    http_answer,
    http_chunks,
    raw_upstream,
    recorded,
    send,
)

USER = [{"role": "user", "content": "hello"}]
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "policy", "messages": USER},
    "/v1/completions": {"model": "policy", "prompt": "hello"},
    "/v1/messages": {"model": "policy", "messages": USER, "max_tokens": 20},
    "/v1/responses": {"model": "policy", "input": "hello"},
}

# As the engines and providers say it (bodies shortened).
OVERFLOWS = {
    "openai": (400, '{"error": {"message": "This model\'s maximum context length is 8192 tokens.", '
                    '"type": "invalid_request_error", "code": "context_length_exceeded"}}'),
    "openai responses": (400, '{"error": {"message": "Your input exceeds the context window of this model.", '
                              '"code": "context_length_exceeded"}}'),
    "vllm": (400, '{"error": {"message": "This model\'s maximum context length is 64 tokens. However, you '
                  'requested 20 output tokens and your prompt contains 90 input tokens"}}'),
    "vllm, no room for a token": (400, "Input length (90) exceeds model's maximum context length (64)."),
    "vllm responses": (400, "The engine prompt length 90 exceeds the max_model_len 64."),
    "anthropic": (400, '{"type": "error", "error": {"type": "invalid_request_error", '
                       '"message": "prompt is too long: 210000 tokens > 200000 maximum"}}'),
    "anthropic, with max_tokens": (400, "input length and `max_tokens` exceed context limit: 190000 + 20000"),
    "llama.cpp": (400, "the request exceeds the available context size. try increasing the context size"),
    "sglang": (400, "The input (90 tokens) is longer than the model's context length (64 tokens)."),
    "tgi": (422, "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 and 20"),
    "gemini": (400, "The input token count (1200) exceeds the maximum number of tokens allowed (1048)."),
    "bedrock": (400, "Input is too long for requested model."),
    "xai": (400, "This model's maximum prompt length is 131072 but the request contains 140000 tokens."),
    "by size": (413, "prompt is too long"),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERFLOWS)
def test_an_overflow_of_the_context_is_told_from_other_refusals(name: str) -> None:
    assert class_of_status(*OVERFLOWS[name]) is ErrorClass.CONTEXT_OVERFLOW


@pytest.mark.parametrize(
    ("status", "body", "error_class"),
    [
        (400, '{"error": {"message": "unknown field"}}', ErrorClass.UPSTREAM_REFUSED),
        (401, "prompt is too long", ErrorClass.UPSTREAM_REFUSED),
        (404, "The model `x` does not exist.", ErrorClass.UPSTREAM_REFUSED),
        (413, "the body has more than 1 MB", ErrorClass.UPSTREAM_REFUSED),
        (408, "", ErrorClass.TIMEOUT),
        (504, "upstream request timeout", ErrorClass.TIMEOUT),
        (429, "too many tokens per minute", ErrorClass.RATE_LIMITED),
        (500, "CUDA out of memory", ErrorClass.UPSTREAM_ERROR),
        (503, "", ErrorClass.UPSTREAM_ERROR),
        (529, "Overloaded", ErrorClass.UPSTREAM_ERROR),
        # The request repeated behind the reason is the agent's text, not the engine's.
        (422, " " * 5000 + "what is the maximum context length?", ErrorClass.UPSTREAM_REFUSED),
    ],
)  # fmt: skip
def test_a_status_has_its_class(status: int, body: str, error_class: ErrorClass) -> None:
    assert class_of_status(status, body) is error_class


@pytest.mark.parametrize(
    ("error", "error_class"),
    [
        ('{"type": "overloaded_error"}', ErrorClass.ENGINE_ERROR),
        ('{"type": "rate_limit_error"}', ErrorClass.RATE_LIMITED),
        ('{"code": "rate_limit_exceeded"}', ErrorClass.RATE_LIMITED),
        ('{"code": "context_length_exceeded"}', ErrorClass.CONTEXT_OVERFLOW),
        ("", ErrorClass.ENGINE_ERROR),
    ],
)
def test_an_error_inside_a_stream_has_its_class(error: str, error_class: ErrorClass) -> None:
    assert class_of_event(error) is error_class


def test_no_answer_is_a_timeout_where_one_ran_out() -> None:
    assert class_without_answer(TimeoutError()) is ErrorClass.TIMEOUT
    assert class_without_answer(ConnectionRefusedError()) is ErrorClass.UPSTREAM_UNREACHABLE


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("status", "said", "error_class"),
    [
        (400, "This model's maximum context length is 8 tokens.", ErrorClass.CONTEXT_OVERFLOW),
        (400, "no", ErrorClass.UPSTREAM_REFUSED),
        (429, "slow down", ErrorClass.RATE_LIMITED),
        (504, "gateway timeout", ErrorClass.TIMEOUT),
        (500, "boom", ErrorClass.UPSTREAM_ERROR),
    ],
)
def test_on_every_api_the_record_has_the_class_and_the_agent_the_upstreams_answer(
    make_proxy: MakeProxy, path: str, status: int, said: str, error_class: ErrorClass, streamed: bool
) -> None:
    body = json.dumps({"error": {"message": said, "type": "x", "param": None, "code": None}}).encode()

    def answer(connection: socket.socket, head: bytes, _: bytes) -> bool:
        connection.sendall(
            http_answer(body, "Content-Type: application/json", "X-A: 1", status=f"{status} X")
        )
        return True

    request = {**PATHS[path], "stream": streamed}
    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url, proxy={"capture": "text"})
        straight, through = send(upstream.url, path, request), send(proxy.url, path, request)
        assert through.end_to_end == straight.end_to_end
        span = recorded(proxy)[0]
    assert (span.error_class, span.response) == (error_class, None)
    assert said in (span.error or "")


@pytest.mark.parametrize("path", PATHS)
def test_on_every_api_an_error_event_and_a_cut_have_their_classes(
    engine: EngineThread, proxy: ProxyThread, path: str
) -> None:
    request = {**PATHS[path], "stream": True}
    send(proxy.url, path, request, [*JSON, *Script(error_after=3).to_header().items()])
    with pytest.raises(CUT):
        send(proxy.url, path, request, [*JSON, *Script(cut_after=3).to_header().items()])
    classes = [span.error_class for span in recorded(proxy, 2)]
    assert classes == [ErrorClass.ENGINE_ERROR, ErrorClass.CUT_STREAM]


def test_an_overflow_that_a_stream_tells_is_one_on_record_too(make_proxy: MakeProxy) -> None:
    event = b'data: {"error": {"message": "x", "code": "context_length_exceeded"}}\n\ndata: [DONE]\n\n'

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(STREAM_HEAD + http_chunks(event))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        request = {**PATHS["/v1/chat/completions"], "stream": True}
        assert send(proxy.url, "/v1/chat/completions", request).body == event
        assert recorded(proxy)[0].error_class is ErrorClass.CONTEXT_OVERFLOW
