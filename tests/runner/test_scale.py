"""A whole pool with everything that goes wrong at once: each rollout ends in the state that it has to.

By default 24 tasks x 4; ``TASK_POOL_TASKS=200 TASK_POOL_GROUP=8`` runs 1,600 rollouts.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.store import Store
from tests.conftest import MakeProxyProcess, wait_until
from tests.runner.pool import EXPECTED, RULES, Runners, kill, summary_of, write_tasks
from tests.runner.test_worker import check, check_attempts

pytestmark = pytest.mark.drill

TASKS = int(os.environ.get("TASK_POOL_TASKS", "24"))
GROUP = int(os.environ.get("TASK_POOL_GROUP", "4"))
# Of 24 tasks: what goes right, and then each of the faults, those that cost time once.
MIX = ["fine"] * 11 + ["crash_once", "declined", "overloaded_once", "crash", "signal", "refused"] + [
    "hang", "hang_once", "silent", "silent_once", "stubborn", "refused", "crash_once"
]  # fmt: skip
CONCURRENCY = 12
KILLED_AT = (0.1, 0.25, 0.4, 0.55)  # of the rollouts
HELD_BY_DOOMED = "SELECT count(*) FROM task_rollouts WHERE state = 'running' AND worker = 'doomed'"


@pytest.fixture
def engine_url(tmp_path: Path) -> Iterator[str]:
    """A fake engine in a process of its own."""
    file = tmp_path / "rules.json"
    file.write_text(json.dumps(RULES))
    command = [sys.executable, "-m", "tests.engine.fake_engine", "--tokens", "12", "--rules", str(file)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1] + "/v1"
        process.kill()


def tasks() -> list[dict[str, Any]]:
    limits = {"timeout_s": 30.0, "silence_s": 20.0}
    short = {
        "hang": {"timeout_s": 2.0},
        # What comes to its end at the second attempt may take its time for that.
        "hang_once": {"timeout_s": 12.0},
        "stubborn": {"timeout_s": 2.0},
        "silent": {"silence_s": 2.0},
        "silent_once": {"silence_s": 12.0},
    }
    kinds = itertools.islice(itertools.cycle(MIX), TASKS)
    return [
        {"task_id": f"{kind}-{i}", "input": {"kind": kind}, **limits, **short.get(kind, {})}
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.timeout(1800)
def test_every_rollout_of_a_pool_full_of_faults_ends_in_the_right_state(
    tmp_path: Path, engine_url: str, make_proxy_process: MakeProxyProcess
) -> None:
    proxy = make_proxy_process(engine_url)
    runners = Runners(tmp_path, proxy.url)
    file = write_tasks(tmp_path / "tasks.jsonl", tasks())
    flags = ["--tasks", str(file), "--group-size", str(GROUP), "--max-attempts", "2"]
    flags += ["--concurrency", str(CONCURRENCY), "--grace", "0.5", "--lease", "10"]
    begun_at = time.monotonic()
    steady = runners.start(*flags, "--json")
    for share in KILLED_AT:
        doomed = runners.start(*flags, "--name", "doomed")
        wanted = share * TASKS * GROUP

        def at_work(wanted: float = wanted) -> bool:
            with Store.open(proxy.db) as store:
                return len(runners.begun()) >= wanted and store.scalar(HELD_BY_DOOMED) > CONCURRENCY // 2

        wait_until(lambda: at_work() or steady.poll() is not None, 900)
        kill(doomed)
    second = runners.start(*flags, "--name", "doomed", "--json")
    done = summary_of(steady, 1500)
    summary_of(second, 300)
    seconds = time.monotonic() - begun_at
    assert (done["tasks"], done["tasks_open"], done["rollouts"]) == (TASKS, 0, TASKS * GROUP)
    assert done["succeeded"] + done["failed"] == TASKS * GROUP
    assert (done["running"], done["waiting"], done["cancelled"]) == (0, 0, 0)
    begun = runners.begun()
    lost = check_attempts(proxy.db, begun)
    with Store.open(proxy.db) as store:
        for task in tasks():
            check(store, task["task_id"], GROUP)
        attempts = store.scalar("SELECT count(*) FROM attempts")
        ended = collections.Counter(
            (row["state"], row["error_class"] or "-", row["n"])
            for row in store.rows("SELECT state, error_class, count(*) AS n FROM rollouts GROUP BY 1, 2")
        )
        spans = store.scalar("SELECT count(*) FROM spans")
    planned = sum(GROUP * EXPECTED[task["input"]["kind"]][3] for task in tasks())
    assert lost > 0, "no runner was killed at work"
    assert planned <= attempts <= planned + lost
    how = ", ".join(f"{n} {state} {error_class}" for state, error_class, n in sorted(ended))
    print(
        f"\n{TASKS} tasks x {GROUP} in {seconds:.1f} s, two runners of {CONCURRENCY}, "
        f"one of them killed {len(KILLED_AT)} times: {attempts} attempts ({len(begun)} begun by an agent, "
        f"{lost} lost with their runner), {spans} calls; {how}"
    )
