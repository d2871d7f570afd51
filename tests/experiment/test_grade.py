"""The grader: right rewards, posted once, by a process that needs nothing but the standard library."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_proxy.demo.tasks import make_tasks
from lightning_proxy.experiment import grade
from lightning_proxy.experiment.grade import is_right
from lightning_proxy.experiment.sample import Result, write_results, write_tasks
from tests.conftest import ProxyThread


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("42", "42", True),
        ("42.0", "42", True),
        (" 42 ", "42", True),
        ("420", "42", False),
        ("", "42", False),
        ("unknown", "42", False),
        (None, "42", False),
        ("nan", "42", False),
        ("red", "red", True),
    ],
)
def test_an_answer_is_right_if_it_equals_the_gold_result(
    answer: str | None, expected: str, right: bool
) -> None:
    assert is_right(answer, expected) is right


def _grade(url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightning_proxy.experiment.grade", "--url", url]
    command += ["--tasks", str(folder / "tasks"), "--results", str(folder / "results")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def graded(tmp_path: Path) -> Path:
    """Two tasks, each answered once: one rightly, one not at all."""
    one, two = make_tasks(0, "train", 2)
    write_tasks(tmp_path / "tasks", [one, two], tmp_path)
    write_results(
        tmp_path / "results",
        [Result("r-1", one.task_id, one.answer), Result("r-2", two.task_id, None, "the agent ended with 1")],
    )
    return tmp_path


def test_every_result_gets_a_reward_and_grading_again_adds_none(proxy: ProxyThread, graded: Path) -> None:
    with proxy.store() as store:
        for rollout_id in ("r-1", "r-2"):
            store.create_rollout(rollout_id=rollout_id)
        for _ in range(2):
            done = _grade(proxy.url, graded)
            assert (done.returncode, done.stderr) == (0, "")
            assert json.loads(done.stdout) == {"graded": 2, "mean": 0.5}
        rewards = [store.list_rewards(rollout_id) for rollout_id in ("r-1", "r-2")]
    assert [[(r.value, r.source) for r in ledger] for ledger in rewards] == [
        [(1.0, "grader")],
        [(0.0, "grader")],
    ]


def test_a_refusal_is_told_and_nothing_is_rewarded(proxy: ProxyThread, graded: Path) -> None:
    with proxy.store() as store:
        store.create_rollout(rollout_id="r-1")
        done = _grade(proxy.url, graded)
        assert done.returncode == 1
        assert "404" in done.stderr
        assert "r-2" in done.stderr
        assert store.list_rewards("r-1") == []


def test_a_proxy_that_is_not_there_is_told(graded: Path) -> None:
    done = _grade("http://127.0.0.1:9", graded)
    assert done.returncode == 1
    assert "no answer from http://127.0.0.1:9/reward" in done.stderr


def test_the_grader_imports_the_standard_library_alone() -> None:
    tree = ast.parse(Path(grade.__file__).read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names


def test_a_task_may_tell_its_answer_and_a_shuffle_keeps_the_rewards_and_forgets_whose_they_are() -> None:
    tasks = [{"task_id": "a", "answer": "red"}, {"task_id": "b", "answer": "7"}]
    results = [{"rollout_id": f"r-{n}", "task_id": "ab"[n % 2], "answer": "red"} for n in range(40)]
    plain, shuffled, again = (grade.rewards_for(tasks, results, shuffle) for shuffle in (None, "0/1", "0/1"))
    values = [reward["value"] for reward in plain]
    assert values == [1.0, 0.0] * 20
    assert [reward["value"] for reward in shuffled] != values
    assert sum(reward["value"] for reward in shuffled) == 20
    assert shuffled == again
    assert {reward["source"] for reward in shuffled} == {"shuffled"}
