"""Every generating API x streamed or not x what is asked: a span of fidelity `exact`, on real vLLM.

Prints the table that docs/wires.md shows (``pytest -s tests/vllm/test_fidelity.py``).
"""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest

from lightning_proxy.store import Fidelity, Span
from tests.vllm.conftest import MODEL, Served
from tests.vllm.test_real_engine import MESSAGES, TOOLS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

Json = dict[str, Any]
SYSTEM, QUESTION = (message["content"] for message in MESSAGES)
FUNCTION = TOOLS[0]["function"]
ANTHROPIC_TOOL = {
    "name": FUNCTION["name"],
    "description": FUNCTION["description"],
    "input_schema": FUNCTION["parameters"],
}
SAMPLED = {"temperature": 1.0, "seed": 1}

# API -> what is asked -> the request. What an API does not have is not there.
REQUESTS: dict[str, dict[str, Json]] = {
    "chat/completions": {
        "text": {"messages": MESSAGES, "max_tokens": 20},
        "tool call": {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 60},
        "stop sequence": {"messages": MESSAGES, "stop": ["e", "a"], "max_tokens": 60},
        "n = 2": {"messages": MESSAGES, "n": 2, "max_tokens": 20, **SAMPLED},
    },
    "completions": {
        "text": {"prompt": QUESTION, "max_tokens": 20},
        "stop sequence": {"prompt": QUESTION, "stop": ["e", "a"], "max_tokens": 60},
        "n = 2": {"prompt": QUESTION, "n": 2, "max_tokens": 20, **SAMPLED},
    },
    "responses": {
        "text": {"instructions": SYSTEM, "input": QUESTION, "max_output_tokens": 20},
        "tool call": {
            "instructions": SYSTEM,
            "input": QUESTION,
            "tools": [{"type": "function", **FUNCTION}],
            "max_output_tokens": 60,
        },
        "stop sequence": {
            "instructions": SYSTEM,
            "input": QUESTION,
            "stop": ["e", "a"],
            "max_output_tokens": 60,
        },
    },
    "messages": {
        "text": {"system": SYSTEM, "messages": MESSAGES[1:], "max_tokens": 20},
        "tool call": {
            "system": SYSTEM,
            "messages": MESSAGES[1:],
            "tools": [ANTHROPIC_TOOL],
            "max_tokens": 60,
        },
        "stop sequence": {
            "system": SYSTEM,
            "messages": MESSAGES[1:],
            "stop_sequences": ["e", "a"],
            "max_tokens": 60,
        },
    },
}
ASKED = ("text", "tool call", "stop sequence", "n = 2")
CASES = [
    (api, asked, stream) for api, kinds in REQUESTS.items() for asked in kinds for stream in (False, True)
]
# What a tool call looks like in a request's answer, whichever the API.
TOOL_CALL = ('"tool_calls":[{', '"type":"function_call"', '"type":"tool_use"')

seen: dict[tuple[str, str, bool], str] = {}


def ask(url: str, body: Json) -> bytes:
    request = urllib.request.Request(
        url,
        json.dumps({"model": MODEL, "temperature": 0, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return bytes(answer.read())


def only_span(served: Served, rollout: str) -> Span:
    with served.store() as store:
        (span,) = store.list_spans(rollout_id=rollout)
        return span


@pytest.mark.parametrize(("api", "asked", "stream"), CASES)
def test_every_generating_api_is_captured_exactly(served: Served, api: str, asked: str, stream: bool) -> None:
    rollout = f"fidelity-{api}-{asked}-{stream}".replace("/", ".").replace(" ", "_").replace("=", "")
    ask(f"{served.url}/rollout/{rollout}/v1/{api}", {**REQUESTS[api][asked], "stream": stream})
    span = only_span(served, rollout)
    seen[api, asked, stream] = span.fidelity.value
    assert (span.error_class, span.fidelity, span.streamed) == (None, Fidelity.EXACT, stream)
    assert len(span.generations) == (2 if asked == "n = 2" else 1)
    for generation in span.generations:
        assert len(generation.prompt_token_ids) > 1
        assert len(generation.response_token_ids) == len(generation.logprobs) > 0
        assert all(logprob <= 0 for logprob in generation.logprobs)
    if asked == "tool call":
        compact = (span.response or b"").replace(b'": ', b'":').decode()
        assert any(mark in compact for mark in TOOL_CALL), (
            "the model did not call its tool: nothing was tested"
        )


def test_every_api_saw_the_same_prompt_and_said_the_same(served: Served) -> None:
    """The same conversation by three APIs: the same token ids both ways, so nothing is lost in between."""
    made = []
    for api in ("chat/completions", "responses", "messages"):
        for asked in ("text", "tool call"):
            rollout = f"same-{api}-{asked}".replace("/", ".").replace(" ", "_")
            ask(f"{served.url}/rollout/{rollout}/v1/{api}", REQUESTS[api][asked])
            made.append((asked, only_span(served, rollout).generations[0]))
    for asked in ("text", "tool call"):
        first, *others = [generation for kind, generation in made if kind == asked]
        for other in others:
            assert other.prompt_token_ids == first.prompt_token_ids
            assert other.response_token_ids == first.response_token_ids
            assert other.logprobs == pytest.approx(first.logprobs, abs=1e-4)


def test_print_the_table() -> None:
    lines = ["| API | streamed | " + " | ".join(ASKED) + " |", "|---|---|" + "---|" * len(ASKED)]
    for api in REQUESTS:
        for stream in (False, True):
            cells = [seen.get((api, asked, stream), "-") for asked in ASKED]
            lines.append(f"| `/v1/{api}` | {'yes' if stream else 'no'} | " + " | ".join(cells) + " |")
    print("\n" + "\n".join(lines))
    assert set(seen.values()) <= {"exact"}
