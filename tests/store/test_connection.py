from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from sqlite_utils.migrations import Migrations

from lightning_proxy.errors import Conflict, InvalidInput, StoreError, StoreUnavailable, UnknownTarget
from lightning_proxy.store import Store
from lightning_proxy.store.connection import SCHEMA_VERSION
from lightning_proxy.store.migrations import migrations
from tests.store.support import make_span, output_of, start_script


def test_a_new_file_gets_the_present_schema_in_wal_mode(store: Store) -> None:
    assert store.scalar("PRAGMA user_version") == SCHEMA_VERSION
    assert store.scalar("PRAGMA journal_mode") == "wal"
    assert store.scalar("PRAGMA foreign_keys") == 1
    assert store.scalar("PRAGMA secure_delete") == 1
    assert store.scalar("SELECT count(*) FROM _sqlite_migrations") == SCHEMA_VERSION


def test_the_schema_version_counts_the_migrations(store: Store) -> None:
    from sqlite_utils import Database

    assert len(migrations.applied(Database(store.connection))) == SCHEMA_VERSION
    assert migrations.pending(Database(store.connection)) == []


@pytest.mark.parametrize(("synchronous", "level"), [("normal", 1), ("full", 2)])
def test_synchronous_is_as_asked_for(db: Path, synchronous: str, level: int) -> None:
    with Store.open(db, synchronous=synchronous) as store:  # type: ignore[arg-type]  # parametrized
        assert store.scalar("PRAGMA synchronous") == level


def test_what_was_written_is_there_after_reopening(db: Path) -> None:
    with Store.open(db) as store:
        store.create_rollout(rollout_id="r1")
    with Store.open(db, create=False) as store:
        assert store.get_rollout("r1").rollout_id == "r1"


def test_a_missing_file_is_named_where_none_may_be_made(db: Path) -> None:
    with pytest.raises(UnknownTarget, match=r"no database at .*lightning\.db.*serve"):
        Store.open(db, create=False)
    assert not db.exists()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"directory .*nowhere does not exist"):
        Store.open(tmp_path / "nowhere" / "lightning.db")


def test_a_newer_schema_is_refused_and_left_alone(db: Path) -> None:
    Store.open(db).close()
    with closing(sqlite3.connect(db)) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    with pytest.raises(StoreError, match="newer lightning-proxy"):
        Store.open(db)


def test_a_database_of_something_else_is_refused_and_left_alone(db: Path) -> None:
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("CREATE TABLE holidays (day TEXT)")
    with pytest.raises(StoreError, match="something else"):
        Store.open(db)
    with closing(sqlite3.connect(db)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("holidays",)]


def test_a_file_that_is_no_database_is_refused(db: Path) -> None:
    db.write_text("dear diary " * 1000)
    with pytest.raises(StoreError, match="not a database"):
        Store.open(db)


