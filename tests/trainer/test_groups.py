from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pytest

from lightning_proxy.errors import TrainingError
from lightning_proxy.store import RecordedRollout, Reward
from lightning_proxy.trainer.advantages import Returns, assign
from lightning_proxy.trainer.credit import IDENTICAL
from lightning_proxy.trainer.groups import BY_PROMPT, BY_TASK, RUNNING, Grouping, form_groups
from lightning_proxy.trainer.transitions import (
    Group,
    LeftOut,
    Reason,
    Terms,
    TrainableRollout,
    Transition,
    trainable_rollouts,
)
from tests.trainer.recording import POLICY, generation, recorded, span


def rollout(
    name: str, value: float, task: str | None = "t", prompt: tuple[int, ...] = (1, 2), calls: int = 1
) -> TrainableRollout:
    step = Transition(name, 1, 1, 0, None, 0, array("i", prompt), array("i", [3]), array("f", [-1.0]))
    return TrainableRollout(name, task, value, (step,) * calls)


def group(*rollouts: TrainableRollout, may_wait: bool = True) -> tuple[Grouping, LeftOut]:
    left_out = LeftOut()
    return form_groups(rollouts, min_size=2, may_wait=may_wait, left_out=left_out), left_out


def members(grouping: Grouping) -> list[list[str]]:
    return [[each.rollout_id for each in rollouts] for rollouts in grouping.groups]


def test_rollouts_are_grouped_by_task_id_and_the_method_is_recorded_on_each_transition() -> None:
    grouping, _ = group(
        rollout("a", 1, "x"), rollout("b", 0, "y"), rollout("c", 0, "x"), rollout("d", 1, "y")
    )
    assert members(grouping) == [["a", "c"], ["b", "d"]]
    found = grouping.groups[0][0].transitions[0].group
    assert found is not None
    assert (found.method, found.key) == (BY_TASK, "x")


def test_without_a_task_id_the_token_ids_of_the_first_prompt_decide() -> None:
    grouping, _ = group(
        rollout("a", 1, None, (1, 2)),
        rollout("b", 0, None, (1, 3)),
        rollout("c", 0, None, (1, 2)),
        rollout("d", 1, None, (1, 3)),
    )
    assert members(grouping) == [["a", "c"], ["b", "d"]]
    found = grouping.groups[0][0].transitions[0].group
    assert found is not None
    assert found.method == BY_PROMPT


def test_a_rollout_with_a_task_id_and_one_without_never_share_a_group() -> None:
    grouping, _ = group(rollout("a", 1, "x"), rollout("b", 0, None))
    assert members(grouping) == []


def test_a_group_that_is_too_small_is_for_a_later_run_and_counted() -> None:
    grouping, left_out = group(rollout("a", 1, "x"), rollout("b", 1, "y"), rollout("c", 0, "y"))
    assert members(grouping) == [["b", "c"]]
    assert grouping.for_later == ("a",)
    assert left_out.rollouts == {Reason.GROUP_TOO_SMALL: 1}


def test_a_group_that_is_too_small_is_left_out_for_good_where_it_would_block_the_queue() -> None:
    grouping, left_out = group(rollout("a", 1, "x"), may_wait=False)
    assert grouping.for_later == ()
    assert left_out.rollouts == {Reason.GROUP_TOO_SMALL: 1}


def test_a_group_whose_returns_are_all_equal_is_left_out_and_counted() -> None:
    grouping, left_out = group(rollout("a", 1, "x"), rollout("b", 1, "x"))
    assert members(grouping) == []
    assert grouping.for_later == ()
    assert left_out.rollouts == {Reason.GROUP_ALL_EQUAL: 2}


def centred(credits_R: Returns, groups_R: Sequence[int], lengths_R: Sequence[int]) -> Returns:
    assert groups_R == [0, 0, 1, 1]
    return np.asarray(credits_R - credits_R.mean())


