"""Answers of ``/v1/responses``, made comparable."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

# What is drawn at random: 16 hexadecimal digits by vLLM, 32 by the fake engine.
_DRAWN = re.compile(r"^(resp_|msg_|fc_|rs_|call_|chatcmpl-tool-)?([0-9a-f]{16}|[0-9a-f]{32})$")
_GROWS = {"delta": None, "logprobs": None}


def comparable(body: str, number: Callable[[float], object] = float) -> Any:
    """An answer without what chance decides: ids drawn, times, and how many tokens share a delta.

    A whole answer as it is; a stream as the fields of its events in their order, and the events.
    ``number`` makes floats comparable.
    """
    names: dict[str, str] = {}

    def plain(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: plain(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if key == "created_at":
            return "a time"
        if isinstance(value, str) and (drawn := _DRAWN.match(value)):
            return names.setdefault(value, f"{drawn.group(1)}{len(names)}")
        return number(value) if isinstance(value, float) else value

    if not body.startswith("event:"):
        return plain(json.loads(body))
    events: list[Any] = []
    for position, event in enumerate(body.removesuffix("\n\n").split("\n\n")):
        name, data = event.split("\n")
        said = plain(json.loads(data.removeprefix("data: ")))
        assert said.pop("sequence_number") == position
        assert name == f"event: {said['type']}"
        if events and "delta" in said and {**events[-1], **_GROWS} == {**said, **_GROWS}:
            events[-1]["delta"] += said["delta"]
            if "logprobs" in said:
                events[-1]["logprobs"] += said["logprobs"]
        else:
            events.append(said)
    return [list(event) for event in events], events
