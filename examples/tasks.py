"""What the experiments' tasks have in common."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from lightning_proxy.experiment.definition import Split

Item = TypeVar("Item")
Other = TypeVar("Other")


@dataclass(frozen=True, slots=True)
class Draw:
    """Where a task's randomness comes from: the same seed, split and number give the same task."""

    seed: int
    split: Split
    number: int

    @property
    def task_id(self) -> str:
        return f"{self.split}-{self.seed}-{self.number}"

    @property
    def rng(self) -> random.Random:
        """A fresh generator."""
        return random.Random(f"{self.seed}/{self.split}/{self.number}")


def pairs_of(split: Split, items: Sequence[Item], others: Sequence[Other]) -> list[tuple[Item, Other]]:
    """The pairs that a split may use: one in five is held out, and never seen in training."""
    return [
        (item, other)
        for (i, item), (j, other) in product(enumerate(items), enumerate(others))
        if ((i + j) % 5 == 0) == (split == "heldout")
    ]
