from __future__ import annotations

from typing import Any

import pytest

from lightning_proxy.errors import Conflict, InvalidInput
from lightning_proxy.store import ErrorClass, Finding, RolloutState, Span, Store, seconds_of
from lightning_proxy.store.retention import delete_rollouts
from tests.store.support import make_span

LOOP = Finding(ErrorClass.AGENT_LOOP, "the same reply 5 times in a row")
TOOL = Finding(ErrorClass.TOOL_FAILURE, "Error: x", "call_1")


def failed(error_class: ErrorClass | str = ErrorClass.UPSTREAM_ERROR, **changes: Any) -> Span:
    return make_span(response=None, generations=(), error_class=error_class, error="boom", **changes)


def test_findings_come_back_with_their_span_and_go_with_it(store: Store) -> None:
    span_id = store.add_span(make_span(findings=(TOOL, LOOP)))
    other = store.add_span(make_span())
    assert store.get_span(span_id).findings == (TOOL, LOOP)
    assert store.get_span(other).findings == ()
    assert [span.findings for span in store.list_spans()] == [(), (TOOL, LOOP)]
    delete_rollouts(store, ["r1"])
    assert store.scalar("SELECT count(*) FROM findings") == 0


def test_an_error_of_a_class_that_is_not_known_any_more_stays_readable(store: Store) -> None:
    known, unknown = store.add_span(failed()), store.add_span(failed("of_old"))
    assert store.get_span(known).error_class is ErrorClass.UPSTREAM_ERROR
    assert store.get_span(unknown).error_class == "of_old"


def test_a_failed_rollout_has_its_root_cause(store: Store) -> None:
    store.add_span(failed(rollout_id="r1"))
    done = store.fail_rollout("r1", "exit code 1", ErrorClass.AGENT_CRASH)
    assert done.error_class is ErrorClass.UPSTREAM_ERROR
    assert done.reason == "exit code 1; its last call ended in upstream_error: boom"
    assert store.list_attempts("r1")[0].error_class is ErrorClass.UPSTREAM_ERROR


def test_only_calls_of_the_last_attempt_are_its_cause(store: Store) -> None:
    store.add_span(failed(rollout_id="r1", attempt=1))
    store.add_span(make_span(rollout_id="r1", attempt=2))
    assert (
        store.fail_rollout("r1", "exit code 1", ErrorClass.AGENT_CRASH).error_class is ErrorClass.AGENT_CRASH
    )


def test_whoever_tells_the_end_has_the_last_word_over_what_was_presumed(store: Store) -> None:
    store.create_rollout(rollout_id="r1")
    assert store.fail_rollout("r1", "silent", ErrorClass.SILENT_DEATH, presumed=True).presumed
    with pytest.raises(Conflict):
        store.fail_rollout("r1", "silent again", ErrorClass.SILENT_DEATH, presumed=True)
    done = store.finish_rollout("r1", RolloutState.SUCCEEDED)
    assert (done.state, done.reason, done.error_class, done.presumed) == (
        RolloutState.SUCCEEDED,
        None,
        None,
        False,
    )
    with pytest.raises(Conflict):
        store.fail_rollout("r1")


# -- silence -------------------------------------------------------------------------------------


def silent(store: Store, before: float, limit: int = 100) -> tuple[list[str], bool]:
    with store.transaction():
        return store.fallen_silent(before, limit)


def test_a_rollout_is_silent_once_its_last_call_is_old_enough_and_is_told_once(store: Store) -> None:
    store.add_span(make_span(rollout_id="a", ended_at=100.0))
    store.add_span(make_span(rollout_id="b", ended_at=101.0))
    store.add_span(make_span(rollout_id="a", ended_at=200.0))
    assert silent(store, 99.0) == ([], False)
    assert silent(store, 150.0) == (["b"], False)
    assert silent(store, 150.0) == ([], False)
    assert silent(store, 250.0) == (["a"], False)


