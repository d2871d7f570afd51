from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_proxy.trainer.trajectories import Trajectory, merge
from lightning_proxy.trainer.transitions import Transition

Tree = list[tuple[int, bool, list[int], list[int]]]


def transition(prompt: Sequence[int], response: Sequence[int], number: int = 0) -> Transition:
    ids = array("i", response)
    return Transition("r", 1, number, 0, None, 0, array("i", prompt), ids, array("f", [-1.0] * len(ids)))


def texts(rows: list[Trajectory]) -> list[tuple[list[int], list[list[int]]]]:
    return [
        (list(row.token_ids), [list(piece.transition.response_ids) for piece in row.pieces]) for row in rows
    ]


def test_calls_that_extend_one_another_become_one_row() -> None:
    rows = merge(
        [transition([1, 2], [3, 4]), transition([1, 2, 3, 4, 5], [6]), transition([1, 2, 3, 4, 5, 6, 7], [8])]
    )
    assert texts(rows) == [([1, 2, 3, 4, 5, 6, 7, 8], [[3, 4], [6], [8]])]
    assert [piece.start for piece in rows[0].pieces] == [2, 5, 7]


def test_a_prompt_that_differs_in_one_token_of_an_earlier_answer_begins_a_row_of_its_own() -> None:
    rows = merge([transition([1, 2], [3, 4]), transition([1, 2, 3, 9, 5], [6])])
    assert texts(rows) == [([1, 2, 3, 4], [[3, 4]]), ([1, 2, 3, 9, 5, 6], [[6]])]


def test_of_two_calls_that_branch_off_the_first_extends_and_the_second_takes_it_as_context() -> None:
    rows = merge([transition([1], [2]), transition([1, 2, 3], [4]), transition([1, 2, 5], [6])])
    assert texts(rows) == [([1, 2, 3, 4], [[2], [4]]), ([1, 2, 5, 6], [[6]])]


def test_a_retry_with_the_same_words_is_trained_once_for_each_time_it_was_generated() -> None:
    rows = merge([transition([1], [2], 1), transition([1], [2], 2), transition([1, 2, 3], [4], 3)])
    assert sorted(texts(rows)) == [([1, 2], [[2]]), ([1, 2, 3, 4], [[2], [4]])]


def test_calls_of_two_agents_with_their_own_prompts_become_two_rows() -> None:
    rows = merge(
        [transition([1], [2]), transition([9], [8]), transition([1, 2, 3], [4]), transition([9, 8, 7], [6])]
    )
    assert sorted(texts(rows)) == [([1, 2, 3, 4], [[2], [4]]), ([9, 8, 7, 6], [[8], [6]])]


# A call either begins anew or extends an earlier one (by its number); with a small vocabulary
# repetitions, retries and accidental prefixes are frequent.
tokens = st.lists(st.integers(0, 2), max_size=3)
trees = st.lists(
    st.tuples(st.integers(0, 30), st.booleans(), tokens, st.lists(st.integers(0, 2), min_size=1, max_size=3)),
    min_size=1,
    max_size=14,
)


def grow(tree: Tree) -> list[Transition]:
    calls: list[Transition] = []
    for number, (parent, fresh, added, response) in enumerate(tree):
        if fresh or not calls:
            prompt = [0, *added]
        else:
            earlier = calls[parent % len(calls)]
            prompt = [*earlier.prompt_ids, *earlier.response_ids, *added]
        calls.append(transition(prompt, response, number))
    return calls


def check_each_generated_token_is_trained_once(calls: list[Transition]) -> None:
    trained: Counter[int | None] = Counter()
    for row in merge(calls):
        mask = [0] * len(row.token_ids)
        for piece in row.pieces:
            call, end = piece.transition, piece.start + len(piece.transition.response_ids)
            assert row.token_ids[: piece.start] == call.prompt_ids
            assert row.token_ids[piece.start : end] == call.response_ids
            for place in range(piece.start, end):
                mask[place] += 1
            trained[call.span_id] += 1
        assert max(mask) == 1
        assert mask[0] == 0
        assert sum(mask) == row.trained_tokens
    assert trained == {call.span_id: 1 for call in calls}


@settings(max_examples=400, deadline=None)
@given(trees)
def test_every_generated_token_is_trained_exactly_once_after_the_very_context_it_was_sampled_in(
    tree: Tree,
) -> None:
    check_each_generated_token_is_trained_once(grow(tree))


def test_the_same_holds_for_thousands_of_larger_trees() -> None:
    random = Random(0)

    def some(least: int, most: int) -> list[int]:
        return [random.randrange(3) for _ in range(random.randint(least, most))]

    for _ in range(5000):
        size = random.randint(1, 25)
        tree = [(random.randrange(size), random.random() < 0.2, some(0, 3), some(1, 3)) for _ in range(size)]
        check_each_generated_token_is_trained_once(grow(tree))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(tokens, st.lists(st.integers(0, 2), min_size=1, max_size=3)), min_size=1, max_size=10)
)
def test_a_conversation_without_branches_is_always_one_row(turns: list[tuple[list[int], list[int]]]) -> None:
    calls = grow([(number - 1, False, added, response) for number, (added, response) in enumerate(turns)])
    assert len(merge(calls)) == 1
