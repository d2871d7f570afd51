"""Several policies learn from one stream: runs, versions, leases and consumption of each are its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_proxy.config import Settings, for_policy
from lightning_proxy.errors import LeaseHeld
from lightning_proxy.store import RunState, Store
from lightning_proxy.trainer import warm
from lightning_proxy.trainer.report import Outcome, TrainReport
from lightning_proxy.trainer.run import Trainer, train_once
from lightning_proxy.trainer.warm import WarmBackend
from tests.trainer import paper
from tests.trainer.checkpoints import write_checkpoint
from tests.trainer.fake_proxy import FakeProxy
from tests.trainer.recording import generation, span

WRITER, CHECKER = "writer-model", "checker-model"


@pytest.fixture
def settings(store: Store, proxy: FakeProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Writer and rewriter are of one policy, of which the writer is trained; the checker is of another."""
    paper.install(monkeypatch.setattr)
    models = {name: write_checkpoint(tmp_path / name) for name in (WRITER, CHECKER)}
    further = {"name": CHECKER, "model": models[CHECKER], "roles": ["checker"]}
    return Settings.model_validate(
        {
            "store": {"db": store.path},
            "policy": {"name": WRITER, "model": models[WRITER]},
            "train": {
                "proxy_url": proxy.url,
                "runs_dir": tmp_path / "runs",
                "roles": ["writer"],
                "min_rollouts": 2,
            },
            "policies": [{**further, "train": {"min_rollouts": 4}}],
        }
    )


def run(settings: Settings, store: Store, policy: str) -> TrainReport:
    return train_once(for_policy(settings, policy), store=store, progress=paper.silent)


def record(store: Store, task: str, returns: list[float]) -> None:
    """Rollouts of a task in which all three roles call, the checker's policy being another one."""
    for number, value in enumerate(returns):
        rollout = f"{task}-{number}"
        store.create_rollout(rollout_id=rollout, task_id=task)
        for place, (role, policy) in enumerate(
            [("writer", WRITER), ("checker", CHECKER), ("rewriter", WRITER)]
        ):
            made = generation([2, 3, 10 + place], [5 + number, 6])
            store.add_span(span(rollout, made, role=role, policy=policy))
        store.add_reward(value=value, rollout_id=rollout)


def active(store: Store, policy: str) -> int | None:
    version = store.active_version(policy)
    return None if version is None else version.version


def waiting(store: Store, policy: str) -> set[str]:
    return {each.rollout.rollout_id for each in store.preview(policy, 100)}


def test_each_policy_is_trained_on_its_own_calls_of_the_roles_chosen_for_it(
    store: Store, settings: Settings, proxy: FakeProxy
) -> None:
    record(store, "t", [0.0, 1.0, 1.0, 0.0])
    first = run(settings, store, WRITER)
    assert (first.outcome, first.policy, first.version) == (Outcome.TRAINED, WRITER, 1)
    assert first.counts["transitions"] == 4, "one call of the writer's in each rollout"
    assert first.left_out["calls"] == {"other_policy": 4, "other_role": 4}
    assert (active(store, WRITER), active(store, CHECKER)) == (1, None)
    second = run(settings, store, CHECKER)
    assert (second.outcome, second.policy, second.version) == (Outcome.TRAINED, CHECKER, 1)
    assert second.counts["transitions"] == 4
    assert second.left_out["calls"] == {"other_policy": 8}
    assert proxy.asked == [(WRITER, 1), (CHECKER, 1)]
    paths = {Path(each.path).parent for each in store.list_versions() if each.version == 1}
    runs = {WRITER: first.run_id, CHECKER: second.run_id}
    assert paths == {settings.train.runs_dir / name / f"v00001-run{run_id}" for name, run_id in runs.items()}


def test_what_one_policy_has_consumed_waits_for_the_other_all_the_same(
    store: Store, settings: Settings
) -> None:
    record(store, "t", [0.0, 1.0, 1.0, 0.0])
    everything = waiting(store, WRITER)
    assert len(everything) == 4
    run(settings, store, WRITER)
    assert (waiting(store, WRITER), waiting(store, CHECKER)) == (set(), everything)
    run(settings, store, CHECKER)
    assert waiting(store, CHECKER) == set()
    assert run(settings, store, WRITER).outcome is Outcome.NOTHING


