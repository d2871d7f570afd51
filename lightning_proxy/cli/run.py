"""run: one unmodified command as one rollout, or for every task of the pool."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightning_proxy.cli.common import (
    ConfigOption,
    JsonOption,
    ProxyOption,
    print_json,
    proxy_client,
    settings_from,
)
from lightning_proxy.errors import InvalidInput

if TYPE_CHECKING:
    from lightning_proxy.client import ProxyClient
    from lightning_proxy.runner import Done, Work

NOTHING_SUCCEEDED = 1
_PLAIN_LINE_S = 10.0

# Of the tasks, where a line of the file does not say otherwise.
GroupSizeOption = Annotated[
    int | None, typer.Option("--group-size", min=1, help="Rollouts of each task in a round. Default: 1.")
]
RoundsOption = Annotated[int | None, typer.Option("--rounds", min=1, help="Groups of each task. Default: 1.")]
PriorityOption = Annotated[int | None, typer.Option("--priority", help="Higher ones first. Default: 0.")]
AttemptsOption = Annotated[
    int | None, typer.Option("--max-attempts", min=1, help="Attempts at a rollout. Default: 1.")
]
TimeoutOption = Annotated[
    float | None, typer.Option("--timeout", min=0.1, help="Longest attempt, in seconds. Default: no limit.")
]
SilenceOption = Annotated[
    float | None,
    typer.Option("--silence", min=0.1, help="Longest time without a call or output. Default: no limit."),
]
RetryOption = Annotated[
    list[str] | None,
    typer.Option("--retry-on", metavar="CLASS", help="Failures that are tried again; may be repeated."),
]
# Of the runner.
TasksOption = Annotated[
    Path | None, typer.Option("--tasks", metavar="FILE", help="Run for each task of this JSONL file.")
]
WorkerOption = Annotated[bool, typer.Option("--worker", help="Run for whatever tasks the pool has.")]
WatchOption = Annotated[bool, typer.Option("--watch", help="With --worker: wait for more, until stopped.")]
ConcurrencyOption = Annotated[int, typer.Option("--concurrency", min=1, help="Commands at once.")]
PreferOption = Annotated[
    bool,
    typer.Option("--prefer-disagreement", help="Tasks whose rollouts disagree first; skip the others."),
]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Name of this runner. Default: its own, kept with the logs.")
]
LogsOption = Annotated[
    Path | None,
    typer.Option("--logs", metavar="DIR", help="One log per attempt. Default: lightning-runs/logs."),
]
LeaseOption = Annotated[
    float, typer.Option("--lease", min=1.0, help="Seconds of silence after which a runner counts as lost.")
]
GraceOption = Annotated[
    float, typer.Option("--grace", min=0.0, help="Seconds between TERM and KILL for a command that is ended.")
]
# Of one rollout.
RolloutOption = Annotated[str | None, typer.Option("--rollout-id", help="Default: the proxy makes one.")]
TaskOption = Annotated[
    str | None, typer.Option("--task-id", help="Rollouts of one task are compared with one another.")
]
RoleOption = Annotated[str | None, typer.Option("--role", help="Which agent of several makes the calls.")]
Command = Annotated[list[str], typer.Argument(help="The command, behind --.", metavar="-- COMMAND...")]


def run(
    command: Command,
    rollout_id: RolloutOption = None,
    task_id: TaskOption = None,
    role: RoleOption = None,
    tasks: TasksOption = None,
    worker: WorkerOption = False,
    watch: WatchOption = False,
    group_size: GroupSizeOption = None,
    rounds: RoundsOption = None,
    priority: PriorityOption = None,
    max_attempts: AttemptsOption = None,
    timeout: TimeoutOption = None,
    silence: SilenceOption = None,
    retry_on: RetryOption = None,
    concurrency: ConcurrencyOption = 1,
    prefer_disagreement: PreferOption = False,
    name: NameOption = None,
    logs: LogsOption = None,
    lease: LeaseOption = 60.0,
    grace: GraceOption = 5.0,
    json_: JsonOption = False,
    proxy: ProxyOption = None,
    config: ConfigOption = None,
) -> None:
    """Run an unmodified command as one rollout (its exit code is ours), or for every task of the pool.

    It finds the proxy through OPENAI_BASE_URL, OPENAI_API_KEY, ANTHROPIC_BASE_URL and
    ANTHROPIC_API_KEY; LIGHTNING_ROLLOUT_ID and LIGHTNING_REWARD_URL say where a reward may be posted.
    For tasks there are LIGHTNING_TASK (JSON), TASK_<FIELD>, and {field} in the command's words.
    Exit code with tasks: 0 when every rollout has ended, 1 when none succeeded.
    """
    settings = settings_from(config, train__proxy_url=proxy)
    client = proxy_client(settings)
    of_tasks = settings_of_tasks(group_size, rounds, priority, max_attempts, timeout, silence, retry_on)
    _check(tasks, worker, watch, of_tasks, {"rollout-id": rollout_id, "task-id": task_id, "role": role})
    if tasks is None and not worker:
        from lightning_proxy.runner import RolloutRequest, run_command

        raise typer.Exit(run_command(command, client, RolloutRequest(rollout_id, task_id, role)))
    from lightning_proxy.runner import Work

    work = Work(
        argv=command,
        logs=logs or settings.train.runs_dir / "logs",
        concurrency=concurrency,
        task_ids=None if tasks is None else _enqueued(client, tasks, command, of_tasks),
        prefer="disagreement" if prefer_disagreement else None,
        watch=watch,
        name=name,
        lease_s=lease,
        grace_s=grace,
    )
    raise typer.Exit(_work(client, work, json_))


def settings_of_tasks(
    group_size: int | None,
    rounds: int | None,
    priority: int | None,
    max_attempts: int | None,
    timeout: float | None,
    silence: float | None,
    retry_on: list[str] | None,
) -> dict[str, Any]:
    """The settings that were given, as ``POST /api/tasks`` names them."""
    given = {
        "group_size": group_size,
        "rounds": rounds,
        "priority": priority,
        "max_attempts": max_attempts,
        "timeout_s": timeout,
        "silence_s": silence,
        "retry_on": retry_on or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _check(
    tasks: Path | None,
    worker: bool,
    watch: bool,
    of_tasks: Mapping[str, Any],
    of_one: Mapping[str, str | None],
) -> None:
    """Raise InvalidInput for flags that contradict one another."""
    if tasks is not None and worker:
        raise InvalidInput("--tasks works on a file, --worker on whatever the pool has: give one of them")
    if watch and not worker:
        raise InvalidInput("--watch waits for tasks of others: give it with --worker")
    if of_tasks and tasks is None:
        flags = ", ".join(sorted(of_tasks))
        raise InvalidInput(
            f"{flags}: settings of tasks come with --tasks, or with `lightning-proxy tasks add`"
        )
    named = [f"--{flag}" for flag, value in of_one.items() if value is not None]
    if named and (tasks is not None or worker):
        raise InvalidInput(f"{' and '.join(named)} would be the same for every task: leave it to the pool")


def _enqueued(client: ProxyClient, file: Path, command: list[str], of_tasks: Mapping[str, Any]) -> list[str]:
    """The ids of the file's tasks, which are in the pool now."""
    from lightning_proxy.runner import check_command, enqueue, read_tasks

    found = read_tasks(file, of_tasks)
    check_command(command, found)
    new = enqueue(client, found)
    typer.echo(f"{len(found)} tasks in {file}, {new} of them new to the pool", err=True)
    return [task["task_id"] for task in found]


