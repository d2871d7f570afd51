"""An agent in service learns from its users: ``python -m examples.live.run --minutes 10``.

The agent is told ``OPENAI_BASE_URL`` and ``OPENAI_API_KEY``, nothing else; which calls belong together the
proxy finds out. Users ask all the time, each question once. Thumbs come minutes late, for one call in five,
and some are corrected afterwards. ``lightning-proxy train`` runs on a schedule, a fresh process each time, as
cron would.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.environment import CannotInstall, agents_python
from examples.experiment import WEIGHTS, seed_of
from examples.live.report import by_version, line_of, mixed_up, recorded_answers, save
from examples.live.users import Agent, AgentDied, Crowd, Habits
from lightning_proxy.experiment.processes import (
    Children,
    ExperimentFailed,
    clean_environment,
    ended_by_signals,
)
from lightning_proxy.experiment.workdir import command_of, prepare, serving, write_config

SERVICE = Path(__file__).parents[1] / "calculator" / "service.py"
MINUTES = 10.0
MIN_ROLLOUTS = 32  # with a thumb, before a pass trains


@dataclass(frozen=True, slots=True)
class Schedule:
    """When passes of training begin; seconds of the clock on the wall."""

    every_s: float = 40.0
    last_s: float = 75.0  # of traffic, in which none begins: the last version shall be seen at work


def run(
    workdir: Path, *, seed: int, minutes: float, habits: Habits, schedule: Schedule = Schedule()
) -> float:
    """Runs it, prints the report, leaves live.json and live.png; returns the lower end of the last gain.

    Raises ExperimentFailed, or AgentDied, with the reason.
    """
    workdir = prepare(workdir, WEIGHTS)
    write_config(workdir, {"train": {"seed": seed, "min_rollouts": MIN_ROLLOUTS}}, policy="policy")
    with ended_by_signals(), serving(workdir, print) as (children, proxy):
        traffic = Traffic(workdir, proxy.url, children)
        crowd = asyncio.run(traffic.flow(seed, minutes, habits, schedule))
    recorded = recorded_answers(workdir / "lightning.db")
    rows = by_version(crowd.answered, recorded)
    facts = {
        "seed": seed,
        "minutes": minutes,
        "habits": asdict(habits),
        "answers": len(crowd.answered),
        "calls": len(recorded),
        "failed": crowd.failed,
        "thumbs": crowd.thumbs,
        "refused": crowd.refused,
        "corrected": crowd.corrected,
        "mixed_up": mixed_up(crowd.answered, recorded),
        "passes_failed": traffic.passes_failed,
    }
    save(workdir, rows, facts)
    print("\n".join(line_of(row) for row in rows))
    return rows[-1].gain.low or 0.0 if rows else 0.0


class Traffic:
    """Users at work and training on a schedule, side by side."""

    def __init__(self, workdir: Path, url: str, children: Children) -> None:
        self._workdir = workdir
        self._url = url
        self._children = children
        self._began = self._next_line = time.monotonic()
        self.passes_failed = 0

    async def flow(self, seed: int, minutes: float, habits: Habits, schedule: Schedule) -> Crowd:
        """For so many minutes."""
        env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        env |= {"OPENAI_BASE_URL": f"{self._url}/v1", "OPENAI_API_KEY": "any"}
        self._began = self._next_line = time.monotonic()
        with (self._workdir / "agent.log").open("wb") as log:
            async with await Agent.start([agents_python(), str(SERVICE)], env, log) as agent:
                crowd = Crowd(agent, self._url, habits, seed)
                last = self._began + minutes * 60 - schedule.last_s
                training = asyncio.ensure_future(self._train_until(last, schedule.every_s))
                try:
                    await crowd.work(minutes * 60, self._tell)
                except ExceptionGroup as failures:
                    self._children.check()  # no engine, no answers: then this is the reason
                    raise failures.exceptions[0] from None
                finally:
                    training.cancel()
                    await asyncio.wait([training])
                if not training.cancelled():
                    training.result()  # a schedule that broke is no schedule
        return crowd

    async def _train_until(self, last: float, every_s: float) -> None:
        """What cron would do: a pass each so many seconds, the next one only when the last has ended."""
        with (self._workdir / "train.log").open("wb") as log:
            while time.monotonic() < last:
                due = time.monotonic() + every_s
                process = await asyncio.create_subprocess_exec(
                    *command_of("train", self._workdir), stdout=log, stderr=log, env=clean_environment()
                )
                try:
                    self.passes_failed += await process.wait() != 0
                finally:
                    if process.returncode is None:
                        process.terminate()
                        await process.wait()
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    def _tell(self, crowd: Crowd) -> None:
        """A line each half minute; ExperimentFailed if the proxy has ended."""
        self._children.check()
        now = time.monotonic()
        if now < self._next_line or not crowd.answered:
            return
        self._next_line = now + 30.0
        recent = [answer.right for answer in crowd.answered if answer.at > now - 30.0]
        share = f"{sum(recent) / len(recent):.3f}" if recent else "none"
        print(
            f"{now - self._began:4.0f} s  {len(crowd.answered):5d} answers, {share} right in the last 30 s; "
            f"{crowd.thumbs} thumbs, {crowd.corrected} corrected, {self.passes_failed} passes failed",
            flush=True,
        )


def main() -> None:
    """Command line; exit status 1 if the last version is not better than the first, with 95% confidence."""
    parser = argparse.ArgumentParser(description="Let an agent in service learn from its users' thumbs.")
    parser.add_argument("--seed", type=seed_of, default=0)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of traffic (default {MINUTES:.0f})")
    parser.add_argument("--workdir", type=Path, help="default: lightning-examples/live-SEED")
    args = parser.parse_args()
    workdir = args.workdir or Path("lightning-examples") / f"live-{args.seed}"
    schedule = Schedule()
    if args.minutes * 60 < schedule.last_s + schedule.every_s + Habits().delay_s[1]:
        parser.error(
            f"--minutes {args.minutes:g}: thumbs come late; before five minutes there is little to see"
        )
    try:
        gain = run(workdir, seed=args.seed, minutes=args.minutes, habits=Habits())
    except (ExperimentFailed, CannotInstall, AgentDied) as failure:
        sys.exit(f"live: {failure or AgentDied.__doc__}")
    if gain <= 0:
        sys.exit(
            "live: the last version is not better than the first, with 95% confidence; train.log tells more"
        )


if __name__ == "__main__":
    main()
