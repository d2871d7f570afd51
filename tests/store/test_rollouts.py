from __future__ import annotations

import time
from pathlib import Path

import pytest

from lightning_proxy.errors import Conflict, InvalidInput, UnknownTarget
from lightning_proxy.store import ErrorClass, Fidelity, KeyOwner, RolloutState, Store
from tests.store.support import make_span


def test_a_rollout_begins_open_with_attempt_1(store: Store) -> None:
    before = time.time()
    rollout, created = store.create_rollout(rollout_id="r1", task_id="t1", metadata={"split": "train"})
    assert created
    assert (rollout.rollout_id, rollout.task_id, rollout.metadata) == ("r1", "t1", {"split": "train"})
    assert rollout.state is RolloutState.OPEN
    assert before <= rollout.created_at <= time.time()
    assert [attempt.number for attempt in store.list_attempts("r1")] == [1]


def test_rollouts_without_an_id_get_different_ones(store: Store) -> None:
    ids = {store.create_rollout()[0].rollout_id for _ in range(50)}
    assert len(ids) == 50


def test_creating_a_rollout_again_keeps_it_and_fills_in_what_was_unset(store: Store) -> None:
    store.add_span(make_span(rollout_id="r1"))
    filled, created = store.create_rollout(rollout_id="r1", task_id="t1", metadata={"a": 1})
    assert not created
    assert (filled.task_id, filled.metadata) == ("t1", {"a": 1})
    again, created = store.create_rollout(rollout_id="r1", metadata={"a": 2})
    assert not created
    assert again == filled


def test_a_rollout_cannot_move_to_another_task(store: Store) -> None:
    store.create_rollout(rollout_id="r1", task_id="t1")
    with pytest.raises(Conflict, match="'t1'"):
        store.create_rollout(rollout_id="r1", task_id="t2")


@pytest.mark.parametrize("rollout_id", ["", "a/b", "a\nb", "x" * 257])
def test_an_id_that_fits_into_no_path_is_refused(store: Store, rollout_id: str) -> None:
    with pytest.raises(InvalidInput, match="rollout_id"):
        store.create_rollout(rollout_id=rollout_id)


def test_metadata_that_is_no_json_is_refused(store: Store) -> None:
    with pytest.raises(InvalidInput, match="JSON"):
        store.create_rollout(metadata={"a": object()})


def test_an_unknown_rollout_is_named(store: Store) -> None:
    for look in (store.get_rollout, store.issue_key):
        with pytest.raises(UnknownTarget, match="'nobody'"):
            look("nobody")
    with pytest.raises(UnknownTarget, match="'nobody'"):
        store.finish_rollout("nobody", RolloutState.FAILED)


def test_a_key_names_its_rollout_and_is_kept_only_as_a_hash(store: Store, db: Path) -> None:
    store.create_rollout(rollout_id="r1")
    key = store.issue_key("r1", role="writer")
    assert key.startswith("lp-")
    assert len(key) == 3 + 32
    assert store.owner_of_key(key) == KeyOwner("r1", 1, "writer")
    assert store.owner_of_key(key + "x") is None
    assert store.owner_of_key("caf\u00e9\udcff") is None  # bytes of a header that are no UTF-8
    store.close()
    assert key.encode() not in b"".join(path.read_bytes() for path in db.parent.iterdir())


def test_a_key_for_a_retry_makes_its_attempt(store: Store) -> None:
    store.create_rollout(rollout_id="r1")
    key = store.issue_key("r1", attempt=2)
    assert store.owner_of_key(key) == KeyOwner("r1", 2, None)
    assert [attempt.number for attempt in store.list_attempts("r1")] == [1, 2]
    with pytest.raises(InvalidInput, match="attempt"):
        store.issue_key("r1", attempt=0)


def test_finishing_ends_the_rollout_and_its_last_attempt_once(store: Store) -> None:
    store.create_rollout(rollout_id="r1")
    store.issue_key("r1", attempt=2)
    ended = store.finish_rollout("r1", RolloutState.SUCCEEDED, "done")
    assert (ended.state, ended.reason) == (RolloutState.SUCCEEDED, "done")
    assert ended.ended_at is not None
    assert store.finish_rollout("r1", RolloutState.SUCCEEDED, "again") == ended
    with pytest.raises(Conflict, match="succeeded"):
        store.finish_rollout("r1", RolloutState.FAILED)
    states = [attempt.state for attempt in store.list_attempts("r1")]
    assert states == [RolloutState.OPEN, RolloutState.SUCCEEDED]


