"""Options that many commands share, the settings they make, and how things are printed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lightning_proxy.client import ProxyClient
    from lightning_proxy.config import Settings
    from lightning_proxy.store import Store

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file. Default: lightning.toml here, if there is one."),
]
DbOption = Annotated[Path | None, typer.Option("--db", help="SQLite file. Default: store.db, lightning.db.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
ProxyOption = Annotated[
    str | None,
    typer.Option(
        "--proxy", "--proxy-url", help="The proxy's address. Default: train.proxy_url.", metavar="URL"
    ),
]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="Most rows to show.")]
PolicyOption = Annotated[str | None, typer.Option("--policy", help="Which policy. Default: policy.name.")]


def settings_from(config: Path | None, **flags: Any) -> Settings:
    """Settings with the flags that were given, named like ``proxy__port``; None is "not given"."""
    from lightning_proxy.config import load_settings

    overrides = {name.replace("__", "."): value for name, value in flags.items() if value is not None}
    return load_settings(config=config, overrides=overrides)


@contextmanager
def open_store(settings: Settings) -> Iterator[Store]:
    """The recorded data; UnknownTarget where there is none."""
    from lightning_proxy.store import RewardRule, Store

    with Store.open(settings.store.db, busy_timeout_s=settings.store.busy_timeout_s, create=False) as store:
        store.rule = RewardRule(**settings.reward_rule)
        yield store


def proxy_client(settings: Settings, *, timeout_s: float = 30.0) -> ProxyClient:
    """The running proxy, with the token that it was configured with."""
    from lightning_proxy.client import ProxyClient

    return ProxyClient(settings.train.proxy_url, settings.proxy.token, timeout_s)


def print_json(value: Any) -> None:
    """One JSON document, whatever it is made of."""
    from lightning_proxy.store.json_view import as_json

    typer.echo(json.dumps(as_json(value), indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned columns, the same on a terminal and in a pipe; None is shown as ``-``."""
    cells = [columns, *(["-" if value is None else str(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def when(seconds: float | None) -> str | None:
    """A Unix time in local words."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else None


def short(text: object, width: int = 60) -> str:
    """One line of at most ``width`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"