def test_each_policy_has_limits_of_its_own(store: Store, settings: Settings) -> None:
    record(store, "t", [0.0, 1.0])
    assert run(settings, store, CHECKER).message == (
        "2 rewarded rollouts wait, [train] min_rollouts asks for 4"
    )
    assert run(settings, store, WRITER).outcome is Outcome.TRAINED


def test_a_late_reward_comes_again_to_each_policy_that_has_trained_on_the_rollout(
    store: Store, settings: Settings
) -> None:
    """With the former group of that policy's own run, and for each once."""
    record(store, "t", [0.0, 1.0, 1.0, 0.0])
    run(settings, store, WRITER)
    store.add_reward(value=0.5, rollout_id="t-0")
    assert waiting(store, WRITER) == {"t-0"}
    assert len(waiting(store, CHECKER)) == 4
    [again] = store.preview(WRITER, 10)
    assert (again.again, again.value) == (True, 0.5)
    assert {each.rollout.rollout_id: each.value for each in again.companions} == {
        "t-1": 1,
        "t-2": 1,
        "t-3": 0,
    }
    assert not any(each.again or each.companions for each in store.preview(CHECKER, 10))
    run(settings, store, CHECKER)
    assert waiting(store, CHECKER) == set(), "its run knew the reward already"
    assert waiting(store, WRITER) == {"t-0"}
    store.add_reward(value=0.75, rollout_id="t-0")
    assert waiting(store, CHECKER) == {"t-0"}
    few = settings.model_copy(update={"train": settings.train.model_copy(update={"min_rollouts": 1})})
    report = run(few, store, WRITER)
    assert (report.outcome, report.counts["again"], report.counts["baseline_only"]) == (Outcome.TRAINED, 1, 3)
    assert (waiting(store, WRITER), waiting(store, CHECKER)) == (set(), {"t-0"})


def test_a_run_of_one_policy_does_not_keep_out_one_of_another(store: Store, settings: Settings) -> None:
    record(store, "t", [0.0, 1.0, 1.0, 0.0])
    store.begin_run(WRITER, owner="elsewhere:1", lease_s=60)
    with pytest.raises(LeaseHeld, match="elsewhere:1 is training 'writer-model'"):
        run(settings, store, WRITER)
    assert run(settings, store, CHECKER).outcome is Outcome.TRAINED


def test_a_version_that_is_rejected_gives_back_what_its_own_policy_drained(
    store: Store, settings: Settings, proxy: FakeProxy
) -> None:
    record(store, "t", [0.0, 1.0, 1.0, 0.0])
    run(settings, store, CHECKER)
    proxy.mode = "rejects"
    assert run(settings, store, WRITER).outcome is Outcome.REJECTED
    assert len(waiting(store, WRITER)) == 4
    assert waiting(store, CHECKER) == set()
    assert [each.state for each in store.list_runs(CHECKER)] == [RunState.COMMITTED]


def test_one_engine_serves_the_passes_of_all_policies_in_turn(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept warm as long as the same policy trains again; never with another's weights."""
    opened: list[str] = []

    def note(train: object, model: Path) -> paper.PaperUpdates:
        opened.append(str(model))
        return paper.PaperUpdates()

    monkeypatch.setattr(warm, "open_backend", note)
    shared = WarmBackend()
    trainers = {
        name: Trainer(for_policy(settings, name), store=store, progress=paper.silent, warm=shared)
        for name in (WRITER, CHECKER)
    }
    for turn, name in enumerate((WRITER, WRITER, CHECKER, WRITER)):
        record(store, f"t{turn}", [0.0, 1.0, 1.0, 0.0])
        assert trainers[name].train_once().outcome is Outcome.TRAINED
    base = {name: settings.train.runs_dir.parent / name for name in (WRITER, CHECKER)}
    second = store.get_version(WRITER, 2)
    assert opened == [str(base[WRITER]), str(base[CHECKER]), second.path]
