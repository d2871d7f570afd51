"""The table of clients, its agents, and the page that is made of their results."""

from __future__ import annotations

import re
from pathlib import Path

from conformance.clients import AGENTS, CLIENTS
from conformance.replies import rules
from conformance.report import PAGE, page, read_results
from tests.engine.rules import read_rules


def sources() -> list[Path]:
    return [file for file in AGENTS.rglob("*") if file.suffix in (".py", ".mjs")]


def test_every_client_has_its_agent_and_every_agent_its_client() -> None:
    agents = {file.parent.name if file.suffix == ".mjs" else file.name for file in sources()}
    assert agents == {client.agent for client in CLIENTS}
    assert len({client.name for client in CLIENTS}) == len(CLIENTS)


def test_clients_of_one_environment_need_the_same() -> None:
    needs: dict[str, set[tuple[str, ...]]] = {}
    for client in CLIENTS:
        needs.setdefault(client.env or client.name, set()).add(client.requires)
    assert [env for env, requires in needs.items() if len(requires) > 1] == []


def test_agents_know_nothing_of_us() -> None:
    ours = re.compile(
        r"lightning|conformance|tests\.|rollout|x-session|localhost|127\.0\.0\.1", re.IGNORECASE
    )
    assert [file.name for file in sources() if ours.search(file.read_text(encoding="utf-8"))] == []


def test_every_clients_replies_are_rules_that_the_engine_takes(tmp_path: Path) -> None:
    for client in CLIENTS:
        file = tmp_path / client.name
        file.write_text(rules(client.replies), encoding="utf-8")
        assert read_rules(file)


def test_the_page_is_made_of_the_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_results())
