"""The agent: an ordinary script, through a real proxy, with whatever a model may write."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_proxy.demo import agent
from lightning_proxy.demo.sample import AgentHost, ProxyApi, sample
from lightning_proxy.demo.tasks import Task, make_task, make_tasks, write_database
from tests.conftest import ProxyThread
from tests.engine import EngineThread, Script

AGENT = Path(agent.__file__)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[AgentHost]:
    with (
        (tmp_path / "agents.log").open("wb") as log,
        AgentHost(log=log, no_certificates=tmp_path / "none", concurrency=4, timeout_s=20) as started,
    ):
        yield started


def _ask(base_url: str, task: Task, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(AGENT), task.question, str(write_database(task, folder)), "--temperature", "0"],
        env={**os.environ, "OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": "any"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _call(query: str) -> tuple[str, str]:
    return ("sql", json.dumps({"query": query}))


def test_the_agent_imports_the_sdk_and_the_standard_library_alone() -> None:
    imported = set()
    for node in ast.walk(ast.parse(AGENT.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names == {"openai"}
    assert "lightning" not in AGENT.read_text(encoding="utf-8").replace("nothing of lightning-proxy", "")


def test_the_agent_queries_the_database_and_answers(
    proxy: ProxyThread, engine: EngineThread, tmp_path: Path
) -> None:
    task = make_task(0, "train", 0)
    engine.script(Script(tool_calls=(_call(task.query),)))
    engine.script(Script(text=task.answer))
    done = _ask(f"{proxy.url}/rollout/r-1/v1", task, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"answer": task.answer}
    with proxy.store() as store:
        last, first = store.list_spans(rollout_id="r-1")
    assert first.streamed and last.streamed
    messages = json.loads(last.request)["messages"]
    assert messages[-1]["content"] == task.answer  # the tool's result: the query was executed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [('{"query": "SELE', "no call"), ("[]", "no call"), ('{"query": 7}', "no call"), ("{}", "no call")],
)
def test_a_broken_tool_call_ends_with_what_was_said(
    proxy: ProxyThread, engine: EngineThread, tmp_path: Path, arguments: str, said: str
) -> None:
    engine.script(Script(text=said, tool_calls=(("sql", arguments),)))
    done = _ask(proxy.base_url, make_task(0, "train", 0), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert isinstance(json.loads(done.stdout)["answer"], str)


def test_a_query_that_fails_is_shown_to_the_model(
    proxy: ProxyThread, engine: EngineThread, tmp_path: Path
) -> None:
    engine.script(Script(tool_calls=(_call("SELECT nothing FROM nowhere"),)))
    engine.script(Script(text="unknown"))
    done = _ask(f"{proxy.url}/rollout/r-2/v1", make_task(0, "train", 0), tmp_path)
    assert json.loads(done.stdout) == {"answer": "unknown"}
    with proxy.store() as store:
        last = store.list_spans(rollout_id="r-2")[0]
    assert json.loads(last.request)["messages"][-1]["content"] == "error: no such table: nowhere"


def test_every_run_is_a_process_of_its_own_under_its_rollout(
    proxy: ProxyThread, engine: EngineThread, host: AgentHost, tmp_path: Path
) -> None:
    engine.script(Script(text="7"), times=6)
    tasks = make_tasks(0, "train", 2)
    seen: list[tuple[int, int]] = []
    results = sample(
        tasks,
        proxy=ProxyApi(proxy.url),
        host=host,
        databases=tmp_path,
        runs_per_task=3,
        temperature=1.0,
        metadata={"split": "train"},
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [result.answer for result in results] == ["7"] * 6
    assert seen[-1] == (6, 6)
    with proxy.store() as store:
        for task in tasks:
            group = store.list_rollouts(task_id=task.task_id)
            assert [(s.spans, s.rollout.state.value) for s in group] == [(1, "succeeded")] * 3
            assert all(s.rollout.metadata == {"split": "train"} for s in group)


def test_an_agent_that_crashes_is_recorded_as_failed(
    proxy: ProxyThread, engine: EngineThread, host: AgentHost, tmp_path: Path
) -> None:
    engine.script(Script(status=400), times=10)
    (result,) = sample(
        [make_task(0, "train", 0)],
        proxy=ProxyApi(proxy.url),
        host=host,
        databases=tmp_path,
        runs_per_task=1,
        temperature=1.0,
        metadata={},
        progress=lambda done, total: None,
    )
    assert (result.answer, result.error) == (None, "the agent ended with 1")
    with proxy.store() as store:
        rollout = store.get_rollout(result.rollout_id)
    assert (rollout.state.value, rollout.reason) == ("failed", "the agent ended with 1")
    assert "BadRequestError" in (tmp_path / "agents.log").read_text()
