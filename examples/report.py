"""Draws what the experiments gave: ``python -m examples.report``.

Reads ``results/``, where ``collect`` puts what each run left. Writes the pictures in ``docs/``, and the
tables of ``docs/experiments.md``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.experiment import HELD_OUT, NAMES
from lightning_proxy.experiment.curve import headless_pyplot
from lightning_proxy.store.intervals import Estimate, Returns, Sample, difference_of

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "experiments.md"
Run = Mapping[str, Any]


def runs_of(name: str, *, shuffled: bool = False, folder: Path = RESULTS) -> list[Run]:
    """The saved runs of an experiment, by seed."""
    pattern = re.compile(rf"{name}-\d+{'-shuffled' if shuffled else ''}\.json")
    found = [json.loads(path.read_text()) for path in folder.glob("*.json") if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda run: run["seed"])


def held_out(run: Run) -> list[tuple[int, float]]:
    """(updates, held-out success) wherever it was measured."""
    measured = [(number + 1, turn["heldout"]) for number, turn in enumerate(run["iterations"])]
    return [(0, run["initial"]), *((number, rate) for number, rate in measured if rate is not None)]


def sampled(run: Run) -> list[tuple[int, float]]:
    """(updates before it, share of right answers) of the rollouts that each update was trained on."""
    return [(number, turn["reward"]) for number, turn in enumerate(run["iterations"])]


def training_s(run: Run) -> float:
    """Seconds from the first sampling to the last update: without vLLM's start and without measuring."""
    phases = ("sample_s", "reward_s", "train_s", "swap_s")
    return float(sum(turn[phase] for turn in run["iterations"] for phase in phases))


