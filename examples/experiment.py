"""Runs one of the experiments: ``python -m examples.experiment sql --seed 0``.

The loop is that of ``lightning_proxy.experiment``; here stand agents, tasks and roles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.calculator.tasks import make_task as calculator_task
from examples.environment import CannotInstall, agents_python
from examples.search.tasks import make_task as search_task
from examples.sql import prompts as sql_prompts
from examples.sql.tasks import make_task as sql_task
from lightning_proxy.experiment.definition import AgentTask, Experiment, Split
from lightning_proxy.experiment.loop import run
from lightning_proxy.experiment.processes import ExperimentFailed

HERE = Path(__file__).parent
WEIGHTS = HERE / "model" / "weights"
HELD_OUT = 96  # tasks

# The checker is not trained. All three are answered by one model, as in the paper.
_SQL_ROLES = {
    "train": {"roles": ["writer", "rewriter"]},
    "roles": [
        {"name": "writer", "system_contains": sql_prompts.WRITER},
        {"name": "checker", "system_contains": sql_prompts.CHECKER},
        {"name": "rewriter", "system_contains": sql_prompts.REWRITER},
    ],
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """What differs between them."""

    title: str
    make_task: Callable[[int, Split, int], AgentTask]
    settings: Mapping[str, Any] = field(default_factory=dict)


_KINDS = {
    "sql": _Kind("text-to-SQL, LangGraph", sql_task, _SQL_ROLES),
    "search": _Kind("two-hop questions, OpenAI Agents SDK", search_task),
    "calculator": _Kind("word problems, AutoGen", calculator_task),
}
NAMES = tuple(_KINDS)


def experiment(name: str) -> Experiment:
    """One of them; the agents' environment is made where it is missing, see ``agents_python``."""
    kind = _KINDS[name]

    def make_tasks(seed: int, split: Split, count: int, *, start: int = 0) -> Sequence[AgentTask]:
        return [kind.make_task(seed, split, number) for number in range(start, start + count)]

    return Experiment(
        title=kind.title,
        policy="policy",
        model=WEIGHTS,
        agent=HERE / name / "agent.py",
        make_tasks=make_tasks,
        python=agents_python(),
        settings=kind.settings,
        held_out_tasks=HELD_OUT,
        iterations=10,
        measure_sampled=True,
    )


def seed_of(text: str) -> int:
    """A seed of the command line: the model was warm-started on tasks of negative ones."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: a whole number from 0 on")
    return int(text)


def main() -> None:
    """Command line; exit status 1 if held-out success does not get over 0.8, or that of a control does."""
    parser = argparse.ArgumentParser(description="Let one of the three agents learn, on this machine.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seed", type=seed_of, default=0, help="which tasks, and all else that is random")
    parser.add_argument("--iterations", type=int, help="turns of the loop (default 10)")
    parser.add_argument("--shuffle-rewards", action="store_true", help="the control: must not learn")
    parser.add_argument("--workdir", type=Path, help="default: lightning-examples/NAME-SEED")
    args = parser.parse_args()
    kind = f"{args.name}-{args.seed}" + ("-shuffled" if args.shuffle_rewards else "")
    workdir = args.workdir or Path("lightning-examples") / kind
    try:
        result = run(
            experiment(args.name),
            workdir=workdir,
            seed=args.seed,
            iterations=args.iterations,
            shuffle=args.shuffle_rewards,
        )
    except (ExperimentFailed, CannotInstall) as failure:
        sys.exit(f"experiment: {failure}")
    print(
        f"held-out success: {result.initial:.3f} before, {result.final:.3f} after "
        f"{len(result.iterations)} iterations, {result.seconds:.0f} s; the curve is in {workdir}"
    )
    sys.exit(result.reached == args.shuffle_rewards)


if __name__ == "__main__":
    main()
