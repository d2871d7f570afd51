"""policies: which versions there are, which one is served, and by how much each is better."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from lightning_proxy.cli.common import (
    ConfigOption,
    DbOption,
    JsonOption,
    PolicyOption,
    ProxyOption,
    open_store,
    print_json,
    print_table,
    proxy_client,
    settings_from,
    short,
    when,
)

if TYPE_CHECKING:
    from lightning_proxy.store import Comparison, Estimate, VersionReturns

app = typer.Typer(name="policies", invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def policies(
    ctx: typer.Context,
    policy: PolicyOption = None,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """List policy versions, newest first; compare them, promote one, or roll back."""
    if ctx.invoked_subcommand is not None:
        return
    with open_store(settings_from(config, store__db=db)) as store:
        versions = store.list_versions(policy)
    if json_:
        print_json({"versions": versions})
        return
    print_table(
        ("POLICY", "VERSION", "STATUS", "PARENT", "RUN", "MADE", "WEIGHTS", "NOTE"),
        [
            (v.policy, v.version, v.status.value, v.parent, v.run_id, when(v.created_at), v.path,
             None if v.note is None else short(v.note))
            for v in versions
        ],
    )  # fmt: skip


def compare(
    against: Annotated[
        str,
        typer.Option("--against", help="first (that has a return), parent, or a version.", metavar="VERSION"),
    ] = "first",
    since: Annotated[
        str | None, typer.Option("--since", help="Only rollouts that began in the last 24h, 30d, ...")
    ] = None,
    reward: Annotated[
        str | None, typer.Option("--reward", help="Only the reward of this name, as it was posted.")
    ] = None,
    policy: PolicyOption = None,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """Is it getting better? Mean return of each version, first to last, with 95% intervals."""
    from lightning_proxy.store import against_from, seconds_of

    base = against_from(against)
    begin = 0.0 if since is None else time.time() - seconds_of(since)
    settings = settings_from(config, store__db=db)
    with open_store(settings) as store:
        name = policy or settings.policy.name
        found = store.compare_versions(name, against=base, since=begin, reward=reward)
    if json_:
        print_json(found)
        return
    _print_comparison(found, against)


def promote(
    version: Annotated[int, typer.Argument(min=0, help="Version that is to be served.")],
    policy: PolicyOption = None,
    proxy: ProxyOption = None,
    json_: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Let a version take over behind the running proxy."""
    settings = settings_from(config, train__proxy_url=proxy)
    name = policy or settings.policy.name
    path = f"/api/policies/{quote(name, safe='')}/versions/{version}/promote"
    _print_promotion(proxy_client(settings, timeout_s=600.0).request("POST", path), json_)


def rollback(
    to: Annotated[
        int | None, typer.Option("--to", min=0, help="Default: the parent of the active one.")
    ] = None,
    policy: PolicyOption = None,
    proxy: ProxyOption = None,
    json_: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Go back to an earlier version."""
    settings = settings_from(config, train__proxy_url=proxy)
    path = f"/api/policies/{quote(policy or settings.policy.name, safe='')}/rollback"
    body = {} if to is None else {"version": to}
    _print_promotion(proxy_client(settings, timeout_s=600.0).request("POST", path, body), json_)


def _print_promotion(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    difference = answer.get("verify_max_diff")
    checked = "without a probe" if difference is None else f"verified to {difference:.2g} nats"
    typer.echo(
        f"version {answer['version']} of {answer['policy']} is {answer['status']}, {checked}; "
        f"calls were held for {answer['swap_s']:.2f} s"
    )


def _print_comparison(found: Comparison, against: str) -> None:
    interval = "95% INTERVAL"
    compared = {str(each.against) for each in found.versions if each.against is not None}
    base = compared.pop() if against == "first" and compared else against.upper()
    rows = [_cells(each, str(each.version)) for each in found.versions]
    rows += [
        _cells(each, name)
        for name, each in (("mixed", found.mixed), ("unknown", found.unknown))
        if each.rollouts
    ]
    head = ("VERSION", "STATUS", "ROLLOUTS", "REWARDED", "SHARE", "MEAN", interval, f"VS {base}", interval)
    print_table(head, rows)
    if found.faulty:
        typer.echo(f"left out: {found.faulty} that failed by a fault of engine, network or proxy")


def _cells(row: VersionReturns, name: str) -> tuple[Any, ...]:
    share = None if row.share is None else f"{row.share:.1%}"
    status = row.status and row.status.value
    return (
        name,
        status,
        row.rollouts,
        row.rewarded,
        share,
        *_shown(row.mean, ""),
        *_shown(row.difference, "+"),
    )


def _shown(estimate: Estimate | None, sign: str) -> tuple[str | None, str | None]:
    if estimate is None:
        return None, None
    value = f"{estimate.value:{sign}.3g}"
    if estimate.low is None or estimate.high is None:
        return value, None
    return value, f"{estimate.low:{sign}.3g} to {estimate.high:{sign}.3g}"
