"""Makes models small enough to learn on two cores: a tokenizer, a fresh Qwen3, supervised steps.

torch and transformers are imported inside the functions that use them: nothing on the normal path of an
experiment loads this module.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SEED = 0
LEARNING_RATE = 3e-3
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


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages, and the tools that they were written with."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None = None


Lessons = Callable[[int, random.Random], list[Conversation]]  # what is shown at a step


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a warm-started model is made."""

    tokenizer: Callable[[], Any]
    lessons: Lessons
    steps: int


def build(recipe: Recipe, out: Path, *, steps: int | None = None, log: Callable[[str], None] = print) -> None:
    """Writes the warm-started model and its tokenizer to ``out`` (Hugging Face layout)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = recipe.tokenizer()
    model = build_model(tokenizer)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    warm_start(model, tokenizer, recipe.lessons, steps=steps or recipe.steps, log=log)
    save(model, tokenizer, out)


def build_by_command_line(recipe: Recipe, description: str) -> None:
    """``OUT [--steps N]``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, help="directory to write to")
    parser.add_argument("--steps", type=int, help=f"supervised steps (default {recipe.steps})")
    args = parser.parse_args()
    build(recipe, args.out, steps=args.steps)


def build_tokenizer(texts: Sequence[str], *, tags: Sequence[str], vocabulary: int) -> Any:
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


def warm_start(
    model: Any,
    tokenizer: Any,
    lessons: Lessons,
    *,
    steps: int,
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


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """In Hugging Face layout, readable for everyone."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)
