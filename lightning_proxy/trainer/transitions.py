"""A recorded rollout as transitions: (state, action, reward, next state), one per generation."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from lightning_proxy.store import (
    Fidelity,
    Generation,
    Payment,
    RecordedRollout,
    RewardRule,
    Span,
)
from lightning_proxy.trainer.ages import Ages
from lightning_proxy.trainer.prompts import normalised_prompt
from lightning_proxy.trainer.sampling import (
    LOGPROBS_MODE,
    PLAIN,
    PROCESSED,
    UNKNOWN_MODE,
    Sampling,
    Unknowable,
    sampling_of,
)


class Reason(StrEnum):
    """Why something recorded is not trained on. What the count counts is said beside each."""

    INCOMPLETE_ROLLOUT = "incomplete_rollout"  # rollouts: capture lost a span of it
    NO_REWARD = "no_reward"  # rollouts: its rewards belong to an earlier attempt
    NO_TRANSITION = "no_transition"  # rollouts: each of its calls was left out
    GROUP_TOO_SMALL = "group_too_small"  # rollouts: nothing to compare them with
    ROLE_ALONE = "role_alone"  # calls of a role that too few of the group have a return for
    GROUP_GONE = "group_gone"  # rollouts that come again, and those they were compared with were deleted
    GROUP_ALL_EQUAL = "group_all_equal"  # rollouts: the group's returns do not differ: no gradient
    ERROR = "error"  # calls that ended in an error
    SUPERSEDED = "superseded"  # calls whose answer the agent's SDK did not get, and tried again
    OTHER_POLICY = "other_policy"  # calls to another model
    OTHER_ROLE = "other_role"  # calls of a role that is not to be trained
    REDACTED = "redacted"  # calls of which something was taken out, and their token ids with it
    NOT_EXACT = "not_exact"  # calls without the engine's own token ids
    NO_LOGPROBS = "no_logprobs"  # generations without a finite logprob for every token
    EMPTY = "empty"  # generations without a token, or with an empty prompt
    GREEDY = "greedy"  # calls at temperature 0: nothing was sampled, so nothing is learnt from the choice
    PENALISED = "penalised"  # calls with penalties or biases: the distribution cannot be computed again
    CONSTRAINED = "constrained"  # calls whose tokens a grammar chose among (forced tools, formats)
    MALFORMED_SAMPLING = "malformed_sampling"  # calls with a sampling parameter that is no number
    UNKNOWN_LOGPROBS = "unknown_logprobs"  # calls sampled at another temperature, or cut, by an earlier
    # version, of which the engine told the logprobs of the model's own distribution; or nobody knows which
    TOO_OLD = "too_old"  # calls that weights more than max_version_age updates away answered
    TRAINED_BEFORE = "trained_before"  # calls that a run has trained on for the return that it still has
    TOO_LONG = "too_long"  # generations whose prompt and response exceed max_row_tokens
    # Of SFT and DPO; calls that demonstrations and pairs are about are left out for the reasons above, too.
    BELOW_BEST = "below_best"  # rollouts: another of the group was worth more
    BELOW_MIN_RETURN = "below_min_return"  # rollouts: the best of the group, but not good enough
    NO_PAIR = "no_pair"  # rollouts: neither the best nor the worst of their group
    NO_CALL = "no_call"  # demonstrations: there is no such call, or none that ended well
    UNRENDERABLE = "unrenderable"  # demonstrations that cannot be put into the model's own tokens
    PROMPT_DIFFERS = "prompt_differs"  # demonstrations: the chat template gives another prompt than was
    # recorded; pairs: the two rollouts were not asked the same
    SAME_ANSWER = "same_answer"  # pairs: chosen and rejected are the same tokens
    SMALL_GAP = "small_gap"  # pairs: returns closer than dpo_min_gap


@dataclass(frozen=True, slots=True)
class Group:
    """The group that a rollout is compared within, and how it was found (``groups``)."""

    method: str
    key: str


@dataclass(frozen=True, slots=True)
class Transition:
    """One generation as a step of the agent's Markov decision process (arXiv 2508.03680, LightningRL).

    State: the prompt. Action: the response. Reward: the credit. Next state: the prompt of the next
    call of the rollout, ``None`` at its end. Group, credit and advantage are ``None`` until assigned.
    """

    rollout_id: str
    attempt: int
    span_id: int | None
    choice: int
    role: str | None
    policy_version: int | None  # when the call was sent
    prompt_ids: array[int]
    response_ids: array[int]
    logprobs: array[float]  # the engine's own, one per response token
    sampling: Sampling = PLAIN  # the distribution that the response was sampled from
    # The logprobs are those of the model's own distribution, though it was sampled from another.
    logprobs_are_raw: bool = False
    policy_version_end: int | None = None  # when its last token was made
    next_prompt_ids: array[int] | None = None
    step: int = 0  # of the rollout's steps
    group: Group | None = None
    part: float = 1.0  # of credit and advantage that it gets; less than 1 for some failures (``failures``)
    credit: float | None = None
    advantage: float | None = None

    @property
    def sampled_by(self) -> int:
        """The one version whose weights sampled the response; -1 where that is not known or not one."""
        one = self.policy_version is not None and self.policy_version == self.policy_version_end
        return self.policy_version if one and self.policy_version is not None else -1


class Step(NamedTuple):
    """A call that the policy made, in one of the roles to be trained, whether it can be trained on or not."""

    span_id: int | None
    role: str | None


@dataclass(frozen=True, slots=True)
class TrainableRollout:
    """A rollout's transitions in order of time, with its return and what that is made of.

    One that is ``baseline_only`` was trained on by an earlier run and has no transitions here: its return
    is what others of its group are compared with.
    """

    rollout_id: str
    task_id: str | None
    value: float
    transitions: tuple[Transition, ...]
    again: bool = False  # trained on before, for another return or without its last calls
    companions: tuple[TrainableRollout, ...] = ()  # where again: its former group, for comparison only
    baseline_only: bool = False
    first_prompt_ids: array[int] | None = None  # of all steps, those too that are not trained on
    steps: tuple[Step, ...] = ()
    payments: tuple[Payment, ...] = ()
    normalised_prompt: str | None = None  # where first prompts are compared by that
    baseline_key: str | None = None  # whose running baseline it has, as the rollout's metadata say

    @property
    def advantages(self) -> tuple[float, ...]:
        """The advantages that its transitions have, each once."""
        return tuple(dict.fromkeys(each.advantage for each in self.transitions if each.advantage is not None))

    def steps_paid(self, payments: Sequence[Payment]) -> list[int]:
        """The step at which each payment is made: see ``credit``. The last, where it is for no call."""
        at = {step.span_id: place for place, step in enumerate(self.steps)}

        def step_of(span_id: int | None) -> int:
            if span_id is None:
                return len(self.steps) - 1
            if span_id in at:
                return at[span_id]
            return max((place for known, place in at.items() if known and known < span_id), default=0)

        return [step_of(each.span_id) for each in payments]


@dataclass(slots=True)
class LeftOut:
    """Counts of what is not trained on, by reason."""

    rollouts: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    demonstrations: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, dict[str, int]]:
        """For the report: ``{"rollouts": {reason: n}, "calls": {reason: n}}``, and the others if any."""
        counts = {"rollouts": self.rollouts, "calls": self.calls}
        others = {"demonstrations": self.demonstrations, "pairs": self.pairs}
        counts |= {kind: of for kind, of in others.items() if of}
        return {
            kind: {str(reason): number for reason, number in sorted(of.items())}
            for kind, of in counts.items()
        }


@dataclass(frozen=True, slots=True)
class Terms:
    """What a call must be to be trained on."""

    policy: str
    max_tokens: int  # of prompt and response together
    roles: tuple[str, ...] = ()  # none: all
    version: int | None = None  # whose weights the trainer has: what was sampled from them it can compute
    ages: Ages | None = None  # which versions are too old; None: none is
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)  # see `sampling.engine_defaults`
    rule: RewardRule = field(default_factory=RewardRule)
    normalised_prompts: bool = False  # rollouts of the same task are told by them
    # Whether the loss is about what was sampled. Where it is about likelihood alone, it does not matter how
    # the tokens came about, nor how likely they were then.
    sampled: bool = True


def trainable_rollouts(
    recorded: Iterable[RecordedRollout], terms: Terms, left_out: LeftOut
) -> list[TrainableRollout]:
    """The rollouts that can be trained on; each other one, and each call left out, is counted."""
    kept = []
    for each in recorded:
        if each.rollout.incomplete is not None:
            left_out.rollouts[Reason.INCOMPLETE_ROLLOUT] += 1
        elif each.value is None:
            left_out.rollouts[Reason.NO_REWARD] += 1
        elif transitions := transitions_of(each, terms, left_out):
            kept.append(_trainable(each, each.value, transitions, terms))
        else:
            left_out.rollouts[Reason.NO_TRANSITION] += 1
    return kept


def _trainable(
    recorded: RecordedRollout, value: float, transitions: tuple[Transition, ...], terms: Terms
) -> TrainableRollout:
    steps = [recorded.spans[position] for position in steps_of(recorded.spans, terms)]
    key = recorded.rollout.metadata.get("baseline_key")
    return TrainableRollout(
        recorded.rollout.rollout_id,
        recorded.rollout.task_id,
        value,
        transitions,
        again=recorded.again,
        first_prompt_ids=first_prompt(steps),
        steps=tuple(Step(span.span_id, span.role) for span in steps),
        payments=terms.rule.payments(recorded.rewards),
        normalised_prompt=normalised_prompt(steps[0].request) if terms.normalised_prompts else None,
        baseline_key=None if key is None else str(key),
    )


def to_compare_with(recorded: RecordedRollout, terms: Terms) -> TrainableRollout:
    """One that an earlier run trained on, for its return alone. It has one."""
    assert recorded.value is not None
    steps = [recorded.spans[position] for position in steps_of(recorded.spans, terms)]
    return TrainableRollout(
        recorded.rollout.rollout_id,
        recorded.rollout.task_id,
        recorded.value,
        (),
        baseline_only=True,
        steps=tuple(Step(span.span_id, span.role) for span in steps),
        payments=terms.rule.payments(recorded.rewards),
    )


def steps_of(spans: Sequence[Span], terms: Terms) -> dict[int, int]:
    """Places among ``spans`` of the rollout's steps, and the number of each.

    Calls that ended well, but for those that were tried again: what the policy did, trained on or not.
    """
    unseen = superseded(spans)
    places = [
        position
        for position, span in enumerate(spans)
        if position not in unseen and _why_not_ours(span, terms) is None
    ]
    return {position: number for number, position in enumerate(places)}


def first_prompt(steps: Iterable[Span]) -> array[int] | None:
    """The first prompt of a rollout whose token ids are known, whether that call is trained on or not.

    So what is left out of a rollout never changes which others it is compared with.
    """
    return next(
        (one.prompt_token_ids for span in steps for one in span.generations if one.prompt_token_ids), None
    )


def transitions_of(recorded: RecordedRollout, terms: Terms, left_out: LeftOut) -> tuple[Transition, ...]:
    """One transition per generation that the policy made, in order of time."""
    made: list[Transition] = []
    unseen = superseded(recorded.spans)
    steps = steps_of(recorded.spans, terms)
    for position, span in enumerate(recorded.spans):
        if reason := Reason.SUPERSEDED if position in unseen else why_not_span(span, terms):
            left_out.calls[reason] += 1
            continue
        if recorded.trained_until is not None and (span.span_id or 0) <= recorded.trained_until:
            left_out.calls[Reason.TRAINED_BEFORE] += 1
            continue
        if terms.ages is not None and terms.ages.too_old(span.policy_version):
            left_out.calls[Reason.TOO_OLD] += 1
            continue
        sampling = sampling_of(span.sampling, terms.sampling_defaults) if terms.sampled else PLAIN
        if isinstance(sampling, Unknowable):
            left_out.calls[Reason(sampling.value)] += 1
            continue
        mode = span.sampling.get(LOGPROBS_MODE)
        raw = sampling != PLAIN and mode != PROCESSED
        here = span.policy_version == span.policy_version_end == terms.version
        if raw and (mode == UNKNOWN_MODE or not here):
            left_out.calls[Reason.UNKNOWN_LOGPROBS] += 1
            continue
        for choice, generation in enumerate(span.generations):
            if reason := why_not_generation(generation, terms):
                left_out.calls[reason] += 1
                continue
            made.append(
                Transition(
                    rollout_id=span.rollout_id,
                    attempt=span.attempt,
                    span_id=span.span_id,
                    choice=choice,
                    role=span.role,
                    policy_version=span.policy_version,
                    prompt_ids=generation.prompt_token_ids,
                    response_ids=generation.response_token_ids,
                    logprobs=generation.logprobs if terms.sampled else told_logprobs(generation),
                    sampling=sampling,
                    logprobs_are_raw=raw,
                    policy_version_end=span.policy_version_end,
                    next_prompt_ids=_next_prompt(recorded.spans, position + 1, unseen, terms.policy),
                    step=steps[position],
                )
            )
    return tuple(made)


def superseded(spans: Sequence[Span]) -> frozenset[int]:
    """Positions of the calls that ended well but were tried again: the agent never saw their answers.

    A span marked as retry ``k`` repeats an earlier one with the same request that is retry ``k - 1``
    (where that never reached us, the nearest before it). Of several such, equal but for the answer, it
    is one that failed, for a failure is what SDKs repeat; else the one that ended last. What failed is
    no transition anyway, and counts as the error that it is.
    """
    repeated: set[int] = set()
    for position, span in enumerate(spans):
        if not span.retry:
            continue
        earlier = [
            index
            for index, other in enumerate(spans[:position])
            if index not in repeated and other.retry < span.retry and other.request == span.request
        ]
        if earlier:
            repeated.add(max(earlier, key=lambda i: _likeliest_before(spans[i])))
    return frozenset(index for index in repeated if spans[index].error_class is None)


def _likeliest_before(span: Span) -> tuple[int, bool, float]:
    return span.retry, span.error_class is not None, span.ended_at


def _why_not_ours(span: Span, terms: Terms) -> Reason | None:
    if span.error_class is not None:
        return Reason.ERROR
    if span.policy != terms.policy:
        return Reason.OTHER_POLICY
    if terms.roles and span.role not in terms.roles:
        return Reason.OTHER_ROLE
    return None


def why_not_span(span: Span, terms: Terms) -> Reason | None:
    """Why nothing of a call can be trained on, if so."""
    if reason := _why_not_ours(span, terms):
        return reason
    if span.redacted is not None:
        return Reason.REDACTED
    known = span.fidelity is Fidelity.EXACT or (
        span.fidelity is Fidelity.RETOKENIZED and not terms.sampled  # has ids, but nobody's logprobs
    )
    if not known or not span.generations:
        return Reason.NOT_EXACT
    return None


def why_not_generation(generation: Generation, terms: Terms) -> Reason | None:
    """Why one of a call's generations cannot be trained on, if so."""
    prompt, response = len(generation.prompt_token_ids), len(generation.response_token_ids)
    if not prompt or not response:
        return Reason.EMPTY
    if terms.sampled and not _all_told(generation):
        return Reason.NO_LOGPROBS
    if prompt + response > terms.max_tokens:
        return Reason.TOO_LONG
    return None


def unknown_logprobs(count: int) -> array[float]:
    """Not a number: what nobody told is not a probability of 1."""
    return array("f", [math.nan]) * count


def told_logprobs(generation: Generation) -> array[float]:
    """One per response token; unknown unless the engine told all of them."""
    if _all_told(generation):
        return generation.logprobs
    return unknown_logprobs(len(generation.response_token_ids))


def _all_told(generation: Generation) -> bool:
    complete = len(generation.logprobs) == len(generation.response_token_ids)
    return complete and all(map(math.isfinite, generation.logprobs))


def _next_prompt(spans: Sequence[Span], start: int, unseen: frozenset[int], policy: str) -> array[int] | None:
    for position in range(start, len(spans)):
        span = spans[position]
        if position not in unseen and span.policy == policy and span.generations and not span.redacted:
            return span.generations[0].prompt_token_ids
    return None
