"""Tasks: the same for the same seed, answerable by their gold query alone, and properly split."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from lightning_proxy.demo.tasks import AGGREGATES, make_task, make_tasks, query_text, write_database
from lightning_proxy.experiment.grade import gold_answer


def test_the_same_seed_gives_the_same_tasks() -> None:
    assert make_tasks(3, "train", 20) == make_tasks(3, "train", 20)
    assert make_tasks(3, "train", 20)[7:] == make_tasks(3, "train", 13, start=7)
    assert make_tasks(3, "train", 20) != make_tasks(4, "train", 20)


def test_the_gold_query_gives_the_answer_in_the_written_database(tmp_path: Path) -> None:
    for task in make_tasks(0, "train", 40):
        assert gold_answer(write_database(task, tmp_path), task.query) == task.answer


def test_no_other_aggregate_of_any_column_gives_the_right_answer(tmp_path: Path) -> None:
    for task in make_tasks(1, "heldout", 20):
        with closing(sqlite3.connect(write_database(task, tmp_path))) as connection:
            right = [
                (aggregate, column)
                for aggregate in AGGREGATES
                for column in task.columns
                for (value,) in connection.execute(query_text(aggregate, column, task.table))
                if f"{value:g}" == task.answer
            ]
        assert right == [(task.aggregate, task.column)]


def test_held_out_questions_are_never_asked_in_training() -> None:
    train = {task.question for task in make_tasks(0, "train", 1500)}
    heldout = {task.question for task in make_tasks(0, "heldout", 500)}
    assert not train & heldout
    assert len(heldout) > 20


def test_a_database_is_written_once_and_not_changed(tmp_path: Path) -> None:
    path = write_database(make_task(0, "train", 0), tmp_path)
    written = path.stat().st_mtime_ns
    assert write_database(make_task(0, "train", 0), tmp_path) == path
    assert path.stat().st_mtime_ns == written
