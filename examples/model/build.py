"""Builds the experiments' model from nothing: ``python -m examples.model.build OUT``.

A Qwen3 of a million parameters with its own tokenizer, warm-started on the confused demonstrators of all
three experiments together. The result is shipped in ``weights/``; this makes it again.
"""

from __future__ import annotations

import random
from typing import Any

from examples.calculator.tasks import make_task as calculator_task
from examples.model import demonstrators
from examples.search.tasks import make_task as search_task
from examples.sql.tasks import make_task as sql_task
from lightning_proxy.experiment.tiny_model import (
    SEED,
    Conversation,
    Recipe,
    build_by_command_line,
    build_tokenizer,
    render,
)

TASK_SEED = -1  # and below: no experiment can have such a seed
TASKS_EACH = 6  # a step, of each experiment
VOCABULARY = 768
# What never varies in a call is one token: TAGS of lightning_proxy.demo.model has the reason.
TAGS = (
    "<tool_call>",
    "</tool_call>",
    '{"name": "search", "arguments": {"query": "',
    '{"name": "calculator", "arguments": {"expression": "',
    '"}}',
)


def lessons(step: int, rng: random.Random) -> list[Conversation]:
    """What the demonstrators show at a step: always fresh tasks."""
    shown: list[Conversation] = []
    for number in range(step * TASKS_EACH, (step + 1) * TASKS_EACH):
        shown += demonstrators.sql(sql_task(TASK_SEED, "train", number), rng)
        facts = TASK_SEED - number // 100  # each hundred tasks have other facts
        shown += demonstrators.search(search_task(facts, "train", number), rng)
        shown += demonstrators.calculator(calculator_task(TASK_SEED, "train", number), rng)
    return shown


def training_tokenizer() -> Any:
    """The tokenizer of the shipped model, from the demonstrators' own words."""
    rng = random.Random(SEED)
    bare = build_tokenizer([], tags=TAGS, vocabulary=VOCABULARY)  # for its template
    words = [render(bare, shown) for step in range(300) for shown in lessons(step, rng)]
    return build_tokenizer(words, tags=TAGS, vocabulary=VOCABULARY)


RECIPE = Recipe(training_tokenizer, lessons, steps=1500)

if __name__ == "__main__":
    build_by_command_line(RECIPE, "Build the experiments' model.")