def _work(client: ProxyClient, work: Work, as_json: bool) -> int:
    from lightning_proxy.runner import Runner, progress

    program = work.argv[0] if work.argv else ""
    if not program:
        raise InvalidInput("no command to run: put it behind --")
    if "{" not in program and shutil.which(program) is None:
        raise InvalidInput(f"{program}: command not found")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="lightning-proxy: %(message)s")
    begun = time.monotonic()
    with _display() as show:
        done = Runner(client, work, show).run()
    counts = {**progress(client, work.task_ids), "seconds": round(time.monotonic() - begun, 3)}
    counts["attempts_here"] = dict(done.counts)
    if as_json:
        print_json(counts)
    else:
        typer.echo(summary(counts))
    return _exit_code(done, counts)


def _exit_code(done: Done, counts: Mapping[str, Any]) -> int:
    if done.error is not None:
        raise done.error
    if done.signal is not None:
        return 128 + done.signal
    return NOTHING_SUCCEEDED if counts["failed"] and not counts["succeeded"] else 0


# --- how far it is --------------------------------------------------------------------------------


def summary(counts: Mapping[str, Any]) -> str:
    """Counts of the pool in one line, or two where rounds were skipped."""
    ended = counts["succeeded"] + counts["failed"]
    rate = f" ({counts['succeeded'] / ended:.0%})" if ended else ""
    parts = [f"{ended}/{counts['rollouts']} rollouts", f"{counts['succeeded']} succeeded{rate}"]
    if counts["failed"]:
        by_class = sorted(counts["failed_by_class"].items(), key=lambda pair: -pair[1])
        parts.append(f"{counts['failed']} failed ({', '.join(f'{n} {what}' for what, n in by_class)})")
    parts += [f"{counts[each]} {each}" for each in ("running", "waiting", "cancelled") if counts[each]]
    line = ", ".join(parts)
    if counts["skipped_solved"] or counts["skipped_hopeless"]:
        line += (
            f"\nskipped {counts['skipped_solved']} rounds of solved tasks and {counts['skipped_hopeless']} "
            "of hopeless ones: their last rollouts all had the same reward"
        )
    return line


class Speed:
    """How long the rest will take, by what was done since the first look."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def left(self, counts: Mapping[str, Any], now: float) -> str:
        """``, about 3 min left``, or nothing where that cannot be said."""
        ended = counts["succeeded"] + counts["failed"]
        if self._first is None:
            self._first = (now, ended)
        since, before = self._first
        if ended == before or ended >= counts["rollouts"]:
            return ""
        seconds = (now - since) / (ended - before) * (counts["rollouts"] - ended)
        return f", about {seconds:.0f} s left" if seconds < 90 else f", about {seconds / 60:.0f} min left"


@contextmanager
def _display() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Shows counts on stderr: in one line that changes on a terminal, else in a line now and then."""
    speed = Speed()
    if not sys.stderr.isatty():
        last = [0.0]

        def say(counts: Mapping[str, Any]) -> None:
            now = time.monotonic()
            line = summary(counts) + speed.left(counts, now)
            if now - last[0] >= _PLAIN_LINE_S:
                last[0] = now
                typer.echo(line.partition("\n")[0], err=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(counts: Mapping[str, Any]) -> None:
            line = summary(counts).partition("\n")[0] + speed.left(counts, time.monotonic())
            ended = counts["succeeded"] + counts["failed"]
            bar.update(task, description=line, total=counts["rollouts"], completed=ended)

        yield show
