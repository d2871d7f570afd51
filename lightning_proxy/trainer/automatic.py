"""Rewards from what is in the traffic already, entered into the ledger before a pass drains.

Tool failures are the automatic intermediate rewards of Agent Lightning (arXiv 2508.03680, section on
AIR): a reward for the call that asked for the tool, by the status that came back. They are entries like any
other: visible, durable, and corrected by posting the same name again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_proxy.config.settings import AutomaticRewardSettings
from lightning_proxy.store import ErrorClass, RolloutState, Span, Store, Unjudged
from lightning_proxy.trainer.failures import classes_of
from lightning_proxy.trainer.judged import Judge, as_plain, load_judge

SOURCE = "automatic"
_MOST_TOLD = 10  # failures of the user's function that are told one by one


@dataclass(slots=True)
class Entered:
    """What was done: rollouts judged, rewards entered, rollouts that the user's function failed on."""

    judged: int = 0
    rewards: int = 0
    failed: int = 0


class AutomaticRewards:
    """The kinds of automatic rewards that are switched on."""

    def __init__(self, settings: AutomaticRewardSettings, store: Store) -> None:
        """Raises ``ConfigError`` where the user's function cannot be loaded."""
        self._settings = settings
        self._store = store
        self._judge: Judge | None = load_judge(settings.function) if settings.function else None
        self._by_finding = {
            error_class: (name, value)
            for error_class, name, value in (
                (ErrorClass.TOOL_FAILURE, "tool_error", settings.tool_error),
                (ErrorClass.MALFORMED_TOOL_CALL, "malformed_tool_call", settings.malformed_tool_call),
                (ErrorClass.TRUNCATED, "truncated", settings.truncated),
            )
            if value
        }
        kinds = [name for name, _ in self._by_finding.values()]
        kinds += ["exit_code"] if settings.exit_code else []
        kinds += [settings.function] if settings.function else []
        self._kinds = " ".join(kinds)

    @property
    def on(self) -> bool:
        """Whether any kind is switched on."""
        return bool(self._kinds)

    def enter(self, policy: str, say: Callable[[str], None]) -> Entered:
        """Enter what is missing for rollouts that have ended, are rewarded, or have been quiet for long;
        ``say`` gets lines about it.

        What the user's function raises is said with the rollout's id; that rollout gets its other rewards,
        and the function is asked again in the next pass.
        """
        done = Entered()
        quiet_since = time.time() - self._settings.quiet_s
        for each in self._store.unjudged(policy, kinds=self._kinds, quiet_since=quiet_since):
            spans = self._store.spans_of_attempt(each.rollout_id, each.attempt)
            rewards = [*self._of_calls(spans), *self._of_the_end(each)]
            done.judged += 1
            try:
                rewards += self._of_the_function(each, spans)
            except Exception as error:  # noqa: BLE001  somebody's function may raise anything
                done.failed += 1
                if done.failed <= _MOST_TOLD:
                    why = f"{type(error).__name__}: {error}"
                    say(f"the reward function failed on rollout {each.rollout_id}: {why}")
                done.rewards += sum(created for _, created in self._store.add_rewards(rewards))
            else:
                done.rewards += self._store.enter_judgement(each, self._kinds, rewards)
        if done.judged:
            say(
                f"automatic rewards: {done.rewards} entered for {done.judged} rollouts"
                + (f", the function failed on {done.failed}" if done.failed else "")
            )
        return done

    def _of_calls(self, spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
        """Once for each call and kind, whatever the number of findings."""
        for position, classes in classes_of(spans).items():
            for error_class in self._by_finding.keys() & set(classes):
                name, value = self._by_finding[error_class]
                span_id = spans[position].span_id
                yield {
                    "span_id": span_id, "name": name, "value": value, "source": SOURCE,
                    "idempotency_key": f"{SOURCE}:{name}:{span_id}",
                }  # fmt: skip

    def _of_the_end(self, each: Unjudged) -> Iterator[dict[str, Any]]:
        """How the command ended, as the runner records it; one that was stopped says nothing."""
        value = {RolloutState.SUCCEEDED: 1.0, RolloutState.FAILED: 0.0}.get(each.state)
        if self._settings.exit_code and value is not None:
            yield _for_attempt(each, "exit_code", value)

    def _of_the_function(self, each: Unjudged, spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
        if self._judge is None:
            return
        store = self._store
        rewards = store.counting_rewards_of_attempt(each.rollout_id, each.attempt)
        plain = as_plain(store.get_rollout(each.rollout_id), each.attempt, spans, rewards)
        for name, value in self._judge(plain).items():
            yield _for_attempt(each, name, value)


def _for_attempt(each: Unjudged, name: str, value: float) -> dict[str, Any]:
    # With the last call and the state, so that a judgement of what went on corrects the one before.
    key = f"{SOURCE}:{name}:{each.rollout_id}:{each.attempt}:{each.last_span_id}:{each.state.value}"
    return {
        "rollout_id": each.rollout_id, "attempt": each.attempt, "name": name, "value": value,
        "source": SOURCE, "idempotency_key": key,
    }  # fmt: skip
