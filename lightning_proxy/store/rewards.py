"""The ledger of rewards: it only grows, and the last of the same target and name counts."""

from __future__ import annotations

import math
import sqlite3
import time
from dataclasses import dataclass

from lightning_proxy.errors import InvalidInput, UnknownTarget
from lightning_proxy.store.records import Reward
from lightning_proxy.store.rollouts import check_attempt
from lightning_proxy.store.spans import Spans

_SPAN = "SELECT span_id, rollout_id, attempt FROM spans"


@dataclass(frozen=True, slots=True)
class _Target:
    rollout_id: str
    attempt: int | None = None
    span_id: int | None = None


class Rewards(Spans):
    """The rewards' part of the store."""

    def add_reward(
        self,
        *,
        value: float,
        rollout_id: str | None = None,
        response_id: str | None = None,
        span_id: int | None = None,
        attempt: int | None = None,
        name: str = "reward",
        source: str | None = None,
        comment: str | None = None,
        idempotency_key: str | None = None,
    ) -> tuple[Reward, bool]:
        """Enter a reward; true where it is new, false with the first one for a known ``idempotency_key``.

        The target is a rollout (with ``attempt``: that attempt), or the span with this id or with
        this id of its response. Raises ``InvalidInput`` for a value that is not a finite number or
        for more or fewer than one target, ``UnknownTarget`` saying what was looked for.
        """
        number = _finite(value)
        _check_target(rollout_id, response_id, span_id, attempt)
        _check_texts(name=name, source=source, comment=comment, idempotency_key=idempotency_key)
        if not name:
            raise InvalidInput("name must not be empty; leave it out for 'reward'")
        with self.transaction():
            if idempotency_key is not None:
                first = self.row("SELECT * FROM rewards WHERE idempotency_key = ?", (idempotency_key,))
                if first is not None:
                    return reward_from(first), False
            target = self._target(rollout_id, response_id, span_id, attempt)
            reward_id = self.connection.execute(
                "INSERT INTO rewards "
                "(rollout_id, attempt, span_id, name, value, source, comment, idempotency_key, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    target.rollout_id,
                    target.attempt,
                    target.span_id,
                    name,
                    number,
                    source,
                    comment,
                    idempotency_key,
                    time.time(),
                ),
            ).lastrowid
            row = self.row("SELECT * FROM rewards WHERE reward_id = ?", (reward_id,))
            assert row is not None  # inserted above, in this transaction
            return reward_from(row), True

    def list_rewards(self, rollout_id: str) -> list[Reward]:
        """All entries for a rollout, its attempts and its spans, oldest first."""
        rows = self.rows("SELECT * FROM rewards WHERE rollout_id = ? ORDER BY reward_id", (rollout_id,))
        return [reward_from(row) for row in rows]

    def counting_rewards(self, rollout_id: str) -> tuple[Reward, ...]:
        """The last entry for each attempt, span and name, in the order of their entry."""
        last: dict[tuple[int | None, int | None, str], Reward] = {}
        for reward in self.list_rewards(rollout_id):
            target = (reward.attempt, reward.span_id, reward.name)
            last.pop(target, None)  # so that the correction stands at its own place in the order
            last[target] = reward
        return tuple(last.values())

    def counting_rewards_of_attempt(self, rollout_id: str, attempt: int) -> tuple[Reward, ...]:
        """Those of :meth:`counting_rewards` that are not for another attempt or a span of another one."""
        others = {
            row["span_id"]
            for row in self.rows(
                "SELECT span_id FROM spans WHERE rollout_id = ? AND attempt <> ?", (rollout_id, attempt)
            )
        }
        return tuple(
            reward
            for reward in self.counting_rewards(rollout_id)
            if reward.attempt in (None, attempt) and reward.span_id not in others
        )

    def _target(
        self, rollout_id: str | None, response_id: str | None, span_id: int | None, attempt: int | None
    ) -> _Target:
        if rollout_id is not None:
            return self._rollout_target(rollout_id, attempt)
        if response_id is not None:
            looked_for = f"span with the response id {response_id!r}"
            row = self.row(f"{_SPAN} WHERE response_id = ? ORDER BY span_id DESC LIMIT 1", (response_id,))
        else:
            looked_for = f"span {span_id}"
            row = self.row(f"{_SPAN} WHERE span_id = ?", (span_id,))
        if row is None:
            raise UnknownTarget(f"no {looked_for}")
        if attempt not in (None, row["attempt"]):
            raise InvalidInput(f"the {looked_for} is of attempt {row['attempt']}, not of attempt {attempt}")
        # The attempt stays unset: a correction of this reward may name it or not.
        return _Target(row["rollout_id"], None, row["span_id"])

    def _rollout_target(self, rollout_id: str, attempt: int | None) -> _Target:
        self.get_rollout(rollout_id)
        if attempt is not None and not self.rows(
            "SELECT 1 FROM attempts WHERE rollout_id = ? AND number = ?", (rollout_id, attempt)
        ):
            raise UnknownTarget(f"rollout {rollout_id!r} has no attempt {attempt}")
        return _Target(rollout_id, attempt)


def reward_from(row: sqlite3.Row) -> Reward:
    """A row of ``rewards``."""
    return Reward(**dict(row))


def _finite(value: object) -> float:
    """``value`` as a float. Raises ``InvalidInput`` unless it is a finite number (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput(f"value must be a number, not {value!r:.80}")
    try:
        number = float(value)
    except OverflowError as error:
        raise InvalidInput("value must be a finite number; this one does not fit into a float") from error
    if not math.isfinite(number):
        raise InvalidInput(f"value must be a finite number, not {number!r}")
    return number


def _check_target(rollout_id: object, response_id: object, span_id: object, attempt: object) -> None:
    if sum(target is not None for target in (rollout_id, response_id, span_id)) != 1:
        raise InvalidInput("a reward needs exactly one of rollout_id, response_id and span_id")
    _check_texts(rollout_id=rollout_id, response_id=response_id)
    if span_id is not None and (not isinstance(span_id, int) or isinstance(span_id, bool)):
        raise InvalidInput(f"span_id must be a whole number, not {span_id!r:.80}")
    if attempt is not None:
        check_attempt(attempt)


def _check_texts(**texts: object) -> None:
    for field, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise InvalidInput(f"{field} must be a text, not {text!r:.80}")
