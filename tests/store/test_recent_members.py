"""The last rollouts that runs trained on in a group: what a running baseline looks back on."""

from __future__ import annotations

import time

import pytest

from lightning_proxy.store import ErrorClass, Finding, RewardRule, Store
from lightning_proxy.store.runs import _COMPANIONS, _RECENT
from tests.store.support import POLICY, add_ready_rollout, make_span

KEY = "running:-"


def train(store: Store, key: str, *names: str, commit: bool = True) -> None:
    """These rollouts, with returns 0, 1, 2 ..., in a run of their own and in this group."""
    for value, name in enumerate(names):
        add_ready_rollout(store, name, value=float(value))
    run_id = store.begin_run(POLICY, owner="here", lease_s=60).run_id
    store.drain(run_id, limit=1000)
    if commit:
        store.commit_run(run_id, report={}, version=None, groups=dict.fromkeys(names, key))
    else:
        store.fail_run(run_id, "boom")


def recent(store: Store, limit: int = 100, policy: str = POLICY) -> dict[str, float | None]:
    return {each.rollout.rollout_id: each.value for each in store.recent_members(policy, KEY, limit)}


def test_they_come_newest_run_first_and_no_more_than_asked_for(store: Store) -> None:
    train(store, KEY, "a", "b")
    train(store, "task_id:t", "elsewhere")
    train(store, KEY, "c", "d")
    assert list(recent(store)) == ["c", "d", "a", "b"]
    assert list(recent(store, limit=3)) == ["c", "d", "a"]
    assert recent(store, policy="other") == {}


def test_what_a_failed_run_drained_is_none_of_them(store: Store) -> None:
    train(store, KEY, "a", commit=False)
    assert recent(store) == {}


def test_their_returns_are_those_of_now_and_each_counts_once(store: Store) -> None:
    train(store, KEY, "a", "b")
    store.add_reward(value=5.0, rollout_id="a")
    train(store, KEY, "a")  # again, for its late reward: entered anew with 0
    store.add_reward(value=7.0, rollout_id="a", name="more")
    assert recent(store) == {"a": 7.0, "b": 1.0}
    store.rule = RewardRule({"more": -1.0})
    assert recent(store) == {"a": -7.0, "b": 1.0}


def test_they_say_what_their_return_is_made_of(store: Store) -> None:
    train(store, KEY, "a")
    store.add_span(make_span(rollout_id="a", role="checker", response_id="later"))
    store.add_span(make_span(rollout_id="a", policy="other", response_id="another"))
    store.add_reward(value=2.0, response_id="later")
    [found] = store.recent_members(POLICY, KEY, 10)
    assert [(call.policy, call.role) for call in found.spans] == [
        (POLICY, None), (POLICY, "checker"), ("other", None)
    ]  # fmt: skip
    assert [(each.value, each.span_id) for each in found.rewards] == [
        (0.0, None), (2.0, found.spans[1].span_id)
    ]  # fmt: skip


def test_nobody_of_a_running_baseline_is_a_companion_for_good(store: Store) -> None:
    train(store, KEY, "a", "b")
    store.add_reward(value=5.0, rollout_id="a")
    [again] = store.preview(POLICY, 10)
    assert (again.again, again.companions) == (True, ())


def test_looking_back_is_fast_after_2_000_runs(store: Store) -> None:
    with store.transaction():
        for number in range(2_000):
            add_ready_rollout(store, f"r{number}", generations=())
            store.connection.execute(
                "INSERT INTO training_runs (policy, state, owner, started_at, lease_expires_at) "
                "VALUES (?, 'committed', 'here', 1.0, 2.0)",
                (POLICY,),
            )
            store.connection.execute(
                "INSERT INTO consumptions (run_id, rollout_id, attempt, last_reward_id, group_key) "
                "VALUES ((SELECT max(run_id) FROM training_runs), ?, 1, 0, ?)",
                (f"r{number}", KEY if number % 4 == 0 else "task_id:t"),
            )
    before = time.thread_time()
    found = store.recent_members(POLICY, KEY, 256)
    seconds = time.thread_time() - before
    assert [each.rollout.rollout_id for each in found[:2]] == ["r1996", "r1992"]
    assert len(found) == 256
    print(f"\n256 returns among 2,000 runs: {seconds * 1000:.0f} ms of CPU")
    assert seconds < 0.5


def test_those_that_certain_versions_answered_are_found_among_the_last(store: Store) -> None:
    for name, version in (("a", 0), ("b", 1), ("c", None), ("d", 1)):
        add_ready_rollout(store, name, policy_version=version)
        run_id = store.begin_run(POLICY, owner="here", lease_s=60).run_id
        store.drain(run_id, limit=10)
        store.commit_run(run_id, report={}, version=None, groups={name: KEY})

    def answered_by(*versions: int | None, limit: int = 10) -> list[str]:
        found = store.recent_members(POLICY, KEY, limit, versions=versions)
        return [each.rollout.rollout_id for each in found]

    assert answered_by(1) == ["d", "b"]
    assert answered_by(0, None) == ["c", "a"]
    assert answered_by(0, 1, limit=2) == ["d"]  # of the last two
    assert answered_by() == []


def test_their_calls_are_heads_unless_what_they_hold_says_which_of_them_count(store: Store) -> None:
    train(store, KEY, "plain", "retried", "found")
    store.add_span(make_span(rollout_id="retried", retry=1, response_id="again"))
    cut = Finding(ErrorClass.TRUNCATED, "at its limit")
    store.add_span(make_span(rollout_id="found", findings=(cut,), response_id="cut"))
    found = {each.rollout.rollout_id: each.spans for each in store.recent_members(POLICY, KEY, 10)}
    assert {name: bool(spans[0].request) for name, spans in found.items()} == {
        "plain": False, "retried": True, "found": True
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sql", "found_by"), [(_RECENT, "(group_key=?)"), (_COMPANIONS, "(group_key=? AND run_id=?)")]
)
def test_a_groups_members_are_found_by_its_key(sql: str, found_by: str, store: Store) -> None:
    named = {"group_key": KEY, "policy": POLICY, "rollout_id": "a"}
    plan = [row["detail"] for row in store.rows(f"EXPLAIN QUERY PLAN {sql}", named)]
    assert any(f"consumptions_by_key {found_by}" in step for step in plan), plan
