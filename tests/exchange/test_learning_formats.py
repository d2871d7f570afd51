"""Conversations, LLaMA-Factory's datasets and DSPy's examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.errors import InvalidInput
from lightning_proxy.exchange import dspy, llama_factory
from lightning_proxy.exchange.conversations import Conversation, conversations_of
from lightning_proxy.exchange.records import Selection, attempts, spans_of
from lightning_proxy.store import Store

from .support import CALL, QUESTION, agent_rollout, chat_span

Json = dict[str, Any]
LAST = Selection(last_attempt_only=True)
ANSWER: Json = {"role": "assistant", "content": "42"}
MORE: Json = {"role": "user", "content": "And now?"}


def conversations(store: Store) -> list[Conversation]:
    return [
        each
        for recorded in attempts(store, LAST)
        for each in conversations_of(recorded, spans_of(store, recorded, LAST))
    ]


def contents(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages]


# -- conversations ---------------------------------------------------------------------------------------


def test_a_conversation_of_many_calls_is_told_once(store: Store) -> None:
    ids = agent_rollout(store, "r")
    history = [
        *QUESTION,
        {**ANSWER, "tool_calls": [CALL]},
        {"role": "tool", "content": "42 rows"},
        ANSWER,
        MORE,
    ]
    ids.append(store.add_span(chat_span("r", history, {"content": "43"}, 2)))
    [whole] = conversations(store)
    assert whole.span_ids == tuple(ids)
    assert contents(whole)[-3:] == ["42", "And now?", "43"]


def test_branches_and_agents_are_conversations_of_their_own(store: Store) -> None:
    store.add_span(chat_span("r", QUESTION, ANSWER, 0, role="a"))
    store.add_span(chat_span("r", [*QUESTION, ANSWER, MORE], {"content": "one"}, 1, role="a"))
    store.add_span(chat_span("r", [*QUESTION, ANSWER, MORE], {"content": "two"}, 2, role="a"))
    store.add_span(chat_span("r", [*QUESTION, ANSWER, MORE], {"content": "three"}, 3, role="b"))
    assert [contents(each)[-1] for each in conversations(store)] == ["one", "two", "three"]


def test_calls_that_failed_and_answers_that_nobody_got_are_left_out(store: Store) -> None:
    failed = {"response": None, "error_class": "timeout", "error": "x"}
    store.add_span(chat_span("r", QUESTION, {}, 0, **failed))
    store.add_span(chat_span("r", QUESTION, {"content": "lost"}, 1))
    store.add_span(chat_span("r", QUESTION, {"content": "got"}, 2, retry=1))
    assert [contents(each)[-1] for each in conversations(store)] == ["got"]


def test_only_the_last_attempt_counts(store: Store) -> None:
    store.add_span(chat_span("r", QUESTION, {"content": "first"}, 0, attempt=1))
    store.add_span(chat_span("r", QUESTION, {"content": "second"}, 1, attempt=2))
    assert [contents(each)[-1] for each in conversations(store)] == ["second"]


# -- LLaMA-Factory -----------------------------------------------------------------------------------------


def written(store: Store, tmp_path: Path, **how: Any) -> tuple[list[Json], list[Json], Any]:
    report = llama_factory.write(store, LAST, tmp_path / "data", **how)
    files = (tmp_path / "data" / f"{name}.jsonl" for name in (llama_factory.SFT, llama_factory.PREFERENCES))
    sft, pairs = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    return sft, pairs, report


def check_turns(turns: list[Json], *, ends_with: tuple[str, ...]) -> None:
    """LLaMA-Factory's own rule: what is read and what is said take turns, the former first."""
    for number, turn in enumerate(turns):
        allowed = ("gpt", "function_call") if number % 2 else ("human", "observation")
        assert turn["from"] in allowed
    assert turns[-1]["from"] in ends_with


