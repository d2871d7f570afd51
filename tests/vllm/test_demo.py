"""The whole loop, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_proxy.store import RunState, Store

pytestmark = [pytest.mark.vllm, pytest.mark.train, pytest.mark.timeout(1800)]


def test_the_demos_agent_learns_through_the_proxy_and_its_weights_change_without_a_restart(
    tmp_path: Path,
) -> None:
    command = [str(Path(sys.executable).with_name("lightning-proxy")), "demo", "--json", "--workdir", "demo"]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout
    result = json.loads(done.stdout)
    assert result["initial"] < 0.2
    assert result["final"] > 0.8
    assert (tmp_path / "demo" / "curve.png").stat().st_size > 0
    curve = json.loads((tmp_path / "demo" / "curve.json").read_text())
    assert len(curve["iterations"]) == len(result["iterations"])
    with Store.open(tmp_path / "demo" / "lightning.db") as store:
        committed = [run for run in store.list_runs() if run.state is RunState.COMMITTED]
        active = store.active_version("tiny-sql")
        assert active is not None
        assert active.version == len([run for run in committed if run.report["outcome"] != "nothing"]) > 0
        for run in committed:
            if (compared := run.report["logprob_difference"]) is not None:
                assert compared["max"] < 1e-4  # nats, float32
    # One engine served all versions.
    assert (tmp_path / "demo" / "engine.log").read_text().count("Application startup complete") == 1
