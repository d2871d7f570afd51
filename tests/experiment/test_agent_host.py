"""The warm parent: what it runs is an ordinary script with its own arguments and environment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.experiment.sample import AgentHost, AgentHostDied

SCRIPT = """\
import os, sys, time
assert __name__ == "__main__"
what, *rest = sys.argv[1:]
if what == "say":
    print(os.environ["WORD"], *rest, sys.stdin.read())
elif what == "crash":
    raise ValueError("oh no")
elif what == "exit":
    sys.exit(int(rest[0]))
elif what == "sleep":
    time.sleep(60)
elif what == "leave":
    import subprocess
    subprocess.Popen(["sleep", "60"])
    print("left")
elif what == "change":
    os.environ["WORD"] = "changed"
"""


@contextmanager
def started(folder: Path, timeout_s: float) -> Iterator[AgentHost]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    with (
        (folder / "log").open("wb") as log,
        AgentHost(
            log=log, no_certificates=folder / "none", script=script, concurrency=3, timeout_s=timeout_s
        ) as host,
    ):
        yield host


@pytest.fixture
def host(tmp_path: Path) -> Iterator[AgentHost]:
    with started(tmp_path, timeout_s=120.0) as it:
        yield it


def _job(name: str, *argv: str) -> dict[str, Any]:
    return {"id": name, "argv": list(argv), "env": {"WORD": name}}


def _run(host: AgentHost, *jobs: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    return {ended["id"]: (ended["status"], ended["output"]) for ended in host.run(jobs)}


def test_runs_end_as_they_would_on_their_own(host: AgentHost, tmp_path: Path) -> None:
    assert _run(
        host,
        _job("a", "say", "one", "two"),
        _job("b", "crash"),
        _job("c", "exit", "7"),
        _job("e", "change"),
        _job("f", "say"),
        _job("g", "leave"),
    ) == {
        "a": (0, "a one two \n"),
        "b": (1, ""),
        "c": (7, ""),
        "e": (0, ""),
        "f": (0, "f \n"),
        "g": (0, "left\n"),  # what it left behind is not waited for
    }
    assert "ValueError: oh no" in (tmp_path / "log").read_text()


def test_a_run_that_takes_too_long_is_ended_and_the_next_one_takes_its_place(tmp_path: Path) -> None:
    with started(tmp_path, timeout_s=0.3) as host:
        jobs = [_job(str(number), "sleep") for number in range(4)]
        assert set(_run(host, *jobs).values()) == {("timeout", "")}


def test_more_jobs_than_fit_into_a_pipe_are_all_run(host: AgentHost) -> None:
    jobs = [_job(str(number), "say", "x" * 2000) for number in range(40)]
    assert {status for status, _ in _run(host, *jobs).values()} == {0}


def test_a_host_that_is_gone_is_an_error_and_no_hang(host: AgentHost) -> None:
    host.process.kill()
    host.process.wait()
    with pytest.raises(AgentHostDied):
        _run(host, _job("a", "say"))


def test_what_the_first_run_imports_the_host_imports_but_for_what_lies_beside_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script's own modules may read its environment: each run imports them anew."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(packages))
    for folder, name in ((packages, "framework"), (tmp_path, "beside")):
        (folder / f"{name}.py").write_text("import os\nPID = os.getpid()\n")
    script = tmp_path / "script.py"
    script.write_text("import beside, framework, os\nprint(os.getpid(), beside.PID, framework.PID)\n")
    with (
        (tmp_path / "log").open("wb") as log,
        AgentHost(log=log, no_certificates=tmp_path / "none", script=script, concurrency=3) as host,
    ):
        said = _run(host, *(_job(str(number)) for number in range(4)))
        pids = [[int(pid) for pid in said[str(number)][1].split()] for number in range(4)]
    assert all(own == beside for own, beside, _ in pids)
    assert len({own for own, _, _ in pids}) == 4
    assert [framework for _, _, framework in pids] == [pids[0][0], *[host.process.pid] * 3]
