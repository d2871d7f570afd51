"""Text-to-SQL tasks, seeded: a fresh random table, a question about it, the query that answers it.

A task asks for one aggregate of one column. Which wordings are paired with which columns is split
for good: one pair in five is never seen in training, so the held-out tasks ask new questions about
new tables. A table is drawn again until no other aggregate of any column gives the same answer, so
a wrong query cannot be right by chance.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lightning_proxy.experiment.definition import Split

TABLES = ("items", "orders", "books", "trips", "games", "farms", "rooms", "films")
COLUMNS = (
    "price",
    "weight",
    "stock",
    "pages",
    "score",
    "rating",
    "length",
    "height",
    "cost",
    "speed",
    "age",
    "size",
)
# Every wording asks for exactly one aggregate; COUNT is left out since it names no column.
WORDINGS: tuple[tuple[str, str], ...] = (
    ("What is the total {}?", "SUM"),
    ("Add up the {}.", "SUM"),
    ("What is the {} altogether?", "SUM"),
    ("What is the highest {}?", "MAX"),
    ("Find the largest {}.", "MAX"),
    ("What does the {} go up to?", "MAX"),
    ("What is the lowest {}?", "MIN"),
    ("Find the smallest {}.", "MIN"),
    ("Where does the {} start?", "MIN"),
    ("What is the average {}?", "AVG"),
    ("Give the mean {}.", "AVG"),
    ("What is the typical {}?", "AVG"),
)
AGGREGATES = ("SUM", "MAX", "MIN", "AVG")


@dataclass(frozen=True, slots=True)
class Task:
    """One question about one table. ``answer`` is the gold query's result, as an agent prints it."""

    task_id: str
    question: str
    table: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    aggregate: str
    column: str

    @property
    def query(self) -> str:
        """The gold query."""
        return query_text(self.aggregate, self.column, self.table)

    @property
    def answer(self) -> str:
        """Result of the gold query."""
        values = [row[self.columns.index(self.column)] for row in self.rows]
        return str(aggregate_of(self.aggregate, values))

    def arguments(self, folder: Path) -> list[str]:
        """The agent's: the question, and the database."""
        return [self.question, str(write_database(self, folder))]

    def for_grader(self, folder: Path) -> dict[str, str]:
        """The grader finds the right answer by itself."""
        db = str(write_database(self, folder))
        return {"question": self.question, "db": db, "gold_query": self.query}


def query_text(aggregate: str, column: str, table: str) -> str:
    """The query as the model is shown it."""
    return f"SELECT {aggregate}({column}) FROM {table}"


def make_tasks(seed: int, split: Split, count: int, *, start: int = 0) -> list[Task]:
    """Tasks ``start`` to ``start + count`` of a split; the same arguments give the same tasks."""
    return [make_task(seed, split, number) for number in range(start, start + count)]


def make_task(seed: int, split: Split, number: int) -> Task:
    """Task ``number`` of a split."""
    rng = random.Random(f"{seed}/{split}/{number}")
    (wording, aggregate), column = rng.choice(list(_pairs(split)))
    others = rng.sample([name for name in COLUMNS if name != column], 2)
    columns = tuple(rng.sample([column, *others], 3))
    return Task(
        task_id=f"{split}-{seed}-{number}",
        question=wording.format(column),
        table=rng.choice(TABLES),
        columns=columns,
        rows=_rows(rng, aggregate, columns.index(column)),
        aggregate=aggregate,
        column=column,
    )


def write_database(task: Task, folder: Path) -> Path:
    """The task's table as an SQLite file in ``folder``, named after the task; made once."""
    path = folder / f"{task.task_id}.db"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    try:
        declared = ", ".join(f"{name} INTEGER" for name in task.columns)
        marks = ", ".join("?" for _ in task.columns)
        connection.execute(f"CREATE TABLE {task.table} ({declared})")
        connection.executemany(f"INSERT INTO {task.table} VALUES ({marks})", task.rows)
        connection.commit()
    finally:
        connection.close()
    return path


def _pairs(split: Split) -> Iterator[tuple[tuple[str, str], str]]:
    """(wording, column) pairs of a split: one in five is held out."""
    for (i, wording), (j, column) in product(enumerate(WORDINGS), enumerate(COLUMNS)):
        if ((i + j) % 5 == 0) == (split == "heldout"):
            yield wording, column


def _rows(rng: random.Random, aggregate: str, gold: int) -> tuple[tuple[int, ...], ...]:
    """Rows whose averages are whole, and whose gold answer no other query gives."""
    while True:
        count = rng.randint(3, 6)
        columns = [[rng.randint(2, 99) for _ in range(count)] for _ in range(3)]
        for column in columns:
            column[rng.randrange(count)] += -sum(column) % count
        answers = [aggregate_of(name, column) for column in columns for name in AGGREGATES]
        wanted = aggregate_of(aggregate, columns[gold])
        if answers.count(wanted) == 1:
            return tuple(zip(*columns, strict=True))


def aggregate_of(name: str, values: list[int]) -> int:
    """What SQLite makes of the values; averages of our tables are whole."""
    match name:
        case "SUM":
            return sum(values)
        case "MAX":
            return max(values)
        case "MIN":
            return min(values)
        case _:
            return sum(values) // len(values)
