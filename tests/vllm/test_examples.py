"""Two of the experiments, shortened, with real vLLM, real verl and the agents' real frameworks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.live.run import Schedule
from examples.live.run import run as run_live
from examples.live.users import Habits
from lightning_proxy.store import RunState, Store

pytestmark = [pytest.mark.vllm, pytest.mark.train, pytest.mark.clients, pytest.mark.timeout(900)]

HURRIED = Habits(delay_s=(2.0, 12.0), correct_after_s=(2.0, 5.0))


def test_writer_and_rewriter_learn_in_langgraph_and_the_checker_is_not_trained(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.experiment", "sql", "--iterations", "6"]
    done = subprocess.run([*command, "--workdir", str(tmp_path / "sql")], check=False)
    assert done.returncode == 0  # held-out success is over 0.8
    curve = json.loads((tmp_path / "sql" / "curve.json").read_text())
    assert curve["initial"] < 0.5
    assert (tmp_path / "sql" / "curve.png").stat().st_size > 0
    with Store.open(tmp_path / "sql" / "lightning.db") as store:
        committed = [run for run in store.list_runs() if run.state is RunState.COMMITTED]
        assert len(committed) >= 4
        for run in committed:
            assert run.report["left_out"]["calls"]["other_role"] > 0
        spans = store.list_spans(limit=2000, content=False)
    assert {span.role for span in spans} == {"writer", "checker", "rewriter"}
    assert {span.fidelity.value for span in spans} == {"exact"}


def test_thumbs_without_tasks_groups_or_ids_make_new_versions(tmp_path: Path) -> None:
    schedule = Schedule(every_s=10.0, last_s=20.0)
    run_live(tmp_path / "live", seed=0, minutes=2.0, habits=HURRIED, schedule=schedule)
    report = json.loads((tmp_path / "live" / "live.json").read_text())
    assert report["failed"] == 0
    assert [row["version"] for row in report["versions"]][:2] == [0, 1]
    with Store.open(tmp_path / "live" / "lightning.db") as store:
        committed = [run for run in store.list_runs() if run.state is RunState.COMMITTED]
        assert committed
        groups = [methods for run in committed for methods in run.report["groups"].values()]
        assert {method for methods in groups for method in methods} == {"running"}
        compared = store.compare_versions("policy")
    rewarded = sum(row.rewarded for row in (*compared.versions, compared.mixed))
    assert rewarded == report["thumbs"]  # one conversation each
