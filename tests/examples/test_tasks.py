"""The experiments' tasks: the same each time, two splits that share nothing, one right answer."""

from __future__ import annotations

import argparse
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from examples.calculator import sums
from examples.calculator.tasks import SIGNS, Sum
from examples.calculator.tasks import make_task as calculator_task
from examples.experiment import seed_of
from examples.search.tasks import RELATIONS, VALUES, facts_of
from examples.search.tasks import make_task as search_task
from examples.sql.tasks import make_task as sql_task

MAKERS: list[Callable[..., Any]] = [sql_task, search_task, calculator_task]
IDS = ["sql", "search", "calculator"]


@pytest.mark.parametrize("make", MAKERS, ids=IDS)
def test_the_same_task_is_the_same_again_and_another_seed_is_another(make: Callable[..., Any]) -> None:
    assert make(3, "train", 7) == make(3, "train", 7)
    assert make(3, "train", 7).task_id == "train-3-7"
    assert any(make(3, "train", n).question != make(4, "train", n).question for n in range(3))


@pytest.mark.parametrize("make", MAKERS, ids=IDS)
def test_no_held_out_question_is_one_of_training(make: Callable[..., Any]) -> None:
    trained = {make(0, "train", number).question for number in range(500)}
    assert not trained & {make(0, "heldout", number).question for number in range(96)}


def _queries(columns: tuple[str, ...], table: str, limit: int | None) -> Iterator[str]:
    """All that somebody might write who mixes up aggregates, columns and signs."""
    conditions = [""]
    if limit is not None:
        conditions += [f" WHERE {by} {sign} {limit}" for by, sign in product(columns, "<>")]
    for aggregate, column, condition in product(("SUM", "MAX", "MIN", "AVG"), columns, conditions):
        yield f"SELECT {aggregate}({column}) FROM {table}{condition}"


def test_the_gold_query_gives_the_answer_and_no_likely_other_one_does(tmp_path: Path) -> None:
    for number in range(40):
        task = sql_task(0, "heldout", number)
        question, path = task.arguments(tmp_path)
        assert question == task.question
        limit = task.query.condition.limit if task.query.condition else None
        with closing(sqlite3.connect(path)) as connection:
            right = set()
            for table, columns in task.columns.items():
                for query in _queries(columns, table, limit):
                    (value,) = connection.execute(query).fetchone()
                    if value is not None and float(value) == pytest.approx(float(task.answer), rel=1e-5):
                        right.add(query)
        assert right == {str(task.query)}


def test_each_split_has_facts_of_its_own_and_a_wrong_relation_leads_elsewhere() -> None:
    train, held_out = facts_of(0, "train"), facts_of(0, "heldout")
    assert train.keys() == held_out.keys()
    assert sum(train[key] == held_out[key] for key in train) < len(train) / 3
    for number in range(30):
        task = search_task(0, "heldout", number)
        for relation in RELATIONS:
            for attribute in VALUES:
                found = task.facts[attribute, task.facts[relation, task.person]]
                if attribute == task.attribute and relation != task.relation:
                    assert found != task.answer
        assert task.facts[task.attribute, task.person] != task.answer  # nor does it help to leave out a hop


def test_the_facts_file_holds_one_sentence_a_fact(tmp_path: Path) -> None:
    task = search_task(0, "train", 0)
    _, path = task.arguments(tmp_path)
    lines = Path(path).read_text().splitlines()
    assert len(lines) == len(set(lines)) == len(task.facts)
    assert f"The {task.relation} of {task.person} is {task.facts[task.relation, task.person]}." in lines


def test_no_other_sum_of_the_same_numbers_is_right() -> None:
    for number in range(50):
        task = calculator_task(0, "train", number)
        same = [s for s in product(SIGNS, SIGNS) if str(Sum(task.sum.numbers, s).value) == task.answer]
        assert same == [task.sum.signs]
        assert sums.calculator(str(task.sum)) == task.answer
        assert int(task.answer) > 0


@pytest.mark.parametrize(
    "text", ["2 ** 99", "1 / 0", "__import__('os')", "(1 +", "1.5", "a + 1", "1 < 2", ""]
)
def test_the_calculator_says_what_it_does_not_know(text: str) -> None:
    assert sums.calculator(text).startswith("error: ")


def test_tasks_of_one_split_differ_from_one_another() -> None:
    questions = [calculator_task(0, "train", number).question for number in range(200)]
    assert all(one != other for one, other in pairwise(questions))


def test_the_model_has_seen_no_task_of_an_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.model import build

    shown: set[int] = set()

    def watched(make: Callable[..., Any]) -> Callable[..., Any]:
        def make_and_tell(seed: int, *rest: Any) -> Any:
            shown.add(seed)
            return make(seed, *rest)

        return make_and_tell

    for name in ("sql_task", "search_task", "calculator_task"):
        monkeypatch.setattr(build, name, watched(getattr(build, name)))
    for step in (0, build.RECIPE.steps - 1):
        build.lessons(step, random.Random(0))
    assert len(shown) > 1
    assert max(shown) < 0
    with pytest.raises(argparse.ArgumentTypeError, match="from 0 on"):
        seed_of("-1")
