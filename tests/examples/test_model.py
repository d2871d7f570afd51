"""The experiments' model: what it was shown is what the agents will ask for, and calls of a rollout merge."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from examples.calculator.tasks import make_task as calculator_task
from examples.experiment import WEIGHTS
from examples.model import demonstrators
from examples.model.build import lessons
from examples.search.tasks import make_task as search_task
from examples.sql import prompts
from examples.sql.tasks import make_task as sql_task

DEMONSTRATED = 400


def _right(shown: Any, answer: str) -> bool:
    return str(shown.messages[-1]["content"]) == answer


def test_the_weights_are_shipped_and_small() -> None:
    assert (WEIGHTS / "model.safetensors").is_file()
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 5_000_000


@pytest.mark.parametrize(
    ("make", "demonstrate"),
    [(search_task, demonstrators.search), (calculator_task, demonstrators.calculator)],
    ids=["search", "calculator"],
)
def test_demonstrators_with_tools_are_right_now_and_then(
    make: Callable[..., Any], demonstrate: Callable[..., Any]
) -> None:
    rng = random.Random(0)
    right = 0
    for number in range(DEMONSTRATED):
        task = make(0, "train", number)
        (shown,) = demonstrate(task, rng)
        right += _right(shown, task.answer)
        assert [m["role"] for m in shown.messages[:3]] == ["system", "user", "assistant"]
    assert 0.15 < right / DEMONSTRATED < 0.4


def test_the_demonstrator_of_sql_writes_checks_and_rewrites_and_is_right_now_and_then() -> None:
    rng = random.Random(0)
    right = approved = approved_wrong = wrong = 0
    for number in range(DEMONSTRATED):
        task = sql_task(0, "train", number)
        written, checked, rewritten = demonstrators.sql(task, rng)
        right += _right(written, str(task.query)) + _right(rewritten, str(task.query))
        is_right = str(task.query) in checked.messages[1]["content"]
        approves = _right(checked, prompts.APPROVED)
        approved += is_right and approves
        approved_wrong += approves and not is_right
        wrong += not is_right
    assert 0.2 < right / (2 * DEMONSTRATED) < 0.5
    assert approved / (DEMONSTRATED - wrong) > 0.7
    assert approved_wrong / wrong < 0.6


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.mark.train
def test_a_conversation_is_one_row_in_which_every_turn_extends_the_one_before(tokenizer: Any) -> None:
    from lightning_proxy.experiment.tiny_model import Conversation, render

    for shown in lessons(0, random.Random(1)):
        ids: list[int] = []
        for turn in [i for i, m in enumerate(shown.messages) if m["role"] == "assistant"]:
            before = Conversation(shown.messages[:turn], shown.tools)
            prompt = tokenizer.encode(render(tokenizer, before, generate=True))
            assert prompt[: len(ids)] == ids
            after = Conversation(shown.messages[: turn + 1], shown.tools)
            ids = tokenizer.encode(render(tokenizer, after).removesuffix("\n"))
            assert ids[: len(prompt)] == prompt
        assert len(ids) < 200


@pytest.mark.train
def test_the_shipped_tokenizer_is_the_one_that_the_recipe_makes(tokenizer: Any) -> None:
    from examples.model.build import training_tokenizer
    from lightning_proxy.experiment.tiny_model import CHAT_TEMPLATE

    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert training_tokenizer().get_vocab() == tokenizer.get_vocab()
