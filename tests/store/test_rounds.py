"""Rounds of the task pool: a group is drained as a whole, and waits for nobody for ever."""

from __future__ import annotations

import time

import pytest

from lightning_proxy.store import Assignment, ErrorClass, RewardRule, RolloutState, Store, new_task
from tests.store.support import POLICY, add_ready_rollout, make_span

SUCCEEDED, FAILED, CANCELLED = RolloutState.SUCCEEDED, RolloutState.FAILED, RolloutState.CANCELLED
WAIT_S = RewardRule().wait_s


def enqueue(store: Store, task_id: str = "t", group_size: int = 3, **settings: object) -> None:
    store.enqueue_tasks(
        [new_task({"task_id": task_id, "input": {"q": 1}, "group_size": group_size, **settings})]
    )


def claim(store: Store, limit: int = 1, lease_s: float = 60.0) -> list[Assignment]:
    return store.claim_tasks("w", limit=limit, lease_s=lease_s)


def end(store: Store, given: Assignment, state: RolloutState = SUCCEEDED, value: float | None = 1.0) -> None:
    """A call, an end, and a reward where there is one."""
    name = given.rollout_id
    store.add_span(
        make_span(
            rollout_id=name,
            attempt=given.attempt,
            response_id=f"{name}-{given.attempt}",
            ended_at=time.time(),
        )
    )
    store.finish_attempt(
        name, given.attempt, state, error_class=ErrorClass.REFUSAL if state is FAILED else None
    )
    if value is not None:
        store.add_reward(value=value, rollout_id=name)


def ready(store: Store) -> int:
    backlog = store.backlog(POLICY)
    assert len(store.preview(POLICY, 100)) == backlog.rollouts_ready
    return backlog.rollouts_ready


def held(store: Store) -> int:
    return store.backlog(POLICY).rollouts_held


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds by which the store's clock is ahead."""
    ahead = [0.0]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    return ahead


def test_what_has_ended_waits_until_all_of_its_round_has(store: Store) -> None:
    enqueue(store)
    first, second = claim(store, 2)
    end(store, first)
    end(store, second)
    assert (ready(store), held(store)) == (0, 2)  # the third has not been handed out
    [third] = claim(store)
    assert (ready(store), held(store)) == (0, 2)  # it is being carried out
    end(store, third, value=None)
    assert (ready(store), held(store)) == (0, 2)  # it has no reward yet
    store.add_reward(value=0.0, rollout_id=third.rollout_id)
    assert (ready(store), held(store)) == (3, 0)
    run = store.begin_run(POLICY, owner="here", lease_s=60)
    assert len(store.drain(run.run_id, limit=10)) == 3


def test_one_that_waits_for_another_attempt_is_waited_for(store: Store) -> None:
    enqueue(store, group_size=2, max_attempts=2)
    first, second = claim(store, 2)
    end(store, first)
    store.finish_attempt(second.rollout_id, 1, FAILED, error_class=ErrorClass.AGENT_CRASH)
    assert (ready(store), held(store)) == (0, 1)


@pytest.mark.parametrize("value", [None, 0.0])
def test_what_failed_for_good_is_not_waited_for_with_or_without_a_reward(
    store: Store, value: float | None
) -> None:
    enqueue(store, group_size=2)
    first, second = claim(store, 2)
    end(store, first)
    end(store, second, FAILED, value)
    assert (ready(store), held(store)) == (1 if value is None else 2, 0)


def test_another_takes_the_place_of_one_that_was_cancelled_and_is_waited_for(store: Store) -> None:
    enqueue(store, group_size=2)
    first, second = claim(store, 2)
    end(store, first)
    store.finish_attempt(second.rollout_id, 1, CANCELLED)
    assert (ready(store), held(store)) == (0, 1)
    [third] = claim(store)
    end(store, third)
    assert (ready(store), held(store)) == (2, 0)


def test_of_a_cancelled_task_nothing_is_waited_for(store: Store) -> None:
    enqueue(store)
    first, _ = claim(store, 2)
    end(store, first)
    assert ready(store) == 0
    store.cancel_task("t")
    assert ready(store) == 1


def test_one_that_made_no_call_to_the_policy_is_not_waited_for(store: Store) -> None:
    enqueue(store, group_size=2)
    first, second = claim(store, 2)
    end(store, first)
    store.add_span(make_span(rollout_id=second.rollout_id, policy="other"))
    store.finish_attempt(second.rollout_id, 1, SUCCEEDED)
    assert ready(store) == 1


def test_a_round_that_is_over_does_not_wait_for_the_next(store: Store) -> None:
    enqueue(store, group_size=2, rounds=2)
    for given in claim(store, 2):
        end(store, given)
    assert ready(store) == 2
    [third] = claim(store)
    end(store, third)
    assert (ready(store), held(store)) == (2, 1)


