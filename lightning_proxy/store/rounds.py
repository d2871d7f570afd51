"""Rounds of the task pool as training sees them: whether more of a group is to come.

A round is GRPO's group. What has ended of it waits for the others, so that all of it is compared at once
and mean and deviation are those of the whole group. It waits for rollouts that an agent carries out, for
those that are still to be handed out (for the first time or again), and for rewards of those that
succeeded. It does not wait for what failed for good or was cancelled, nor for what made no call to the
policy.

Nothing waits for ever: a rollout that is carried out is waited for as long as its lease is kept, everything
else for ``RewardRule.wait_s`` seconds since the round last gave a sign of life. What comes after that is
compared with what was consumed before (``Runs.recent_members``).
"""

from __future__ import annotations

import time

import orjson

from lightning_proxy.store.rewards import Rewards

# How many rollouts of its present round a task still lacks; those that wait for an attempt are there.
LACKING = """(t.group_size - (SELECT count(*) FROM task_rollouts AS p
  WHERE p.task_id = t.task_id AND p.round = t.round AND p.state <> 'cancelled'))"""
# A value for that attempt, for one of its spans, or for the rollout as a whole.
REWARDED = """
EXISTS (SELECT 1 FROM rewards AS w LEFT JOIN spans AS s ON s.span_id = w.span_id
        WHERE w.rollout_id = r.rollout_id AND (w.attempt IS NULL OR w.attempt = a.number)
          AND (s.span_id IS NULL OR s.attempt = a.number)
          AND w.value IS NOT NULL AND w.name NOT IN (SELECT value FROM json_each(:ignored)))
"""
# Kept leases decide alone; the other reasons count while the round gives signs of life.
_OPEN = f"""
SELECT EXISTS (SELECT 1 FROM task_rollouts AS m WHERE m.task_id = :task_id AND m.round = :round
               AND m.state = 'running' AND m.lease_expires_at > :since)
OR EXISTS (SELECT 1 FROM task_rollouts AS m WHERE m.task_id = :task_id AND m.round = :round
           AND coalesce(m.ended_at, m.alive_at) > :since)
AND (EXISTS (SELECT 1 FROM task_rollouts AS m WHERE m.task_id = :task_id AND m.round = :round
             AND m.state = 'waiting')
  OR EXISTS (SELECT 1 FROM tasks AS t WHERE t.task_id = :task_id AND t.round = :round AND t.state = 'open'
             AND {LACKING} > 0)
  OR EXISTS (SELECT 1 FROM task_rollouts AS m
             CROSS JOIN rollouts AS r ON r.rollout_id = m.rollout_id
             CROSS JOIN attempts AS a ON a.rollout_id = m.rollout_id AND a.number = m.attempt
             WHERE m.task_id = :task_id AND m.round = :round AND m.state = 'succeeded' AND NOT {REWARDED}
               AND EXISTS (SELECT 1 FROM spans AS s WHERE s.rollout_id = m.rollout_id
                           AND s.attempt = m.attempt AND s.policy = :policy)))
"""


class Rounds(Rewards):
    """The part of the store that knows which rounds have ended for training."""

    def round_is_open(self, policy: str, task_id: str, round_: int) -> bool:
        """Whether more of a round is to come that the policy may be trained on."""
        asked = {
            "policy": policy,
            "task_id": task_id,
            "round": round_,
            "since": time.time() - self.rule.wait_s,
            "ignored": orjson.dumps(self.rule.ignored).decode(),
        }
        return bool(self.scalar(_OPEN, asked))
