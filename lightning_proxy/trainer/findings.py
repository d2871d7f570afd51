"""What is wrong in a call that ended well, as its request and its answer show it. No I/O.

A failed tool is seen in the request that brings its result back; every later request of the conversation
brings it again, so only what stands behind the last thing that the assistant said is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

from lightning_proxy.store import ErrorClass, Span

_TRUNCATED = frozenset(("length", "max_tokens", "max_output_tokens"))
_FAILED = ("Error", "Traceback (most recent call last)")  # how a result begins that reports a failure


class Finding(NamedTuple):
    """What was found, and the tool call that it is about."""

    error_class: ErrorClass
    call_id: str | None = None


def findings_of(span: Span) -> list[Finding]:
    """Truncation and malformed tool calls of the answer, failed tools that the request reports.

    What cannot be read has no findings.
    """
    if span.error_class is not None:
        return []
    request, response = parsed(span.request), parsed(span.response)
    try:
        found = [Finding(ErrorClass.TOOL_FAILURE, call_id) for call_id in _failed_tools(request)]
        tools = _tools(request)
        for call_id, name, arguments in _tool_calls(response):
            if (tools and name not in tools) or not _fits(arguments, tools.get(name, {})):
                found.append(Finding(ErrorClass.MALFORMED_TOOL_CALL, call_id))
        if _TRUNCATED.intersection(_endings(span, response)):
            found.append(Finding(ErrorClass.TRUNCATED))
    except (AttributeError, KeyError, TypeError, ValueError):
        return []
    return found


def parsed(body: bytes | None) -> dict[str, Any]:
    """A stored body; empty where it is no JSON object."""
    try:
        value = orjson.loads(body or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _failed_tools(request: dict[str, Any]) -> Iterator[str | None]:
    items = request.get("messages") or request.get("input")
    if not isinstance(items, list):
        return
    for item in reversed(items):
        if item.get("role") == "assistant" or item.get("type") in ("function_call", "reasoning"):
            return
        if item.get("role") == "tool" and _reports_failure(item.get("content")):
            yield item.get("tool_call_id")
        elif item.get("type") == "function_call_output" and _reports_failure(item.get("output")):
            yield item.get("call_id")
        elif isinstance(item.get("content"), list):
            for part in item["content"]:
                if part.get("type") == "tool_result" and (
                    part.get("is_error") or _reports_failure(part.get("content"))
                ):
                    yield part.get("tool_use_id")


def _reports_failure(content: Any) -> bool:
    """As tools do: an object with an error in it, or a text that begins as one."""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        return False
    text = content.lstrip()
    if text.startswith("{"):
        result = parsed(text.encode())
        return bool(result.get("error") or result.get("is_error") or result.get("isError"))
    return text.startswith(_FAILED)


def _tools(request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name and parameters' schema of each function that the model may call."""
    functions = [tool.get("function", tool) for tool in request.get("tools") or ()]
    return {
        str(each["name"]): each.get("parameters") or each.get("input_schema") or {}
        for each in functions
        if "name" in each
    }


def _tool_calls(response: dict[str, Any]) -> Iterator[tuple[str | None, str, Any]]:
    """Id, name and arguments of each call, in any of the APIs' forms."""
    for choice in response.get("choices") or ():
        for call in (choice.get("message") or {}).get("tool_calls") or ():
            if "function" in call:
                yield call.get("id"), call["function"].get("name"), call["function"].get("arguments")
    for item in response.get("output") or ():
        if item.get("type") == "function_call":
            yield item.get("call_id"), item.get("name"), item.get("arguments")
    for part in response.get("content") or ():
        if part.get("type") == "tool_use":
            yield part.get("id"), part.get("name"), part.get("input")


def _fits(arguments: Any, schema: dict[str, Any]) -> bool:
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments or "{}")
        except ValueError:
            return False
    return isinstance(arguments, dict) and all(name in arguments for name in schema.get("required") or ())


def _endings(span: Span, response: dict[str, Any]) -> Iterator[Any]:
    yield from (generation.finish_reason for generation in span.generations)
    yield from (choice.get("finish_reason") for choice in response.get("choices") or ())
    yield response.get("stop_reason")
    yield (response.get("incomplete_details") or {}).get("reason")
