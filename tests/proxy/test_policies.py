"""Several policies from one stream of traffic: each has its own engine, gate and versions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.config import Settings
from lightning_proxy.errors import ConfigError
from lightning_proxy.proxy.app import create_app
from lightning_proxy.proxy.engine_process import build_command
from lightning_proxy.store import PolicyVersion, Span, Store, VersionStatus
from tests.conftest import MakeProxy, ProxyThread, wait_until
from tests.engine import EngineThread, FakeEngine, Script
from tests.engine.model import weights_of
from tests.proxy.raw_http import CHAT, Answer, chat, metric, recorded, send
from tests.proxy.test_faults import free_port

MakeEngine = Callable[[FakeEngine], EngineThread]
WRITER, CHECKER = "policy", "checker"
PROBE = [5, 6, 7, 8]
RELOAD = "/collective_rpc"


@dataclass
class Two:
    """Two engines on weights of their own, and what a proxy before both is given."""

    engines: dict[str, EngineThread]
    weights: dict[tuple[str, int], Path]
    tables: dict[str, Any]
    make: MakeProxy

    def proxy(self, **tables: Any) -> ProxyThread:
        return self.make(self.engines[WRITER].base_url, **{**self.tables, **tables})

    def stage(self, store: Store, policy: str, version: int) -> None:
        """Do as the trainer does when it has made a version."""
        path = self.weights[policy, version]
        seed, model = weights_of(path), self.engines[policy].model
        probe = {
            "prompt_token_ids": PROBE,
            "logprobs": [model.logprob(place, PROBE[place], seed) for place in range(1, len(PROBE))],
        }
        run = store.begin_run(policy, owner="test", lease_s=60)
        made = PolicyVersion(policy, version, str(path), VersionStatus.STAGED, parent=0, probe=probe)
        store.commit_run(run.run_id, report={}, version=made)


@pytest.fixture
def two(make_engine: MakeEngine, make_proxy: MakeProxy, tmp_path: Path) -> Two:
    weights = {}
    for policy in (WRITER, CHECKER):
        for version in (0, 1):
            path = weights[policy, version] = tmp_path / f"{policy}-{version}"
            path.mkdir()
            (path / "config.json").write_text("{}")
            (path / "model.safetensors").write_bytes(f"{policy} {version}".encode())
    engines = {
        WRITER: make_engine(FakeEngine(name=WRITER, weights=weights[WRITER, 0])),
        # As vLLM with --served-model-name policy checker: answers show the first.
        CHECKER: make_engine(FakeEngine(name=WRITER, also=(CHECKER,), weights=weights[CHECKER, 0])),
    }
    further = {
        "name": CHECKER,
        "model": weights[CHECKER, 0],
        "upstream": engines[CHECKER].base_url,
        "roles": ("checker",),
        "route": True,
    }
    tables = {"policy": {"name": WRITER, "model": weights[WRITER, 0]}, "policies": [further]}
    return Two(engines, weights, tables, make_proxy)


def promote(proxy: ProxyThread, policy: str, version: int) -> Answer:
    return send(proxy.url, f"/api/policies/{policy}/versions/{version}/promote", b"", method="POST")


def stamp(span: Span) -> tuple[str | None, int | None, int | None]:
    return span.policy, span.policy_version, span.policy_version_end


def asked(two: Two) -> dict[str, int]:
    return {
        name: sum(request.path == CHAT for request in engine.calls) for name, engine in two.engines.items()
    }


def test_each_model_name_is_answered_by_its_policy(two: Two) -> None:
    proxy = two.proxy()
    assert chat(proxy).status == chat(proxy, model=CHECKER).status == 200
    assert [stamp(span) for span in recorded(proxy, 2)] == [(WRITER, 0, 0), (CHECKER, 0, 0)]
    assert {span.fidelity for span in recorded(proxy, 2)} == {"exact"}
    assert asked(two) == {WRITER: 1, CHECKER: 1}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["path", "header", "system prompt", "key"])
def test_a_role_goes_to_its_policy_though_it_asks_for_the_same_model_as_all(
    two: Two, how: str, stream: bool
) -> None:
    proxy = two.proxy(roles=[{"name": "checker", "system_contains": "You check"}])
    prefix, headers, more = "", [], {}
    if how == "path":
        prefix = "/rollout/r1/role/checker"
    elif how == "header":
        headers = [("X-Role", "checker")]
    elif how == "key":
        with proxy.store() as store:
            store.create_rollout(rollout_id="r1")
            headers = [("Authorization", f"Bearer {store.issue_key('r1', 1, 'checker')}")]
    else:
        more = {"messages": [{"role": "system", "content": "You check."}, {"role": "user", "content": "x"}]}
    answer = chat(proxy, headers, prefix=prefix, model=WRITER, stream=stream, **more)
    assert answer.status == 200
    shown = [event["model"] for event in answer.events[:-1]] if stream else [answer.json["model"]]
    assert set(shown) == {WRITER}, "the agent sees the name that it asked for"
    [span] = recorded(proxy)
    assert (span.role, span.model, *stamp(span)) == ("checker", WRITER, CHECKER, 0, 0)
    assert chat(proxy, prefix="/rollout/r1/role/writer").status == 200
    assert stamp(recorded(proxy, 2)[1]) == (WRITER, 0, 0)
    assert asked(two) == {WRITER: 1, CHECKER: 1}


def test_without_route_a_role_stays_with_the_model_that_it_asks_for(two: Two) -> None:
    [further] = two.tables["policies"]
    proxy = two.proxy(policies=[{**further, "route": False}])
    chat(proxy, prefix="/rollout/r1/role/checker")
    chat(proxy, prefix="/rollout/r1/role/checker", model=CHECKER)
    assert [span.policy for span in recorded(proxy, 2)] == [WRITER, CHECKER]


def test_a_role_that_asks_for_another_model_is_left_alone(two: Two, make_engine: MakeEngine) -> None:
    hosted = make_engine(FakeEngine(name="gpt-9", owner="openai", refuse_token_ids=True))
    proxy = two.proxy(upstreams=[{"models": ("gpt-*",), "url": hosted.base_url}])
    assert chat(proxy, prefix="/rollout/r1/role/checker", model="gpt-9").status == 200
    assert (recorded(proxy)[0].policy, len(hosted.calls)) == (None, 1)


def test_only_the_calls_of_the_policy_whose_weights_change_are_held(two: Two) -> None:
    proxy = two.proxy()
    with proxy.store() as store, ThreadPoolExecutor(2) as pool:
        two.stage(store, CHECKER, 1)
        loaded = threading.Event()
        two.engines[CHECKER].script(Script(until=loaded), path=RELOAD)
        promotion = pool.submit(promote, proxy, CHECKER, 1)
        wait_until(lambda: any(request.path == RELOAD for request in two.engines[CHECKER].requests))
        held = pool.submit(chat, proxy, prefix="/rollout/r1/role/checker")
        wait_until(lambda: metric(proxy.url, "lightning_held_calls") == 1)
        for _ in range(5):
            assert chat(proxy, prefix="/rollout/r1/role/writer").status == 200
        ready, stats = send(proxy.url, "/readyz"), send(proxy.url, "/api/stats").json
        assert not promotion.done()
        assert not held.done()
        loaded.set()
        assert promotion.result().status == 200
        assert held.result().status == 200
    assert (ready.status, ready.json["waits_for"]) == (503, ["weights are changing (checker)"])
    assert (stats["policy"], stats["serving_version"], stats["held_calls"]) == (WRITER, 0, 1)
    assert stats["policies"] == [
        {"policy": WRITER, "serving_version": 0, "held_calls": 0, "held_because": []},
        {"policy": CHECKER, "serving_version": 0, "held_calls": 1, "held_because": ["weights are changing"]},
    ]
    spans = recorded(proxy, 6)
    assert [stamp(span) for span in spans] == [(WRITER, 0, 0)] * 5 + [(CHECKER, 1, 1)]


def test_versions_of_policies_go_forth_and_back_each_for_itself(two: Two) -> None:
    proxy = two.proxy()
    with proxy.store() as store:
        for policy in (WRITER, CHECKER):
            two.stage(store, policy, 1)
    assert promote(proxy, CHECKER, 1).json["policy"] == CHECKER
    versions = 'lightning_policy_version{policy="%s"}'
    assert [metric(proxy.url, versions % policy) for policy in (WRITER, CHECKER)] == [0, 1]
    assert two.engines[WRITER].model.weights == weights_of(two.weights[WRITER, 0])
    assert two.engines[CHECKER].model.weights == weights_of(two.weights[CHECKER, 1])
    assert promote(proxy, WRITER, 1).status == 200
    back = send(proxy.url, f"/api/policies/{CHECKER}/rollback", b"", method="POST")
    assert (back.status, back.json["policy"], back.json["version"]) == (200, CHECKER, 0)
    assert [metric(proxy.url, versions % policy) for policy in (WRITER, CHECKER)] == [1, 0]
    listed = send(proxy.url, "/api/policies").json["policies"]
    assert {each["policy"]: each["active"] for each in listed} == {WRITER: 1, CHECKER: 0}


def test_a_policy_that_is_not_served_is_named_with_those_that_are(two: Two) -> None:
    answer = promote(two.proxy(), "other", 1)
    assert answer.status == 404
    assert answer.json["error"]["message"] == (
        "no policy 'other' is served here: there are 'policy', 'checker'"
    )


def test_a_restarted_proxy_brings_each_engine_back_to_its_active_version(
    two: Two, make_engine: MakeEngine
) -> None:
    first = two.proxy()
    with first.store() as store:
        for policy in (WRITER, CHECKER):
            two.stage(store, policy, 1)
    assert promote(first, CHECKER, 1).status == promote(first, WRITER, 1).status == 200
    for policy, engine in two.engines.items():
        fresh = FakeEngine(name=WRITER, also=engine.engine.also, weights=two.weights[policy, 0])
        two.engines[policy] = make_engine(fresh)
    two.engines[CHECKER].script(Script(delay_s=0.3), path=RELOAD)
    [further] = two.tables["policies"]
    later = two.proxy(policies=[{**further, "upstream": two.engines[CHECKER].base_url}])
    assert chat(later, model=CHECKER).status == chat(later).status == 200
    assert [stamp(span) for span in recorded(later, 2)] == [(CHECKER, 1, 1), (WRITER, 1, 1)]
    for policy, engine in two.engines.items():
        assert engine.model.weights == weights_of(two.weights[policy, 1])


def test_an_engine_that_does_not_answer_is_named_and_stops_only_its_own_calls(two: Two) -> None:
    [further] = two.tables["policies"]
    proxy = two.proxy(policies=[{**further, "upstream": f"http://127.0.0.1:{free_port()}/v1"}])
    ready = send(proxy.url, "/readyz")
    assert (ready.status, ready.json["waits_for"]) == (503, ["the engine does not answer (checker)"])
    assert chat(proxy).status == 200
    assert chat(proxy, model=CHECKER).status == 502


def test_a_policy_that_nothing_serves_is_said_at_the_start(two: Two) -> None:
    tables = {**two.tables, "proxy": {"upstream": "http://127.0.0.1:9/v1"}}
    tables["policies"] = [{"name": "lonely", "model": two.weights[CHECKER, 0]}]
    with pytest.raises(ConfigError, match="nothing serves the policy 'lonely'"):
        create_app(Settings.model_validate(tables))


def test_vllm_takes_both_names_where_roles_are_sent_to_it_and_shows_the_one_they_ask_for() -> None:
    settings = Settings().engine
    argv = build_command(settings, CHECKER, Path("/weights"), 8123, cpu=False, shown_as=WRITER).argv
    assert f"--served-model-name {WRITER} {CHECKER} --host" in " ".join(argv)
