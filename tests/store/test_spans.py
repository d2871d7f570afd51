from __future__ import annotations

import sqlite3
from array import array
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_proxy.errors import StoreError, UnknownTarget
from lightning_proxy.store import Fidelity, Generation, Span, Store
from lightning_proxy.store.spans import _ENDS_BY_CONVERSATION
from tests.store.support import make_span

texts = st.text(st.characters(codec="utf-8"), max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.dictionaries(
    texts, st.integers(-(2**53), 2**53) | texts | st.none() | st.booleans(), max_size=4
)
generations = st.builds(
    Generation,
    prompt_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=20).map(lambda ids: array("i", ids)),
    response_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=20).map(lambda ids: array("i", ids)),
    logprobs=st.lists(st.floats(width=32, allow_nan=False), max_size=20).map(
        lambda values: array("f", values)
    ),
    finish_reason=st.none() | texts,
)
spans = st.builds(
    Span,
    rollout_id=texts,
    attempt=st.integers(1, 1000),
    wire=texts,
    started_at=finite,
    ended_at=finite,
    request=st.binary(max_size=50),
    fidelity=st.sampled_from(Fidelity),
    role=st.none() | texts,
    model=st.none() | texts,
    policy=st.none() | texts,
    policy_version=st.none() | st.integers(0, 2**40),
    policy_version_end=st.none() | st.integers(0, 2**40),
    attributed_by=texts,
    attribution_confidence=st.floats(0, 1),
    first_byte_at=st.none() | finite,
    streamed=st.booleans(),
    status=st.none() | st.integers(100, 599),
    response_id=st.none() | texts,
    response=st.binary(max_size=50),
    error=st.none() | texts,
    retry=st.integers(0, 9999),
    conversation=st.none() | st.binary(min_size=16, max_size=16),
    usage=st.none() | json_values,
    sampling=json_values,
    generations=st.lists(generations, max_size=3).map(tuple),
)


def test_a_span_comes_back_as_it_was(store: Store) -> None:
    span = make_span()
    span_id = store.add_span(span)
    assert store.get_span(span_id) == replace(span, span_id=span_id)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(spans, min_size=1, max_size=4))
def test_any_spans_come_back_as_they_were(store: Store, written: list[Span]) -> None:
    with store.transaction():
        ids = [store.add_span(span) for span in written]
    for span_id, span in zip(ids, written, strict=True):
        assert store.get_span(span_id) == replace(span, span_id=span_id)


def test_a_span_of_an_error_comes_back_as_it_was(store: Store) -> None:
    span = make_span(
        response=None, generations=(), status=502, error_class="unreachable", error="no answer", usage=None
    )
    span_id = store.add_span(span)
    assert store.get_span(span_id) == replace(span, span_id=span_id)


def test_a_span_makes_its_rollout_and_attempt(store: Store) -> None:
    store.add_span(make_span(rollout_id="new", attempt=2))
    rollout = store.get_rollout("new")
    assert rollout.created_at == 1000.0
    assert [attempt.number for attempt in store.list_attempts("new")] == [2]


def test_a_span_leaves_a_known_rollout_alone(store: Store) -> None:
    made, _ = store.create_rollout(rollout_id="r1", task_id="t1")
    store.add_span(make_span())
    store.add_span(make_span())
    assert store.get_rollout("r1") == made


@pytest.mark.parametrize("ending", [{"response": None}, {"error_class": "cut"}])
def test_a_span_with_both_endings_or_none_leaves_nothing(store: Store, ending: dict[str, None]) -> None:
    with pytest.raises(StoreError, match="CHECK"):
        store.add_span(make_span(**ending))
    assert store.stats()["rollouts"] == 0


def test_a_broken_generation_takes_its_span_with_it(store: Store) -> None:
    broken = Generation(array("q", [1]), array("i"), array("f"))
    with pytest.raises(TypeError):
        store.add_span(make_span(generations=(broken,)))
    assert store.stats()["spans"] == 0


def test_a_span_is_added_after_another_process_deleted_its_rollout(store: Store, db: Path) -> None:
    store.create_rollout(rollout_id="r1")
    store.mark_incomplete("r1", "so that the store remembers it")
    with closing(sqlite3.connect(db, isolation_level=None)) as other:
        other.execute("DELETE FROM attempts")
        other.execute("DELETE FROM rollouts")
    store.add_span(make_span())
    assert store.get_rollout("r1").incomplete is None
    assert len(store.list_attempts("r1")) == 1


