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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from examples.calculator.tasks import make_task
from examples.environment import CannotInstall, agents_python
from examples.experiment import WEIGHTS
from examples.live.report import by_version, line_of, mixed_up, recorded_answers, save
from examples.live.users import Agent, Crowd, Habits
from lightning_proxy.demo.loop import (
    Experiment,
    command_of,
    free_port,
    prepare,
    wait_until_ready,
    write_config,
)
from lightning_proxy.demo.processes import Children, DemoFailed, clean_environment, ended_by_signals
from lightning_proxy.demo.sample import ProxyApi

SERVICE = Path(__file__).parents[1] / "calculator" / "service.py"
MINUTES = 10.0
TRAIN_EVERY_S = 40.0
LAST_S = 75.0  # of traffic, in which no further pass begins: the last version shall be seen at work

LIVE = Experiment(
    title="live traffic",
    policy="policy",
    model=WEIGHTS,
    agent=SERVICE,
    make_tasks=lambda seed, split, count, start=0: [
        make_task(seed, split, n) for n in range(start, start + count)
    ],
    tasks_per_turn=64,  # with one run each: a pass waits for 32 rewarded conversations
    runs_per_task=1,
)


def run(workdir: Path, *, seed: int, minutes: float, habits: Habits) -> float:
    """Runs it, prints the report, leaves live.json and live.png; returns the last version's gain."""
    workdir = prepare(workdir, LIVE.model)
    with ended_by_signals(), serving(workdir, seed) as proxy:
        crowd = asyncio.run(traffic(workdir, proxy.url, seed, minutes, habits))
    recorded = recorded_answers(workdir / "lightning.db")
    rows = by_version(crowd.answered, recorded)
    facts = {
        "seed": seed,
        "minutes": minutes,
        "habits": asdict(habits),
        "answers": len(crowd.answered),
        "failed": crowd.failed,
        "thumbs": crowd.thumbs,
        "corrected": crowd.corrected,
        "mixed_up": mixed_up(crowd.answered, recorded),
    }
    save(workdir, rows, facts)
    print("\n".join(line_of(row) for row in rows))
    return rows[-1].gain.low or 0.0


@contextmanager
def serving(workdir: Path, seed: int) -> Iterator[ProxyApi]:
    """The proxy with vLLM under it."""
    port = free_port()
    write_config(LIVE, workdir, port=port, seed=seed)
    with Children() as children, ProxyApi(f"http://127.0.0.1:{port}") as proxy:
        print(f"starting vLLM behind the proxy at {proxy.url}; logs are in {workdir}", flush=True)
        serve = [*command_of("serve", workdir), "--model", str(workdir / "model")]
        children.start("serve", serve, workdir / "serve.log")
        wait_until_ready(proxy, children, workdir / "serve.log")
        yield proxy


async def traffic(workdir: Path, url: str, seed: int, minutes: float, habits: Habits) -> Crowd:
    """Users at work and training on a schedule, side by side."""
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    env |= {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "any"}
    began = time.monotonic()
    with (workdir / "agent.log").open("wb") as log:
        async with await Agent.start([agents_python(), str(SERVICE)], env, log) as agent:
            crowd = Crowd(agent, url, habits, seed)
            schedule = asyncio.ensure_future(train_on_schedule(workdir, began + minutes * 60 - LAST_S))
            try:
                await crowd.work(minutes * 60, lambda crowd: tell(crowd, began))
            finally:
                schedule.cancel()
                await asyncio.gather(schedule, return_exceptions=True)
    return crowd


async def train_on_schedule(workdir: Path, until: float) -> None:
    """What cron would do: a pass each so many seconds, the next one only when the last has ended."""
    with (workdir / "train.log").open("wb") as log:
        while time.monotonic() < until:
            due = time.monotonic() + TRAIN_EVERY_S
            process = await asyncio.create_subprocess_exec(
                *command_of("train", workdir), stdout=log, stderr=log, env=clean_environment()
            )
            try:
                await process.wait()
            except asyncio.CancelledError:
                process.terminate()
                await process.wait()
                raise
            await asyncio.sleep(max(0.0, due - time.monotonic()))


def tell(crowd: Crowd, began: float) -> None:
    """A line each half minute or so."""
    passed = time.monotonic() - began
    if passed % 30 < 5 and (recent := [a.right for a in crowd.answered if a.at > time.monotonic() - 30]):
        share = sum(recent) / len(recent)
        print(
            f"{passed:4.0f} s  {len(crowd.answered):5d} answers, {share:.3f} right in the last 30 s; "
            f"{crowd.thumbs} thumbs, {crowd.corrected} corrected",
            flush=True,
        )


def main() -> None:
    """Command line; exit status 1 if the last version is not better than the first, with 95% confidence."""
    parser = argparse.ArgumentParser(description="Let an agent in service learn from its users' thumbs.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of traffic (default {MINUTES:.0f})")
    parser.add_argument("--workdir", type=Path, help="default: lightning-examples/live-SEED")
    args = parser.parse_args()
    workdir = args.workdir or Path("lightning-examples") / f"live-{args.seed}"
    try:
        gain = run(workdir, seed=args.seed, minutes=args.minutes, habits=Habits())
    except (DemoFailed, CannotInstall, ConnectionError) as failure:
        sys.exit(f"live: {failure}")
    sys.exit(gain <= 0)


if __name__ == "__main__":
    main()
