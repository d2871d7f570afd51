"""What is deleted is gone, and what is not is as it was."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from lightning_proxy.errors import UnknownTarget
from lightning_proxy.store import RolloutState, Store, TaskState, new_task
from lightning_proxy.store.retention import (
    TABLES_OF_A_ROLLOUT,
    Selection,
    delete_rollouts,
    empty_log,
    find_rollouts,
    room,
    vacuum,
)
from tests.store.support import POLICY, add_ready_rollout, make_span

DAY = 86400.0


def everything_on_disk(db: Path) -> bytes:
    return b"".join(file.read_bytes() for file in db.parent.glob(f"{db.name}*"))


def ids_of(store: Store) -> set[str]:
    return {summary.rollout.rollout_id for summary in store.list_rollouts()}


def pieces_of(secret: bytes) -> list[bytes]:
    """Short ones, for a page may end anywhere."""
    return [secret[at : at + 24] for at in range(0, len(secret) - 24, max(97, len(secret) // 50))]


@pytest.mark.parametrize("size", [300, 5000, 200_000])
def test_what_was_deleted_is_in_no_file_any_more(db: Path, size: int) -> None:
    # Random bytes are stored as they are, so that they can be looked for.
    secrets: dict[str, list[bytes]] = {"gone": [], "kept": []}
    with Store.open(db) as store:
        for number in range(6):
            name = ("gone", "kept")[number % 2]
            request, response, comment = os.urandom(size), os.urandom(size), os.urandom(16).hex()
            store.add_span(make_span(rollout_id=name, request=request, response=response))
            store.add_reward(value=1.0, rollout_id=name, comment=comment)
            secrets[name] += [*pieces_of(request), *pieces_of(response), comment.encode()]
        found = everything_on_disk(db)
        for name in secrets:
            assert sum(piece in found for piece in secrets[name]) > 0.9 * len(secrets[name])
        delete_rollouts(store, ["gone"])
        assert empty_log(store)
        left = everything_on_disk(db)
    assert [piece for piece in secrets["gone"] if piece in left] == []
    assert sum(piece in left for piece in secrets["kept"]) > 0.9 * len(secrets["kept"])


def test_a_deleted_rollout_leaves_no_row(store: Store) -> None:
    add_ready_rollout(store, "gone")
    store.issue_key("gone", 2)
    add_ready_rollout(store, "kept")
    run = store.begin_run(POLICY, owner="x", lease_s=60)
    store.drain(run.run_id, limit=10)
    store.fail_run(run.run_id, "never mind")
    deleted = delete_rollouts(store, ["gone"])
    assert (deleted.rollouts, deleted.spans, deleted.held) == (1, 1, [])
    assert store.rows("PRAGMA foreign_key_check") == []
    tables = [row["name"] for row in store.rows("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for table in tables:
        columns = {row["name"] for row in store.rows(f"PRAGMA table_info({table})")}
        if "rollout_id" in columns:
            assert store.scalar(f"SELECT count(*) FROM {table} WHERE rollout_id = 'gone'") == 0, table
    assert store.scalar("SELECT count(*) FROM contents") == 1
    assert store.list_runs()[0].run_id == run.run_id


def test_every_table_with_rows_of_a_rollout_is_known(store: Store) -> None:
    tables = [row["name"] for row in store.rows("SELECT name FROM sqlite_master WHERE type = 'table'")]
    with_rows = {
        table
        for table in tables
        if "rollout_id" in {row["name"] for row in store.rows(f"PRAGMA table_info({table})")}
    }
    assert with_rows == {*TABLES_OF_A_ROLLOUT, "spans", "task_rollouts"}


def test_other_rollouts_are_read_as_before(store: Store) -> None:
    for turn in range(40):
        for rollout_id in ("gone", "kept"):
            store.add_span(make_span(rollout_id=rollout_id, request=b"a long word " * (20 + turn)))
    before = store.spans_of_attempt("kept", 1)
    delete_rollouts(store, ["gone"])
    assert store.spans_of_attempt("kept", 1) == before


def test_a_long_rollout_is_deleted_in_small_transactions_and_can_be_read_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_proxy.store.retention._SPANS_AT_A_TIME", 7)
    for turn in range(30):
        store.add_span(make_span(request=b"a long word " * (20 + turn)))
    left: list[int] = []
    monkeypatch.setattr(
        "lightning_proxy.store.retention.time.sleep",
        lambda _: left.append(len(store.spans_of_attempt("r1", 1))),
    )
    delete_rollouts(store, ["r1"])
    assert left == [23, 16, 9, 2, 0]


def test_what_a_running_run_holds_is_left_alone(store: Store) -> None:
    add_ready_rollout(store, "held")
    add_ready_rollout(store, "free")
    run = store.begin_run(POLICY, owner="x", lease_s=60)
    assert [one.rollout.rollout_id for one in store.drain(run.run_id, limit=1)] == ["held"]
    everything = Selection(silent_since=time.time() + DAY)
    assert find_rollouts(store, everything).held == ("held",)
    deleted = delete_rollouts(store, ["held", "free"])
    assert (deleted.rollouts, deleted.held) == (1, ["held"])
    assert ids_of(store) == {"held"}
    store.commit_run(run.run_id, version=None, report={})
    assert delete_rollouts(store, ["held"]).rollouts == 1


def test_a_run_whose_lease_is_over_holds_nothing(store: Store) -> None:
    add_ready_rollout(store, "r1")
    run = store.begin_run(POLICY, owner="x", lease_s=60)
    store.drain(run.run_id, limit=1)
    store.connection.execute("UPDATE training_runs SET lease_expires_at = ?", (time.time() - 1,))
    assert delete_rollouts(store, ["r1"]).held == []


def test_age_counts_from_what_happened_last(store: Store) -> None:
    now = time.time()
    store.add_span(make_span(rollout_id="old", started_at=now - 9 * DAY, ended_at=now - 9 * DAY))
    store.add_span(make_span(rollout_id="called", started_at=now - 9 * DAY, ended_at=now - 9 * DAY))
    store.add_span(make_span(rollout_id="called", started_at=now - 1, ended_at=now))
    for name in ("rewarded", "finished"):
        store.add_span(make_span(rollout_id=name, started_at=now - 9 * DAY, ended_at=now - 9 * DAY))
    store.add_reward(value=1.0, rollout_id="rewarded")
    store.finish_rollout("finished", RolloutState.SUCCEEDED)
    store.create_rollout(rollout_id="new")
    assert find_rollouts(store, Selection(silent_since=now - 8 * DAY)).rollout_ids == ("old",)
    assert find_rollouts(store, Selection(silent_since=now - 10 * DAY)).rollout_ids == ()


def test_tags_are_compared_as_the_texts_of_their_values(store: Store) -> None:
    store.create_rollout(rollout_id="a", metadata={"customer": "acme", "paid": True, "n": 3})
    store.create_rollout(rollout_id="b", metadata={"customer": "acme", "paid": False})
    store.create_rollout(rollout_id="c", metadata={"user.name": 'O"Brien'})

    def tagged(**tags: str) -> tuple[str, ...]:
        return find_rollouts(store, Selection(tags=tags)).rollout_ids

    assert tagged(customer="acme") == ("a", "b")
    assert tagged(customer="acme", paid="true") == tagged(n="3") == ("a",)
    assert tagged(**{"user.name": 'O"Brien'}) == ("c",)
    assert tagged(customer="acm") == tagged(nothing="acme") == ()


def test_all_conditions_must_hold_and_an_unknown_id_is_named(store: Store) -> None:
    store.create_rollout(rollout_id="a", metadata={"x": "1"})
    store.create_rollout(rollout_id="b", metadata={"x": "1"})
    assert find_rollouts(store, Selection(rollout_ids=("b",), tags={"x": "1"})).rollout_ids == ("b",)
    with pytest.raises(UnknownTarget, match="no rollout 'c'"):
        find_rollouts(store, Selection(rollout_ids=("a", "c")))


def test_a_deleted_rollout_that_gets_a_further_call_is_made_again(store: Store, db: Path) -> None:
    with Store.open(db) as other:
        for attempt in (1, 2):
            store.add_span(make_span(attempt=attempt, request=b"long and alike " * 50))
        delete_rollouts(other, ["r1"])
        span_ids = [
            store.add_span(make_span(attempt=attempt, request=b"long and alike " * 51)) for attempt in (1, 2)
        ]
    assert [attempt.number for attempt in store.list_attempts("r1")] == [1, 2]
    assert [store.get_span(span_id).request for span_id in span_ids] == [b"long and alike " * 51] * 2


def test_the_id_of_a_deleted_span_is_not_given_out_again(store: Store, db: Path) -> None:
    with Store.open(db) as other:
        last = [store.add_span(make_span(request=b"long and alike " * 50)) for _ in range(3)][-1]
        delete_rollouts(other, ["r1"])
        again = store.add_span(make_span(request=b"long and alike " * 50))
        assert again == last + 1
        assert other.add_span(make_span()) == again + 1
        assert other.get_span(again).request == b"long and alike " * 50
    with Store.open(db) as third:
        delete_rollouts(third, ["r1"])
        assert third.add_span(make_span()) == again + 2


def test_a_call_in_a_rollout_that_is_half_deleted_is_told_by_what_is_left(store: Store, db: Path) -> None:
    main, sub = b"a long word " * 100, b"another agent's words " * 100
    with Store.open(db) as other:
        for body in (main, sub, main + b"1", sub + b"1", main + b"2"):
            store.add_span(make_span(request=body))
        with other.transaction():
            other.delete_newest_spans("r1", 1)
        span_id = store.add_span(make_span(request=main + b"3"))
    assert store.get_span(span_id).request == main + b"3"


def test_calls_go_on_while_their_rollouts_are_deleted(db: Path) -> None:
    written: dict[int, bytes] = {}
    ended = threading.Event()

    def delete() -> None:
        with Store.open(db) as other:
            while not ended.is_set():
                delete_rollouts(other, [f"r{random.randrange(4)}"])
                ended.wait(0.005)

    deleting = threading.Thread(target=delete)
    with Store.open(db) as store:
        deleting.start()
        try:
            for turn in range(400):
                name, body = f"r{turn % 4}", b"what was said " * (20 + turn)
                span = make_span(rollout_id=name, attempt=1 + turn % 3, request=body)
                written[store.add_span(span)] = body
        finally:
            ended.set()
            deleting.join()
        left = store.list_spans(limit=1000)
        assert len(written) == 400
        assert {span.span_id: span.request for span in left}.items() <= written.items()
        assert store.rows("PRAGMA foreign_key_check") == []
        for name in ids_of(store):
            numbers = {attempt.number for attempt in store.list_attempts(name)}
            assert {span.attempt for span in left if span.rollout_id == name} <= numbers


def test_vacuum_makes_the_file_smaller(store: Store, db: Path) -> None:
    for number in range(20):
        store.add_span(make_span(rollout_id=f"r{number}", request=os.urandom(50_000)))
    delete_rollouts(store, [f"r{number}" for number in range(19)])
    size, free = room(store)
    assert free > size / 2
    vacuum(store)
    assert empty_log(store)
    assert room(store)[1] == 0
    assert db.stat().st_size < size / 2
    assert len(store.list_spans()) == 1


def test_a_log_that_somebody_reads_is_not_emptied(store: Store, db: Path) -> None:
    store.add_span(make_span())
    with Store.open(db) as reader:
        reader.connection.execute("BEGIN")
        reader.stats()
        delete_rollouts(store, ["r1"])
        assert not empty_log(store, tries=1)
        reader.connection.execute("COMMIT")
    assert empty_log(store)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_rollout_of_the_pool_that_is_deleted_ends_there(store: Store, waiting: bool) -> None:
    store.enqueue_tasks([new_task({"task_id": name, "input": {"q": name}}) for name in "ab"])
    [given] = store.claim_tasks("worker")
    if waiting:
        store.release_attempt(given.rollout_id, given.attempt)
    delete_rollouts(store, [given.rollout_id])
    told = store.heartbeat_attempt(given.rollout_id, given.attempt)
    assert (told.stop, told.reason) == (True, "it was deleted")
    store.sweep_tasks()
    assert sorted(each.task.task_id for each in store.claim_tasks("worker", limit=5)) == ["a", "b"]
    assert store.cancel_task("a").task.state is TaskState.CANCELLED
