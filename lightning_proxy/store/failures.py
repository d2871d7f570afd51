"""Failed rollouts and failures in numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from lightning_proxy.errors import InvalidInput
from lightning_proxy.store.causes import root_cause
from lightning_proxy.store.records import ErrorClass, FailureExample, FailureSummary, Rollout
from lightning_proxy.store.runs import Runs
from lightning_proxy.words import RolloutState

By = Literal["role", "model", "policy_version"]

_LAST_CALLS = 8  # parallel ones that were cut off included
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}

# Whatever failed since :since, as (class, call or not, span, rollout, time, message, part). Calls from span
# :first on: an index by time would cost every call something, and a bisection costs nothing.
_EVENTS = """
WITH events AS (
  SELECT error_class AS class, 1 AS call, span_id, rollout_id, ended_at AS at, error AS message,
    {part} AS part
  FROM spans WHERE error_class IS NOT NULL AND span_id >= :first AND ended_at >= :since
  UNION ALL
  SELECT f.error_class, 1, f.span_id, spans.rollout_id, f.at, f.detail, {part}
  FROM findings AS f JOIN spans USING (span_id) WHERE f.span_id >= :first AND f.at >= :since
  UNION ALL
  SELECT r.error_class, 0, NULL, r.rollout_id, r.ended_at, r.reason,
    (SELECT {part} FROM spans WHERE spans.rollout_id = r.rollout_id ORDER BY span_id DESC LIMIT 1)
  FROM rollouts AS r WHERE r.error_class IS NOT NULL AND r.ended_at >= :since
)
"""
_COUNTS = """
SELECT class, part, sum(call) AS calls, count(DISTINCT rollout_id) AS rollouts, sum(1 - call) AS failed
FROM events GROUP BY class, part ORDER BY count(*) DESC, class, part"""
# SQLite fills the other columns from the row that has the minimum, or the maximum.
_FIRST = "SELECT class, part, min(at) AS at, span_id, rollout_id, message FROM events GROUP BY class, part"
_LAST = "SELECT class, part, max(at) AS at, span_id, rollout_id, message FROM events GROUP BY class, part"


class Failures(Runs):
    """The failures' part of the store."""

    def fail_rollout(
        self,
        rollout_id: str,
        reason: str | None = None,
        error_class: ErrorClass | None = None,
        *,
        presumed: bool = False,
    ) -> Rollout:
        """End a rollout as failed, by its root cause: see :func:`root_cause`.

        Raises as :meth:`finish_rollout`.
        """
        with self.transaction():
            last = self.scalar("SELECT max(number) FROM attempts WHERE rollout_id = ?", (rollout_id,))
            cause, why = self.cause_of_failure(rollout_id, last, error_class, reason)
            return self.finish_rollout(rollout_id, RolloutState.FAILED, why, cause, presumed=presumed)

    def cause_of_failure(
        self, rollout_id: str, attempt: int, error_class: ErrorClass | None, reason: str | None
    ) -> tuple[ErrorClass | None, str | None]:
        """Class and reason of a failed attempt, of which these are told: see :func:`root_cause`."""
        spans = self._spans(
            "SELECT * FROM spans WHERE rollout_id = ? AND attempt = ? ORDER BY span_id DESC LIMIT ?",
            (rollout_id, attempt, _LAST_CALLS),
            content=False,
        )
        return root_cause(error_class, reason, spans)

    def fallen_silent(self, before: float, limit: int) -> tuple[list[str], bool]:
        """Rollouts whose last call ended before ``before``, that are open and have no reward.

        Each call is looked at once, when it has become that old: the second value says whether more
        wait than the ``limit`` calls that were. To be called in a transaction.
        """
        examined = self.scalar("SELECT examined FROM silence")
        rows = self.rows(
            "SELECT span_id, rollout_id, ended_at FROM spans WHERE span_id > ? ORDER BY span_id LIMIT ?",
            (examined, limit),
        )
        last: dict[str, int] = {}
        for row in rows:
            if row["ended_at"] > before:
                break
            examined = last[row["rollout_id"]] = row["span_id"]
        self.connection.execute("UPDATE silence SET examined = ?", (examined,))
        silent = [rollout_id for rollout_id, span_id in last.items() if self._is_silent(rollout_id, span_id)]
        return silent, bool(rows) and examined == rows[-1]["span_id"] and len(rows) == limit

    def _is_silent(self, rollout_id: str, span_id: int) -> bool:
        return bool(
            self.scalar(
                "SELECT 1 FROM rollouts AS r WHERE rollout_id = ? AND state = 'open' "
                "AND NOT EXISTS (SELECT 1 FROM spans AS s WHERE s.rollout_id = r.rollout_id AND span_id > ?) "
                "AND NOT EXISTS (SELECT 1 FROM rewards AS w WHERE w.rollout_id = r.rollout_id) "
                "AND NOT EXISTS (SELECT 1 FROM task_rollouts AS p WHERE p.rollout_id = r.rollout_id)",
                (rollout_id, span_id),
            )
        )

    def failures(self, *, since: float = 0.0, by: By | None = None) -> list[FailureSummary]:
        """What failed since then, most frequent class first; ``by`` tells roles, models or versions apart.

        Raises ``InvalidInput`` for any other ``by``.
        """
        if by is not None and by not in get_args(By):
            raise InvalidInput(f"failures are told apart by {', '.join(get_args(By))}, not by {by!r:.80}")
        first = self._first_span_since(since)
        asked: Mapping[str, Any] = {"first": first, "since": since}
        events = _EVENTS.format(part="NULL" if by is None else f"spans.{by}")
        calls = self.scalar("SELECT count(*) FROM spans WHERE span_id >= ?", (first,))
        examples = [
            {(row["class"], row["part"]): _example(row) for row in self.rows(events + sql, asked)}
            for sql in (_FIRST, _LAST)
        ]
        return [
            FailureSummary(
                error_class=row["class"],
                part=None if row["part"] is None else str(row["part"]),
                calls=row["calls"],
                rollouts=row["rollouts"],
                failed_rollouts=row["failed"],
                share=row["calls"] / calls if calls else 0.0,
                first=examples[0][row["class"], row["part"]],
                last=examples[1][row["class"], row["part"]],
            )
            for row in self.rows(events + _COUNTS, asked)
        ]

    def _first_span_since(self, since: float) -> int:
        """The first span that ended since then, by bisection: ids grow with time, all but exactly."""
        low, high = 1, (self.scalar("SELECT max(span_id) FROM spans") or 0) + 1
        while low < high and since > 0:
            middle = (low + high) // 2
            row = self.row(
                "SELECT ended_at FROM spans WHERE span_id >= ? ORDER BY span_id LIMIT 1", (middle,)
            )
            if row is not None and row["ended_at"] < since:
                low = middle + 1
            else:
                high = middle
        return low


def _example(row: Any) -> FailureExample:
    return FailureExample(row["at"], row["rollout_id"], row["span_id"], row["message"])


def seconds_of(text: str) -> float:
    """``90s``, ``30m``, ``24h``, ``30d`` or ``8w`` in seconds. Raises ``InvalidInput``."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhdw])", text.strip())
    if match is None:
        raise InvalidInput(f"{text[:40]!r} is no length of time: 90s, 30m, 24h, 30d or 8w would be one")
    return float(match[1]) * _UNITS[match[2]]
