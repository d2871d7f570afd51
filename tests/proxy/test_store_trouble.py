"""A database that is locked or full is never the agent's trouble."""

from __future__ import annotations

import asyncio
import json
import resource
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.store import Fidelity, Store
from tests.conftest import MakeProxy, MakeProxyProcess, wait_until
from tests.engine import EngineThread
from tests.proxy.raw_http import CHAT, HELLO, JSON, chat, metric, recorded, send

TIMEOUT_S = 3.0


@contextmanager
def locked(db: Path) -> Iterator[None]:
    """Another connection holds the write lock for the length of a block."""
    other = sqlite3.connect(db, isolation_level=None, check_same_thread=False)
    try:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")
    finally:
        other.close()


def test_a_lock_of_several_seconds_fails_no_call_and_delays_calls_once(
    engine: EngineThread, make_proxy: MakeProxy
) -> None:
    proxy = make_proxy(engine.base_url, proxy={"commit_timeout_s": TIMEOUT_S}, store={"busy_timeout_s": 1.0})
    chat(proxy)
    stop = threading.Event()
    answered = [0] * 4

    def client(number: int) -> list[float]:
        took = []
        while not stop.is_set():
            begun = time.monotonic()
            body = {**HELLO, "stream": number % 2 == 0}
            assert send(proxy.url, f"/rollout/r{number}{CHAT}", body).status == 200
            took.append(time.monotonic() - begun)
            answered[number] += 1
            time.sleep(0.05)
        return took

    with locked(proxy.db), ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        try:
            wait_until(lambda: min(answered) > 10)
            faults = metric(proxy.url, 'lightning_capture_faults_total{kind="slow_store"}')
            ready = send(proxy.url, "/readyz")
            waiting = metric(proxy.url, "lightning_spans_pending")
        finally:
            stop.set()
        took = [one.result(30) for one in clients]
    assert 1 <= faults <= 4, "each client was delayed once at most"  # nobody waited in vain again
    assert ready.status == 503
    assert "the store" in ready.json["waits_for"][0]
    for times in took:
        assert max(times) < 2 * TIMEOUT_S
        assert sum(one >= TIMEOUT_S for one in times[1:]) == 0, "a later call waited again"
    calls = sum(map(len, took))
    assert waiting > calls / 2
    spans = recorded(proxy, calls + 1)
    assert {span.fidelity for span in spans} == {Fidelity.EXACT}
    assert len({span.response_id for span in spans}) == calls + 1
    wait_until(lambda: send(proxy.url, "/readyz").status == 200)
    assert metric(proxy.url, "lightning_spans_dropped") == 0


def test_a_call_waits_for_its_commit_again_once_the_store_is_well(
    engine: EngineThread, make_proxy: MakeProxy
) -> None:
    proxy = make_proxy(engine.base_url, proxy={"commit_timeout_s": 2.0})
    with locked(proxy.db):
        for _ in range(2):
            chat(proxy)
        assert metric(proxy.url, 'lightning_capture_faults_total{kind="slow_store"}') == 1, "it waited again"
    recorded(proxy, 2)
    with proxy.store() as store:
        for count in range(3, 8):
            chat(proxy)
            assert len(store.list_spans()) == count


def test_a_reward_waits_for_the_store_and_is_not_acknowledged_before(
    engine: EngineThread, make_proxy: MakeProxy
) -> None:
    proxy = make_proxy(engine.base_url, proxy={"commit_timeout_s": 0.1})
    with ThreadPoolExecutor(1) as pool:
        with locked(proxy.db):
            response_id = chat(proxy).json["id"]  # its span waits in memory
            posted = pool.submit(send, proxy.url, "/reward", {"value": 1, "response_id": response_id}, JSON)
            time.sleep(0.5)
            assert not posted.done()
        assert posted.result(60).status == 201
    with proxy.store() as store:
        assert [r.value for r in store.list_rewards(recorded(proxy)[0].rollout_id)] == [1.0]


