"""The ledger of rewards: it only grows, and the last value of the same target and name counts."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from lightning_proxy.errors import InvalidInput, RequestError, UnknownTarget
from lightning_proxy.store.records import Reward
from lightning_proxy.store.returns import RewardRule
from lightning_proxy.store.rollouts import check_attempt
from lightning_proxy.store.spans import Spans

_SPAN = "SELECT span_id, rollout_id, attempt FROM spans"
_ADD_REWARD = """
INSERT INTO rewards (rollout_id, attempt, span_id, name, value, source, comment, idempotency_key,
  created_at, demonstration) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
# An entry that a later one of the same target and name replaces is left out.
_DEMONSTRATIONS = """
SELECT * FROM rewards AS w WHERE w.demonstration IS NOT NULL AND w.reward_id > ?
  AND NOT EXISTS (
    SELECT 1 FROM rewards AS later WHERE later.rollout_id = w.rollout_id AND later.reward_id > w.reward_id
      AND later.attempt IS w.attempt AND later.span_id IS w.span_id AND later.name = w.name
      AND later.demonstration IS NOT NULL)
ORDER BY w.reward_id LIMIT ?"""


@dataclass(frozen=True, slots=True)
class _Target:
    rollout_id: str
    attempt: int | None = None
    span_id: int | None = None


