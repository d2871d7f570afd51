"""A version follows the one that it was made from: no update is lost, and no rollback undone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.config import Settings
from lightning_proxy.errors import Conflict, LeaseLost
from lightning_proxy.store import RunState, Store
from lightning_proxy.trainer import guard, steps
from lightning_proxy.trainer.guard import Collapse
from lightning_proxy.trainer.report import Outcome, TrainReport
from lightning_proxy.trainer.run import train_once
from tests.trainer import paper
from tests.trainer.checkpoints import write_checkpoint
from tests.trainer.fake_proxy import FakeProxy
from tests.trainer.recording import POLICY, record_group


@pytest.fixture
def settings(store: Store, proxy: FakeProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    paper.install(monkeypatch.setattr)
    model = write_checkpoint(tmp_path / "model")
    return paper.settings(store.path, model, proxy.url, lease_s=60)


def run(store: Store, settings: Settings) -> tuple[TrainReport, list[str]]:
    lines: list[str] = []

    def note(line: str, done: float | None = None) -> None:
        lines.append(line)

    return train_once(settings, store=store, progress=note), lines


def first_version(store: Store, settings: Settings) -> None:
    """Version 1 serves, made from 0; a group that it sampled waits."""
    record_group(store, "first", [0.0, 1.0])
    assert run(store, settings)[0].version == 1
    record_group(store, "second", [0.0, 1.0], version=1)


def statuses(store: Store) -> dict[int, str]:
    return {version.version: version.status.value for version in store.list_versions(POLICY)}


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, first: Callable[[], object]) -> None:
    """Let something happen before the next call of a function."""
    real = getattr(owner, name)

    def after(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        first()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, after)


def test_what_was_made_while_an_operator_rolled_back_does_not_undo_that(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_version(store, settings)
    with Store.open(store.path) as operator:
        once(monkeypatch, steps.Pass, "update", lambda: operator.activate_version(POLICY, 0))
        with pytest.raises(Conflict, match=r"version 2 .* made from version 1, but version 0 serves"):
            run(store, settings)
    assert statuses(store) == {0: "active", 1: "retired"}
    assert store.list_runs(POLICY)[0].state is RunState.FAILED
    assert store.backlog(POLICY).rollouts_ready == 2
    report, _ = run(store, settings)
    assert (report.outcome, report.parent, report.version) == (Outcome.TRAINED, 0, 2)


def test_a_version_that_waited_while_an_operator_rolled_back_is_rejected_and_made_anew(
    store: Store, proxy: FakeProxy, settings: Settings
) -> None:
    first_version(store, settings)
    proxy.mode = "refuses"
    assert run(store, settings)[0].outcome is Outcome.STAGED_ONLY
    store.activate_version(POLICY, 0)
    proxy.mode, asked = "promotes", len(proxy.asked)
    report, lines = run(store, settings)
    assert lines[0] == (
        "version 2 was rejected and what it was trained on given back: it was made from version 1, but "
        "version 0 serves now"
    )
    assert proxy.asked[asked:] == [(POLICY, 3)]
    assert (report.outcome, report.parent, report.version) == (Outcome.TRAINED, 0, 3)
    assert report.resumed_version is None
    assert statuses(store) == {0: "retired", 1: "retired", 2: "rejected", 3: "active"}


def test_so_is_one_that_an_operator_overtook_between_its_commit_and_its_promotion(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_version(store, settings)
    once(monkeypatch, steps, "promote", lambda: store.activate_version(POLICY, 0))
    report, _ = run(store, settings)
    assert report.outcome is Outcome.REJECTED
    assert "it was made from version 1, but version 0 serves now" in report.message
    assert statuses(store) == {0: "active", 1: "retired", 2: "rejected"}
    assert store.backlog(POLICY).rollouts_ready == 2


def test_a_second_trainer_does_not_begin_with_the_parent_of_a_version_that_waits(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked for staged versions before the first one had committed; that one's promotion takes long."""
    first_version(store, settings)

    def second() -> None:
        record_group(store, "third", [0.0, 1.0], version=1)
        with monkeypatch.context() as patch:
            patch.setattr(steps.Pass, "promote_staged", lambda self: True)
            with pytest.raises(Conflict, match="version 2 of 'policy' was staged meanwhile, by another"):
                run(store, settings)

    once(monkeypatch, steps, "promote", second)
    report, _ = run(store, settings)
    assert (report.outcome, report.version) == (Outcome.TRAINED, 2)
    assert store.backlog(POLICY).rollouts_ready == 2
    report, _ = run(store, settings)
    assert (report.outcome, report.parent, report.version) == (Outcome.TRAINED, 2, 3)


