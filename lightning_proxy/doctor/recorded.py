"""Calls, rewards, runs, and what a pass would find."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from lightning_proxy.config import Settings
from lightning_proxy.doctor.finding import Finding, note, ok, problem
from lightning_proxy.errors import LightningError
from lightning_proxy.store import Fidelity, RunState, Store

_LATEST = 200  # calls
_MANY = 0.1  # share of them


def calls(store: Store) -> Iterator[Finding]:
    """The latest: how exactly they were recorded, how surely told apart, and how they ended."""
    latest = store.list_spans(limit=_LATEST, content=False)
    if not latest:
        yield note("calls", "none is recorded", "point an agent at the proxy: OPENAI_BASE_URL=.../v1")
        return
    ago = max(0.0, time.time() - latest[0].ended_at)
    yield ok("calls", f"the newest ended {_ago(ago)} ago; the latest {len(latest)} are looked at")
    well = [span for span in latest if span.error_class is None]
    failed = Counter(str(span.error_class) for span in latest if span.error_class is not None)
    if failed.total() > _MANY * len(latest):
        what = ", ".join(f"{count} {name}" for name, count in failed.most_common(3))
        yield note("calls", f"{failed.total()} failed: {what}", "`lightning-proxy rollouts --failed`")
    inexact = [span for span in well if span.policy is not None and span.fidelity is not Fidelity.EXACT]
    if inexact:
        to_do = "`lightning-proxy spans ID` shows one; docs/wires.md says what is recorded exactly"
        text = f"{len(inexact)} calls of a policy have no token ids of the engine's: RL leaves them out"
        yield (problem if len(inexact) == len(well) else note)("calls", text, to_do)
    if well and not any(span.policy for span in well):
        asked = Counter(str(span.model) for span in well).most_common(1)[0][0]
        to_do = "agents must ask for the name of [policy], or [policy] name be what they ask for"
        yield problem("calls", f"none went to a policy: agents ask for {asked!r}", to_do)
    unsure = sum(span.attribution_confidence < 0.5 for span in well)
    if unsure > _MANY * len(latest):
        to_do = "docs/attribution.md has surer ways: a path, a header, a key, or `lightning-proxy run`"
        yield note("calls", f"{unsure} calls were told apart by little: their runs may be mixed up", to_do)


def training(settings: Settings, store: Store) -> Iterator[Finding]:
    """Rewards, the last run, and what a pass would find now."""
    name = settings.policy.name
    about = f"training of {name}"
    runs = store.list_runs(name, limit=1)
    if runs and runs[0].state is RunState.FAILED:
        yield problem(about, f"the last run failed: {runs[0].error}", "`lightning-proxy train` tries again")
    if runs and runs[0].state is RunState.RUNNING:
        yield ok(about, f"run {runs[0].run_id} is in progress")
    try:
        from lightning_proxy.trainer.run import train_once

        report = train_once(settings, store=store, progress=_silent, dry_run=True)
    except ImportError:
        waiting = store.backlog(name)
        yield note(
            about, f"{waiting.rollouts_ready} rollouts wait, {waiting.rollouts_unrewarded} have no reward"
        )
        return
    except LightningError as error:
        yield problem(about, str(error))
        return
    level = ok if report.counts.get("rollouts") else note
    yield level(about, report.message)


def _silent(line: str, done: float | None = None) -> None:
    """Nothing is said of a look."""


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
