from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lightning_proxy.errors import InvalidInput, UnknownTarget
from lightning_proxy.store import Reward, Store
from tests.store.support import make_span


def test_a_reward_for_a_rollout_is_entered_with_all_that_was_said(store: Store) -> None:
    store.create_rollout(rollout_id="r1")
    reward, created = store.add_reward(
        value=1, rollout_id="r1", attempt=1, name="style", source="judge", comment="neat", idempotency_key="k"
    )
    assert created
    assert reward == Reward(
        "r1", 1.0, reward.reward_id, 1, None, "style", "judge", "neat", "k", reward.created_at
    )
    assert store.list_rewards("r1") == [reward]


def test_a_response_id_finds_its_span_and_the_newest_where_there_are_several(store: Store) -> None:
    store.add_span(make_span(rollout_id="old"))
    newest = store.add_span(make_span(rollout_id="new"))
    reward, _ = store.add_reward(value=0.5, response_id="chatcmpl-1")
    assert (reward.rollout_id, reward.span_id, reward.attempt) == ("new", newest, None)


def test_a_span_id_finds_its_span(store: Store) -> None:
    span_id = store.add_span(make_span(attempt=2))
    reward, _ = store.add_reward(value=0.5, span_id=span_id, attempt=2)
    assert (reward.rollout_id, reward.span_id) == ("r1", span_id)
    with pytest.raises(InvalidInput, match="attempt 2, not of attempt 1"):
        store.add_reward(value=0.5, span_id=span_id, attempt=1)


