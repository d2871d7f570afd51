from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.errors import LeaseHeld, LeaseLost, StoreUnavailable
from lightning_proxy.store import RunState, Store
from lightning_proxy.trainer.lease import Lease
from tests.conftest import wait_until
from tests.trainer.recording import POLICY, record_group


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.db") as opened:
        record_group(opened, "task", [0.0, 1.0])
        yield opened


def test_the_lease_is_renewed_for_as_long_as_the_block_runs(store: Store) -> None:
    with Lease(store, POLICY, lease_s=2.0) as lease:
        first = store.get_run(lease.run_id).lease_expires_at
        wait_until(lambda: time.time() > first)
        lease.check()
        with pytest.raises(LeaseHeld):
            store.begin_run(POLICY, owner="another", lease_s=1)
        store.commit_run(lease.run_id, report={}, version=None)


def test_an_error_in_the_block_fails_the_run_and_gives_everything_back(store: Store) -> None:
    def fail() -> None:
        with Lease(store, POLICY, lease_s=60) as lease:
            assert len(store.drain(lease.run_id, limit=10)) == 2
            assert store.backlog(POLICY).rollouts_ready == 0
            raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError):
        fail()
    [run] = store.list_runs(POLICY)
    assert (run.state, run.error) == (RunState.FAILED, "ZeroDivisionError: boom")
    assert store.backlog(POLICY).rollouts_ready == 2


def test_an_interruption_by_the_user_gives_everything_back_too(store: Store) -> None:
    def interrupt() -> None:
        with Lease(store, POLICY, lease_s=60) as lease:
            store.drain(lease.run_id, limit=10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert store.backlog(POLICY).rollouts_ready == 2


def test_an_error_after_the_commit_leaves_the_run_committed(store: Store) -> None:
    def fail_late() -> None:
        with Lease(store, POLICY, lease_s=60) as lease:
            store.commit_run(lease.run_id, report={}, version=None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_late()
    assert store.list_runs(POLICY)[0].state is RunState.COMMITTED


def test_a_lease_that_somebody_else_took_is_noticed(store: Store) -> None:
    with Lease(store, POLICY, lease_s=0.3) as lease:
        store.fail_run(lease.run_id, "taken over")

        def noticed() -> bool:
            lease.check()
            return False

        with pytest.raises(LeaseLost, match="taken over"):
            wait_until(noticed)


def lock(path: Path, seconds: float | None = None) -> sqlite3.Connection:
    """Somebody else writes, for so long or until it is closed; `prune --vacuum`, say."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    if seconds is not None:
        threading.Timer(seconds, other.close).start()
    return other


def test_a_database_that_is_locked_for_a_while_costs_no_update(store: Store) -> None:
    with Store.open(store.path, busy_timeout_s=0.1) as hasty:
        lock(store.path, 1.0)
        with Lease(hasty, POLICY, lease_s=60) as lease:
            hasty.drain(lease.run_id, limit=10)
            lock(store.path, 1.0)
            with pytest.raises(StoreUnavailable):
                hasty.commit_run(lease.run_id, report={}, version=None)
            lease.commit(report={"kept": True}, version=None)
    [run] = store.list_runs(POLICY)
    assert (run.state, run.report) == (RunState.COMMITTED, {"kept": True})


def test_one_that_stays_locked_is_waited_for_no_longer_than_the_lease_lasts(store: Store) -> None:
    def commit(hasty: Store) -> None:
        with Lease(hasty, POLICY, lease_s=1.0) as lease, closing(lock(store.path)):
            lease.commit(report={}, version=None)

    with Store.open(store.path, busy_timeout_s=0.1) as hasty, pytest.raises(StoreUnavailable):
        commit(hasty)


def test_a_run_that_cannot_even_be_failed_says_when_it_ends(store: Store) -> None:
    def fail(hasty: Store) -> None:
        with Lease(hasty, POLICY, lease_s=60):
            others.append(lock(store.path))
            raise ZeroDivisionError

    others: list[sqlite3.Connection] = []
    with Store.open(store.path, busy_timeout_s=0.1) as hasty, pytest.raises(ZeroDivisionError) as caught:
        fail(hasty)
    others[0].close()
    assert "its lease will run out" in caught.value.__notes__[0]


def opening(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> list[Exception]:
    """Let the heart's own opening of the database fail, once for each error; returns those to come."""
    real, left = Store.open, list(errors)

    def open_(*args: Any, **kwargs: Any) -> Store:
        if threading.current_thread().name == "lease" and left:
            raise left.pop(0)
        return real(*args, **kwargs)

    monkeypatch.setattr(Store, "open", open_)
    return left


def test_a_lock_at_the_moment_at_which_renewals_begin_does_not_end_them(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = opening(monkeypatch, StoreUnavailable("locked"), StoreUnavailable("locked"))
    with Lease(store, POLICY, lease_s=3.0) as lease:
        first = store.get_run(lease.run_id).lease_expires_at
        wait_until(lambda: store.get_run(lease.run_id).lease_expires_at > first)
        assert left == []
        lease.check()
        lease.commit(report={}, version=None)


def test_whatever_else_ends_the_renewals_is_heard_of(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    opening(monkeypatch, MemoryError("no room"))
    with Lease(store, POLICY, lease_s=0.3) as lease:

        def noticed() -> bool:
            lease.check()
            return False

        with pytest.raises(LeaseLost, match=r"nothing renews the lease of run 1 any more: MemoryError"):
            wait_until(noticed)