def test_a_conversation_with_tools(store: Store, tmp_path: Path) -> None:
    agent_rollout(store, "r", task_id="t", reward=1.0)
    [row], pairs, report = written(store, tmp_path)
    assert row["conversations"] == [
        {"from": "human", "value": "How many?"},
        {"from": "function_call", "value": '{"name":"sql","arguments":{"q":"SELECT 1"}}'},
        {"from": "observation", "value": "42 rows"},
        {"from": "gpt", "value": "42"},
    ]
    assert row["system"] == "You help."
    assert [tool["name"] for tool in json.loads(row["tools"])] == ["sql"]
    assert (row["reward"], row["task_id"], pairs, report.conversations) == (1.0, "t", [], 1)
    check_turns(row["conversations"], ends_with=("gpt", "function_call"))


def test_several_calls_and_their_results_are_one_turn_each(store: Store, tmp_path: Path) -> None:
    second = {**CALL, "id": "call_2"}
    results = [{"role": "tool", "tool_call_id": c["id"], "content": c["id"]} for c in (CALL, second)]
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL, second]}
    store.add_span(chat_span("r", [*QUESTION, asked, *results], ANSWER))
    [row], _, _ = written(store, tmp_path)
    assert [turn["from"] for turn in row["conversations"]] == ["human", "function_call", "observation", "gpt"]
    assert len(json.loads(row["conversations"][1]["value"])) == 2
    assert row["conversations"][2]["value"] == "call_1\ncall_2"


def test_the_best_and_the_worst_of_a_task_are_a_preference(store: Store, tmp_path: Path) -> None:
    for number, (answer, reward) in enumerate([("41", 0.2), ("42", 1.0), ("7", -1.0), ("40", 0.0)]):
        agent_rollout(store, f"r-{number}", task_id="t", reward=reward, answer=answer)
    agent_rollout(store, "alone", task_id="u", reward=1.0)
    agent_rollout(store, "no-task", reward=0.0)
    _, [pair], report = written(store, tmp_path)
    assert (pair["chosen"], pair["rejected"]) == (
        {"from": "gpt", "value": "42"},
        {"from": "gpt", "value": "7"},
    )
    assert [turn["from"] for turn in pair["conversations"]] == ["human", "function_call", "observation"]
    assert (pair["reward_chosen"], pair["reward_rejected"]) == (1.0, -1.0)
    assert pair["system"] == "You help."
    check_turns(pair["conversations"], ends_with=("human", "observation"))
    assert report.preferences == 1
    assert written(store, tmp_path, min_gap=2.0)[2].preferences == 1
    assert written(store, tmp_path, min_gap=2.5)[2].preferences == 0


def test_conversations_that_part_earlier_are_compared_where_they_part(store: Store, tmp_path: Path) -> None:
    agent_rollout(store, "good", task_id="t", reward=1.0)
    store.create_rollout(rollout_id="bad", task_id="t")
    store.add_span(chat_span("bad", QUESTION, {"content": "No idea."}))
    store.add_reward(value=0.0, rollout_id="bad")
    _, [pair], _ = written(store, tmp_path)
    assert pair["conversations"] == [{"from": "human", "value": "How many?"}]
    assert (pair["chosen"]["from"], pair["rejected"]["value"]) == ("function_call", "No idea.")


def test_what_cannot_be_compared_or_told_is_counted(store: Store, tmp_path: Path) -> None:
    other = [QUESTION[0], {"role": "user", "content": "How few?"}]
    for name, messages, reward in (("a", QUESTION, 1.0), ("b", other, 0.0)):
        store.create_rollout(rollout_id=name, task_id="t")
        store.add_span(chat_span(name, messages, ANSWER))
        store.add_reward(value=reward, rollout_id=name)
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    store.add_span(chat_span("c", [image], ANSWER))
    store.add_span(chat_span("d", QUESTION, {"content": ""}))
    store.add_span(chat_span("e", [ANSWER], ANSWER))
    store.add_span(chat_span("f", QUESTION, ANSWER, redacted="email"))
    bad = {"id": "x", "type": "function", "function": {"name": "sql", "arguments": "{oops"}}
    store.add_span(chat_span("g", QUESTION, {"content": None, "tool_calls": [bad]}))
    _, pairs, report = written(store, tmp_path)
    assert pairs == []
    assert report.left_out == {
        "nothing_in_common": 1, "not_only_text": 1, "empty": 1, "no_turns": 1, "redacted": 1,
        "malformed_tool_call": 1,
    }  # fmt: skip
    assert report.conversations == 2


