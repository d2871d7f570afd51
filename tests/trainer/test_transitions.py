from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from lightning_proxy.store import Fidelity, PolicyVersion, RecordedRollout, Reward, Span, VersionStatus
from lightning_proxy.trainer.ages import Ages
from lightning_proxy.trainer.groups import group_of
from lightning_proxy.trainer.transitions import (
    LeftOut,
    Reason,
    Terms,
    TrainableRollout,
    superseded,
    trainable_rollouts,
)
from tests.trainer.recording import POLICY, failed_span, generation, recorded, span


def convert(*rollouts: RecordedRollout, max_tokens: int = 100) -> tuple[list[TrainableRollout], LeftOut]:
    left_out = LeftOut()
    ages = Ages(PolicyVersion(POLICY, 0, "/weights", VersionStatus.ACTIVE), (), most=10)
    return trainable_rollouts(rollouts, Terms(POLICY, max_tokens, ages=ages), left_out), left_out


def reward(value: float = 1.0) -> Reward:
    return Reward("r", value)


def test_each_generation_of_each_call_becomes_one_transition_with_its_next_state() -> None:
    first = span("r", generation([1, 2], [3]), generation([1, 2], [4, 5]))
    second = span("r", generation([1, 2, 3, 9], [6]), role="checker", policy_version=7)
    [rollout], left_out = convert(recorded("r", [first, second], reward(0.5)))
    assert [list(each.response_ids) for each in rollout.transitions] == [[3], [4, 5], [6]]
    assert [(each.span_id, each.choice) for each in rollout.transitions] == [(1, 0), (1, 1), (2, 0)]
    assert rollout.transitions[0].next_prompt_ids == array("i", [1, 2, 3, 9])
    assert rollout.transitions[2].next_prompt_ids is None
    assert rollout.transitions[2].role == "checker"
    assert rollout.transitions[2].policy_version == 7
    assert rollout.value == 0.5
    assert left_out.as_dict() == {"rollouts": {}, "calls": {}}


def test_credit_advantage_and_group_are_none_until_they_are_assigned() -> None:
    [rollout], _ = convert(recorded("r", [span("r", generation([1], [2]))], reward()))
    assert (rollout.transitions[0].credit, rollout.transitions[0].advantage) == (None, None)
    assert rollout.transitions[0].group is None


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (failed_span("r"), Reason.ERROR),
        (span("r", generation([1], [2]), policy=None), Reason.OTHER_POLICY),
        (span("r", generation([1], [2]), policy="gpt"), Reason.OTHER_POLICY),
        (span("r", generation([1], [2]), fidelity=Fidelity.RETOKENIZED), Reason.NOT_EXACT),
        (span("r", fidelity=Fidelity.TEXT), Reason.NOT_EXACT),
        (replace(span("r", fidelity=Fidelity.TEXT), redacted="email"), Reason.REDACTED),
        (span("r", generation([1], [2], lambda *_: [])), Reason.NO_LOGPROBS),
        (span("r", generation([1], [2], lambda *_: [float("nan")])), Reason.NO_LOGPROBS),
        (span("r", generation([1], [2], lambda *_: [float("-inf")])), Reason.NO_LOGPROBS),
        (span("r", generation([1], [])), Reason.EMPTY),
        (span("r", generation([], [1])), Reason.EMPTY),
        (span("r", generation([1] * 99, [2, 3])), Reason.TOO_LONG),
    ],
)
def test_a_call_that_cannot_be_trained_on_is_left_out_and_counted(call: object, reason: Reason) -> None:
    good = span("r", generation([1], [2]))
    [rollout], left_out = convert(recorded("r", [good, call], reward()))  # type: ignore[list-item]
    assert len(rollout.transitions) == 1
    assert left_out.calls == {reason: 1}
    alone, left_out = convert(recorded("r", [call], reward()))  # type: ignore[list-item]
    assert alone == []
    assert left_out.rollouts == {Reason.NO_TRANSITION: 1}


def test_a_rollout_that_lost_a_span_in_capture_is_left_out_whole() -> None:
    calls = [span("r", generation([1], [2]))]
    kept, left_out = convert(recorded("r", calls, reward(), incomplete="the disk was full"))
    assert kept == []
    assert left_out.as_dict() == {"rollouts": {"incomplete_rollout": 1}, "calls": {}}


