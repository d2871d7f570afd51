"""spans roles: which agents have called, and the lines that name them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightning_proxy.cli.common import (
    ConfigOption,
    DbOption,
    JsonOption,
    open_store,
    print_json,
    print_table,
    settings_from,
    short,
)

if TYPE_CHECKING:
    from lightning_proxy.proxy.roles import Roles
    from lightning_proxy.store import Store

_SAMPLE = 400  # characters of a system prompt


@dataclass(slots=True)
class _Agent:
    """The calls with one fingerprint."""

    fingerprint: str
    role: str | None  # as the settings name it
    system: str
    tools: tuple[str, ...]
    calls: int = 0
    rollouts: set[str] = field(default_factory=set)
    recorded_as: set[str] = field(default_factory=set)


def roles(
    ctx: typer.Context,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, help="How many of the newest calls to look at.")
    ] = 2000,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """List the agents among the recorded calls by fingerprint, with lines that give them roles."""
    from lightning_proxy.proxy.roles import Roles

    before: dict[str, Any] = ctx.parent.params if ctx.parent is not None else {}  # `spans --json roles`
    settings = settings_from(config or before["config"], store__db=db or before["db"])
    with open_store(settings) as store:
        agents = _agents(store, Roles(settings.roles), limit)
    if json_ or before["json_"]:
        print_json({"roles": [_as_json(agent) for agent in agents], "toml": _toml(agents)})
        return
    print_table(
        ("FINGERPRINT", "CALLS", "ROLLOUTS", "ROLE", "RECORDED AS", "TOOLS", "SYSTEM PROMPT"),
        [
            (a.fingerprint, a.calls, len(a.rollouts), a.role, ", ".join(sorted(a.recorded_as)) or None,
             short(", ".join(a.tools), 40) or None, short(a.system) or None)
            for a in agents
        ],
    )  # fmt: skip
    if lines := _toml(agents):
        typer.echo(f"\nTo name those without a role, paste this into lightning.toml:\n\n{lines}")


def _agents(store: Store, roles: Roles, limit: int) -> list[_Agent]:
    """Those of the newest calls, the one with most calls first."""
    from lightning_proxy.proxy.conversation import system_of, tools_of
    from lightning_proxy.proxy.roles import fingerprint

    agents: dict[str, _Agent] = {}
    for rollout_id, role, wire, body in store.recent_requests(limit):
        try:
            request = json.loads(body)
            system, tools = system_of(wire, request), tools_of(request)
        except (ValueError, AttributeError, TypeError, RecursionError):  # what is no request says nothing
            continue
        mark = fingerprint(system, tools)
        agent = agents.get(mark)
        if agent is None:
            agent = agents[mark] = _Agent(mark, roles.role_for(system, tools), system, tools)
        agent.calls += 1
        agent.rollouts.add(rollout_id)
        if role is not None:
            agent.recorded_as.add(role)
    return sorted(agents.values(), key=lambda agent: (-agent.calls, agent.fingerprint))


def _as_json(agent: _Agent) -> dict[str, Any]:
    return {
        "fingerprint": agent.fingerprint,
        "calls": agent.calls,
        "rollouts": len(agent.rollouts),
        "role": agent.role,
        "recorded_as": sorted(agent.recorded_as),
        "tools": agent.tools,
        "system": agent.system[:_SAMPLE],
    }


def _toml(agents: list[_Agent]) -> str:
    """Entries for the agents that have no role yet, with names to be changed."""
    entries = []
    for agent in agents:
        if agent.role is not None:
            continue
        known = sorted(agent.recorded_as)
        name = known[0] if len(known) == 1 else f"agent-{agent.fingerprint}"
        said = short(agent.system, 80) or "no system prompt"
        told = f"{said} ({', '.join(agent.tools)})" if agent.tools else said
        comment = "".join(char for char in short(told, 90) if char.isprintable())
        mark = f'fingerprint = "{agent.fingerprint}"'
        entries.append(f"[[roles]]\nname = {json.dumps(name)}  # {comment}\n{mark}\n")
    return "\n".join(entries)
