"""train: learning from what was recorded."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

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
from lightning_proxy.errors import InvalidInput, StoreError, TrainingError

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
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="Weights to begin with, for the first run.")
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
    1: failed; everything that was drained waits for the next run.
    """
    if watch and (dry_run or require_update):
        raise InvalidInput(
            "--watch goes on whatever a pass finds: give it without --dry-run and --require-update"
        )
    settings = settings_from(
        config, store__db=db, policy__model=model, train__algorithm=algorithm, train__proxy_url=proxy
    )
    with _unwinding_on_sigterm():
        if watch:
            _watch(settings, json_)
        code = _one_pass(settings, json_, dry_run=dry_run, require_update=require_update)
    raise typer.Exit(code)


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


def _one_pass(settings: Settings, as_json: bool, *, dry_run: bool, require_update: bool) -> int:
    from lightning_proxy.trainer.report import Outcome
    from lightning_proxy.trainer.run import train_once

    with open_store(settings) as store, _progress() as progress:
        report = train_once(settings, store=store, progress=progress, dry_run=dry_run)
    _print_report(report, as_json)
    if report.outcome in (Outcome.REJECTED, Outcome.GUARDED):
        return 1
    idle = report.outcome in (Outcome.NOTHING, Outcome.STAGED_ONLY)
    return NO_UPDATE if idle and require_update else 0


def _watch(settings: Settings, as_json: bool) -> NoReturn:
    """A pass that fails is reported and followed by the next; only a bug or a signal ends this."""
    from lightning_proxy.trainer.report import Outcome
    from lightning_proxy.trainer.run import Trainer

    said = None
    with (
        open_store(settings) as store,
        _progress() as progress,
        Trainer(settings, store=store, progress=progress) as trainer,
    ):
        trainer.preload()
        while True:
            try:
                report = trainer.train_once()
            except (StoreError, TrainingError) as error:
                typer.echo(f"lightning-proxy: {error}", err=True)
            else:
                idle = report.outcome is Outcome.NOTHING and report.run_id is None
                if not idle or report.message != said:
                    _print_report(report, as_json)
                said = report.message
            time.sleep(settings.train.watch_interval_s)


def _print_report(report: TrainReport, as_json: bool) -> None:
    if as_json:
        print_json(report.as_dict())
        return
    typer.echo(f"{report.outcome.value}: {report.message}")
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
