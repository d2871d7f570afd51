"""Runs one of the experiments: ``python -m examples.experiment sql --seed 0``.

The loop is that of ``lightning-proxy demo``; here stand agents, tasks and roles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from examples.calculator.tasks import make_task as calculator_task
from examples.environment import CannotInstall, agents_python
from examples.search.tasks import make_task as search_task
from examples.sql import prompts as sql_prompts
from examples.sql.tasks import make_task as sql_task
from lightning_proxy.demo.loop import Experiment, run
from lightning_proxy.demo.processes import DemoFailed
from lightning_proxy.demo.sample import Task
from lightning_proxy.demo.tasks import Split

HERE = Path(__file__).parent
WEIGHTS = HERE / "model" / "weights"

# The checker is not trained. All three are answered by one model, as in the paper.
_SQL_ROLES = f"""\
roles = ["writer", "rewriter"]

[[roles]]
name = "writer"
system_contains = "{sql_prompts.WRITER}"

[[roles]]
name = "checker"
system_contains = "{sql_prompts.CHECKER}"

[[roles]]
name = "rewriter"
system_contains = "{sql_prompts.REWRITER}"
"""


NAMES = ("sql", "search", "calculator")


def experiment(name: str) -> Experiment:
    """One of them; the agents' environment is made where it is missing, see ``agents_python``."""
    titles = {
        "sql": "text-to-SQL, LangGraph",
        "search": "two-hop questions, OpenAI Agents SDK",
        "calculator": "word problems, AutoGen",
    }
    tasks: dict[str, Callable[[int, Split, int], Task]] = {
        "sql": sql_task,
        "search": search_task,
        "calculator": calculator_task,
    }

    def make_tasks(seed: int, split: Split, count: int, *, start: int = 0) -> Sequence[Task]:
        return [tasks[name](seed, split, number) for number in range(start, start + count)]

    return Experiment(
        title=titles[name],
        policy="policy",
        model=WEIGHTS,
        agent=HERE / name / "agent.py",
        make_tasks=make_tasks,
        python=agents_python(),
        tables=_SQL_ROLES if name == "sql" else "",
        held_out_tasks=96,
        iterations=12,
    )


def main() -> None:
    """Command line; exit status 1 if held-out success does not get over 0.8."""
    parser = argparse.ArgumentParser(description="Let one of the three agents learn, on this machine.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seed", type=int, default=0, help="which tasks, and all else that is random")
    parser.add_argument("--iterations", type=int, help="turns of the loop (default 12)")
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
    except (DemoFailed, CannotInstall) as failure:
        sys.exit(f"experiment: {failure}")
    print(
        f"held-out success: {result.initial:.3f} before, {result.final:.3f} after "
        f"{len(result.iterations)} iterations, {result.seconds:.0f} s; the curve is in {workdir}"
    )
    sys.exit(not (result.reached or args.shuffle_rewards))


if __name__ == "__main__":
    main()
