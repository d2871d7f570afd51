"""Groups over several passes: none is cut where a pass happens to lie."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from lightning_proxy.config import Settings
from lightning_proxy.store import ErrorClass, Finding, NewTask, RolloutState, Store
from lightning_proxy.store.retention import delete_rollouts
from lightning_proxy.trainer.advantages import Returns
from lightning_proxy.trainer.algorithms import rl
from lightning_proxy.trainer.report import Outcome, TrainReport
from lightning_proxy.trainer.run import train_once
from tests.trainer import paper
from tests.trainer.checkpoints import write_checkpoint
from tests.trainer.fake_proxy import FakeProxy, fake_proxy
from tests.trainer.recording import POLICY, flat, generation, record_group, record_rollout, span

Compared = list[list[float]]


class Passes:
    """Passes over a store of their own, and the returns that each of them compared."""

    def __init__(self, store: Store, how: Settings, proxy: FakeProxy) -> None:
        self.store = store
        self.how = how
        self.proxy = proxy
        self.compared: Compared = []

    def estimator(self, credits_R: Returns, groups_R: Sequence[int], lengths_R: Sequence[int]) -> Returns:
        self.compared.append(sorted(credits_R.tolist()))
        return paper.paper_estimator(credits_R, groups_R, lengths_R)

    def train(self) -> TrainReport:
        return train_once(self.how, store=self.store, progress=paper.silent)

    def change(self, **settings: object) -> None:
        """Other settings, as in lightning.toml."""
        values = {"automatic_rewards": {}, **self.how.model_dump(mode="json", exclude_unset=True)}
        merged = {
            name: {**values.get(name, {}), **given} if isinstance(given, dict) else given
            for name, given in settings.items()
        }
        self.how = Settings.model_validate({**values, **merged})


@pytest.fixture
def passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    paper.install(monkeypatch.setattr)
    db, model = tmp_path / "store.db", write_checkpoint(tmp_path / "model")
    with Store.open(db) as store, fake_proxy(db) as proxy:
        found = Passes(store, paper.settings(db, model, proxy.url, lease_s=60, keep_versions=50), proxy)
        monkeypatch.setattr(rl, "estimator", lambda settings: found.estimator)
        yield found


def carry_out(passes: Passes, returns: Sequence[float], passes_after: Collection[int]) -> list[TrainReport]:
    """One task of the pool, with a pass after these rollouts of it."""
    store = passes.store
    store.enqueue_tasks([NewTask(task_id="t", input={"q": 1}, group_size=len(returns))])
    reports = []
    for number, (given, value) in enumerate(
        zip(store.claim_tasks("w", limit=len(returns)), returns, strict=True), start=1
    ):
        store.add_span(span(given.rollout_id, generation([2, 3, 4], [4 + number], flat)))
        store.finish_attempt(given.rollout_id, 1, RolloutState.SUCCEEDED)
        store.add_reward(value=value, rollout_id=given.rollout_id)
        if number in passes_after:
            reports.append(passes.train())
    return reports


@pytest.mark.parametrize(
    ("returns", "passes_after"),
    [([0, 0, 1, 1], {4}), ([0, 0, 1, 1], {2, 4}), ([0, 1, 1, 1, 0], {4, 5}), ([0, 1], {1, 2})],
)
def test_a_group_of_the_task_pool_is_trained_on_as_a_whole_wherever_passes_lie(
    returns: list[float], passes_after: set[int], passes: Passes
) -> None:
    *before, last = carry_out(passes, returns, passes_after)
    assert {report.outcome for report in before} <= {Outcome.NOTHING}
    assert all("rest of their group" in report.message for report in before)
    assert all(report.run_id is None for report in before)
    assert last.outcome is Outcome.TRAINED
    assert last.counts["rollouts"] == len(returns)
    assert passes.compared == [sorted(returns)]


def test_after_a_rollback_what_the_version_answered_that_serves_again_is_one_update_old(
    passes: Passes,
) -> None:
    for version in range(4):
        record_group(passes.store, f"t{version}", [0.0, 1.0], version=version)
        assert passes.train().version == version + 1
    passes.store.activate_version(POLICY, 1)  # as the proxy rolls back
    passes.change(train={"max_version_age": 1})
    record_group(passes.store, "again", [0.0, 1.0], version=1)
    report = passes.train()
    assert (report.parent, report.version) == (1, 5)
    record_group(passes.store, "late", [0.0, 1.0], version=1)
    report = passes.train()
    assert (report.parent, report.outcome, report.left_out["calls"]) == (5, Outcome.TRAINED, {})
    record_group(passes.store, "left", [0.0, 1.0], version=4)  # three updates down to 1, and two up
    assert passes.train().left_out["calls"] == {"too_old": 4}


def test_rejected_versions_make_nothing_older(passes: Passes) -> None:
    passes.change(train={"max_version_age": 1})
    passes.proxy.mode = "rejects"
    for number in range(3):
        record_group(passes.store, f"t{number}", [0.0, 1.0])
        assert passes.train().outcome is Outcome.REJECTED
    passes.proxy.mode = "promotes"
    record_group(passes.store, "t", [0.0, 1.0])
    assert passes.train().version == 4
    record_group(passes.store, "late", [0.0, 1.0], version=0)
    report = passes.train()
    assert (report.outcome, report.left_out["calls"]) == (Outcome.TRAINED, {})


# -- groups of which nobody knows when they are complete ---------------------------------------


@pytest.mark.parametrize("task", ["t", None])
def test_one_that_comes_after_its_group_was_trained_on_is_compared_with_it(
    task: str | None, passes: Passes
) -> None:
    calls = [([2, 3, 4], [5])]
    for name, value in (("a", 0.0), ("b", 1.0), ("c", 1.0)):
        record_rollout(passes.store, name, calls, value, task_id=task)
    assert passes.train().counts["rollouts"] == 3
    record_rollout(passes.store, "late", calls, 0.0, task_id=task)
    report = passes.train()
    assert (report.outcome, report.counts["rollouts"], report.counts["baseline_only"]) == (
        Outcome.TRAINED, 1, 3,
    )  # fmt: skip
    assert passes.compared == [[0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    assert passes.store.backlog(POLICY).rollouts_ready == 0


def test_halves_of_a_group_that_agree_each_for_itself_teach_something_all_the_same(passes: Passes) -> None:
    record_group(passes.store, "t", [0.0, 0.0], turns=1)
    assert passes.train().counts["groups_all_equal"] == 1
    for name in ("c", "d"):
        record_rollout(passes.store, name, [([2, 3, 5], [6])], 1.0, task_id="t")
    assert passes.train().counts["rollouts"] == 2
    assert passes.compared == [[0.0, 0.0, 1.0, 1.0]]


def test_a_group_is_not_joined_by_what_other_versions_answered_unless_it_is_too_small(
    passes: Passes,
) -> None:
    record_group(passes.store, "t", [0.0, 1.0], version=0)
    assert passes.train().version == 1
    record_group(passes.store, "t", [0.5, 1.0], version=1)
    assert passes.train().version == 2
    record_group(passes.store, "t", [0.25], version=2)
    assert passes.train().version == 3
    passes.change(train={"max_version_age": 0})
    record_group(passes.store, "t", [0.75], version=3)
    assert passes.train().counts["given_back"] == 1  # all others are too old
    assert passes.compared == [[0.0, 1.0], [0.5, 1.0], [0.0, 0.25, 0.5, 1.0, 1.0]]


# -- former members as they were compared --------------------------------------------------------


def test_former_members_keep_the_penalties_of_their_failures(passes: Passes) -> None:
    passes.change(failures={"training": {"truncated": "penalty -1"}}, automatic_rewards={"truncated": 0.0})
    store = passes.store
    record_rollout(store, "ok", [([2, 3, 4], [5])], 1.0, task_id="t")
    record_rollout(store, "other", [([2, 3, 4], [7])], 0.0, task_id="t")
    cut = Finding(ErrorClass.TRUNCATED, "it ended at its token limit")
    store.create_rollout(rollout_id="cut", task_id="t")
    store.add_span(span("cut", generation([2, 3, 4], [6], flat), findings=(cut,)))
    store.add_reward(value=0.0, rollout_id="cut")
    assert passes.train().failures["penalised"] == {"truncated": 1}
    store.add_reward(value=2.0, rollout_id="ok")
    report = passes.train()
    assert (report.counts["again"], report.failures) == (1, {})
    assert passes.compared == [[-1.0, 0.0, 1.0], [-1.0, 0.0, 2.0]]


def test_a_running_baseline_has_the_penalties_too(passes: Passes) -> None:
    passes.change(failures={"training": {"truncated": "penalty -1"}}, automatic_rewards={"truncated": 0.0})
    cut = Finding(ErrorClass.TRUNCATED, "it ended at its token limit")
    for number in range(3):
        passes.store.add_span(span(f"r{number}", generation([2, number], [6], flat), findings=(cut,)))
        passes.store.add_reward(value=float(number), rollout_id=f"r{number}")
        if number:
            assert passes.train().outcome is Outcome.TRAINED
    assert passes.compared == [[-1.0, 0.0], [-1.0, 0.0, 1.0]]


def test_calls_that_an_sdk_tried_again_are_no_steps_of_a_former_member(passes: Passes) -> None:
    passes.change(train={"credit": "return_to_go"})
    store = passes.store
    first, second = generation([2, 3, 4], [5]), generation([2, 3, 4, 5, 6], [7])
    for name, tried in (("a", 2), ("b", 1)):
        store.create_rollout(rollout_id=name, task_id="t")
        for retry in range(tried):
            early = store.add_span(span(name, first, request=b"first", retry=retry))
        store.add_span(span(name, second, request=b"second"))
        store.add_reward(value=1.0, span_id=early)
        store.add_reward(value=float(tried), rollout_id=name)
    passes.train()
    store.add_reward(value=5.0, rollout_id="b")
    passes.train()
    # b's first step against a's first, b's last against a's last.
    assert passes.compared == [[1.0, 2.0, 2.0, 3.0], [2.0, 3.0, 5.0, 6.0]]


def test_one_that_comes_again_when_its_group_is_gone_is_used_up_and_counted(passes: Passes) -> None:
    record_group(passes.store, "t", [0.0, 1.0])
    assert passes.train().outcome is Outcome.TRAINED
    delete_rollouts(passes.store, ["t-0-0"])
    passes.store.add_reward(value=0.5, rollout_id="t-0-1")
    report = passes.train()
    assert report.left_out["rollouts"] == {"group_gone": 1}
    assert "deleted" in report.message
    assert passes.store.backlog(POLICY).rollouts_ready == 0


# -- rollouts that go on -------------------------------------------------------------------------


def test_calls_made_after_a_rollout_was_trained_on_are_trained_on_once_it_is_rewarded_again(
    passes: Passes,
) -> None:
    store = passes.store
    for name, value in (("a", 1.0), ("b", 0.0)):
        record_rollout(store, name, [([2, 3], [5])], value, task_id="t")
    assert passes.train().counts["transitions"] == 2
    for name in ("a", "b"):
        store.add_span(span(name, generation([2, 3, 5, 4], [6], flat), policy_version=1))
    assert store.backlog(POLICY).rollouts_ready == 0  # they may not be over
    for name, value in (("a", 1.0), ("b", 0.0)):
        store.add_reward(value=value, rollout_id=name)
    report = passes.train()
    assert (report.counts["again"], report.counts["transitions"]) == (2, 2)
    assert report.left_out["calls"] == {"trained_before": 2}
    assert passes.compared == [[0.0, 1.0], [0.0, 1.0]]
    assert store.backlog(POLICY).rollouts_ready == 0
