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

from lightning_proxy.client import ProxyClient
from lightning_proxy.demo import agent
from lightning_proxy.demo.tasks import make_task, make_tasks, write_database
from lightning_proxy.experiment.sample import AgentHost, Result, sample
from tests.conftest import ProxyThread
from tests.engine import EngineThread, Script

AGENT = Path(agent.__file__)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("agents") / "agents.log"


@pytest.fixture(scope="module")
def host(log: Path) -> Iterator[AgentHost]:
    """One for all: it takes a second to start, and knows of no proxy until a job names one."""
    with (
        log.open("wb") as file,
        AgentHost(
            script=AGENT, log=file, no_certificates=log.parent / "none", concurrency=4, timeout_s=120
        ) as started,
    ):
        yield started


@pytest.fixture
def api(proxy: ProxyThread) -> ProxyClient:
    return ProxyClient(proxy.url)


def _ignore(done: int, total: int) -> None:
    pass


def _run(api: ProxyClient, host: AgentHost, folder: Path) -> Result:
    """One rollout of the first task."""
    (result,) = sample(
        [make_task(0, "train", 0)],
        proxy=api,
        host=host,
        files=folder,
        runs_per_task=1,
        temperature=0.0,
        metadata={},
        progress=_ignore,
    )
    return result


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


def test_run_by_hand_the_agent_queries_the_database_and_answers(
    proxy: ProxyThread, engine: EngineThread, tmp_path: Path
) -> None:
    task = make_task(0, "train", 0)
    engine.script(Script(tool_calls=(_call(task.query),)))
    engine.script(Script(text=task.answer))
    done = subprocess.run(
        [
            sys.executable,
            str(AGENT),
            task.question,
            str(write_database(task, tmp_path)),
            "--temperature",
            "0",
        ],
        env={**os.environ, "OPENAI_BASE_URL": f"{proxy.url}/rollout/r-1/v1", "OPENAI_API_KEY": "any"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"answer": task.answer}
    with proxy.store() as store:
        last, first = store.list_spans(rollout_id="r-1")
    assert [first.streamed, last.streamed] == [True, True]
    messages = json.loads(last.request)["messages"]
    assert messages[-1]["content"] == task.answer  # the tool's result: the query was executed


@pytest.mark.parametrize("arguments", ['{"query": "SELE', "[]", '{"query": 7}', "{}"])
def test_a_broken_tool_call_ends_with_what_was_said(
    api: ProxyClient, engine: EngineThread, host: AgentHost, tmp_path: Path, arguments: str
) -> None:
    engine.script(Script(tool_calls=(("sql", arguments),)))
    result = _run(api, host, tmp_path)
    assert (result.answer, result.error) == ("", None)
    assert len(engine.calls) == 1


def test_a_model_that_never_answers_is_asked_three_times(
    api: ProxyClient, engine: EngineThread, host: AgentHost, tmp_path: Path
) -> None:
    engine.script(Script(tool_calls=(_call("SELECT 1"),)), times=9)
    assert _run(api, host, tmp_path).answer == ""
    assert len(engine.calls) == 3


def test_a_query_that_fails_is_shown_to_the_model(
    api: ProxyClient, engine: EngineThread, host: AgentHost, tmp_path: Path
) -> None:
    engine.script(Script(tool_calls=(_call("SELECT 1 FROM nowhere"),)))
    engine.script(Script(text="unknown"))
    assert _run(api, host, tmp_path).answer == "unknown"
    asked = json.loads(engine.calls[-1].body)["messages"]
    assert asked[-1]["content"] == "error: no such table: nowhere"


def test_every_run_is_a_process_of_its_own_under_its_rollout(
    api: ProxyClient, proxy: ProxyThread, engine: EngineThread, host: AgentHost, tmp_path: Path
) -> None:
    engine.script(Script(text="7"), times=6)
    tasks = make_tasks(0, "train", 2)
    seen: list[tuple[int, int]] = []
    results = sample(
        tasks,
        proxy=api,
        host=host,
        files=tmp_path,
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
    api: ProxyClient, proxy: ProxyThread, engine: EngineThread, host: AgentHost, log: Path, tmp_path: Path
) -> None:
    engine.script(Script(status=400), times=10)
    result = _run(api, host, tmp_path)
    assert (result.answer, result.error) == (None, "the agent ended with 1")
    with proxy.store() as store:
        rollout = store.get_rollout(result.rollout_id)
    assert (rollout.state.value, rollout.error_class) == ("failed", "upstream_refused")
    assert (rollout.reason or "").startswith(
        "the agent ended with 1; its last call ended in upstream_refused"
    )
    assert "BadRequestError" in log.read_text()
