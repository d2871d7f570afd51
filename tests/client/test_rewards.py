"""``lightning_proxy.reward``: found, posted once, and clear about what went wrong."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import lightning_proxy
from lightning_proxy.errors import EngineRefused, EngineUnreachable, InvalidInput, UnknownTarget
from tests.conftest import MakeProxy, ProxyThread
from tests.engine import EngineThread
from tests.proxy.raw_http import JSON, chat, send

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.fixture
def rollout(proxy: ProxyThread) -> str:
    send(proxy.url, "/api/rollouts", {"rollout_id": "r1"}, JSON)
    return "r1"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_proxy.client.rewards._PAUSES_S", (0.0, 0.0))


def test_a_reward_is_in_the_ledger_when_the_call_returns(proxy: ProxyThread, rollout: str) -> None:
    receipt = lightning_proxy.reward(
        0.5, rollout_id=rollout, attempt=1, name="style", source="judge", comment="neat", url=proxy.url
    )
    with proxy.store() as store:
        (entry,) = store.list_rewards(rollout)
    assert receipt == lightning_proxy.Receipt(entry.reward_id or 0, rollout, None, created=True)
    assert (entry.value, entry.attempt, entry.name, entry.source, entry.comment) == (
        0.5, 1, "style", "judge", "neat",
    )  # fmt: skip


def test_one_response_gets_a_thumb_and_a_demonstration(proxy: ProxyThread) -> None:
    response_id = chat(proxy, prefix="/rollout/r2").json["id"]
    receipt = lightning_proxy.reward(
        thumb="down", response_id=response_id, demonstration="42", url=f"{proxy.url}/reward"
    )
    with proxy.store() as store:
        (entry,) = store.list_rewards("r2")
    assert (receipt.span_id, entry.value, entry.demonstration) == (entry.span_id, -1.0, "42")


def test_a_process_that_runs_under_the_proxy_needs_to_say_neither_where_nor_whose(
    proxy: ProxyThread, rollout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_REWARD_URL", f"{proxy.url}/reward")
    monkeypatch.setenv("LIGHTNING_ROLLOUT_ID", rollout)
    assert lightning_proxy.reward(1).rollout_id == rollout


def test_without_a_target_it_is_said_what_is_missing() -> None:
    with pytest.raises(InvalidInput, match="rollout_id, response_id or span_id"):
        lightning_proxy.reward(1)


def test_what_the_proxy_refuses_is_raised_in_its_words(proxy: ProxyThread, rollout: str) -> None:
    with pytest.raises(UnknownTarget, match="no rollout 'r9'"):
        lightning_proxy.reward(1, rollout_id="r9", url=proxy.url)
    with pytest.raises(InvalidInput, match="send thumb"):
        lightning_proxy.reward(True, rollout_id=rollout, url=proxy.url)


def test_the_token_comes_from_the_environment_or_is_the_rollouts_key(
    make_proxy: MakeProxy, engine: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = make_proxy(engine.base_url, proxy={"token": "secret", "rollout_keys_reward": True})
    bearer = [*JSON, ("Authorization", "Bearer secret")]
    key = send(proxy.url, "/api/rollouts", {"rollout_id": "r1"}, bearer).json["api_key"]
    with pytest.raises(EngineRefused, match="LIGHTNING_PROXY__TOKEN"):
        lightning_proxy.reward(1, rollout_id="r1", url=proxy.url)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert lightning_proxy.reward(1, rollout_id="r1", url=proxy.url).created
    monkeypatch.setenv("LIGHTNING_PROXY__TOKEN", "wrong")
    with pytest.raises(EngineRefused):
        lightning_proxy.reward(1, rollout_id="r1", url=proxy.url)
    assert lightning_proxy.reward(1, rollout_id="r1", url=proxy.url, token="secret").created


@pytest.mark.usefixtures("at_once")
def test_where_nothing_answers_it_is_said_where_it_was_looked_for() -> None:
    with pytest.raises(EngineUnreachable, match=NOBODY):
        lightning_proxy.reward(1, rollout_id="r1", url=NOBODY)


@contextmanager
def flaky(proxy: ProxyThread, answers: Callable[[int], int | None]) -> Iterator[tuple[str, list[Any]]]:
    """Before the proxy: passes posts on, then cuts the connection (None) or answers with a status."""
    seen: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            status = answers(len(seen))
            if status == 503:  # nothing was written
                self._answer(503, b'{"error": {"message": "the store is not writing"}}')
                return
            answer = send(proxy.url, "/reward", body, JSON)
            if status is None:
                self.close_connection = True
            else:
                self._answer(answer.status, answer.body)

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("first", [None, 503])
def test_a_reward_whose_acknowledgement_is_lost_is_posted_again_and_entered_once(
    proxy: ProxyThread, rollout: str, first: int | None
) -> None:
    with flaky(proxy, lambda count: first if count < 3 else 200) as (url, seen):
        receipt = lightning_proxy.reward(1, rollout_id=rollout, url=url)
    assert receipt.created == (first == 503)
    assert len(seen) == 3
    assert len({body["idempotency_key"] for body in seen}) == 1
    with proxy.store() as store:
        assert [entry.value for entry in store.list_rewards(rollout)] == [1.0]


def test_importing_the_package_loads_nothing_of_it() -> None:
    program = (
        "import sys; at_start = set(sys.modules); "  # an environment's own start-up hooks may load much
        "import lightning_proxy; before = set(sys.modules) - at_start; lightning_proxy.reward; "
        "print([m for m in before if m.startswith('lightning_proxy.')], "
        "'urllib.request' in before, 'orjson' in sys.modules, 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False False False\n"


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'rewards'"):
        lightning_proxy.rewards  # noqa: B018