def test_lists_are_newest_first_with_generations_and_paged(store: Store) -> None:
    ids = [
        store.add_span(make_span(rollout_id=f"r{index % 2}", attempt=index // 4 + 1)) for index in range(8)
    ]

    def listed(**wanted: object) -> list[int | None]:
        return [span.span_id for span in store.list_spans(**wanted)]  # type: ignore[arg-type]  # as the callers'

    assert listed() == ids[::-1]
    assert listed(rollout_id="r1") == ids[1::2][::-1]
    assert listed(rollout_id="r1", attempt=2) == [ids[7], ids[5]]
    assert listed(limit=3) == ids[:4:-1]
    assert listed(limit=3, before=ids[5]) == ids[4:1:-1]
    assert all(len(span.generations) == 2 for span in store.list_spans())


def test_the_spans_of_an_attempt_come_in_order_of_start(store: Store) -> None:
    late = store.add_span(make_span(started_at=2000.0))
    first = store.add_span(make_span(started_at=1000.0))
    second = store.add_span(make_span(started_at=1000.0))
    store.add_span(make_span(attempt=2))
    assert [span.span_id for span in store.spans_of_attempt("r1", 1)] == [first, second, late]


def test_an_unknown_span_is_named(store: Store) -> None:
    with pytest.raises(UnknownTarget, match="no span 7"):
        store.get_span(7)


def test_the_ends_of_a_conversation_are_found_by_its_longest_known_part(store: Store) -> None:
    short, long, unknown = b"s" * 16, b"l" * 16, b"u" * 16
    store.add_span(make_span(rollout_id="r1", conversation=short, response_id="a"))
    store.add_span(make_span(rollout_id="r1", conversation=long, response_id="b"))
    store.add_span(make_span(rollout_id="r2", attempt=2, conversation=long, response_id="c"))
    ends = store.conversation_ends([unknown, long, short])
    assert [(end.rollout_id, end.attempt, end.conversation) for end in ends] == [
        ("r1", 1, long),
        ("r2", 2, long),
    ]
    assert ends[0].response == b'{"id":"chatcmpl-1"}'
    [end] = store.conversation_ends([short])
    assert (end.rollout_id, end.extended) == ("r1", True)
    assert store.conversation_ends([unknown]) == store.conversation_ends([]) == ()


def test_the_end_of_a_conversation_is_found_by_a_response_id_first(store: Store) -> None:
    store.add_span(make_span(rollout_id="r1", response_id="a"))
    store.add_span(make_span(rollout_id="r2", response_id="b", conversation=b"c" * 16))
    [end] = store.conversation_ends([b"c" * 16], ["nobody", "a"])
    assert (end.rollout_id, end.conversation) == ("r1", None)


def test_an_end_is_extended_by_what_ended_well_after_it_in_its_attempt(store: Store) -> None:
    digest = b"d" * 16
    store.add_span(make_span(rollout_id="r1", conversation=digest))
    failed = {"response": None, "error_class": "cut_stream"}
    store.add_span(make_span(rollout_id="r1", **failed))
    store.add_span(make_span(rollout_id="r1", attempt=2))
    store.add_span(make_span(rollout_id="r2"))
    assert [end.extended for end in store.conversation_ends([digest])] == [False]
    store.add_span(make_span(rollout_id="r1"))
    assert [end.extended for end in store.conversation_ends([digest])] == [True]


def test_of_many_rollouts_with_one_history_the_newest_are_found_oldest_first(store: Store) -> None:
    for number in range(40):
        store.add_span(make_span(rollout_id=f"r{number}", conversation=b"d" * 16))
    found = [end.rollout_id for end in store.conversation_ends([b"d" * 16])]
    assert found == [f"r{number}" for number in range(24, 40)]


def test_looking_for_a_conversation_reads_its_index_and_nothing_else(store: Store) -> None:
    rows = store.rows(f"EXPLAIN QUERY PLAN {_ENDS_BY_CONVERSATION}", (b"x", 1))
    plan = "; ".join(row["detail"] for row in rows)
    assert "spans_by_conversation" in plan
    assert "SCAN" not in plan
    assert "TEMP B-TREE" not in plan


def test_recent_requests_come_newest_first(store: Store) -> None:
    for number in range(3):
        store.add_span(make_span(rollout_id=f"r{number}", role="x", request=b"%d" % number))
    assert list(store.recent_requests(2)) == [("r2", "x", "chat", b"2"), ("r1", "x", "chat", b"1")]
