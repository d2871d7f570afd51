"""The shipped model: small, whole, and with a template under which a rollout's calls merge."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import pytest

from lightning_proxy.demo.tasks import make_tasks
from lightning_proxy.demo.text_to_sql import WEIGHTS

TEN_MB = 10_000_000


def test_the_weights_are_shipped_and_small() -> None:
    files = {path.name for path in WEIGHTS.iterdir()}
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < TEN_MB


def test_the_weights_are_float32_of_a_model_under_a_million_parameters() -> None:
    with (WEIGHTS / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in tensors.values()} == {"F32"}
    size = sum(end - start for entry in tensors.values() for start, end in [entry["data_offsets"]])
    assert 800_000 < size // 4 < 1_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.mark.train
def test_the_prompt_of_turn_two_extends_turn_one_by_exact_token_ids(tokenizer: Any) -> None:
    from lightning_proxy.demo.model import TOOLS, demonstrate
    from lightning_proxy.experiment.tiny_model import Conversation, render

    rng = random.Random(0)
    for task in make_tasks(0, "heldout", 30):
        messages = demonstrate(task, rng)
        first = tokenizer.encode(render(tokenizer, Conversation(messages[:2], TOOLS), generate=True))
        second = tokenizer.encode(render(tokenizer, Conversation(messages[:4], TOOLS), generate=True))
        call = messages[2]["tool_calls"][0]["function"]
        said = (
            f"<tool_call>{json.dumps({'name': 'sql', 'arguments': call['arguments']})}</tool_call><|im_end|>"
        )
        sampled = tokenizer.encode(said)
        assert second[: len(first) + len(sampled)] == first + sampled
        assert len(second) < 110


@pytest.mark.train
def test_digits_are_tokens_of_their_own_and_text_survives(tokenizer: Any) -> None:
    assert len(tokenizer.encode("1234567")) == 7
    for text in ("SELECT SUM(price) FROM items", "error: no such column: x", "zażółć 12.5 \n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.train
def test_the_recipe_of_the_shipped_template_and_tokenizer_is_the_one_in_the_file(tokenizer: Any) -> None:
    from lightning_proxy.demo.model import training_tokenizer
    from lightning_proxy.experiment.tiny_model import CHAT_TEMPLATE

    assert tokenizer.chat_template == CHAT_TEMPLATE
    rebuilt = training_tokenizer()
    assert rebuilt.get_vocab() == tokenizer.get_vocab()


@pytest.mark.train
def test_the_demonstrator_is_right_about_a_third_of_the_time() -> None:
    from lightning_proxy.demo.model import demonstrate

    rng = random.Random(0)
    tasks = make_tasks(0, "train", 600)
    right = sum(demonstrate(task, rng)[-1]["content"] == task.answer for task in tasks)
    assert 0.25 < right / len(tasks) < 0.4
