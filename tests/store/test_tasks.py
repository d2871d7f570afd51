"""The task pool: enqueuing, rounds, what is left to do, and which tasks are worth another group."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_proxy.errors import Conflict, InvalidInput, UnknownTarget
from lightning_proxy.store import (
    Assignment,
    ErrorClass,
    Prefer,
    RolloutState,
    Standing,
    Store,
    TaskState,
    new_task,
)
from lightning_proxy.store.curriculum import RETRIED_ONE_IN, is_skipped, standing_of


def enqueue(store: Store, *task_ids: str, **settings: Any) -> None:
    store.enqueue_tasks([new_task({"task_id": each, "input": {"q": each}, **settings}) for each in task_ids])


def claim(store: Store, limit: int = 1, **wanted: Any) -> list[Assignment]:
    return store.claim_tasks("w", limit=limit, **wanted)


def end(store: Store, assignment: Assignment, reward: float | None = None) -> None:
    if reward is not None:
        store.add_reward(value=reward, rollout_id=assignment.rollout_id)
    store.finish_attempt(assignment.rollout_id, assignment.attempt, RolloutState.SUCCEEDED)


def work_off(store: Store, rewards: dict[str, list[float]], **wanted: Any) -> list[str]:
    """Carry out whatever there is, one at a time; returns the tasks in the order of their claims."""
    order: list[str] = []
    while given := claim(store, **wanted):
        task_id = given[0].task.task_id
        of_task = rewards.get(task_id, [1.0])
        end(store, given[0], of_task[order.count(task_id) % len(of_task)])
        order.append(task_id)
    return order


# --- what describes a task ------------------------------------------------------------------------


def test_a_task_is_an_input_or_the_fields_of_one() -> None:
    whole = new_task({"task_id": "a", "input": {"q": 1}, "group_size": 4, "retry_on": ["timeout"]})
    assert (whole.task_id, whole.input, whole.group_size) == ("a", {"q": 1}, 4)
    assert whole.retry_on == (ErrorClass.TIMEOUT,)
    fields = new_task({"input": "2+2", "output": "4", "priority": 3})
    assert (fields.input, fields.priority) == ({"input": "2+2", "output": "4"}, 3)


def test_without_an_id_it_is_a_digest_of_the_input_whatever_the_order_of_its_fields() -> None:
    first, again = new_task({"a": 1, "b": [2]}), new_task({"input": {"b": [2], "a": 1}, "priority": 1})
    assert first.task_id == again.task_id
    assert first.task_id.startswith("task-")
    assert new_task({"a": 2}).task_id != first.task_id
    assert new_task({"task_id": 17, "a": 1}).task_id == "17"


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("x", "must be a JSON object"),
        ({}, "has no input"),
        ({"task_id": "a"}, "has no input"),
        ({"input": {"q": 1}, "grup_size": 2}, "unknown fields grup_size"),
        ({"q": 1, "group_size": 0}, "at least 1"),
        ({"q": 1, "group_size": True}, "whole number"),
        ({"q": 1, "timeout_s": -1}, "above 0"),
        ({"q": 1, "silence_s": "5"}, "above 0"),
        ({"q": 1, "retry_on": ["tired"]}, "there are .*agent_crash"),
        ({"q": 1, "retry_on": "timeout"}, "a list"),
        ({"q": 1, "task_id": "a/b"}, "without '/'"),
        ({"q": 1, "metadata": [1]}, "an object"),
    ],
)
def test_what_is_no_task_is_refused_with_what_would_be_right(item: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=f"(?s)^line 7 .*{said}"):
        new_task(item, "line 7")


# --- enqueuing ------------------------------------------------------------------------------------


def test_enqueuing_again_changes_nothing_and_another_input_is_a_conflict(store: Store) -> None:
    task = new_task({"task_id": "a", "input": {"q": 1}, "group_size": 2, "metadata": {"split": "train"}})
    [(first, created)] = store.enqueue_tasks([task])
    [(again, created_again)] = store.enqueue_tasks([new_task({"task_id": "a", "q": 1})])
    assert (created, created_again) == (True, False)
    assert again == first
    with pytest.raises(Conflict, match="another input"):
        store.enqueue_tasks([new_task({"task_id": "b", "q": 1}), new_task({"task_id": "a", "q": 2})])
    assert [each.task.task_id for each in store.list_tasks()] == ["a"]


def test_a_task_has_defaults(store: Store) -> None:
    enqueue(store, "a")
    task = store.get_task("a").task
    assert (task.group_size, task.rounds, task.max_attempts, task.priority) == (1, 1, 1, 0)
    assert ErrorClass.AGENT_CRASH in task.retry_on
    assert ErrorClass.CONTEXT_OVERFLOW not in task.retry_on
    assert (task.timeout_s, task.silence_s, task.state) == (None, None, TaskState.OPEN)


def test_an_unknown_task_is_named(store: Store) -> None:
    for look in (store.get_task, store.cancel_task):
        with pytest.raises(UnknownTarget, match="'nobody'"):
            look("nobody")


def test_groups_are_filled_one_after_another_by_priority_then_age(store: Store) -> None:
    enqueue(store, "a", "b", group_size=3)
    enqueue(store, "urgent", group_size=2, priority=5)
    order = [each.task.task_id for _ in range(4) for each in claim(store, 2)]
    assert order == ["urgent", "urgent", "a", "a", "a", "b", "b", "b"]
    assert claim(store) == []


def test_only_the_tasks_that_are_asked_for_are_given(store: Store) -> None:
    enqueue(store, "a", "b", "c")
    assert [each.task.task_id for each in claim(store, 9, task_ids=["b", "c"])] == ["b", "c"]
    assert claim(store, 9, task_ids=[]) == []


def test_a_task_is_done_with_its_last_rollout_and_more_can_be_asked_of_it(store: Store) -> None:
    enqueue(store, "a", group_size=2)
    first, second = claim(store, 5)
    end(store, first)
    assert store.get_task("a").task.state is TaskState.OPEN
    end(store, second)
    assert store.get_task("a").task.state is TaskState.DONE
    enqueue(store, "a", group_size=3)
    assert store.get_task("a").to_do == 1
    end(store, claim(store)[0])
    assert store.get_task("a").task.state is TaskState.DONE
    enqueue(store, "a", rounds=2)
    summary = store.get_task("a")
    assert (summary.task.state, summary.task.round, summary.to_do) == (TaskState.OPEN, 2, 3)


def test_a_round_begins_when_the_one_before_has_ended(store: Store) -> None:
    enqueue(store, "a", "b", group_size=2, rounds=2)
    assert work_off(store, {}) == ["a", "a", "b", "b", "a", "a", "b", "b"]
    assert store.get_task("a").succeeded == 4
    assert [each["round"] for each in store.rollouts_of_task("a")] == [1, 1, 2, 2]


def test_a_cancelled_rollout_does_not_count(store: Store) -> None:
    enqueue(store, "a", group_size=1)
    [first] = claim(store)
    store.finish_rollout(first.rollout_id, RolloutState.CANCELLED)
    [other] = claim(store)
    assert other.rollout_id != first.rollout_id
    end(store, other)
    summary = store.get_task("a")
    assert (summary.succeeded, summary.cancelled, summary.task.state) == (1, 1, TaskState.DONE)


def test_cancelling_a_task_cancels_what_runs_and_hands_out_nothing_more(store: Store) -> None:
    enqueue(store, "a", group_size=3)
    [running] = claim(store)
    store.cancel_task("a", "not wanted")
    assert store.get_rollout(running.rollout_id).state is RolloutState.CANCELLED
    assert store.get_rollout(running.rollout_id).reason == "not wanted"
    beat = store.heartbeat_attempt(running.rollout_id, 1)
    assert (beat.stop, beat.reason) == (True, "it ended as cancelled (not wanted)")
    assert claim(store) == []
    enqueue(store, "a", rounds=5)  # whoever starts again does not revive what was cancelled meanwhile
    assert store.get_task("a").task.state is TaskState.CANCELLED


def test_rollouts_of_other_origin_are_not_the_pools(store: Store) -> None:
    enqueue(store, "a", group_size=1)
    store.create_rollout(rollout_id="by-hand", task_id="a")
    store.finish_rollout("by-hand", RolloutState.SUCCEEDED)
    assert len(claim(store, 5)) == 1
    with pytest.raises(UnknownTarget, match="task pool"):
        store.heartbeat_attempt("by-hand", 1)


def test_progress_counts_the_tasks_that_are_asked_about(store: Store) -> None:
    enqueue(store, "a", "b", group_size=2)
    enqueue(store, "c")
    one, other, _ = claim(store, 3)
    end(store, one)
    store.finish_attempt(other.rollout_id, 1, RolloutState.FAILED, "exit code 1", ErrorClass.AGENT_CRASH)
    whole, part = store.pool_progress(), store.pool_progress(["a"])
    assert (whole.tasks, whole.tasks_open, whole.rollouts) == (3, 2, 5)
    assert (whole.succeeded, whole.failed, whole.running) == (1, 1, 1)
    assert whole.failed_by_class == {"agent_crash": 1}
    assert (part.tasks, part.tasks_open, part.rollouts, part.running) == (1, 0, 2, 0)


@pytest.mark.parametrize(
    ("changed", "rollouts", "to_do"),
    [
        ({"group_size": 1}, 4 + 1 + 1, 2),  # two of the first round, two begun of the second; the third, "b"
        ({"group_size": 3}, 2 + 3 + 3 + 1, 5),
        ({"rounds": 1}, 4 + 1, 1),
        ({"rounds": 2}, 4 + 1, 1),
        ({"group_size": 1, "rounds": 1}, 4 + 1, 1),
    ],
)
def test_progress_never_goes_beyond_its_end_whatever_is_asked_for_anew(
    store: Store, changed: dict[str, int], rollouts: int, to_do: int
) -> None:
    enqueue(store, "a", group_size=2, rounds=3)
    enqueue(store, "b")
    for given in claim(store, 2):
        end(store, given)
    [lone] = claim(store)  # of "b", which comes before another round
    begun = claim(store, 2)
    store.finish_rollout(lone.rollout_id, RolloutState.CANCELLED)
    enqueue(store, "a", **changed)
    counts = store.pool_progress()
    assert (counts.rollouts, counts.running, counts.succeeded) == (rollouts, 2, 2)
    assert sum(store.get_task(each).to_do for each in "ab") == to_do
    while begun:
        for given in begun:
            end(store, given)
        begun = claim(store, 9)
    counts = store.pool_progress()
    assert (counts.tasks_open, counts.succeeded) == (0, rollouts)
    assert counts.rollouts == rollouts


def test_progress_counts_what_was_carried_out_of_a_cancelled_task(store: Store) -> None:
    enqueue(store, "a", group_size=3)
    one, _ = claim(store, 2)
    end(store, one)
    store.cancel_task("a")
    counts = store.pool_progress()
    assert (counts.rollouts, counts.succeeded, counts.cancelled) == (1, 1, 1)


def test_a_list_of_tasks_goes_on_and_is_narrowed(store: Store) -> None:
    enqueue(store, "a", "b", "c")
    end(store, claim(store)[0])
    assert [each.task.task_id for each in store.list_tasks(limit=2)] == ["a", "b"]
    assert [each.task.task_id for each in store.list_tasks(after="b")] == ["c"]
    assert [each.task.task_id for each in store.list_tasks(state=TaskState.DONE)] == ["a"]


def test_the_success_rate_is_that_of_the_rewarded_rollouts(store: Store) -> None:
    enqueue(store, "a", group_size=4)
    for assignment, reward in zip(claim(store, 4), (1.0, 0.0, 0.5, None), strict=True):
        end(store, assignment, reward)
    summary = store.get_task("a")
    assert (summary.rewarded, summary.success_rate, summary.mean_reward) == (3, 2 / 3, 0.5)


# --- the curriculum -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returns", "standing"),
    [
        ([], Standing.UNSEEN),
        ([1.0], Standing.UNSEEN),
        ([1.0, 0.0], Standing.MIXED),
        ([0.2, 0.9], Standing.MIXED),
        ([1.0, 1.0], Standing.SOLVED),
        ([0.0, 0.0, 0.0], Standing.HOPELESS),
        ([-1.0, -1.0], Standing.HOPELESS),
    ],
)
def test_a_standing_is_whether_the_last_returns_differ(returns: list[float], standing: Standing) -> None:
    assert standing_of(returns) is standing


def test_a_solved_or_hopeless_task_has_one_round_in_ten_and_each_its_own() -> None:
    for standing in (Standing.SOLVED, Standing.HOPELESS):
        for position in range(20):
            taken = [round_ for round_ in range(30) if not is_skipped(standing, position, round_)]
            assert len(taken) == 30 // RETRIED_ONE_IN
        in_one_round = [position for position in range(20) if not is_skipped(standing, position, 3)]
        assert len(in_one_round) == 20 // RETRIED_ONE_IN
    assert not any(is_skipped(Standing.MIXED, position, 1) for position in range(20))


def test_tasks_that_disagree_come_first_and_others_are_skipped_and_counted(store: Store) -> None:
    rewards = {"easy": [1.0], "hard": [0.0], "mixed": [1.0, 0.0]}
    enqueue(store, *rewards, group_size=2)
    assert work_off(store, rewards) == ["easy", "easy", "hard", "hard", "mixed", "mixed"]
    enqueue(store, *rewards, rounds=3)
    enqueue(store, "new", group_size=2)
    order = work_off(store, rewards, prefer=Prefer.DISAGREEMENT)
    assert order == ["mixed"] * 4 + ["new"] * 2
    easy, hard, mixed = (store.get_task(each).task for each in rewards)
    assert (easy.skipped_solved, easy.skipped_hopeless, easy.state) == (2, 0, TaskState.DONE)
    assert (hard.skipped_solved, hard.skipped_hopeless, hard.state) == (0, 2, TaskState.DONE)
    assert (mixed.skipped_solved, mixed.skipped_hopeless, mixed.standing) == (0, 0, Standing.MIXED)
    progress = store.pool_progress()
    assert (progress.skipped_solved, progress.skipped_hopeless, progress.tasks_open) == (2, 2, 0)
    assert progress.succeeded == progress.rollouts == 12


def test_enqueuing_again_leaves_a_skipped_round_skipped(store: Store) -> None:
    enqueue(store, "easy", group_size=2, rounds=2)
    assert work_off(store, {"easy": [1.0]}, prefer=Prefer.DISAGREEMENT) == ["easy"] * 2
    for _ in range(3):
        enqueue(store, "easy", group_size=2, rounds=2)
        assert work_off(store, {"easy": [1.0]}) == []
    assert store.get_task("easy").task.skipped_solved == 1
    enqueue(store, "easy", rounds=3)
    assert work_off(store, {"easy": [1.0]}) == ["easy"] * 2
    assert store.pool_progress().rollouts == 4


def test_without_a_preference_nothing_is_skipped(store: Store) -> None:
    enqueue(store, "easy", group_size=2, rounds=3)
    assert work_off(store, {"easy": [1.0]}) == ["easy"] * 6


def test_no_task_is_lost_for_ever(store: Store) -> None:
    enqueue(store, "easy", group_size=2, rounds=1 + RETRIED_ONE_IN)
    order = work_off(store, {"easy": [1.0]}, prefer=Prefer.DISAGREEMENT)
    assert order == ["easy"] * 4
    assert store.get_task("easy").task.skipped_solved == RETRIED_ONE_IN - 1


def test_a_reward_that_comes_late_is_looked_at_before_a_round_begins(store: Store) -> None:
    enqueue(store, "a", group_size=2, rounds=2)
    given = claim(store, 2, prefer=Prefer.DISAGREEMENT)
    for assignment in given:
        end(store, assignment)
    assert store.get_task("a").task.standing is Standing.UNSEEN
    for assignment in given:
        store.add_reward(value=1.0, rollout_id=assignment.rollout_id)
    assert claim(store, 2, prefer=Prefer.DISAGREEMENT) == []
    assert store.get_task("a").task.skipped_solved == 1
