"""Weights change behind the proxy: calls are held, not refused, and are stamped with what made them."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.store import ErrorClass, PolicyVersion, RunState, Span, Store, VersionStatus
from tests.conftest import MakeProxy, MakeProxyProcess, ProxyThread, wait_until
from tests.engine import EngineThread, FakeEngine, Script
from tests.engine.model import weights_of
from tests.proxy.raw_http import CHAT, HELLO, JSON, Answer, Call, chat, leave_early, metric, recorded, send
from tests.proxy.test_faults import free_port

MakeEngine = Callable[[FakeEngine], EngineThread]
PROBE = [5, 6, 7, 8]
RELOAD, PROBING = "/collective_rpc", "/v1/completions"


def stage(store: Store, engine: EngineThread, version: int, path: Path, *, off_by: float = 0.0) -> int:
    """Do as the trainer does when it has made a version; returns its run."""
    seed = weights_of(path) if path.is_dir() and any(path.glob("*.safetensors")) else 0
    logprobs = [engine.model.logprob(i, PROBE[i], seed) + off_by for i in range(1, len(PROBE))]
    probe = {"prompt_token_ids": PROBE, "logprobs": logprobs}
    run = store.begin_run("policy", owner="test", lease_s=60)
    parent = store.active_version("policy")
    made = PolicyVersion(
        "policy",
        version,
        str(path),
        VersionStatus.STAGED,
        parent=parent.version if parent else None,
        probe=probe,
    )
    store.commit_run(run.run_id, report={}, version=made)
    return run.run_id


def promote(proxy_url: str, version: int, *, rollback: bool = False) -> Answer:
    path = "rollback" if rollback else f"versions/{version}/promote"
    return send(proxy_url, f"/api/policies/policy/{path}", b"", method="POST")


def statuses(store: Store) -> dict[int, str]:
    return {version.version: version.status.value for version in store.list_versions("policy")}


def control_calls(engine: EngineThread) -> list[str]:
    routes = ("/pause", "/resume", RELOAD)
    return [request.path for request in engine.requests if request.path in routes]


def made_by(engine: EngineThread, span: Span) -> list[set[int]]:
    """For each token of a span, the numbers of the weights that give it the logprob it has."""
    generation = span.generations[0]
    start = len(generation.prompt_token_ids)
    tokens = zip(generation.response_token_ids, generation.logprobs, strict=True)
    return [
        {n for n, seed in SEEDS.items() if abs(engine.model.logprob(start + i, token, seed) - logprob) < 1e-6}
        for i, (token, logprob) in enumerate(tokens)
    ]


SEEDS: dict[int, int] = {}


@pytest.fixture(autouse=True)
def _know_the_weights(weights: list[Path]) -> None:
    SEEDS.update({number: weights_of(path) for number, path in enumerate(weights)})


def check_stamps(engine: EngineThread, spans: list[Span]) -> None:
    """A span with one version was made by it alone; one with two may hold tokens of both."""
    for span in spans:
        assert span.policy == "policy"
        assert span.policy_version is not None
        assert span.policy_version_end is not None
        versions = {span.policy_version, span.policy_version_end}
        assert all(makers & versions for makers in made_by(engine, span)), versions


@contextmanager
def traffic(proxy: ProxyThread, clients: int = 6) -> Iterator[list[int]]:
    """Clients that call without a pause for the length of a block; yields the statuses they got."""
    stop, got = threading.Event(), list[int]()

    def client(number: int) -> None:
        for turn in itertools.count():
            if stop.is_set():
                return
            messages = [{"role": "user", "content": f"{number} {turn}"}]
            script = Script(chunk_delay_s=0.004, tokens=20)
            answer = send(
                proxy.url,
                CHAT,
                {**HELLO, "messages": messages, "stream": number % 2 == 0},
                [*JSON, *script.to_header().items()],
            )
            got.append(answer.status)

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, number) for number in range(clients)]
        try:
            yield got
        finally:
            stop.set()
            for one in running:
                one.result(30)


def test_calls_are_held_and_not_refused_while_a_version_takes_over(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    with policy_proxy.store() as store, traffic(policy_proxy) as got:
        stage(store, served, 1, weights[1])
        wait_until(lambda: len(got) >= 12)
        served.script(Script(delay_s=0.4), path=RELOAD)
        served.script(Script(delay_s=0.2), path=PROBING)
        begun = time.perf_counter()
        answer = promote(policy_proxy.url, 1)
        took, after = time.perf_counter() - begun, len(got)
        wait_until(lambda: len(got) >= after + 12)
    assert answer.status == 200, answer.body
    assert answer.json.keys() == {"policy", "version", "status", "swap_s", "verify_max_diff"}
    assert (answer.json["version"], answer.json["status"]) == (1, "active")
    assert 0.6 < answer.json["swap_s"] < took
    assert answer.json["verify_max_diff"] < 1e-4
    assert set(got) == {200}
    spans = recorded(policy_proxy, len(got))
    check_stamps(served, spans)
    assert {(span.policy_version, span.policy_version_end) for span in spans} >= {(0, 0), (1, 1)}
    assert {span.fidelity for span in spans} == {"exact"}
    with policy_proxy.store() as store:
        assert statuses(store) == {0: "retired", 1: "active"}


def test_a_call_that_ends_while_the_new_weights_are_still_being_verified_says_that_it_mixes(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
    pace, verified = threading.Semaphore(3), threading.Event()
    served.script(Script(pace=pace, tokens=20))
    served.script(Script(until=verified), path=PROBING)
    with Call(policy_proxy.url, CHAT, {**HELLO, "stream": True}) as call, ThreadPoolExecutor(1) as pool:
        call.read_until(b'"content":"')
        promotion = pool.submit(promote, policy_proxy.url, 1)
        wait_until(lambda: any(request.path == PROBING for request in served.requests))
        pace.release(30)
        call.rest()
        assert not promotion.done(), "the probe should still be under way"
        span = recorded(policy_proxy)[0]
        verified.set()
        assert promotion.result().status == 200
    check_stamps(served, [span])
    assert (span.policy_version, span.policy_version_end) == (0, 1)


def test_a_version_with_other_logprobs_than_the_trainers_is_taken_back(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    with policy_proxy.store() as store:
        chat(policy_proxy, prefix="/rollout/r1")
        store.add_reward(value=1, rollout_id="r1")
        run = store.begin_run("policy", owner="test", lease_s=60)
        assert len(store.drain(run.run_id, limit=10)) == 1
        store.fail_run(run.run_id, "only to see that there is something to drain")
        with traffic(policy_proxy) as got:
            run_id = stage(store, served, 1, weights[1], off_by=0.2)
            answer = promote(policy_proxy.url, 1)
            wait_until(lambda: len(got) >= 12)
        assert (answer.status, answer.json["error"]["code"]) == (409, "version_rejected")
        assert "0.2" in answer.json["error"]["message"]
        assert set(got) == {200}
        assert served.model.weights == SEEDS[0]
        assert statuses(store) == {0: "active", 1: "rejected"}
        assert store.get_version("policy", 1).note == answer.json["error"]["message"]
        assert store.list_runs()[0].run_id == run_id
        assert store.list_runs()[0].state is RunState.FAILED
        chat(policy_proxy)
        last = store.list_spans(limit=1)[0]
        assert (last.policy_version, last.policy_version_end) == (0, 0)
        assert promote(policy_proxy.url, 1).status == 409, "rejected for good"


@pytest.mark.parametrize("fault", ["missing", "no config", "no weights", "a file"])
def test_a_directory_without_weights_is_refused_before_the_engine_hears_of_it(
    served: EngineThread, policy_proxy: ProxyThread, tmp_path: Path, fault: str
) -> None:
    path = tmp_path / "bad"
    if fault == "a file":
        path.write_text("")
    elif fault != "missing":
        path.mkdir()
        (path / ("model.safetensors" if fault == "no config" else "config.json")).write_text("{}")
    with policy_proxy.store() as store:
        run_id = stage(store, served, 1, path)
        answer = promote(policy_proxy.url, 1)
        assert (answer.status, answer.json["error"]["code"]) == (409, "version_rejected")
        assert str(path) in answer.json["error"]["message"]
        assert control_calls(served) == []
        assert statuses(store) == {0: "active", 1: "rejected"}
        assert [r.state for r in store.list_runs() if r.run_id == run_id] == [RunState.FAILED]
    assert chat(policy_proxy).status == 200


def test_an_engine_without_control_routes_is_a_clear_error_and_goes_on_as_before(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    served.script(Script(status=404), path="/pause", times=10)
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
        answer = promote(policy_proxy.url, 1)
        assert (answer.status, answer.json["error"]["code"]) == (502, "engine_error")
        assert "VLLM_SERVER_DEV_MODE" in answer.json["error"]["message"]
        assert statuses(store) == {0: "active", 1: "staged"}
    chat(policy_proxy)
    span = recorded(policy_proxy)[0]
    assert (span.policy, span.policy_version, span.policy_version_end) == ("policy", 0, 0)


def test_an_engine_that_fails_to_load_gets_its_former_weights_back(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    served.script(Script(status=500, body="out of memory"), path=RELOAD)
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
        answer = promote(policy_proxy.url, 1)
        assert answer.status == 502
        assert "out of memory" in answer.json["error"]["message"]
        assert statuses(store) == {0: "active", 1: "staged"}
        assert control_calls(served) == ["/pause", RELOAD, "/resume"] * 2
        chat(policy_proxy)
        check_stamps(served, recorded(policy_proxy))
        assert promote(policy_proxy.url, 1).status == 200, "it may be tried again"


def test_an_engine_of_unknown_state_is_no_version_of_the_policy(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    served.script(Script(status=500), path=RELOAD, times=2)
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
    assert promote(policy_proxy.url, 1).status == 502
    assert chat(policy_proxy).status == 200
    span = recorded(policy_proxy)[0]
    assert (span.policy, span.policy_version) == (None, None)
    assert promote(policy_proxy.url, 1).status == 200
    chat(policy_proxy)
    assert recorded(policy_proxy, 2)[1].policy_version == 1


def test_a_rollback_goes_to_the_parent_and_may_name_a_version(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    with policy_proxy.store() as store:
        for version in (1, 2):
            stage(store, served, version, weights[version])
            assert promote(policy_proxy.url, version).status == 200
        assert served.model.weights == SEEDS[2]
        back = promote(policy_proxy.url, 0, rollback=True)
        assert (back.status, back.json["version"]) == (200, 1)
        assert served.model.weights == SEEDS[1]
        assert statuses(store) == {0: "retired", 1: "active", 2: "retired"}
        named = send(policy_proxy.url, "/api/policies/policy/rollback", {"version": 0})
        assert named.json["version"] == 0
        chat(policy_proxy)
        check_stamps(served, recorded(policy_proxy))
        assert recorded(policy_proxy)[0].policy_version == 0
    assert promote(policy_proxy.url, 0, rollback=True).status == 409, "version 0 has no parent"


@pytest.mark.parametrize("version", ["1", True, 1.5, [1]])
def test_a_rollback_to_what_is_no_version_is_a_400(policy_proxy: ProxyThread, version: object) -> None:
    answer = send(policy_proxy.url, "/api/policies/policy/rollback", {"version": version})
    assert answer.status == 400


def test_a_policy_that_is_not_served_here_is_a_404(policy_proxy: ProxyThread) -> None:
    answer = send(policy_proxy.url, "/api/policies/other/versions/0/promote", b"", method="POST")
    assert answer.status == 404
    assert "'policy'" in answer.json["error"]["message"]


def test_promotions_wait_for_one_another(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    with policy_proxy.store() as store:
        for version in (1, 2):
            stage(store, served, version, weights[version])
            assert promote(policy_proxy.url, version).status == 200
        served.script(Script(delay_s=0.2), path=RELOAD, times=2)
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda version: promote(policy_proxy.url, version), (0, 1)))
        assert [answer.status for answer in answers] == [200, 200]
        assert control_calls(served) == ["/pause", RELOAD, "/resume"] * 4
        active = store.active_version("policy")
    assert active is not None
    assert served.model.weights == SEEDS[active.version]


def test_a_version_that_was_staged_before_a_rollback_does_not_undo_it(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
        assert promote(policy_proxy.url, 1).status == 200
        stage(store, served, 2, weights[2])
        served.script(Script(delay_s=0.3), path=RELOAD)
        with ThreadPoolExecutor(1) as pool:
            back = pool.submit(promote, policy_proxy.url, 0, rollback=True)
            wait_until(lambda: control_calls(served).count(RELOAD) == 2)
            late = promote(policy_proxy.url, 2)
            assert back.result().status == 200
        assert (late.status, late.json["error"]["code"]) == (409, "conflict")
        assert "made from version 1, but version 0 serves" in late.json["error"]["message"]
        assert control_calls(served).count(RELOAD) == 2, "the engine was not touched"
        assert statuses(store) == {0: "active", 1: "retired", 2: "staged"}
    assert served.model.weights == SEEDS[0]


def test_a_trainer_that_hangs_up_does_not_leave_a_change_half_done(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    target, loaded = "/api/policies/policy/versions/1/promote", threading.Event()
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
        served.script(Script(until=loaded), path=RELOAD)
        leave_early(policy_proxy.url, target, once=lambda: RELOAD in control_calls(served))
        wait_until(lambda: not policy_proxy._runner.server or not policy_proxy._runner.server.connections)
        loaded.set()
        wait_until(lambda: statuses(store) == {0: "retired", 1: "active"})
    chat(policy_proxy)
    span = recorded(policy_proxy)[0]
    assert (span.policy_version, span.policy_version_end) == (1, 1)
    check_stamps(served, [span])


def test_calls_are_not_held_for_ever(
    served: EngineThread, make_proxy: MakeProxy, weights: list[Path]
) -> None:
    proxy = make_proxy(served.base_url, policy={"model": weights[0]}, proxy={"hold_timeout_s": 0.2})
    with proxy.store() as store:
        stage(store, served, 1, weights[1])
    loaded = threading.Event()
    served.script(Script(until=loaded), path=RELOAD)
    with ThreadPoolExecutor(1) as pool:
        promotion = pool.submit(promote, proxy.url, 1)
        wait_until(lambda: RELOAD in control_calls(served))
        ready = send(proxy.url, "/readyz")
        answer = chat(proxy)
        loaded.set()
        assert promotion.result().status == 200
    assert (answer.status, answer.json["error"]["code"]) == (503, "held_too_long")
    assert answer.header("retry-after") == "5"
    assert (ready.status, ready.json["waits_for"]) == (503, ["weights are changing"])
    assert chat(proxy).status == 200
    refused, _ = recorded(proxy, 2)
    assert (refused.status, refused.error_class) == (503, ErrorClass.UPSTREAM_UNREACHABLE)
    assert "did not become available in time" in (refused.error or "")
    assert refused.generations == ()


def test_a_held_call_whose_agent_has_left_is_never_sent(
    served: EngineThread, policy_proxy: ProxyThread, weights: list[Path]
) -> None:
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])

    def held() -> float:
        return metric(policy_proxy.url, "lightning_held_calls")

    loaded = threading.Event()
    served.script(Script(until=loaded), path=RELOAD)
    with ThreadPoolExecutor(1) as pool:
        promotion = pool.submit(promote, policy_proxy.url, 1)
        wait_until(lambda: RELOAD in control_calls(served))
        leave_early(policy_proxy.url, CHAT, HELLO, once=lambda: held() == 1)
        wait_until(lambda: held() == 0)
        loaded.set()
        assert promotion.result().status == 200
    assert held() == 0
    assert [request.path for request in served.calls] == [PROBING]


# -- restarts ------------------------------------------------------------------------------------


def test_a_restarted_proxy_brings_an_engine_back_to_the_active_version(
    served: EngineThread,
    policy_proxy: ProxyThread,
    make_engine: MakeEngine,
    make_proxy: MakeProxy,
    weights: list[Path],
) -> None:
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
    assert promote(policy_proxy.url, 1).status == 200
    fresh = make_engine(FakeEngine(weights=weights[0]))
    fresh.script(Script(delay_s=0.3), path=RELOAD)
    later = make_proxy(fresh.base_url, policy={"model": weights[0]})
    assert chat(later).status == 200, "held until the weights are back"
    assert fresh.model.weights == SEEDS[1]
    span = recorded(later)[0]
    assert (span.policy_version, span.policy_version_end) == (1, 1)
    check_stamps(fresh, [span])


def test_a_proxy_that_starts_before_its_engine_restores_the_version_once_it_answers(
    served: EngineThread, policy_proxy: ProxyThread, make_proxy: MakeProxy, weights: list[Path]
) -> None:
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
    promote(policy_proxy.url, 1)
    port = free_port()
    later = make_proxy(f"http://127.0.0.1:{port}/v1", policy={"model": weights[0]})
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(chat, later)
        wait_until(lambda: metric(later.url, "lightning_held_calls") == 1)
        late = EngineThread(FakeEngine(weights=weights[0]), port)
        try:
            assert call.result(60).status == 200
            assert late.model.weights == SEEDS[1]
        finally:
            late.stop()


def test_a_restart_before_an_engine_without_control_routes_does_not_guess(
    served: EngineThread,
    policy_proxy: ProxyThread,
    make_engine: MakeEngine,
    make_proxy: MakeProxy,
    weights: list[Path],
) -> None:
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
    promote(policy_proxy.url, 1)
    fixed = make_engine(FakeEngine(weights=weights[0]))
    fixed.script(Script(status=404), path="/pause", times=10)
    later = make_proxy(fixed.base_url, policy={"model": weights[0]})
    assert chat(later).status == 200
    span = recorded(later)[0]
    assert (span.policy, span.policy_version) == (None, None), "its weights are not those of version 1"


def test_a_version_that_only_waits_does_not_make_a_restart_depend_on_control_routes(
    served: EngineThread, policy_proxy: ProxyThread, make_proxy: MakeProxy, weights: list[Path]
) -> None:
    with policy_proxy.store() as store:
        stage(store, served, 1, weights[1])
    served.script(Script(status=404), path="/pause", times=10)
    later = make_proxy(served.base_url, policy={"model": weights[0]})
    assert chat(later).status == 200
    assert recorded(later)[0].policy_version == 0


def test_a_proxy_killed_in_mid_change_finds_its_way_back(
    served: EngineThread, make_proxy_process: MakeProxyProcess, weights: list[Path]
) -> None:
    env = {"LIGHTNING_POLICY__MODEL": str(weights[0])}
    proxy = make_proxy_process(served.base_url, env=env)
    with Store.open(proxy.db) as store:
        stage(store, served, 1, weights[1])
        served.script(Script(until=threading.Event()), path=RELOAD)  # the proxy does not see the end of it
        with ThreadPoolExecutor(1) as pool:
            promotion: Any = pool.submit(promote, proxy.url, 1)
            wait_until(lambda: RELOAD in control_calls(served))
            proxy.kill()
            with pytest.raises(OSError):  # noqa: PT011 - http.client raises one of several
                promotion.result()
        proxy = make_proxy_process(served.base_url, env=env)
        answer = send(proxy.url, CHAT, HELLO)
        assert answer.status == 200, "the engine is paused for good"
        (span,) = store.list_spans()
        assert (span.policy_version, span.policy_version_end) == (0, 0)
        check_stamps(served, [span])
        assert json.loads(span.request) == HELLO
        assert promote(proxy.url, 1).status == 200
        assert statuses(store) == {0: "retired", 1: "active"}
