"""JSON lines and Parquet: what is in them is what was recorded, and Hugging Face's datasets loads them."""

from __future__ import annotations

import json
import tracemalloc
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.exchange import jsonl, parquet
from lightning_proxy.exchange.records import Selection, attempts, spans_of
from lightning_proxy.exchange.rows import ROLLOUT_COLUMNS, SPAN_COLUMNS, rollout_row, span_row
from lightning_proxy.store import Generation, Store

from .support import QUESTION, agent_rollout, chat_span

pq = pytest.importorskip("pyarrow.parquet")

EVERYTHING = Selection()
LOGPROBS = array("f", [-0.1, -1e-7, -123.456])


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def filled(store: Store) -> Store:
    agent_rollout(store, "r-1", task_id="t-1", reward=0.75)
    store.create_rollout(rollout_id="r-2")
    generation = Generation(array("i", [2**31 - 1, 0]), array("i", [7, 8, 9]), LOGPROBS, "length")
    store.add_span(chat_span("r-2", QUESTION, {"content": "no"}, generations=(generation,), role="writer"))
    failed = {"response": None, "error_class": "rate_limited", "error": "slow down", "status": 429}
    store.add_span(chat_span("r-2", QUESTION, {}, 1, generations=(), usage=None, **failed))
    return store


def span_rows(store: Store, **how: bool) -> Iterator[dict[str, Any]]:
    for recorded in attempts(store, EVERYTHING):
        for span in spans_of(store, recorded, EVERYTHING):
            yield span_row(recorded, span, **how)


def rollout_rows(store: Store) -> Iterator[dict[str, Any]]:
    for recorded in attempts(store, EVERYTHING):
        yield rollout_row(recorded, list(spans_of(store, recorded, EVERYTHING)))


def loaded(kind: str, path: Path, features: Any = None) -> list[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    cache = str(path.parent / "cache")
    return list(
        datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=cache, features=features)
    )


def check_tokens(rows: list[dict[str, Any]]) -> None:
    generation = rows[2]["generations"][0]
    assert generation["prompt_token_ids"] == [2**31 - 1, 0]
    assert generation["response_token_ids"] == [7, 8, 9]
    assert array("f", generation["logprobs"]) == LOGPROBS
    assert list(generation["logprobs"]) == LOGPROBS.tolist()


def test_a_row_holds_a_call_whole(filled: Store) -> None:
    first, second, other, failed = span_rows(filled, raw=True)
    assert list(first) == list(SPAN_COLUMNS)
    assert (first["rollout_id"], first["task_id"], first["reward"]) == ("r-1", "t-1", 0.75)
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "tool"]
    assert first["replies"][0]["tool_calls"] == [
        {"id": "call_1", "name": "sql", "arguments": '{"q": "SELECT 1"}'}
    ]
    assert second["replies"][0]["content"] == "42"
    assert second["tools"][0]["name"] == "sql"
    assert json.loads(second["request"])["messages"][3]["content"] == "42 rows"
    assert json.loads(first["metadata"]) == {"seed": 7}
    assert (other["reward"], other["role"]) == (None, "writer")
    assert (failed["error_class"], failed["replies"], failed["generations"]) == ("rate_limited", [], [])


def test_a_row_of_a_rollout_holds_its_calls_and_the_whole_ledger(filled: Store) -> None:
    filled.add_reward(value=1.0, rollout_id="r-1", source="human")
    row = next(rollout_rows(filled))
    assert list(row) == list(ROLLOUT_COLUMNS)
    assert [(reward["value"], reward["counts"]) for reward in row["rewards"]] == [(0.75, False), (1.0, True)]
    assert row["reward"] == 1.0
    assert len(row["spans"]) == 2


def test_without_tokens_there_are_none_but_their_counts(filled: Store) -> None:
    row = next(span_rows(filled, tokens=False))
    assert row["generations"] == []
    assert (row["prompt_tokens"], row["completion_tokens"]) == (3, 2)


