"""kill -9 under load, at random moments: what an agent received whole and what was acknowledged is there."""

from __future__ import annotations

import collections
import http.client
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lightning_proxy.store import Store
from tests.conftest import MakeProxyProcess, ProxyProcess, wait_until
from tests.proxy.raw_http import HELLO

pytestmark = pytest.mark.drill

ROUNDS = 6
CLIENTS = 8
LOAD = 2 * CLIENTS  # answers of a round at least
LOAD_S = (0.1, 0.8)  # how long it runs from then on, before the kill


@dataclass
class Seen:
    """What the clients know for sure."""

    whole: set[str] = field(default_factory=set)  # ids of responses received to the last byte
    acknowledged: dict[str, float] = field(default_factory=dict)  # idempotency key: value, after a 2xx
    unsure: dict[str, tuple[str, float]] = field(default_factory=dict)  # key: (response id, value)
    broken: int = 0  # answers that were cut
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """Calls and rewards without a pause until it is stopped; a cut connection is part of the game."""

    def __init__(self, number: int, seen: Seen) -> None:
        self._number = number
        self._seen = seen
        self._turns = itertools.count()

    def run(self, url: str, stop: threading.Event) -> None:
        while not stop.is_set():
            parts = urlsplit(url)
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
            try:
                while not stop.is_set():
                    self._reward(connection, self._call(connection))
            except (OSError, http.client.HTTPException):
                with self._seen.lock:
                    self._seen.broken += 1
                time.sleep(0.01)
            finally:
                connection.close()

    def _call(self, connection: http.client.HTTPConnection) -> str:
        turn = next(self._turns)
        streamed = (self._number + turn) % 2 == 0
        messages = [{"role": "user", "content": f"client {self._number}, turn {turn}"}]
        body = json.dumps({**HELLO, "messages": messages, "stream": streamed})
        path = f"/rollout/client-{self._number}/v1/chat/completions"
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        raw = response.read()  # raises IncompleteRead unless it is whole
        assert response.status == 200, raw
        first = raw.partition(b"\n\n")[0].removeprefix(b"data: ") if streamed else raw
        assert not streamed or raw.endswith(b"data: [DONE]\n\n")
        response_id = str(json.loads(first)["id"])
        with self._seen.lock:
            self._seen.whole.add(response_id)
        return response_id

    def _reward(self, connection: http.client.HTTPConnection, response_id: str) -> None:
        key, value = f"reward of {response_id}", float(self._number)
        with self._seen.lock:
            self._seen.unsure[key] = (response_id, value)
        post_reward(connection, key, response_id, value)
        with self._seen.lock:
            del self._seen.unsure[key]
            self._seen.acknowledged[key] = value


def post_reward(connection: http.client.HTTPConnection, key: str, response_id: str, value: float) -> None:
    reward = {"value": value, "response_id": response_id, "idempotency_key": key}
    connection.request("POST", "/reward", json.dumps(reward), {"Content-Type": "application/json"})
    response = connection.getresponse()
    raw = response.read()
    assert response.status in (200, 201), raw


@pytest.fixture
def engine_url() -> Iterator[str]:
    """A fake engine in a process of its own, so that the load is on the proxy."""
    command = [sys.executable, "-m", "tests.engine.fake_engine", "--tokens", "12", "--chunk-delay-s", "0.001"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1] + "/v1"
        process.kill()


def test_killing_the_proxy_loses_nothing_that_anybody_was_told_of(
    engine_url: str, make_proxy_process: MakeProxyProcess
) -> None:
    draw = random.Random()
    seen = Seen()
    clients = [Client(number, seen) for number in range(CLIENTS)]
    begun = time.monotonic()
    for _ in range(ROUNDS):
        proxy = make_proxy_process(engine_url)
        under_load(clients, seen, proxy, draw.uniform(*LOAD_S))
    proxy = make_proxy_process(engine_url)
    repeated = len(seen.unsure)
    post_again(proxy, seen)
    check(proxy.db, seen)
    print(
        f"\n{ROUNDS} kills in {time.monotonic() - begun:.1f} s: {len(seen.whole)} responses received whole, "
        f"{len(seen.acknowledged)} rewards acknowledged ({repeated} of them posted again after a kill), "
        f"{seen.broken} connections cut; spans lost 0, rewards lost 0, doubled 0"
    )


def under_load(clients: list[Client], seen: Seen, proxy: ProxyProcess, seconds: float) -> None:
    """Let the clients loose, and kill the proxy in the middle of it."""
    stop, before = threading.Event(), len(seen.whole)
    threads = [threading.Thread(target=client.run, args=(proxy.url, stop)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(seen.whole) >= before + LOAD)
        time.sleep(seconds)
    finally:
        proxy.kill()
        stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def post_again(proxy: ProxyProcess, seen: Seen) -> None:
    """Whoever had no answer posts again, with the same key."""
    parts = urlsplit(proxy.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    for key, (response_id, value) in list(seen.unsure.items()):
        post_reward(connection, key, response_id, value)
        seen.acknowledged[key] = value
    seen.unsure.clear()
    connection.close()


def check(db: Path, seen: Seen) -> None:
    """Compare the database with what the clients know."""
    with Store.open(db) as store:
        ids = [
            row["response_id"]
            for row in store.rows("SELECT response_id FROM spans WHERE error_class IS NULL")
        ]
        rewards = store.rows(
            "SELECT idempotency_key, value, s.response_id FROM rewards JOIN spans AS s USING (span_id)"
        )
        assert store.scalar("PRAGMA integrity_check") == "ok"
        exact = store.scalar("SELECT count(*) FROM spans WHERE error_class IS NULL AND fidelity = 'exact'")
    assert len(seen.whole) > 10 * CLIENTS, "there was hardly any load"
    assert seen.whole - set(ids) == set(), "spans were lost"
    assert [one for one, count in collections.Counter(ids).items() if count > 1] == [], "spans were doubled"
    assert exact == len(ids)
    keys = [row["idempotency_key"] for row in rewards]
    assert set(seen.acknowledged) - set(keys) == set(), "rewards were lost"
    assert len(keys) == len(set(keys)), "rewards were doubled"
    for row in rewards:
        assert row["idempotency_key"] == f"reward of {row['response_id']}"
        assert row["value"] == seen.acknowledged[row["idempotency_key"]]
