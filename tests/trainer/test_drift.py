from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lightning_proxy.trainer.drift import Drift, drift, drifts
from lightning_proxy.trainer.transitions import Transition


def call(prompt: Sequence[int], response: Sequence[int], number: int = 1) -> Transition:
    ids = array("i", response)
    return Transition("r", 1, number, 0, None, 0, array("i", prompt), ids, array("f", [-1.0] * len(ids)))


FIRST = call([1, 2, 3], [4, 5, 6])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7], Drift.EXTENDED),
        ([1, 2, 3, 4, 5, 6], Drift.EXTENDED),
        ([1, 2, 3], Drift.REPEATED),
        ([1, 2], Drift.REWOUND),
        ([1, 2, 3, 4, 5], Drift.REWOUND),
        ([1, 2, 3, 4, 9, 6, 7], Drift.REWRITTEN),
        ([1, 2, 3, 9], Drift.REWRITTEN),
        ([1, 9, 3, 4, 5, 6, 7], Drift.EDITED),
        ([9, 2, 3, 4, 5, 6, 7], Drift.FIRST),
    ],
)
def test_where_a_prompt_leaves_what_was_read_and_written_before_says_how_it_drifted(
    prompt: list[int], expected: Drift
) -> None:
    assert drift(call(prompt, [8]), [FIRST]) is expected


def test_the_earlier_call_with_the_longest_common_beginning_is_the_one_compared_with() -> None:
    other = call([1, 2, 3, 4, 5, 6, 7], [8, 9])
    assert drift(call([1, 2, 3, 4, 5, 6, 7, 8, 9, 1], [2]), [FIRST, other]) is Drift.EXTENDED
    assert drift(call([1, 2, 3, 4, 5, 6, 7, 8, 1], [2]), [other, FIRST]) is Drift.REWRITTEN
    assert drift(FIRST, []) is Drift.FIRST


def test_the_choices_of_one_call_count_once_and_rollouts_are_apart() -> None:
    again = call([1, 2, 3, 4, 5, 6, 7], [8], 2)
    elsewhere = replace(FIRST, rollout_id="s", span_id=3)
    counts = drifts([FIRST, again, replace(again, choice=1, response_ids=array("i", [9])), elsewhere])
    assert counts == {Drift.FIRST: 2, Drift.EXTENDED: 1}
