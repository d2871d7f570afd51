"""Policy versions compared by the returns of the rollouts that they answered, as the ledger is now."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Literal

import orjson

from lightning_proxy.errors import InvalidInput, UnknownTarget
from lightning_proxy.store.intervals import Estimate, Returns, Sample, difference_of, mean_of
from lightning_proxy.store.records import INFRASTRUCTURE, ErrorClass, PolicyVersion, VersionStatus
from lightning_proxy.store.returns import RewardRule, total
from lightning_proxy.store.runs import Runs

Against = int | Literal["first", "parent"]

_FAULTS = ", ".join(f"'{each.value}'" for each in sorted(INFRASTRUCTURE - {ErrorClass.TIMEOUT}))
# A row for each value that counts, and one for a rollout without any, rollout by rollout.
#
# Answered: rollouts with a call in their last attempt that the policy answered. Of the task pool, those that
# have ended, as for training. A fault by which one failed is the infrastructure's, as for training too
# (`failed_by_infrastructure`). Counting: the last value for each target and name; SQLite fills the other
# columns from the row that has the maximum.
_PAYMENTS = f"""
WITH calls AS MATERIALIZED (
  SELECT rollout_id, attempt,
    min(min(policy_version), min(policy_version_end)) AS first,
    max(max(policy_version), max(policy_version_end)) AS last,
    count(policy_version) + count(policy_version_end) = 2 * count(*) AS told
  FROM spans WHERE policy = :policy AND error_class IS NULL GROUP BY rollout_id, attempt
), answered AS MATERIALIZED (
  SELECT calls.*,
    r.state = 'failed' AND (r.error_class IN ({_FAULTS}) OR (r.error_class = 'timeout' AND 'timeout' = (
      SELECT e.error_class FROM spans AS e WHERE e.rollout_id = r.rollout_id AND e.attempt = calls.attempt
        AND e.error_class IS NOT 'client_disconnect' ORDER BY e.ended_at DESC, e.span_id DESC LIMIT 1
    ))) AS faulty
  FROM calls CROSS JOIN rollouts AS r ON r.rollout_id = calls.rollout_id AND r.created_at >= :since
  WHERE NOT EXISTS (SELECT 1 FROM attempts AS a
                    WHERE a.rollout_id = calls.rollout_id AND a.number > calls.attempt)
    AND NOT EXISTS (SELECT 1 FROM task_rollouts AS p
                    WHERE p.rollout_id = calls.rollout_id AND p.state IN ('running', 'waiting'))
), counting AS MATERIALIZED (
  SELECT rollout_id, attempt, span_id, name, value, max(reward_id) FROM rewards
  WHERE value IS NOT NULL AND (:reward IS NULL OR name = :reward)
    AND name NOT IN (SELECT value FROM json_each(:ignored))
  GROUP BY rollout_id, attempt, span_id, name
)
SELECT answered.rollout_id, c.name, c.value, answered.first, answered.last, answered.told, answered.faulty
FROM answered LEFT JOIN counting AS c ON c.rollout_id = answered.rollout_id
  AND (c.attempt IS NULL OR c.attempt = answered.attempt)
  AND (c.span_id IS NULL
       OR (SELECT s.attempt FROM spans AS s WHERE s.span_id = c.span_id) = answered.attempt)
