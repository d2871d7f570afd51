"""prune: delete rollouts, and give their room back."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightning_proxy.cli.common import (
    ConfigOption,
    DbOption,
    JsonOption,
    open_store,
    print_json,
    settings_from,
)
from lightning_proxy.errors import InvalidInput

if TYPE_CHECKING:
    from lightning_proxy.store import Store
    from lightning_proxy.store.retention import Selection

_SHOWN = 10  # ids of rollouts that are named


def prune(
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than",
            help="Rollouts, open ones too, in which nothing has happened for this long: 90m, 12h, 30d, 8w.",
        ),
    ] = None,
    rollout: Annotated[list[str] | None, typer.Option("--rollout", help="This rollout; repeatable.")] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option("--tag", metavar="KEY=VALUE", help="Rollouts with this in their metadata; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    vacuum: Annotated[
        bool, typer.Option("--vacuum", help="Then make the file smaller; calls' spans wait meanwhile.")
    ] = False,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """Delete rollouts with all that was recorded of them; of several conditions all must hold."""
    selection = _selection(older_than, rollout or [], tag or [])
    if selection.is_empty and not vacuum:
        raise InvalidInput("nothing to delete is named: give --older-than, --rollout or --tag (or --vacuum)")
    with open_store(settings_from(config, store__db=db)) as store:
        report = _prune(store, selection, dry_run=dry_run, vacuum=vacuum, quiet=json_)
    if json_:
        print_json(report)
    else:
        _print(report)


def _selection(older_than: str | None, rollouts: list[str], tags: list[str]) -> Selection:
    from lightning_proxy.store import seconds_of
    from lightning_proxy.store.retention import Selection

    for tag in tags:
        if not tag.partition("=")[0] or "=" not in tag:
            raise InvalidInput(f"a tag is KEY=VALUE, and this is {tag!r}")
    silent_since = None if older_than is None else time.time() - seconds_of(older_than)
    return Selection(
        tuple(rollouts), silent_since, {tag.partition("=")[0]: tag.partition("=")[2] for tag in tags}
    )


def _prune(store: Store, selection: Selection, *, dry_run: bool, vacuum: bool, quiet: bool) -> dict[str, Any]:
    from lightning_proxy.store import retention

    found = retention.Found((), ()) if selection.is_empty else retention.find_rollouts(store, selection)
    before, _ = retention.room(store)
    report: dict[str, Any] = {
        "dry_run": dry_run,
        "rollouts": len(found.rollout_ids),
        "held": list(found.held),
    }
    if dry_run:
        return report | {"rollout_ids": list(found.rollout_ids), "bytes": before}
    shown = quiet or not sys.stderr.isatty() or not found.rollout_ids
    with typer.progressbar(
        length=len(found.rollout_ids), label="deleting", file=sys.stderr, hidden=shown
    ) as bar:
        deleted = retention.delete_rollouts(store, found.rollout_ids, lambda _: bar.update(1))
    emptied = retention.empty_log(store)
    if vacuum:
        retention.vacuum(store)
        emptied = retention.empty_log(store)
    size, free = retention.room(store)
    return report | {
        "rollouts": deleted.rollouts,
        "spans": deleted.spans,
        "held": [*found.held, *deleted.held],
        "bytes_before": before,
        "bytes": size,
        "bytes_free": free,
        "log_emptied": emptied,
    }


def _print(report: dict[str, Any]) -> None:
    if report["dry_run"]:
        names = report["rollout_ids"]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        which = f": {', '.join(names[:_SHOWN])}{more}" if names else ""
        typer.echo(f"would delete {report['rollouts']} rollouts{which}")
    else:
        typer.echo(f"deleted {report['rollouts']} rollouts with {report['spans']} calls")
        given_back = report["bytes_before"] - report["bytes"]
        typer.echo(
            f"the file has {_mib(report['bytes'])}, {_mib(given_back)} less than before; "
            f"{_mib(report['bytes_free'])} of it are free for what comes"
            + (" (--vacuum gives them back to the disk)" if report["bytes_free"] else "")
        )
        if not report["log_emptied"]:
            typer.echo(
                "somebody kept reading, so the log (FILE-wal) still has what was deleted: run this again"
            )
    if report["held"]:
        typer.echo(f"left alone, since a training run holds them: {', '.join(report['held'])}")


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