def test_a_reward_that_is_only_kept_in_the_ledger_is_waited_beyond(store: Store) -> None:
    store.rule = RewardRule({"cost": 0.0})
    enqueue(store, group_size=2)
    first, second = claim(store, 2)
    end(store, first)
    end(store, second, value=None)
    store.add_reward(value=3.0, rollout_id=second.rollout_id, name="cost")
    assert ready(store) == 0


def test_what_nobody_carries_out_and_rewards_that_never_come_are_waited_for_no_longer_than_that(
    store: Store, clock: list[float]
) -> None:
    enqueue(store, "lacking")
    enqueue(store, "unrewarded", group_size=2)
    enqueue(store, "given back", group_size=2)
    lacking, _, _, *others = claim(store, 7)
    end(store, lacking)
    for each, value in zip(others[:2], (1.0, None), strict=True):
        end(store, each, value=value)
    end(store, others[2])
    store.release_attempt(others[3].rollout_id, 1)
    assert ready(store) == 0
    clock[0] = WAIT_S / 2
    assert ready(store) == 0
    clock[0] = WAIT_S + 61  # the leases of the two that are lacking are over, too
    assert (ready(store), held(store)) == (3, 0)
    store.rule = RewardRule(wait_s=2 * WAIT_S)
    assert (ready(store), held(store)) == (0, 3)


def test_one_that_is_carried_out_is_waited_for_as_long_as_its_lease_is_kept(
    store: Store, clock: list[float]
) -> None:
    enqueue(store, group_size=2)
    first, second = claim(store, 2)
    end(store, first)
    for _ in range(5):
        clock[0] += WAIT_S
        store.heartbeat_attempt(second.rollout_id, 1, lease_s=WAIT_S)
        assert ready(store) == 0
    clock[0] += 3 * WAIT_S
    assert ready(store) == 1


def test_demonstrations_and_rollouts_that_come_again_do_not_wait_for_a_round(store: Store) -> None:
    enqueue(store, group_size=2)
    first, second = claim(store, 2)
    end(store, first)
    store.add_reward(rollout_id=first.rollout_id, demonstration="42")
    [shown] = store.preview(POLICY, 10, demonstrated=True)
    assert (shown.for_return, len(shown.demonstrations)) == (False, 1)
    store.rule = RewardRule(wait_s=0)
    store.release_attempt(second.rollout_id, 1)
    run = store.begin_run(POLICY, owner="here", lease_s=60)
    assert len(store.drain(run.run_id, limit=10)) == 1
    store.commit_run(run.run_id, report={}, version=None)
    store.rule = RewardRule()
    assert ready(store) == 0
    store.add_reward(value=0.0, rollout_id=first.rollout_id)
    assert store.backlog(POLICY).rollouts_again == ready(store) == 1


def test_looking_for_what_waits_is_fast_among_2_000_groups(
    store: Store,
) -> None:
    groups, size = 2_000, 8
    now = time.time()
    with store.transaction():
        enqueue(store, "t", size)
        store.connection.executemany(
            "INSERT INTO tasks SELECT ?, ?, input, metadata, resources, group_size, rounds, priority, "
            "max_attempts, retry_on, timeout_s, silence_s, ?, created_at, round, standing, skipped_solved, "
            "skipped_hopeless FROM tasks WHERE task_id = 't'",
            [(n + 2, f"t{n}", "open" if n % 5 == 0 else "done") for n in range(groups)],
        )
        for number in range(groups * size):
            add_ready_rollout(store, f"r{number}", generations=())
        store.connection.executemany(
            "INSERT INTO task_rollouts (rollout_id, task_id, round, state, attempt, tries, losses, worker, "
            "claimed_at, lease_s, lease_expires_at, alive_at, ended_at) "
            "VALUES (?, ?, 1, ?, 1, 0, 0, 'w', ?, 60, ?, ?, ?)",
            [(f"r{n}", f"t{n // size}", *_as_the_pool_has_it(n, size, now)) for n in range(groups * size)],
        )
    before = time.thread_time()
    backlog = store.backlog(POLICY)
    seconds = time.thread_time() - before
    assert (backlog.rollouts_ready, backlog.rollouts_held) == (12_800, 2_800)
    print(f"\na backlog of 16,000 rollouts of 2,000 groups: {seconds * 1000:.0f} ms of CPU")
    assert seconds < 1.5


def _as_the_pool_has_it(number: int, size: int, now: float) -> tuple[object, ...]:
    """One of each fifth group is still carried out."""
    running = number % size == 7 and number // size % 5 == 0
    return ("running" if running else "succeeded", now, now + 60, now, None if running else now)
