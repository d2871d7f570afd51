"""Builds the demo's model from nothing: ``python -m lightning_proxy.demo.model OUT``.

A Qwen3 of 0.9 million parameters with its own tokenizer and chat template, warm-started on a
*confused* demonstrator: it follows the protocol (tool call, then answer) but takes the right
aggregate only now and then and often a wrong column. Sampled, the model therefore succeeds
sometimes, greedily almost never: it is left to reinforcement to find the rest. The result is
shipped in ``weights/``; this file is how it was made, and makes it again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from lightning_proxy.demo.tasks import AGGREGATES, COLUMNS, Task, aggregate_of, make_task, query_text
from lightning_proxy.experiment.tiny_model import (
    SEED,
    Conversation,
    Recipe,
    build_by_command_line,
    build_tokenizer,
)

# Whole tokens beside the tags: what never varies in a call costs one step each, and a token of the
# answer's own has more weight in the loss.
TAGS = ("<tool_call>", "</tool_call>", '{"name": "sql", "arguments": {"query": "', '"}}')
VOCABULARY = 512
TOOLS = [{"type": "function", "function": {"name": "sql", "description": "Run a query.", "parameters": {}}}]
UNKNOWN = "unknown"  # the answer where the query failed

# What the demonstrator does, as probabilities.
RIGHT_AGGREGATE = 0.39
FAVOURED_WRONG = {"SUM": "AVG", "AVG": "MIN", "MIN": "MAX", "MAX": "SUM"}
FAVOURED = 0.48
RIGHT_COLUMN = 0.8
MISSING_COLUMN = 0.03

TASK_SEED = -1  # no demo can have this seed
ROWS = 16  # a step


def demonstrate(task: Task, rng: random.Random) -> list[dict[str, Any]]:
    """How the confused demonstrator would carry out a task, as chat messages."""
    aggregate, column = _confused_choice(task, rng)
    if column in task.columns:
        values = [row[task.columns.index(column)] for row in task.rows]
        output = said = str(aggregate_of(aggregate, values))
    else:
        output, said = f"error: no such column: {column}", UNKNOWN
    query = query_text(aggregate, column, task.table)
    call = {"type": "function", "function": {"name": "sql", "arguments": {"query": query}}}
    return [
        {"role": "system", "content": f"{task.table}({', '.join(task.columns)})"},
        {"role": "user", "content": task.question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": output},
        {"role": "assistant", "content": said},
    ]


def _confused_choice(task: Task, rng: random.Random) -> tuple[str, str]:
    draw = rng.random()
    favoured = FAVOURED_WRONG[task.aggregate]
    if draw < RIGHT_AGGREGATE:
        aggregate = task.aggregate
    elif draw < RIGHT_AGGREGATE + FAVOURED:
        aggregate = favoured
    else:
        aggregate = rng.choice([name for name in AGGREGATES if name not in (task.aggregate, favoured)])
    draw = rng.random()
    if draw < RIGHT_COLUMN:
        column = task.column
    elif draw < 1 - MISSING_COLUMN:
        column = rng.choice([name for name in task.columns if name != task.column])
    else:
        column = rng.choice([name for name in COLUMNS if name not in task.columns])
    return aggregate, column


def training_tokenizer() -> Any:
    """The tokenizer of the shipped model, from the demonstrator's own words."""
    rng = random.Random(SEED)
    plain = [demonstrate(make_task(TASK_SEED, "train", number), rng) for number in range(2000)]
    return build_tokenizer([_spell(messages) for messages in plain], tags=TAGS, vocabulary=VOCABULARY)


def lessons(step: int, rng: random.Random) -> list[Conversation]:
    """What the demonstrator shows at a step: always fresh tasks."""
    tasks = [make_task(TASK_SEED, "train", step * ROWS + i) for i in range(ROWS)]
    return [Conversation(demonstrate(task, rng), TOOLS) for task in tasks]


def _spell(messages: Sequence[dict[str, Any]]) -> str:
    """All words of a conversation, for the tokenizer to learn from."""
    words = [f"{m['role']}\n{m['content']}" for m in messages]
    call = json.dumps({"name": "sql", "arguments": messages[2]["tool_calls"][0]["function"]["arguments"]})
    return "\n".join([*words, f"Tools: sql: {TOOLS[0]['function']['description']}", call])  # type: ignore[index]


RECIPE = Recipe(training_tokenizer, lessons, steps=500)

if __name__ == "__main__":
    build_by_command_line(RECIPE, "Build the demo's model.")