def test_a_migration_that_fails_leaves_nothing_behind(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(migrations._migrations[0], "fn", broken)
    with pytest.raises(ZeroDivisionError):
        Store.open(db)
    monkeypatch.undo()
    with closing(sqlite3.connect(db)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []
    Store.open(db).close()


def test_a_database_of_version_1_is_migrated_with_its_spans(db: Path) -> None:
    from sqlite_utils import Database

    first = Migrations("lightning_proxy")
    first()(migrations._migrations[0].fn)
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        first.apply(Database(connection))
        connection.execute("PRAGMA user_version=1")
        connection.execute("INSERT INTO rollouts (rollout_id, state, created_at) VALUES ('r0', 'open', 1.0)")
        connection.execute(
            "INSERT INTO spans (rollout_id, attempt, wire, attributed_by, attribution_confidence, "
            "started_at, ended_at, streamed, fidelity, sampling, request, response) "
            "VALUES ('r0', 1, 'chat', 'none', 0.0, 1.0, 2.0, 0, 'exact', '{}', x'7b7d', x'7b7d')"
        )
    with Store.open(db) as store:
        assert store.scalar("PRAGMA user_version") == SCHEMA_VERSION
        [span] = store.list_spans()
        assert (span.rollout_id, span.retry, span.conversation) == ("r0", 0, None)
        store.add_span(make_span(retry=2, conversation=b"c" * 16))
        assert store.list_spans()[0].conversation == b"c" * 16


def test_spans_of_version_3_are_read_beside_new_ones(db: Path) -> None:
    from sqlite_utils import Database

    third = Migrations("lightning_proxy")
    for change in migrations._migrations[:3]:
        third()(change.fn)
    old = make_span(conversation=b"c" * 16)
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        third.apply(Database(connection))
        connection.execute("PRAGMA user_version=3")
        connection.execute("INSERT INTO rollouts (rollout_id, state, created_at) VALUES ('r1', 'open', 1.0)")
        connection.execute(
            "INSERT INTO spans (rollout_id, attempt, wire, model, policy, policy_version, "
            "policy_version_end, attributed_by, attribution_confidence, started_at, first_byte_at, "
            "ended_at, streamed, status, response_id, fidelity, usage, sampling, request, response, "
            "conversation) "
            "VALUES ('r1', 1, 'chat', 'policy', 'policy', 3, 4, 'path', 1.0, 1000.0, 1000.25, 1001.5, 1, "
            "200, 'chatcmpl-1', 'exact', ?, '{\"temperature\":0.5}', ?, ?, ?)",
            ('{"prompt_tokens":3,"completion_tokens":2}', old.request, old.response, old.conversation),
        )
        for choice, one in enumerate(old.generations):
            packed = (
                one.prompt_token_ids.tobytes(),
                one.response_token_ids.tobytes(),
                one.logprobs.tobytes(),
            )
            connection.execute(
                "INSERT INTO generations VALUES (1, ?, ?, ?, ?, ?)", (choice, one.finish_reason, *packed)
            )
    with Store.open(db) as store:
        new = store.add_span(old)
        expected = [replace(old, span_id=new), replace(old, span_id=1)]
        assert store.list_spans() == expected
        assert store.get_span(1) == expected[1]
        assert [head.response_tokens for head in store.list_spans(content=False)] == [3, 3]
        assert [row[3] for row in store.recent_requests(9)] == [old.request] * 2
        ends = store.conversation_ends([b"c" * 16])
        assert [end.response for end in ends] == [old.response] * 2


def test_processes_that_open_a_new_file_at_once_all_succeed(db: Path) -> None:
    script = """
        import sys
        from lightning_proxy.store import Store
        import lightning_proxy.store.migrations
        import os, time
        print("ready", flush=True)
        while not os.path.exists(sys.argv[2]):
            time.sleep(0.001)
        with Store.open(sys.argv[1]) as store:
            print(store.create_rollout(rollout_id="r1")[1])
    """
    barrier = db.parent / "barrier"
    processes = [start_script(script, db, barrier) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    barrier.touch()
    made = [output_of(process)[0] for process in processes]
    assert sorted(made) == ["False"] * 2 + ["True"]


def test_importing_the_store_imports_no_sqlite_utils_and_no_torch() -> None:
    script = """
        import sys
        import lightning_proxy.store
        print(sorted({"sqlite_utils", "torch", "pydantic", "aiohttp"} & set(sys.modules)))
    """
    assert output_of(start_script(script)) == ["[]"]


def test_opening_an_up_to_date_database_imports_no_sqlite_utils(db: Path) -> None:
    Store.open(db).close()
    script = """
        import sys
        from lightning_proxy.store import Store
        Store.open(sys.argv[1]).close()
        print("sqlite_utils" in sys.modules)
    """
    assert output_of(start_script(script, db)) == ["False"]


def _break_off(store: Store, write: Callable[[], object]) -> None:
    with store.transaction():
        write()
        raise ZeroDivisionError


def test_a_transaction_that_raises_leaves_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError):
        _break_off(store, lambda: store.create_rollout(rollout_id="r1"))
    assert store.stats()["rollouts"] == 0


def test_a_nested_transaction_that_raises_undoes_only_itself(store: Store) -> None:
    with store.transaction():
        store.create_rollout(rollout_id="outer")
        with pytest.raises(ZeroDivisionError):
            _break_off(store, lambda: store.create_rollout(rollout_id="inner"))
        with store.transaction():
            store.create_rollout(rollout_id="later")
    assert {summary.rollout.rollout_id for summary in store.list_rollouts()} == {"outer", "later"}


def test_a_span_can_be_added_after_a_rollback_that_took_its_rollout_away(store: Store) -> None:
    with pytest.raises(ZeroDivisionError):
        _break_off(store, lambda: store.add_span(make_span()))
    store.add_span(make_span())
    assert [attempt.number for attempt in store.list_attempts("r1")] == [1]


def test_a_locked_database_is_unavailable_for_writers_and_readable(store: Store, db: Path) -> None:
    with Store.open(db, busy_timeout_s=0.05) as second, store.transaction():
        store.create_rollout(rollout_id="r1")
        with pytest.raises(StoreUnavailable, match="locked"):
            second.create_rollout(rollout_id="r2")
        assert second.stats()["rollouts"] == 0


def test_a_full_database_is_unavailable_and_keeps_what_it_had(store: Store) -> None:
    store.create_rollout(rollout_id="r1")
    pages = store.scalar("PRAGMA page_count")
    store.scalar(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StoreUnavailable, match="full"), store.transaction():
        store.add_span(make_span(request=os.urandom(100_000)))
    assert store.stats()["spans"] == 0
    store.scalar("PRAGMA max_page_count=1000000")
    store.add_span(make_span(request=os.urandom(100_000)))
    assert store.stats()["spans"] == 1


def test_errors_of_ours_pass_through_a_transaction(store: Store) -> None:
    with pytest.raises(Conflict), store.transaction():
        raise Conflict("no")


def test_what_sqlite_cannot_hold_is_invalid_input(store: Store) -> None:
    with pytest.raises(InvalidInput, match="cannot be stored"):
        store.get_span(2**70)
    with pytest.raises(InvalidInput, match="cannot be stored"):
        store.add_span(make_span(rollout_id="\ud800"))
    assert store.stats()["rollouts"] == 0


def test_a_closed_store_says_so(db: Path) -> None:
    store = Store.open(db)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.stats()
    with pytest.raises(StoreError, match="closed"):
        store.create_rollout()


def test_sqlite_is_built_for_use_from_another_thread() -> None:
    assert sqlite3.threadsafety == 3, sys.version
