"""What the users of live traffic got, by the policy version that answered them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.live.users import Answered
from examples.report import draw_live
from lightning_proxy.store import Store
from lightning_proxy.store.intervals import Estimate, Returns, Sample, difference_of, mean_of

_RIGHT_OR_WRONG = Returns.of([0.0, 1.0])


@dataclass(frozen=True, slots=True)
class VersionReport:
    """Success of one version: every answer counts, with a thumb or without."""

    version: int
    answers: int
    right: int
    success: Estimate
    gain: Estimate  # against version 0


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the proxy recorded of an answer."""

    version: int  # that made its last token
    rollout_id: str


def by_version(answered: Sequence[Answered], recorded: Mapping[str, Recorded]) -> list[VersionReport]:
    """One report a version, in order; the first is what the others are compared with."""
    right: Counter[int] = Counter()
    count: Counter[int] = Counter()
    for answer in answered:
        version = recorded[answer.response_id].version
        count[version] += 1
        right[version] += answer.right
    samples = {v: Sample.of({1.0: right[v], 0.0: count[v] - right[v]}) for v in sorted(count)}
    known = {version: sample for version, sample in samples.items() if sample is not None}
    base = known[min(known)]
    return [
        VersionReport(
            version,
            count[version],
            right[version],
            mean_of(sample, _RIGHT_OR_WRONG),
            difference_of(sample, base, _RIGHT_OR_WRONG),
        )
        for version, sample in known.items()
    ]


def mixed_up(answered: Sequence[Answered], recorded: Mapping[str, Recorded]) -> int:
    """Answers that the proxy took for parts of one conversation with another one."""
    share = Counter(recorded[answer.response_id].rollout_id for answer in answered)
    return sum(count for count in share.values() if count > 1)


def recorded_answers(db: Path) -> dict[str, Recorded]:
    """By the answer's id."""
    with Store.open(db) as store:
        heads = store.list_spans(limit=10_000_000, content=False)
    return {
        span.response_id: Recorded(span.policy_version_end, span.rollout_id)
        for span in heads
        if span.response_id is not None and span.policy_version_end is not None
    }


def line_of(row: VersionReport) -> str:
    """One line of the report."""
    return (
        f"version {row.version:2d}: {row.right:4d} of {row.answers:4d} right, {_text(row.success)}; "
        f"against the first {row.gain.value:+.3f} [{row.gain.low:+.3f}, {row.gain.high:+.3f}]"
    )


def _text(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def save(workdir: Path, rows: Sequence[VersionReport], facts: Mapping[str, Any]) -> None:
    """live.json and live.png; ``facts`` says what else there is to know of the run."""
    whole = {**facts, "versions": [asdict(row) for row in rows]}
    (workdir / "live.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    draw_live(workdir / "live.png", [whole])