def test_a_demonstration_is_preferred_to_the_reply_that_it_is_for(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = agent_rollout(store, "r", reward=0.0)
    store.add_reward(value=0.0, span_id=first, comment="nowhere: it is no conversation's end")
    store.add_reward(value=0.0, span_id=last, comment="It is 43.")
    said = {"It is 43.": "It is 43."}  # a ledger with demonstrations has them in a field of their own
    for module in (llama_factory, dspy):
        monkeypatch.setattr(module, "demonstration_of", lambda reward: said.get(reward.comment))
    sft, [pair], report = written(store, tmp_path)
    assert [row["conversations"][-1]["value"] for row in sft] == ["42", "It is 43."]
    assert (pair["chosen"]["value"], pair["rejected"]["value"]) == ("It is 43.", "42")
    assert (report.conversations, report.demonstrations, report.preferences) == (1, 1, 1)
    dspy.write(store, LAST, tmp_path / "e.json")
    assert [row["answer"] for row in json.loads((tmp_path / "e.json").read_text())] == ["It is 43."]


def test_the_list_of_datasets_names_both_and_keeps_the_rest(store: Store, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    agent_rollout(store, "r", reward=1.0)
    written(store, tmp_path)
    listed = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
    assert listed["mine"] == {"file_name": "mine.json"}
    assert (
        listed["lightning_sft"]["formatting"] == listed["lightning_preferences"]["formatting"] == "sharegpt"
    )
    assert listed["lightning_preferences"]["ranking"] is True
    for name in ("lightning_sft", "lightning_preferences"):
        assert (tmp_path / "data" / listed[name]["file_name"]).exists()
    (tmp_path / "data" / "dataset_info.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"dataset_info\.json is no JSON"):
        written(store, tmp_path)


def test_datasets_loads_both(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()
    for number, reward in enumerate((0.0, 1.0)):
        agent_rollout(store, f"r-{number}", task_id="t", reward=reward, answer=str(number))
    sft, pairs, _ = written(store, tmp_path)
    for name, rows in (("lightning_sft", sft), ("lightning_preferences", pairs)):
        file, cache = str(tmp_path / "data" / f"{name}.jsonl"), str(tmp_path / "cache")
        loaded = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)
        assert list(loaded) == rows


# -- DSPy ------------------------------------------------------------------------------------------------


class Example(dict[str, Any]):
    """As much of ``dspy.Example`` as is needed to see that the rows fit it."""

    def with_inputs(self, *names: str) -> Example:
        assert set(names) <= set(self)
        return self


def test_examples_for_dspy(store: Store, tmp_path: Path) -> None:
    agent_rollout(store, "r-1", task_id="t", reward=0.5)
    given = {"context": "a table", "question": "how many?"}
    store.create_rollout(rollout_id="r-2", metadata={"input": given})
    store.add_span(chat_span("r-2", QUESTION, {"content": "7"}, role="writer"))
    store.add_span(chat_span("r-3", QUESTION, {"content": "x"}, redacted="email"))
    path = tmp_path / "examples.json"
    assert dspy.write(store, LAST, path) == 2
    rows = json.loads(path.read_text())
    examples = {row["rollout_id"]: Example(**row).with_inputs(*row["input_keys"]) for row in rows}
    assert examples["r-1"] == {
        "instructions": "You help.", "question": "How many?", "answer": "42", "reward": 0.5,
        "rollout_id": "r-1", "task_id": "t", "role": None, "input_keys": ["instructions", "question"],
    }  # fmt: skip
    assert examples["r-2"]["input_keys"] == ["context", "question"]
    assert (examples["r-2"]["question"], examples["r-2"]["answer"]) == ("how many?", "7")


def test_no_examples_are_an_empty_list(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "examples.json"
    assert dspy.write(store, LAST, path) == 0
    assert json.loads(path.read_text()) == []
