"""What the loop does around its processes: directory, configuration, reports, curve, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lightning_proxy.demo
from lightning_proxy.config import load_settings
from lightning_proxy.experiment.curve import ExperimentResult, Iteration, describe, save_curve
from lightning_proxy.experiment.loop import Reports
from lightning_proxy.experiment.processes import Children, ExperimentFailed, run_to_end
from lightning_proxy.experiment.workdir import prepare, write_config
from tests.conftest import wait_until

MODEL = Path(lightning_proxy.demo.__file__).with_name("weights")
RESULT = ExperimentResult(
    seed=3,
    initial=0.125,
    final=0.9375,
    iterations=[
        Iteration(reward=0.3, sample_s=6.123, reward_s=0.5, train_s=4.2, swap_s=0.1234, version=1),
        Iteration(reward=0.9, sample_s=6, train_s=4, swap_s=0.1, eval_s=3.0, heldout=0.9375, version=2),
    ],
    seconds=123.456,
)


def test_the_summary_has_the_documented_form() -> None:
    assert RESULT.summary() == {
        "seed": 3,
        "initial": 0.125,
        "final": 0.9375,
        "iterations": [
            {"reward": 0.3, "sample_s": 6.12, "train_s": 4.2, "swap_s": 0.123},
            {"reward": 0.9, "sample_s": 6, "train_s": 4, "swap_s": 0.1},
        ],
        "seconds": 123.5,
    }
    assert RESULT.reached
    assert "held-out 0.938" in describe(1, RESULT)


def test_the_curve_is_saved_as_numbers_and_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_curve(tmp_path, RESULT)
    saved = json.loads((tmp_path / "curve.json").read_text())
    assert saved["reached"] is True
    assert set(saved["iterations"][0]) == {
        "reward", "sample_s", "reward_s", "train_s", "swap_s", "eval_s", "heldout", "version",
    }  # fmt: skip
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_configuration_is_one_that_serve_and_train_take(tmp_path: Path) -> None:
    folder = tmp_path / 'a "quoted" folder'
    folder.mkdir()
    role = {"name": "writer", "system_contains": 'You write "SQL"\nand nothing else.'}
    given = {"train": {"seed": 5, "min_rollouts": 64, "roles": ["writer"]}, "roles": [role]}
    settings = load_settings(config=write_config(folder, given, policy="p", port=18080))
    assert settings.policy.model == folder / "model"
    assert settings.train.proxy_url == "http://127.0.0.1:18080"
    assert (settings.train.seed, settings.train.min_rollouts) == (5, 64)
    assert settings.train.learning_rate == 2e-4  # what is not given stays
    assert [rule.system_contains for rule in settings.roles] == [role["system_contains"]]


def test_an_experiment_replaces_what_an_experiment_left_and_nothing_else(tmp_path: Path) -> None:
    demo = prepare(tmp_path / "demo", MODEL)
    (demo / "lightning.db").write_text("old")
    assert prepare(tmp_path / "demo", MODEL) == demo
    assert not (demo / "lightning.db").exists()
    assert (demo / "model" / "config.json").is_file()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ExperimentFailed, match="no experiment made"):
        prepare(mine, MODEL)
    assert (mine / "thesis.txt").exists()


def test_reports_are_found_among_other_lines_once_they_are_whole(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    first, second = ({"outcome": "trained", "run_id": n, "metrics": {"loss": 0.5}} for n in (1, 2))
    whole = json.dumps(second, indent=2)
    log.write_text(f"{{not json}}\n{json.dumps(first, indent=2)}\ndrained 128\n{whole[:30]}")
    reports = Reports(log)
    assert reports.new() == [first]
    assert reports.new() == []
    log.write_text(log.read_text() + whole[30:] + "\nmore\n")
    assert reports.new() == [second]


def test_a_child_that_ends_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Children() as children:
        children.start("serve", [sys.executable, "-c", "raise SystemExit('no such model')"], tmp_path / "log")
        with pytest.raises(
            ExperimentFailed, match=r"`lightning-proxy serve` ended with status 1(.|\n)*no such model"
        ):
            _check_for_long(children)


def test_children_and_their_children_end_with_the_context(tmp_path: Path) -> None:
    code = "import subprocess,sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with Children() as children:
        children.start("serve", [sys.executable, "-c", code], tmp_path / "log")
        while not (text := (tmp_path / "log").read_text().strip()):
            children.check()
            time.sleep(0.02)
    wait_until(lambda: not _runs(int(text)))


def _check_for_long(children: Children) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children.check()
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_command_that_fails_or_hangs_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('out of luck')"]
    with pytest.raises(ExperimentFailed, match=r"status 1(.|\n)*out of luck"):
        run_to_end(command, tmp_path / "log")
    with pytest.raises(ExperimentFailed, match="took more than"):
        run_to_end(["sleep", "60"], tmp_path / "log", timeout_s=0.2)


def test_a_terminated_experiment_ends_its_children(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from lightning_proxy.experiment.processes import Children, ended_by_signals
import time
with ended_by_signals(), Children() as children:
    children.start("serve", ["sleep", "60"], Path({str(tmp_path / "log")!r}))
    print(children.pids()[0], flush=True)
    time.sleep(60)
"""
    demo = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with demo:
        assert demo.stdout is not None
        pid = int(demo.stdout.readline())
        os.kill(demo.pid, signal.SIGTERM)
        assert demo.wait(60) == 128 + signal.SIGTERM
    assert not _runs(pid)