class Rewards(Spans):
    """The rewards' part of the store."""

    rule: RewardRule = RewardRule()  # set by whoever opens the store with settings at hand

    def add_reward(
        self,
        *,
        value: float | None = None,
        rollout_id: str | None = None,
        response_id: str | None = None,
        span_id: int | None = None,
        attempt: int | None = None,
        name: str = "reward",
        source: str | None = None,
        comment: str | None = None,
        demonstration: str | Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> tuple[Reward, bool]:
        """Enter a reward; true where it is new, false with the first one for a known ``idempotency_key``.

        The target is a rollout (with ``attempt``: that attempt), or the span with this id or with
        this id of its response. A comment or a demonstration (a text, or a message) may stand without a
        value. Raises ``InvalidInput`` for a value that is not a finite number or for more or fewer than
        one target, ``UnknownTarget`` saying what was looked for.
        """
        number = None if value is None else _finite(value)
        _check_target(rollout_id, response_id, span_id, attempt)
        _check_texts(name=name, source=source, comment=comment, idempotency_key=idempotency_key)
        if not name:
            raise InvalidInput("name must not be empty; leave it out for 'reward'")
        shown = None if demonstration is None else _encoded(demonstration)
        if number is None and comment is None and shown is None:
            raise InvalidInput("a reward needs a value, a comment or a demonstration")
        with self.transaction():
            if idempotency_key is not None:
                first = self.row("SELECT * FROM rewards WHERE idempotency_key = ?", (idempotency_key,))
                if first is not None:
                    return reward_from(first), False
            target = self._target(rollout_id, response_id, span_id, attempt)
            now = time.time()
            reward_id = self.connection.execute(
                _ADD_REWARD,
                (target.rollout_id, target.attempt, target.span_id, name, number, source, comment,
                 idempotency_key, now, shown),
            ).lastrowid  # fmt: skip
        return (
            Reward(
                target.rollout_id, number, reward_id, target.attempt, target.span_id, name, source, comment,
                idempotency_key, now, demonstration,
            ),
            True,
        )  # fmt: skip

    def add_rewards(self, many: Sequence[Mapping[str, Any]]) -> list[tuple[Reward, bool]]:
        """Enter all of them, in order, or none: each is the arguments of :meth:`add_reward`.

        Raises as that does, with the place in the list.
        """
        entered = []
        with self.transaction():
            for place, one in enumerate(many):
                try:
                    entered.append(self.add_reward(**one))
                except RequestError as error:
                    raise type(error)(f"rewards[{place}]: {error}") from None
        return entered

    def list_rewards(self, rollout_id: str) -> list[Reward]:
        """All entries for a rollout, its attempts and its spans, oldest first."""
        rows = self.rows("SELECT * FROM rewards WHERE rollout_id = ? ORDER BY reward_id", (rollout_id,))
        return [reward_from(row) for row in rows]

    def demonstrations(self, *, after: int = 0, limit: int = 1000) -> list[Reward]:
        """Entries that say what would have been right, oldest first; ``after`` is the id to go on from.

        Of the same target and name, the last one.
        """
        return [reward_from(row) for row in self.rows(_DEMONSTRATIONS, (after, limit))]

    def counting_rewards(self, rollout_id: str, until: int | None = None) -> tuple[Reward, ...]:
        """The last value for each attempt, span and name, in the order of their entry.

        ``until``: as it was when this was the ledger's last entry for the rollout.
        """
        last: dict[tuple[int | None, int | None, str], Reward] = {}
        for reward in self._valued(rollout_id, until):
            target = (reward.attempt, reward.span_id, reward.name)
            last.pop(target, None)  # so that the correction stands at its own place in the order
            last[target] = reward
        return tuple(last.values())

    def _valued(self, rollout_id: str, until: int | None) -> Iterator[Reward]:
        for reward in self.list_rewards(rollout_id):
            assert reward.reward_id is not None  # read from the table
            if reward.value is not None and (until is None or reward.reward_id <= until):
                yield reward

    def counting_rewards_of_attempt(
        self, rollout_id: str, attempt: int, until: int | None = None
    ) -> tuple[Reward, ...]:
        """Those of :meth:`counting_rewards` that are not for another attempt or a span of another one."""
        return tuple(self._of_attempt(self.counting_rewards(rollout_id, until), rollout_id, attempt))

    def demonstrations_of_attempt(
        self, rollout_id: str, attempt: int, *, after: int = 0
    ) -> tuple[Reward, ...]:
        """The last demonstration for each target and name, unless it is the one that was so at ``after``."""
        before: dict[tuple[int | None, int | None, str], object] = {}
        found: dict[tuple[int | None, int | None, str], Reward] = {}
        for reward in self._of_attempt(self.list_rewards(rollout_id), rollout_id, attempt):
            if reward.demonstration is None:
                continue
            target = (reward.attempt, reward.span_id, reward.name)
            if reward.reward_id is not None and reward.reward_id <= after:
                before[target] = reward.demonstration
            else:
                found[target] = reward
        return tuple(reward for target, reward in found.items() if before.get(target) != reward.demonstration)

    def _of_attempt(self, rewards: Iterable[Reward], rollout_id: str, attempt: int) -> Iterator[Reward]:
        """Those that are not for another attempt or a span of another one."""
        others = {
            row["span_id"]
            for row in self.rows(
                "SELECT span_id FROM spans WHERE rollout_id = ? AND attempt <> ?", (rollout_id, attempt)
            )
        }
        for reward in rewards:
            if reward.attempt in (None, attempt) and reward.span_id not in others:
                yield reward

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
    values = dict(row)
    if values["demonstration"] is not None:
        values["demonstration"] = orjson.loads(values["demonstration"])
    return Reward(**values)


def _finite(value: object) -> float:
    """``value`` as a float. Raises ``InvalidInput`` unless it is a finite number (a bool is none)."""
    if isinstance(value, bool):
        raise InvalidInput(
            f"value must be a number, not {str(value).lower()}; for a user's verdict send thumb: up or down"
        )
    if not isinstance(value, int | float):
        raise InvalidInput(f"value must be a number, not {value!r:.80}")
    try:
        number = float(value)
    except OverflowError as error:
        raise InvalidInput("value must be a finite number; this one does not fit into a float") from error
    if not math.isfinite(number):
        raise InvalidInput(f"value must be a finite number, not {number!r}")
    return number


def _encoded(demonstration: object) -> str:
    """A demonstration as JSON. Raises ``InvalidInput`` unless it is a text or a message."""
    if isinstance(demonstration, Mapping):
        if not isinstance(demonstration.get("role"), str):
            raise InvalidInput(
                'a demonstration that is an object is a message: {"role": ..., "content": ...}'
            )
    elif not isinstance(demonstration, str):
        raise InvalidInput(f"demonstration must be a text or a message, not {demonstration!r:.80}")
    try:
        return orjson.dumps(demonstration).decode()
    except TypeError as error:
        raise InvalidInput(f"the demonstration is no JSON: {error}") from error


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
