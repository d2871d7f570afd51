"""A file of tasks, and how a task's fields get into command and environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.errors import InvalidInput
from lightning_proxy.runner.taskfile import check_command, fill_in, read_tasks, task_environment


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tasks.jsonl"


def lines(file: Path, *items: Any) -> Path:
    file.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in items) + "\n")
    return file


def test_a_line_is_an_input_and_its_settings_beat_those_of_the_command_line(file: Path) -> None:
    lines(
        file,
        {"task_id": "a", "input": {"q": 1}, "group_size": 2, "rounds": 3},
        "",
        {"question": "2+2", "priority": 5, "retry_on": ["timeout"]},
    )
    first, second = read_tasks(file, {"group_size": 8, "timeout_s": 60, "max_attempts": None})
    assert first == {"task_id": "a", "input": {"q": 1}, "group_size": 2, "rounds": 3, "timeout_s": 60}
    assert second.pop("task_id").startswith("task-")
    assert json.loads(json.dumps(second)) == {
        "input": {"question": "2+2"},
        "group_size": 8,
        "timeout_s": 60,
        "priority": 5,
        "retry_on": ["timeout"],
    }


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([{"q": 1}, "{"], "line 2: no JSON"),
        ([{"q": 1}, [1]], "line 2: the task must be a JSON object"),
        ([{"q": 1}, {"q": 1}], "line 2: .* stands in line 1 already"),
        ([{"q": 1, "group_size": "8"}], "line 1: the task has group_size '8': a whole number"),
        ([""], "holds no task"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(file: Path, items: list[Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        read_tasks(lines(file, *items), {})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"gone\.jsonl"):
        read_tasks(tmp_path / "gone.jsonl", {})


TASK = {"task_id": "t-1", "input": {"question": "What's $5 {x}?", "n": 3, "deep": {"a": [1]}, "ok": True}}


def test_fields_are_filled_into_the_command() -> None:
    argv = ["agent", "{question}", "--n={n}", "{deep}", "{task_id}", "{ok}", '{"a": 1}', "{{n}}", "}}{{"]
    assert fill_in(argv, TASK) == [
        "agent",
        "What's $5 {x}?",
        "--n=3",
        '{"a": [1]}',
        "t-1",
        "true",
        '{"a": 1}',
        "{n}",
        "}{",
    ]


def test_a_field_that_a_task_lacks_is_said_before_anything_runs() -> None:
    with pytest.raises(InvalidInput, match=r"\{queston\}.*'t-1' has no such field; it has deep, n, .*\{\{"):
        check_command(["agent", "{queston}"], [TASK])


def test_the_environment_has_the_whole_input_and_its_scalars() -> None:
    given = {**TASK, "resources": {"prompt": "p"}}
    env = task_environment(given)
    assert json.loads(env["LIGHTNING_TASK"]) == TASK["input"]
    assert json.loads(env["LIGHTNING_RESOURCES"]) == {"prompt": "p"}
    assert (env["LIGHTNING_TASK_ID"], env["TASK_QUESTION"]) == ("t-1", "What's $5 {x}?")
    assert (env["TASK_N"], env["TASK_OK"]) == ("3", "true")
    assert "TASK_DEEP" not in env


def test_what_does_not_fit_into_a_variable_is_left_out() -> None:
    env = task_environment({"task_id": "t", "input": {"long": "x" * 200_000, "zero": "a\0b", "some-name": 1}})
    assert env.keys() == {"LIGHTNING_TASK_ID", "TASK_SOME_NAME"}


def test_a_line_ends_where_jsonl_says_and_a_byte_order_mark_is_none_of_it(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '{"q": "a\u2028b\u0085c"}\r\n{"q": "d"}\n'.encode())
    assert [task["input"]["q"] for task in read_tasks(file, {})] == ["a\u2028b\u0085c", "d"]