def test_a_rollout_counts_once_in_its_group_however_many_calls_it_made() -> None:
    grouping, _ = group(
        rollout("a", 1, "x", calls=9), rollout("b", 0, "x"), rollout("c", 3, "y"), rollout("d", 0, "y")
    )
    done = assign(grouping.groups, credit=IDENTICAL, estimator=centred)
    assert [each.transitions[0].advantage for each in done] == [0.0, -1.0, 2.0, -1.0]
    assert {each.advantage for each in done[0].transitions} == {0.0}
    assert {each.credit for each in done[0].transitions} == {1.0}


def grpo(credits_R: Returns, groups_R: Sequence[int], lengths_R: Sequence[int]) -> Returns:
    """arXiv 2402.03300, section 4.1.2, written out: (r - mean) / (std + 1e-6), n - 1 in the deviation."""
    advantages_R = np.empty(len(credits_R))
    for group_number in set(groups_R):
        mine = np.array(groups_R) == group_number
        returns = credits_R[mine]
        advantages_R[mine] = (returns - returns.mean()) / (returns.std(ddof=1) + 1e-6)
    return advantages_R


def again(name: str, value: float, **companions: float) -> TrainableRollout:
    """A rollout that comes back after a late reward, with what it was compared with."""
    others = tuple(
        TrainableRollout(other, None, theirs, (), baseline_only=True) for other, theirs in companions.items()
    )
    return replace(rollout(name, value, "x"), again=True, companions=others)


def test_a_rollout_that_comes_again_is_compared_with_its_former_group_which_is_not_trained_again() -> None:
    grouping, left_out = group(
        again("a", 1.0, b=0.0, c=0.0, d=1.0), rollout("e", 0.5, "y"), rollout("f", 0, "y")
    )
    assert members(grouping) == [["a", "b", "c", "d"], ["e", "f"]]
    assert [each.rollout_id for each in grouping.trained] == ["a", "e", "f"]
    assert left_out.rollouts == {}
    done = assign(grouping.groups, credit=IDENTICAL, estimator=grpo)
    assert [each.rollout_id for each in done] == ["a", "e", "f"]
    expected = (1.0 - 0.5) / (np.std([1.0, 0.0, 0.0, 1.0], ddof=1) + 1e-6)
    assert done[0].transitions[0].advantage == pytest.approx(expected)
    assert {each.credit for each in done[0].transitions} == {1.0}


def test_companions_that_are_here_themselves_count_once_and_as_they_are() -> None:
    grouping, _ = group(
        again("a", 1.0, b=0.75, c=0.0), again("b", 0.75, a=1.0, c=0.0), rollout("g", 0.25, "x")
    )
    assert members(grouping) == [["a", "b", "g", "c"]]
    done = assign(grouping.groups, credit=IDENTICAL, estimator=grpo)
    returns = np.array([1.0, 0.75, 0.25, 0.0])
    expected = (returns - returns.mean()) / (returns.std(ddof=1) + 1e-6)
    assert [each.transitions[0].advantage for each in done] == pytest.approx(list(expected[:3]))


def test_a_rollout_that_comes_again_and_equals_its_former_group_is_left_out() -> None:
    grouping, left_out = group(again("a", 1.0, b=1.0))
    assert members(grouping) == []
    assert left_out.rollouts == {Reason.GROUP_ALL_EQUAL: 1}
    assert grouping.keys == {"a": f"{BY_TASK}:x"}


def test_a_rollout_that_comes_again_and_whose_group_is_gone_is_given_up_and_counted() -> None:
    grouping, left_out = group(again("a", 1.0))
    assert (grouping.for_later, grouping.keys) == ((), {"a": f"{BY_TASK}:x"})
    assert left_out.rollouts == {Reason.GROUP_GONE: 1}


def test_it_waits_with_a_fresh_one_whose_group_may_still_grow() -> None:
    left_out = LeftOut()
    rollouts = (again("a", 1.0), rollout("b", 0.0, "x"))
    grouping = form_groups(rollouts, min_size=3, may_wait=True, left_out=left_out)
    assert grouping.for_later == ("a", "b")
    assert left_out.rollouts == {Reason.GROUP_TOO_SMALL: 2}


