"""Two answers of real vLLM, compared but for what chance decides."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from itertools import zip_longest
from typing import Any


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        answer = urllib.request.urlopen(request, timeout=120)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        headers = {k.lower(): v for k, v in answer.headers.items() if k.lower() != "date"}
        return answer.status, headers, answer.read().decode()


def comparable(body: str) -> Any:
    """An answer without what chance decides: ids drawn, and how many tokens share a chunk.

    vLLM interleaves the choices of a stream and puts as many tokens into a chunk as are ready, so
    the growing parts of each choice are joined; all else must be the same.
    """
    if body.startswith("event:"):
        return named_events(body)
    if not body.startswith("data:"):
        try:
            return without_random(json.loads(body))
        except ValueError:
            return body
    events = [event.removeprefix("data: ") for event in body.split("\n\n") if event]
    chunks = [without_random(json.loads(event)) for event in events if event != "[DONE]"]
    choices: dict[int, Any] = {}
    for chunk in chunks:
        for choice in chunk.get("choices", ()):
            choices[choice["index"]] = joined(choices.get(choice["index"]), choice)
    return {
        "done": events[-1] == "[DONE]",
        "choices": choices,
        "first": chunks[0],
        "keys": {tuple(chunk) for chunk in chunks},
        "choice_keys": {tuple(choice) for chunk in chunks for choice in chunk.get("choices", ())},
        "delta_keys": {
            tuple(c["delta"]) for chunk in chunks for c in chunk.get("choices", ()) if "delta" in c
        },
        "usage": chunks[-1].get("usage"),
        "errors": [chunk for chunk in chunks if "error" in chunk],
    }


def named_events(body: str) -> list[Any]:
    """A stream of named events, in their order; the pieces of one block as one."""
    events: list[Any] = []
    for block in body.split("\n\n"):
        data = block.partition("data: ")[2]
        if not data or data == "[DONE]":
            events += [block] if block else []
            continue
        event = without_random(json.loads(data))
        last = events[-1] if events and isinstance(events[-1], dict) else {}
        grows = event.get("type", "").endswith("delta") and event.get("index") is not None
        if grows and (last.get("type"), last.get("index")) == (event["type"], event["index"]):
            events[-1] = joined(last, event)
        else:
            events.append(event)
    return events


def joined(before: Any, after: Any, key: str = "") -> Any:
    """Two pieces of a stream as one: text and lists grow, all else is set unless it is null."""
    if before is None or after is None:
        return before if after is None else after
    if isinstance(after, str) and key not in ("id", "type", "role", "name"):
        return before + after
    if isinstance(after, dict):
        return {k: joined(before.get(k), after.get(k), k) for k in {**before, **after}}
    if isinstance(after, list) and key == "tool_calls":
        return [joined(a, b) for a, b in zip_longest(before, after)]
    return before + after if isinstance(after, list) else after


def without_random(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "drawn" if k in ("id", "created") else without_random(v) for k, v in value.items()}
    if isinstance(value, float):
        return Close(value)
    return [without_random(item) for item in value] if isinstance(value, list) else value


class Close(float):
    """A number that equals what is within the noise of float32: batches are not always cut alike."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and math.isclose(self, other, rel_tol=1e-4, abs_tol=1e-4)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]  # equality is not transitive
