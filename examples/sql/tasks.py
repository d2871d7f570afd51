"""Text-to-SQL tasks: a fresh database of two tables, a question, the query that answers it.

A question asks for one aggregate of one column, every other time of the rows that a condition picks. Which
wordings go with which columns is split for good, so held-out tasks ask new questions about new databases.
Rows are drawn again until no query with another aggregate, column, table, sign or column of the condition, or
without it, gives the same answer.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from random import Random

from examples.tasks import Draw, pairs_of
from lightning_proxy.experiment.definition import Split

TABLES = ("items", "books", "trips", "farms", "rooms", "films")
COLUMNS = ("price", "weight", "stock", "pages", "score", "length", "height", "cost", "speed", "age")
WORDINGS: tuple[tuple[str, str], ...] = (
    ("What is the total {} of the {}", "SUM"),
    ("Add up the {} of the {}", "SUM"),
    ("What is the highest {} of the {}", "MAX"),
    ("Find the largest {} of the {}", "MAX"),
    ("What is the lowest {} of the {}", "MIN"),
    ("Find the smallest {} of the {}", "MIN"),
    ("What is the average {} of the {}", "AVG"),
    ("Give the mean {} of the {}", "AVG"),
)
AGGREGATES = ("SUM", "MAX", "MIN", "AVG")
CONDITIONS = {">": "over", "<": "under"}
_ROWS = 6


@dataclass(frozen=True, slots=True)
class Condition:
    """Which rows are meant."""

    column: str
    sign: str
    limit: int

    @property
    def other_sign(self) -> str:
        """Of the rows on the other side."""
        return "<" if self.sign == ">" else ">"


@dataclass(frozen=True, slots=True)
class Query:
    """An aggregate of a column."""

    aggregate: str
    column: str
    table: str
    condition: Condition | None = None

    def __str__(self) -> str:
        where = self.condition
        text = f"SELECT {self.aggregate}({self.column}) FROM {self.table}"
        return text if where is None else f"{text} WHERE {where.column} {where.sign} {where.limit}"


@dataclass(frozen=True)
class SqlTask:
    """A question about a database. ``columns`` and ``rows`` are by table."""

    draw: Draw
    question: str
    query: Query
    columns: dict[str, tuple[str, ...]]
    rows: dict[str, tuple[tuple[int, ...], ...]]

    @property
    def task_id(self) -> str:
        return self.draw.task_id

    @property
    def tables(self) -> str:
        """The database as the agent describes it."""
        return "\n".join(f"{table}({', '.join(columns)})" for table, columns in self.columns.items())

    @cached_property
    def answer(self) -> str:
        return self.result_of(self.query)

    def result_of(self, query: Query) -> str:
        """What SQLite says, as the agent shows it."""
        with closing(sqlite3.connect(":memory:")) as connection:
            self._fill(connection)
            return _value(connection, query)

    def for_grader(self, folder: Path) -> dict[str, str]:
        """The answer."""
        del folder
        return {"answer": self.answer}

    def arguments(self, folder: Path) -> list[str]:
        """The question, and an SQLite file."""
        path = folder / f"{self.task_id}.db"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path)) as connection:
                self._fill(connection)
                connection.commit()
        return [self.question, str(path)]

    def is_ambiguous(self) -> bool:
        """Whether another query that one might write gives the right answer too."""
        with closing(sqlite3.connect(":memory:")) as connection:
            self._fill(connection)
            return any(_value(connection, query) == self.answer for query in self._others())

    def _others(self) -> Iterator[Query]:
        where = self.query.condition
        for table, columns in self.columns.items():
            conditions: list[Condition | None] = [None]
            if where is not None:
                conditions += [Condition(by, sign, where.limit) for by in columns for sign in CONDITIONS]
            for aggregate, column, condition in product(AGGREGATES, columns, conditions):
                query = Query(aggregate, column, table, condition)
                if query != self.query:
                    yield query

    def _fill(self, connection: sqlite3.Connection) -> None:
        for table, columns in self.columns.items():
            connection.execute(f"CREATE TABLE {table} ({', '.join(f'{name} INTEGER' for name in columns)})")
            marks = ", ".join("?" for _ in columns)
            connection.executemany(f"INSERT INTO {table} VALUES ({marks})", self.rows[table])


def make_task(seed: int, split: Split, number: int) -> SqlTask:
    """Task ``number`` of a split."""
    draw = Draw(seed, split, number)
    rng = draw.rng
    (wording, aggregate), column = rng.choice(pairs_of(split, WORDINGS, COLUMNS))
    table, other = rng.sample(TABLES, 2)
    rest = rng.sample([name for name in COLUMNS if name != column], 5)
    mine = tuple(rng.sample([column, *rest[:2]], 3))
    columns = dict(sorted({table: mine, other: tuple(rest[2:])}.items()))
    by = rng.choice([name for name in mine if name != column])
    while True:
        rows = {name: _rows(rng) for name in columns}
        limits = sorted(row[mine.index(by)] for row in rows[table])
        condition = None
        if number % 2:
            condition = Condition(
                by, rng.choice(list(CONDITIONS)), rng.randint(limits[1] + 1, limits[-2] - 1)
            )
        question = wording.format(column, table)
        if condition is not None:
            question += f" with {by} {CONDITIONS[condition.sign]} {condition.limit}"
        task = SqlTask(draw, question + "?", Query(aggregate, column, table, condition), columns, rows)
        if not task.is_ambiguous():
            return task


def _rows(rng: Random) -> tuple[tuple[int, ...], ...]:
    """Rows of three columns, no value of a column twice or next to another."""
    columns = [[2 * value for value in rng.sample(range(1, 50), _ROWS)] for _ in range(3)]
    return tuple(zip(*columns, strict=True))


def _value(connection: sqlite3.Connection, query: Query) -> str:
    (value,) = connection.execute(str(query)).fetchone()  # None: the condition picks no row
    return f"{value:g}" if isinstance(value, float) else str(value)