@pytest.mark.parametrize(
    ("target", "looked_for"),
    [
        ({"rollout_id": "nobody"}, "no rollout 'nobody'"),
        ({"response_id": "chatcmpl-9"}, "no span with the response id 'chatcmpl-9'"),
        ({"span_id": 99}, "no span 99"),
        ({"rollout_id": "r1", "attempt": 2}, "'r1' has no attempt 2"),
    ],
)
def test_an_unknown_target_is_named(store: Store, target: dict[str, Any], looked_for: str) -> None:
    store.create_rollout(rollout_id="r1")
    with pytest.raises(UnknownTarget, match=looked_for):
        store.add_reward(value=1.0, **target)
    assert store.stats()["rewards"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", 10**400, [1.0]])
def test_what_is_not_a_finite_number_is_refused(store: Store, value: Any) -> None:
    store.create_rollout(rollout_id="r1")
    with pytest.raises(InvalidInput, match="value must be a"):
        store.add_reward(value=value, rollout_id="r1")


@pytest.mark.parametrize(
    "target",
    [
        {},
        {"rollout_id": "r1", "span_id": 1},
        {"rollout_id": "r1", "response_id": "x", "span_id": 1},
        {"rollout_id": 7},
        {"response_id": 7},
        {"span_id": "1"},
        {"span_id": True},
        {"span_id": 2**70},
        {"rollout_id": "r1", "attempt": 0},
        {"rollout_id": "r1", "attempt": "1"},
        {"rollout_id": "r1", "name": ""},
        {"rollout_id": "r1", "name": 5},
        {"rollout_id": "r1", "source": 5},
        {"rollout_id": "r1", "idempotency_key": 5},
    ],
)
def test_malformed_input_is_refused(store: Store, target: dict[str, Any]) -> None:
    store.create_rollout(rollout_id="r1")
    with pytest.raises(InvalidInput):
        store.add_reward(value=1.0, **target)


def test_the_same_key_again_gives_the_first_answer_even_for_another_target(store: Store) -> None:
    store.create_rollout(rollout_id="r1")
    first, created = store.add_reward(value=1.0, rollout_id="r1", idempotency_key="k")
    again, created_again = store.add_reward(value=0.0, rollout_id="nobody", idempotency_key="k")
    assert created
    assert not created_again
    assert again == first
    assert store.list_rewards("r1") == [first]


def test_of_the_same_target_and_name_the_last_one_counts(store: Store) -> None:
    span_id = store.add_span(make_span())
    store.add_reward(value=0.0, rollout_id="r1")
    store.add_reward(value=0.1, span_id=span_id)
    store.add_reward(value=0.2, rollout_id="r1", name="style")
    store.add_reward(value=0.3, rollout_id="r1", attempt=1)
    store.add_reward(value=0.4, response_id="chatcmpl-1")
    store.add_reward(value=0.5, rollout_id="r1")
    assert [reward.value for reward in store.counting_rewards("r1")] == [0.2, 0.3, 0.4, 0.5]
    assert len(store.list_rewards("r1")) == 6


def test_rewards_of_other_attempts_do_not_count_for_an_attempt(store: Store) -> None:
    first, second = store.add_span(make_span()), store.add_span(make_span(attempt=2))
    targets: list[dict[str, Any]] = [
        {"rollout_id": "r1"},
        {"rollout_id": "r1", "attempt": 1},
        {"rollout_id": "r1", "attempt": 2},
        {"span_id": first},
        {"span_id": second},
    ]
    for value, target in enumerate(targets):
        store.add_reward(value=value, **target)
    assert [reward.value for reward in store.counting_rewards_of_attempt("r1", 1)] == [0, 1, 3]
    assert [reward.value for reward in store.counting_rewards_of_attempt("r1", 2)] == [0, 2, 4]


class Ledger(RuleBasedStateMachine):
    """Any sequence of posts, compared with a plain list of what was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.store = Store.open(Path(self.directory.name) / "lightning.db")
        self.entered: list[Reward] = []
        self.by_key: dict[str, Reward] = {}
        self.span_ids: list[int] = []

    @initialize()
    def two_spans(self) -> None:
        self.span_ids = [self.store.add_span(make_span(response_id=f"c{n}", attempt=n)) for n in (1, 2)]

    @rule(
        value=st.floats(-1e6, 1e6),
        whom=st.sampled_from(["rollout", "attempt 1", "attempt 2", "span 1", "response 2"]),
        name=st.sampled_from(["reward", "style"]),
        key=st.none() | st.sampled_from(["a", "b", "c"]),
    )
    def post(self, value: float, whom: str, name: str, key: str | None) -> None:
        targets: dict[str, dict[str, Any]] = {
            "rollout": {"rollout_id": "r1"},
            "attempt 1": {"rollout_id": "r1", "attempt": 1},
            "attempt 2": {"rollout_id": "r1", "attempt": 2},
            "span 1": {"span_id": self.span_ids[0]},
            "response 2": {"response_id": "c2"},
        }
        reward, created = self.store.add_reward(value=value, name=name, idempotency_key=key, **targets[whom])
        assert created == (key is None or key not in self.by_key)
        if created:
            assert reward.value == value
            self.entered.append(reward)
        if key is not None:
            assert self.by_key.setdefault(key, reward) == reward

    @precondition(lambda self: self.span_ids)
    @rule(whom=st.sampled_from([{"rollout_id": "r2"}, {"response_id": "c3"}, {"span_id": 0}]))
    def post_to_nobody(self, whom: dict[str, Any]) -> None:
        with pytest.raises(UnknownTarget):
            self.store.add_reward(value=1.0, **whom)

    @invariant()
    def the_ledger_only_grows_and_the_last_counts(self) -> None:
        assert self.store.list_rewards("r1") == self.entered
        last = {(each.attempt, each.span_id, each.name): each for each in self.entered}
        counting = self.store.counting_rewards("r1")
        assert set(counting) == set(last.values())
        assert [each.reward_id for each in counting] == sorted(each.reward_id or 0 for each in counting)

    def teardown(self) -> None:
        self.store.close()
        self.directory.cleanup()


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


def test_many_are_entered_in_order_or_none_of_them(store: Store) -> None:
    store.create_rollout(rollout_id="r1")
    many: list[dict[str, Any]] = [{"rollout_id": "r1", "value": value} for value in (1.0, 2.0, 3.0)]
    assert [reward.value for reward, _ in store.add_rewards(many)] == [1.0, 2.0, 3.0]
    many.append({"rollout_id": "r1", "value": "high"})
    with pytest.raises(InvalidInput, match=r"rewards\[3\]: value must be a number"):
        store.add_rewards(many)
    assert len(store.list_rewards("r1")) == 3


def test_an_entry_without_a_value_leaves_the_value_before_it(store: Store) -> None:
    store.create_rollout(rollout_id="r1")
    store.add_reward(rollout_id="r1", value=1.0)
    store.add_reward(rollout_id="r1", comment="why?")
    assert [reward.value for reward in store.counting_rewards("r1")] == [1.0]
    with pytest.raises(InvalidInput, match="a value, a comment or a demonstration"):
        store.add_reward(rollout_id="r1")


def test_the_ledger_can_be_read_as_it_was(store: Store) -> None:
    store.create_rollout(rollout_id="r1")
    first, _ = store.add_reward(rollout_id="r1", value=1.0)
    store.add_reward(rollout_id="r1", value=2.0)
    store.add_reward(rollout_id="r1", value=3.0, name="style")
    assert store.counting_rewards("r1", first.reward_id) == (first,)
    assert [reward.value for reward in store.counting_rewards("r1")] == [2.0, 3.0]


def test_of_demonstrations_for_the_same_target_and_name_the_last_one_is_read(store: Store) -> None:
    span_id = store.add_span(make_span())
    message = {"role": "assistant", "content": "It is 42."}
    store.add_reward(rollout_id="r1", demonstration="first", value=0.0)
    store.add_reward(rollout_id="r1", demonstration="second")
    store.add_reward(rollout_id="r1", value=1.0)  # a value leaves it
    store.add_reward(span_id=span_id, demonstration=message)
    found = store.demonstrations()
    assert [(entry.demonstration, entry.span_id) for entry in found] == [("second", None), (message, span_id)]
    assert found == [entry for entry in store.list_rewards("r1") if entry in found]
    assert store.demonstrations(limit=1) == found[:1]
    assert store.demonstrations(after=found[0].reward_id or 0) == found[1:]
