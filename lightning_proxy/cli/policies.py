"""policies: which versions there are, and which one is served."""

from __future__ import annotations

from typing import Annotated, Any
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

app = typer.Typer(name="policies", invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def policies(
    ctx: typer.Context,
    policy: PolicyOption = None,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """List policy versions, newest first; promote one, or roll back."""
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
