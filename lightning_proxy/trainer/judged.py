"""A rollout as a reward function of the user's sees it: plain values, and the function itself."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from lightning_proxy.errors import ConfigError
from lightning_proxy.store import Reward, Rollout, Span

Judge = Callable[[dict[str, Any]], Mapping[str, float]]


def load_judge(where: str) -> Judge:
    """The function at ``path/to/file.py:name``, whose result is made rewards by name.

    A number counts under the function's own name, a mapping under the names in it, None is no reward.
    Raises ``ConfigError`` where it cannot be loaded; the function raises what it likes, and ``TypeError``
    or ``ValueError`` where what it returns is none of these.
    """
    path, _, name = where.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"automatic_rewards.function: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"lightning_reward_{Path(path).stem}", path)
    assert spec is not None  # the setting's pattern asks for a .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(spec.name)
    sys.modules[spec.name] = module  # dataclasses look there for what a file's annotations mean
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's file raises
        sys.modules.pop(spec.name, None)
        if before is not None:  # an earlier file's of that name, whose functions may still need it
            sys.modules[spec.name] = before
        raise ConfigError(f"automatic_rewards.function: {path} cannot be loaded: {error!r}") from error
    function = module.__dict__.get(name)
    if not callable(function):
        raise ConfigError(f"automatic_rewards.function: {path} has no function {name!r}")

    def judge(rollout: dict[str, Any]) -> Mapping[str, float]:
        with contextlib.redirect_stdout(sys.stderr):  # what we print on stdout is the report
            result = function(rollout)
        if result is None:
            return {}
        named = result if isinstance(result, Mapping) else {name: result}
        return {str(key): _number(value) for key, value in named.items() if value is not None}

    return judge


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no finite number")
    return number


def as_plain(
    rollout: Rollout, attempt: int, spans: Sequence[Span], rewards: Sequence[Reward]
) -> dict[str, Any]:
    """What the function is called with; docs/rewards.md has it."""
    well = [span for span in spans if span.error_class is None]
    messages, reply = _conversation(well[-1]) if well else ([], "")
    return {
        "rollout_id": rollout.rollout_id,
        "task_id": rollout.task_id,
        "attempt": attempt,
        "state": rollout.state.value,
        "reason": rollout.reason,
        "metadata": dict(rollout.metadata),
        "messages": messages,
        "reply": reply,
        "calls": [_call(span) for span in spans],
        "rewards": [{"name": each.name, "value": each.value, "span_id": each.span_id} for each in rewards],
    }


def _call(span: Span) -> dict[str, Any]:
    return {
        "span_id": span.span_id,
        "role": span.role,
        "wire": span.wire,
        "model": span.model,
        "policy_version": span.policy_version,
        "request": _parsed(span.request),
        "response": _parsed(span.response) if span.response is not None else None,
        "error_class": None if span.error_class is None else str(span.error_class),
        "findings": sorted({finding.error_class.value for finding in span.findings}),
    }


def _conversation(span: Span) -> tuple[list[Any], str]:
    """The messages of a call with the reply behind them, in its own API's form, and the reply's text."""
    request, response = _parsed(span.request), _parsed(span.response)
    before = request.get("messages") or request.get("input") or request.get("prompt") or []
    messages = list(before) if isinstance(before, list) else [{"role": "user", "content": before}]
    if "output" in response:  # Responses
        items = [item for item in response["output"] if isinstance(item, dict)]
        parts = [part for item in items for part in item.get("content") or () if isinstance(part, dict)]
        return [*messages, *items], _text(parts)
    if "content" in response:  # Messages
        return [*messages, {"role": "assistant", "content": response["content"]}], _text(response["content"])
    choice: dict[str, Any] = next(iter(response.get("choices") or ()), {})
    message = choice.get("message") or {"role": "assistant", "content": choice.get("text")}
    return [*messages, message], _text(message.get("content"))


def _parsed(body: bytes | None) -> dict[str, Any]:
    """A stored body; empty where it is no JSON object."""
    try:
        value = orjson.loads(body or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