def test_a_failure_has_its_class_on_the_rollout_and_on_its_last_attempt(store: Store) -> None:
    store.create_rollout(rollout_id="r1")
    failed = store.finish_rollout("r1", RolloutState.FAILED, "exit code 1", ErrorClass.AGENT_CRASH)
    assert failed.error_class is ErrorClass.AGENT_CRASH
    (attempt,) = store.list_attempts("r1")
    assert (attempt.reason, attempt.error_class) == ("exit code 1", ErrorClass.AGENT_CRASH)
    store.create_rollout(rollout_id="r2")
    with pytest.raises(InvalidInput, match="no error_class"):
        store.finish_rollout("r2", RolloutState.SUCCEEDED, error_class=ErrorClass.TIMEOUT)


def test_a_rollout_is_not_finished_as_open(store: Store) -> None:
    store.create_rollout(rollout_id="r1")
    with pytest.raises(InvalidInput, match="succeeded, failed or cancelled"):
        store.finish_rollout("r1", RolloutState.OPEN)


def test_the_first_reason_for_incompleteness_stays_and_an_unknown_rollout_is_made(store: Store) -> None:
    store.mark_incomplete("r1", "a span was dropped")
    store.mark_incomplete("r1", "something else")
    assert store.get_rollout("r1").incomplete == "a span was dropped"


def test_lists_are_newest_first_with_counts(store: Store) -> None:
    for index in range(3):
        store.create_rollout(rollout_id=f"r{index}", task_id=f"t{index % 2}")
    store.add_span(make_span(rollout_id="r1", ended_at=1002.0))
    store.add_span(
        make_span(rollout_id="r1", ended_at=1003.0, response=None, error_class="timeout", generations=())
    )
    store.add_reward(value=0.25, rollout_id="r1")
    store.add_reward(value=0.5, rollout_id="r1", name="style")
    store.add_reward(value=0.75, rollout_id="r1")
    newest, middle, oldest = store.list_rollouts()
    assert [each.rollout.rollout_id for each in (newest, middle, oldest)] == ["r2", "r1", "r0"]
    assert (middle.spans, middle.errors, middle.attempts, middle.reward) == (2, 1, 1, 1.25)
    assert middle.last_span_at == 1003.0
    assert (oldest.spans, oldest.errors, oldest.reward, oldest.last_span_at) == (0, 0, None, None)


def test_lists_are_narrowed_by_state_and_task_and_paged(store: Store) -> None:
    for index in range(5):
        store.create_rollout(rollout_id=f"r{index}", task_id=f"t{index % 2}")
    store.finish_rollout("r3", RolloutState.FAILED)

    def ids(**wanted: object) -> list[str]:
        return [each.rollout.rollout_id for each in store.list_rollouts(**wanted)]  # type: ignore[arg-type]

    assert ids(task_id="t0") == ["r4", "r2", "r0"]
    assert ids(state=RolloutState.FAILED) == ["r3"]
    assert ids(state=RolloutState.OPEN, task_id="t1") == ["r1"]
    assert ids(limit=2) == ["r4", "r3"]
    assert ids(limit=2, before=store.get_rollout("r3").created_at) == ["r2", "r1"]


def test_the_reward_of_a_list_is_that_of_the_last_attempt(store: Store) -> None:
    store.create_rollout(rollout_id="r1")
    first = store.add_span(make_span())
    store.add_reward(value=1.0, rollout_id="r1", attempt=1)
    store.add_reward(value=1.0, span_id=first)
    assert store.list_rollouts()[0].reward == 2.0
    store.issue_key("r1", attempt=2)
    assert store.list_rollouts()[0].reward is None
    store.add_reward(value=0.5, rollout_id="r1")
    assert store.list_rollouts()[0].reward == 0.5


def test_stats_count(store: Store) -> None:
    assert store.stats()["last_span_at"] == 0.0
    store.add_span(make_span())
    store.add_span(make_span(generations=(), response=None, error_class="cut"))
    store.add_span(make_span(generations=(), fidelity=Fidelity.TEXT))
    store.mark_incomplete("r2", "lost")
    store.finish_rollout("r2", RolloutState.CANCELLED)
    stats = store.stats()
    assert (stats["rollouts"], stats["rollouts_open"], stats["rollouts_incomplete"]) == (2, 1, 1)
    assert (stats["spans"], stats["spans_failed"], stats["spans_exact"]) == (3, 1, 2)
    assert stats["last_span_at"] == 1001.5
    assert stats["bytes"] > 0
