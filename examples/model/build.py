"""Builds the experiments' model from nothing: ``python -m examples.model.build OUT``.

A Qwen3 of a million parameters with its own tokenizer, warm-started on the confused demonstrators of all
three experiments together. The result is shipped in ``weights/``; this makes it again.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.calculator.tasks import make_task as calculator_task
from examples.model import demonstrators
from examples.search.tasks import make_task as search_task
from examples.sql.tasks import make_task as sql_task
from lightning_proxy.demo.model import Conversation, build_model, build_tokenizer, render, save, warm_start

TASK_SEED = -1  # and below: no experiment can have such a seed
SEED = 0
STEPS = 1500
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


def build(out: Path, *, steps: int = STEPS, log: Callable[[str], None] = print) -> None:
    """Writes the warm-started model and its tokenizer to ``out`` (Hugging Face layout)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = training_tokenizer()
    model = build_model(tokenizer)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    warm_start(model, tokenizer, lessons, steps=steps, log=log)
    save(model, tokenizer, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build the experiments' model.")
    parser.add_argument("out", type=Path, help="directory to write to")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"supervised steps (default {STEPS})")
    args = parser.parse_args()
    build(args.out, steps=args.steps)


if __name__ == "__main__":
    main()
