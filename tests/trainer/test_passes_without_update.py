"""Passes that end before an update: they need neither torch nor verl."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lightning_proxy.config.settings import PolicySettings, Settings, StoreSettings
from lightning_proxy.config.train import GuardSettings, TrainSettings
from lightning_proxy.errors import LeaseHeld, TrainingError
from lightning_proxy.store import PolicyVersion, RunState, Store, VersionStatus
from lightning_proxy.trainer.report import Outcome, TrainReport
from lightning_proxy.trainer.run import train_once
from tests.trainer.fake_proxy import fake_proxy
from tests.trainer.recording import POLICY, record_group, record_rollout

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens


def settings(
    store: Store,
    *,
    url: str = NOBODY,
    model: Path | None = None,
    guard: GuardSettings | None = None,
    **train: object,
) -> Settings:
    values = {"proxy_url": url, "runs_dir": store.path.parent / "runs", "min_rollouts": 2} | train
    return Settings(
        guard=guard or GuardSettings(),
        store=StoreSettings(db=store.path),
        policy=PolicySettings(name=POLICY, model=model),
        train=TrainSettings.model_validate(values),
    )


def run(store: Store, *, dry_run: bool = False, **changes: object) -> tuple[TrainReport, list[str]]:
    lines: list[str] = []

    def note(line: str, done: float | None = None) -> None:
        lines.append(line)

    report = train_once(
        settings(store, **changes),  # type: ignore[arg-type]
        store=store,
        progress=note,
        dry_run=dry_run,
    )
    json.dumps(report.as_dict(), allow_nan=False)
    return report, lines


def stage(store: Store, path: Path) -> None:
    """A version that an earlier pass committed and could not promote."""
    store.add_base_version(POLICY, path)
    held = store.begin_run(POLICY, owner="test", lease_s=60)
    store.drain(held.run_id, limit=10)
    store.commit_run(
        held.run_id, report={}, version=PolicyVersion(POLICY, 1, str(path), VersionStatus.STAGED, parent=0)
    )


def test_too_few_rewarded_rollouts_are_left_alone_without_a_run(store: Store) -> None:
    record_group(store, "task", [1.0])
    report, _ = run(store)
    assert report.outcome is Outcome.NOTHING
    assert "1 rewarded rollouts wait, [train] min_rollouts asks for 2" in report.message
    assert store.list_runs() == []


def test_a_dry_run_says_what_would_be_trained_on_and_takes_nothing(store: Store) -> None:
    record_group(store, "mixed", [0.0, 1.0, 1.0])
    record_group(store, "equal", [1.0, 1.0])
    record_group(store, "alone", [1.0])
    record_rollout(store, "waiting", [([1], [2])], None)
    report, _ = run(store, dry_run=True)
    assert report.outcome is Outcome.DRY_RUN
    assert report.counts["rollouts"] == 3
    assert report.counts["transitions"] == 6
    assert report.counts["rows"] == 3
    assert report.left_out == {"rollouts": {"group_all_equal": 2, "group_too_small": 1}, "calls": {}}
    assert report.advantages is None
    assert "1 have no reward yet" in report.message
    assert store.list_runs() == []
    assert store.backlog(POLICY).rollouts_ready == 6


def test_neither_torch_nor_verl_is_loaded_by_a_dry_run() -> None:
    import subprocess

    program = (
        "import sys, lightning_proxy.trainer.run; "
        "print([name for name in ('torch', 'verl', 'ray', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_groups_without_spread_are_consumed_and_small_ones_given_back(store: Store, tmp_path: Path) -> None:
    record_group(store, "equal", [1.0, 1.0])
    record_group(store, "alone", [1.0])
    report, _ = run(store, model=tmp_path)
    assert report.outcome is Outcome.NOTHING
    assert "2 rollouts (group all equal)" in report.message
    assert report.counts["given_back"] == 1
    [committed] = store.list_runs(POLICY)
    assert committed.state is RunState.COMMITTED
    assert committed.report["left_out"]["rollouts"] == {"group_all_equal": 2, "group_too_small": 1}
    assert store.backlog(POLICY).rollouts_ready == 1
    assert store.staged_version(POLICY) is None


def test_a_full_drain_consumes_groups_that_never_grow(store: Store, tmp_path: Path) -> None:
    for task in "abc":
        record_group(store, task, [1.0])
    run(store, model=tmp_path, max_rollouts=2)
    assert store.backlog(POLICY).rollouts_ready == 1


def test_without_weights_to_begin_with_it_says_where_to_give_them(store: Store) -> None:
    record_group(store, "task", [0.0, 1.0])
    with pytest.raises(TrainingError, match=r"\[policy\] model .*serve --model"):
        run(store)
    assert store.backlog(POLICY).rollouts_ready == 2


def test_weights_that_are_not_where_they_should_be_are_an_error(store: Store, tmp_path: Path) -> None:
    record_group(store, "task", [0.0, 1.0])
    with pytest.raises(TrainingError, match="are not at"):
        run(store, model=tmp_path / "nowhere")


def test_a_second_run_at_once_is_told_who_holds_the_lease(store: Store, tmp_path: Path) -> None:
    record_group(store, "task", [0.0, 1.0])
    held = store.begin_run(POLICY, owner="elsewhere:42", lease_s=60)
    store.drain(held.run_id, limit=10)
    with pytest.raises(LeaseHeld, match="elsewhere:42"):
        run(store, model=tmp_path)


def test_a_version_left_staged_by_a_crash_is_promoted_first(store: Store, tmp_path: Path) -> None:
    stage(store, tmp_path)
    with fake_proxy(store.path) as proxy:
        report, lines = run(store, url=proxy.url)
    assert proxy.asked == [(POLICY, 1)]
    assert (report.outcome, report.version) == (Outcome.TRAINED, None)
    assert report.resumed_version == 1
    assert "promoting it first" in lines[0]
    active = store.active_version(POLICY)
    assert active is not None
    assert active.version == 1


def test_while_the_proxy_is_away_a_staged_version_waits_and_nothing_else_is_trained(
    store: Store, tmp_path: Path
) -> None:
    record_group(store, "task", [0.0, 1.0])
    stage(store, tmp_path)
    record_group(store, "later", [0.0, 1.0])
    report, _ = run(store)
    assert report.outcome is Outcome.STAGED_ONLY
    assert "the next `lightning-proxy train` promotes it" in report.message
    assert store.backlog(POLICY).rollouts_ready == 2
    assert store.staged_version(POLICY) is not None


def test_a_staged_version_whose_weights_are_gone_is_rejected_and_its_rollouts_given_back(
    store: Store, tmp_path: Path
) -> None:
    record_group(store, "task", [0.0])
    stage(store, tmp_path / "gone")
    report, _ = run(store)
    assert store.get_version(POLICY, 1).status is VersionStatus.REJECTED
    assert store.backlog(POLICY).rollouts_ready == 1
    assert report.outcome is Outcome.NOTHING


def after_a_good_version(store: Store, path: Path) -> None:
    """Version 1 was seen to be good (mean reward 0.9), version 2 serves now."""
    store.add_base_version(POLICY, path)
    for number in (1, 2):
        rewards = {"mean": 0.9 if number == 2 else 0.5, "std": 0.3, "min": 0.0, "max": 1.0, "count": 100}
        held = store.begin_run(POLICY, owner="test", lease_s=60)
        report = {"parent": number - 1, "rewards": rewards, "entropy": 0.5}
        version = PolicyVersion(POLICY, number, str(path), VersionStatus.STAGED, parent=number - 1)
        store.commit_run(held.run_id, report=report, version=version)
        store.activate_version(POLICY, number)


def test_a_policy_that_got_much_worse_is_not_trained_further_and_the_way_back_is_named(
    store: Store, tmp_path: Path
) -> None:
    after_a_good_version(store, tmp_path)
    record_group(store, "task", [0.0] * 15 + [0.1], version=2)
    report, _ = run(store)
    assert report.outcome is Outcome.GUARDED
    assert "policies rollback --to 1" in report.message
    assert store.list_runs(POLICY)[0].state is RunState.COMMITTED
    assert store.backlog(POLICY).rollouts_ready == 0
    assert store.staged_version(POLICY) is None


def test_so_is_one_whose_groups_all_agree_on_nothing(store: Store, tmp_path: Path) -> None:
    after_a_good_version(store, tmp_path)
    record_group(store, "task", [0.0] * 16, version=2)
    assert run(store)[0].outcome is Outcome.GUARDED


def test_the_guard_names_no_version_whose_weights_are_gone(store: Store, tmp_path: Path) -> None:
    after_a_good_version(store, tmp_path)
    with store.transaction():
        sql = "UPDATE policy_versions SET path = ? WHERE version = 1"
        store.connection.execute(sql, (str(tmp_path / "gone"),))
    record_group(store, "task", [0.0] * 16, version=2)
    with fake_proxy(store.path) as proxy:
        report, _ = run(store, url=proxy.url, guard=GuardSettings(roll_back=True))
    assert report.outcome is Outcome.GUARDED
    assert "policies rollback --to 0" in report.message
    assert proxy.asked == [(f"{POLICY} back", 0)]


def test_where_it_is_wanted_the_proxy_goes_back_to_the_best_version(store: Store, tmp_path: Path) -> None:
    after_a_good_version(store, tmp_path)
    record_group(store, "task", [0.0] * 16, version=2)
    with fake_proxy(store.path) as proxy:
        report, _ = run(store, url=proxy.url, guard=GuardSettings(roll_back=True))
    assert proxy.asked == [(f"{POLICY} back", 1)]
    assert "version 1 serves again" in report.message
    active = store.active_version(POLICY)
    assert active is not None
    assert active.version == 1


def test_what_an_earlier_version_did_is_no_evidence_against_the_present_one(
    store: Store, tmp_path: Path
) -> None:
    after_a_good_version(store, tmp_path)
    record_group(store, "task", [0.0] * 16, version=1)
    assert run(store)[0].outcome is Outcome.NOTHING


def test_a_dry_run_of_sft_or_dpo_counts_what_it_would_learn_from(store: Store) -> None:
    record_group(store, "one", [0.0, 1.0, 1.0], turns=1)
    record_rollout(store, "unrewarded", [([1], [2])], None)
    sft, _ = run(store, dry_run=True, algorithm="sft")
    assert (sft.algorithm, sft.counts["rows_by_reward"], sft.counts["rollouts"]) == ("sft", 2, 2)
    assert "3 rewarded or demonstrated rollouts wait, 1 have no reward yet; 2 of them" in sft.message
    dpo, _ = run(store, dry_run=True, algorithm="dpo")
    assert (dpo.counts["pairs_by_group"], dpo.counts["rows"]) == (1, 2)
    assert store.backlog(POLICY).rollouts_ready == 3


def test_sft_takes_groups_of_one_and_dpo_leaves_them_for_later(store: Store) -> None:
    record_group(store, "lone", [0.5], turns=1)
    dpo, _ = run(store, algorithm="dpo", min_rollouts=1, model=store.path.parent)
    assert (dpo.outcome, dpo.counts["given_back"]) == (Outcome.NOTHING, 1)
    assert store.backlog(POLICY).rollouts_ready == 1
    sft, _ = run(store, algorithm="sft", min_rollouts=1, model=store.path.parent)
    assert (sft.outcome, sft.left_out["rollouts"]) == (Outcome.NOTHING, {"below_min_return": 1})
    assert store.backlog(POLICY).rollouts_ready == 0


@pytest.mark.parametrize("algorithm", ["rl", "dpo"])
def test_rollouts_that_are_given_back_are_not_looked_at_again_each_pass(store: Store, algorithm: str) -> None:
    for task in ("one", "two", "three"):
        record_group(store, task, [0.5], turns=1)
    for _ in range(2):
        report, _ = run(store, algorithm=algorithm, model=store.path.parent)
        assert (report.counts["given_back"], report.rewards) == (3, None)
    record_group(store, "equal", [1.0, 1.0], turns=1)
    report, _ = run(store, algorithm=algorithm, model=store.path.parent)
    assert report.rewards is not None
    assert (report.rewards["count"], report.rewards["mean"]) == (2, 1.0)


def test_passes_that_saw_nothing_new_do_not_make_the_guard_forget(store: Store, tmp_path: Path) -> None:
    after_a_good_version(store, tmp_path)
    short = GuardSettings(window=2)
    for task in ("one", "two", "three"):
        record_group(store, task, [0.5], turns=1, version=2)
    for _ in range(3):
        report, _ = run(store, guard=short)
        assert (report.counts["given_back"], report.rewards) == (3, None)
    record_group(store, "task", [0.0] * 16, version=2)
    report, _ = run(store, guard=short)
    assert report.outcome is Outcome.GUARDED
    assert "policies rollback --to 1" in report.message


def test_groups_without_spread_that_come_again_are_not_looked_at_again(store: Store, tmp_path: Path) -> None:
    after_a_good_version(store, tmp_path)
    short = GuardSettings(window=2)
    record_group(store, "equal", [0.5, 0.5], turns=1, version=2)
    first, _ = run(store, guard=short)
    assert first.rewards is not None
    for value in (0.6, 0.5, 0.6):
        for member in (0, 1):
            store.add_reward(value=value, rollout_id=f"equal-2-{member}")
        report, _ = run(store, guard=short)
        assert (report.left_out["rollouts"], report.rewards) == ({"group_all_equal": 2}, None)
    assert len(store.list_runs(POLICY)) == 2 + 4
    record_group(store, "task", [0.0] * 16, version=2)
    report, _ = run(store, guard=short)
    assert report.outcome is Outcome.GUARDED
    assert "policies rollback --to 1" in report.message
