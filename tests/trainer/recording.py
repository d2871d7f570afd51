"""Recorded calls made up for the tests, written into a real store."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from lightning_proxy.store import (
    Fidelity,
    Generation,
    RecordedRollout,
    Reward,
    RewardRule,
    Rollout,
    Span,
    Store,
)

POLICY = "policy"
Call = tuple[Sequence[int], Sequence[int]]  # prompt ids, response ids
Logprobs = Callable[[Sequence[int], Sequence[int]], Sequence[float]]
_clock = itertools.count(1_700_000_000)


def flat(prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    """Logprobs where their values do not matter."""
    return [-1.0 - 0.01 * token for token in response]


def generation(prompt: Sequence[int], response: Sequence[int], logprobs: Logprobs = flat) -> Generation:
    return Generation(
        array("i", prompt), array("i", response), array("f", logprobs(prompt, response)), finish_reason="stop"
    )


def span(rollout_id: str, *generations: Generation, **changes: Any) -> Span:
    """A successful, exact call to the policy; ``changes`` are fields of ``Span``."""
    at = float(next(_clock))
    values: dict[str, Any] = {
        "rollout_id": rollout_id,
        "attempt": 1,
        "wire": "chat",
        "started_at": at,
        "ended_at": at + 0.5,
        "request": b"{}",
        "response": b"{}",
        "fidelity": Fidelity.EXACT,
        "policy": POLICY,
        "policy_version": 0,
        "policy_version_end": 0,
        "status": 200,
        "generations": generations,
    }
    return Span(**values | changes)


def failed_span(rollout_id: str) -> Span:
    return span(
        rollout_id,
        response=None,
        error_class="upstream_status",
        error="boom",
        status=500,
        fidelity=Fidelity.INCOMPLETE,
    )


def recorded(
    rollout_id: str,
    spans: Sequence[Span],
    *rewards: Reward,
    task_id: str | None = None,
    attempt: int = 1,
    incomplete: str | None = None,
) -> RecordedRollout:
    """As the store would give it, without a store."""
    numbered = tuple(
        Span(**{name: getattr(each, name) for name in Span.__slots__} | {"span_id": number})
        for number, each in enumerate(spans, start=1)
    )
    return RecordedRollout(
        Rollout(rollout_id, task_id, incomplete=incomplete),
        attempt,
        numbered,
        rewards,
        value=RewardRule().return_of(rewards),
    )


def record_rollout(
    store: Store,
    rollout_id: str,
    calls: Sequence[Call],
    reward: float | None,
    *,
    task_id: str | None = None,
    logprobs: Logprobs = flat,
    version: int = 0,
) -> None:
    """Write a rollout with its calls and its reward into the store."""
    store.create_rollout(rollout_id=rollout_id, task_id=task_id)
    for prompt, response in calls:
        store.add_span(
            span(
                rollout_id,
                generation(prompt, response, logprobs),
                policy_version=version,
                policy_version_end=version,
            )
        )
    if reward is not None:
        store.add_reward(value=reward, rollout_id=rollout_id)


def record_group(
    store: Store,
    task: str,
    rewards: Sequence[float],
    *,
    logprobs: Logprobs = flat,
    version: int = 0,
    turns: int = 2,
) -> None:
    """One rollout per reward, of ``turns`` calls that extend one another, all of the same task."""
    for member, reward in enumerate(rewards):
        seed = sum(map(ord, task)) + 7 * member + version
        context = [2, 3, 4 + len(task) % 5]
        calls: list[Call] = []
        for turn in range(turns):
            response = [5 + (seed + 11 * turn + 3 * place) % 50 for place in range(3 + member % 3)]
            calls.append((list(context), response))
            context += [*response, 60 + turn % 2]
        name = f"{task}-{version}-{member}"
        record_rollout(store, name, calls, reward, task_id=task, logprobs=logprobs, version=version)
