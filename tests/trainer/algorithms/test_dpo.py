"""Which pairs DPO learns from, and how a pair becomes rows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lightning_proxy.trainer.algorithms.candidates import Picked
from lightning_proxy.trainer.algorithms.demonstrations import Demonstrated
from lightning_proxy.trainer.algorithms.dpo import paired
from lightning_proxy.trainer.transitions import TrainableRollout
from tests.trainer.algorithms.making import candidates_of, demonstrated, rollout


def pairs_of(
    rollouts: Sequence[TrainableRollout],
    demonstrations: Sequence[Demonstrated] = (),
    *,
    min_gap: float = 0.0,
    may_wait: bool = True,
) -> tuple[Picked, dict[str, dict[str, int]]]:
    found = candidates_of(rollouts, demonstrations)
    chosen = paired(found, min_gap=min_gap, min_size=2, may_wait=may_wait, max_tokens=8)
    return chosen, found.left_out.as_dict()


def test_a_demonstration_is_preferred_to_what_was_answered() -> None:
    others = [demonstrated("b", [3], [3]), demonstrated("c", [3], []), demonstrated("d", [3], [3] * 7)]
    chosen, left_out = pairs_of([], [demonstrated("a", [9, 8], [3]), *others])
    assert [row.token_ids.tolist() for row in chosen.rows] == [[1, 2, 9, 8], [1, 2, 3]]
    assert [row.pieces[0].transition.advantage for row in chosen.rows] == [1.0, -1.0]
    assert len({row.rollout_id for row in chosen.rows}) == 1  # so that no mini-batch tears them apart
    assert left_out["pairs"] == {"empty": 1, "same_answer": 1, "too_long": 1}


def test_the_best_of_a_group_is_preferred_to_the_worst() -> None:
    chosen, left_out = pairs_of([rollout("a", 0.5), rollout("b", 0.0), rollout("c", 1.0)])
    assert [row.pieces[0].transition.rollout_id for row in chosen.rows] == ["c", "b"]
    assert left_out["rollouts"] == {"no_pair": 1}
    assert chosen.for_report()["counts"]["pairs_by_group"] == 1


def test_a_trajectory_of_several_calls_is_one_side_of_one_pair() -> None:
    good = rollout("good", 1, ([1, 2], [3]), ([1, 2, 3, 4], [5]), ([1, 7], [8]))  # the last: another branch
    bad = rollout("bad", 0, ([1, 2], [6]))
    chosen, _ = pairs_of([good, bad])
    assert [row.token_ids.tolist() for row in chosen.rows] == [[1, 2, 3, 4, 5], [1, 7, 8], [1, 2, 6]]
    signs = [[piece.transition.advantage for piece in row.pieces] for row in chosen.rows]
    assert signs == [[1.0, 1.0], [1.0], [-1.0]]
    assert {row.rollout_id for row in chosen.rows} == {"pair 0"}


@pytest.mark.parametrize(
    ("rollouts", "pairs", "others"),
    [
        ([rollout("a", 1), rollout("b", 0.8)], {"small_gap": 1}, {}),
        ([rollout("a", 1, ([1], [3])), rollout("b", 0, ([2], [3]))], {"prompt_differs": 1}, {}),
        ([rollout("a", 1, ([1], [3])), rollout("b", 0, ([1], [3]))], {"same_answer": 1}, {}),
        ([rollout("a", 1), rollout("b", 1)], {}, {"group_all_equal": 2}),
    ],
)
def test_what_makes_no_pair_is_counted(
    rollouts: Sequence[TrainableRollout], pairs: dict[str, int], others: dict[str, int]
) -> None:
    chosen, left_out = pairs_of(rollouts, min_gap=0.5)
    assert chosen.batch() is None
    assert (left_out.get("pairs", {}), left_out["rollouts"]) == (pairs, others)


def test_a_lone_rollout_waits_for_its_group_unless_the_drain_is_full() -> None:
    lone = [rollout("a", 1)]
    assert pairs_of(lone)[0].for_later == ["a"]
    full, left_out = pairs_of(lone, may_wait=False)
    assert (list(full.for_later), list(full.keys)) == ([], ["a"])
    assert left_out["rollouts"] == {"group_too_small": 1}
    assert pairs_of([rollout("again", 1, companions=[0.0])])[0].for_later == []
