"""Demonstrations wait for a run that asks for them, and are taken once, apart from returns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_proxy.store import RewardRule, Store
from tests.trainer.recording import POLICY, generation, span

Taken = list[tuple[str, bool, list[object]]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.db") as opened:
        yield opened


def record(store: Store, rollout_id: str, calls: int = 1) -> list[int]:
    """A rollout of so many calls; the ids of its spans."""
    store.create_rollout(rollout_id=rollout_id)
    for _ in range(calls):
        store.add_span(span(rollout_id, generation([1, 2], [3])))
    spans = store.list_spans(rollout_id=rollout_id)
    return sorted(each.span_id for each in spans if each.span_id is not None)


def drain(store: Store, *, demonstrated: bool = True, commit: bool = True) -> Taken:
    """What a run takes: rollout, whether its return is the run's, what its demonstrations say."""
    run = store.begin_run(POLICY, owner="test", lease_s=60)
    taken = store.drain(run.run_id, limit=100, demonstrated=demonstrated)
    if commit:
        store.commit_run(run.run_id, report={}, version=None)
    else:
        store.fail_run(run.run_id, "the test says so")
    return [
        (each.rollout.rollout_id, each.for_return, [shown.demonstration for shown in each.demonstrations])
        for each in taken
    ]


def test_a_demonstration_alone_makes_a_rollout_ready_for_a_run_that_asks_for_it(store: Store) -> None:
    record(store, "shown")
    store.add_reward(rollout_id="shown", demonstration="right")
    assert drain(store, demonstrated=False) == []
    assert store.backlog(POLICY).rollouts_ready == 0
    assert store.backlog(POLICY, demonstrated=True).rollouts_ready == 1
    [previewed] = store.preview(POLICY, 10, demonstrated=True)
    assert (previewed.value, previewed.for_return) == (None, False)
    assert drain(store) == [("shown", False, ["right"])]
    assert drain(store) == []


def test_a_run_that_fails_gives_demonstrations_back(store: Store) -> None:
    record(store, "shown")
    store.add_reward(rollout_id="shown", demonstration="right")
    assert drain(store, commit=False) == drain(store) == [("shown", False, ["right"])]


def test_returns_and_demonstrations_are_each_taken_once_in_either_order(store: Store) -> None:
    for name in ("return first", "demonstration first", "both at once"):
        record(store, name)
    store.add_reward(rollout_id="return first", value=-1.0, demonstration="right")
    store.add_reward(rollout_id="demonstration first", demonstration="right")
    assert drain(store, demonstrated=False) == [("return first", True, [])]
    assert drain(store) == [("return first", False, ["right"]), ("demonstration first", False, ["right"])]
    store.add_reward(rollout_id="demonstration first", value=0.5)
    store.add_reward(rollout_id="both at once", value=0.5, demonstration="right")
    assert drain(store) == [("demonstration first", True, []), ("both at once", True, ["right"])]
    assert drain(store) == drain(store, demonstrated=False) == []


def test_a_value_after_a_demonstration_was_taken_is_the_first_not_a_late_one(store: Store) -> None:
    store.rule = RewardRule(late=False)
    record(store, "shown")
    store.add_reward(rollout_id="shown", demonstration="right")
    drain(store)
    store.add_reward(rollout_id="shown", value=1.0)
    run = store.begin_run(POLICY, owner="test", lease_s=60)
    [taken] = store.drain(run.run_id, limit=10)
    assert (taken.for_return, taken.again, taken.value) == (True, False, 1.0)


def test_only_a_correction_lets_a_demonstration_be_taken_again(store: Store) -> None:
    first, second = record(store, "shown", calls=2)
    store.add_reward(span_id=first, demonstration="wrong")
    store.add_reward(span_id=first, demonstration="right")
    store.add_reward(span_id=second, demonstration={"role": "assistant", "content": "also"})
    assert drain(store) == [("shown", False, ["right", {"role": "assistant", "content": "also"}])]
    store.add_reward(span_id=first, demonstration="right")  # the same once more
    store.add_reward(span_id=second, comment="nice")
    assert drain(store) == []
    store.add_reward(span_id=first, demonstration="better")
    assert drain(store) == [("shown", False, ["better"])]
    assert drain(store) == []


def test_what_is_set_aside_for_a_later_run_keeps_its_demonstrations_taken(store: Store) -> None:
    record(store, "shown")
    record(store, "rewarded")
    store.add_reward(rollout_id="shown", value=1.0, demonstration="right")
    store.add_reward(rollout_id="rewarded", value=1.0)
    run = store.begin_run(POLICY, owner="test", lease_s=60)
    store.drain(run.run_id, limit=10, demonstrated=True)
    store.give_back(run.run_id, ["shown", "rewarded"])
    store.commit_run(run.run_id, report={}, version=None)
    assert drain(store) == [("shown", True, []), ("rewarded", True, [])]


def test_demonstrations_for_another_attempt_are_not_for_the_last_one(store: Store) -> None:
    (first,) = record(store, "tried twice")
    store.add_span(span("tried twice", generation([1, 2], [3]), attempt=2))
    store.add_reward(span_id=first, demonstration="late")
    store.add_reward(rollout_id="tried twice", attempt=1, demonstration="late")
    assert drain(store) == []
    store.add_reward(rollout_id="tried twice", attempt=2, demonstration="right")
    assert drain(store) == [("tried twice", False, ["right"])]
