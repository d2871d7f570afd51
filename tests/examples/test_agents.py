"""The three agents on their real frameworks, through a real proxy, with a model that says what it is told."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples import experiment
from examples.calculator.tasks import make_task as calculator_task
from examples.experiment import NAMES
from examples.search.tasks import make_task as search_task
from examples.search.tasks import sentence
from examples.sql.tasks import make_task as sql_task
from lightning_proxy.client import ProxyClient
from lightning_proxy.experiment.sample import AgentHost, Result, sample
from tests.conftest import ProxyThread
from tests.engine import EngineThread, Script

AGENTS = [experiment.HERE / name / "agent.py" for name in NAMES]
SERVICE = experiment.HERE / "calculator" / "service.py"
FRAMEWORKS = {
    "langchain_openai",
    "langgraph",
    "agents",
    "autogen_agentchat",
    "autogen_core",
    "autogen_ext",
    "openai",
}


@pytest.mark.parametrize("script", [*AGENTS, SERVICE], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_agent_imports_its_framework_the_standard_library_and_its_own_folder(script: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).partition(".")[0])
    beside = {path.stem for path in script.parent.glob("*.py")}
    assert imported - sys.stdlib_module_names - beside <= FRAMEWORKS
    assert "lightning" not in script.read_text(encoding="utf-8").replace("nothing of lightning-proxy", "")


@pytest.fixture
def run(proxy: ProxyThread, python: str, tmp_path: Path) -> Callable[[str, Any], Result]:
    """One rollout of a task by the agent NAME."""

    def once(name: str, task: Any) -> Result:
        with (
            (tmp_path / "log").open("wb") as log,
            AgentHost(
                log=log,
                no_certificates=tmp_path / "none",
                script=experiment.HERE / name / "agent.py",
                python=python,
                timeout_s=240.0,  # of which a busy machine imports a framework for the most part
            ) as host,
        ):
            (result,) = sample(
                [task],
                proxy=ProxyClient(proxy.url),
                host=host,
                files=tmp_path,
                runs_per_task=1,
                temperature=0.5,
                metadata={},
                progress=lambda done, total: None,
            )
        assert result.error is None, (tmp_path / "log").read_text()
        return result

    return once


def _asked(proxy: ProxyThread) -> list[list[tuple[str, str]]]:
    """(role, content) of the messages of each call: calls of one rollout, all of them exact."""
    with proxy.store() as store:
        spans = store.list_spans()[::-1]
    assert len({span.rollout_id for span in spans}) == 1
    assert {span.fidelity.value for span in spans} == {"exact"}
    bodies = [json.loads(span.request) for span in spans]
    assert {body["temperature"] for body in bodies} == {0.5}
    return [[(m["role"], m["content"] or "") for m in body["messages"]] for body in bodies]


@pytest.mark.clients
@pytest.mark.timeout(300)
def test_langgraph_rewrites_until_the_checker_approves(
    run: Callable[[str, Any], Result], proxy: ProxyThread, engine: EngineThread
) -> None:
    task = sql_task(0, "train", 0)
    for said in (f"SELECT nonsense FROM {task.query.table}", "wrong", str(task.query), "right"):
        engine.script(Script(text=said))
    assert run("sql", task).answer == task.answer
    asked = _asked(proxy)
    assert [messages[0][1].partition("\n")[0] for messages in asked] == [
        "Write SQL.", "Check SQL.", "Rewrite SQL.", "Check SQL.",
    ]  # fmt: skip
    assert "error: no such column: nonsense" in asked[1][1][1]
    assert asked[3][1][1] == f"{task.question}\n{task.query}\n{task.answer}"


@pytest.mark.clients
@pytest.mark.timeout(300)
def test_the_agents_sdk_searches_twice_and_answers(
    run: Callable[[str, Any], Result], proxy: ProxyThread, engine: EngineThread
) -> None:
    task = search_task(0, "train", 0)
    friend = task.facts[task.relation, task.person]
    for query in (f"{task.relation} of {task.person}", f"{task.attribute} of {friend}"):
        engine.script(Script(tool_calls=(("search", json.dumps({"query": query})),)))
    engine.script(Script(text=task.answer))
    assert run("search", task).answer == task.answer
    found = [content for role, content in _asked(proxy)[-1] if role == "tool"]
    assert found == [
        sentence(task.relation, task.person, friend),
        sentence(task.attribute, friend, task.answer),
    ]


@pytest.mark.clients
@pytest.mark.timeout(300)
def test_autogen_calculates_and_answers(
    run: Callable[[str, Any], Result], proxy: ProxyThread, engine: EngineThread
) -> None:
    task = calculator_task(0, "train", 0)
    engine.script(Script(tool_calls=(("calculator", json.dumps({"expression": str(task.sum)})),)))
    engine.script(Script(text=task.answer))
    assert run("calculator", task).answer == task.answer
    asked = _asked(proxy)
    assert [m for m in asked[-1] if m[0] == "tool"] == [("tool", task.answer)]
    assert asked[0] == [("system", "Calculate, then answer."), ("user", task.question)]


@pytest.mark.clients
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["search", "calculator"])
def test_a_model_that_only_calls_tools_ends_in_a_wrong_answer_and_not_in_a_crash(
    run: Callable[[str, Any], Result], proxy: ProxyThread, engine: EngineThread, name: str
) -> None:
    task: Any = search_task(0, "train", 0) if name == "search" else calculator_task(0, "train", 0)
    arguments = {"search": {"query": "x"}, "calculator": {"expression": "2 *"}}[name]
    engine.script(Script(tool_calls=((name, json.dumps(arguments)),)), times=9)
    assert run(name, task).answer != task.answer
    assert 1 < len(_asked(proxy)) < 9
