"""How old a version is: updates along parents, whatever the numbers are."""

from __future__ import annotations

import time

import pytest

from lightning_proxy.store import PolicyVersion, VersionStatus
from lightning_proxy.trainer.ages import Ages

# 0 - 1 - ... - 12, then back to 1 and on: 1 - 13 - 14. 20 came after rejected ones; 30 and 31 from elsewhere.
_PARENTS = {0: None, **{n: n - 1 for n in range(1, 13)}, 13: 1, 14: 13, 20: 14, 30: None, 31: 30}


def version(number: int, parent: int | None) -> PolicyVersion:
    return PolicyVersion("policy", number, "/weights", VersionStatus.RETIRED, parent=parent)


def ages(start: int, most: int = 2) -> Ages:
    known = [version(*each) for each in _PARENTS.items()]
    return Ages(version(start, _PARENTS[start]), known, most)


@pytest.mark.parametrize(
    ("start", "of", "updates"),
    [
        (12, 12, 0),
        (12, 1, 11),
        (13, 1, 1),  # after the rollback
        (13, 0, 2),
        (14, 12, 13),  # 11 down to 1, and two up
        (1, 12, 11),
        (20, 14, 1),  # the numbers between were rejected
        (31, 30, 1),
        (31, 20, 11),  # nobody knows an ancestor of both
        (20, 99, 79),
    ],
)
def test_an_age_is_the_updates_between_two_versions(start: int, of: int, updates: int) -> None:
    assert ages(start).age(of) == updates


def test_what_is_older_than_the_limit_is_too_old_and_what_is_unknown_is_not() -> None:
    found = ages(14)
    assert [found.too_old(each) for each in (14, 13, 1, 0, 12, None)] == [
        False,
        False,
        False,
        True,
        True,
        False,
    ]


def test_parents_that_go_round_in_a_circle_end() -> None:
    known = [version(1, 2), version(2, 1)]
    assert Ages(known[0], known, 8).age(2) == 1
    assert Ages(known[0], known, 8).age(7) == 6


def test_ages_among_10_000_versions_are_found_at_once() -> None:
    known = [version(n, n - 1 if n else None) for n in range(10_000)]
    before = time.thread_time()
    found = Ages(known[-1], known, 8)
    assert sum(found.age(9_990) for _ in range(100_000)) == 900_000
    assert found.age(0) == 9_999
    assert time.thread_time() - before < 1.0
