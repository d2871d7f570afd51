"""The results of tools that a request brings for the first time, and whether they report an error. No I/O.

Every later request of a conversation sends them again: only what stands behind the last thing that the
assistant said is new, and nothing counts twice.
"""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import orjson

from lightning_proxy.store import Span

from .conversation import Json

_MOST_AGENTS = 4096
_MOST_SEEN = 64  # results remembered for one agent, the latest
_LONGEST_JSON = 65_536  # characters; a longer result is looked at as text
_LOOKED_INTO = 2000  # characters that a pattern may match
_SHOWN = 300
_RESULT_ITEMS = frozenset(("function_call_output", "custom_tool_call_output"))
_CALL_ITEMS = frozenset(("function_call", "custom_tool_call", "reasoning"))


class Result(NamedTuple):
    """One result of a tool."""

    call_id: str | None
    content: Any  # text, or parts
    is_error: bool = False  # as the protocol says it


class Results:
    """Which results have been seen, by rollout and attempt; bounded."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, int], deque[int]] = OrderedDict()

    def new(self, span: Span, request: Json) -> list[Result]:
        """The results that this request is the first to bring, in their order."""
        last = request.get("input" if span.wire == "responses" else "messages")
        if not isinstance(last, list) or not last or not _brings_result(last[-1]):
            return []  # as good as every call that does not follow upon a tool call
        owner = (span.rollout_id, span.attempt)
        seen = self._seen.get(owner)
        known = seen is not None
        if seen is None:
            seen = self._seen[owner] = deque(maxlen=_MOST_SEEN)
            if len(self._seen) > _MOST_AGENTS:
                self._seen.popitem(last=False)
        self._seen.move_to_end(owner)
        before = request.get("previous_response_id")
        fresh = []
        for position, result in _latest(last, known=known):
            mark = hash((position, result.call_id, before))
            if mark in seen:
                break
            fresh.append((mark, result))
        seen.extend(mark for mark, _ in fresh)
        return [result for _, result in reversed(fresh)]


def _brings_result(item: Any) -> bool:
    if item.get("role") in ("tool", "function") or item.get("type") in _RESULT_ITEMS:
        return True
    content = item.get("content")
    if item.get("role") != "user" or not isinstance(content, list):
        return False
    return any(isinstance(part, dict) and part.get("type") == "tool_result" for part in content)


def _latest(items: list[Any], *, known: bool) -> Iterator[tuple[object, Result]]:
    """(place, result) from the last one back to what the assistant said before.

    In Responses calls and results may alternate, of one turn or of many: where the agent is known, what it
    sent before ends the walk; else the last call does.
    """
    for index in range(len(items) - 1, -1, -1):
        item = items[index]
        kind, role = item.get("type"), item.get("role")
        if role == "assistant" or (kind in _CALL_ITEMS and not known):
            return
        if kind in _RESULT_ITEMS:
            yield index, Result(item.get("call_id"), item.get("output"))
        elif role in ("tool", "function"):
            yield index, Result(item.get("tool_call_id"), item.get("content"))
        elif role == "user" and isinstance(item.get("content"), list):
            blocks = [part for part in item["content"] if part.get("type") == "tool_result"]
            for number, block in enumerate(reversed(blocks)):
                error = block.get("is_error") is True
                yield (index, number), Result(block.get("tool_use_id"), block.get("content"), error)


def failure_of(result: Result, patterns: Iterable[re.Pattern[str]]) -> str | None:
    """What a result says of its failure; ``None`` where it reports none."""
    text = _text_of(result.content)
    shown = text[:_SHOWN] or "the tool said nothing"
    if result.is_error or any(pattern.match(text, 0, _LOOKED_INTO) for pattern in patterns):
        return shown
    if text[:1] == "{" and len(text) <= _LONGEST_JSON:
        try:
            said = orjson.loads(text)
        except orjson.JSONDecodeError:
            return None
        if said.get("error") or said.get("isError") is True:
            return shown
        if said.get("ok") is False or said.get("success") is False:
            return shown
    return None


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content.lstrip()
    if not isinstance(content, list):
        return ""
    return "".join([str(part.get("text") or "") for part in content if isinstance(part, dict)]).lstrip()
