"""Demonstrations as training data: the call's own prompt, and what would have been right after it.

An entry of the ledger is for a call, or for a rollout or attempt: then it is for the last call of it that
ended well. Each becomes the tokens that the engine would have made had it given this answer
(``backend.Answers``); what cannot be made so is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lightning_proxy.store import Generation, RecordedRollout, Reward, Span
from lightning_proxy.trainer.backend import Answers
from lightning_proxy.trainer.transitions import (
    LeftOut,
    Reason,
    Terms,
    Transition,
    superseded,
    told_logprobs,
    unknown_logprobs,
    why_not_span,
)


@dataclass(frozen=True, slots=True)
class Demonstrated:
    """A call as it should have been answered, and as it was (its first choice)."""

    right: Transition
    answered: Transition


def demonstrations_of(
    recorded: Iterable[RecordedRollout], terms: Terms, answers: Callable[[], Answers], left_out: LeftOut
) -> list[Demonstrated]:
    """What was demonstrated, in order. ``answers`` is called where there is something to render."""
    found = []
    for each in recorded:
        for shown in each.demonstrations:
            made = _demonstrated(each, shown, terms, answers)
            if isinstance(made, Reason):
                left_out.demonstrations[made] += 1
            else:
                found.append(made)
    return found


def _demonstrated(
    recorded: RecordedRollout, shown: Reward, terms: Terms, answers: Callable[[], Answers]
) -> Demonstrated | Reason:
    span = _call(recorded, shown, terms)
    if isinstance(span, Reason):
        return span
    if reason := why_not_span(span, terms):
        return reason
    generation = span.generations[0]
    if not generation.prompt_token_ids:
        return Reason.EMPTY
    assert shown.demonstration is not None  # the store gives no others
    answer = answers().tokens(span, shown.demonstration)
    if isinstance(answer, Reason):
        return answer
    if len(generation.prompt_token_ids) + len(answer) > terms.max_tokens:
        return Reason.TOO_LONG
    right = Generation(generation.prompt_token_ids, answer, unknown_logprobs(len(answer)))
    return Demonstrated(_transition(span, right), _transition(span, generation))


def _call(recorded: RecordedRollout, shown: Reward, terms: Terms) -> Span | Reason:
    """The call that an entry is for."""
    if shown.span_id is not None:
        return next((span for span in recorded.spans if span.span_id == shown.span_id), Reason.NO_CALL)
    if recorded.rollout.incomplete is not None:
        return Reason.INCOMPLETE_ROLLOUT  # its last call may be what was lost
    return next(reversed(_answered(recorded.spans, terms)), Reason.NO_CALL)


def _answered(spans: Sequence[Span], terms: Terms) -> list[Span]:
    unseen = superseded(spans)
    return [
        span
        for position, span in enumerate(spans)
        if position not in unseen
        and span.error_class is None
        and span.policy == terms.policy
        and (not terms.roles or span.role in terms.roles)
    ]


def _transition(span: Span, generation: Generation) -> Transition:
    return Transition(
        rollout_id=span.rollout_id,
        attempt=span.attempt,
        span_id=span.span_id,
        choice=0,
        role=span.role,
        policy_version=None,  # of a demonstration nobody's; of an answer it does not matter
        prompt_ids=generation.prompt_token_ids,
        response_ids=generation.response_token_ids,
        logprobs=told_logprobs(generation),
    )
