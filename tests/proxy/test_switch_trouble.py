"""Engines and databases in trouble while weights change, and engines that are started again behind us."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.store import PolicyVersion, Span, Store, VersionStatus
from tests.conftest import MakeProxy, MakeProxyProcess, ProxyThread, wait_until
from tests.engine import EngineThread, FakeEngine, Script
from tests.engine.connection import Connection, Request
from tests.engine.model import weights_of
from tests.proxy.raw_http import CHAT, HELLO, Call, chat, metric, recorded, send
from tests.proxy.test_store_trouble import locked
from tests.proxy.test_switch import (
    PROBE,
    PROBING,
    RELOAD,
    SEEDS,
    check_stamps,
    control_calls,
    promote,
    stage,
    statuses,
)


@pytest.fixture(autouse=True)
def _know_the_weights(weights: list[Path]) -> None:
    SEEDS.update({number: weights_of(path) for number, path in enumerate(weights)})


@pytest.mark.parametrize(
    "probe", [{}, {"prompt_token_ids": PROBE}, {"prompt_token_ids": PROBE, "logprobs": [-1.0]}, {"x": 1}]
)
def test_a_version_whose_probe_cannot_be_read_is_taken_back(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path], probe: dict[str, Any]
) -> None:
    with policy_proxy.store() as store:
        made = PolicyVersion("policy", 1, str(weights[1]), VersionStatus.STAGED, parent=0, probe=probe)
        run = store.begin_run("policy", owner="test", lease_s=60)
        store.commit_run(run.run_id, report={}, version=made)
        answer = promote(policy_proxy.url, 1)
        assert (answer.status, answer.json["error"]["code"]) == (409, "version_rejected")
        assert statuses(store) == {0: "active", 1: "rejected"}
    assert served.model.weights == SEEDS[0]
    chat(policy_proxy)
    check_stamps(served, recorded(policy_proxy))


def test_a_locked_database_holds_no_call_once_the_weights_are_in(
    served: EngineThread, make_proxy: MakeProxy, weights: list[Path]
) -> None:
    tables: dict[str, Any] = {"store": {"busy_timeout_s": 0.2}, "policy": {"model": weights[0]}}
    proxy = make_proxy(served.base_url, proxy={"hold_timeout_s": 3.0, "commit_timeout_s": 0.2}, **tables)
    with proxy.store() as store:
        stage(store, served, 1, weights[1])
        served.script(Script(delay_s=0.5), path=RELOAD)
        with ThreadPoolExecutor(1) as pool:
            promotion = pool.submit(promote, proxy.url, 1)
            wait_until(lambda: RELOAD in control_calls(served))
            with locked(proxy.db):
                wait_until(lambda: "/resume" in control_calls(served))
                begun = time.monotonic()
                assert chat(proxy).status == 200
                assert time.monotonic() - begun < 2
                assert not promotion.done()
                assert statuses(store) == {0: "active", 1: "staged"}
            assert promotion.result(10).status == 200
        assert statuses(store) == {0: "retired", 1: "active"}
    span = recorded(proxy)[0]
    assert (span.policy_version, span.policy_version_end) == (1, 1)
    check_stamps(served, [span])


def test_a_version_that_took_over_and_was_not_noted_as_active_is_not_what_a_restart_serves(
    served: EngineThread, make_proxy_process: MakeProxyProcess, weights: list[Path]
) -> None:
    env = {"LIGHTNING_POLICY__MODEL": str(weights[0]), "LIGHTNING_STORE__BUSY_TIMEOUT_S": "0.2"}
    proxy = make_proxy_process(served.base_url, env=env)
    with Store.open(proxy.db) as store, ThreadPoolExecutor(1) as pool:
        stage(store, served, 1, weights[1])
        served.script(Script(delay_s=0.5), path=RELOAD)
        promotion = pool.submit(promote, proxy.url, 1)
        wait_until(lambda: RELOAD in control_calls(served))
        with locked(proxy.db):
            wait_until(lambda: [request.path for request in served.calls] == [PROBING])
            time.sleep(0.3)
            assert served.model.weights == SEEDS[1]
            proxy.kill()
        with pytest.raises(OSError):  # noqa: PT011 - http.client raises one of several
            promotion.result()
        assert statuses(store) == {0: "active", 1: "staged"}
        proxy = make_proxy_process(served.base_url, env=env)
        assert send(proxy.url, CHAT, HELLO, timeout=10).status == 200
        assert served.model.weights == SEEDS[0]
        check_stamps(served, store.list_spans(limit=1))


# -- an engine that stays paused -----------------------------------------------------------------


def test_a_pause_whose_answer_was_lost_is_taken_back(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    async def pause_and_vanish(request: Request, connection: Connection) -> None:
        served.engine._running.clear()
        connection.reset()

    served.engine._control["POST", "/pause"] = pause_and_vanish
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
        assert promote(policy_proxy.url, 1).status == 502
        assert statuses(store) == {0: "active", 1: "staged"}
    assert control_calls(served) == ["/pause", "/resume"]
    assert send(policy_proxy.url, CHAT, HELLO, timeout=5).status == 200
    check_stamps(served, recorded(policy_proxy))


@pytest.mark.parametrize("status", [401, 404, 500])
def test_an_engine_that_refuses_to_pause_and_to_resume_goes_on_answering(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path], status: int
) -> None:
    for path in ("/pause", "/resume"):
        served.script(Script(status=status), path=path, times=10)
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
        assert promote(policy_proxy.url, 1).status == 502
        assert statuses(store) == {0: "active", 1: "staged"}
    assert send(policy_proxy.url, CHAT, HELLO, timeout=5).status == 200
    check_stamps(served, recorded(policy_proxy))


def test_calls_are_held_until_an_engine_that_does_not_resume_has_resumed(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    served.script(Script(status=500, body="not now"), path="/resume", times=3)
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
        with ThreadPoolExecutor(2) as pool:
            promotion = pool.submit(promote, policy_proxy.url, 1)
            wait_until(lambda: control_calls(served).count("/resume") == 2)
            call = pool.submit(send, policy_proxy.url, CHAT, HELLO)
            ready = send(policy_proxy.url, "/readyz")
            assert not promotion.done()
            assert promotion.result(10).status == 200
            assert call.result(10).status == 200
        assert statuses(store) == {0: "retired", 1: "active"}
    assert ready.status == 503
    assert any("does not resume" in why and "not now" in why for why in ready.json["waits_for"])
    assert control_calls(served) == ["/pause", RELOAD, *["/resume"] * 4]
    check_stamps(served, recorded(policy_proxy))
    assert send(policy_proxy.url, "/readyz").status == 200


def test_an_engine_that_ends_while_it_is_paused_is_not_taken_for_the_new_version(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
        served.script(Script(reset=True, delay_s=0.2), path="/resume")
        with ThreadPoolExecutor(1) as pool:
            promotion = pool.submit(promote, policy_proxy.url, 1)
            wait_until(lambda: "/resume" in control_calls(served))
            served.stop()
            time.sleep(0.5)
            fresh = EngineThread(FakeEngine(weights=weights[0]), served.port)
            try:
                answer = promotion.result(20)
                assert answer.status == 502
                assert "went away" in answer.json["error"]["message"]
                assert statuses(store) == {0: "active", 1: "staged"}
                assert chat(policy_proxy).status == 200
                check_stamps(fresh, recorded(policy_proxy))
            finally:
                fresh.stop()


# -- an engine that somebody else starts again ---------------------------------------------------


@pytest.fixture
def promoted(served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]) -> ProxyThread:
    """A proxy whose engine was started on ``weights[0]`` and runs version 1."""
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
    assert promote(policy_proxy.url, 1).status == 200
    return policy_proxy


def last_span(proxy: ProxyThread) -> Span:
    with proxy.store() as store:
        return store.list_spans(limit=1)[0]


def version_metric(proxy: ProxyThread) -> float:
    return metric(proxy.url, 'lightning_policy_version{policy="policy"}')


@pytest.fixture
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_proxy.proxy.served._LOOK_EVERY_S", 0.1)


@pytest.mark.usefixtures("_looks_often")
@pytest.mark.parametrize("noticed_by", ["a call", "nobody"])
def test_an_engine_started_again_on_its_first_weights_gets_the_active_ones_back_before_calls_are_stamped(
    served: EngineThread,
    promoted: ProxyThread,
    weights: list[Path],
    noticed_by: str,
) -> None:
    served.stop()
    if noticed_by == "a call":
        assert chat(promoted).status == 502
    wait_until(lambda: version_metric(promoted) == -1)
    fresh = EngineThread(FakeEngine(weights=weights[0]), served.port)
    try:
        assert chat(promoted).status == 200, "answered by what runs"
        assert last_span(promoted).policy_version is None
        wait_until(lambda: version_metric(promoted) == 1)
        assert control_calls(fresh) == ["/pause", RELOAD, "/resume"]
        assert fresh.model.weights == SEEDS[1]
        assert chat(promoted).status == 200
        span = last_span(promoted)
        assert (span.policy_version, span.policy_version_end) == (1, 1)
        check_stamps(fresh, [span])
    finally:
        fresh.stop()


def test_a_broken_connection_of_a_healthy_engine_holds_no_call_and_loads_nothing(
    served: EngineThread, promoted: ProxyThread
) -> None:
    before = control_calls(served)
    served.script(Script(delay_s=0.5), path=PROBING)
    served.script(Script(reset=True))
    assert chat(promoted).status == 502
    begun = time.monotonic()
    assert chat(promoted).status == 200
    assert time.monotonic() - begun < 0.4
    wait_until(lambda: version_metric(promoted) == 1)
    assert control_calls(served) == before
    chat(promoted)
    assert last_span(promoted).policy_version == 1


def test_a_call_under_way_keeps_its_version_when_another_ones_connection_breaks(
    served: EngineThread, promoted: ProxyThread
) -> None:
    served.script(Script(chunk_delay_s=0.02, tokens=20))
    with Call(promoted.url, CHAT, {**HELLO, "stream": True}) as call:
        call.read_until(b'"content":"')
        served.script(Script(reset=True), times=2)
        assert chat(promoted).status == 502
        call.rest()
    spans = [span for span in recorded(promoted, 2) if span.error_class is None]
    assert [(span.policy_version, span.policy_version_end) for span in spans] == [(1, 1)]


def test_an_engine_whose_weights_never_changed_is_not_asked_what_it_runs(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    chat(policy_proxy)
    served.stop()
    assert chat(policy_proxy).status == 502
    fresh = EngineThread(FakeEngine(weights=weights[0]), served.port)
    try:
        assert chat(policy_proxy).status == 200
        assert last_span(policy_proxy).policy_version == 0
        assert [request.path for request in fresh.requests] == [CHAT]
    finally:
        fresh.stop()
