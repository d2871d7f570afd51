"""Claims, leases, signs of life, ends and retries: who has an attempt, and what becomes of it."""

from __future__ import annotations

import collections
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.errors import Conflict, InvalidInput, UnknownTarget
from lightning_proxy.store import Assignment, ErrorClass, RolloutState, Store, TaskState, new_task
from lightning_proxy.store.claims import FIRST_PAUSE_S, FORGIVEN_LOSSES, LONGEST_PAUSE_S
from tests.store.support import POLICY, make_span, output_of, start_script

FAILED, SUCCEEDED, CANCELLED = RolloutState.FAILED, RolloutState.SUCCEEDED, RolloutState.CANCELLED


def enqueue(store: Store, task_id: str = "a", **settings: Any) -> None:
    store.enqueue_tasks([new_task({"task_id": task_id, "input": {"q": task_id}, **settings})])


def claim(store: Store, worker: str = "w", **wanted: Any) -> Assignment:
    [given] = store.claim_tasks(worker, **wanted)
    return given


def fail(store: Store, given: Assignment, error_class: ErrorClass = ErrorClass.AGENT_CRASH) -> None:
    store.finish_attempt(given.rollout_id, given.attempt, FAILED, "exit code 1", error_class)


def ends(store: Store, rollout_id: str) -> list[tuple[str, str | None]]:
    """State and class of each attempt."""
    return [
        (each.state.value, each.error_class and each.error_class.value)
        for each in store.list_attempts(rollout_id)
    ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds by which the store's clock is ahead. It moves by these alone."""
    ahead = [0.0]
    began = time.time()
    monkeypatch.setattr(time, "time", lambda: began + ahead[0])
    return ahead


def test_a_claim_makes_a_rollout_of_the_task_with_a_key_for_its_attempt(store: Store) -> None:
    enqueue(store, metadata={"split": "train"}, resources={"prompt": "Be brief."})
    given = claim(store, lease_s=30)
    rollout = store.get_rollout(given.rollout_id)
    assert (rollout.task_id, rollout.metadata, rollout.state) == ("a", {"split": "train"}, RolloutState.OPEN)
    owner = store.owner_of_key(given.api_key)
    assert owner is not None
    assert (owner.rollout_id, owner.attempt) == (given.rollout_id, 1)
    assert given.task.resources == {"prompt": "Be brief."}
    assert 25 < given.lease_expires_at - time.time() <= 30
    assert store.claim_tasks("other") == []


def test_a_claim_needs_a_worker_and_a_lease(store: Store) -> None:
    enqueue(store)
    with pytest.raises(InvalidInput, match="worker"):
        store.claim_tasks("")
    with pytest.raises(InvalidInput, match="lease"):
        store.claim_tasks("w", lease_s=0)


def test_a_success_ends_rollout_attempt_and_task_once(store: Store) -> None:
    enqueue(store)
    given = claim(store)
    for _ in range(2):
        assert store.finish_attempt(given.rollout_id, 1, SUCCEEDED).state is SUCCEEDED
    assert store.get_task("a").task.state is TaskState.DONE
    with pytest.raises(Conflict, match="ended as succeeded"):
        fail(store, given)


def test_a_failure_is_followed_by_another_attempt_while_there_are_some_left(
    store: Store, clock: list[float]
) -> None:
    enqueue(store, max_attempts=2)
    first = claim(store)
    fail(store, first)
    fail(store, first)  # said again
    assert store.get_rollout(first.rollout_id).state is RolloutState.OPEN
    clock[0] += FIRST_PAUSE_S
    second = claim(store)
    assert (second.rollout_id, second.attempt) == (first.rollout_id, 2)
    owner = store.owner_of_key(second.api_key)
    assert owner is not None
    assert owner.attempt == 2
    fail(store, first)  # and again, after the next one began
    fail(store, second)
    rollout = store.get_rollout(first.rollout_id)
    assert (rollout.state, rollout.reason, rollout.error_class) == (
        FAILED,
        "exit code 1",
        ErrorClass.AGENT_CRASH,
    )
    assert ends(store, first.rollout_id) == [("failed", "agent_crash")] * 2
    assert store.get_task("a").task.state is TaskState.DONE


def test_a_class_that_is_not_to_be_retried_ends_the_rollout_at_once(store: Store) -> None:
    enqueue(store, max_attempts=5, retry_on=["timeout"])
    given = claim(store)
    fail(store, given)
    assert store.get_rollout(given.rollout_id).state is FAILED
    assert store.claim_tasks("w") == []


def test_a_repeated_attempt_comes_before_new_rollouts_of_its_task(store: Store, clock: list[float]) -> None:
    enqueue(store, group_size=3, max_attempts=2)
    first = claim(store)
    fail(store, first)
    clock[0] += FIRST_PAUSE_S
    assert [each.attempt for each in store.claim_tasks("w", limit=9)] == [2, 1, 1]


def test_a_crash_right_after_a_failed_call_has_the_class_of_that_call(store: Store) -> None:
    enqueue(store, group_size=3, max_attempts=3)
    refused, overflowed, left = store.claim_tasks("w", limit=3)
    for given, error_class in (
        (refused, "upstream_refused"),
        (overflowed, "context_overflow"),
        (left, "client_disconnect"),
    ):
        store.add_span(
            make_span(
                rollout_id=given.rollout_id,
                response=None,
                error_class=error_class,
                error="no",
                generations=(),
            )
        )
        fail(store, given)
    rollout = store.get_rollout(refused.rollout_id)
    assert (rollout.state, rollout.error_class) == (FAILED, ErrorClass.UPSTREAM_REFUSED)
    assert rollout.reason == "exit code 1; its last call ended in upstream_refused: no"
    assert store.get_rollout(overflowed.rollout_id).error_class is ErrorClass.CONTEXT_OVERFLOW
    assert ends(store, left.rollout_id) == [("failed", "agent_crash")]  # its own end cut the call
    assert store.get_rollout(left.rollout_id).state is RolloutState.OPEN


def test_an_attempt_that_is_given_back_does_not_count(store: Store) -> None:
    enqueue(store)
    given = claim(store)
    for attempt in range(1, 6):
        assert (given.attempt, given.rollout_id) == (attempt, given.rollout_id)
        for _ in range(2):  # said again
            assert store.release_attempt(given.rollout_id, attempt, "the runner was stopped") is None
        given = claim(store)
    assert store.release_attempt(given.rollout_id, 1) is None  # long ago
    store.finish_attempt(given.rollout_id, given.attempt, SUCCEEDED)
    assert ends(store, given.rollout_id) == [("cancelled", None)] * 5 + [("succeeded", None)]


def test_an_attempt_that_has_ended_is_not_given_back_and_it_is_said_how_it_ended(
    store: Store, clock: list[float]
) -> None:
    enqueue(store, group_size=3, max_attempts=2)
    done, failed, cancelled = (claim(store) for _ in range(3))
    store.finish_attempt(done.rollout_id, 1, SUCCEEDED)
    assert store.release_attempt(done.rollout_id, 1) == "it ended as succeeded"
    fail(store, failed)
    assert store.release_attempt(failed.rollout_id, 1) == "it ended as failed (exit code 1)"
    clock[0] += FIRST_PAUSE_S
    claim(store, "other")
    said = store.release_attempt(failed.rollout_id, 1)
    assert said == "it ended as failed (exit code 1), and attempt 2 was given to other"
    store.finish_rollout(cancelled.rollout_id, CANCELLED, "no more")
    assert store.release_attempt(cancelled.rollout_id, 1) == "it ended as cancelled (no more)"
    assert ends(store, done.rollout_id) == [("succeeded", None)]


def test_the_pause_before_another_attempt_doubles_up_to_a_limit(store: Store, clock: list[float]) -> None:
    enqueue(store, max_attempts=12)
    given, longest = claim(store), FIRST_PAUSE_S
    assert store.next_retry_at() is None
    for _ in range(11):
        fail(store, given)
        assert store.claim_tasks("w") == []
        retry_at = store.next_retry_at()
        assert retry_at is not None
        assert longest / 2 - 0.1 < retry_at - time.time() <= longest
        clock[0] += retry_at - time.time()
        given = claim(store)
        assert store.next_retry_at() is None
        longest = min(2 * longest, LONGEST_PAUSE_S)
    assert longest == LONGEST_PAUSE_S


def test_while_one_pauses_others_are_handed_out(store: Store, clock: list[float]) -> None:
    enqueue(store, group_size=2, max_attempts=2)
    enqueue(store, "b")
    first = claim(store)
    fail(store, first)
    given = store.claim_tasks("w", limit=9)
    assert [(each.task.task_id, each.attempt) for each in given] == [("a", 1), ("b", 1)]
    assert first.rollout_id not in {each.rollout_id for each in given}


def test_what_was_given_back_or_lost_does_not_pause(store: Store) -> None:
    enqueue(store, max_attempts=3)
    given = claim(store)
    store.release_attempt(given.rollout_id, given.attempt)
    assert claim(store).attempt == 2
    store.abandon_worker("w")
    assert claim(store).attempt == 3


# --- silence, time, loss ----------------------------------------------------------------------------


def test_a_lease_that_runs_out_gives_the_rollout_to_the_next_and_does_not_count(
    store: Store, clock: list[float]
) -> None:
    enqueue(store)
    lost = claim(store, "gone", lease_s=10)
    clock[0] = 11
    given = claim(store, "next")
    assert (given.rollout_id, given.attempt) == (lost.rollout_id, 2)
    assert ends(store, lost.rollout_id)[0] == ("failed", "silent_death")
    assert store.list_attempts(lost.rollout_id)[0].reason == "its worker gone was not heard of for 10 s"
    beat = store.heartbeat_attempt(lost.rollout_id, 1)
    assert beat.stop
    assert beat.reason is not None
    assert beat.reason.endswith("and attempt 2 was given to next")
    with pytest.raises(Conflict, match="attempt 2 was given to next"):
        store.finish_attempt(lost.rollout_id, 1, SUCCEEDED)
    with pytest.raises(Conflict, match="attempt 2 was given to next"):
        fail(store, lost)
    store.finish_attempt(lost.rollout_id, 2, SUCCEEDED)


def test_who_loses_its_worker_too_often_fails(store: Store, clock: list[float]) -> None:
    enqueue(store)
    for attempt in range(1, FORGIVEN_LOSSES + 2):
        given = claim(store, lease_s=10)
        assert given.attempt == attempt
        clock[0] += 11
    assert store.claim_tasks("w") == []
    rollout = store.get_rollout(given.rollout_id)
    assert (rollout.state, rollout.error_class) == (FAILED, ErrorClass.SILENT_DEATH)
    assert store.get_task("a").task.state is TaskState.DONE


def test_the_word_of_a_worker_counts_as_long_as_nobody_else_has_the_rollout(
    store: Store, clock: list[float]
) -> None:
    enqueue(store)
    given = claim(store, lease_s=10)
    clock[0] = 11
    assert store.sweep_tasks() == 1
    assert store.finish_attempt(given.rollout_id, 1, SUCCEEDED).state is SUCCEEDED
    assert ends(store, given.rollout_id) == [("succeeded", None)]


def test_heartbeats_keep_a_lease(store: Store, clock: list[float]) -> None:
    enqueue(store)
    given = claim(store, lease_s=10)
    for _ in range(3):
        clock[0] += 8
        beat = store.heartbeat_attempt(given.rollout_id, 1)
        assert not beat.stop
    assert beat.lease_expires_at == pytest.approx(time.time() + 10, abs=1)
    longer = store.heartbeat_attempt(given.rollout_id, 1, lease_s=60)
    assert longer.lease_expires_at == pytest.approx(time.time() + 60, abs=1)
    clock[0] += 50
    assert store.sweep_tasks() == 0


def test_a_heartbeat_says_nothing_of_others(store: Store, clock: list[float]) -> None:
    enqueue(store, "a")
    enqueue(store, "b")
    first, second = claim(store, lease_s=10), claim(store, lease_s=10)
    clock[0] = 11
    assert not store.heartbeat_attempt(first.rollout_id, 1).stop
    assert not store.heartbeat_attempt(second.rollout_id, 1).stop


def test_an_attempt_that_takes_too_long_fails_however_alive_it_is(store: Store, clock: list[float]) -> None:
    enqueue(store, timeout_s=100)
    given = claim(store)
    clock[0] = 99
    assert not store.heartbeat_attempt(given.rollout_id, 1).stop
    clock[0] = 101
    assert store.pool_is_overdue()
    beat = store.heartbeat_attempt(given.rollout_id, 1)
    assert (beat.stop, beat.reason) == (True, "it ended as failed (took longer than its 100 s)")
    assert store.get_rollout(given.rollout_id).error_class is ErrorClass.TIMEOUT
    with pytest.raises(Conflict, match="took longer"):
        store.finish_attempt(given.rollout_id, 1, SUCCEEDED)


def test_a_worker_that_lives_does_not_speak_for_its_agent(store: Store, clock: list[float]) -> None:
    enqueue(store, silence_s=20, max_attempts=2)
    given = claim(store)
    clock[0] = 19
    assert not store.heartbeat_attempt(given.rollout_id, 1, alive=False).stop
    clock[0] = 21
    assert store.heartbeat_attempt(given.rollout_id, 1, alive=False).stop
    assert ends(store, given.rollout_id) == [("failed", "silent_death")]
    clock[0] += FIRST_PAUSE_S
    second = claim(store)
    clock[0] += 19
    store.heartbeat_attempt(given.rollout_id, second.attempt)
    clock[0] += 19
    assert store.sweep_tasks() == 0
    clock[0] += 2
    assert store.sweep_tasks() == 1
    rollout = store.get_rollout(given.rollout_id)
    assert rollout.reason == "neither a call nor another sign of life for 20 s"


def test_a_call_is_a_sign_of_life(store: Store, clock: list[float]) -> None:
    enqueue(store, silence_s=20)
    given = claim(store, lease_s=1000)
    clock[0] = 15
    store.add_span(make_span(rollout_id=given.rollout_id, ended_at=time.time()))
    clock[0] = 30
    assert store.sweep_tasks() == 0
    assert not store.pool_is_overdue()
    clock[0] = 36
    assert store.sweep_tasks() == 1


def test_a_worker_that_is_back_says_that_what_it_held_is_lost(store: Store) -> None:
    enqueue(store, group_size=3)
    mine, also_mine = store.claim_tasks("w", limit=2, lease_s=1000)
    other = claim(store, "other", lease_s=1000)
    assert store.abandon_worker("w") == 2
    again = store.claim_tasks("w", limit=9)
    assert {(each.rollout_id, each.attempt) for each in again} == {
        (mine.rollout_id, 2),
        (also_mine.rollout_id, 2),
    }
    assert not store.heartbeat_attempt(other.rollout_id, 1).stop


def test_time_without_a_proxy_is_nobodys_silence(store: Store, clock: list[float]) -> None:
    enqueue(store, silence_s=5)
    given = claim(store, lease_s=10)
    clock[0] = 500
    store.forgive_downtime()
    assert store.sweep_tasks() == 0
    assert not store.heartbeat_attempt(given.rollout_id, 1).stop


def test_a_rollout_that_ends_by_other_hands_ends_in_the_pool(store: Store) -> None:
    enqueue(store, group_size=2)
    one, other = store.claim_tasks("w", limit=2)
    store.finish_rollout(one.rollout_id, SUCCEEDED)  # the agent itself: it may clear up yet
    assert not store.heartbeat_attempt(one.rollout_id, 1).stop
    store.finish_rollout(other.rollout_id, FAILED, "I gave up")
    assert store.heartbeat_attempt(other.rollout_id, 1).stop
    assert store.get_task("a").task.state is TaskState.DONE


def test_an_attempt_that_has_ended_stays_as_it_ended(store: Store) -> None:
    enqueue(store, max_attempts=2)
    given = claim(store)
    fail(store, given)
    store.cancel_task("a")
    assert store.get_rollout(given.rollout_id).state is CANCELLED
    assert ends(store, given.rollout_id) == [("failed", "agent_crash")]


def test_training_drains_a_rollout_of_the_pool_once_it_has_ended(store: Store, clock: list[float]) -> None:
    enqueue(store, max_attempts=2)
    first = claim(store)
    store.add_span(make_span(rollout_id=first.rollout_id))
    store.add_reward(value=1.0, rollout_id=first.rollout_id)
    fail(store, first)
    assert store.preview(POLICY, 9) == []
    clock[0] += FIRST_PAUSE_S
    second = claim(store)
    store.add_span(make_span(rollout_id=first.rollout_id, attempt=2))
    assert store.backlog(POLICY).rollouts_ready == 0
    store.finish_attempt(second.rollout_id, 2, SUCCEEDED)
    [ready] = store.preview(POLICY, 9)
    assert (ready.rollout.rollout_id, ready.attempt, len(ready.spans)) == (first.rollout_id, 2, 1)


def test_an_attempt_that_never_was_is_unknown(store: Store) -> None:
    enqueue(store)
    given = claim(store)
    for look in (store.heartbeat_attempt, store.release_attempt):
        with pytest.raises(UnknownTarget, match="task pool"):
            look("nobody", 1)
    with pytest.raises(UnknownTarget, match="no attempt 7"):
        store.finish_attempt(given.rollout_id, 7, SUCCEEDED)
    for look in (store.heartbeat_attempt, store.release_attempt):
        with pytest.raises(UnknownTarget, match="no attempt 7"):
            look(given.rollout_id, 7)


_WORKER = """
import sys
import time
from lightning_proxy.store import RolloutState, Store
with Store.open(sys.argv[1], busy_timeout_s=30) as store:
    while store.pool_progress().tasks_open:  # also while what failed pauses
        for one in store.claim_tasks(sys.argv[2], limit=3) or time.sleep(0.02) or ():
            print(one.task.task_id, one.rollout_id, one.attempt)
            state = RolloutState.FAILED if one.attempt == 1 else RolloutState.SUCCEEDED
            store.finish_attempt(one.rollout_id, one.attempt, state)
"""


def test_processes_that_claim_at_once_never_get_the_same(store: Store, db: Path) -> None:
    tasks, group_size = 20, 5
    for number in range(tasks):
        enqueue(store, f"t{number}", group_size=group_size, max_attempts=2)
    workers = [start_script(_WORKER, db, f"w{number}") for number in range(4)]
    lines = [line for worker in workers for line in output_of(worker, timeout_s=120)]
    assert len(lines) == len(set(lines)) == 2 * tasks * group_size
    rollouts = {tuple(line.split()[:2]) for line in lines}
    of_task = collections.Counter(task_id for task_id, _ in rollouts)
    assert set(of_task.values()) == {group_size}
    assert len(of_task) == tasks
    assert store.pool_progress().succeeded == tasks * group_size
