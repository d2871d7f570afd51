"""Where the seconds of a training run go: everything around the update against the update itself.

A real store with rollouts of the demo's shape, the demo's model, verl, one warm trainer; what is sampled is
random, for learning is not the point. Prints each phase's median over the runs in Markdown, without the
first, in which verl warms up. Draining and batching should cost less than a tenth of the update they feed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from array import array
from pathlib import Path

import numpy as np

from lightning_proxy.config import Settings
from lightning_proxy.config.train import TrainSettings
from lightning_proxy.demo.text_to_sql import WEIGHTS
from lightning_proxy.errors import MissingExtra
from lightning_proxy.store import Fidelity, Generation, Span, Store
from lightning_proxy.trainer.run import Trainer

POLICY = "tiny-sql"
GROUP = 8
OWN = ("drain", "prepare", "compare", "export")  # phases around the update; loading happens once
_VOCABULARY = 480


def main() -> None:
    """Train on made-up rollouts, run after run, and print where the time went."""
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--runs", type=int, default=4)
    options.add_argument("--rollouts", type=int, default=512)
    options.add_argument("--turns", type=int, default=4)
    options.add_argument(
        "--tokens", type=int, default=30, help="tokens of a turn's answer; twice that is read"
    )
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as directory, Store.open(Path(directory, "bench.db")) as store:
        seconds, tokens = run(store, Path(directory), given)
    print_table(seconds, tokens, given)


def run(store: Store, directory: Path, given: argparse.Namespace) -> tuple[list[dict[str, float]], int]:
    """The phases of each run but the first, in seconds, and the tokens of a run."""
    train = {"runs_dir": directory / "runs", "proxy_url": "http://127.0.0.1:9", "epochs": 2, "device": "cpu",
             "threads": 1, "learning_rate": 1e-6, "min_rollouts": GROUP, "max_version_age": 100}  # fmt: skip
    settings = Settings.model_validate({
        "policy": {"name": POLICY, "model": WEIGHTS}, "guard": {"max_reward_drop": 1.0},
        "train": TrainSettings.model_validate(train).model_dump(),
    })  # fmt: skip
    seconds, tokens = [], 0
    with Trainer(settings, store=store, progress=_quietly) as trainer:
        for number in range(given.runs + 1):
            record(store, number, given)
            report = trainer.train_once()
            store.activate_version(POLICY, int(report.version or 0))  # there is no proxy to do it
            seconds.append(dict(report.seconds))
            tokens = report.counts["tokens"]
            sys.stderr.write(f"run {number} of {given.runs}\n")
    return seconds[1:], tokens


def record(store: Store, run: int, given: argparse.Namespace) -> None:
    """Rollouts whose calls extend one another, in groups whose returns differ."""
    generator = np.random.default_rng(run)
    version = store.active_version(POLICY)
    with store.transaction():
        for number in range(given.rollouts):
            name, context = f"{run}-{number}", list[int]()
            store.create_rollout(rollout_id=name, task_id=f"{run}-{number // GROUP}")
            for _ in range(given.turns):
                context += generator.integers(3, _VOCABULARY, 2 * given.tokens).tolist()
                answer = generator.integers(3, _VOCABULARY, given.tokens).tolist()
                store.add_span(_span(name, context, answer, version.version if version else 0))
                context += answer
            store.add_reward(value=float(number % 2), rollout_id=name)


def _span(rollout_id: str, prompt: list[int], answer: list[int], version: int) -> Span:
    logprobs = array("f", [-6.0] * len(answer))
    generation = Generation(array("i", prompt), array("i", answer), logprobs, "stop")
    return Span(
        rollout_id, 1, "chat", 1.0, 2.0, b"{}", Fidelity.EXACT, policy=POLICY, policy_version=version,
        policy_version_end=version, status=200, response=b"{}", generations=(generation,),
    )  # fmt: skip


def print_table(seconds: list[dict[str, float]], tokens: int, given: argparse.Namespace) -> None:
    """Medians of the phases, and their share of the update."""
    update = statistics.median(each["update"] for each in seconds)
    print(f"{given.rollouts} rollouts of {given.turns} calls, {tokens} tokens a run, 2 epochs; medians of "
          f"{len(seconds)} runs.\n")  # fmt: skip
    print("| phase | seconds | share of the update |\n|---|---|---|")
    for name in (*OWN, "update"):
        taken = statistics.median(each.get(name, 0.0) for each in seconds)
        print(f"| {name} | {taken:.3f} | {taken / update:.1%} |")
    around = statistics.median(sum(each.get(name, 0.0) for name in ("drain", "prepare")) for each in seconds)
    print(f"\nDraining and batching: {around:.3f} s, {around / update:.1%} of the update (aim: under 10%).")


def _quietly(line: str, done: float | None = None) -> None:
    """Nobody reads along."""


if __name__ == "__main__":
    try:
        main()
    except MissingExtra as missing:
        sys.exit(str(missing))
