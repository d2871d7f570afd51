"""train: what ends a pass and what ends the watching, by exit code and in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_proxy.errors import Conflict, PublishFailed, StoreUnavailable, TrainingError
from lightning_proxy.store import Store
from lightning_proxy.trainer import steps
from tests.cli.test_cli import cli
from tests.trainer import paper
from tests.trainer.checkpoints import write_checkpoint
from tests.trainer.fake_proxy import FakeProxy, fake_proxy
from tests.trainer.recording import POLICY, record_group


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.chdir(tmp_path)
    with Store.open(Path("lightning.db")) as opened:
        yield opened


@pytest.fixture
def proxy(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeProxy]:
    """With settings for it, and a group that waits."""
    paper.install(monkeypatch.setattr)
    model = write_checkpoint(tmp_path / "model")
    record_group(store, "task", [0.0, 1.0])
    with fake_proxy(store.path) as serving:
        Path("lightning.toml").write_text(
            f'[policy]\nname = "{POLICY}"\nmodel = "{model}"\n'
            f'[train]\nproxy_url = "{serving.url}"\nmin_rollouts = 2\n'
        )
        yield serving


@pytest.mark.parametrize("more", [0, 1])
def test_a_staged_version_that_takes_over_is_an_update(store: Store, proxy: FakeProxy, more: int) -> None:
    """With nothing to train on since, or with rollouts that all agree."""
    proxy.mode = "refuses"
    assert cli("train", "--require-update").exit_code == 3
    if more:
        record_group(store, "equal", [1.0, 1.0], version=1)
    proxy.mode = "promotes"
    result = cli("train", "--require-update", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["outcome"], report["resumed_version"], report["version"]) == ("trained", 1, None)
    assert report["message"].startswith("version 1, which an earlier pass staged, serves; ")
    assert cli("train", "--require-update").exit_code == 3


def test_one_that_does_not_is_none(store: Store, proxy: FakeProxy) -> None:
    proxy.mode = "refuses"
    cli("train")
    assert cli("train", "--require-update").exit_code == 3
    proxy.mode = "rejects"
    result = cli("train", "--require-update", "--json")
    assert result.exit_code == 3, result.output
    assert json.loads(result.stdout)["resumed_version"] is None


def test_a_full_disk_is_told_in_one_line(
    store: Store, proxy: FakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(steps, "write_version", full)
    result = cli("train")
    assert result.exit_code == 1
    told = "lightning-proxy: [Errno 28] No space left on device: what was drained waits for the next run"
    assert told in result.stderr.splitlines()
    assert store.backlog(POLICY).rollouts_ready == 2


def test_watching_goes_on_after_whatever_may_be_over_by_the_next_pass(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_proxy.trainer import run

    Path("lightning.toml").write_text("[train]\nwatch_interval_s = 0.01\n")
    ends = [
        OSError(28, "No space left on device"),
        TrainingError("a worker died"),
        StoreUnavailable("locked"),
        Conflict("version 2 was staged meanwhile"),
        PublishFailed("no answer"),
        SystemExit(130),
    ]

    def fail(self: object) -> None:
        raise ends.pop(0)

    monkeypatch.setattr(run.Trainer, "preload", lambda self: None)
    monkeypatch.setattr(run.Trainer, "train_once", fail)
    result = cli("train", "--watch")
    assert (result.exit_code, ends) == (130, [])
    assert [line.removeprefix("lightning-proxy: ") for line in result.stderr.splitlines()] == [
        "[Errno 28] No space left on device", "a worker died", "locked", "version 2 was staged meanwhile",
        "no answer",
    ]  # fmt: skip
