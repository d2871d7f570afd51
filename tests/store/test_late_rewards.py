"""What happens to a rollout when rewards come after a run has trained on it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from sqlite_utils import Database

from lightning_proxy.store import (
    ErrorClass,
    PolicyVersion,
    RecordedRollout,
    Reward,
    RewardRule,
    Store,
    VersionStatus,
)
from lightning_proxy.store.migrations import migrations
from tests.store.support import POLICY, add_ready_rollout, make_span


def begin(store: Store, policy: str = POLICY) -> int:
    return store.begin_run(policy, owner="here", lease_s=60).run_id


def train(store: Store, groups: Mapping[str, str] | None = None) -> dict[str, float | None]:
    """Drain everything and commit it; rollout ids and the returns that the run was given."""
    run_id = begin(store)
    drained = store.drain(run_id, limit=100_000)
    store.commit_run(run_id, report={}, version=None, groups=groups)
    return {each.rollout.rollout_id: each.value for each in drained}


def waiting(store: Store) -> dict[str, float | None]:
    return {each.rollout.rollout_id: each.value for each in store.preview(POLICY, 1000)}


def companions(again: RecordedRollout) -> dict[str, float | None]:
    return {each.rollout.rollout_id: each.value for each in again.companions}


@pytest.fixture
def trained(store: Store) -> Store:
    """Two rollouts of return 1 and 0 that a run has trained on, as one group."""
    add_ready_rollout(store, "a", value=1.0)
    add_ready_rollout(store, "b", value=0.0)
    assert train(store, {"a": "task_id:t", "b": "task_id:t"}) == {"a": 1.0, "b": 0.0}
    return store


def test_a_late_reward_that_gives_another_return_makes_the_rollout_wait_again(trained: Store) -> None:
    assert waiting(trained) == {}
    trained.add_reward(value=0.25, rollout_id="a")
    assert waiting(trained) == {"a": 0.25}
    backlog = trained.backlog(POLICY)
    assert (backlog.rollouts_ready, backlog.rollouts_again, backlog.spans) == (1, 1, 1)
    assert train(trained) == {"a": 0.25}
    assert waiting(trained) == {}


@pytest.mark.parametrize(
    "late",
    [
        {"value": 1.0},  # said again
        {"comment": "well done"},
        {"demonstration": "42"},
        {"value": 0.0, "name": "style"},  # adds nothing
    ],
)
def test_a_late_entry_that_leaves_the_return_as_it_is_changes_nothing(
    trained: Store, late: dict[str, object]
) -> None:
    trained.add_reward(rollout_id="a", **late)  # type: ignore[arg-type]
    assert waiting(trained) == {}


def test_a_correction_that_is_taken_back_before_a_run_changes_nothing(trained: Store) -> None:
    trained.add_reward(value=0.0, rollout_id="a")
    trained.add_reward(value=1.0, rollout_id="a")
    assert waiting(trained) == {}
    trained.add_reward(value=0.5, rollout_id="a")
    assert waiting(trained) == {"a": 0.5}


def test_what_counts_is_the_return_that_it_was_last_trained_on(trained: Store) -> None:
    trained.add_reward(value=0.0, rollout_id="a")
    assert train(trained) == {"a": 0.0}
    trained.add_reward(value=1.0, rollout_id="a")
    assert train(trained) == {"a": 1.0}


def test_a_reward_under_another_name_adds_to_the_return(trained: Store) -> None:
    trained.add_reward(value=-0.5, response_id="response-a", name="style")
    assert waiting(trained) == {"a": 0.5}


def test_another_weight_alone_opens_nothing(trained: Store) -> None:
    trained.rule = RewardRule({"reward": 3.0})
    assert waiting(trained) == {}
    trained.add_reward(value=0.5, rollout_id="a")
    assert waiting(trained) == {"a": 1.5}


def test_late_rewards_are_ignored_where_that_is_wanted(trained: Store) -> None:
    trained.rule = RewardRule(late=False)
    trained.add_reward(value=0.5, rollout_id="a")
    assert waiting(trained) == {}
    assert trained.backlog(POLICY).rollouts_ready == 0
    trained.rule = RewardRule()
    assert waiting(trained) == {"a": 0.5}


def test_a_reward_that_comes_while_a_run_trains_is_for_the_next_run(store: Store) -> None:
    add_ready_rollout(store, "a", value=1.0)
    run_id = begin(store)
    (drained,) = store.drain(run_id, limit=10)
    store.add_reward(value=0.0, rollout_id="a")
    assert drained.value == 1.0
    assert waiting(store) == {}  # the run holds it
    store.commit_run(run_id, report={}, version=None)
    assert train(store) == {"a": 0.0}


def test_a_run_that_fails_leaves_it_to_the_next_with_all_that_was_entered(trained: Store) -> None:
    trained.add_reward(value=0.5, rollout_id="a")
    run_id = begin(trained)
    assert len(trained.drain(run_id, limit=10)) == 1
    trained.add_reward(value=0.75, rollout_id="a")
    trained.fail_run(run_id, "boom")
    assert train(trained) == {"a": 0.75}


def test_what_is_given_back_still_waits(trained: Store) -> None:
    trained.add_reward(value=0.5, rollout_id="a")
    run_id = begin(trained)
    trained.drain(run_id, limit=10)
    trained.give_back(run_id, ["a"])
    trained.commit_run(run_id, report={}, version=None)
    assert train(trained) == {"a": 0.5}


def test_a_rejected_version_leaves_the_return_before_it_as_the_one_trained_on(trained: Store) -> None:
    trained.add_base_version(POLICY, "/weights/0")
    trained.add_reward(value=0.5, rollout_id="a")
    run_id = begin(trained)
    trained.drain(run_id, limit=10)
    version = PolicyVersion(POLICY, 1, "/weights/1", VersionStatus.STAGED, parent=0)
    trained.commit_run(run_id, report={}, version=version)
    trained.reject_version(POLICY, 1, "wrong logprobs")
    assert waiting(trained) == {"a": 0.5}
    trained.add_reward(value=1.0, rollout_id="a")
    assert waiting(trained) == {}


def test_rewards_for_a_later_attempt_let_that_attempt_be_trained_on(trained: Store) -> None:
    trained.add_span(make_span(rollout_id="a", attempt=2, response_id="second"))
    assert waiting(trained) == {}
    trained.add_reward(value=1.0, rollout_id="a", attempt=2)
    (again,) = trained.preview(POLICY, 10)
    assert (again.attempt, again.value) == (2, 2.0)  # with the reward for the rollout as a whole


def test_another_policys_run_does_not_open_or_close_it(trained: Store) -> None:
    trained.add_span(make_span(rollout_id="a", policy="other", response_id="other"))
    other = begin(trained, "other")
    assert [each.again for each in trained.drain(other, limit=10)] == [False]
    trained.commit_run(other, report={}, version=None)
    trained.add_reward(value=0.5, rollout_id="a")
    assert waiting(trained) == {"a": 0.5}


def test_it_brings_the_present_returns_of_those_it_was_compared_with(store: Store) -> None:
    for name, value in (("a", 1.0), ("b", 0.0), ("c", 0.5), ("elsewhere", 0.25)):
        add_ready_rollout(store, name, value=value)
    train(store, {"a": "task_id:t", "b": "task_id:t", "c": "task_id:t", "elsewhere": "task_id:u"})
    store.add_reward(value=0.125, rollout_id="a")
    store.add_reward(value=0.75, rollout_id="c")
    found: dict[str, RecordedRollout] = {each.rollout.rollout_id: each for each in store.preview(POLICY, 10)}
    assert found["a"].again
    assert companions(found["a"]) == {"b": 0.0, "c": 0.75}
    assert companions(found["c"]) == {"a": 0.125, "b": 0.0}
    train(store, {"a": "task_id:t", "c": "task_id:t"})
    store.add_reward(value=1.0, rollout_id="a")  # a third time, and its first group is not forgotten
    (again,) = store.preview(POLICY, 10)
    assert companions(again) == {"b": 0.0, "c": 0.75}


def test_a_fresh_rollout_has_no_companions(store: Store) -> None:
    add_ready_rollout(store, "a")
    (fresh,) = store.preview(POLICY, 10)
    assert (fresh.again, fresh.companions) == (False, ())


def test_a_database_of_before_keeps_its_ledger_and_opens_only_what_is_rewarded_from_now_on(db: Path) -> None:
    before = Database(str(db))
    migrations.apply(before, stop_before="demonstrations_and_late_rewards")
    for statement in (
        "INSERT INTO rollouts (rollout_id, state, created_at) VALUES ('a', 'open', 1.0)",
        "INSERT INTO attempts (rollout_id, number, started_at, state) VALUES ('a', 1, 1.0, 'open')",
        "INSERT INTO rewards (reward_id, rollout_id, name, value, idempotency_key, created_at) "
        "VALUES (7, 'a', 'reward', 1.0, 'k', 2.0)",
        "INSERT INTO rewards (reward_id, rollout_id, name, value, created_at) VALUES (9, 'a', 'x', 0.0, 3.0)",
        "DELETE FROM rewards WHERE reward_id = 9",
        "INSERT INTO training_runs (policy, state, owner, started_at, lease_expires_at) "
        "VALUES ('policy', 'committed', 'here', 4.0, 5.0)",
        "INSERT INTO consumptions (run_id, rollout_id) VALUES (1, 'a')",
        "PRAGMA user_version = 3",
    ):
        before.execute(statement)
    before.conn.commit()
    before.close()
    with Store.open(db) as store:
        assert store.list_rewards("a") == [Reward("a", 1.0, 7, idempotency_key="k", created_at=2.0)]
        store.add_span(make_span(rollout_id="a"))
        assert waiting(store) == {}
        entry, _ = store.add_reward(value=0.0, rollout_id="a")
        assert entry.reward_id == 10  # no id is given out twice
        assert waiting(store) == {"a": 0.0}


def test_looking_for_what_waits_is_fast_among_20_000_that_were_trained_on(store: Store) -> None:
    with store.transaction():
        for number in range(20_000):
            add_ready_rollout(store, f"r{number}", generations=())
    run_id = begin(store)
    # All of them as a run would leave them, without reading them back.
    store.connection.execute(
        "INSERT INTO consumptions (run_id, rollout_id, attempt, last_reward_id) "
        "SELECT ?, rollout_id, 1, max(reward_id) FROM rewards GROUP BY rollout_id",
        (run_id,),
    )
    store.commit_run(run_id, report={}, version=None)
    for number in range(0, 20_000, 100):
        store.add_reward(value=0.5, rollout_id=f"r{number}")
    before = time.process_time()
    backlog = store.backlog(POLICY)
    seconds = time.process_time() - before
    assert (backlog.rollouts_ready, backlog.rollouts_again) == (200, 200)
    print(f"\na backlog among 20,000 rollouts: {seconds * 1000:.0f} ms of CPU")
    assert seconds < 1.0


def test_calls_that_a_run_did_not_have_wait_for_a_reward_that_comes_with_them(trained: Store) -> None:
    trained.add_span(make_span(rollout_id="a", response_id="later"))
    assert waiting(trained) == {}
    trained.add_reward(rollout_id="a", comment="goes on")
    assert waiting(trained) == {}
    trained.add_reward(value=1.0, rollout_id="a")  # the return that it has
    [again] = trained.preview(POLICY, 10)
    assert (again.again, again.value, len(again.spans)) == (True, 1.0, 2)
    assert again.trained_until == again.spans[0].span_id
    assert train(trained) == {"a": 1.0}
    assert waiting(trained) == {}
    trained.add_reward(value=0.5, rollout_id="a")
    [other] = trained.preview(POLICY, 10)
    assert other.trained_until is None  # for another return all of it is trained on


@pytest.mark.parametrize(
    "changes",
    [{"policy": "other"}, {"response": None, "error_class": ErrorClass.UPSTREAM_ERROR, "error": "boom"}],
)
def test_calls_of_another_policy_and_calls_that_failed_do_not(
    changes: dict[str, object], trained: Store
) -> None:
    trained.add_span(make_span(rollout_id="a", response_id=None, **changes))
    trained.add_reward(value=1.0, rollout_id="a")
    assert waiting(trained) == {}


def test_a_reward_that_counts_for_nothing_does_not_open_it_for_its_calls(trained: Store) -> None:
    trained.rule = RewardRule({"cost": 0.0})
    trained.add_span(make_span(rollout_id="a", response_id="later"))
    trained.add_reward(value=1.0, rollout_id="a", name="cost")
    assert waiting(trained) == {}


def test_a_call_that_is_recorded_while_a_run_trains_is_for_the_next_run(store: Store) -> None:
    add_ready_rollout(store, "a", value=1.0)
    run_id = begin(store)
    store.drain(run_id, limit=10)
    store.add_span(make_span(rollout_id="a", response_id="later"))
    store.add_reward(value=1.0, rollout_id="a")
    store.commit_run(run_id, report={}, version=None)
    [again] = store.preview(POLICY, 10)
    assert again.trained_until == again.spans[0].span_id


def test_of_runs_from_before_nobody_knows_which_calls_they_had(trained: Store) -> None:
    trained.connection.execute("UPDATE consumptions SET last_span_id = NULL")
    trained.add_span(make_span(rollout_id="a", response_id="later"))
    trained.add_reward(value=1.0, rollout_id="a")
    assert waiting(trained) == {}
