"""Walks the store in order, in bounded memory, by what one selects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_proxy.store import Attempt, Fidelity, Reward, Rollout, RolloutState, Span, Store

_PAGE = 200  # rollouts read at a time


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rollouts, and which of their spans. What is not given selects everything.

    ``since`` and ``until`` are of the rollout's beginning (Unix seconds, the latter exclusive).
    A rollout has all of its rewards, whichever of its spans are selected.
    """

    since: float | None = None
    until: float | None = None
    rollout_ids: frozenset[str] = frozenset()
    task_ids: frozenset[str] = frozenset()
    states: frozenset[RolloutState] = frozenset()
    min_reward: float | None = None  # of the attempt: the sum of what counts; without a reward it is out
    rewarded: bool = False  # only those with a reward
    roles: frozenset[str] = frozenset()
    policy: str | None = None
    versions: frozenset[int] = frozenset()
    fidelities: frozenset[Fidelity] = frozenset()
    last_attempt_only: bool = False

    def takes_rollout(self, rollout: Rollout) -> bool:
        """By what its row says."""
        return (
            (not self.rollout_ids or rollout.rollout_id in self.rollout_ids)
            and (not self.task_ids or rollout.task_id in self.task_ids)
            and (not self.states or rollout.state in self.states)
        )

    def takes_reward(self, reward: float | None) -> bool:
        """By the return of an attempt; ``None``: it has no reward."""
        if reward is None:
            return not self.rewarded and self.min_reward is None
        return self.min_reward is None or reward >= self.min_reward

    def takes_span(self, span: Span) -> bool:
        """By the span itself."""
        return (
            (not self.roles or span.role in self.roles)
            and (self.policy is None or span.policy == self.policy)
            and (not self.versions or span.policy_version in self.versions)
            and (not self.fidelities or span.fidelity in self.fidelities)
        )

    @property
    def all_spans(self) -> bool:
        """Whether every span of a rollout is taken."""
        return not (self.roles or self.policy is not None or self.versions or self.fidelities)


@dataclass(frozen=True, slots=True)
class RecordedAttempt:
    """One attempt with its rewards; its spans are read as they are wanted."""

    rollout: Rollout
    attempt: Attempt
    is_last: bool
    ledger: tuple[Reward, ...]  # every reward of the rollout, oldest first
    counting: tuple[Reward, ...]  # those that count for this attempt
    reward: float | None  # its return: what these make by the settings' weights; None: there is none


def demonstration_of(reward: Reward) -> str | None:
    """What would have been right, as whoever rewarded has said: a text, or the text of a message."""
    given: Any = reward.demonstration
    if isinstance(given, Mapping):
        given = given.get("content")
    return given if isinstance(given, str) and given else None


def attempts(store: Store, selection: Selection) -> Iterator[RecordedAttempt]:
    """The attempts of the selected rollouts, oldest rollout first, one at a time."""
    after: tuple[float, str] | None = None
    while page := store.rollouts_after(after, since=selection.since, until=selection.until, limit=_PAGE):
        for rollout in page:
            if selection.takes_rollout(rollout):
                yield from _attempts_of(store, rollout, selection)
        after = (page[-1].created_at, page[-1].rollout_id)


def _attempts_of(store: Store, rollout: Rollout, selection: Selection) -> Iterator[RecordedAttempt]:
    made = store.list_attempts(rollout.rollout_id)
    ledger = tuple(store.list_rewards(rollout.rollout_id))
    for attempt in made:
        is_last = attempt is made[-1]
        if selection.last_attempt_only and not is_last:
            continue
        counting = store.counting_rewards_of_attempt(rollout.rollout_id, attempt.number) if ledger else ()
        value = store.rule.return_of(counting)
        recorded = RecordedAttempt(rollout, attempt, is_last, ledger, counting, value)
        if selection.takes_reward(recorded.reward):
            yield recorded


def spans_of(store: Store, recorded: RecordedAttempt, selection: Selection) -> Iterator[Span]:
    """The selected spans of an attempt in the order in which they were started, some at a time."""
    for span in store.iterate_spans(recorded.rollout.rollout_id, recorded.attempt.number):
        if selection.takes_span(span):
            yield span
