"""The clients that most agents are built on run through a real proxy as they do without it.

``make conformance`` runs many more.
"""

from __future__ import annotations

import pytest

from conformance.clients import CLIENTS, Client
from conformance.environments import Environment, environment_for
from conformance.judge import try_client

CORE = [client for client in CLIENTS if client.core]


@pytest.fixture(scope="session")
def environments() -> dict[str, Environment]:
    """Takes a minute where they are not made yet. Of the session, so that pip finds its proxy variables."""
    return {client.name: environment_for(client) for client in CORE}


@pytest.mark.clients
@pytest.mark.timeout(600)
@pytest.mark.parametrize("client", CORE, ids=lambda client: client.name)
def test_a_real_client_does_the_same_and_every_call_is_a_span(
    client: Client, environments: dict[str, Environment]
) -> None:
    verdict = try_client(client, environments[client.name])
    assert verdict.not_run is None
    assert verdict.wrong == []