def test_who_has_ended_or_has_a_reward_is_not_silent(store: Store) -> None:
    for name in "abc":
        store.add_span(make_span(rollout_id=name, ended_at=100.0))
    store.finish_rollout("a", RolloutState.SUCCEEDED)
    store.add_reward(value=1.0, rollout_id="b")
    assert silent(store, 150.0) == (["c"], False)


def test_many_calls_are_looked_at_a_few_at_a_time(store: Store) -> None:
    for number in range(5):
        store.add_span(make_span(rollout_id=f"r{number}", ended_at=100.0))
    assert silent(store, 150.0, 2) == (["r0", "r1"], True)
    assert silent(store, 150.0, 2) == (["r2", "r3"], True)
    assert silent(store, 150.0, 2) == (["r4"], False)


# -- in numbers ----------------------------------------------------------------------------------


def fill(store: Store) -> None:
    for at in range(10):
        store.add_span(make_span(rollout_id=f"good{at}", ended_at=float(at)))
    store.add_span(failed(rollout_id="a", ended_at=20.0, role="writer"))
    store.add_span(failed(rollout_id="a", ended_at=30.0, role="checker"))
    store.add_span(failed(ErrorClass.RATE_LIMITED, rollout_id="b", ended_at=40.0, role="writer"))
    store.add_span(make_span(rollout_id="c", ended_at=50.0, findings=(TOOL, TOOL, LOOP)))
    store.create_rollout(rollout_id="d")
    store.fail_rollout("d", "exit code 1", ErrorClass.AGENT_CRASH)
    store.fail_rollout("a", "exit code 2", ErrorClass.AGENT_CRASH)


def test_each_class_is_counted_with_its_first_and_last_example(store: Store) -> None:
    fill(store)
    found = {each.error_class: each for each in store.failures()}
    error = found["upstream_error"]
    assert (error.calls, error.rollouts, error.failed_rollouts, error.share) == (2, 1, 1, 2 / 14)
    assert (error.first.at, error.first.span_id, error.first.message) == (20.0, 11, "boom")
    assert error.last.message == "exit code 2; its last call ended in upstream_error: boom"
    crash = found["agent_crash"]
    assert (crash.calls, crash.rollouts, crash.failed_rollouts, crash.share) == (0, 1, 1, 0.0)
    assert (crash.first, crash.first.rollout_id, crash.first.span_id) == (crash.last, "d", None)
    assert (found["tool_failure"].calls, found["tool_failure"].rollouts) == (2, 1)
    assert found["agent_loop"].first.message == LOOP.detail
    assert list(found) == ["upstream_error", "tool_failure", "agent_crash", "agent_loop", "rate_limited"]


def test_a_window_of_time_leaves_out_what_was_before_it(store: Store) -> None:
    fill(store)
    found = {each.error_class: each for each in store.failures(since=29.0)}
    assert found["upstream_error"].calls == 1
    assert found["upstream_error"].share == 1 / 3
    assert set(store.failures(since=1e12)) == set()


def test_roles_are_told_apart(store: Store) -> None:
    fill(store)
    found = {(each.error_class, each.part): each.calls for each in store.failures(by="role")}
    assert found["upstream_error", "writer"] == 1
    assert found["rate_limited", "writer"] == 1
    assert found["agent_crash", None] == 0
    by_version = {each.part for each in store.failures(by="policy_version")}
    assert by_version == {"3", None}
    with pytest.raises(InvalidInput, match="role, model, policy_version"):
        store.failures(by="error")  # type: ignore[arg-type]


def test_a_length_of_time_is_a_number_and_a_unit() -> None:
    assert [seconds_of(text) for text in ("90s", "30m", "24h", "7d", "1.5h", "1w")] == [
        90,
        1800,
        86400,
        604800,
        5400,
        604800,
    ]
    for text in ("", "24", "h", "-1h", "1y"):
        with pytest.raises(InvalidInput, match="24h"):
            seconds_of(text)
