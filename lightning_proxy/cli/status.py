"""status: the whole circle at one look."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from lightning_proxy.cli.common import (
    ConfigOption,
    DbOption,
    JsonOption,
    ProxyOption,
    open_store,
    print_json,
    proxy_client,
    settings_from,
    when,
)
from lightning_proxy.errors import EngineUnreachable, UnknownTarget

if TYPE_CHECKING:
    from lightning_proxy.config import Settings
    from lightning_proxy.store import Store


def status(
    proxy: ProxyOption = None,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """Show the proxy, what is recorded, what waits, what is served."""
    settings = settings_from(config, store__db=db, train__proxy_url=proxy)
    running, recorded = _proxy(settings), _store(settings)
    if json_:
        print_json({"proxy": running, "store": recorded})
    else:
        _print(settings, running, recorded)


def _proxy(settings: Settings) -> dict[str, Any]:
    client = proxy_client(settings, timeout_s=3.0)
    try:
        status, body = client.send("GET", "/readyz")
        waits_for = json.loads(body)["waits_for"]
    except EngineUnreachable as error:
        return {"url": client.url, "answers": False, "ready": False, "why": str(error)}
    except (ValueError, LookupError, TypeError):
        why = f"what answers there is no lightning-proxy: status {status}"
        return {"url": client.url, "answers": True, "ready": False, "why": why}
    return {"url": client.url, "answers": True, "ready": status == 200, "why": "; ".join(waits_for)}


def _store(settings: Settings) -> dict[str, Any] | None:
    try:
        with open_store(settings) as store:
            return {
                "counts": store.stats(),
                **_policy(store, settings, settings.policy.name),
                "further_policies": {
                    each.name: _policy(store, settings, each.name) for each in settings.policies
                },
            }
    except UnknownTarget:
        return None


def _policy(store: Store, settings: Settings, name: str) -> dict[str, Any]:
    from lightning_proxy.config import for_policy

    demonstrated = for_policy(settings, name).train.learns_from_demonstrations
    runs = store.list_runs(name, limit=1)
    return {
        "backlog": store.backlog(name, demonstrated=demonstrated),
        "active": store.active_version(name),
        "last_run": runs[0] if runs else None,
    }


def _print(settings: Settings, proxy: dict[str, Any], store: dict[str, Any] | None) -> None:
    state = "ready" if proxy["ready"] else "answers, not ready" if proxy["answers"] else "does not answer"
    why = f": {proxy['why']}" if proxy["answers"] and proxy["why"] else ""
    _line("proxy", f"{proxy['url']} {state}{why}")
    if store is None:
        _line("database", f"{settings.store.db}: nothing recorded yet; `lightning-proxy serve` makes it")
        return
    counts = store["counts"]
    _line("database", f"{settings.store.db}, {counts['bytes'] / 2**20:.1f} MiB")
    _line(
        "rollouts",
        f"{counts['rollouts']}, {counts['rollouts_open']} open, {counts['rollouts_incomplete']} incomplete",
    )
    newest = f", newest {when(counts['last_span_at'])}" if counts["last_span_at"] else ""
    _line(
        "calls", f"{counts['spans']}, {counts['spans_exact']} exact, {counts['spans_failed']} failed{newest}"
    )
    _line("rewards", str(counts["rewards"]))
    _print_policy(settings.policy.name, store)
    for name, policy in store["further_policies"].items():
        _print_policy(name, policy)


def _print_policy(name: str, policy: dict[str, Any]) -> None:
    backlog, active, run = policy["backlog"], policy["active"], policy["last_run"]
    served = f"version {active.version}, since {when(active.created_at)}" if active else "no version yet"
    _line("policy", f"{name}: {served}")
    _line(
        "to train on",
        f"{backlog.rollouts_ready} rollouts with {backlog.spans} calls; "
        f"{backlog.rollouts_unrewarded} have no reward yet"
        + (f"; {backlog.rollouts_held} wait for the rest of their group" if backlog.rollouts_held else "")
        + (f"; {backlog.rollouts_again} come again for a late reward" if backlog.rollouts_again else ""),
    )
    if run is None:
        _line("last run", "none")
    else:
        why = f" ({run.error})" if run.error else ""
        _line("last run", f"number {run.run_id}, {run.state.value}{why}, begun {when(run.started_at)}")


def _line(label: str, text: str) -> None:
    typer.echo(f"{label:<12}{text}")
