"""Versions compared over real databases: who a rollout belongs to, and what becomes of late rewards."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_proxy.errors import InvalidInput, UnknownTarget
from lightning_proxy.store import (
    Comparison,
    ErrorClass,
    Method,
    PolicyVersion,
    RewardRule,
    RolloutState,
    Store,
    VersionReturns,
    VersionStatus,
    against_from,
    failed_by_infrastructure,
    new_task,
)
from tests.store.support import POLICY, make_span


def add(
    store: Store, rollout_id: str, version: int | None, value: float | None = None, **changes: Any
) -> int:
    """A call that a version answered, with a reward for its rollout."""
    given = {"rollout_id": rollout_id, "policy_version": version, "policy_version_end": version, **changes}
    span_id = store.add_span(make_span(**given, response_id=f"{rollout_id}-{version}"))
    if value is not None:
        store.add_reward(value=value, rollout_id=rollout_id)
    return span_id


def add_versions(store: Store, *parents: int) -> None:
    """Version 0, and one more for each parent."""
    store.add_base_version(POLICY, "w0")
    with store.transaction():
        for number, parent in enumerate(parents, 1):
            store.insert_version(
                PolicyVersion(POLICY, number, f"w{number}", VersionStatus.STAGED, parent=parent)
            )


def failed(**changes: Any) -> dict[str, Any]:
    """What makes a call one that failed."""
    return {"response": None, "generations": (), "error": "boom", **changes}


def counts(found: Comparison) -> dict[int | None, tuple[int, int]]:
    return {each.version: (each.rollouts, each.rewarded) for each in found.versions}


def values(found: Comparison) -> dict[int | None, float | None]:
    return {each.version: None if each.mean is None else each.mean.value for each in found.versions}


def test_each_version_has_its_rollouts_its_mean_and_its_difference_to_the_first(store: Store) -> None:
    add_versions(store, 0)
    for number in range(10):
        add(store, f"old{number}", 0, -1.0 if number < 7 else 1.0)
        add(store, f"new{number}", 1, 1.0 if number < 9 else -1.0)
    add(store, "silent", 1)
    found = store.compare_versions(POLICY)
    old, new = found.versions
    assert (old.version, old.status, old.rollouts, old.rewarded, old.share) == (0, "active", 10, 10, 1.0)
    assert (new.version, new.status, new.rollouts, new.rewarded, new.share) == (1, "staged", 11, 10, 10 / 11)
    assert (old.against, old.difference, new.against) == (None, None, 0)
    assert new.mean is not None
    assert new.difference is not None
    assert (new.mean.value, new.mean.method, found.two_valued) == (0.8, Method.WILSON, True)
    # Newcombe's published 9/10 - 3/10, on the scale of thumbs.
    assert (new.difference.low, new.difference.high) == pytest.approx((2 * 0.1705, 2 * 0.8090), abs=1e-4)


def test_late_and_corrected_rewards_change_the_figures(store: Store) -> None:
    spans = [add(store, f"r{number}", 0) for number in range(4)]
    add(store, "other", 1, -1.0)
    assert counts(store.compare_versions(POLICY))[0] == (4, 0)
    assert values(store.compare_versions(POLICY))[0] is None
    for span_id in spans[:2]:
        store.add_reward(value=1.0, span_id=span_id, name="thumb")
    assert counts(store.compare_versions(POLICY))[0] == (4, 2)
    assert values(store.compare_versions(POLICY))[0] == 1.0
    store.add_reward(value=-1.0, span_id=spans[0], name="thumb")  # corrected
    store.add_reward(value=None, span_id=spans[0], name="thumb", comment="why not")  # leaves it as it is
    assert values(store.compare_versions(POLICY))[0] == 0.0
    store.add_reward(value=1.0, span_id=spans[3], name="thumb")
    assert values(store.compare_versions(POLICY))[0] == pytest.approx(1 / 3)


def test_a_rollout_that_versions_share_is_nobodys(store: Store) -> None:
    add(store, "changed", 0)
    add(store, "changed", 1, 1.0)
    add(store, "within", 0, 1.0, policy_version_end=1)
    add(store, "untold", None, 1.0)
    add(store, "partly", 1, 1.0, policy_version_end=None)
    add(store, "whole", 1, -1.0)
    found = store.compare_versions(POLICY)
    assert counts(found) == {1: (1, 1)}
    assert (found.mixed.rollouts, found.mixed.rewarded, found.mixed.version) == (2, 2, None)
    assert (found.unknown.rollouts, found.unknown.rewarded) == (2, 2)
    assert found.mixed.mean is not None
    assert found.mixed.difference is None


def test_only_what_the_policy_answered_in_the_last_attempt_counts(store: Store) -> None:
    lost = add(store, "retried", 0)
    store.add_reward(value=-5.0, span_id=lost)
    store.add_reward(value=-5.0, rollout_id="retried", attempt=1)
    add(store, "retried", 1, 1.0, attempt=2)
    add(store, "changed", 0, **failed(error_class=ErrorClass.UPSTREAM_ERROR))  # no answer of version 0
    add(store, "changed", 1, 0.0)
    add(store, "others", 0, 1.0, policy="critic")
    add(store, "others", 1)
    add(store, "unanswered", 1, 0.0, **failed(error_class=ErrorClass.UPSTREAM_ERROR))
    found = store.compare_versions(POLICY)
    assert counts(found) == {1: (3, 3)}
    assert values(found) == {1: pytest.approx(2 / 3)}
    assert counts(store.compare_versions("critic")) == {0: (1, 1)}


def test_faults_of_the_infrastructure_blame_no_version(store: Store) -> None:
    for name, error_class in (
        ("down", ErrorClass.UPSTREAM_UNREACHABLE),
        ("late", ErrorClass.TIMEOUT),
        ("crash", ErrorClass.AGENT_CRASH),
        ("slow", ErrorClass.TIMEOUT),
    ):
        add(store, name, 0, 0.0)
        if name == "late":  # a call ran into it: the engine's; else the attempt's own: the agent's
            add(store, name, 0, ended_at=1010.0, **failed(error_class=error_class))
        store.finish_rollout(name, RolloutState.FAILED, None, error_class)
    found = store.compare_versions(POLICY)
    assert counts(found) == {0: (2, 2)}
    assert found.faulty == 2


def test_a_rollout_of_the_pool_counts_once_it_has_ended(store: Store) -> None:
    store.enqueue_tasks([new_task({"task_id": "a", "input": {"q": 1}})])
    (given_,) = store.claim_tasks("w")
    add(store, given_.rollout_id, 0, 1.0)
    add(store, "other", 0, 0.0)
    assert counts(store.compare_versions(POLICY)) == {0: (1, 1)}
    store.finish_attempt(given_.rollout_id, 1, RolloutState.SUCCEEDED)
    assert counts(store.compare_versions(POLICY)) == {0: (2, 2)}


def test_returns_are_weighed_as_for_training_and_one_reward_alone_is_as_posted(store: Store) -> None:
    store.rule = RewardRule({"latency": -0.5, "cost": 0.0})
    add(store, "r", 0, 1.0)
    store.add_reward(value=3.0, rollout_id="r", name="latency")
    store.add_reward(value=7.0, rollout_id="r", name="cost")
    add(store, "cheap", 0)
    store.add_reward(value=9.0, rollout_id="cheap", name="cost")
    assert (previewed := store.preview(POLICY, 10)[0].value) == -0.5
    assert values(store.compare_versions(POLICY)) == {0: previewed}
    assert counts(store.compare_versions(POLICY)) == {0: (2, 1)}
    assert values(store.compare_versions(POLICY, reward="latency")) == {0: 3.0}
    assert values(store.compare_versions(POLICY, reward="cost")) == {0: 8.0}
    assert counts(store.compare_versions(POLICY, reward="nothing")) == {0: (2, 0)}


def test_a_window_of_time_leaves_out_what_began_before_it(store: Store) -> None:
    add_versions(store)
    add(store, "old", 0, 1.0, started_at=100.0)
    add(store, "new", 1, 1.0, started_at=200.0)
    assert counts(store.compare_versions(POLICY, since=150.0)) == {0: (0, 0), 1: (1, 1)}
    assert store.compare_versions(POLICY, since=150.0).versions[1].against is None  # it is the first


def test_versions_are_compared_with_the_first_with_their_parents_or_with_one(store: Store) -> None:
    add_versions(store, 0, 0, 1)
    for version in (1, 2, 3):
        add(store, f"r{version}", version, float(version > 1))

    def compared(against: Any) -> list[tuple[int | None, float | None]]:
        found = store.compare_versions(POLICY, against=against)
        return [
            (each.against, None if each.difference is None else each.difference.value)
            for each in found.versions
        ]

    assert compared("first") == [(1, None), (None, None), (1, 1.0), (1, 1.0)]
    assert compared("parent") == [(None, None), (0, None), (0, None), (1, 1.0)]
    assert compared(3) == [(3, None), (3, -1.0), (3, 0.0), (None, None)]
    with pytest.raises(UnknownTarget, match="no version 7"):
        store.compare_versions(POLICY, against=7)
    with pytest.raises(UnknownTarget, match="'plicy'"):
        store.compare_versions("plicy")
    assert [against_from(text) for text in ("first", "parent", "12")] == ["first", "parent", 12]
    for text in ("", "-1", "second", "1.5"):
        with pytest.raises(InvalidInput, match="first"):
            against_from(text)


def test_a_policy_without_anything_yet_has_a_comparison_of_nothing(store: Store) -> None:
    add_versions(store)
    found = store.compare_versions(POLICY)
    empty = VersionReturns(0, VersionStatus.ACTIVE, 0, 0, None)
    assert (found.versions, found.mixed.rollouts, found.faulty) == ((empty,), 0, 0)


# -- against a plain recomputation -------------------------------------------------------------------

VERSIONS = st.sampled_from([0, 0, 1, 1, 2, None])
CALL = st.fixed_dictionaries(
    {
        "attempt": st.integers(1, 2),
        "policy_version": VERSIONS,
        "changes": st.sampled_from([False, False, False, True]),
        "policy": st.sampled_from([POLICY, POLICY, POLICY, "critic", None]),
        "fails": st.sampled_from([False, False, True]),
    }
)
REWARD = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["reward", "style", "cost", "latency"]),
        "value": st.sampled_from([None, -1.0, 0.0, 0.1, 0.2, 1.0]),
        "target": st.sampled_from(["rollout", "attempt", "span"]),
        "which": st.integers(0, 10),
    }
)
ROLLOUTS = st.lists(
    st.tuples(st.lists(CALL, min_size=1, max_size=3), st.lists(REWARD, max_size=5)), max_size=8
)
RULE = RewardRule({"style": 0.3, "latency": -1.0, "cost": 0.0})


def fill(store: Store, rollouts: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> None:
    for number, (calls, rewards) in enumerate(rollouts):
        ids = []
        for call in calls:
            version = call["policy_version"]
            end = version + 1 if call["changes"] and version is not None else version
            broken = failed(error_class=ErrorClass.UPSTREAM_ERROR) if call["fails"] else {}
            ids.append(
                store.add_span(
                    make_span(
                        rollout_id=f"r{number}", attempt=call["attempt"], policy=call["policy"],
                        policy_version=version, policy_version_end=end, **broken,
                    )
                )
            )  # fmt: skip
        attempts = [each.number for each in store.list_attempts(f"r{number}")]
        for each in rewards:
            target: dict[str, Any] = {"rollout_id": f"r{number}"}
            if each["target"] == "attempt":
                target["attempt"] = attempts[each["which"] % len(attempts)]
            if each["target"] == "span":
                target = {"span_id": ids[each["which"] % len(ids)]}
            comment = "well" if each["value"] is None else None
            store.add_reward(value=each["value"], name=each["name"], comment=comment, **target)


def plainly(store: Store) -> dict[int | str, tuple[int, list[float]]]:
    """Rollouts and returns by version, read one rollout at a time."""
    found: defaultdict[int | str, list[float | None]] = defaultdict(list)
    for summary in store.list_rollouts(limit=1000):
        rollout_id = summary.rollout.rollout_id
        last = store.list_attempts(rollout_id)[-1].number
        spans = [
            span
            for span in store.spans_of_attempt(rollout_id, last)
            if span.policy == POLICY and span.error_class is None
        ]
        if spans:
            by = {span.policy_version for span in spans} | {span.policy_version_end for span in spans}
            whose: int | str | None = "unknown" if None in by else "mixed" if len(by) > 1 else by.pop()
            assert whose is not None
            found[whose].append(RULE.return_of(store.counting_rewards_of_attempt(rollout_id, last)))
    return {key: (len(got), [one for one in got if one is not None]) for key, got in found.items()}


@settings(max_examples=60, deadline=None)
@given(ROLLOUTS)
def test_the_query_gives_what_a_plain_recomputation_gives(
    rollouts: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "lightning.db") as store:
        store.rule = RULE
        add_versions(store)
        fill(store, rollouts)
        expected = plainly(store)
        found = store.compare_versions(POLICY)
        rows = {each.version: each for each in found.versions} | {
            "mixed": found.mixed,
            "unknown": found.unknown,
        }
        assert expected.keys() <= rows.keys()
        for key, row in rows.items():
            count, returns = expected.get(key, (0, []))  # type: ignore[arg-type]
            assert (row.rollouts, row.rewarded) == (count, len(returns))
            assert (None if row.mean is None else row.mean.value) == (
                pytest.approx(fmean(returns)) if returns else None
            )


@pytest.mark.parametrize(
    ("seen_as", "settings"), [("silent_death", {"silence_s": 5}), ("timeout", {"timeout_s": 5})]
)
def test_a_rollout_that_the_pool_gave_up_after_a_fault_of_the_engine_is_nobodys_as_in_training(
    seen_as: str, settings: dict[str, Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.enqueue_tasks([new_task({"task_id": "t", "input": {"q": 1}, "retry_on": [], **settings})])
    [given] = store.claim_tasks("w", lease_s=1000)
    add(store, given.rollout_id, 1)
    store.add_span(
        make_span(
            **failed(rollout_id=given.rollout_id, error_class=ErrorClass.UPSTREAM_ERROR, ended_at=1002.0)
        )
    )
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 10)
    assert store.sweep_tasks() == 1
    store.add_reward(value=0.0, rollout_id=given.rollout_id)
    rollout = store.get_rollout(given.rollout_id)
    assert rollout.error_class is ErrorClass.UPSTREAM_ERROR
    assert rollout.reason is not None
    assert "its last call ended in upstream_error: boom" in rollout.reason
    spans = store.spans_of_attempt(given.rollout_id, 1)
    assert failed_by_infrastructure(ErrorClass(seen_as), spans) is ErrorClass.UPSTREAM_ERROR
    found = store.compare_versions(POLICY)
    assert (found.faulty, counts(found)) == (1, {})
