"""What the rewards of a rollout add up to, and that every list shows the same number."""

from __future__ import annotations

import sys

import pytest

from lightning_proxy.store import Payment, Reward, RewardRule, Store, add_up
from tests.store.support import POLICY, make_span

LARGEST = sys.float_info.max


def named(**values: float | None) -> list[Reward]:
    return [Reward("r", value, name=name) for name, value in values.items()]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"reward": 0.0}, 0.0),
        ({"reward": 1.0, "style": 0.5}, 2.0),  # style counts twice
        ({"reward": 1.0, "latency": 3.0}, -0.5),  # less is better, half as much
        ({"reward": None, "style": None}, None),  # comments and demonstrations alone
        ({"reward": None, "style": 0.5}, 1.0),
        ({"cost": 7.0}, None),  # of weight 0: in the ledger only
        ({"cost": 7.0, "reward": 1.0}, 1.0),
    ],
)
def test_the_return_is_the_sum_of_value_times_signed_weight(
    values: dict[str, float | None], expected: float | None
) -> None:
    assert RewardRule({"style": 2.0, "latency": -0.5, "cost": 0.0}).return_of(named(**values)) == expected


def test_the_order_of_the_rewards_makes_no_difference() -> None:
    rewards = named(a=0.1, b=1e16, c=0.2, d=-1e16)
    assert RewardRule().return_of(rewards) == RewardRule().return_of(rewards[::-1]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [((LARGEST, LARGEST), LARGEST), ((-LARGEST, -LARGEST), -LARGEST), ((LARGEST, -LARGEST), 0.0)],
)
def test_no_rewards_make_a_rollout_unreadable(values: tuple[float, float], expected: float) -> None:
    rule = RewardRule({"a": 10.0, "b": 10.0})
    assert rule.return_of(named(a=values[0], b=values[1])) == expected


def test_lists_drains_and_previews_show_the_same_return(store: Store) -> None:
    store.rule = RewardRule({"latency": -1.0})
    store.add_span(make_span())
    store.add_reward(value=2.0, rollout_id="r1", name="latency")
    store.add_reward(value=0.5, rollout_id="r1")
    assert store.list_rollouts()[0].reward == -1.5
    (previewed,) = store.preview(POLICY, 10)
    (drained,) = store.drain(store.begin_run(POLICY, owner="here", lease_s=60).run_id, limit=10)
    assert previewed.value == drained.value == -1.5
    assert [reward.value for reward in store.list_rewards("r1")] == [2.0, 0.5]  # as they were posted


def test_a_reward_of_weight_0_makes_no_rollout_ready(store: Store) -> None:
    store.rule = RewardRule({"latency": 0.0})
    store.add_span(make_span())
    store.add_reward(value=2.0, rollout_id="r1", name="latency")
    assert store.preview(POLICY, 10) == []
    assert store.backlog(POLICY).rollouts_unrewarded == 1


def test_what_a_return_is_made_of_says_for_which_call_and_for_whom() -> None:
    rule = RewardRule({"style": 0.5, "cost": 0.0}, roles={"style": ("writer",)})
    rewards = [
        Reward("r", 1.0),
        Reward("r", 4.0, span_id=7, name="style"),
        Reward("r", 9.0, name="cost"),
        Reward("r", None, comment="well"),
    ]
    payments = rule.payments(rewards)
    assert payments == (Payment(1.0), Payment(2.0, 7, ("writer",)))
    assert rule.return_of(rewards) == add_up(payments) == 3.0
    assert [each.goes_to("writer") for each in payments] == [True, True]
    assert [each.goes_to("checker") for each in payments] == [True, False]
    assert [each.goes_to(None) for each in payments] == [True, False]
