"""Whole passes: a real store, real weights, verl, a promote route on a real socket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_proxy.config.settings import PolicySettings, ProxySettings, Settings, StoreSettings
from lightning_proxy.config.train import TrainSettings
from lightning_proxy.errors import CheckpointInvalid
from lightning_proxy.store import RunState, Store, VersionStatus
from lightning_proxy.trainer import steps
from lightning_proxy.trainer.backend import open_backend
from lightning_proxy.trainer.checkpoint import read_layout, validate
from lightning_proxy.trainer.publish import state_directory
from lightning_proxy.trainer.report import Outcome, TrainReport
from lightning_proxy.trainer.run import Trainer, train_once
from lightning_proxy.trainer.warm import WarmBackend
from tests.trainer.conftest import RECIPE
from tests.trainer.fake_proxy import FakeProxy, fake_proxy
from tests.trainer.recording import POLICY, Logprobs, record_group, record_rollout
from tests.trainer.rows import random_rows

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # verl and torch warn about themselves


def silent(line: str, done: float | None = None) -> None:
    """No one looks."""


def settings(store: Store, proxy: FakeProxy, model: Path, **train: object) -> Settings:
    values = RECIPE | {
        "proxy_url": proxy.url,
        "runs_dir": store.path.parent / "runs",
        "min_rollouts": 4,
        "mini_batch_rows": 3,
        "learning_rate": 1e-3,
    }
    return Settings(
        proxy=ProxySettings(token="secret"),
        store=StoreSettings(db=store.path),
        policy=PolicySettings(name=POLICY, model=model),
        train=Settings.model_validate({"train": values | train}).train,
    )


def run(settings_: Settings, store: Store) -> TrainReport:
    report = train_once(settings_, store=store, progress=silent)
    json.dumps(report.as_dict(), allow_nan=False)
    return report


def record(store: Store, logprobs: Logprobs, *, version: int = 0) -> None:
    """Two groups with spread, one of them with lost members, and one without spread."""
    record_group(store, "one", [0.0, 1.0, 1.0, 0.0], logprobs=logprobs, version=version)
    record_group(store, "two", [1.0, 0.0, 0.5], logprobs=logprobs, version=version)
    record_group(store, "equal", [1.0, 1.0], logprobs=logprobs, version=version)


def weights(version_path: str) -> dict[str, np.ndarray[Any, Any]]:
    from safetensors.numpy import load_file

    return dict(load_file(Path(version_path) / "model.safetensors"))


def assert_same_weights(some: str, others: str) -> None:
    one, other = weights(some), weights(others)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_one_pass_drains_trains_publishes_and_says_what_it_did(
    store: Store, proxy: FakeProxy, tiny_model: Path, sampler_logprobs: Logprobs
) -> None:
    record(store, sampler_logprobs)
    store.mark_incomplete("one-0-0", "the disk was full")
    record_rollout(store, "unrewarded", [([1], [2])], None)
    report = run(settings(store, proxy, tiny_model, epochs=2, learning_rate=3e-4), store)
    assert report.outcome is Outcome.TRAINED
    assert (report.version, report.parent) == (1, 0)
    assert report.counts == {
        "rollouts": 6,
        "groups": 2,
        "groups_all_equal": 1,
        "transitions": 12,
        "rows": 6,
        "tokens": report.counts["tokens"],
        "tokens_trained": 2 * (4 + 5 + 3 + 3 + 4 + 5),
        "given_back": 0,
        "again": 0,
        "baseline_only": 0,
    }
    assert report.left_out == {"rollouts": {"group_all_equal": 2, "incomplete_rollout": 1}, "calls": {}}
    assert report.reward_mean == pytest.approx((2 + 1.5 + 2) / 9)
    assert report.grouped_by == {"task_id": 6}
    assert report.policy_versions == {"0": 12}
    assert report.metrics["steps"] == 4
    assert report.metrics["first"]["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert report.metrics["first"]["clip_frac"] == 0
    assert report.logprob_difference is not None
    assert report.logprob_difference["max"] < 1e-4
    assert report.logprob_difference["tokens"] == report.counts["tokens_trained"]
    assert report.optimizer == "began anew: there is no saved state"
    assert report.promotion is not None
    assert report.promotion["verify_max_diff"] == 1e-6
    assert set(report.seconds) == {"drain", "prepare", "load", "compare", "update", "export", "promote"}
    assert proxy.authorization == ["Bearer secret"]
    active = store.active_version(POLICY)
    assert active is not None
    assert (active.version, active.parent, active.run_id) == (1, 0, report.run_id)
    validate(Path(active.path), tiny_model)
    assert store.backlog(POLICY).rollouts_ready == 0
    assert run(settings(store, proxy, tiny_model), store).outcome is Outcome.NOTHING


def test_the_probe_of_a_version_is_its_logprobs_of_the_first_trained_row(
    store: Store, proxy: FakeProxy, tiny_model: Path, sampler_logprobs: Logprobs
) -> None:
    from tests.trainer.plain import PlainModel

    record(store, sampler_logprobs)
    run(settings(store, proxy, tiny_model), store)
    active = store.active_version(POLICY)
    assert active is not None
    assert active.probe is not None
    ids = active.probe["prompt_token_ids"]
    assert ids[:3] == list(store.list_spans(rollout_id="one-0-0")[-1].generations[0].prompt_token_ids)
    np.testing.assert_allclose(
        active.probe["logprobs"], PlainModel(Path(active.path)).logprobs(ids), atol=1e-5
    )


def test_two_fresh_processes_learn_what_one_warm_trainer_learns_optimiser_and_all(
    store: Store, proxy: FakeProxy, tiny_model: Path, sampler_logprobs: Logprobs, tmp_path: Path
) -> None:
    paths = []
    for name in ("fresh", "warm", "forgetful"):
        with Store.open(tmp_path / f"{name}.db") as own, fake_proxy(own.path) as promoter:
            how = settings(own, promoter, tiny_model, runs_dir=tmp_path / name)
            with Trainer(how, store=own, progress=silent) as trainer:
                reports = []
                for version in (0, 1):
                    record(own, sampler_logprobs, version=version)
                    if name == "forgetful" and version == 1:
                        for state in (tmp_path / name).rglob("lineage.json"):
                            state.unlink()
                    one_pass = (
                        trainer.train_once if name == "warm" else lambda own=own, how=how: run(how, own)
                    )
                    reports.append(one_pass())
            expected = "began anew: there is no saved state" if name == "forgetful" else "carried over"
            assert reports[1].optimizer == expected
            active = own.active_version(POLICY)
            assert active is not None
            assert active.version == 2
            paths.append(active.path)
    assert_same_weights(paths[0], paths[1])
    assert any((weights(paths[0])[key] != weights(paths[2])[key]).any() for key in weights(paths[0]))


def test_a_warm_trainer_reloads_where_another_version_serves_than_the_one_it_made(
    store: Store, proxy: FakeProxy, tiny_model: Path, sampler_logprobs: Logprobs
) -> None:
    with Trainer(settings(store, proxy, tiny_model), store=store, progress=silent) as trainer:
        record(store, sampler_logprobs)
        trainer.train_once()
        store.activate_version(POLICY, 0)  # rolled back
        record(store, sampler_logprobs, version=2)
        report = trainer.train_once()
    assert (report.version, report.parent) == (2, 0)
    assert report.optimizer == "began anew: there is no saved state"


def test_a_crash_between_export_and_commit_gives_everything_back_and_the_next_run_overwrites_its_files(
    store: Store,
    proxy: FakeProxy,
    tiny_model: Path,
    sampler_logprobs: Logprobs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record(store, sampler_logprobs)
    how = settings(store, proxy, tiny_model)

    def crash(*_: object, **__: object) -> None:
        raise OSError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "commit_run", crash)
        with pytest.raises(OSError, match="went away"):
            run(how, store)
    [failed] = store.list_runs(POLICY)
    assert (failed.state, failed.error) == (RunState.FAILED, "OSError: the machine went away")
    assert store.backlog(POLICY).rollouts_ready == 9
    assert store.staged_version(POLICY) is None
    assert proxy.asked == []
    assert run(how, store).version == 1


def test_a_crash_between_commit_and_promotion_is_made_up_for_by_the_next_run(
    store: Store,
    proxy: FakeProxy,
    tiny_model: Path,
    sampler_logprobs: Logprobs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record(store, sampler_logprobs)
    how = settings(store, proxy, tiny_model)

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps, "promote", crash)
        with pytest.raises(KeyboardInterrupt):
            run(how, store)
    assert store.list_runs(POLICY)[0].state is RunState.COMMITTED
    assert store.backlog(POLICY).rollouts_ready == 0
    report = run(how, store)
    assert (report.outcome, report.resumed_version) == (Outcome.TRAINED, 1)
    active = store.active_version(POLICY)
    assert active is not None
    assert active.version == 1


def test_a_version_that_the_proxy_rejects_gives_back_what_it_was_trained_on(
    store: Store, proxy: FakeProxy, tiny_model: Path, sampler_logprobs: Logprobs
) -> None:
    record(store, sampler_logprobs)
    proxy.mode = "rejects"
    report = run(settings(store, proxy, tiny_model), store)
    assert report.outcome is Outcome.REJECTED
    assert "logprobs of the probe differ by 3.0" in report.message
    assert store.get_version(POLICY, 1).status is VersionStatus.REJECTED
    assert store.backlog(POLICY).rollouts_ready == 9


def test_an_answer_of_the_proxy_that_gets_lost_does_not_undo_the_promotion(
    store: Store, proxy: FakeProxy, tiny_model: Path, sampler_logprobs: Logprobs
) -> None:
    record(store, sampler_logprobs)
    proxy.mode = "forgets to answer"
    assert run(settings(store, proxy, tiny_model), store).outcome is Outcome.TRAINED


def test_an_update_that_is_not_finite_is_refused_before_anything_is_written(
    store: Store, proxy: FakeProxy, tiny_model: Path, sampler_logprobs: Logprobs
) -> None:
    record_group(store, "huge", [1e38, -1e38, 3e38, 0.0, 1.0], logprobs=sampler_logprobs)
    with pytest.raises(CheckpointInvalid, match="nothing is published"):
        run(settings(store, proxy, tiny_model, norm_by_std=False), store)
    assert store.backlog(POLICY).rollouts_ready == 5
    assert store.staged_version(POLICY) is None
    assert not list(store.path.parent.rglob("*.safetensors"))


def test_an_update_that_goes_too_far_is_refused_and_what_was_drained_waits(
    store: Store, proxy: FakeProxy, tiny_model: Path, sampler_logprobs: Logprobs
) -> None:
    record(store, sampler_logprobs)
    wild = settings(store, proxy, tiny_model, learning_rate=1.0, epochs=2)
    with pytest.raises(CheckpointInvalid, match=r"nats a token, more than \[guard\] max_kl"):
        run(wild, store)
    assert store.backlog(POLICY).rollouts_ready == 9
    assert store.staged_version(POLICY) is None


def test_calls_of_versions_that_are_too_old_are_left_out_and_older_ones_weighed(
    store: Store, proxy: FakeProxy, tiny_model: Path, sampler_logprobs: Logprobs
) -> None:
    record(store, sampler_logprobs)
    first = run(settings(store, proxy, tiny_model, max_version_age=0), store)
    assert first.outcome is Outcome.TRAINED
    record_group(store, "late", [0.0, 1.0, 1.0], logprobs=sampler_logprobs, version=0)
    too_old = run(settings(store, proxy, tiny_model, max_version_age=0, min_rollouts=2), store)
    assert too_old.left_out["calls"] == {"too_old": 6}
    record_group(store, "later", [0.0, 1.0, 1.0], logprobs=sampler_logprobs, version=0)
    weighed = run(settings(store, proxy, tiny_model, max_version_age=1, min_rollouts=2), store)
    assert weighed.outcome is Outcome.TRAINED
    assert weighed.metrics["first"]["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert weighed.logprob_difference is None


def test_lora_is_trained_across_runs_and_published_as_full_weights_with_its_adapter(
    store: Store, proxy: FakeProxy, tiny_model: Path, sampler_logprobs: Logprobs
) -> None:
    how = settings(store, proxy, tiny_model, lora_rank=4)
    for version in (0, 1):
        record(store, sampler_logprobs, version=version)
        report = run(how, store)
    assert report.optimizer == "carried over"
    active = store.active_version(POLICY)
    assert active is not None
    path = Path(active.path)
    assert read_layout(path).keys() == read_layout(tiny_model).keys()
    adapter = json.loads((path.parent / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tiny_model)
    import torch

    saved = torch.load(state_directory(active) / "model_world_size_1_rank_0.pt", weights_only=False)
    assert saved
    assert all(".lora_" in name for name in saved)  # not the base once more
    warm = WarmBackend()
    adapted = warm.at(how, active)
    merged = open_backend(TrainSettings(device="cpu", threads=1), path)
    rows = random_rows([9, 14, 5])
    np.testing.assert_allclose(adapted.logprobs(rows), merged.logprobs(rows), atol=1e-5)
    merged.close()
    warm.discard()
