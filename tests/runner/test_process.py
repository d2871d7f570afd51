"""Agents' process groups: started with a log, ended as a whole, never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_proxy.errors import InvalidInput
from lightning_proxy.runner.names import Name
from lightning_proxy.runner.process import AgentProcess, Warden, how_it_ended
from tests.conftest import wait_until


@pytest.fixture
def warden() -> Iterator[Warden]:
    opened = Warden()
    yield opened
    opened.close()


def start(warden: Warden, tmp_path: Path, script: str, grace_s: float = 5.0) -> AgentProcess:
    return AgentProcess(
        ["/bin/sh", "-c", script],
        env=dict(os.environ),
        log=tmp_path / "logs" / "a.log",
        warden=warden,
        grace_s=grace_s,
    )


def lives(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def number_in(file: Path) -> int:
    wait_until(lambda: file.exists() and file.read_text().endswith("\n"))
    return int(file.read_text())


def test_its_output_goes_into_its_log_and_its_input_is_empty(warden: Warden, tmp_path: Path) -> None:
    process = start(warden, tmp_path, "cat; echo out; echo err >&2; exit 3")
    assert process.wait() == 3
    assert process.log.read_text() == "out\nerr\n"
    assert process.last_lines() == "out | err"
    assert process.written() == 8


def test_a_signal_that_ends_it_is_told(warden: Warden, tmp_path: Path) -> None:
    assert start(warden, tmp_path, "kill -SEGV $$").wait() == -signal.SIGSEGV


@pytest.mark.parametrize(
    ("code", "said"),
    [(3, "exit code 3"), (-9, "killed by SIGKILL"), (-40, "killed by signal 40")],
)
def test_an_end_has_words(code: int, said: str) -> None:
    assert how_it_ended(code) == said


def test_what_it_leaves_running_ends_with_it(warden: Warden, tmp_path: Path) -> None:
    child = tmp_path / "child"
    process = start(warden, tmp_path, f"sleep 300 & echo $! > {child}; exit 0")
    assert process.wait() == 0
    wait_until(lambda: not lives(number_in(child)))


def test_it_is_ended_with_its_children(warden: Warden, tmp_path: Path) -> None:
    child = tmp_path / "child"
    process = start(warden, tmp_path, f"sleep 300 & echo $! > {child}; wait")
    pid = number_in(child)
    process.end("enough")
    process.end("the second reason does not count")
    assert process.wait() == -signal.SIGTERM
    assert process.ended_because == "enough"
    wait_until(lambda: not lives(pid))


def test_one_that_does_not_listen_is_killed_after_the_grace(warden: Warden, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = start(
        warden, tmp_path, f"trap '' TERM; echo 1 > {ready}; while :; do sleep 0.1; done", grace_s=0.1
    )
    number_in(ready)
    process.end("enough")
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(0.05):
            process.tick()

    threading.Thread(target=tick, daemon=True).start()
    assert process.wait() == -signal.SIGKILL
    ended.set()


def test_a_command_that_is_not_there_has_the_shells_exit_code(warden: Warden, tmp_path: Path) -> None:
    process = AgentProcess(
        ["no-such-command-here"], env=dict(os.environ), log=tmp_path / "a.log", warden=warden, grace_s=1
    )
    assert process.wait() == 127
    assert "no-such-command-here" in process.last_lines()


_RUNNER = """
import os, sys
from pathlib import Path
from lightning_proxy.runner.process import AgentProcess, Warden
warden = Warden()
for number in range(3):
    script = f"trap '' HUP; sleep 300 & echo $! > {sys.argv[1]}/{number}; wait"
    AgentProcess(["/bin/sh", "-c", script], env=dict(os.environ), log=Path(sys.argv[1]) / "log",
                 warden=warden, grace_s=1)
print("up", flush=True)
sys.stdin.read()
"""


def test_agents_of_a_runner_that_is_killed_end_with_their_children(tmp_path: Path) -> None:
    runner = subprocess.Popen(
        [sys.executable, "-c", _RUNNER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert runner.stdout is not None
    assert runner.stdout.readline() == "up\n"
    pids = [number_in(tmp_path / str(number)) for number in range(3)]
    assert all(lives(pid) for pid in pids)
    os.killpg(runner.pid, signal.SIGKILL)
    runner.communicate(timeout=60)
    wait_until(lambda: not any(lives(pid) for pid in pids))


def test_a_warden_that_was_ended_is_noticed(tmp_path: Path) -> None:
    warden = Warden()
    warden.check()
    warden._process.kill()
    warden._process.wait(60)
    with pytest.raises(InvalidInput, match="was ended"):
        warden.check()
    warden.close()


def test_a_name_is_kept_and_is_nobody_elses_meanwhile(tmp_path: Path) -> None:
    first = Name(tmp_path)
    second = Name(tmp_path)
    assert first.text != second.text
    known = first.text
    first.close()
    again = Name(tmp_path)
    assert again.text == known
    for name in (again, second):
        name.close()


def test_a_name_of_ones_own_is_refused_where_it_is_taken(tmp_path: Path) -> None:
    name = Name(tmp_path, "gpu/7")
    assert name.text == "gpu/7"
    with pytest.raises(InvalidInput, match="'gpu/7' is at work"):
        Name(tmp_path, "gpu/7")
    name.close()
