"""What a pass of the trainer did, as a record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class Progress(Protocol):
    """Where a pass says what it does."""

    def __call__(self, line: str, done: float | None = None) -> None:
        """One line; or, with ``done`` (0 to 1), how far the step that the line names has come."""


class Outcome(StrEnum):
    """How a pass ended."""

    TRAINED = "trained"  # a new version serves, made by this pass or staged by an earlier one
    NOTHING = "nothing"  # nothing to train on; no version was made
    STAGED_ONLY = "staged_only"  # a version waits for the proxy; the next pass promotes it first
    REJECTED = "rejected"  # the engine did not take the version; what was drained is given back
    GUARDED = "guarded"  # the guard saw a policy that gets worse: nothing trained, what was drained is used
    DRY_RUN = "dry_run"  # only looked


@dataclass(frozen=True, slots=True)
class TrainReport:
    """JSON-able: ``as_dict`` holds numbers, strings, lists and mappings only.

    ``counts``: ``rollouts, groups, transitions, rows, tokens, tokens_trained, given_back``; ``again``: of
    the rollouts, those that an earlier run trained on for another return; ``baseline_only``: others of
    their groups, compared with and not trained on. SFT has ``rows_by_reward, rows_by_demonstration``, DPO
    ``pairs_by_demonstration, pairs_by_group``.
    ``groups``: what became of groups, by method (``groups.GroupCounts``).
    ``left_out``: ``{"rollouts": {reason: n}, "calls": {reason: n}}`` (reasons: ``transitions.Reason``), with
    ``demonstrations`` and ``pairs`` where such were left out.
    ``failures``: what was seen and done by class of failure (``failures.FailureCounts``).
    ``metrics``: means over the optimiser's steps, and those of the first step under ``first``;
    DPO's on all pairs after the last step under ``after``.
    ``logprob_difference``: engine's against trainer's logprobs of tokens sampled by the parent
    version, before the update: ``max, mean, tokens``; ``None`` where there were no such tokens.
    """

    outcome: Outcome
    policy: str
    message: str
    version: int | None = None
    algorithm: str = "rl"
    parent: int | None = None
    run_id: int | None = None
    work: str | None = None  # names the weights it began with, what it drained and its settings
    resumed_version: int | None = None  # staged by an earlier pass, promoted by this one
    counts: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    failures: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    grouped_by: Mapping[str, int] = field(default_factory=dict)  # method -> rollouts
    policy_versions: Mapping[str, int] = field(default_factory=dict)  # version that sampled -> transitions
    drift: Mapping[str, int] = field(default_factory=dict)  # calls by how they go on from earlier ones
    reward_mean: float | None = None  # of all rollouts drained that have one
    automatic: Mapping[str, int] = field(default_factory=dict)  # rollouts judged, rewards entered, failed
    # mean, std, min, max and count of the returns of what the parent version made, trained on or not
    rewards: Mapping[str, float] | None = None
    advantages: Mapping[str, float] | None = None  # mean, std, min, max: of each rollout, each once
    metrics: Mapping[str, Any] = field(default_factory=dict)
    logprob_difference: Mapping[str, float] | None = None
    entropy: float | None = None  # mean of -logprob of the trained tokens: estimates it, in nats
    optimizer: str | None = None  # "carried over", or why it began anew
    promotion: Mapping[str, Any] | None = None  # the proxy's answer
    seconds: Mapping[str, float] = field(default_factory=dict)  # per phase

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"outcome": self.outcome.value}


class Stopwatch:
    """Seconds per phase of a pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent in here to the phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)