def test_a_key_is_known_while_the_database_is_locked(engine: EngineThread, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(engine.base_url, proxy={"commit_timeout_s": 0.1}, store={"busy_timeout_s": 60.0})
    with proxy.store() as store:
        store.create_rollout(rollout_id="r1")
        key = store.issue_key("r1")
    with locked(proxy.db):
        begun = time.monotonic()
        assert chat(proxy, [("Authorization", f"Bearer {key}")]).status == 200
        assert time.monotonic() - begun < 30, "it waited for the lock"
    assert recorded(proxy)[0].rollout_id == "r1"


def test_long_lists_that_somebody_asks_for_delay_no_look_up_of_a_call(
    engine: EngineThread, make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_proxy(engine.base_url)
    question = [{"role": "user", "content": "tell me"}]
    reply = send(first.url, CHAT, {**HELLO, "messages": question}).json["choices"][0]["message"]
    begun_as = recorded(first)[0].rollout_id
    with first.store() as store:
        store.create_rollout(rollout_id="r1")
        key = store.issue_key("r1")
    proxy = make_proxy(engine.base_url)  # as after a restart
    chat(proxy)
    listed = Store.list_rollouts

    def slowly(store: Store, **wanted: Any) -> Any:
        time.sleep(0.3)
        return listed(store, **wanted)

    monkeypatch.setattr(Store, "list_rollouts", slowly)
    with ThreadPoolExecutor(12) as pool:
        lists = [pool.submit(send, proxy.url, "/api/rollouts") for _ in range(12)]
        wait_until(lambda: any(one.running() for one in lists))
        time.sleep(0.2)
        begun = time.monotonic()
        assert chat(proxy, [("Authorization", f"Bearer {key}")]).status == 200
        goes_on = [*question, reply, {"role": "user", "content": "and then?"}]
        assert send(proxy.url, CHAT, {**HELLO, "messages": goes_on}).status == 200
        assert time.monotonic() - begun < 1.5
        assert not all(one.done() for one in lists)
        assert {one.result(30).status for one in lists} == {200}
    spans = recorded(proxy, 4)
    assert [span.rollout_id for span in spans[2:]] == ["r1", begun_as]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")
def test_a_full_disk_fails_no_call_and_everything_is_there_once_it_has_room_again(
    engine: EngineThread, make_proxy_process: MakeProxyProcess
) -> None:
    env = {"LIGHTNING_PROXY__COMMIT_TIMEOUT_S": "0.2"}
    proxy = make_proxy_process(engine.base_url, env=env)
    send(proxy.url, CHAT, HELLO)
    pid = proxy.process.pid
    unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    written = max(path.stat().st_size for path in proxy.db.parent.glob("lightning.db*"))
    # No file of the process may grow any more: what a full disk is to SQLite.
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (written, unlimited[1]))
    text = "x" * 5000  # so that every span needs pages of its own
    body = {**HELLO, "messages": [{"role": "user", "content": text}], "max_tokens": 2}
    try:
        answers = [send(proxy.url, f"/rollout/r{i}{CHAT}", {**body, "stream": i % 2 == 0}) for i in range(20)]
        assert [answer.status for answer in answers] == [200] * 20
        assert metric(proxy.url, 'lightning_capture_faults_total{kind="slow_store"}') >= 1
        assert metric(proxy.url, "lightning_spans_pending") > 0
        assert send(proxy.url, "/readyz").status == 503
        assert "writes wait and are tried again" in proxy.log.read_text()
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
    with Store.open(proxy.db) as store:
        wait_until(lambda: len(store.list_spans(limit=100)) == 21)
        assert {span.fidelity for span in store.list_spans(limit=100)} == {Fidelity.EXACT}
    wait_until(lambda: send(proxy.url, "/readyz").status == 200)  # a moment after the commit
    assert "can be written again" in proxy.log.read_text()


def test_spans_given_up_are_counted_and_their_rollouts_marked(
    engine: EngineThread, make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_proxy.proxy import app
    from lightning_proxy.store import Writer

    monkeypatch.setattr(app, "Writer", lambda path, **options: Writer(path, max_pending=3, **options))
    proxy = make_proxy(engine.base_url, proxy={"commit_timeout_s": 0.1}, store={"busy_timeout_s": 0.1})
    with locked(proxy.db):
        for number in range(8):
            assert chat(proxy, prefix=f"/rollout/r{number}").status == 200
        wait_until(lambda: metric(proxy.url, "lightning_spans_dropped") >= 5)
        assert metric(proxy.url, 'lightning_capture_faults_total{kind="span_lost"}') >= 5
    spans = recorded(proxy, 3)
    assert [json.loads(span.request) for span in spans] == [HELLO] * 3
    kept = {span.rollout_id for span in spans}
    with proxy.store() as store:
        for number in range(8):
            rollout = store.get_rollout(f"r{number}")
            assert (rollout.incomplete is None) == (rollout.rollout_id in kept)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_go_through_though_nothing_is_written_any_more(
    engine: EngineThread, make_proxy: MakeProxy, stream: bool
) -> None:
    from lightning_proxy.proxy.app import PARTS

    proxy = make_proxy(engine.base_url)
    chat(proxy)
    writer = proxy._runner.app[PARTS].writer
    asyncio.run_coroutine_threadsafe(writer.close(), proxy._loop).result(10)
    answer = chat(proxy, stream=stream)
    assert answer.status == 200
    assert answer.body.endswith(b"[DONE]\n\n" if stream else b"}")
    assert metric(proxy.url, 'lightning_capture_faults_total{kind="span_lost"}') == 1