def table(names: Sequence[str] = NAMES, folder: Path = RESULTS) -> str:
    """One row a run, as Markdown."""
    lines = [
        "| experiment | seed | rewards | held-out, before | after | sampled, before | after | updates | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        for run in [*runs_of(name, folder=folder), *runs_of(name, shuffled=True, folder=folder)]:
            rewards = "shuffled" if run["shuffled"] else "own"
            lines.append(
                f"| {name} | {run['seed']} | {rewards} | {run['initial']:.3f} | {run['final']:.3f} "
                f"| {run['initial_sampled']:.3f} | {run['final_sampled']:.3f} | {run['updates']} "
                f"| {training_s(run):.0f} |"
            )
    return "\n".join(lines)


def gain_table(names: Sequence[str] = NAMES, folder: Path = RESULTS) -> str:
    """Success at temperature 1, all seeds together, as Markdown: own rewards and the control."""
    lines = [
        "| experiment | rewards | seeds | sampled, before | after | gain (95% interval) |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        for shuffled in (False, True):
            runs = runs_of(name, shuffled=shuffled, folder=folder)
            if not runs:
                continue
            before, after, gain = pooled(runs)
            lines.append(
                f"| {name} | {'shuffled' if shuffled else 'own'} | {len(runs)} | {before.mean:.3f} "
                f"| {after.mean:.3f} | {_interval(asdict(gain), '+')} |"
            )
    return "\n".join(lines)


def pooled(runs: Sequence[Run]) -> tuple[Sample, Sample, Estimate]:
    """Answers at temperature 1 before and after training, of all ``runs`` together, and the gain.

    Each answer counts as one, right or wrong.
    """
    total = HELD_OUT * len(runs)
    rights = [
        round(sum(run[when] for run in runs) * HELD_OUT) for when in ("initial_sampled", "final_sampled")
    ]
    before, after = (Sample.of({1.0: right, 0.0: total - right}) for right in rights)
    assert before is not None
    assert after is not None
    return before, after, difference_of(after, before, Returns.of([0.0, 1.0]))


def live_table(folder: Path = RESULTS) -> str:
    """One row a run of live traffic, as Markdown."""
    lines = [
        "| seed | answers | told apart wrongly | thumbs (of calls) | corrected | version 0 | last | gain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs_of("live", folder=folder):
        first, last = run["versions"][0], run["versions"][-1]
        lines.append(
            f"| {run['seed']} | {run['answers']} | {run['mixed_up']} "
            f"| {run['thumbs']} ({run['thumbs'] / run['calls']:.0%}) | {run['corrected']} "
            f"| {_interval(first['success'])} | {last['version']}: {_interval(last['success'])} "
            f"| {_interval(last['gain'], '+')} |"
        )
    return "\n".join(lines)


def _interval(estimate: Mapping[str, float], sign: str = "") -> str:
    value, low, high = (format(estimate[key], f"{sign}.3f") for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def draw_experiments(path: Path, names: Sequence[str] = NAMES, folder: Path = RESULTS) -> None:
    """Every seed, with its own rewards and with shuffled ones: held-out success, and that of training."""
    pyplot = headless_pyplot()
    figure, panels = pyplot.subplots(
        2, len(names), figsize=(5 * len(names), 7), layout="constrained", sharex=True, sharey=True
    )
    for column, name in enumerate(names):
        runs = runs_of(name, folder=folder)
        controls = runs_of(name, shuffled=True, folder=folder)
        for axes, curve in ((panels[0][column], held_out), (panels[1][column], sampled)):
            for drawn, line, what in ((runs, "-", ""), (controls, ":", ", rewards shuffled")):
                _spread(axes, [curve(run) for run in drawn])
                for run in drawn:
                    label = f"seed {run['seed']}{what}"
                    points = zip(*curve(run), strict=True)
                    axes.plot(*points, color=f"C{run['seed']}", linestyle=line, marker=".", label=label)
            axes.axhline(0.8, color="grey", linewidth=0.8, linestyle="--")
        panels[0][column].set(ylim=(0, 1.03), title=runs[0]["title"] if runs else name)
        panels[1][column].set(xlabel="updates")
    panels[0][0].set_ylabel("held-out tasks, temperature 0")
    panels[1][0].set_ylabel("rollouts of training, temperature 1")
    figure.legend(*panels[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _spread(axes: Any, curves: Sequence[Sequence[tuple[int, float]]]) -> None:
    """From the lowest to the highest of the seeds."""
    rates: dict[int, list[float]] = {}
    for updates, rate in (point for curve in curves for point in curve):
        rates.setdefault(updates, []).append(rate)
    steps = sorted(rates)
    lowest, highest = [min(rates[step]) for step in steps], [max(rates[step]) for step in steps]
    axes.fill_between(steps, lowest, highest, color="grey", alpha=0.2, linewidth=0)


def draw_live(path: Path, runs: Sequence[Run]) -> None:
    """Right answers by policy version, with their intervals, every run."""
    pyplot = headless_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        rows = run["versions"]
        rates = [row["success"]["value"] for row in rows]
        below = [row["success"]["value"] - row["success"]["low"] for row in rows]
        above = [row["success"]["high"] - row["success"]["value"] for row in rows]
        versions = [row["version"] for row in rows]
        axes.errorbar(
            versions, rates, yerr=[below, above], marker="o", capsize=3, label=f"seed {run['seed']}"
        )
    axes.set(xlabel="policy version", ylabel="right answers, 95% interval", ylim=(0, 1.03))
    axes.set_title("live traffic: late thumbs for one call in five")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_page(page: Path = PAGE) -> None:
    """Puts the tables between their marks."""
    text = page.read_text(encoding="utf-8")
    for mark, content in (("experiments", table()), ("gains", gain_table()), ("live", live_table())):
        begin, end = f"<!-- {mark}: written by examples/report.py -->", f"<!-- end of {mark} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")


def main() -> None:
    """Pictures and tables."""
    draw_experiments(PAGE.with_suffix(".png"))
    draw_live(PAGE.with_name("live-traffic.png"), runs_of("live"))
    write_page()


if __name__ == "__main__":
    main()