def test_datasets_loads_the_lines_with_the_features_beside_them(filled: Store, tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "spans.jsonl"
    assert jsonl.write(path, span_rows(filled), SPAN_COLUMNS) == 4
    features = datasets.Features.from_dict(json.loads((tmp_path / "spans.features.json").read_text()))
    rows = loaded("json", path, features)
    assert rows == list(span_rows(filled))
    check_tokens(rows)
    check_tokens(loaded("json", path))  # a small file needs none


def test_lines_load_where_a_column_has_nothing_for_long(store: Store, tmp_path: Path) -> None:
    """Without features datasets would take the column for one that holds nothing ever."""
    import datasets

    store.add_span(chat_span("r-1", QUESTION, {"content": "no"}, role=None))
    store.add_span(chat_span("r-2", QUESTION, {"content": "yes"}, role="writer", started_at=2000.0))
    first, last = span_rows(store)
    path = tmp_path / "spans.jsonl"
    padded = {**first, "request": "x" * 2**20}
    jsonl.write(path, [*[padded] * 12, last], SPAN_COLUMNS)
    features = datasets.Features.from_dict(json.loads(jsonl.features_path(path).read_text()))
    assert loaded("json", path, features)[12]["role"] == "writer"


def test_datasets_loads_parquet(filled: Store, tmp_path: Path) -> None:
    path = tmp_path / "spans.parquet"
    assert parquet.write(path, span_rows(filled), SPAN_COLUMNS) == 4
    rows = loaded("parquet", path)
    assert rows == list(span_rows(filled))
    check_tokens(rows)


def test_a_rollout_per_row_loads_too(filled: Store, tmp_path: Path) -> None:
    jsonl.write(tmp_path / "r.jsonl", rollout_rows(filled), ROLLOUT_COLUMNS)
    parquet.write(tmp_path / "r.parquet", rollout_rows(filled), ROLLOUT_COLUMNS)
    expected = list(rollout_rows(filled))
    assert loaded("parquet", tmp_path / "r.parquet") == expected
    assert [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()] == expected


def test_parquet_has_the_types_that_were_promised_even_when_empty(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    assert parquet.write(path, [], SPAN_COLUMNS) == 0
    assert pq.read_schema(path) == parquet.arrow_schema(SPAN_COLUMNS)
    generation = pq.read_schema(path).field("generations").type.value_type
    assert str(generation.field("prompt_token_ids").type.value_type) == "int32"
    assert str(generation.field("logprobs").type.value_type) == "float"


def test_long_rows_get_row_groups_of_their_own(store: Store, tmp_path: Path) -> None:
    store.add_span(chat_span("r-1", QUESTION, {"content": "no"}))
    row = next(span_rows(store))
    path = tmp_path / "long.parquet"
    parquet.write(path, ({**row, "request": "x" * 5_000_000} for _ in range(3)), SPAN_COLUMNS)
    assert pq.ParquetFile(path).num_row_groups == 3


def test_a_database_larger_than_memory_is_no_trouble(store: Store, tmp_path: Path) -> None:
    long = [{"role": "user", "content": "word " * 20_000}]
    with store.transaction():
        for number in range(400):
            store.add_span(chat_span(f"r-{number // 200}", long, {"content": "no"}, number))
    tracemalloc.start()
    try:
        assert jsonl.write(tmp_path / "spans.jsonl", span_rows(store), SPAN_COLUMNS) == 400
        assert tracemalloc.get_traced_memory()[1] < 20e6  # bytes; what is written is twice that
    finally:
        tracemalloc.stop()
    assert (tmp_path / "spans.jsonl").stat().st_size > 40e6


def test_rollouts_are_walked_in_order_whatever_their_number(store: Store) -> None:
    with store.transaction():
        for number in range(450):
            store.create_rollout(rollout_id=f"r-{number:03}")
    seen = [recorded.rollout.rollout_id for recorded in attempts(store, EVERYTHING)]
    assert seen == [f"r-{number:03}" for number in range(450)]


def test_a_selection_takes_what_it_names(filled: Store) -> None:
    def names(**wanted: Any) -> list[str]:
        return [recorded.rollout.rollout_id for recorded in attempts(filled, Selection(**wanted))]

    assert names(rewarded=True) == names(min_reward=0.7) == names(task_ids=frozenset({"t-1"})) == ["r-1"]
    assert names(min_reward=0.8) == []
    assert names(rollout_ids=frozenset({"r-2"})) == ["r-2"]
    begun = filled.get_rollout("r-2").created_at
    assert "r-2" not in names(until=begun)
    writers = Selection(roles=frozenset({"writer"}))
    assert [
        span.role for recorded in attempts(filled, writers) for span in spans_of(filled, recorded, writers)
    ] == ["writer"]


def test_every_column_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()

    def names(kind: Any) -> Iterator[str]:
        if isinstance(kind, list):
            yield from names(kind[0])
        elif isinstance(kind, dict):
            for name, of in kind.items():
                yield name
                yield from names(of)

    assert [name for name in names({**SPAN_COLUMNS, **ROLLOUT_COLUMNS}) if f"`{name}`" not in page] == []
