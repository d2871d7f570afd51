"""What the users of live traffic got, by the policy version that answered them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
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
    """What the proxy recorded of the conversation that an answer ended."""

    rollout_id: str
    version: int | None  # that answered all of its calls; None: several, or it is not known


def by_version(answered: Sequence[Answered], recorded: Mapping[str, Recorded]) -> list[VersionReport]:
    """One report a version, in order; the first is what the others are compared with.

    As with ``lightning-proxy policies compare``, what several versions answered counts for none.
    """
    right: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for answer in answered:
        known = recorded.get(answer.response_id)
        if known is not None and known.version is not None:
            total[known.version] += 1
            right[known.version] += answer.right
    samples = {v: Sample.of({1.0: right[v], 0.0: total[v] - right[v]}) for v in sorted(total)}
    base = next(iter(samples.values()), None)
    return [
        VersionReport(
            version,
            total[version],
            right[version],
            mean_of(sample, _RIGHT_OR_WRONG),
            difference_of(sample, base, _RIGHT_OR_WRONG),
        )
        for version, sample in samples.items()
        if sample is not None and base is not None
    ]


def mixed_up(answered: Sequence[Answered], recorded: Mapping[str, Recorded]) -> int:
    """Answers that the proxy took for parts of one conversation with another one, or did not record."""
    known = [recorded.get(answer.response_id) for answer in answered]
    share = Counter(entry.rollout_id for entry in known if entry is not None)
    return sum(entry is None or share[entry.rollout_id] > 1 for entry in known)


def recorded_answers(db: Path) -> dict[str, Recorded]:
    """By the answer's id."""
    with Store.open(db) as store:
        heads = store.list_spans(limit=10_000_000, content=False)
    versions: defaultdict[str, set[int | None]] = defaultdict(set)
    for span in heads:
        versions[span.rollout_id] |= {span.policy_version, span.policy_version_end}
    only = {rollout: next(iter(seen)) if len(seen) == 1 else None for rollout, seen in versions.items()}
    return {
        span.response_id: Recorded(span.rollout_id, only[span.rollout_id])
        for span in heads
        if span.response_id is not None
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