# -- members of earlier runs -------------------------------------------------------------------


def joined(
    *rollouts: TrainableRollout, same: Sequence[str] = (), near: Sequence[str] = (), recent: bool = False
) -> tuple[Grouping, list[tuple[str, frozenset[int | None] | None]]]:
    """Grouped with former members of return 0, of the same version or a near one; and what was asked."""
    asked: list[tuple[str, frozenset[int | None] | None]] = []

    def former(key: str, versions: Collection[int | None] | None) -> list[TrainableRollout]:
        asked.append((key, None if versions is None else frozenset(versions)))
        names = same if versions is not None else (*same, *near)
        return [TrainableRollout(name, None, 0.0, (), baseline_only=True) for name in names]

    found = form_groups(
        rollouts,
        min_size=2,
        may_wait=True,
        left_out=LeftOut(),
        recent=(lambda key: []) if recent else None,
        former=former,
    )
    return found, asked


def test_what_comes_after_its_group_was_trained_on_is_compared_with_it() -> None:
    grouping, asked = joined(rollout("late", 1.0, "x"), same=["a", "b"], near=["older"])
    assert members(grouping) == [["late", "a", "b"]]
    assert [each.rollout_id for each in grouping.trained] == ["late"]
    assert asked == [("task_id:x", frozenset({0}))]


def test_a_group_that_is_large_enough_is_joined_by_what_the_same_version_answered_only() -> None:
    grouping, asked = joined(rollout("a", 1.0, "x"), rollout("b", 1.0, "x"), near=["older"])
    assert members(grouping) == []
    assert grouping.all_equal == 1
    assert [versions for _, versions in asked] == [frozenset({0})]


def test_one_that_is_alone_is_compared_with_what_versions_of_before_answered() -> None:
    grouping, asked = joined(rollout("late", 1.0, "x"), near=["older"])
    assert members(grouping) == [["late", "older"]]
    assert [versions for _, versions in asked] == [frozenset({0}), None]


def test_a_prompt_that_comes_again_finds_its_group_before_a_running_baseline() -> None:
    grouping, [(key, _)] = joined(rollout("late", 1.0, None), same=["a"], recent=True)
    assert members(grouping) == [["late", "a"]]
    assert key.startswith(f"{BY_PROMPT}:")


def test_former_members_that_are_here_again_count_once() -> None:
    grouping, _ = joined(again("a", 1.0, b=0.5, c=0.5), rollout("d", 1.0, "x"), same=["a", "b", "c"])
    assert members(grouping) == [["a", "d", "b", "c"]]


def test_an_estimator_that_gives_no_number_is_an_error() -> None:
    grouping, _ = group(rollout("a", 1), rollout("b", 0))
    with pytest.raises(TrainingError, match="not finite"):
        assign(grouping.groups, credit=IDENTICAL, estimator=lambda credits_R, *_: credits_R * np.nan)


# -- running baselines -------------------------------------------------------------------------


def running(
    *rollouts: TrainableRollout, recent: Sequence[tuple[str, float]] = (), may_wait: bool = True
) -> tuple[Grouping, list[str]]:
    """Grouped with these as the last returns of every key; and the keys that were asked for."""
    asked: list[str] = []

    def look(key: str) -> list[TrainableRollout]:
        asked.append(key)
        return [TrainableRollout(name, None, value, (), baseline_only=True) for name, value in recent]

    return form_groups(rollouts, min_size=2, may_wait=may_wait, left_out=LeftOut(), recent=look), asked


def test_prompts_that_never_repeat_are_compared_with_one_another_and_with_the_last_returns() -> None:
    grouping, asked = running(
        rollout("a", 1.0, None, (1, 2)),
        rollout("b", 0.5, None, (1, 3)),
        recent=[("old", 0.0), ("older", 0.5)],
    )
    assert members(grouping) == [["a", "b", "old", "older"]]
    assert asked == ["running:-"]
    assert grouping.keys == {"a": "running:-", "b": "running:-"}
    assert {each.group.method for one in grouping.trained for each in one.transitions if each.group} == {
        RUNNING
    }
    done = assign(grouping.groups, credit=IDENTICAL, estimator=grpo)
    returns = np.array([1.0, 0.5, 0.0, 0.5])
    expected = (returns - returns.mean()) / (returns.std(ddof=1) + 1e-6)
    assert [each.transitions[0].advantage for each in done] == pytest.approx(list(expected[:2]))