def test_a_slow_reward_function_does_not_make_a_trainer_begin_with_a_version_of_the_past(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_version(store, settings)

    def meanwhile() -> None:
        assert run(store, settings)[0].version == 2
        record_group(store, "third", [0.0, 1.0], version=1)

    once(monkeypatch, steps.Pass, "reward_automatically", meanwhile)
    report, _ = run(store, settings)
    assert (report.parent, report.version) == (2, 3)


def test_the_guard_goes_back_before_another_trainer_may_begin(
    store: Store, proxy: FakeProxy, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_version(store, settings)
    how = settings.model_copy(update={"guard": settings.guard.model_copy(update={"roll_back": True})})
    monkeypatch.setattr(guard, "collapse", lambda *_, **__: Collapse("it got worse", best=0))
    held = []
    once(monkeypatch, steps, "roll_back", lambda: held.append(store.list_runs(POLICY)[0].state))
    report, _ = run(store, how)
    assert (report.outcome, held) == (Outcome.GUARDED, [RunState.RUNNING])
    assert statuses(store) == {0: "active", 1: "retired"}
    committed = store.list_runs(POLICY)[0]
    assert committed.state is RunState.COMMITTED
    assert committed.report["message"] == report.message
    assert report.message.endswith("; version 0 serves again")


def on_disk(settings: Settings) -> list[str]:
    return sorted(path.name for path in (settings.train.runs_dir / POLICY).iterdir())


@pytest.mark.parametrize(("owner", "name"), [(steps, "write_version"), (paper.PaperUpdates, "save_state")])
def test_a_trainer_that_slept_through_its_lease_writes_into_no_version_of_another(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    record_group(store, "task", [0.0, 1.0])

    def sleep() -> None:
        with store.transaction():
            store.connection.execute("UPDATE training_runs SET lease_expires_at = 1 WHERE state = 'running'")
        with Store.open(store.path) as others:
            assert run(others, settings)[0].version == 1
            weights = Path(others.get_version(POLICY, 1).path)
        (weights / "of-the-other").write_text("")

    once(monkeypatch, owner, name, sleep)
    with pytest.raises(LeaseLost, match="its lease ran out"):
        run(store, settings)
    active = store.active_version(POLICY)
    assert active is not None
    assert (Path(active.path) / "of-the-other").is_file()
    record_group(store, "more", [0.0, 1.0], version=1)
    assert run(store, settings)[0].version == 2
    assert on_disk(settings) == ["v00001-run2", "v00002-run3"]


def test_what_a_refused_commit_leaves_on_disk_is_gone_with_the_next_version(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_version(store, settings)
    once(monkeypatch, steps.Pass, "export", lambda: store.activate_version(POLICY, 0))
    with pytest.raises(Conflict):
        run(store, settings)
    assert on_disk(settings) == ["v00001-run1", "v00002-run2"]
    run(store, settings)
    assert on_disk(settings) == ["v00001-run1", "v00002-run3"]


def test_a_rejected_version_is_removed_at_once_and_those_that_served_stay(
    store: Store, proxy: FakeProxy, settings: Settings
) -> None:
    for version in range(3):
        record_group(store, f"task-{version}", [0.0, 1.0], version=version)
        run(store, settings)
    proxy.mode = "rejects"
    for attempt in range(4):
        record_group(store, f"later-{attempt}", [0.0, 1.0], version=3)
        assert run(store, settings)[0].outcome is Outcome.REJECTED
    assert on_disk(settings) == ["v00001-run1", "v00002-run2", "v00003-run3"]
