"""Builds the demo's model from nothing: ``python -m lightning_proxy.demo.model OUT``.

A Qwen3 of 0.9 million parameters with its own tokenizer and chat template, warm-started on a
*confused* demonstrator: it follows the protocol (tool call, then answer) but takes the right
aggregate only now and then and often a wrong column. Sampled, the model therefore succeeds
sometimes, greedily almost never: it is left to reinforcement to find the rest. The result is
shipped in ``weights/``; this file is how it was made, and makes it again.

torch and transformers are imported inside the functions that use them: nothing on the demo's
normal path loads this module.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_proxy.demo.tasks import AGGREGATES, COLUMNS, Task, aggregate_of, make_task, query_text

if TYPE_CHECKING:
    import torch

# Tools are rendered by name and description alone, and a tool call as `json.dumps` writes it with
# no newline around it: the prompt of turn 2 is then the prompt and answer of turn 1, token for token.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') -}}
{%- if message.role == 'system' and tools -%}
{{- '\\nTools:' -}}
{%- for tool in tools -%}
{{- ' ' + tool.function.name + ': ' + tool.function.description -}}
{%- endfor -%}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) \
+ '}</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
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
SEED = 0
STEPS = 500
ROWS = 16
LEARNING_RATE = 3e-3


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


def build_tokenizer(texts: Sequence[str], *, tags: Sequence[str] = TAGS, vocabulary: int = VOCABULARY) -> Any:
    """Byte-level BPE over ``texts`` with single digits, whole ``tags`` and the ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(tags),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def training_tokenizer() -> Any:
    """The tokenizer of the shipped model, from the demonstrator's own words."""
    rng = random.Random(SEED)
    plain = [demonstrate(make_task(TASK_SEED, "train", number), rng) for number in range(2000)]
    return build_tokenizer([_spell(messages) for messages in plain])


def build_model(tokenizer: Any) -> Any:
    """A fresh Qwen3ForCausalLM of 0.9 million parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        # vLLM on CPU packs the output head at start, and after a reload packs a tied one never again.
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        # Wider than usual: at this size, copying is learned in a third of the steps.
        initializer_range=0.05,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages, and the tools that they were written with."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None = None


def render(tokenizer: Any, conversation: Conversation, *, generate: bool = False) -> str:
    """The text that the model reads."""
    text = tokenizer.apply_chat_template(
        list(conversation.messages),
        tools=conversation.tools,
        tokenize=False,
        add_generation_prompt=generate,
    )
    return str(text)


def row_of(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and 1 at each id that the assistant wrote."""
    ids: list[int] = []
    taught: list[int] = []
    messages, tools = conversation.messages, conversation.tools
    for turn in [place for place, message in enumerate(messages) if message["role"] == "assistant"]:
        prompt = tokenizer.encode(render(tokenizer, Conversation(messages[:turn], tools), generate=True))
        whole = tokenizer.encode(
            render(tokenizer, Conversation(messages[: turn + 1], tools)).removesuffix("\n")
        )
        taught += [0] * (len(prompt) - len(ids)) + [1] * (len(whole) - len(prompt))
        ids = whole
    return ids, taught


def _batch(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded (ids, labels); right padding needs no attention mask in a causal model."""
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids_B_T = torch.full((len(rows), width), pad)
    labels_B_T = torch.full((len(rows), width), -100)
    for i, (ids, taught) in enumerate(rows):
        ids_B_T[i, : len(ids)] = torch.tensor(ids)
        labels_B_T[i, : len(ids)] = torch.tensor([t if m else -100 for t, m in zip(ids, taught, strict=True)])
    return ids_B_T, labels_B_T


def lessons(step: int, rng: random.Random) -> list[Conversation]:
    """What the demonstrator shows at a step: always fresh tasks."""
    tasks = [make_task(TASK_SEED, "train", step * ROWS + i) for i in range(ROWS)]
    return [Conversation(demonstrate(task, rng), TOOLS) for task in tasks]


def warm_start(
    model: Any,
    tokenizer: Any,
    lessons: Callable[[int, random.Random], list[Conversation]] = lessons,
    *,
    steps: int = STEPS,
    log: Callable[[str], None] = print,
) -> None:
    """Supervised steps on what ``lessons`` shows at each."""
    import torch

    rng = random.Random(SEED)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    began = time.monotonic()
    for step in range(steps):
        rows = [row_of(tokenizer, conversation) for conversation in lessons(step, rng)]
        ids_B_T, labels_B_T = _batch(rows, tokenizer.pad_token_id)
        taught_B_T = labels_B_T[:, 1:] != -100
        hidden = model.model(input_ids=ids_B_T, use_cache=False).last_hidden_state[:, :-1][taught_B_T]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), labels_B_T[:, 1:][taught_B_T])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 20 == 19:
            log(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {time.monotonic() - began:.0f} s")
    model.eval()


def build(out: Path, *, steps: int = STEPS, log: Callable[[str], None] = print) -> None:
    """Writes the warm-started model and its tokenizer to ``out`` (Hugging Face layout)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = training_tokenizer()
    model = build_model(tokenizer)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    warm_start(model, tokenizer, steps=steps, log=log)
    save(model, tokenizer, out)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """In Hugging Face layout, readable for everyone."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)


def _spell(messages: Sequence[dict[str, Any]]) -> str:
    """All words of a conversation, for the tokenizer to learn from."""
    words = [f"{m['role']}\n{m['content']}" for m in messages]
    call = json.dumps({"name": "sql", "arguments": messages[2]["tool_calls"][0]["function"]["arguments"]})
    return "\n".join([*words, f"Tools: sql: {TOOLS[0]['function']['description']}", call])  # type: ignore[index]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build the demo's model.")
    parser.add_argument("out", type=Path, help="directory to write to")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"supervised steps (default {STEPS})")
    args = parser.parse_args()
    build(args.out, steps=args.steps)


if __name__ == "__main__":
    main()
