"""Groups over several passes: none is cut where a pass happens to lie."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from lightning_proxy.config import Settings
from lightning_proxy.store import NewTask, RolloutState, Store
from lightning_proxy.trainer.advantages import Returns
from lightning_proxy.trainer.algorithms import rl
from lightning_proxy.trainer.report import Outcome, TrainReport
from lightning_proxy.trainer.run import train_once
from tests.trainer import paper
from tests.trainer.checkpoints import write_checkpoint
from tests.trainer.fake_proxy import FakeProxy, fake_proxy
from tests.trainer.recording import POLICY, flat, generation, record_group, span

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
    record_group(passes.store, "t", [0.0, 1.0])
    assert [passes.train().outcome for _ in range(3)] == [Outcome.REJECTED] * 3
    passes.proxy.mode = "promotes"
    assert passes.train().version == 4
    record_group(passes.store, "late", [0.0, 1.0], version=0)
    report = passes.train()
    assert (report.outcome, report.left_out["calls"]) == (Outcome.TRAINED, {})
