"""Which rollouts and demonstrations SFT learns from."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lightning_proxy.trainer.algorithms.sft import picked
from lightning_proxy.trainer.transitions import TrainableRollout
from tests.trainer.algorithms.making import candidates_of, demonstrated, rollout


@pytest.mark.parametrize(
    ("rollouts", "min_return", "trained", "left_out"),
    [
        ([rollout("a", 1), rollout("b", 0), rollout("c", 1)], 1, ["a", "c"], {"below_best": 1}),
        ([rollout("a", 0.2), rollout("b", 0.7)], 0.5, ["b"], {"below_best": 1}),
        ([rollout("a", 0.2), rollout("b", 0.4)], 0.5, [], {"below_best": 1, "below_min_return": 1}),
        ([rollout("a", 0), rollout("b", 0)], 1, [], {"below_min_return": 2}),
        ([rollout("a", 2), rollout("b", 1, task="other")], 1, ["a", "b"], {}),
        ([rollout("a", 2, task=None), rollout("b", 1, task=None)], 1, ["a"], {"below_best": 1}),
        (
            [rollout("a", 2, ([1], [3]), task=None), rollout("b", 1, ([2], [3]), task=None)],
            1,
            ["a", "b"],
            {},
        ),
        ([rollout("again", 1, companions=[2.0, 0.0])], 1, [], {"below_best": 1}),
        ([rollout("again", 2, companions=[2.0, 0.0])], 1, ["again"], {}),
        ([rollout("a", -0.5)], -1, ["a"], {}),
    ],
    ids=[
        "all that were right",
        "the best where it is good enough",
        "none where even the best is not",
        "none where all were wrong",
        "the best of each group",
        "groups by the first prompt",
        "other prompts are other groups",
        "one that comes again is compared with its former group",
        "and may be as good as the best of it",
        "any scale",
    ],
)
def test_the_best_of_each_group_are_trained_if_they_are_good_enough(
    rollouts: Sequence[TrainableRollout], min_return: float, trained: list[str], left_out: dict[str, int]
) -> None:
    found = candidates_of(rollouts)
    chosen = picked(found, min_return)
    assert [row.rollout_id for row in chosen.rows] == trained
    assert found.left_out.as_dict()["rollouts"] == left_out
    assert chosen.keys.keys() == {each.rollout_id for each in rollouts}


def test_demonstrations_are_rows_of_their_own_and_what_they_correct_is_context() -> None:
    best = rollout("a", 1, ([1, 2], [3]), ([1, 2, 3, 4], [5]), spans=[1, 2])
    chosen = picked(candidates_of([best], [demonstrated("a", [9, 8], [3], span_id=1)]), 1.0)
    assert [row.token_ids.tolist() for row in chosen.rows] == [[1, 2, 3, 4, 5], [1, 2, 9, 8]]
    assert [row.trained_tokens for row in chosen.rows] == [1, 2]
    counts = chosen.for_report()["counts"]
    assert (counts["rows_by_reward"], counts["rows_by_demonstration"], counts["rollouts"]) == (1, 1, 1)


def test_nothing_to_learn_from_is_no_batch() -> None:
    assert picked(candidates_of([rollout("a", 0)]), 1.0).batch() is None
