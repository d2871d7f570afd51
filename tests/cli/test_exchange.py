"""export and import on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_proxy
from lightning_proxy.store import Store
from tests.exchange.collector import Collector, running_collector
from tests.exchange.support import agent_rollout

from .test_cli import cli, ok, refused


@pytest.fixture(autouse=True)
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a database of two rollouts."""
    monkeypatch.chdir(tmp_path)
    with Store.open("lightning.db") as store:
        agent_rollout(store, "r-1", task_id="t", reward=1.0, role="writer")
        agent_rollout(store, "r-2", task_id="t", reward=0.0, answer="7")
    return tmp_path


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


def lines(path: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_lines_per_span_and_per_rollout() -> None:
    assert ok("export", "--format", "jsonl", "--out", "s.jsonl").startswith("exported 4 spans to s.jsonl")
    assert len(lines("s.jsonl")) == 4
    assert json.loads(Path("s.features.json").read_text())["rollout_id"] == {
        "dtype": "string",
        "_type": "Value",
    }
    ok("export", "--format", "jsonl", "--per", "rollout", "--out", "r.jsonl")
    assert [row["rollout_id"] for row in lines("r.jsonl")] == ["r-1", "r-2"]


@pytest.mark.parametrize(
    ("flags", "rollouts"),
    [
        (["--min-reward", "0.5"], ["r-1"]),
        (["--rollout", "r-2"], ["r-2"]),
        (["--role", "writer"], ["r-1"]),
        (["--task-id", "t", "--since", "1h"], ["r-1", "r-2"]),
        (["--until", "2020-01-01"], []),
        (["--state", "failed"], []),
        (["--policy", "policy", "--policy-version", "3", "--fidelity", "exact"], ["r-1", "r-2"]),
        (["--policy-version", "4"], []),
    ],
)
def test_what_is_selected(flags: list[str], rollouts: list[str]) -> None:
    ok("export", "--format", "jsonl", "--per", "rollout", "--out", "r.jsonl", *flags)
    assert [row["rollout_id"] for row in lines("r.jsonl")] == rollouts


def test_the_other_formats(collector: Collector) -> None:
    assert "4 spans" in ok("export", "--format", "parquet", "--out", "s.parquet")
    said = ok("export", "--format", "llama-factory", "--out", "data")
    assert "2 conversations, 0 demonstrations and 0 preferences to data" in said
    assert "2 examples" in ok("export", "--format", "dspy", "--out", "e.json")
    assert "6 spans" in ok("export", "--format", "otlp", "--endpoint", collector.url, "--header", "x-key=a=b")
    assert collector.headers[0]["x-key"] == "a=b"
    numbers = json.loads(ok("export", "--format", "otlp", "--endpoint", collector.url, "--json"))
    assert numbers == {"format": "otlp", "spans": 6, "rejected": 0}


def test_there_and_back(collector: Collector) -> None:
    ok("export", "--format", "otlp", "--endpoint", collector.url, "--content")
    Path("traces.pb").write_bytes(collector.requests[0].SerializeToString())
    said = ok("import", "traces.pb", "--db", "other.db")
    assert said.startswith("imported 4 calls of 2 rollouts and 2 rewards into other.db\n")
    assert "2 invoke_agent" in said
    assert "4 were known already" in ok("import", "--format", "otel", "traces.pb", "--db", "other.db")
    assert json.loads(ok("import", "traces.pb", "--db", "other.db", "--json"))["known"] == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("export", "--format", "jsonl"), "--out spans.jsonl"),
        (("export", "--format", "otlp"), "--endpoint http://127.0.0.1:4318"),
        (("export", "--format", "otlp", "--endpoint", "x:1"), "a URL such as"),
        (("export", "--format", "otlp", "--endpoint", "http://x", "--header", "k"), "x-api-key=SECRET"),
        (("export", "--format", "jsonl", "--out", "no/such/x.jsonl"), "the directory no/such does not exist"),
        (("export", "--format", "jsonl", "--out", "x.jsonl", "--since", "lunch"), "2026-01-31"),
        (("export", "--format", "csv", "--out", "x"), "parquet"),
        (("import", "gone.json"), "gone.json"),
        (("import", "lightning.db"), "lightning.db holds no OTLP traces"),
    ],
)
def test_bad_input_is_refused_with_what_would_be_right(words: tuple[str, ...], said: str) -> None:
    assert said in refused(*words)


def test_a_file_that_could_not_be_finished_is_not_there() -> None:
    Path("x.jsonl").write_text("old")
    Path("x.features.json").mkdir()
    assert cli("export", "--format", "jsonl", "--out", "x.jsonl").exit_code != 0
    assert not Path("x.jsonl.part").exists()


def test_rules_of_the_settings_hold_for_imports(collector: Collector) -> None:
    ok("export", "--format", "otlp", "--endpoint", collector.url, "--content")
    Path("traces.pb").write_bytes(collector.requests[0].SerializeToString())
    Path("lightning.toml").write_text('[[redaction]]\nname = "rows"\npattern = "42 rows"\n')
    ok("import", "traces.pb", "--db", "other.db")
    with Store.open("other.db") as store:
        assert {span.redacted for span in store.list_spans()} == {None, "rows"}


def test_the_help_says_that_nothing_of_ours_makes_retokenized_spans_and_nothing_does() -> None:
    said = " ".join(ok("export", "--help").replace("│", " ").split())
    assert "Neither serve nor import makes retokenized ones" in said
    package = Path(lightning_proxy.__file__).parent
    named = {file.name for file in package.rglob("*.py") if "RETOKENIZED" in file.read_text()}
    assert named == {"words.py", "transitions.py", "candidates.py"}  # the word, and who would train on them
