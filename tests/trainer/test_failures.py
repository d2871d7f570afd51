"""What failures do in training: a table of classes and consequences, and passes over a real store."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lightning_proxy.config.settings import FailureSettings, PolicySettings, Settings, StoreSettings
from lightning_proxy.config.train import TrainSettings
from lightning_proxy.store import (
    INFRASTRUCTURE,
    ErrorClass,
    Fidelity,
    Finding,
    RecordedRollout,
    Reward,
    RolloutState,
    Span,
    Store,
)
from lightning_proxy.trainer.advantages import assign
from lightning_proxy.trainer.credit import IDENTICAL
from lightning_proxy.trainer.failures import Consequences, classes_of
from lightning_proxy.trainer.groups import form_groups
from lightning_proxy.trainer.report import TrainReport
from lightning_proxy.trainer.run import train_once
from lightning_proxy.trainer.transitions import LeftOut, Terms, TrainableRollout, trainable_rollouts
from tests.trainer.recording import POLICY, generation, recorded, span

E = ErrorClass
OF_A_CALL = (E.REFUSAL, E.TRUNCATED, E.MALFORMED_TOOL_CALL, E.AGENT_LOOP)
OF_THE_END = (E.AGENT_CRASH, E.SILENT_DEATH, E.AGENT_LOOP, E.CONTEXT_OVERFLOW)


def call(*findings: ErrorClass, error: ErrorClass | None = None, ids: int = 1, **changes: Any) -> Span:
    made = span("r", generation([ids], [ids + 1]), **changes)
    if error is not None:
        failure = {"response": None, "error_class": error, "error": "boom", "fidelity": Fidelity.INCOMPLETE}
        return replace(made, generations=(), **failure)  # type: ignore[arg-type]
    return replace(made, findings=tuple(Finding(each, "it is so") for each in findings))


def rollout(
    *spans: Span, value: float = 1.0, failed_by: ErrorClass | None = None, failed: bool = False
) -> RecordedRollout:
    made = recorded("r", spans, Reward("r", value))
    state = RolloutState.FAILED if failed or failed_by else RolloutState.OPEN
    return replace(made, rollout=replace(made.rollout, state=state, error_class=failed_by))


def outcome(of: RecordedRollout, **training: str) -> tuple[TrainableRollout | None, Consequences, LeftOut]:
    left_out = LeftOut()
    consequences = Consequences(training, Terms(POLICY, 100), left_out)
    kept = trainable_rollouts(consequences.keep([of]), Terms(POLICY, 100), left_out)
    applied = consequences.apply(kept)
    return (applied[0] if applied else None), consequences, left_out


def trained(of: RecordedRollout, **training: str) -> list[int]:
    """The first response token of each transition that is trained."""
    kept, _, _ = outcome(of, **training)
    return [] if kept is None else [each.response_ids[0] for each in kept.transitions]


# -- the infrastructure --------------------------------------------------------------------------


@pytest.mark.parametrize("fault", sorted(INFRASTRUCTURE))
def test_a_rollout_that_failed_by_a_fault_of_the_infrastructure_is_dropped_whatever_its_reward(
    fault: ErrorClass,
) -> None:
    for failed_by, value in itertools.product((fault, E.AGENT_CRASH, None), (0.0, 1.0)):
        spans = (call(), call(error=fault))
        kept, consequences, left_out = outcome(rollout(*spans, value=value, failed_by=failed_by, failed=True))
        if fault is E.CLIENT_DISCONNECT and failed_by is not fault:
            assert kept is not None, "that the agent left is how a crash looks from here, not why it crashed"
            continue
        assert kept is None
        assert consequences.counts.as_dict() == {"calls": {fault.value: 1}, "dropped": {fault.value: 1}}
        assert left_out.rollouts == {f"failure_{fault.value}": 1}


@pytest.mark.parametrize("fault", sorted(INFRASTRUCTURE - {E.CAPTURE_FAULT}))
def test_a_fault_that_the_agent_got_over_costs_the_call_and_no_more(fault: ErrorClass) -> None:
    calls = rollout(call(), call(error=fault), call(ids=5))
    kept, _, left_out = outcome(calls)
    assert kept is not None
    assert (kept.value, len(kept.transitions)) == (1.0, 2)
    assert left_out.as_dict() == {"rollouts": {}, "calls": {"error": 1}}
    assert trained(calls, **{fault.value: "drop"}) == []


def test_where_an_answer_could_not_be_read_the_rollout_is_dropped() -> None:
    _, consequences, _ = outcome(rollout(call(), call(error=E.CAPTURE_FAULT), call(ids=5)))
    assert consequences.counts.dropped == {"capture_fault": 1}


def test_a_time_limit_of_the_attempt_is_the_agents_own() -> None:
    assert trained(rollout(call(), failed_by=E.TIMEOUT)) == [2]
    assert trained(rollout(call(), call(error=E.TIMEOUT), failed_by=E.TIMEOUT)) == []


# -- what the policy did -------------------------------------------------------------------------


@pytest.mark.parametrize("error_class", [*OF_A_CALL, E.TOOL_FAILURE])
def test_by_default_the_given_reward_says_it_all(error_class: ErrorClass) -> None:
    kept, consequences, left_out = outcome(rollout(call(), call(error_class, ids=3), value=0.25))
    assert kept is not None
    assert (kept.value, [each.part for each in kept.transitions]) == (0.25, [1.0, 1.0])
    assert consequences.counts.as_dict() == {"calls": {error_class.value: 1}}
    assert left_out.as_dict() == {"rollouts": {}, "calls": {}}


@pytest.mark.parametrize("failed_by", OF_THE_END)
def test_by_default_a_rewarded_rollout_counts_however_its_agent_ended(failed_by: ErrorClass) -> None:
    assert trained(rollout(call(), failed_by=failed_by)) == [2]


@pytest.mark.parametrize("error_class", OF_A_CALL)
def test_each_consequence_does_what_it_says(error_class: ErrorClass) -> None:
    calls = rollout(call(), call(error_class, error_class, ids=3), call(ids=5))
    name = error_class.value

    kept, consequences, left_out = outcome(calls, **{name: "mask"})
    assert kept is not None
    assert ([each.response_ids[0] for each in kept.transitions], kept.value) == ([2, 6], 1.0)
    assert (consequences.counts.masked, left_out.calls) == ({name: 1}, {f"failure_{name}": 1})

    kept, consequences, _ = outcome(calls, **{name: "partial 0.25"})
    assert kept is not None
    assert ([each.part for each in kept.transitions], kept.value) == ([1.0, 0.25, 1.0], 1.0)
    assert consequences.counts.partial == {name: 1}

    kept, consequences, _ = outcome(calls, **{name: "penalty -0.5"})
    assert kept is not None
    assert (kept.value, len(kept.transitions)) == (0.5, 3), "once per call, however often it is in it"
    assert consequences.counts.penalised == {name: 1}

    kept, consequences, _ = outcome(calls, **{name: "drop"})
    assert kept is None
    assert consequences.counts.dropped == {name: 1}


@pytest.mark.parametrize("failed_by", OF_THE_END)
def test_an_end_has_consequences_too(failed_by: ErrorClass) -> None:
    name = failed_by.value
    calls = rollout(call(), call(ids=3), failed_by=failed_by)
    assert trained(calls, **{name: "drop"}) == []
    kept, _, _ = outcome(calls, **{name: "penalty -0.5"})
    assert kept is not None
    assert kept.value == 0.5
    kept, _, _ = outcome(calls, **{name: "partial 0.5"})
    assert kept is not None
    assert [each.part for each in kept.transitions] == [0.5, 0.5]


def test_an_end_that_one_of_the_calls_shows_counts_once() -> None:
    looping = rollout(call(), call(E.AGENT_LOOP, ids=3), failed_by=E.AGENT_LOOP)
    kept, _, _ = outcome(looping, agent_loop="penalty -0.5")
    assert kept is not None
    assert kept.value == 0.5
    kept, _, _ = outcome(looping, agent_loop="partial 0.5")
    assert kept is not None
    assert [each.part for each in kept.transitions] == [1.0, 0.5]


def test_an_overflow_has_no_tokens_of_its_own_so_all_of_its_rollout_stand_for_it() -> None:
    calls = rollout(call(), call(error=E.CONTEXT_OVERFLOW), failed_by=E.CONTEXT_OVERFLOW)
    kept, _, _ = outcome(calls, context_overflow="partial 0.5")
    assert kept is not None
    assert [each.part for each in kept.transitions] == [0.5]
    kept, _, _ = outcome(calls, context_overflow="penalty -1")
    assert kept is not None
    assert kept.value == 0.0


def test_consequences_add_up_and_drop_is_the_last_word() -> None:
    calls = rollout(call(E.TRUNCATED, E.REFUSAL), call(E.TRUNCATED, ids=3))
    kept, _, _ = outcome(calls, truncated="partial 0.5", refusal="partial 0.5")
    assert kept is not None
    assert [each.part for each in kept.transitions] == [0.25, 0.5]
    kept, _, _ = outcome(calls, truncated="penalty -1", refusal="penalty -0.5")
    assert kept is not None
    assert kept.value == -1.5
    assert trained(calls, truncated="mask", refusal="drop") == []


def test_a_rollout_with_nothing_left_to_train_is_left_out_and_counted() -> None:
    kept, _, left_out = outcome(rollout(call(E.TRUNCATED)), truncated="mask")
    assert kept is None
    assert left_out.rollouts == {"no_transition": 1}


def test_what_other_models_do_has_no_consequences_for_the_policy() -> None:
    calls = rollout(call(), call(E.TRUNCATED, policy=None))
    kept, _, _ = outcome(calls, truncated="penalty -1")
    assert kept is not None
    assert kept.value == 1.0


def test_an_answer_that_the_agent_never_saw_is_not_held_against_it() -> None:
    first, again = call(E.TRUNCATED), call(ids=1, retry=1)
    kept, _, _ = outcome(rollout(first, again), truncated="drop")
    assert kept is not None


def test_a_rollout_keeps_its_group_where_its_first_call_is_masked() -> None:
    calls = [rollout(call(E.TRUNCATED), call(ids=3)), rollout(call(), call(ids=7), value=0.0)]
    made = [outcome(each, truncated="mask")[0] for each in calls]
    kept = [replace(each, rollout_id=f"r{i}") for i, each in enumerate(made) if each is not None]
    grouping = form_groups(kept, min_size=2, may_wait=True, left_out=LeftOut())
    assert [len(members) for members in grouping.groups] == [2]


def test_a_part_of_the_credit_is_a_part_of_the_advantage() -> None:
    kept, _, _ = outcome(rollout(call(), call(E.TRUNCATED, ids=3)), truncated="partial 0.5")
    assert kept is not None

    def twice(credits_R: Any, groups_R: Sequence[int], lengths_R: Sequence[int]) -> Any:
        return np.asarray(credits_R) * 2

    [done] = assign([[kept]], credit=IDENTICAL, estimator=twice)
    assert [(each.credit, each.advantage) for each in done.transitions] == [(1.0, 2.0), (0.5, 1.0)]


# -- whose doing a failed tool is ----------------------------------------------------------------


def test_a_failed_tool_is_blamed_on_the_call_that_called_it() -> None:
    failure = replace(call(ids=5), findings=(Finding(E.TOOL_FAILURE, "Error", "call_7"),))
    asked, other = call(response=b'{"id": "call_7"}'), call(response=b'{"id": "call_8"}', ids=3)
    assert classes_of([asked, other, failure]) == {0: [E.TOOL_FAILURE]}
    assert classes_of([other, failure]) == {0: [E.TOOL_FAILURE]}, "its id may have been changed"
    assert classes_of([failure]) == {}
    calls = rollout(asked, other, failure)
    assert trained(calls, tool_failure="mask") == [4, 6]


# -- a pass over a real store --------------------------------------------------------------------


def record(store: Store, name: str, reward: float, *spans: Span) -> None:
    store.create_rollout(rollout_id=name, task_id="task")
    for each in spans:
        store.add_span(replace(each, rollout_id=name))
    store.add_reward(rollout_id=name, value=reward)


def look(store: Store, training: Mapping[str, str] | None = None) -> TrainReport:
    settings = Settings(
        store=StoreSettings(db=store.path),
        policy=PolicySettings(name=POLICY),
        train=TrainSettings(min_rollouts=2),
        failures=FailureSettings(training=dict(training or {})),
    )
    return train_once(settings, store=store, progress=lambda *_: None, dry_run=True)


def test_a_pass_drops_before_it_forms_groups_and_says_what_it_dropped(store: Store) -> None:
    record(store, "good", 1.0, call())
    record(store, "equal", 1.0, call())
    record(store, "outage", 0.0, call(), call(error=E.UPSTREAM_ERROR))
    store.fail_rollout("outage", "exit code 1", E.AGENT_CRASH)
    report = look(store)
    # Without the outage nothing sets the two apart; with its 0 the policy would be praised for luck.
    assert report.left_out["rollouts"] == {"failure_upstream_error": 1, "group_all_equal": 2}
    assert report.failures == {"calls": {"upstream_error": 1}, "dropped": {"upstream_error": 1}}
    assert store.counting_rewards("outage")[0].value == 0.0, "the ledger keeps what was posted"


def test_a_penalty_sets_rollouts_apart_that_the_reward_does_not(store: Store) -> None:
    record(store, "clean", 1.0, call())
    record(store, "sloppy", 1.0, call(E.MALFORMED_TOOL_CALL))
    assert look(store).left_out["rollouts"] == {"group_all_equal": 2}
    report = look(store, {"malformed_tool_call": "penalty -0.5"})
    assert report.counts["rollouts"] == 2
    assert report.failures["penalised"] == {"malformed_tool_call": 1}
