"""Words that the command line offers as choices and the rooms behind it use: each listed once.

Standard library only, so that ``--help`` needs no room to be loaded.
"""

from __future__ import annotations

from enum import StrEnum


class Fidelity(StrEnum):
    """How exact the token data of a span is, best first."""

    EXACT = "exact"  # the engine's own token ids and logprobs
    # Ids recomputed and verified to decode to the same text. Nothing here makes such spans: it is the word
    # for what other programs write into the store.
    RETOKENIZED = "retokenized"
    TEXT = "text"  # no token ids
    INCOMPLETE = "incomplete"  # capture was cut


class RolloutState(StrEnum):
    """Where a rollout is. Everything but ``OPEN`` is terminal."""

    OPEN = "open"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class TaskState(StrEnum):
    """Where a task is. ``DONE``: every rollout of every round has ended."""

    OPEN = "open"
    DONE = "done"
    CANCELLED = "cancelled"


class ExportFormat(StrEnum):
    """What an export is written as."""

    JSONL = "jsonl"
    PARQUET = "parquet"
    OTLP = "otlp"
    LLAMA_FACTORY = "llama-factory"
    DSPY = "dspy"


class Per(StrEnum):
    """What a row of an export is of."""

    SPAN = "span"
    ROLLOUT = "rollout"
