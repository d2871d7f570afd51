"""What a runner asks of the pool, over HTTP."""

from __future__ import annotations

import pytest

from lightning_proxy.client.proxy import ProxyClient
from lightning_proxy.errors import Conflict
from lightning_proxy.runner.pool import Pool, enqueue
from tests.conftest import ProxyThread


def test_a_runner_is_told_that_what_it_gives_back_has_ended(proxy: ProxyThread) -> None:
    client = ProxyClient(proxy.url)
    pool = Pool(client, "w", 60.0)
    enqueue(client, [{"task_id": "a", "input": {"q": 1}, "group_size": 2}])
    kept, ended = pool.claim(2, task_ids=None, prefer=None, wait_s=0)
    pool.finish(ended, "succeeded", None, None)
    with pytest.raises(Conflict, match="not given back: it ended as succeeded"):
        pool.release(ended, "the runner was stopped")
    pool.release(kept, "the runner was stopped")
    [again] = pool.claim(2, task_ids=None, prefer=None, wait_s=0)
    assert (again["rollout_id"], again["attempt"]) == (kept["rollout_id"], 2)
