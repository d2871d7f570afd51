"""What the tests of exchange share: real traffic in a database, whichever API it came by."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from typing import Any

from lightning_proxy.store import Fidelity, Generation, Span, Store
from tests.store.support import make_span

Json = dict[str, Any]

TOOLS: list[Json] = [
    {
        "type": "function",
        "function": {
            "name": "sql",
            "description": "Ask the database.",
            "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
        },
    }
]
CALL: Json = {
    "id": "call_1", "type": "function", "function": {"name": "sql", "arguments": '{"q": "SELECT 1"}'},
}  # fmt: skip
QUESTION: list[Json] = [
    {"role": "system", "content": "You help."},
    {"role": "user", "content": "How many?"},
]


def chat_span(
    rollout_id: str, messages: Iterable[Json], reply: Json, number: int = 0, **changes: Any
) -> Span:
    """A chat call with its reply; ``number`` orders the calls of a rollout."""
    request = {"model": "policy", "messages": list(messages), "tools": TOOLS, "temperature": 0.5}
    choice = {"index": 0, "message": {"role": "assistant", **reply}, "finish_reason": "stop"}
    response_id = f"chatcmpl-{rollout_id}-{number}"
    response = {"id": response_id, "model": "policy", "choices": [choice]}
    given: Json = {
        "rollout_id": rollout_id,
        "started_at": 1000.0 + number,
        "ended_at": 1000.5 + number,
        "first_byte_at": 1000.1 + number,
        "request": json.dumps(request).encode(),
        "response": json.dumps(response).encode(),
        "response_id": response_id,
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        "generations": (
            Generation(array("i", [1, 2, 3]), array("i", [4, 5]), array("f", [-0.1, -2.7]), "stop"),
        ),
        "fidelity": Fidelity.EXACT,
    }
    return make_span(**{**given, **changes})


def agent_rollout(
    store: Store, rollout_id: str, *, task_id: str | None = None, reward: float | None = None,
    answer: str = "42", **changes: Any,
) -> list[int]:  # fmt: skip
    """A question, a tool call, its result, the answer: two calls. Returns their ids."""
    store.create_rollout(rollout_id=rollout_id, task_id=task_id, metadata={"seed": 7})
    asked = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "42 rows"}
    again = {**asked, "content": None}  # clients drop the text beside a tool call
    ids = [
        store.add_span(chat_span(rollout_id, QUESTION, asked, 0, **changes)),
        store.add_span(chat_span(rollout_id, [*QUESTION, again, result], {"content": answer}, 1, **changes)),
    ]
    if reward is not None:
        store.add_reward(value=reward, rollout_id=rollout_id, source="grader", comment="as it should be")
    return ids
