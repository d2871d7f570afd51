"""`lightning-proxy prune`: what it deletes, what it says, what it leaves alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lightning_proxy.cli import app
from lightning_proxy.store import Store
from tests.store.support import POLICY, add_ready_rollout, make_span


@pytest.fixture(autouse=True)
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two old rollouts, one of them of a customer, and a new one."""
    monkeypatch.chdir(tmp_path)
    with Store.open("lightning.db") as store:
        for name, at in (("old-1", 1000.0), ("old-2", 2000.0), ("new", time.time())):
            store.add_span(make_span(rollout_id=name, started_at=at, ended_at=at, request=os.urandom(50_000)))
        store.create_rollout(rollout_id="old-2", metadata={"customer": "acme"})


def prune(*words: str) -> Result:
    return CliRunner().invoke(app, ["prune", *words])


def left() -> set[str]:
    with Store.open("lightning.db") as store:
        return {summary.rollout.rollout_id for summary in store.list_rollouts()}


def test_a_dry_run_names_what_it_would_delete_and_deletes_nothing() -> None:
    result = prune("--older-than", "30d", "--dry-run")
    assert result.stdout == "would delete 2 rollouts: old-1, old-2\n"
    assert len(left()) == 3


def test_old_rollouts_go_and_the_summary_says_how_much_is_free() -> None:
    result = prune("--older-than", "30d")
    assert result.exit_code == 0, result.output
    assert "deleted 2 rollouts with 2 calls" in result.stdout
    assert "free for what comes (--vacuum gives them back to the disk)" in result.stdout
    assert left() == {"new"}


def test_vacuum_gives_the_room_back() -> None:
    before = Path("lightning.db").stat().st_size
    report = json.loads(prune("--tag", "customer=acme", "--vacuum", "--json").stdout)
    assert (report["rollouts"], report["spans"], report["bytes_free"]) == (1, 1, 0)
    assert report["bytes"] == Path("lightning.db").stat().st_size < before
    assert report["log_emptied"] is True
    assert left() == {"old-1", "new"}


def test_vacuum_alone_deletes_nothing() -> None:
    assert "deleted 0 rollouts" in prune("--vacuum").stdout
    assert len(left()) == 3


def test_single_rollouts_go_by_their_ids() -> None:
    assert json.loads(prune("--rollout", "new", "--rollout", "old-1", "--json").stdout)["rollouts"] == 2
    assert left() == {"old-2"}
    unknown = prune("--rollout", "gone")
    assert (unknown.exit_code, "no rollout 'gone'" in unknown.stderr) == (1, True)


def test_what_a_training_run_holds_is_named_and_left() -> None:
    with Store.open("lightning.db") as store:
        add_ready_rollout(store, "held")
        store.drain(store.begin_run(POLICY, owner="x", lease_s=60).run_id, limit=1)
    result = prune("--rollout", "held", "--rollout", "new")
    assert "left alone, since a training run holds them: held" in result.stdout
    assert left() == {"old-1", "old-2", "held"}
