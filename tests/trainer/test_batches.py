from __future__ import annotations

from array import array
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_proxy.errors import TrainingError
from lightning_proxy.trainer.batches import Rows, pack, plan_micro_batches, split_mini_batches, weigh
from lightning_proxy.trainer.trajectories import merge
from lightning_proxy.trainer.transitions import Transition


def transition(
    rollout: str, prompt: list[int], response: list[int], advantage: float | None = 1.0
) -> Transition:
    return Transition(
        rollout, 1, 1, 0, None, 0, array("i", prompt), array("i", response),
        array("f", [-float(token) for token in response]), advantage=advantage,
    )  # fmt: skip


CHAIN = [transition("a", [1, 2], [3, 4], 0.5), transition("a", [1, 2, 3, 4, 5], [6], 0.5)]


def rows_of(*transitions: Transition, merged: bool = True) -> Rows:
    return pack(merge(transitions) if merged else [row for each in transitions for row in merge([each])])


def test_trained_tokens_have_mask_logprob_and_advantage_and_context_has_none() -> None:
    rows = rows_of(*CHAIN, transition("b", [7], [8], -2.0))
    assert rows.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows.mask.tolist() == [False, False, True, True, False, True, False, True]
    assert rows.logprobs.tolist() == [0, 0, -3, -4, 0, -6, 0, -8]
    assert rows.advantages.tolist() == [0, 0, 0.5, 0.5, 0, 0.5, 0, -2]
    assert rows.offsets.tolist() == [0, 6, 8]
    assert rows.rollouts == ("a", "b")


def test_selected_rows_are_those_rows_in_that_order() -> None:
    rows = rows_of(*CHAIN, transition("b", [7], [8], -2.0)).select(np.array([1, 0]))
    assert rows.tokens.tolist() == [7, 8, 1, 2, 3, 4, 5, 6]
    assert rows.offsets.tolist() == [0, 2, 8]
    assert rows.rollouts == ("b", "a")


def test_an_unassigned_advantage_is_an_error_and_not_zero() -> None:
    with pytest.raises(TrainingError, match="without an advantage"):
        rows_of(replace(CHAIN[0], advantage=None))


@pytest.mark.parametrize("merged", [True, False])
def test_by_rollout_each_weighs_the_same_whatever_its_length_and_its_rows(merged: bool) -> None:
    other = transition("other", [1], [2, 3, 4, 5, 6, 7])
    rows = weigh(rows_of(*CHAIN, other, merged=merged), mini_batches=3, by_rollout=True)
    sums: dict[str, float] = {}
    for name, weights in zip(rows.rollouts, np.split(rows.weights, rows.offsets[1:-1]), strict=True):
        sums[name] = sums.get(name, 0.0) + float(weights.sum())
    assert list(sums.values()) == [pytest.approx(1.5), pytest.approx(1.5)]
    of_other = rows.weights[-6:]
    assert len(set(of_other.tolist())) == 1
    assert not rows.weights[~rows.mask].any()


def test_a_rollout_cut_into_several_rows_weighs_as_much_as_in_one() -> None:
    other = transition("b", [7], [8, 9, 10], -2.0)
    weights = {}
    for merged in (True, False):
        rows = weigh(rows_of(*CHAIN, other, merged=merged), mini_batches=2)
        of_row = np.split(rows.weights, rows.offsets[1:-1])
        weights[merged] = sum(
            row.sum() for row, name in zip(of_row, rows.rollouts, strict=True) if name == "a"
        )
        assert rows.weights.sum() == pytest.approx(2.0)
    assert weights[True] == pytest.approx(weights[False])
    assert weights[True] == pytest.approx(2 * 3 / 6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 40), st.integers(0, 5))
def test_mini_batches_hold_every_row_once_and_never_tear_a_rollout_apart(
    owners: list[int], size: int, seed: int
) -> None:
    names = [str(owner) for owner in owners]
    batches = split_mini_batches(names, size, np.random.default_rng(seed))
    assert sorted(row for batch in batches for row in batch) == list(range(len(names)))
    homes = [{names[row] for row in batch} for batch in batches]
    assert sum(map(len, homes)) == len(set(names))
    assert len(batches) <= -(-len(names) // size)


def test_mini_batches_of_single_rows_differ_by_one_row_at_most() -> None:
    names = [str(number) for number in range(100)]
    sizes = [len(batch) for batch in split_mini_batches(names, 32, np.random.default_rng(0))]
    assert sizes == [25, 25, 25, 25]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=50), st.integers(2, 200), st.integers(1, 4))
def test_micro_batches_hold_every_row_once_within_the_budget_and_equally_many_for_each_rank(
    lengths: list[int], budget: int, ranks: int
) -> None:
    lengths_N = np.array(lengths, dtype=np.int64)
    plan = plan_micro_batches(lengths_N, budget, ranks)
    assert sorted(row for step in plan for rows in step for row in rows) == list(range(len(lengths)))
    for step in plan:
        assert len(step) == ranks
        for rows in step:
            if len(rows):
                assert len(rows) == 1 or len(rows) * lengths_N[rows].max() <= budget


def test_one_long_row_does_not_make_short_rows_pay_for_its_padding() -> None:
    lengths_N = np.array([1000, *[10] * 100], dtype=np.int64)
    plan = plan_micro_batches(lengths_N, 1000)
    padded = sum(len(rows) * int(lengths_N[rows].max()) for step in plan for rows in step)
    assert padded == 2000
