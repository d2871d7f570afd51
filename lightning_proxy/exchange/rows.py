"""Rollouts and spans as rows of named, typed columns: the same in JSON lines and in Parquet.

What has a form of its own in each row (metadata, sampling parameters, tool arguments, schemas) is a
column of JSON text, so that the types of all columns are the same for every row. ``None`` is "not
known"; a list that holds nothing is empty, never ``None``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from lightning_proxy.store import Generation, Reward, Span

from .messages import Exchange, Json, Message, exchange_of, to_json
from .records import RecordedAttempt, demonstration_of

TEXT, INT, REAL, FLAG, IDS, LOGPROBS = "string", "int64", "float64", "bool", "int32[]", "float32[]"

# A column's type: one of the above, a list of one type, or fields with their types.
Type: TypeAlias = "str | list[Any] | Mapping[str, Any]"
Columns: TypeAlias = Mapping[str, Type]

_MESSAGE: Columns = {
    "role": TEXT,
    "content": TEXT,
    "reasoning": TEXT,
    "tool_calls": [{"id": TEXT, "name": TEXT, "arguments": TEXT}],
    "tool_call_id": TEXT,
    "parts": TEXT,
}
_TOOL: Columns = {"type": TEXT, "name": TEXT, "description": TEXT, "parameters": TEXT}
_GENERATION: Columns = {
    "prompt_token_ids": IDS,
    "response_token_ids": IDS,
    "logprobs": LOGPROBS,
    "finish_reason": TEXT,
}
_REWARD: Columns = {
    "name": TEXT,
    "value": REAL,
    "counts": FLAG,
    "attempt": INT,
    "span_id": INT,
    "source": TEXT,
    "comment": TEXT,
    "demonstration": TEXT,
    "created_at": REAL,
}
_CALL: Columns = {
    "span_id": INT,
    "role": TEXT,
    "wire": TEXT,
    "model": TEXT,
    "policy": TEXT,
    "policy_version": INT,
    "policy_version_end": INT,
    "started_at": REAL,
    "first_byte_at": REAL,
    "ended_at": REAL,
    "streamed": FLAG,
    "status": INT,
    "retry": INT,
    "attributed_by": TEXT,
    "attribution_confidence": REAL,
    "response_id": TEXT,
    "fidelity": TEXT,
    "redacted": TEXT,
    "error_class": TEXT,
    "error": TEXT,
    "messages": [_MESSAGE],
    "replies": [{**_MESSAGE, "finish_reason": TEXT}],
    "tools": [_TOOL],
    "sampling": TEXT,
    "usage": TEXT,
    "prompt_tokens": INT,
    "completion_tokens": INT,
    "generations": [_GENERATION],
    "request": TEXT,
    "response": TEXT,
}
_ROLLOUT: Columns = {
    "rollout_id": TEXT,
    "attempt": INT,
    "is_last_attempt": FLAG,
    "task_id": TEXT,
    "state": TEXT,
    "metadata": TEXT,
    "reward": REAL,
    "rewards": [_REWARD],
}

#: One row per call.
SPAN_COLUMNS: Columns = {**_ROLLOUT, **_CALL}
#: One row per attempt of a rollout.
ROLLOUT_COLUMNS: Columns = {
    **_ROLLOUT,
    "reason": TEXT,
    "rollout_error_class": TEXT,
    "incomplete": TEXT,
    "begun_at": REAL,
    "finished_at": REAL,
    "spans": [_CALL],
}


def span_row(recorded: RecordedAttempt, span: Span, *, tokens: bool = True, raw: bool = False) -> Json:
    """A call as a row of ``SPAN_COLUMNS``; its rewards are its own, ``reward`` is the attempt's.

    ``tokens``: with token ids and logprobs; ``raw``: with the bodies of request and response.
    """
    rewards = [reward for reward in recorded.ledger if reward.span_id == span.span_id]
    return {**_of_rollout(recorded, rewards), **_call(span, tokens=tokens, raw=raw)}


def rollout_row(
    recorded: RecordedAttempt, spans: Sequence[Span], *, tokens: bool = True, raw: bool = False
) -> Json:
    """An attempt with all of its calls as a row of ``ROLLOUT_COLUMNS``; the rest: :func:`span_row`."""
    attempt = recorded.attempt
    return {
        **_of_rollout(recorded, recorded.ledger),
        "state": attempt.state.value,
        "reason": attempt.reason or (recorded.rollout.reason if recorded.is_last else None),
        "rollout_error_class": None if attempt.error_class is None else attempt.error_class.value,
        "incomplete": recorded.rollout.incomplete,
        "begun_at": attempt.started_at,
        "finished_at": attempt.ended_at,
        "spans": [_call(span, tokens=tokens, raw=raw) for span in spans],
    }


def usage_of(span: Span) -> tuple[int | None, int | None]:
    """Tokens read and written: the captured ones, else what the engine said."""
    if span.generations and any(len(generation.prompt_token_ids) for generation in span.generations):
        read = len(span.generations[0].prompt_token_ids)
        return read, sum(len(generation.response_token_ids) for generation in span.generations)
    usage = span.usage or {}
    read = usage.get("prompt_tokens", usage.get("input_tokens"))
    written = usage.get("completion_tokens", usage.get("output_tokens"))
    return (read if isinstance(read, int) else None), (written if isinstance(written, int) else None)


def huggingface_features(columns: Columns) -> Json:
    """The columns as ``datasets.Features.from_dict`` takes them."""
    return {name: _feature(kind) for name, kind in columns.items()}


def _feature(kind: Type) -> Any:
    if isinstance(kind, str):
        value = {"dtype": kind.removesuffix("[]"), "_type": "Value"}
        return [value] if kind.endswith("[]") else value
    return [_feature(kind[0])] if isinstance(kind, list) else huggingface_features(kind)


def _of_rollout(recorded: RecordedAttempt, rewards: Sequence[Reward]) -> Json:
    rollout = recorded.rollout
    counting = {reward.reward_id for reward in recorded.counting}
    return {
        "rollout_id": rollout.rollout_id,
        "attempt": recorded.attempt.number,
        "is_last_attempt": recorded.is_last,
        "task_id": rollout.task_id,
        "state": recorded.attempt.state.value,
        "metadata": to_json(rollout.metadata),
        "reward": recorded.reward,
        "rewards": [_reward(reward, reward.reward_id in counting) for reward in rewards],
    }


def _reward(reward: Reward, counts: bool) -> Json:
    made = {"counts": counts, "demonstration": demonstration_of(reward)}
    return made | {name: getattr(reward, name) for name in _REWARD if name not in made}


def _call(span: Span, *, tokens: bool, raw: bool) -> Json:
    said = exchange_of(span)
    read, written = usage_of(span)
    row: Json = {name: getattr(span, name, None) for name in _CALL}
    return row | {
        "fidelity": span.fidelity.value,
        **_said(said),
        "sampling": to_json(span.sampling),
        "usage": None if span.usage is None else to_json(span.usage),
        "prompt_tokens": read,
        "completion_tokens": written,
        "generations": [_generation(generation) for generation in span.generations] if tokens else [],
        "request": span.request.decode("utf-8", "replace") if raw else None,
        "response": span.response.decode("utf-8", "replace") if raw and span.response else None,
    }


def _said(said: Exchange) -> Json:
    return {
        "messages": [_message(message) for message in said.messages],
        "replies": [
            _message(reply.message) | {"finish_reason": reply.finish_reason} for reply in said.replies
        ],
        "tools": [asdict(tool) for tool in said.tools],
    }


def _message(message: Message) -> Json:
    return asdict(message) | {"tool_calls": [asdict(call) for call in message.tool_calls]}


def _generation(generation: Generation) -> Json:
    return {
        "prompt_token_ids": generation.prompt_token_ids.tolist(),
        "response_token_ids": generation.response_token_ids.tolist(),
        "logprobs": generation.logprobs.tolist(),
        "finish_reason": generation.finish_reason,
    }
