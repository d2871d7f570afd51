"""Word problems of two steps, and the sum that answers them.

Which wordings of the first step go with which of the second is split for good, so held-out problems are put
in pairs of words that training has not seen. No other sum of the same numbers gives the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from examples.tasks import Draw, pairs_of
from lightning_proxy.experiment.definition import Split

PEOPLE = ("Anna", "Ben", "Carla", "David", "Elena", "Felix", "Greta", "Hugo")
THINGS = ("pens", "coins", "eggs", "cards", "shells", "stamps", "nuts", "rings")
STEPS: tuple[tuple[str, str], ...] = (
    ("finds {}", "+"),
    ("is given {}", "+"),
    ("buys {} more", "+"),
    ("loses {}", "-"),
    ("gives away {}", "-"),
    ("sells {}", "-"),
    ("multiplies them by {}", "*"),
    ("gets {} times as many", "*"),
    ("needs that {} times", "*"),
)
SIGNS = ("+", "-", "*")


@dataclass(frozen=True, slots=True)
class Sum:
    """``(a first b) second c``."""

    numbers: tuple[int, int, int]
    signs: tuple[str, str]

    def __str__(self) -> str:
        a, b, c = self.numbers
        return f"({a} {self.signs[0]} {b}) {self.signs[1]} {c}"

    @property
    def value(self) -> int:
        """What it comes to."""
        return _apply(self.signs[1], self.first_value, self.numbers[2])

    @property
    def first_value(self) -> int:
        """What its first step comes to."""
        return _apply(self.signs[0], *self.numbers[:2])


@dataclass(frozen=True, slots=True)
class CalculatorTask:
    """A word problem."""

    draw: Draw
    question: str
    sum: Sum
    clauses: tuple[str, str]

    @property
    def task_id(self) -> str:
        return self.draw.task_id

    @property
    def answer(self) -> str:
        return str(self.sum.value)

    def for_grader(self, folder: Path) -> dict[str, str]:
        """The answer."""
        del folder
        return {"answer": self.answer}

    def arguments(self, folder: Path) -> list[str]:
        """The question alone."""
        del folder
        return [self.question]


def make_task(seed: int, split: Split, number: int) -> CalculatorTask:
    """Task ``number`` of a split."""
    draw = Draw(seed, split, number)
    rng = draw.rng
    (first, sign), (second, other_sign) = rng.choice(pairs_of(split, STEPS, STEPS))
    who, things = rng.choice(PEOPLE), rng.choice(THINGS)
    while True:
        b, c = (rng.randint(2, 9) if s == "*" else rng.randint(2, 39) for s in (sign, other_sign))
        wanted = Sum((rng.randint(40, 99), b, c), (sign, other_sign))
        values = [Sum(wanted.numbers, signs).value for signs in product(SIGNS, SIGNS)]
        if min(values) > 0 and values.count(wanted.value) == 1:
            break
    a, b, c = wanted.numbers
    clauses = (first.format(b), second.format(c))
    question = f"{who} has {a} {things}, {clauses[0]}, and {clauses[1]}. How many are there?"
    return CalculatorTask(draw, question, wanted, clauses)


def _apply(sign: str, left: int, right: int) -> int:
    return left + right if sign == "+" else left - right if sign == "-" else left * right