ORDER BY answered.rollout_id"""
_ROLLOUT, _NAME, _VALUE = range(3)  # columns by number: faster than by name, and there are many rows


@dataclass(frozen=True, slots=True)
class VersionReturns:
    """How the rollouts went that one version answered; without a number, those of no single one."""

    version: int | None
    status: VersionStatus | None  # None: it is not among the policy's versions
    rollouts: int
    rewarded: int  # of these, those that have a return
    share: float | None  # of the rollouts that are rewarded
    mean: Estimate | None = None  # of the returns
    against: int | None = None  # the version that it is compared with
    difference: Estimate | None = None  # of its mean to that one's


@dataclass(frozen=True, slots=True)
class Comparison:
    """The versions of a policy, first to last."""

    policy: str
    versions: tuple[VersionReturns, ...]
    mixed: VersionReturns  # rollouts that several versions answered: nobody's
    unknown: VersionReturns  # with a call of which it is not known which version answered it
    faulty: int  # rollouts that failed by a fault of engine, network or proxy: counted nowhere else
    two_valued: bool  # there are no more than two different returns
    since: float | None = None
    reward: str | None = None


@dataclass(slots=True)
class _Seen:
    """Rollouts that the same version answered, and how often there is each return."""

    rollouts: int = 0
    returns: Counter[float] = field(default_factory=Counter)


_Whose = int | Literal["mixed", "unknown", "faulty"]  # of a version, or of none


class Comparisons(Runs):
    """The comparing part of the store."""

    def compare_versions(
        self, policy: str, *, against: Against = "first", since: float = 0.0, reward: str | None = None
    ) -> Comparison:
        """Mean returns of the versions of a policy, and their differences, with 95% intervals.

        A rollout belongs to the version that answered its calls (those to the policy, in its last attempt,
        that ended well). ``against``: a version, each one's ``parent``, or the ``first`` that has a return.
        ``since``: rollouts that began then or later. ``reward``: this reward alone, as it was posted, without
        weight and direction. Raises ``UnknownTarget`` for a policy or a version that is not there.
        """
        seen = self._seen(policy, since, reward)
        known = {version.version: version for version in self.list_versions(policy)}
        numbers = sorted({*known, *(whose for whose in seen if isinstance(whose, int))})
        if not (numbers or seen or self.row("SELECT 1 FROM spans WHERE policy = ? LIMIT 1", (policy,))):
            raise UnknownTarget(f"there is neither a version of a policy {policy!r} nor a call to it")
        if isinstance(against, int) and against not in numbers:
            raise UnknownTarget(f"no version {against} of the policy {policy!r}")
        faulty = seen.pop("faulty", _Seen()).rollouts
        returns = Returns.of(value for each in seen.values() for value in each.returns)
        samples = {whose: Sample.of(each.returns) for whose, each in seen.items()}
        first = next((number for number in numbers if samples.get(number)), None)
        bases = {number: _base(against, known.get(number), first) for number in numbers}
        return Comparison(
            policy,
            tuple(
                _row(known.get(number), number, seen[number], returns, base, samples.get(base))
                for number, base in bases.items()
            ),
            mixed=_row(None, None, seen["mixed"], returns),
            unknown=_row(None, None, seen["unknown"], returns),
            faulty=faulty,
            two_valued=returns.two_valued,
            since=since or None,
            reward=reward,
        )

    def _seen(self, policy: str, since: float, reward: str | None) -> defaultdict[_Whose | None, _Seen]:
        # A reward that is looked at alone counts as it is, whatever its weight.
        rule = self.rule if reward is None else RewardRule()
        ignored = orjson.dumps(rule.ignored).decode()
        asked = {"policy": policy, "since": since, "reward": reward, "ignored": ignored}
        seen: defaultdict[_Whose | None, _Seen] = defaultdict(_Seen)
        for _, rows in groupby(self.each(_PAYMENTS, asked), itemgetter(_ROLLOUT)):
            first, *others = rows
            of = seen[_whose(first)]
            of.rollouts += 1
            value = total(
                rule.weight_of(row[_NAME]) * row[_VALUE] for row in (first, *others) if row[_NAME] is not None
            )
            if value is not None:
                of.returns[value] += 1
        return seen


def against_from(text: str) -> Against:
    """What versions are compared with, as somebody wrote it. Raises ``InvalidInput``."""
    match text:
        case "first" | "parent":
            return text
        case _ if text.isdecimal() and len(text) < 18:
            return int(text)
    raise InvalidInput(f"versions are compared with 'first', 'parent' or a number, not with {text!r:.80}")


def _whose(row: sqlite3.Row) -> _Whose:
    if row["faulty"]:
        return "faulty"
    if not row["told"]:
        return "unknown"
    first: int = row["first"]
    return first if first == row["last"] else "mixed"


def _base(against: Against, version: PolicyVersion | None, first: int | None) -> int | None:
    if against == "parent":
        return None if version is None else version.parent
    return first if against == "first" else against


def _row(
    version: PolicyVersion | None,
    number: int | None,
    seen: _Seen,
    returns: Returns,
    against: int | None = None,
    base: Sample | None = None,
) -> VersionReturns:
    sample = Sample.of(seen.returns)
    compared = number != against
    return VersionReturns(
        version=number,
        status=None if version is None else version.status,
        rollouts=seen.rollouts,
        rewarded=seen.returns.total(),
        share=seen.returns.total() / seen.rollouts if seen.rollouts else None,
        mean=None if sample is None else mean_of(sample, returns),
        against=against if compared else None,
        difference=difference_of(sample, base, returns) if compared and sample and base else None,
    )
