"""The clients that most agents are built on run through a real proxy as they do without it.

``make conformance`` runs many more. The first test makes the environment, which takes a minute once.
"""

from __future__ import annotations

import pytest

from conformance.clients import CLIENTS, Client
from conformance.environments import environment_for
from conformance.judge import try_client

CORE = [client for client in CLIENTS if client.core]


@pytest.mark.clients
@pytest.mark.timeout(600)
@pytest.mark.parametrize("client", CORE, ids=lambda client: client.name)
def test_a_real_client_does_the_same_and_every_call_is_a_span(client: Client) -> None:
    verdict = try_client(client, environment_for(client))
    assert verdict.not_run is None
    assert verdict.wrong == []
