"""`lightning-proxy tasks` and the flags of `run` that belong to the task pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.cli.run import Speed, summary
from lightning_proxy.store import ErrorClass, RolloutState
from tests.cli.test_cli import as_json, ok, refused
from tests.conftest import ProxyThread


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def file() -> Path:
    path = Path("tasks.jsonl")
    path.write_text('{"task_id": "a", "question": "2+2"}\n{"task_id": "b", "question": "3+3"}\n')
    return path


@pytest.mark.parametrize("command", ["add", "show", "cancel"])
def test_every_command_of_tasks_has_help_with_an_example(command: str) -> None:
    assert f"  lightning-proxy tasks {command}" in ok("tasks", command, "--help")


def test_tasks_are_added_listed_shown_and_cancelled(proxy: ProxyThread, file: Path) -> None:
    at, db = ("--proxy", proxy.url), ("--db", str(proxy.db))
    added = ok("tasks", "add", file, "--group-size", "2", "--retry-on", "timeout", *at)
    assert added == "2 tasks in tasks.jsonl, 2 of them new to the pool\n"
    assert "0 of them new" in ok("tasks", "add", file, *at)
    with proxy.store() as store:
        one, other = store.claim_tasks("w", limit=2)
        store.add_reward(value=1.0, rollout_id=one.rollout_id)
        store.finish_attempt(one.rollout_id, 1, RolloutState.SUCCEEDED)
        store.finish_attempt(other.rollout_id, 1, RolloutState.FAILED, "no", ErrorClass.AGENT_CRASH)
    listed = ok("tasks", *db).splitlines()
    assert listed[0].split()[:3] == ["TASK", "STATE", "ROUND"]
    assert listed[1].split() == ["a", "done", "1/1", "0", "0", "1", "1", "100%", "1", "-"]
    assert listed[2].split() == ["b", "open", "1/1", "2", "0", "0", "0", "-", "-", "-"]
    assert [task["task_id"] for task in as_json("tasks", "--state", "open", *db)["tasks"]] == ["b"]
    assert "b" not in ok("tasks", "--limit", "1", *db).split()
    shown = ok("tasks", "show", "a", *db)
    assert 'input: {"question": "2+2"}' in shown
    assert other.rollout_id in shown
    assert as_json("tasks", "show", "a", *db)["retry_on"] == ["timeout"]
    assert "task b is cancelled" in ok("tasks", "cancel", "b", "--reason", "enough", *at)
    assert "no task 'c'" in refused("tasks", "cancel", "c", *at, code=1)


def test_a_bad_line_is_refused_and_nothing_is_enqueued(proxy: ProxyThread, file: Path) -> None:
    file.write_text(file.read_text() + '{"task_id": "c"}\n')
    said = refused("tasks", "add", file, "--proxy", proxy.url)
    assert said.startswith("lightning-proxy: tasks.jsonl, line 3: the task has no input")
    assert as_json("tasks", "--db", str(proxy.db))["tasks"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tasks", "tasks.jsonl", "--worker", "--", "true"), "give one of them"),
        (("--watch", "--", "true"), "--watch waits"),
        (("--group-size", "2", "--", "true"), "come with --tasks"),
        (("--worker", "--rollout-id", "r", "--", "true"), "--rollout-id would be the same"),
        (("--worker", "--", "no-such-command-here"), "command not found"),
        (("--tasks", "gone.jsonl", "--", "true"), "gone.jsonl"),
    ],
)
def test_flags_that_contradict_one_another_are_refused(words: tuple[str, ...], said: str) -> None:
    assert said in refused("run", *words)


def test_a_run_without_a_proxy_says_how_to_start_one(file: Path) -> None:
    said = refused("run", "--proxy", "http://127.0.0.1:9", "--tasks", file, "--", "true", code=1)
    assert "lightning-proxy serve" in said


COUNTS: dict[str, Any] = {
    "rollouts": 10,
    "succeeded": 5,
    "failed": 3,
    "running": 2,
    "waiting": 0,
    "cancelled": 0,
    "failed_by_class": {"timeout": 1, "agent_crash": 2},
    "skipped_solved": 0,
    "skipped_hopeless": 0,
}


def test_a_summary_is_one_line_with_failures_by_class() -> None:
    assert summary(COUNTS) == (
        "8/10 rollouts, 5 succeeded (62%), 3 failed (2 agent_crash, 1 timeout), 2 running"
    )


def test_the_time_left_is_by_what_was_done_since_the_first_look() -> None:
    speed = Speed()
    assert speed.left(COUNTS, 100.0) == ""
    assert speed.left({**COUNTS, "succeeded": 6}, 110.0) == ", about 10 s left"
    assert speed.left({**COUNTS, "succeeded": 6}, 400.0) == ", about 5 min left"
    assert speed.left({**COUNTS, "succeeded": 7}, 500.0) == ""


def test_a_pool_is_worked_off_from_the_command_line(proxy: ProxyThread, file: Path) -> None:
    words = (
        "run",
        "--proxy",
        proxy.url,
        "--tasks",
        file,
        "--group-size",
        "2",
        "--concurrency",
        "2",
        "--json",
    )
    printed = ok(*words, "--", "sh", "-c", 'test "$TASK_QUESTION" = "{question}"')
    done = json.loads(printed)
    assert (done["rollouts"], done["succeeded"], done["attempts_here"]) == (4, 4, {"succeeded": 4})
    assert done["seconds"] > 0
