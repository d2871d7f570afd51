from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_proxy.errors import LeaseHeld, LeaseLost
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
