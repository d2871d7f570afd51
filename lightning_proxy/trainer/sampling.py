"""What a response was really sampled from, as far as the trainer can compute it again.

An engine samples from ``softmax(logits / temperature)``, cut to the ``top_k`` likeliest tokens, to the
nucleus ``top_p`` (arXiv 1904.09751, section 3.1) and to tokens at least ``min_p`` times as likely as
the likeliest (arXiv 2407.01082, section 3). The policy gradient is that of this distribution: a ratio
taken between others is not 1 on fresh data, or is 1 and points elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from lightning_proxy.errors import TrainingError

# Key and value of a span's sampling where the engine told the logprobs of what it sampled from, as vLLM
# does with `--logprobs-mode processed_logprobs`. Without it they are the model's own, before temperature;
# the third value stands for a call that ended before the engine had said which.
LOGPROBS_MODE, PROCESSED, UNKNOWN_MODE = "logprobs_mode", "processed_logprobs", "unknown"
GREEDY_BELOW = 1e-5  # vLLM takes the likeliest token at temperatures below


@dataclass(frozen=True, slots=True)
class Sampling:
    """A distribution to sample from, given logits. The defaults are the model's own distribution."""

    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def cuts(self) -> bool:
        """Whether some tokens cannot come at all."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


PLAIN = Sampling()


class Unknowable(StrEnum):
    """Why the distribution cannot be computed again from logits alone."""

    GREEDY = "greedy"  # temperature 0: nothing was sampled
    PENALISED = "penalised"  # penalties, biases: depend on what was said before
    CONSTRAINED = "constrained"  # by a grammar: forced tools, structured output
    MALFORMED = "malformed_sampling"  # a parameter is no number


# Value with which a parameter does nothing. vLLM's names, and OpenAI's where it has them.
_PENALTIES: Mapping[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "min_tokens": 0,
    "bad_words": [],
    "allowed_token_ids": None,
    "logits_processors": [],
}
_GRAMMARS = (
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
)
_FREE_TOOL_CHOICES = ("auto", "none")


def sampling_of(requested: Mapping[str, Any], defaults: Mapping[str, Any]) -> Sampling | Unknowable:
    """The distribution of a call, from what the request said and what the engine adds where it did not.

    ``defaults``: see :func:`engine_defaults`.
    """
    if _constrained(requested):
        return Unknowable.CONSTRAINED
    effective = {**defaults, **{name: value for name, value in requested.items() if value is not None}}
    if any(effective.get(name, off) not in (off, None) for name, off in _PENALTIES.items()):
        return Unknowable.PENALISED
    try:
        found = Sampling(
            temperature=float(effective.get("temperature", 1.0)),
            top_k=max(0, int(effective.get("top_k", 0))),  # vLLM takes -1 and 0 for all
            top_p=float(effective.get("top_p", 1.0)),
            min_p=float(effective.get("min_p", 0.0)),
        )
    except (TypeError, ValueError, OverflowError):
        return Unknowable.MALFORMED
    return Unknowable.GREEDY if found.temperature < GREEDY_BELOW else found


def engine_defaults(model: Path | None) -> Mapping[str, Any]:
    """What vLLM samples with where a request says nothing: the model's ``generation_config.json``.

    vLLM takes it from the model's directory unless it is told ``--generation-config vllm``. Raises
    ``TrainingError`` where the file cannot be read.
    """
    file = None if model is None else model / "generation_config.json"
    if file is None or not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: config[name] for name in names if config.get(name) is not None}
    except (ValueError, TypeError, AttributeError) as error:
        raise TrainingError(f"{file} cannot be read: {error}") from error


def _constrained(requested: Mapping[str, Any]) -> bool:
    if any(requested.get(name) for name in _GRAMMARS):
        return True
    choice = requested.get("tool_choice")
    if isinstance(choice, Mapping):
        choice = choice.get("type")  # Messages: {"type": "auto" | "any" | "tool"}
    if choice is not None and choice not in _FREE_TOOL_CHOICES:
        return True
    form = requested.get("response_format")
    return isinstance(form, Mapping) and form.get("type", "text") != "text"
