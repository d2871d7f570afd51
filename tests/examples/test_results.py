"""What docs/experiments.md says is what the saved runs say, and they say what is claimed."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.experiment import NAMES
from examples.report import (
    PAGE,
    draw_experiments,
    draw_live,
    gain_table,
    held_out,
    live_table,
    pooled,
    runs_of,
    sampled,
    table,
    training_s,
    write_page,
)


def test_the_tables_in_the_documentation_are_those_of_the_saved_runs(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    write_page(copy)
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    assert table() in PAGE.read_text(encoding="utf-8")
    assert gain_table() in PAGE.read_text(encoding="utf-8")
    assert live_table() in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_every_seed_at_least_doubles_its_held_out_success_and_passes_the_goal(name: str) -> None:
    runs = runs_of(name)
    assert [run["seed"] for run in runs] == [0, 1, 2]
    for run in runs:
        assert not run["shuffled"]
        assert run["final"] >= 2 * run["initial"]
        assert run["final"] > 0.8
        assert run["final_sampled"] >= 2 * run["initial_sampled"]
        assert training_s(run) < 15 * 60
        assert run["updates"] == len(run["iterations"])


@pytest.mark.parametrize("name", NAMES)
def test_with_shuffled_rewards_nothing_is_learned(name: str) -> None:
    own, controls = runs_of(name), runs_of(name, shuffled=True)
    assert [run["seed"] for run in controls] == [run["seed"] for run in own]
    assert [run["updates"] for run in controls] == [run["updates"] for run in own]  # trained as often
    learned, control = pooled(own)[2], pooled(controls)[2]
    assert learned.low is not None
    assert learned.low > 0.3
    assert control.low is not None
    assert control.low <= 0  # no gain that chance would not explain


@pytest.mark.parametrize("name", NAMES)
def test_hardly_a_run_of_an_agent_failed(name: str) -> None:
    for run in (*runs_of(name), *runs_of(name, shuffled=True)):
        assert run["failed_runs"] <= 0.01 * 128 * len(run["iterations"])


def test_live_traffic_is_answered_better_by_the_last_version_of_every_seed() -> None:
    runs = runs_of("live")
    assert runs
    for run in runs:
        assert run["versions"][0]["version"] == 0
        assert run["versions"][-1]["gain"]["low"] > 0
        assert run["failed"] == 0


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_experiments(tmp_path / "experiments.png")
    draw_live(tmp_path / "live.png", runs_of("live"))
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_held_out_success_is_where_it_was_measured() -> None:
    run = {"initial": 0.2, "iterations": [{"heldout": None}, {"heldout": 0.5}]}
    assert held_out(run) == [(0, 0.2), (2, 0.5)]


def test_success_in_training_is_that_of_before_each_update() -> None:
    assert sampled({"iterations": [{"reward": 0.25}, {"reward": 0.5}]}) == [(0, 0.25), (1, 0.5)]
