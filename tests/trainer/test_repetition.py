"""What was refused is not made again of the same: not every half minute, and not for ever."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lightning_proxy.config import Settings
from lightning_proxy.errors import CheckpointInvalid
from lightning_proxy.store import RunState, Store
from lightning_proxy.trainer.report import Outcome, TrainReport
from lightning_proxy.trainer.run import Trainer, train_once
from tests.trainer import paper
from tests.trainer.checkpoints import write_checkpoint
from tests.trainer.fake_proxy import FakeProxy
from tests.trainer.recording import POLICY, record_group

MakeSettings = Callable[..., Settings]


@pytest.fixture
def settings(store: Store, proxy: FakeProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeSettings:
    paper.install(monkeypatch.setattr)
    model = write_checkpoint(tmp_path / "model")
    return lambda **train: paper.settings(store.path, model, proxy.url, lease_s=60, **train)


def run(store: Store, settings: Settings, **how: bool) -> TrainReport:
    return train_once(settings, store=store, progress=paper.silent, **how)  # type: ignore[arg-type]


@pytest.fixture
def rejected(store: Store, proxy: FakeProxy, settings: MakeSettings) -> TrainReport:
    """The engine's logprobs were wrong: the version is rejected, what it was made of waits."""
    record_group(store, "task", [0.0, 1.0])
    proxy.mode = "rejects"
    report = run(store, settings())
    assert (report.outcome, proxy.asked) == (Outcome.REJECTED, [(POLICY, 1)])
    return report


def test_after_a_rejection_a_pass_waits_for_something_new_and_says_so(
    store: Store, proxy: FakeProxy, settings: MakeSettings, rejected: TrainReport
) -> None:
    said = {run(store, settings()).message for _ in range(3)}
    assert said == {
        f"nothing is new since run {rejected.run_id}, and another would come to the same: version 1 was "
        "rejected: logprobs of the probe differ by 3.0. It waits for more rewards or other settings; "
        "`lightning-proxy train --retry` repeats it all the same"
    }
    again = run(store, settings())
    assert (again.outcome, again.run_id) == (Outcome.NOTHING, None)
    assert len(store.list_runs(POLICY)) == 1
    assert proxy.asked == [(POLICY, 1)]
    assert list((settings().train.runs_dir / POLICY).iterdir()) == []
    assert store.backlog(POLICY).rollouts_ready == 2
    assert "nothing is new since run 1" in run(store, settings(), dry_run=True).message


def test_another_rollout_is_something_new(
    store: Store, proxy: FakeProxy, settings: MakeSettings, rejected: TrainReport
) -> None:
    proxy.mode = "promotes"
    record_group(store, "another", [0.0, 1.0])
    assert run(store, settings()).version == 2


def test_so_is_another_reward(
    store: Store, proxy: FakeProxy, settings: MakeSettings, rejected: TrainReport
) -> None:
    proxy.mode = "promotes"
    store.add_reward(value=0.5, rollout_id="task-0-0", name="style")
    assert run(store, settings()).version == 2


def test_so_are_other_settings(
    store: Store, proxy: FakeProxy, settings: MakeSettings, rejected: TrainReport
) -> None:
    proxy.mode = "promotes"
    assert run(store, settings(verify_tolerance=0.3)).version == 2


def test_so_are_other_weights_to_begin_with(store: Store, proxy: FakeProxy, settings: MakeSettings) -> None:
    record_group(store, "first", [0.0, 1.0])
    run(store, settings())
    proxy.mode = "rejects"
    record_group(store, "task", [0.0, 1.0], version=1)
    assert run(store, settings()).outcome is Outcome.REJECTED
    store.activate_version(POLICY, 0)
    assert run(store, settings()).outcome is Outcome.REJECTED
    assert run(store, settings()).outcome is Outcome.NOTHING


def test_it_is_repeated_where_that_is_asked_for(
    store: Store, proxy: FakeProxy, settings: MakeSettings, rejected: TrainReport
) -> None:
    assert run(store, settings(), retry=True).outcome is Outcome.REJECTED
    assert run(store, settings()).outcome is Outcome.NOTHING
    proxy.mode = "promotes"
    assert run(store, settings(), retry=True).version == 3


def test_an_update_that_went_too_far_is_not_made_again_either(
    store: Store, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def far(self: object, rows: object) -> Mapping[str, float]:
        return {"pg_loss": 0.0, "grad_norm": 1.0, "clip_frac": 0.0, "kl": 7.0}

    record_group(store, "task", [0.0, 1.0])
    with monkeypatch.context() as patch:
        patch.setattr(paper.PaperUpdates, "update", far)
        with pytest.raises(CheckpointInvalid, match="max_kl"):
            run(store, settings())
        report = run(store, settings())
    assert report.outcome is Outcome.NOTHING
    assert "had moved 7 nats a token" in report.message
    assert [each.state for each in store.list_runs(POLICY)] == [RunState.FAILED]
    assert run(store, settings(learning_rate=1e-7)).version == 1


def test_a_run_that_failed_by_its_surroundings_is_repeated(
    store: Store, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    record_group(store, "task", [0.0, 1.0])
    with monkeypatch.context() as patch:
        patch.setattr(paper.PaperUpdates, "save_state", full)
        with pytest.raises(OSError, match="no space"):
            run(store, settings())
    assert run(store, settings()).version == 1


def test_a_version_whose_weights_are_gone_is_made_again(
    store: Store, proxy: FakeProxy, settings: MakeSettings
) -> None:
    record_group(store, "task", [0.0, 1.0])
    proxy.mode = "refuses"
    run(store, settings())
    shutil.rmtree(Path(store.get_version(POLICY, 1).path).parent)
    proxy.mode = "promotes"
    report = run(store, settings())
    assert (report.outcome, report.version) == (Outcome.TRAINED, 2)


def test_so_is_one_that_was_overtaken_once_its_parent_serves_again(
    store: Store, proxy: FakeProxy, settings: MakeSettings
) -> None:
    record_group(store, "first", [0.0, 1.0])
    run(store, settings())
    record_group(store, "task", [0.0, 1.0], version=1)
    proxy.mode = "refuses"
    run(store, settings())
    store.activate_version(POLICY, 0)
    store.reject_if_out_of_line(POLICY, 2)
    store.activate_version(POLICY, 1)
    proxy.mode = "promotes"
    report = run(store, settings())
    assert (report.parent, report.version) == (1, 3)


def test_groups_that_wait_for_company_leave_no_run_behind(store: Store, settings: MakeSettings) -> None:
    """As often as it is looked: by cron, or by one process, which looks once only."""
    record_group(store, "alone", [1.0])
    for _ in range(3):
        report = run(store, settings())
        assert (report.outcome, report.run_id, report.counts["given_back"]) == (Outcome.NOTHING, None, 1)
    lines: list[str] = []

    def note(line: str, done: float | None = None) -> None:
        lines.append(line)

    with Trainer(settings(), store=store, progress=note) as trainer:
        assert {trainer.train_once().message for _ in range(3)} == {report.message}
        assert lines == ["drained 1 rewarded rollouts"]
        assert store.list_runs(POLICY) == []
        record_group(store, "another", [1.0])
        assert trainer.train_once().counts["given_back"] == 2
        record_group(store, "whole", [0.0, 1.0])
        assert trainer.train_once().outcome is Outcome.TRAINED
        assert trainer.train_once().counts["given_back"] == 2
    assert [each.state for each in store.list_runs(POLICY)] == [RunState.COMMITTED]
