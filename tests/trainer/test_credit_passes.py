"""Credit, groups and baselines through a whole pass, over a real store; verl's part is NumPy here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.config import Settings
from lightning_proxy.store import Fidelity, Store
from lightning_proxy.trainer import advantages
from lightning_proxy.trainer.algorithms import rl
from lightning_proxy.trainer.report import Outcome, TrainReport
from lightning_proxy.trainer.run import train_once
from lightning_proxy.trainer.transitions import TrainableRollout
from tests.trainer.checkpoints import write_checkpoint
from tests.trainer.fake_proxy import fake_proxy
from tests.trainer.paper import install, silent
from tests.trainer.recording import POLICY, generation, record_group, record_rollout, span


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def settings(
    store: Store, model: Path | None = None, url: str = "http://127.0.0.1:9", **tables: Any
) -> Settings:
    train = {"proxy_url": url, "runs_dir": store.path.parent / "runs", "min_rollouts": 1}
    return Settings.model_validate(
        {
            "store": {"db": store.path},
            "policy": {"name": POLICY, "model": model},
            **tables,
            "train": train | tables.get("train", {}),
        }
    )


def preview(store: Store, **tables: Any) -> TrainReport:
    report = train_once(settings(store, **tables), store=store, progress=silent, dry_run=True)
    json.dumps(report.as_dict(), allow_nan=False)
    return report


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainableRollout]:
    """The rollouts that passes of this test trained on, with their advantages."""
    install(monkeypatch.setattr)
    seen: list[TrainableRollout] = []

    def note(*args: Any, **kwargs: Any) -> list[TrainableRollout]:
        done = advantages.assign(*args, **kwargs)
        seen.extend(done)
        return done

    monkeypatch.setattr(rl, "assign", note)
    return seen


def train(store: Store, model: Path, **tables: Any) -> TrainReport:
    with fake_proxy(store.path) as proxy:
        return train_once(settings(store, model, proxy.url, **tables), store=store, progress=silent)


def never_repeating(store: Store, first: int, *rewards: float) -> None:
    for number, reward in enumerate(rewards, start=first):
        record_rollout(store, f"live-{number}", [([2, 3 + number], [5, 6])], reward)


def test_live_traffic_whose_prompts_never_repeat_is_learnt_from(
    store: Store, model: Path, trained: list[TrainableRollout]
) -> None:
    never_repeating(store, 0, 1.0, 0.0, 0.5, 0.5)
    report = train(store, model)
    assert report.outcome is Outcome.TRAINED
    assert report.grouped_by == {"running": 4}
    assert [each.advantages for each in trained] == [(0.5,), (-0.5,), (0.0,), (0.0,)]
    trained.clear()
    never_repeating(store, 4, 1.0)  # alone now, but for what was before
    report = train(store, model)
    assert report.counts["baseline_only"] == 4
    assert [each.advantages[0] for each in trained] == pytest.approx([1.0 - 3.0 / 5])
    trained.clear()
    never_repeating(store, 5, 0.0)
    train(store, model, train={"baseline_window": 1})
    assert [each.advantages[0] for each in trained] == pytest.approx([-0.5])  # with live-4 alone


def test_without_running_baselines_it_waits_and_says_why(store: Store) -> None:
    never_repeating(store, 0, 1.0, 0.0)
    report = preview(store, train={"running_baseline": False})
    assert report.counts["rollouts"] == 0
    assert report.groups == {"of_one": {"first_prompt": 2}, "too_small": {"first_prompt": 2}}
    assert "too few rollouts of the same task" in report.message


def test_a_baseline_key_in_the_metadata_keeps_kinds_of_traffic_apart(store: Store) -> None:
    for number, key in enumerate(("search", "search", "chat")):
        store.create_rollout(rollout_id=f"r{number}", metadata={"baseline_key": key})
        store.add_span(span(f"r{number}", generation([2, number], [5])))
        store.add_reward(value=float(number), rollout_id=f"r{number}")
    report = preview(store)
    assert report.grouped_by == {"running": 2}
    assert report.groups == {"trained": {"running": 1}, "of_one": {"running": 1}, "too_small": {"running": 1}}


def test_prompts_that_differ_in_their_date_are_one_task_where_prompts_are_normalised(store: Store) -> None:
    for number in range(3):
        text = f"It is 2025-01-0{number + 1}. Go."
        request = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
        store.create_rollout(rollout_id=f"r{number}")
        store.add_span(replace(span(f"r{number}", generation([2, number], [5])), request=request))
        store.add_reward(value=float(number), rollout_id=f"r{number}")
    assert preview(store).grouped_by == {"running": 3}
    assert preview(store, train={"group_prompts": "normalised"}).grouped_by == {"normalised_prompt": 3}


def test_rewards_for_calls_are_credited_from_there_on(
    store: Store, model: Path, trained: list[TrainableRollout]
) -> None:
    for name, first, last in (("a", 1.0, 0.0), ("b", 0.0, 1.0)):
        calls = [([2, 3], [5]), ([2, 3, 5, 6], [7])]
        record_rollout(store, name, calls, None, task_id="t")
        ids = [each.span_id for each in store.list_spans(rollout_id=name)]
        store.add_reward(value=first, span_id=min(i for i in ids if i))
        store.add_reward(value=last, rollout_id=name)
    assert preview(store).counts["groups_all_equal"] == 1
    report = train(store, model, train={"credit": "return_to_go"})
    assert report.outcome is Outcome.TRAINED
    found = {each.rollout_id: [one.advantage for one in each.transitions] for each in trained}
    assert found == {"a": [0.0, -0.5], "b": [0.0, 0.5]}
    assert report.advantages == {"mean": 0.0, "std": pytest.approx(0.125**0.5), "min": -0.5, "max": 0.5}


def test_a_reward_for_one_role_moves_that_role_alone(
    store: Store, model: Path, trained: list[TrainableRollout]
) -> None:
    for name, style in (("a", 1.0), ("b", 0.0)):
        store.create_rollout(rollout_id=name, task_id="t")
        for role in ("writer", "checker"):
            store.add_span(span(name, generation([2, 3], [5]), role=role))
        store.add_reward(value=0.5, rollout_id=name)
        store.add_reward(value=style, rollout_id=name, name="style")
    report = train(
        store,
        model,
        train={"group_by_role": True},
        rewards=[{"name": "style", "roles": ["writer"]}],
    )
    assert report.outcome is Outcome.TRAINED
    found = {each.rollout_id: [one.advantage for one in each.transitions] for each in trained}
    assert found == {"a": [0.5, 0.0], "b": [-0.5, 0.0]}
    assert [summary.reward for summary in store.list_rollouts()] == [0.5, 1.5]  # the overall return


def test_groups_that_lost_members_are_counted(store: Store) -> None:
    record_group(store, "one", [0.0, 1.0, 1.0])
    record_group(store, "two", [0.0, 1.0])
    store.mark_incomplete("one-0-2", "the disk was full")
    assert preview(store).groups == {"trained": {"task_id": 2}, "lost_members": {"task_id": 1}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling": {"temperature": 0}}, "[[exploration]]"),
        ({"fidelity": Fidelity.TEXT, "generations": ()}, "[proxy] capture"),
    ],
)
def test_traffic_that_holds_nothing_to_learn_from_is_told_so(
    store: Store, model: Path, changes: dict[str, Any], said: str
) -> None:
    for number in range(2):
        store.create_rollout(rollout_id=f"r{number}", task_id="t")
        store.add_span(replace(span(f"r{number}", generation([2], [5])), **changes))
        store.add_reward(value=float(number), rollout_id=f"r{number}")
    assert said in preview(store).message
    report = train(store, model)
    assert report.outcome is Outcome.NOTHING
    assert said in report.message


def test_traffic_without_rewards_is_told_how_to_give_some(store: Store) -> None:
    record_rollout(store, "a", [([2], [5])], None)
    assert "POST /reward" in preview(store).message
    report = train_once(settings(store), store=store, progress=silent)
    assert "none of the 1 recorded rollouts has a reward" in report.message
