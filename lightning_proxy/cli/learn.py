"""train: learning from what was recorded."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lightning_proxy.cli.common import (
    ConfigOption,
    DbOption,
    JsonOption,
    ProxyOption,
    open_store,
    print_json,
    settings_from,
)
from lightning_proxy.errors import InvalidInput, LightningError, TrainingError

if TYPE_CHECKING:
    from lightning_proxy.config import Settings
    from lightning_proxy.trainer.report import Progress, TrainReport

NO_UPDATE = 3


def train(
    watch: Annotated[bool, typer.Option("--watch", help="Go on, pass after pass, until stopped.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what it would train on; take nothing.")
    ] = False,
    require_update: Annotated[
        bool, typer.Option("--require-update", help="Exit with 3 where no new version took over.")
    ] = False,
    retry: Annotated[
        bool,
        typer.Option(
            "--retry", help="Train again on what the last run was refused for, though nothing is new."
        ),
    ] = False,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="Weights to begin with, for the first run.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Which policy. Default: every one, one after the other.")
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option("--algorithm", help="What to learn by: rl, sft or dpo, in place of [train] algorithm."),
    ] = None,
    proxy: ProxyOption = None,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """Learn from what was recorded: one pass, made for cron.

    Exit code 0: trained, or nothing to train on (a line says why; --require-update makes that 3).
    1: failed; everything that was drained waits for the next run. Of several policies each has its own
    pass, the worst decides, and --json prints a list.
    """
    if watch and (dry_run or require_update or retry):
        raise InvalidInput(
            "--watch goes on whatever a pass finds: give it without --dry-run, --require-update and --retry"
        )
    settings = settings_from(config, store__db=db, train__algorithm=algorithm, train__proxy_url=proxy)
    chosen = _chosen(settings, policy, model)
    from lightning_proxy.trainer.run import train_once

    once = partial(train_once, dry_run=dry_run, retry=retry)
    with _unwinding_on_sigterm():
        if watch:
            _watch(chosen, json_)
        if len(chosen) == 1:
            code = _one_pass(chosen[0], json_, once, require_update=require_update)
        else:
            code = _a_pass_each(chosen, json_, once, require_update=require_update)
    raise typer.Exit(code)


def _chosen(settings: Settings, policy: str | None, model: Path | None) -> list[Settings]:
    """Settings for each policy that is to be trained. ``model``: the weights that the first begins with."""
    from lightning_proxy.config import for_policy, policy_names

    chosen = [for_policy(settings, name) for name in ([policy] if policy else policy_names(settings))]
    if model is not None:
        first = chosen[0]
        chosen[0] = first.model_copy(update={"policy": first.policy.model_copy(update={"model": model})})
    return chosen


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """End in order, so that a run that is cut gives back at once what it drained."""

    def leave(signum: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _one_pass(
    settings: Settings, as_json: bool, train_once: Callable[..., TrainReport], *, require_update: bool
) -> int:
    with open_store(settings) as store, _progress() as progress:
        try:
            report = train_once(settings, store=store, progress=progress)
        except OSError as error:  # a full disk, most of all
            raise TrainingError(f"{error}: what was drained waits for the next run") from error
    _print_report(report, as_json)
    return _exit_code(report, require_update)


def _a_pass_each(
    chosen: Sequence[Settings], as_json: bool, train_once: Callable[..., TrainReport], *, require_update: bool
) -> int:
    """A pass for each policy: what goes wrong with one is no reason to leave the others out.

    Returns the worst exit code: 1, then 3, then 0.
    """
    codes, reports = set[int](), list[dict[str, Any]]()
    with open_store(chosen[0]) as store, _progress() as progress:
        for settings in chosen:
            name = settings.policy.name
            try:
                report = train_once(settings, store=store, progress=_naming(name, progress))
            except (LightningError, OSError) as error:
                typer.echo(f"lightning-proxy: {name}: {error}", err=True)
                reports.append({"policy": name, "outcome": "failed", "message": str(error)})
                codes.add(1)
                continue
            reports.append(report.as_dict())
            codes.add(_exit_code(report, require_update))
            if not as_json:
                _print_report(report, as_json, name)
    if as_json:
        print_json(reports)
    return next(code for code in (1, NO_UPDATE, 0) if code in codes)


def _exit_code(report: TrainReport, require_update: bool) -> int:
    from lightning_proxy.trainer.report import Outcome

    if report.outcome in (Outcome.REJECTED, Outcome.GUARDED):
        return 1
    idle = report.outcome in (Outcome.NOTHING, Outcome.STAGED_ONLY)
    return NO_UPDATE if idle and require_update else 0


def _watch(chosen: Sequence[Settings], as_json: bool) -> NoReturn:
    """A pass that fails is reported and followed by the next; only a bug or a signal ends this."""
    from lightning_proxy.trainer.report import Outcome
    from lightning_proxy.trainer.run import Trainer
    from lightning_proxy.trainer.warm import WarmBackend

    said: dict[str, str] = {}
    several = len(chosen) > 1
    warm = WarmBackend()
    with open_store(chosen[0]) as store, _progress() as progress, ExitStack() as at_the_end:
        at_the_end.callback(warm.discard)
        trainers: dict[str, Trainer] = {}
        for settings in chosen:
            name = settings.policy.name
            say = _naming(name, progress) if several else progress
            trainers[name] = Trainer(settings, store=store, progress=say, warm=warm)
        for trainer in trainers.values():
            trainer.preload()
        while True:
            for name, trainer in trainers.items():
                try:
                    report = trainer.train_once()
                except (LightningError, OSError) as error:
                    typer.echo(f"lightning-proxy: {f'{name}: ' if several else ''}{error}", err=True)
                else:
                    idle = report.outcome is Outcome.NOTHING and report.run_id is None
                    if not idle or report.message != said.get(name):
                        _print_report(report, as_json, name if several else None)
                    said[name] = report.message
            time.sleep(chosen[0].train.watch_interval_s)


def _naming(policy: str, progress: Progress) -> Progress:
    """Says of which policy each line is."""

    def say(line: str, done: float | None = None) -> None:
        progress(f"{policy}: {line}", done)

    return say


def _print_report(report: TrainReport, as_json: bool, policy: str | None = None) -> None:
    """``policy``: its name, where there are several."""
    if as_json:
        print_json(report.as_dict())
        return
    typer.echo(f"{f'{policy}: ' if policy else ''}{report.outcome.value}: {report.message}")
    for what, methods in report.groups.items():
        by = ", ".join(f"{n} by {method}" for method, n in methods.items())
        typer.echo(f"  groups {what.replace('_', ' ')}: {by}")
    for what, reasons in report.left_out.items():
        if reasons:
            typer.echo(f"  {what} left out: " + ", ".join(f"{n} {reason}" for reason, n in reasons.items()))
    for what, classes in report.failures.items():
        seen = "calls with failures" if what == "calls" else f"{what} for failures"
        typer.echo(f"  {seen}: " + ", ".join(f"{n} {name}" for name, n in classes.items()))
    if report.seconds:
        typer.echo(
            "  seconds: " + ", ".join(f"{phase} {taken:.1f}" for phase, taken in report.seconds.items())
        )


@contextmanager
def _progress() -> Iterator[Progress]:
    """Says what happens, on stderr: with a bar and a clock on a terminal, else plain lines."""
    if not sys.stderr.isatty():

        def say_plainly(line: str, done: float | None = None) -> None:
            if done is None:
                typer.echo(line, err=True)

        yield say_plainly
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=None)

        def say(line: str, done: float | None = None) -> None:
            if done is None:
                bar.console.print(line, highlight=False, markup=False)
            unknown = done is None or done >= 1.0
            bar.update(task, description=line, total=None if unknown else 1.0, completed=done or 0.0)

        yield say