def test_prompts_that_repeat_and_tasks_keep_their_groups() -> None:
    grouping, asked = running(
        rollout("a", 1, None, (1, 2)), rollout("b", 0, None, (1, 2)), rollout("alone", 1, "x")
    )
    assert members(grouping) == [["a", "b"]]
    assert grouping.for_later == ("alone",)
    assert asked == []


def test_a_running_baseline_is_the_roles_and_that_of_the_key_in_the_metadata() -> None:
    def of(name: str, role: str | None, key: str | None, token: int) -> TrainableRollout:
        one = rollout(name, token, None, (token,))
        return replace(
            one, baseline_key=key, transitions=tuple(replace(each, role=role) for each in one.transitions)
        )

    grouping, asked = running(
        of("a", "writer", None, 1), of("b", "writer", None, 2), of("c", "checker", None, 3),
        of("d", "checker", "search", 4), of("e", "checker", "search", 5),
    )  # fmt: skip
    assert members(grouping) == [["a", "b"], ["d", "e"]]
    assert asked == ["running:writer", "running:checker", "running:checker/search"]
    assert grouping.for_later == ("c",)


def test_a_running_baseline_is_that_of_the_first_call_though_it_is_not_trained_on() -> None:
    def of(name: str, value: float, *calls: tuple[str, float]) -> RecordedRollout:
        spans = [
            span(name, generation([ord(name), at], [3]), role=role, sampling={"temperature": temperature})
            for at, (role, temperature) in enumerate(calls)
        ]
        return recorded(name, spans, Reward(name, value))

    rollouts = trainable_rollouts(
        [
            of("a", 0.0, ("writer", 1.0), ("checker", 1.0)),
            of("b", 1.0, ("writer", 0.0), ("checker", 1.0)),  # greedy: left out
            of("c", 1.0, ("checker", 1.0)),
        ],
        Terms(POLICY, 100),
        LeftOut(),
    )
    assert [len(each.transitions) for each in rollouts] == [2, 1, 1]
    grouping, asked = running(*rollouts)
    assert members(grouping) == [["a", "b"]]
    assert asked == ["running:writer", "running:checker"]


def test_who_comes_again_is_not_its_own_baseline() -> None:
    grouping, _ = running(rollout("a", 1.0, None), recent=[("a", 0.0), ("b", 0.5)])
    assert members(grouping) == [["a", "b"]]


def test_the_first_rollout_of_all_waits_and_so_does_every_one_without_running_baselines() -> None:
    assert running(rollout("a", 1.0, None))[0].for_later == ("a",)
    grouping, _ = group(rollout("a", 1.0, None, (1,)), rollout("b", 0.0, None, (2,)))
    assert grouping.for_later == ("a", "b")


# -- counts ------------------------------------------------------------------------------------


def test_groups_are_counted_by_what_became_of_them_and_by_method() -> None:
    lost = {Group(BY_TASK, "x"), Group(BY_TASK, "elsewhere")}
    rollouts = (
        rollout("a", 1, "x"), rollout("b", 0, "x"),
        rollout("c", 1, "y"), rollout("d", 1, "y"),
        rollout("e", 1, "z"),
        rollout("f", 1, None, (1,)), rollout("g", 0, None, (1,)),
    )  # fmt: skip
    found = form_groups(rollouts, min_size=2, may_wait=True, left_out=LeftOut(), lost=lost)
    assert found.counts.as_dict() == {
        "trained": {BY_TASK: 1, BY_PROMPT: 1},
        "lost_members": {BY_TASK: 1},
        "of_one": {BY_TASK: 1},
        "too_small": {BY_TASK: 1},
        "all_equal": {BY_TASK: 1},
    }
