"""Candidates made up for the tests, and a tokenizer that needs no tokenizer."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_proxy.store import Reward, Span
from lightning_proxy.trainer.algorithms.candidates import Candidates
from lightning_proxy.trainer.algorithms.demonstrations import Demonstrated
from lightning_proxy.trainer.transitions import Reason, TrainableRollout, Transition

Call = tuple[Sequence[int], Sequence[int]]


def transition(rollout_id: str, prompt: Sequence[int], response: Sequence[int], **changes: Any) -> Transition:
    made = Transition(
        rollout_id=rollout_id,
        attempt=1,
        span_id=None,
        choice=0,
        role=None,
        policy_version=0,
        prompt_ids=array("i", prompt),
        response_ids=array("i", response),
        logprobs=array("f", [-1.0] * len(response)),
    )
    return replace(made, **changes)


def rollout(
    rollout_id: str,
    value: float,
    *calls: Call,
    task: str | None = "task",
    companions: Sequence[float] = (),
    spans: Sequence[int] = (),
) -> TrainableRollout:
    made = [transition(rollout_id, *call) for call in calls or [([1, 2], [3 + int(10 * abs(value))])]]
    numbered = [replace(each, span_id=spans[i] if spans else None) for i, each in enumerate(made)]
    former = tuple(
        TrainableRollout(f"former-{i}", None, each, (), baseline_only=True)
        for i, each in enumerate(companions)
    )
    return TrainableRollout(
        rollout_id, task, value, tuple(numbered), again=bool(companions), companions=former
    )


def demonstrated(
    rollout_id: str, right: Sequence[int], answered: Sequence[int], *, span_id: int = 1
) -> Demonstrated:
    return Demonstrated(
        transition(rollout_id, [1, 2], right, span_id=span_id),
        transition(rollout_id, [1, 2], answered, span_id=span_id),
    )


def candidates_of(
    rollouts: Sequence[TrainableRollout], demonstrations: Sequence[Demonstrated] = ()
) -> Candidates:
    return Candidates(rollouts, demonstrations)


class Letters:
    """Each letter is a token; what cannot be rendered is an exclamation mark."""

    def tokens(self, span: Span, demonstration: str | Mapping[str, Any]) -> array[int] | Reason:
        text = demonstration if isinstance(demonstration, str) else str(demonstration["content"])
        return Reason.UNRENDERABLE if text == "!" else array("i", map(ord, text))


def shown(text: str, **target: Any) -> Reward:
    return Reward("a", None, demonstration=text, **target)
