"""Examples for DSPy: one JSON list, each of which ``dspy.Example(**row).with_inputs(...)`` takes.

A conversation is an example. Its inputs are what the task said (the fields of the rollout's metadata under
``input``, where there are any) or else the ``question``, the first user message; its ``answer`` is the last
reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import orjson

from lightning_proxy.store import Store

from .conversations import Conversation, conversations_of
from .files import whole_file
from .messages import SYSTEM, USER, Json
from .records import RecordedAttempt, Selection, attempts, demonstration_of, spans_of

_LABELS = ("answer", "reward", "rollout_id", "task_id", "role", "input_keys")


def write(store: Store, selection: Selection, path: Path) -> int:
    """Write the examples of the selection; returns how many."""
    count = 0
    with whole_file(path) as part, part.open("wb") as file:
        file.write(b"[")
        for recorded in attempts(store, selection):
            found = conversations_of(recorded, spans_of(store, recorded, selection))
            for row in examples(recorded, found):
                file.write((b",\n" if count else b"\n") + orjson.dumps(row))
                count += 1
        file.write(b"\n]\n")
    return count


def examples(recorded: RecordedAttempt, found: Iterable[Conversation]) -> Iterator[Json]:
    """One row per conversation with an answer; ``input_keys`` names the inputs among its fields."""
    right = {reward.span_id: text for reward in recorded.ledger if (text := demonstration_of(reward))}
    for conversation in found:
        if not conversation.reply.content or conversation.redacted:
            continue
        inputs = _inputs(recorded, conversation)
        answer = right.get(conversation.span_ids[-1], right.get(None, conversation.reply.content))
        yield {
            **inputs,
            "answer": answer,
            "reward": conversation.reward,
            "rollout_id": conversation.rollout_id,
            "task_id": conversation.task_id,
            "role": conversation.role,
            "input_keys": list(inputs),
        }


def _inputs(recorded: RecordedAttempt, conversation: Conversation) -> Json:
    given = recorded.rollout.metadata.get("input")
    if isinstance(given, Mapping) and given and not set(given) & set(_LABELS):
        return dict(given)
    if isinstance(given, str) and given:
        return {"question": given}
    asked = (message.content for message in conversation.messages if message.role == USER)
    instructions = "\n\n".join(m.content for m in conversation.messages if m.role == SYSTEM)
    question = {"question": next(asked, "")}
    return {"instructions": instructions, **question} if instructions else question
