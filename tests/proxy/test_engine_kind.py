"""What an engine is asked about itself, when, and what calls have to do with the answer."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lightning_proxy.proxy import question
from lightning_proxy.store import Fidelity
from tests.conftest import MakeProxy, wait_until
from tests.engine import EngineThread, FakeEngine
from tests.proxy.raw_http import (
    CHAT,
    HELLO,
    VLLM_MODELS,
    chat,
    http_answer,
    raw_upstream,
    recorded,
    send,
)

MakeEngine = Callable[[FakeEngine], EngineThread]
STREAM: dict[str, Any] = {**HELLO, "stream": True}


def test_an_engine_that_is_not_vllm_is_asked_for_nothing(
    make_engine: MakeEngine, make_proxy: MakeProxy
) -> None:
    engine = make_engine(FakeEngine(owner="openai", refuse_token_ids=True))
    proxy = make_proxy(engine.base_url)
    assert chat(proxy).status == chat(proxy, stream=True).status == 200
    assert [call.json for call in engine.calls] == [HELLO, STREAM]
    assert [span.fidelity for span in recorded(proxy, 2)] == [Fidelity.TEXT] * 2
    assert len([r for r in engine.requests if r.path == "/v1/models"]) == 1, "asked once"


def test_an_engine_is_asked_for_nothing_where_the_settings_say_so(
    engine: EngineThread, make_proxy: MakeProxy
) -> None:
    proxy = make_proxy(engine.base_url, proxy={"capture": "text"})
    chat(proxy)
    assert [request.path for request in engine.requests] == [CHAT]
    assert engine.calls[0].json == HELLO


def test_an_engine_that_refuses_what_the_settings_insist_on_is_heard(
    make_engine: MakeEngine, make_proxy: MakeProxy
) -> None:
    engine = make_engine(FakeEngine(owner="openai", refuse_token_ids=True))
    proxy = make_proxy(engine.base_url, proxy={"capture": "tokens"})
    answer = chat(proxy)
    assert answer.status == 400
    assert "return_token_ids" in answer.json["error"]["message"]
    assert recorded(proxy)[0].error_class == "upstream_refused"


def test_an_engine_that_was_busy_when_asked_what_it_is_is_asked_again_beside_the_calls(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(question, "_AGAIN_S", 0.3)
    asked: list[str] = []

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(http_answer(b'{"id":"x","choices":[]}', "Content-Type: application/json"))
        return True

    def models(connection: socket.socket, head: bytes, body: bytes) -> bool:
        asked.append("models")
        busy = len(asked) == 1
        status = "503 Service Unavailable" if busy else "200 OK"
        connection.sendall(http_answer(VLLM_MODELS, "Content-Type: application/json", status=status))
        return True

    def both(connection: socket.socket, head: bytes, body: bytes) -> bool:
        if b"/v1/models" in head.split(b"\r\n")[0]:
            return models(connection, head, body)
        asked.append("tokens" if b"return_token_ids" in body else "text")
        return answer(connection, head, body)

    with raw_upstream(both, models=False) as upstream:
        proxy = make_proxy(upstream.base_url)
        assert [chat(proxy).status for _ in range(3)] == [200] * 3
        assert asked == ["models", *["text"] * 3], "not at each call"
        time.sleep(0.3)
        chat(proxy)
        wait_until(lambda: asked.count("models") == 2)
        wait_until(lambda: chat(proxy).status == 200 and asked[-1] == "tokens")
    assert asked.count("models") == 2


@pytest.mark.parametrize("fault", ["403", "429", "500", "hangs"])
def test_an_engine_that_does_not_say_what_it_is_delays_calls_once(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(question, "_PATIENCE_S", 0.5)
    asked: list[float] = []

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        if b"/v1/models" not in head.split(b"\r\n")[0]:
            connection.sendall(http_answer(b'{"id":"x","choices":[]}', "Content-Type: application/json"))
            return True
        asked.append(time.monotonic())
        time.sleep(3.0 if fault == "hangs" else 0.3)
        status = "200 OK" if fault == "hangs" else f"{fault} X"
        connection.sendall(http_answer(b"{}", "Content-Type: application/json", status=status))
        return True

    with raw_upstream(answer, models=False) as upstream, ThreadPoolExecutor(4) as pool:
        proxy = make_proxy(upstream.base_url)
        begun = time.monotonic()
        assert [one.status for one in pool.map(lambda _: chat(proxy), range(4))] == [200] * 4
        assert time.monotonic() - begun < 2
        assert len(asked) == 1, "one question at a time"
        begun = time.monotonic()
        assert [chat(proxy).status for _ in range(3)] == [200] * 3
        assert time.monotonic() - begun < 0.4
        assert len(asked) == 1


@pytest.mark.parametrize("processed", [True, False])
def test_which_logprobs_an_engine_tells_is_asked_beside_the_calls(
    make_proxy: MakeProxy, processed: bool
) -> None:
    answers_now = threading.Event()
    warm = {**HELLO, "temperature": 0.7}

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        said: Any = {"id": "x", "choices": []}
        if b"/v1/models" in head.split(b"\r\n")[0]:
            said = json.loads(VLLM_MODELS)
        elif b"/v1/completions" in head.split(b"\r\n")[0]:
            answers_now.wait(10)
            gap = 1.0 / json.loads(body)["temperature"] if processed else 1.0
            said = {"choices": [{"logprobs": {"top_logprobs": [{"a": -1.0, "b": -1.0 - gap}]}}]}
        elif b"while it is asked" in body:
            answers_now.set()
            time.sleep(0.5)
        connection.sendall(http_answer(json.dumps(said).encode(), "Content-Type: application/json"))
        return True

    with raw_upstream(answer, models=False) as upstream:
        proxy = make_proxy(upstream.base_url)
        begun = time.monotonic()
        assert send(proxy.url, CHAT, warm).status == 200
        assert time.monotonic() - begun < 3
        asked = {**warm, "messages": [{"role": "user", "content": "while it is asked"}]}
        assert send(proxy.url, CHAT, asked).status == 200
        assert send(proxy.url, CHAT, warm).status == 200
        modes = [span.sampling.get("logprobs_mode") for span in recorded(proxy, 3)]
    assert modes == ["unknown", *["processed_logprobs" if processed else None] * 2]


def test_an_engine_that_answers_to_the_agents_key_only_is_asked_with_that(make_proxy: MakeProxy) -> None:
    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        known = b"authorization: bearer sk-agent" in head.lower()
        status = "200 OK" if known else "401 Unauthorized"
        models = b"/v1/models" in head.split(b"\r\n")[0]
        said = VLLM_MODELS if models else json.dumps({"choices": [], "asked": body.decode()}).encode()
        connection.sendall(http_answer(said, "Content-Type: application/json", status=status))
        return True

    with raw_upstream(answer, models=False) as upstream:
        proxy = make_proxy(upstream.base_url)
        for key in ("sk-stranger", "sk-agent"):
            got = chat(proxy, [("Authorization", f"Bearer {key}")]).json["asked"]
            assert ("return_token_ids" in got) == (key == "sk-agent")


@pytest.mark.parametrize(
    "models", [b"\xff{", b"[]", b"null", b'{"data": 7}', b'{"data": [{"owned_by": ["vllm"]}, 1]}']
)
def test_an_engine_that_says_nothing_sensible_about_itself_is_asked_for_nothing(
    make_proxy: MakeProxy, models: bytes
) -> None:
    bodies: list[bytes] = []

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        if body:
            bodies.append(body)
        connection.sendall(http_answer(models if not body else b"{}", "Content-Type: application/json"))
        return True

    with raw_upstream(answer, models=False) as upstream:
        proxy = make_proxy(upstream.base_url)
        assert chat(proxy).status == 200
    assert [json.loads(body) for body in bodies] == [HELLO]
