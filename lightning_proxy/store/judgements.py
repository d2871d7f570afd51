"""Which rollouts automatic rewards have been entered for: each of them once, whatever dies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_proxy.store.rounds import REWARDED
from lightning_proxy.store.runs import OF_POLICY, Runs
from lightning_proxy.words import RolloutState

_LAST_SPAN = """
(SELECT max(s.span_id) FROM spans AS s WHERE s.rollout_id = r.rollout_id AND s.attempt = a.number)"""
# What has ended, would be drained as it is, or is silent; not consumed, and not judged as it is now.
_UNJUDGED = f"""
SELECT r.rollout_id, r.state, a.number, {_LAST_SPAN} AS last_span_id
{OF_POLICY} AND c.run_id IS NULL
  AND NOT EXISTS (SELECT 1 FROM judgements AS j WHERE j.rollout_id = r.rollout_id AND j.attempt = a.number
                  AND j.kinds = :kinds AND j.state = r.state AND j.last_span_id >= {_LAST_SPAN})
  AND (r.state <> 'open' OR {REWARDED}
       OR NOT EXISTS (SELECT 1 FROM spans AS s WHERE s.rollout_id = r.rollout_id AND s.attempt = a.number
                      AND s.ended_at > :quiet_since))
ORDER BY r.created_at, r.rollout_id"""


@dataclass(frozen=True, slots=True)
class Unjudged:
    """The last attempt of a rollout as it stands: up to this call, in this state."""

    rollout_id: str
    attempt: int
    last_span_id: int
    state: RolloutState


class Judgements(Runs):
    """The automatic rewards' part of the store."""

    def unjudged(self, policy: str, *, kinds: str, quiet_since: float) -> list[Unjudged]:
        """Rollouts of the policy, oldest first, that no run has consumed and that these kinds of automatic
        rewards are missing for.

        Those that have ended, that have a reward already, or whose last call ended before ``quiet_since``
        (Unix time). One that had more calls or ended since it was judged is there again.
        """
        named = {**self.named(policy), "kinds": kinds, "quiet_since": quiet_since}
        return [
            Unjudged(row["rollout_id"], row["number"], row["last_span_id"], RolloutState(row["state"]))
            for row in self.rows(_UNJUDGED, named)
        ]

    def enter_judgement(self, judged: Unjudged, kinds: str, rewards: Sequence[Mapping[str, Any]]) -> int:
        """Enter the rewards and that they were entered, in one transaction; returns how many are new."""
        with self.transaction():
            entered = self.add_rewards(rewards)
            self.connection.execute(
                "INSERT OR REPLACE INTO judgements (rollout_id, attempt, kinds, last_span_id, state) "
                "VALUES (?, ?, ?, ?, ?)",
                (judged.rollout_id, judged.attempt, kinds, judged.last_span_id, judged.state.value),
            )
        return sum(created for _, created in entered)
