"""The task pool over HTTP: what workers on any machine ask of it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.store import RolloutState, Store, new_task
from tests.conftest import MakeProxy, ProxyThread, wait_until
from tests.engine import EngineThread
from tests.proxy.raw_http import HELLO, JSON, send
from tests.proxy.test_control import api, refused
from tests.proxy.test_store_trouble import locked


def enqueue(proxy: ProxyThread, task_id: str = "a", **settings: Any) -> Any:
    return api(proxy, "tasks", {"task_id": task_id, "input": {"q": task_id}, **settings})


def claim(proxy: ProxyThread, **wanted: Any) -> list[Any]:
    given: list[Any] = api(proxy, "tasks/claim", {"worker": "w", **wanted})["assignments"]
    return given


def test_a_task_is_enqueued_once(proxy: ProxyThread) -> None:
    task = {"task_id": "a", "input": {"q": 1}, "group_size": 2}
    first, again = send(proxy.url, "/api/tasks", task), send(proxy.url, "/api/tasks", task)
    assert (first.status, again.status) == (201, 200)
    assert (first.json["created"], again.json["created"]) == (True, False)
    status, message = refused(proxy, "tasks", {"task_id": "a", "input": {"q": 2}})
    assert (status, "another input" in message) == (409, True)


def test_a_list_of_tasks_is_enqueued_as_one(proxy: ProxyThread) -> None:
    made = api(proxy, "tasks", [{"task_id": "a", "q": 1}, {"task_id": "b", "q": 1}])["tasks"]
    assert [each["task_id"] for each in made] == ["a", "b"]
    status, message = refused(proxy, "tasks", [{"task_id": "c", "q": 1}, {"task_id": "d"}])
    assert (status, message.startswith("tasks[1] has no input")) == (400, True)
    assert refused(proxy, "tasks", [{"task_id": "c", "q": 1}, {"task_id": "a", "q": 2}])[0] == 409
    assert [each["task_id"] for each in api(proxy, "tasks")["tasks"]] == ["a", "b"]


def test_a_claim_has_all_that_an_agent_needs(proxy: ProxyThread, engine: EngineThread) -> None:
    enqueue(proxy, metadata={"split": "train"}, resources={"prompt": "p"}, timeout_s=60, silence_s=5)
    [given] = claim(proxy, lease_s=30)
    assert (given["task_id"], given["attempt"], given["round"], given["input"]) == ("a", 1, 1, {"q": "a"})
    assert (given["metadata"], given["resources"]) == ({"split": "train"}, {"prompt": "p"})
    assert (given["timeout_s"], given["silence_s"]) == (60, 5)
    assert 20 < given["lease_expires_at"] - time.time() <= 30
    by_path = send(given["base_url"], "/chat/completions", HELLO)
    by_key = send(
        proxy.url, "/v1/chat/completions", HELLO, (*JSON, ("Authorization", f"Bearer {given['api_key']}"))
    )
    assert (by_path.status, by_key.status) == (200, 200)
    with proxy.store() as store:
        spans = store.spans_of_attempt(given["rollout_id"], 1)
    assert [span.attributed_by for span in spans] == ["path", "key"]


def test_an_attempt_goes_its_way_by_heartbeat_and_finish(proxy: ProxyThread) -> None:
    enqueue(proxy, max_attempts=2)
    [first] = claim(proxy)
    attempt = f"rollouts/{first['rollout_id']}/attempts/1"
    beat = api(proxy, f"{attempt}/heartbeat", {"lease_s": 100, "alive": False})
    assert (beat["stop"], beat["reason"]) == (False, None)
    assert beat["lease_expires_at"] > time.time() + 90
    end = {"state": "failed", "exit_code": 3}
    for _ in range(2):
        assert api(proxy, f"{attempt}/finish", end)["state"] == "open"
    [second] = claim(proxy, wait_s=20)
    assert (second["rollout_id"], second["attempt"]) == (first["rollout_id"], 2)
    assert second["base_url"].endswith("/attempt/2/v1")
    assert api(proxy, f"{attempt}/heartbeat", {})["stop"]
    status, message = refused(proxy, f"{attempt}/finish", {"state": "succeeded"})
    assert status == 409
    assert "it ended as failed (exit code 3), and attempt 2 was given to w" in message
    done = api(proxy, f"rollouts/{first['rollout_id']}/attempts/2/finish", {"state": "succeeded"})
    assert done["state"] == "succeeded"
    shown = api(proxy, "tasks/a")
    assert (shown["state"], shown["succeeded"], shown["failed"]) == ("done", 1, 0)
    assert [each["tries"] for each in shown["rollouts"]] == [1]


def test_an_attempt_is_given_back(proxy: ProxyThread) -> None:
    enqueue(proxy)
    [first] = claim(proxy)
    attempts = f"rollouts/{first['rollout_id']}/attempts"
    released = api(proxy, f"{attempts}/1/release", {"reason": "going home"})
    assert released == {"released": True, "reason": None}
    [second] = claim(proxy)
    assert (second["rollout_id"], second["attempt"]) == (first["rollout_id"], 2)
    api(proxy, f"{attempts}/2/finish", {"state": "succeeded"})
    released = api(proxy, f"{attempts}/2/release", {})
    assert released == {"released": False, "reason": "it ended as succeeded"}


def test_a_worker_that_is_back_gets_its_attempts_again(proxy: ProxyThread) -> None:
    enqueue(proxy, group_size=2)
    claim(proxy, limit=2, lease_s=1000)
    assert claim(proxy) == []
    assert api(proxy, "tasks/abandon", {"worker": "w"}) == {"abandoned": 2}
    assert [each["attempt"] for each in claim(proxy, limit=2)] == [2, 2]


def test_a_claim_waits_for_work(proxy: ProxyThread) -> None:
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.extend(claim(proxy, wait_s=20)))
    waiting.start()
    time.sleep(0.2)
    begun = time.monotonic()
    enqueue(proxy)
    waiting.join(20)
    assert [each["task_id"] for each in got] == ["a"]
    assert time.monotonic() - begun < 10
    assert claim(proxy, wait_s=0.1) == []


def test_a_claim_waits_for_the_end_of_a_pause_and_no_longer(
    proxy: ProxyThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_proxy.proxy.control.tasks._LOOK_AGAIN_S", 20.0)
    monkeypatch.setattr("lightning_proxy.store.claims.FIRST_PAUSE_S", 4.0)  # half of it at least
    enqueue(proxy, max_attempts=2)
    [first] = claim(proxy)
    api(proxy, f"rollouts/{first['rollout_id']}/attempts/1/finish", {"state": "failed"})
    assert claim(proxy) == []
    begun = time.monotonic()
    [second] = claim(proxy, wait_s=20)
    assert (second["rollout_id"], second["attempt"]) == (first["rollout_id"], 2)
    assert time.monotonic() - begun < 15


def test_the_silent_and_the_late_are_failed_while_nobody_claims(proxy: ProxyThread) -> None:
    enqueue(proxy, timeout_s=0.2)
    enqueue(proxy, "b", silence_s=0.2)
    late, silent = claim(proxy, limit=2)

    def classes() -> list[Any]:
        with proxy.store() as store:
            return [store.get_rollout(each["rollout_id"]).error_class for each in (late, silent)]

    wait_until(lambda: None not in classes(), 20)
    assert classes() == ["timeout", "silent_death"]


def test_time_without_a_proxy_is_nobodys_silence(
    make_proxy: MakeProxy, engine: EngineThread, tmp_path: Path
) -> None:
    with Store.open(tmp_path / "lightning.db") as store:
        store.enqueue_tasks([new_task({"task_id": "a", "input": {"q": "a"}, "silence_s": 30})])
        [given] = store.claim_tasks("w", lease_s=30)
        with store.transaction():
            store.connection.execute("UPDATE task_rollouts SET lease_expires_at = 1, alive_at = 1")
    after = make_proxy(engine.base_url)

    def kept() -> bool:
        with after.store() as store:
            expires_at: float = store.scalar("SELECT lease_expires_at FROM task_rollouts")
            return expires_at > time.time()

    wait_until(kept)
    assert not api(after, f"rollouts/{given.rollout_id}/attempts/1/heartbeat", {})["stop"]


def test_a_task_is_cancelled_with_what_runs(proxy: ProxyThread) -> None:
    enqueue(proxy, group_size=2)
    [given] = claim(proxy)
    cancelled = api(proxy, "tasks/a/cancel", {"reason": "enough"})
    assert (cancelled["state"], cancelled["cancelled"], cancelled["to_do"]) == ("cancelled", 1, 0)
    beat = api(proxy, f"rollouts/{given['rollout_id']}/attempts/1/heartbeat", {})
    assert (beat["stop"], beat["reason"]) == (True, "it ended as cancelled (enough)")
    with proxy.store() as store:
        assert store.get_rollout(given["rollout_id"]).state is RolloutState.CANCELLED


def test_progress_and_lists_tell_how_far_it_is(proxy: ProxyThread) -> None:
    enqueue(proxy, group_size=2)
    enqueue(proxy, "b")
    [given] = claim(proxy)
    send(proxy.url, "/reward", {"rollout_id": given["rollout_id"], "value": 1.0})
    api(proxy, f"rollouts/{given['rollout_id']}/attempts/1/finish", {"state": "succeeded"})
    progress = api(proxy, "tasks/progress", {"task_ids": ["a"]})
    assert (progress["tasks_open"], progress["rollouts"], progress["succeeded"]) == (1, 2, 1)
    first, second = api(proxy, "tasks?state=open")["tasks"]
    assert (first["to_do"], first["succeeded"], first["success_rate"], first["mean_reward"]) == (1, 1, 1, 1)
    assert (second["task_id"], second["success_rate"]) == ("b", None)
    assert [each["task_id"] for each in api(proxy, "tasks?after=a&limit=1")["tasks"]] == ["b"]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("tasks", {"task_id": "x"}, 400, "has no input"),
        ("tasks/claim", {}, 400, "lacks 'worker'"),
        ("tasks/claim", {"worker": "w", "limit": 0}, 400, "limit"),
        ("tasks/claim", {"worker": "w", "lease_s": 0}, 400, "lease"),
        ("tasks/claim", {"worker": "w", "lease_s": "x"}, 400, "lease_s"),
        ("tasks/claim", {"worker": "w", "prefer": "easy"}, 400, "disagreement"),
        ("tasks/claim", {"worker": "w", "task_ids": [1]}, 400, "task_ids"),
        ("tasks/claim", {"worker": "w", "count": 1}, 400, "unknown fields count"),
        ("tasks/abandon", {}, 400, "lacks 'worker'"),
        ("tasks/gone/cancel", {}, 404, "no task 'gone'"),
        ("rollouts/gone/attempts/1/heartbeat", {}, 404, "task pool"),
        ("rollouts/gone/attempts/x/heartbeat", {}, 400, "whole number"),
        ("rollouts/gone/attempts/0/finish", {"state": "failed"}, 404, "from 1"),
        ("rollouts/gone/attempts/1/finish", {}, 400, "lacks 'state'"),
        ("rollouts/gone/attempts/1/finish", {"state": "tired"}, 400, "succeeded"),
        ("rollouts/gone/attempts/1/finish", {"state": "failed", "error_class": "x"}, 400, "agent_crash"),
    ],
)
def test_what_makes_no_sense_is_refused(
    proxy: ProxyThread, path: str, body: object, status: int, said: str
) -> None:
    answered, message = refused(proxy, path, body)
    assert answered == status
    assert said in message


def test_an_unknown_task_and_state_are_refused(proxy: ProxyThread) -> None:
    assert refused(proxy, "tasks/gone")[0] == 404
    assert refused(proxy, "tasks?state=tired")[0] == 400


@pytest.mark.parametrize("gives_up", ["the proxy", "the client"])
def test_a_claim_that_was_given_up_hands_out_nothing(
    make_proxy: MakeProxy, engine: EngineThread, monkeypatch: pytest.MonkeyPatch, gives_up: str
) -> None:
    proxy = make_proxy(engine.base_url, store={"busy_timeout_s": 0.1})
    for number in range(4):
        enqueue(proxy, f"t{number}")
    if gives_up == "the proxy":
        monkeypatch.setattr("lightning_proxy.proxy.control.access._STORE_PATIENCE_S", 0.3)
    body = {"worker": "w1", "limit": 2}
    with locked(proxy.db):
        if gives_up == "the proxy":
            assert send(proxy.url, "/api/tasks/claim", body).status == 503
        else:
            with pytest.raises(TimeoutError):
                send(proxy.url, "/api/tasks/claim", body, timeout=0.3)
            time.sleep(0.2)
    time.sleep(0.5)
    with proxy.store() as store:
        assert store.scalar("SELECT count(*) FROM task_rollouts") == 0
    assert len(claim(proxy, limit=4)) == 4


@pytest.mark.parametrize("busy_timeout_s", [0.1, 5.0])
def test_a_database_locked_for_longer_than_a_lease_costs_no_attempt_whose_heartbeat_waits(
    make_proxy: MakeProxy, engine: EngineThread, busy_timeout_s: float
) -> None:
    proxy = make_proxy(engine.base_url, store={"busy_timeout_s": busy_timeout_s})
    for number in range(3):
        enqueue(proxy, f"t{number}")
    given = claim(proxy, limit=3, lease_s=1.5)
    paths = [f"/api/rollouts/{each['rollout_id']}/attempts/1/heartbeat" for each in given]
    with ThreadPoolExecutor(3) as pool:
        with locked(proxy.db):
            beats = [pool.submit(send, proxy.url, path, {}) for path in paths]
            time.sleep(2.5)
        answers = [beat.result(10).json for beat in beats]
    assert [answer["stop"] for answer in answers] == [False] * 3
    with proxy.store() as store:
        assert store.scalar("SELECT count(*) FROM task_rollouts WHERE state = 'running' AND losses = 0") == 3
