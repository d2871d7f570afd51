"""tasks: what the pool has to do, and how far it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from lightning_proxy.cli.common import (
    ConfigOption,
    DbOption,
    JsonOption,
    LimitOption,
    ProxyOption,
    open_store,
    print_json,
    print_table,
    proxy_client,
    settings_from,
    short,
    when,
)
from lightning_proxy.cli.run import (
    AttemptsOption,
    GroupSizeOption,
    PriorityOption,
    RetryOption,
    RoundsOption,
    SilenceOption,
    TimeoutOption,
    settings_of_tasks,
)
from lightning_proxy.words import TaskState

if TYPE_CHECKING:
    from lightning_proxy.store import TaskSummary

app = typer.Typer(name="tasks", invoke_without_command=True, rich_markup_mode=None)
TaskId = Annotated[str, typer.Argument(help="A task's id.")]


@app.callback()
def tasks(
    ctx: typer.Context,
    state: Annotated[TaskState | None, typer.Option("--state", help="Only those in this state.")] = None,
    after: Annotated[str | None, typer.Option("--after", help="Go on behind this task.")] = None,
    limit: LimitOption = 100,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """List the tasks of the pool in the order of their enqueuing; add some, show or cancel one."""
    if ctx.invoked_subcommand is not None:
        return
    with open_store(settings_from(config, store__db=db)) as store:
        found = store.list_tasks(state=state, limit=limit, after=after)
    if json_:
        print_json({"tasks": [_flat(each) for each in found]})
        return
    print_table(
        ("TASK", "STATE", "ROUND", "TO DO", "RUNNING", "SUCCEEDED", "FAILED", "SOLVED", "REWARD", "SKIPPED"),
        [_row(each) for each in found],
    )


def add(
    file: Annotated[Path, typer.Argument(help="JSONL: one task a line.", metavar="FILE.jsonl")],
    group_size: GroupSizeOption = None,
    rounds: RoundsOption = None,
    priority: PriorityOption = None,
    max_attempts: AttemptsOption = None,
    timeout: TimeoutOption = None,
    silence: SilenceOption = None,
    retry_on: RetryOption = None,
    proxy: ProxyOption = None,
    config: ConfigOption = None,
) -> None:
    """Put the tasks of a file into the pool, all or none; adding them again changes nothing."""
    from lightning_proxy.runner import enqueue, read_tasks

    of_tasks = settings_of_tasks(group_size, rounds, priority, max_attempts, timeout, silence, retry_on)
    found = read_tasks(file, of_tasks)
    new = enqueue(proxy_client(settings_from(config, train__proxy_url=proxy)), found)
    typer.echo(f"{len(found)} tasks in {file}, {new} of them new to the pool")


def show(
    task_id: TaskId, json_: JsonOption = False, db: DbOption = None, config: ConfigOption = None
) -> None:
    """Show one task with its rollouts."""
    with open_store(settings_from(config, store__db=db)) as store:
        summary = store.get_task(task_id)
        rollouts = store.rollouts_of_task(task_id)
    if json_:
        print_json({**_flat(summary), "rollouts": rollouts})
        return
    task = summary.task
    typer.echo(
        f"task {task.task_id}: {task.state.value}, round {task.round} of {task.rounds}, "
        f"groups of {task.group_size}"
    )
    typer.echo(f"input: {json.dumps(task.input, ensure_ascii=False)}")
    typer.echo(
        f"its last rewarded rollouts: {task.standing.value}; {summary.succeeded} succeeded, {summary.failed} "
        f"failed, {summary.running} running, {summary.waiting} waiting, {summary.to_do} to do\n"
    )
    print_table(
        ("ROLLOUT", "ROUND", "STATE", "ATTEMPT", "WORKER", "CLAIMED", "ENDED", "WHY"),
        [
            (r["rollout_id"], r["round"], r["state"], r["attempt"], r["worker"], when(r["claimed_at"]),
             when(r["ended_at"]), r["error_class"])
            for r in rollouts
        ],
    )  # fmt: skip


def cancel(
    task_id: TaskId,
    reason: Annotated[str | None, typer.Option("--reason", help="Why, for the record.")] = None,
    json_: JsonOption = False,
    proxy: ProxyOption = None,
    config: ConfigOption = None,
) -> None:
    """Hand out nothing more of a task, and end what is under way."""
    client = proxy_client(settings_from(config, train__proxy_url=proxy))
    body = {} if reason is None else {"reason": reason}
    answer = client.request("POST", f"/api/tasks/{quote(task_id, safe='')}/cancel", body)
    if json_:
        print_json(answer)
    else:
        typer.echo(
            f"task {task_id} is {answer['state']}: {answer['succeeded']} rollouts succeeded, "
            f"{answer['failed']} failed, {answer['cancelled']} were cancelled"
        )


def _flat(summary: TaskSummary) -> dict[str, Any]:
    from lightning_proxy.store import as_json

    flat: dict[str, Any] = as_json(summary)
    return {**flat.pop("task"), **flat}


def _row(summary: TaskSummary) -> tuple[Any, ...]:
    task = summary.task
    rate = None if summary.success_rate is None else f"{summary.success_rate:.0%}"
    reward = None if summary.mean_reward is None else f"{summary.mean_reward:.3g}"
    return (
        short(task.task_id, 40),
        task.state.value,
        f"{task.round}/{task.rounds}",
        summary.to_do + summary.waiting,
        summary.running,
        summary.succeeded,
        summary.failed,
        rate,
        reward,
        task.skipped_solved + task.skipped_hopeless or None,
    )
