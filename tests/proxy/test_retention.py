"""Rollouts that are deleted beside the calls: by a route, and by age."""

from __future__ import annotations

import time
from pathlib import Path

from lightning_proxy.store import Store
from tests.conftest import MakeProxy, ProxyThread, wait_until
from tests.engine import EngineThread
from tests.proxy.raw_http import JSON, chat, send
from tests.store.support import POLICY, add_ready_rollout, make_span


def delete(proxy: ProxyThread, rollout_id: str) -> tuple[int, dict[str, object]]:
    answer = send(proxy.url, f"/api/rollouts/{rollout_id}", None, JSON, method="DELETE")
    return answer.status, answer.json


def test_a_rollout_is_deleted_and_made_again_by_its_next_call(proxy: ProxyThread) -> None:
    for _ in range(2):
        assert chat(proxy, prefix="/rollout/r1").status == 200
    assert delete(proxy, "r1") == (200, {"rollout_id": "r1", "deleted": True, "spans": 2})
    assert send(proxy.url, "/api/rollouts/r1").status == 404
    assert delete(proxy, "r1")[0] == 404
    assert chat(proxy, prefix="/rollout/r1").status == 200
    assert len(send(proxy.url, "/api/rollouts/r1").json["spans"]) == 1


def test_a_rollout_that_a_training_run_holds_is_not_deleted(proxy: ProxyThread) -> None:
    with proxy.store() as store:
        add_ready_rollout(store, "r1")
        store.drain(store.begin_run(POLICY, owner="x", lease_s=60).run_id, limit=1)
    status, answer = delete(proxy, "r1")
    assert status == 409
    assert "held by a training run" in str(answer)


def test_old_rollouts_are_deleted_where_a_setting_says_so(
    make_proxy: MakeProxy, engine: EngineThread, tmp_path: Path
) -> None:
    db = tmp_path / "lightning.db"
    with Store.open(db) as store:
        store.add_span(make_span(rollout_id="old"))
        store.add_span(make_span(rollout_id="new", started_at=time.time(), ended_at=time.time()))
    make_proxy(engine.base_url, store={"keep_days": 30})

    def names() -> set[str]:
        with Store.open(db) as store:
            return {summary.rollout.rollout_id for summary in store.list_rollouts()}

    wait_until(lambda: names() == {"new"})
