"""What came of a loop: numbers, one line an iteration, and the picture."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GOAL = 0.8  # what held-out success must exceed


@dataclass(slots=True)
class Iteration:
    """One turn of the loop: mean reward, seconds of each phase, held-out success where it was measured."""

    reward: float
    sample_s: float
    reward_s: float = 0.0
    train_s: float = 0.0
    swap_s: float = 0.0
    eval_s: float = 0.0
    heldout: float | None = None
    version: int | None = None  # None: every group agreed, nothing to learn


@dataclass(slots=True)
class ExperimentResult:
    """How it went. ``initial`` and ``final`` are held-out success rates at temperature 0."""

    seed: int
    initial: float = 0.0
    final: float = 0.0
    iterations: list[Iteration] = field(default_factory=list)
    start_s: float = 0.0  # until vLLM answered
    seconds: float = 0.0
    title: str = ""
    shuffled: bool = False  # rewards were dealt out at random: the control
    initial_sampled: float | None = None  # held-out success at temperature 1, where it was measured
    final_sampled: float | None = None
    failed_runs: int = 0  # of the agent, by error or time limit: they count as wrong answers

    @property
    def reached(self) -> bool:
        """Whether held-out success went over the goal."""
        return self.final > GOAL

    @property
    def updates(self) -> int:
        """How many new versions there were."""
        return sum(turn.version is not None for turn in self.iterations)

    def summary(self) -> dict[str, Any]:
        """What ``lightning-proxy demo --json`` prints."""
        return {
            "seed": self.seed,
            "initial": self.initial,
            "final": self.final,
            "iterations": [
                {
                    "reward": turn.reward,
                    "sample_s": round(turn.sample_s, 2),
                    "train_s": round(turn.train_s, 2),
                    "swap_s": round(turn.swap_s, 3),
                }
                for turn in self.iterations
            ],
            "seconds": round(self.seconds, 1),
        }


def describe(number: int, result: ExperimentResult) -> str:
    """One line about the iteration that has just ended."""
    turn = result.iterations[-1]
    bar = "#" * round(turn.reward * 20)
    line = f"{number:3d}  sampled {turn.reward:.3f} {bar:<20}  sample {turn.sample_s:4.1f} s  "
    line += f"reward {turn.reward_s:3.1f} s  train {turn.train_s:4.1f} s  swap {turn.swap_s:4.2f} s"
    if turn.heldout is not None:
        line += f"  held-out {turn.heldout:.3f} ({turn.eval_s:.1f} s)"
    return f"{line}  [{result.seconds:.0f} s]"


def save_numbers(workdir: Path, result: ExperimentResult) -> None:
    """curve.json, with the seconds of every phase."""
    whole = asdict(result) | {"reached": result.reached, "updates": result.updates}
    (workdir / "curve.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def save_curve(workdir: Path, result: ExperimentResult) -> None:
    """curve.json and curve.png."""
    save_numbers(workdir, result)
    pyplot = headless_pyplot(workdir / "matplotlib")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([turn.reward for turn in result.iterations], marker="o", label="sampled while training")
    measured = [(0, result.initial)]  # before the first update
    measured += [
        (i + 1, turn.heldout) for i, turn in enumerate(result.iterations) if turn.heldout is not None
    ]
    axes.plot(*zip(*measured, strict=True), marker="s", label="held-out, temperature 0")
    axes.axhline(GOAL, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="updates", ylabel="success rate", ylim=(0, 1.03))
    title = f"{result.title}, seed {result.seed}: {result.seconds:.0f} s in all"
    axes.set_title(f"{title}, rewards shuffled" if result.shuffled else title)
    axes.legend()
    figure.savefig(workdir / "curve.png", dpi=120)
    pyplot.close(figure)


def headless_pyplot(cache: Path | None = None) -> Any:
    """matplotlib's, drawing into files; ``cache`` is where it may keep its own."""
    if cache is not None:
        os.environ.setdefault("MPLCONFIGDIR", str(cache))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
