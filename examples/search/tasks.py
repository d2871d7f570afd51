"""Questions of two hops over made-up facts: who somebody's friend is, and where that one lives.

Each split of a seed has facts of its own about the same people: what training has seen is false in the
held-out file, so an answer has to be found, and cannot be remembered. Which wordings of the first hop go with
which of the second is split for good too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations, count
from pathlib import Path
from random import Random

from examples.tasks import Draw, pairs_of
from lightning_proxy.experiment.definition import Split

PEOPLE = (
    "Anna", "Ben", "Carla", "David", "Elena", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Klara", "Leo",
    "Mira", "Nils", "Olga", "Paul", "Quinn", "Rosa", "Simon", "Tara", "Uwe", "Vera", "Wanda", "Xaver",
)  # fmt: skip
RELATIONS = ("boss", "friend", "sister", "teacher")
VALUES = {
    "city": ("Oslo", "Rome", "Lima", "Cairo", "Paris", "Delhi", "Quito", "Accra"),
    "pet": ("cat", "dog", "horse", "mouse", "snake", "goat", "duck", "turtle"),
    "job": ("baker", "pilot", "nurse", "judge", "miner", "tailor", "farmer", "singer"),
    "colour": ("red", "green", "blue", "white", "black", "brown", "pink", "grey"),
}
WHO: tuple[tuple[str, str], ...] = (
    ("the one whom {} works for", "boss"),
    ("the one who leads {}", "boss"),
    ("the one whom {} likes best", "friend"),
    ("the one who is close to {}", "friend"),
    ("the one who grew up with {}", "sister"),
    ("the one who has the parents of {}", "sister"),
    ("the one who taught {}", "teacher"),
    ("the one whom {} learned from", "teacher"),
)
WHAT: tuple[tuple[str, str], ...] = (
    ("Where does {} live?", "city"),
    ("What is the home of {}?", "city"),
    ("Which animal does {} keep?", "pet"),
    ("What does {} feed?", "pet"),
    ("How does {} earn a living?", "job"),
    ("What is the trade of {}?", "job"),
    ("What does {} paint everything?", "colour"),
    ("Which dye does {} wear?", "colour"),
)


@dataclass(frozen=True, slots=True)
class SearchTask:
    """A question; ``person``'s ``relation`` has the ``attribute`` that is asked for."""

    draw: Draw
    question: str
    person: str
    relation: str
    attribute: str

    @property
    def task_id(self) -> str:
        return self.draw.task_id

    @property
    def facts(self) -> dict[tuple[str, str], str]:
        """What is known, by relation or attribute, and person."""
        return facts_of(self.draw.seed, self.draw.split)

    @property
    def answer(self) -> str:
        return self.facts[self.attribute, self.facts[self.relation, self.person]]

    def for_grader(self, folder: Path) -> dict[str, str]:
        """The answer."""
        del folder
        return {"answer": self.answer}

    def arguments(self, folder: Path) -> list[str]:
        """The question, and the file of facts."""
        path = folder / f"facts-{self.draw.split}-{self.draw.seed}.txt"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            lines = [sentence(what, person, value) for (what, person), value in self.facts.items()]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [self.question, str(path)]


def sentence(what: str, person: str, value: str) -> str:
    """A fact as the search tool shows it."""
    return f"The {what} of {person} is {value}."


def make_task(seed: int, split: Split, number: int) -> SearchTask:
    """Task ``number`` of a split."""
    draw = Draw(seed, split, number)
    rng = draw.rng
    (who, relation), (what, attribute) = rng.choice(pairs_of(split, WHO, WHAT))
    person = rng.choice(PEOPLE)
    return SearchTask(draw, what.format(who.format(person)), person, relation, attribute)


@cache
def facts_of(seed: int, split: Split) -> dict[tuple[str, str], str]:
    """The facts of a split, by relation or attribute, and person.

    No two of a person and the four that are related to it have an attribute in common: whoever takes the
    wrong relation, or none, finds another answer.
    """
    for draw in count():
        facts = _draw_facts(Random(f"{seed}/{split}/facts/{draw}"))
        if facts is not None:
            return facts
    raise AssertionError("count() does not end")


def _draw_facts(rng: Random) -> dict[tuple[str, str], str] | None:
    """Facts; ``None`` where somebody has no four others that would do."""
    facts = {(what, person): rng.choice(values) for what, values in VALUES.items() for person in PEOPLE}
    for person in PEOPLE:
        others = [name for name in PEOPLE if name != person]
        possible = [
            related
            for related in combinations(others, len(RELATIONS))
            if all(
                len({facts[what, name] for name in (person, *related)}) > len(RELATIONS) for what in VALUES
            )
        ]
        if not possible:
            return None
        related = rng.choice(possible)
        order = rng.sample(related, len(related))
        facts |= {(relation, person): name for relation, name in zip(RELATIONS, order, strict=True)}
    return facts
