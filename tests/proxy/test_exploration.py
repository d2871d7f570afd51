from __future__ import annotations

from typing import Any

import pytest

from lightning_proxy.config.settings import ExplorationSettings
from lightning_proxy.proxy.exploration import Exploration, explored
from tests.conftest import MakeProxy, ProxyThread
from tests.engine import EngineThread
from tests.proxy.raw_http import CHAT, JSON, recorded, send

HELLO = {"model": "policy", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, HELLO),
    ("/v1/completions", {"model": "policy", "prompt": "hello", "temperature": 0}),
    ("/v1/responses", {"model": "policy", "input": "hello", "temperature": 0}),
    ("/v1/messages", {**HELLO, "max_tokens": 20}),
]


def exploring(make_proxy: MakeProxy, engine: EngineThread, *entries: dict[str, Any]) -> ProxyThread:
    return make_proxy(engine.base_url, exploration=list(entries))


@pytest.mark.parametrize(("path", "body"), BODIES, ids=[path for path, _ in BODIES])
def test_the_engine_samples_at_our_temperature_and_the_span_says_so(
    engine: EngineThread, make_proxy: MakeProxy, path: str, body: dict[str, Any]
) -> None:
    proxy = exploring(make_proxy, engine, {"temperature": 1.0})
    assert send(proxy.url, path, body, JSON).status == 200
    assert engine.calls[-1].json["temperature"] == 1.0
    (span,) = recorded(proxy)
    assert span.sampling["temperature"] == 1.0
    assert span.sampling["explored"] is True
    assert b'"temperature": 0' in span.request or b'"temperature":0' in span.request


def test_without_the_setting_the_agents_temperature_stays(engine: EngineThread, proxy: ProxyThread) -> None:
    send(proxy.url, CHAT, HELLO, JSON)
    assert engine.calls[-1].json["temperature"] == 0
    (span,) = recorded(proxy)
    assert "explored" not in span.sampling


def test_only_the_named_role_and_only_calls_to_the_policy_explore(
    engine: EngineThread, make_proxy: MakeProxy
) -> None:
    proxy = exploring(make_proxy, engine, {"role": "writer", "temperature": 0.9})
    send(proxy.url, f"/rollout/r1/role/writer{CHAT}", HELLO, JSON)
    send(proxy.url, f"/rollout/r1/role/checker{CHAT}", HELLO, JSON)
    send(proxy.url, f"/rollout/r1/role/writer{CHAT}", {**HELLO, "model": "another"}, JSON)
    assert [span.sampling["temperature"] for span in recorded(proxy, 3)] == [0.9, 0, 0]


def test_a_share_of_rollouts_explores_with_all_of_its_calls() -> None:
    some = Exploration([ExplorationSettings(share=0.25, temperature=0.8)])
    ids = [f"rollout-{number}" for number in range(4000)]
    exploring = {name for name in ids if some.temperature(name, None) is not None}
    assert 0.22 < len(exploring) / len(ids) < 0.28
    assert {name for name in ids if some.temperature(name, "writer") is not None} == exploring


def test_the_first_entry_that_fits_decides() -> None:
    rules = Exploration(
        [ExplorationSettings(role="writer", temperature=0.5), ExplorationSettings(temperature=1.5)]
    )
    assert rules.temperature("r", "writer") == 0.5
    assert rules.temperature("r", "checker") == 1.5
    assert rules.temperature("r", None) == 1.5


def test_a_request_keeps_all_but_its_temperature() -> None:
    body, request = explored(b'{"model":"m","n":1.50}', {"model": "m", "n": 1.5}, 0.7)
    assert body == b'{"model":"m","n":1.50,"temperature":0.7}'
    assert request == {"model": "m", "n": 1.5, "temperature": 0.7}
