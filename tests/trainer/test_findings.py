from __future__ import annotations

from typing import Any

import orjson
import pytest

from lightning_proxy.store import ErrorClass
from lightning_proxy.trainer.findings import Finding, findings_of
from tests.trainer.recording import failed_span, generation, span

TOOLS = [
    {
        "type": "function",
        "function": {"name": "query", "parameters": {"type": "object", "required": ["sql"]}},
    }
]
ASKED = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "query", "arguments": "{}"}}]}


def found(request: Any = None, response: Any = None, **changes: Any) -> list[Finding]:
    bodies = {"request": orjson.dumps(request or {}), "response": orjson.dumps(response or {})}
    return findings_of(span("r", generation([1], [2]), **bodies, **changes))


def result(content: Any) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "tool", "tool_call_id": "c1", "content": content}]}


@pytest.mark.parametrize(
    "request_",
    [
        result("Error: no such table: t"),
        result("Traceback (most recent call last):\n ..."),
        result('{"error": "no such table"}'),
        result([{"type": "text", "text": "Error: x"}]),
        {
            "input": [
                {"type": "function_call"},
                {"type": "function_call_output", "call_id": "c1", "output": "Error"},
            ]
        },
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "c1"}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "c1", "content": "boom", "is_error": True}
                    ],
                },
            ]
        },
    ],
)
def test_a_failed_tool_is_found_in_the_request_that_brings_its_result(request_: Any) -> None:
    assert found(request_) == [Finding(ErrorClass.TOOL_FAILURE, "c1")]


@pytest.mark.parametrize(
    "request_",
    [
        result("3 rows"),
        result('{"error": null, "rows": 3}'),
        result("The error rate is 3%."),
        {"messages": [{"role": "user", "content": "Error: what does it mean?"}]},
        {
            "messages": [
                *result("Error: x")["messages"],
                {"role": "assistant"},
                {"role": "user", "content": "go on"},
            ]
        },
        {"messages": "odd"},
        {"messages": [7]},
    ],
)
def test_what_reports_no_failure_or_reported_it_before_is_none(request_: Any) -> None:
    assert found(request_) == []


def calling(name: str, arguments: Any) -> dict[str, Any]:
    call = {"id": "c2", "function": {"name": name, "arguments": arguments}}
    return {"choices": [{"message": {"tool_calls": [call]}, "finish_reason": "tool_calls"}]}


@pytest.mark.parametrize(
    ("response", "malformed"),
    [
        (calling("query", '{"sql": "select 1"}'), False),
        (calling("query", '{"sql": "select'), True),
        (calling("query", "[1]"), True),
        (calling("query", "{}"), True),  # sql is required
        (calling("delete", "{}"), True),  # no such tool
        ({"output": [{"type": "function_call", "call_id": "c2", "name": "query", "arguments": "{"}]}, True),
        ({"content": [{"type": "tool_use", "id": "c2", "name": "query", "input": {"sql": "x"}}]}, False),
        ({"content": [{"type": "tool_use", "id": "c2", "name": "query", "input": {}}]}, True),
    ],
)
def test_a_tool_call_is_malformed_where_it_does_not_parse_or_fit(response: Any, malformed: bool) -> None:
    expected = [Finding(ErrorClass.MALFORMED_TOOL_CALL, "c2")] if malformed else []
    assert found({"tools": TOOLS}, response) == expected


@pytest.mark.parametrize(
    ("response", "truncated"),
    [
        ({"choices": [{"finish_reason": "length"}]}, True),
        ({"choices": [{"finish_reason": "stop"}]}, False),
        ({"stop_reason": "max_tokens"}, True),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, True),
        ({"incomplete_details": None}, False),
    ],
)
def test_an_answer_that_ended_at_its_limit_is_truncated(response: Any, truncated: bool) -> None:
    assert found(None, response) == ([Finding(ErrorClass.TRUNCATED)] if truncated else [])


def test_a_call_that_ended_in_an_error_has_its_class_already() -> None:
    assert findings_of(failed_span("r")) == []
