"""What each call is credited with, and its advantage, against plain NumPy."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from lightning_proxy.store import Fidelity, Payment, Reward, RewardRule
from lightning_proxy.trainer.advantages import Returns, assign
from lightning_proxy.trainer.credit import IDENTICAL, Credit, returns_to_go
from lightning_proxy.trainer.failures import Consequences
from lightning_proxy.trainer.groups import Grouping, form_groups
from lightning_proxy.trainer.transitions import (
    LeftOut,
    Reason,
    Step,
    Terms,
    TrainableRollout,
    Transition,
    to_compare_with,
    trainable_rollouts,
)
from tests.trainer.recording import POLICY, generation, recorded, span

TO_GO = Credit("return_to_go", 0.5)


def rollout(
    name: str,
    rewards: Sequence[float],
    *,
    final: float = 0.0,
    roles: Sequence[str | None] = (),
    task: str = "t",
    payments: Sequence[Payment] = (),
) -> TrainableRollout:
    """One call for each of the rewards; ``final`` is for the rollout as a whole."""
    roles = roles or [None] * len(rewards)
    steps = tuple(Step(number, role) for number, role in enumerate(roles, start=1))
    paid = [Payment(reward, number) for number, reward in enumerate(rewards, start=1) if reward]
    transitions = tuple(
        Transition(
            name, 1, step.span_id, 0, step.role, 0,
            array("i", [1, number]), array("i", [3] * (1 + number)), array("f", [-1.0] * (1 + number)),
            step=number,
        )
        for number, step in enumerate(steps)
    )  # fmt: skip
    everything = (*paid, *payments, Payment(final))
    return TrainableRollout(
        name, task, sum(each.value for each in everything), transitions, steps=steps, payments=everything
    )


def mean_of_group(credits_R: Returns, groups_R: Sequence[int], lengths_R: Sequence[int]) -> Returns:
    """r - mean(group), in NumPy."""
    groups = np.array(groups_R)
    return np.array([r - credits_R[groups == g].mean() for r, g in zip(credits_R, groups, strict=True)])


def grouping_of(*rollouts: TrainableRollout, credit: Credit, least: int = 2) -> tuple[Grouping, LeftOut]:
    left_out = LeftOut()
    found = form_groups(rollouts, min_size=least, may_wait=True, left_out=left_out, credit=credit)
    return found, left_out


def advantages(*rollouts: TrainableRollout, credit: Credit, least: int = 2) -> dict[str, list[float]]:
    """Of each transition, by rollout."""
    grouping, _ = grouping_of(*rollouts, credit=credit, least=least)
    done = assign(grouping.groups, credit=credit, estimator=mean_of_group, least=least)
    return {each.rollout_id: [one.advantage or 0.0 for one in each.transitions] for each in done}


def credits_of(one: TrainableRollout, other: TrainableRollout, credit: Credit) -> list[float | None]:
    [done, _] = assign([[one, other]], credit=credit, estimator=mean_of_group)
    return [each.credit for each in done.transitions]


# -- the three ---------------------------------------------------------------------------------


def test_identical_credit_gives_every_call_the_whole_return() -> None:
    one, other = rollout("a", [0.5, 0, 0], final=0.25), rollout("b", [0, 0, 0])
    assert credits_of(one, other, IDENTICAL) == [0.75, 0.75, 0.75]
    assert advantages(one, other, credit=IDENTICAL)["a"] == [0.375] * 3


def test_discounted_credit_shrinks_with_the_calls_that_came_after() -> None:
    one, other = rollout("a", [0.5, 0, 0], final=0.5), rollout("b", [0, 0, 0])
    credit = Credit("discounted", 0.5)
    assert credits_of(one, other, credit) == [0.25, 0.5, 1.0]
    assert advantages(one, other, credit=credit)["a"] == [0.125, 0.25, 0.5]  # 1 less the mean of 1 and 0


def test_returns_to_go_are_what_was_earned_from_a_call_on() -> None:
    generator = np.random.default_rng(0)
    rewards_T = generator.normal(size=20)
    expected = [sum(0.9 ** (k - t) * rewards_T[k] for k in range(t, 20)) for t in range(20)]
    np.testing.assert_allclose(returns_to_go(rewards_T.tolist(), 0.9), expected)
    one = rollout("a", [1.0, 0.0, 2.0], final=4.0)
    assert credits_of(one, rollout("b", [0, 0, 0]), TO_GO) == [2.5, 3.0, 6.0]
    assert credits_of(one, rollout("b", [0, 0, 0]), Credit("return_to_go")) == [7.0, 6.0, 6.0]


def test_each_step_is_compared_with_the_same_step_of_the_others() -> None:
    rows = np.random.default_rng(1).normal(size=(5, 4))
    members = [rollout(str(number), row.tolist()) for number, row in enumerate(rows)]
    to_go_R_T = np.array([returns_to_go(row.tolist(), 0.5) for row in rows])
    found = advantages(*members, credit=TO_GO)
    np.testing.assert_allclose([found[str(n)] for n in range(5)], to_go_R_T - to_go_R_T.mean(axis=0))


def test_a_step_that_too_few_reached_is_compared_with_the_deepest_that_enough_did() -> None:
    members = (
        rollout("long", [1, 2, 4, 8]),
        rollout("middle", [0, 1]),
        rollout("short", [3, 5]),
        rollout("one", [7]),
    )
    found = advantages(*members, credit=Credit("return_to_go"))
    first, second = np.array([15, 1, 8, 7.0]), np.array([14, 1, 5.0])
    assert found["long"][:2] == pytest.approx([15 - first.mean(), 14 - second.mean()])
    # Only `long` came to steps 2 and 3; the others that came to step 1 stand for themselves with that.
    assert found["long"][2:] == pytest.approx([12 - np.mean([12, 1, 5]), 8 - np.mean([8, 1, 5])])
    assert found["one"] == pytest.approx([7 - first.mean()])
    assert found["middle"] == pytest.approx([1 - first.mean(), 1 - second.mean()])


def test_a_rollout_counts_once_per_step_however_many_answers_a_call_gave() -> None:
    one = rollout("a", [1.0, 0.0])
    twice = replace(one, transitions=(one.transitions[0], *one.transitions))
    other = rollout("b", [0.0, 0.0])
    assert advantages(twice, other, credit=TO_GO)["a"] == [0.5, 0.5, 0.0]


def test_with_one_reward_at_the_end_and_equal_lengths_all_three_agree() -> None:
    members = [rollout(str(n), [0, 0, 0], final=value) for n, value in enumerate([1.0, 0.0, 0.25])]
    expected = advantages(*members, credit=IDENTICAL)
    for method in ("discounted", "return_to_go"):
        assert advantages(*members, credit=Credit(method)) == expected


def test_a_step_that_is_not_trained_on_is_still_compared_with() -> None:
    whole = rollout("a", [1.0, 1.0])
    masked = replace(rollout("b", [0.0, 4.0]), transitions=rollout("b", [0.0, 4.0]).transitions[:1])
    found = advantages(whole, masked, credit=Credit("return_to_go"))
    assert found == {"a": [-1.0, -1.5], "b": [1.0]}


def test_a_part_of_the_credit_goes_with_every_kind() -> None:
    whole = rollout("a", [1.0, 1.0])
    half = replace(whole, transitions=tuple(replace(each, part=0.5) for each in whole.transitions))
    for credit in (IDENTICAL, Credit("discounted", 0.5), TO_GO):
        full = advantages(whole, rollout("b", [0, 0]), credit=credit)["a"]
        assert advantages(half, rollout("b", [0, 0]), credit=credit)["a"] == [value / 2 for value in full]


def test_a_group_is_left_out_where_no_step_differs_and_kept_where_one_does() -> None:
    same = [rollout("a", [1.0, 0.5]), rollout("b", [1.0, 0.5])]
    grouping, left_out = grouping_of(*same, credit=TO_GO)
    assert (grouping.groups, grouping.all_equal) == ((), 1)
    assert left_out.rollouts == {Reason.GROUP_ALL_EQUAL: 2}
    shifted = [rollout("a", [1.0, 0.5]), rollout("b", [0.5, 1.0])]  # the same return, earned elsewhere
    assert grouping_of(*shifted, credit=IDENTICAL)[0].groups == ()
    assert len(grouping_of(*shifted, credit=TO_GO)[0].groups) == 1


def test_returns_that_differ_by_rounding_alone_are_equal() -> None:
    one, other = rollout("a", [0.1, 0.2]), rollout("b", [0.3, 0.0])
    assert one.value != other.value
    assert grouping_of(one, other, credit=IDENTICAL)[0].groups == ()


# -- what a batch must not depend on -----------------------------------------------------------


def many(groups: int = 6, size: int = 5) -> list[TrainableRollout]:
    generator = np.random.default_rng(4)
    return [
        rollout(f"{g}-{m}", generator.normal(size=generator.integers(1, 7)).tolist(), task=f"task {g}")
        for g in range(groups)
        for m in range(size)
    ]


@pytest.mark.parametrize("credit", [IDENTICAL, Credit("discounted", 0.9), TO_GO], ids=lambda c: c.method)
def test_the_order_of_rollouts_and_groups_makes_no_difference_to_the_last_bit(credit: Credit) -> None:
    members = many()
    expected = advantages(*members, credit=credit)
    for seed in range(5):
        Random(seed).shuffle(members)
        assert advantages(*members, credit=credit) == expected


@pytest.mark.parametrize("credit", [IDENTICAL, Credit("discounted", 0.9), TO_GO], ids=lambda c: c.method)
def test_scaling_one_groups_rewards_changes_that_groups_advantages_only(credit: Credit) -> None:
    members = many()

    def scaled(one: TrainableRollout) -> TrainableRollout:
        paid = tuple(replace(each, value=1000 * each.value) for each in one.payments)
        return replace(one, value=1000 * one.value, payments=paid)

    before = advantages(*members, credit=credit)
    after = advantages(*(scaled(one) if one.task_id == "task 2" else one for one in members), credit=credit)
    for name, values in before.items():
        if name.startswith("2-"):
            assert after[name] == pytest.approx([1000 * value for value in values])
        else:
            assert after[name] == values


# -- roles -------------------------------------------------------------------------------------

BY_ROLE = Credit(by_role=True)


def pair(name: str, text: float, verdict: float, *, common: float = 0.0) -> TrainableRollout:
    """A writer, a checker, the writer again; a reward for each role and one for both."""
    own = (Payment(text, None, ("writer",)), Payment(verdict, 2, ("checker",)))
    roles = ["writer", "checker", "writer"]
    return rollout(name, [0, 0, 0], final=common, roles=roles, payments=own)


def test_a_roles_calls_have_its_own_return_and_are_compared_with_its_own_kind() -> None:
    members = [pair("a", 1.0, 0.0, common=0.5), pair("b", 0.0, 4.0), pair("c", 0.5, 2.0)]
    writer, checker = np.array([1.5, 0, 0.5]), np.array([0.5, 4, 2])
    found = advantages(*members, credit=BY_ROLE)
    for number, name in enumerate("abc"):
        of_writer, of_checker = (float((of - of.mean())[number]) for of in (writer, checker))
        assert found[name] == pytest.approx([of_writer, of_checker, of_writer])


def test_steps_are_compared_within_the_role_and_discounted_by_all_calls() -> None:
    one = pair("a", 1.0, 2.0)
    other = rollout("b", [0, 0], roles=["checker", "writer"], final=1.0)
    found = advantages(one, other, credit=replace(TO_GO, by_role=True))
    # Returns-to-go of a's writer: 0.25, 1; of its checker: 2. Of b's checker: 0.5; of its writer: 1.
    assert found["b"] == pytest.approx([0.5 - (2 + 0.5) / 2, 1 - (0.25 + 1) / 2])
    assert found["a"] == pytest.approx([0.25 - (0.25 + 1) / 2, 2 - (2 + 0.5) / 2, 1 - (1 + 1) / 2])


def test_a_role_that_too_few_of_the_group_have_a_return_for_is_left_out_and_counted() -> None:
    lonely = rollout("a", [0, 0], roles=["writer", "checker"], final=1.0)
    grouping, left_out = grouping_of(lonely, rollout("b", [0], roles=["writer"]), credit=BY_ROLE)
    assert [[each.role for each in one.transitions] for one in grouping.trained] == [["writer"], ["writer"]]
    assert left_out.calls == {Reason.ROLE_ALONE: 1}


def test_a_role_without_a_reward_of_its_own_has_no_return() -> None:
    def unpaid(name: str, value: float) -> TrainableRollout:
        one = rollout(name, [0, 0], roles=["writer", "checker"])
        return replace(one, value=value, payments=(Payment(value, None, ("writer",)),))

    grouping, left_out = grouping_of(unpaid("a", 1.0), unpaid("b", 0.0), credit=BY_ROLE)
    assert {each.role for one in grouping.trained for each in one.transitions} == {"writer"}
    assert left_out.calls == {Reason.ROLE_ALONE: 2}


def test_without_rewards_of_roles_only_the_comparison_is_by_role() -> None:
    members = [rollout(n, [0, 0], roles=["x", "y"], final=v) for n, v in (("a", 1.0), ("b", 0.0))]
    assert advantages(*members, credit=BY_ROLE) == advantages(*members, credit=IDENTICAL)


# -- from what was recorded --------------------------------------------------------------------


def test_a_reward_is_paid_at_its_call_and_what_is_for_no_call_of_the_policy_at_the_one_before() -> None:
    calls = [
        span("r", generation([1], [2])),  # 1
        span("r", generation([1], [2]), policy=None),  # 2: another model
        span("r", fidelity=Fidelity.TEXT),  # 3: the policy's, but not to be trained on
        span("r", generation([1], [5])),  # 4
    ]
    rewards = [
        Reward("r", 1.0, span_id=1),
        Reward("r", 2.0, span_id=2),
        Reward("r", 4.0, span_id=3, name="style"),
        Reward("r", 8.0),
        Reward("r", 16.0, attempt=1, name="speed"),
    ]
    rule = RewardRule({"style": 0.5, "speed": -1.0})
    [found] = trainable_rollouts(
        [replace(recorded("r", calls, *rewards), value=-3.0)], Terms(POLICY, 100, rule=rule), LeftOut()
    )
    assert [step.span_id for step in found.steps] == [1, 3, 4]
    assert [each.step for each in found.transitions] == [0, 2]
    to_go = Credit("return_to_go").credits_of(found)
    assert list(to_go.values()) == [3.0 + 2.0 - 8.0, 2.0 - 8.0, -8.0]


def test_calls_of_roles_that_are_not_trained_are_no_steps() -> None:
    calls = [span("r", generation([1], [2]), role=role) for role in ("checker", "writer", "checker")]
    [found] = trainable_rollouts(
        [recorded("r", calls, Reward("r", 1.0, span_id=3))], Terms(POLICY, 100, roles=("writer",)), LeftOut()
    )
    assert list(Credit("return_to_go").credits_of(found).values()) == [1.0]


def test_a_penalty_is_paid_at_the_call_that_it_is_for() -> None:
    from lightning_proxy.store import ErrorClass, Finding

    bad = replace(span("r", generation([1], [3])), findings=(Finding(ErrorClass.TRUNCATED, "cut"),))
    given = recorded(
        "r", [span("r", generation([1], [2])), bad, span("r", generation([1], [4]))], Reward("r", 1.0)
    )
    consequences = Consequences({"truncated": "penalty -0.5"}, Terms(POLICY, 100), LeftOut())
    kept = trainable_rollouts(consequences.keep([given]), Terms(POLICY, 100), LeftOut())
    [found] = consequences.apply(kept)
    assert list(Credit("return_to_go").credits_of(found).values()) == [0.5, 0.5, 1.0]
    assert found.value == 0.5


def test_a_former_companion_takes_part_at_each_step_that_it_took() -> None:
    calls = [span("old", generation([1], [2])) for _ in range(2)]
    former = recorded("old", calls, Reward("old", 1.0, span_id=1), Reward("old", 2.0))
    old = to_compare_with(former, Terms(POLICY, 100))
    again = replace(rollout("new", [0.0, 0.0], final=1.0), again=True, companions=(old,))
    found = advantages(again, credit=Credit("return_to_go"))
    assert found == {"new": [1 - (1 + 3) / 2, 1 - (1 + 2) / 2]}


def lengths_seen(credit: Credit) -> list[Any]:
    seen: list[Any] = []

    def note(credits_R: Returns, groups_R: Sequence[int], lengths_R: Sequence[int]) -> Returns:
        seen.extend(lengths_R)
        return np.zeros_like(credits_R)

    assign([[rollout("a", [1, 0]), rollout("b", [0, 0])]], credit=credit, estimator=note)
    return seen


def test_an_estimator_is_told_the_trained_tokens_of_what_it_compares() -> None:
    assert lengths_seen(IDENTICAL) == [3, 3]
    assert lengths_seen(TO_GO) == [1, 1, 2, 2]