def test_a_missing_reward_is_not_a_reward_of_zero() -> None:
    kept, left_out = convert(recorded("r", [span("r", generation([1], [2]))]))
    assert kept == []
    assert left_out.rollouts == {Reason.NO_REWARD: 1}


def asked(prompt: int, answer: int, **changes: object) -> Span:
    return span("r", generation([prompt], [answer]), request=b"%d" % prompt, **changes)


def lost(prompt: int, **changes: object) -> Span:
    return replace(failed_span("r"), request=b"%d" % prompt, **changes)  # type: ignore[arg-type]


def test_a_completed_call_that_was_tried_again_is_left_out_counted_and_not_a_next_state() -> None:
    calls = [asked(1, 2), asked(3, 4), asked(3, 5, retry=1), asked(6, 7)]
    [rollout], left_out = convert(recorded("r", calls, reward()))
    assert [list(each.response_ids) for each in rollout.transitions] == [[2], [5], [7]]
    assert rollout.transitions[0].next_prompt_ids == array("i", [3])
    assert rollout.transitions[1].next_prompt_ids == array("i", [6])
    assert left_out.as_dict() == {"rollouts": {}, "calls": {"superseded": 1}}


@pytest.mark.parametrize(
    ("calls", "unseen"),
    [
        ([asked(1, 2), asked(1, 3)], set()),  # asked twice, and both answers seen
        ([lost(1), asked(1, 2, retry=1)], set()),
        ([asked(1, 2), lost(1), asked(1, 3, retry=1)], set()),  # what is repeated is what failed
        ([asked(1, 2), lost(1, retry=1), asked(1, 3, retry=2)], {0}),
        ([asked(1, 2), asked(1, 3, retry=2)], {0}),  # try 1 never reached us
        ([asked(1, 2), asked(1, 3), asked(1, 4, retry=1)], {1}),  # the one that ended last
        ([asked(1, 2), asked(1, 3), asked(1, 4, retry=1), asked(1, 5, retry=1)], {0, 1}),
        ([asked(1, 2), asked(9, 3, retry=1)], set()),  # another request
        ([asked(1, 2, retry=1)], set()),
        ([asked(1, 2), asked(1, 3, retry=1), asked(1, 4, retry=2)], {0, 1}),
    ],
)
def test_a_retry_supersedes_the_try_before_it_and_no_other_call(calls: list[Span], unseen: set[int]) -> None:
    assert superseded(calls) == unseen


def test_only_the_chosen_roles_become_transitions() -> None:
    spans = [
        span("r", generation([1], [2]), role="writer"),
        span("r", generation([1], [3]), role="checker"),
        span("r", generation([1], [4])),
    ]
    left_out = LeftOut()
    [rollout] = trainable_rollouts(
        [recorded("r", spans, reward())], Terms(POLICY, 100, roles=("writer", "rewriter")), left_out
    )
    assert [each.role for each in rollout.transitions] == ["writer"]
    assert left_out.calls == {Reason.OTHER_ROLE: 2}


@pytest.mark.parametrize(
    "first",
    [
        span("r", generation([1, 2], [3]), policy_version=99, policy_version_end=99),  # too old
        span("r", generation([1, 2], [3], lambda *_: [])),
        span("r", generation([1, 2], [])),
        span("r", generation([1, 2], [3] * 99)),
    ],
)
def test_a_rollout_finds_its_group_by_its_first_prompt_though_that_call_is_left_out(first: Span) -> None:
    then = span("r", generation([1, 2, 3, 4], [5]))
    whole = [span("r", generation([1, 2], [3])), then]
    nothing = span("r", fidelity=Fidelity.TEXT)  # nobody knows its tokens
    kept, _ = convert(
        *(recorded("r", calls, reward()) for calls in ([first, then], whole, [nothing, *whole]))
    )
    assert [len(each.transitions) for each in kept] == [1, 2, 2]
    assert [each.first_prompt_ids for each in kept] == [array("i", [1, 2])] * 3
    assert len({group_of(each) for each in kept}) == 1
