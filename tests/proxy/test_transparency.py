"""What an agent gets through the proxy is what it would have got without it."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_proxy.store import Fidelity
from tests.conftest import MakeProxy, ProxyThread
from tests.engine import EngineThread, Script
from tests.proxy.raw_http import (
    CHAT,
    COMPLETIONS,
    HELLO,
    JSON,
    STREAM_HEAD,
    Call,
    chat,
    events_or_bytes,
    http_answer,
    http_chunks,
    raw_upstream,
    recorded,
    send,
)

PROMPT = {"model": "policy", "prompt": "once upon"}
STREAM: dict[str, Any] = {**HELLO, "stream": True}
USAGE = {"stream_options": {"include_usage": True}}
TOOL = {"type": "function", "function": {"name": "sql", "parameters": {"type": "object"}}}
CALLS = Script(tool_calls=(("sql", '{"query": "SELECT \'é\'"}'), ("sql", "{}")))

# name: (path, body, script)
MODEL_CALLS: dict[str, tuple[str, Any, Script]] = {
    "plain": (CHAT, HELLO, Script()),
    "with tools": (CHAT, {**HELLO, "tools": [TOOL]}, CALLS),
    "with odd spacing": (CHAT, b'\n{ "model" :"policy" , "messages":[ ] \t}\r\n ', Script()),
    "broken JSON": (CHAT, b'{"model": "policy", "messages": [', Script()),
    "streamed": (CHAT, STREAM, Script()),
    "streamed with tools": (CHAT, {**STREAM, "tools": [TOOL]}, CALLS),
    "streamed with tools in big pieces": (CHAT, STREAM, CALLS.with_({"tokens_per_chunk": 9, "text": "é: "})),
    "streamed with logprobs": (CHAT, {**STREAM, "logprobs": True}, CALLS),
    "streamed with token ids": (CHAT, {**STREAM, "return_token_ids": True}, CALLS),
    "streamed with comments": (CHAT, STREAM, Script(comments=True)),
    "streamed with CRLF": (CHAT, STREAM, Script(line_end="\r\n", comments=True)),
    "streamed with CR": (CHAT, STREAM, Script(line_end="\r")),
    "streamed byte by byte": (CHAT, STREAM, Script(text="naïve 漢字 😀", split=1)),
    "streamed without [DONE]": (CHAT, STREAM, Script(without_done=True)),
    "streamed with an error event": (CHAT, STREAM, Script(error_after=5)),
    "streamed with garbage": (CHAT, STREAM, Script(garbage=True)),
    "garbage": (CHAT, HELLO, Script(status=200, body='{"id": "x", "choices": [{"inde')),
    "of unknown length": (CHAT, HELLO, Script(hidden_length=True)),
    "in pieces": (CHAT, HELLO, Script(split=7)),
    "completion": (COMPLETIONS, PROMPT, Script()),
    "400": (CHAT, HELLO, Script(status=400)),
    "429": (
        CHAT,
        STREAM,
        Script(
            status=429, body='{"error": {"code": "rate"}} ', headers={"retry-after": "7", "x-request-id": "q"}
        ),
    ),
    "500": (
        CHAT,
        HELLO,
        Script(status=500, body="Internal Server Error", headers={"content-type": "text/plain"}),
    ),
    "503 without a body": (CHAT, STREAM, Script(status=503, body="")),
    "201": (CHAT, HELLO, Script(status=201, body='{"choices": []}')),
}


@pytest.mark.parametrize("name", MODEL_CALLS)
def test_a_model_call_is_answered_as_by_the_engine(
    engine: EngineThread, proxy: ProxyThread, name: str
) -> None:
    path, body, script = MODEL_CALLS[name]
    headers = [*JSON, *script.to_header().items()]
    straight = send(engine.url, path, body, headers)
    through = send(proxy.url, path, body, headers)
    assert through.end_to_end[:3] == straight.end_to_end[:3]
    assert events_or_bytes(through.end_to_end[3]) == events_or_bytes(straight.end_to_end[3])
    if straight.status != 200 or (straight.header("content-type") or "").endswith("json"):
        assert through.header("content-length") == str(len(through.body))


def travelled(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(pair for pair in headers if pair[0] not in {"host", "connection"})


@pytest.mark.parametrize(
    "name", ["plain", "streamed", "completion", "with odd spacing", "broken JSON", "429"]
)
def test_the_engine_gets_the_agents_own_headers_and_body(
    engine: EngineThread, proxy: ProxyThread, name: str
) -> None:
    path, body, script = MODEL_CALLS[name]
    agents = [
        ("User-Agent", "OpenAI/Python 1"),
        ("Authorization", "Bearer sk-1"),
        ("X-Trace", "é".encode().decode("latin-1")),
    ]
    headers = [*JSON, *agents, *script.to_header().items(), ("Accept-Encoding", "gzip")]
    send(engine.url, path, body, headers)
    send(proxy.url, path, body, headers)
    first, second = engine.calls
    added = dict(second.headers).keys() - dict(first.headers).keys()
    assert added == set()
    changed = {"host", "connection", "content-length", "accept-encoding"}
    assert [h for h in travelled(second.headers) if h[0] not in changed] == [
        h for h in travelled(first.headers) if h[0] not in changed
    ]
    assert second.body.startswith(first.body.rstrip()[:-1])


@pytest.mark.parametrize("prefix", ["/rollout/r1", "/rollout/r1/attempt/2", "/sessions/r1/role/w"])
def test_an_attribution_in_the_path_is_gone_behind_the_proxy(
    engine: EngineThread, proxy: ProxyThread, prefix: str
) -> None:
    send(proxy.url, f"{prefix}/v1/files?x=%2F", None, [])
    chat(proxy, prefix=prefix)
    assert [request.target for request in engine.requests if request.path != "/v1/models"] == [
        "/v1/files?x=%2F",
        CHAT,
    ]


def test_an_upstream_below_a_path_is_reached_below_it(engine: EngineThread, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(f"{engine.url}/openai/deployments/x/v1/")
    send(proxy.url, "/v1/embeddings?a=b", b"{}")
    send(proxy.url, "/v1?a=b", None)
    assert [r.target for r in engine.requests] == [
        "/openai/deployments/x/v1/embeddings?a=b",
        "/openai/deployments/x/v1?a=b",
    ]


def test_hop_by_hop_headers_stay_on_their_hop(engine: EngineThread, proxy: ProxyThread) -> None:
    script = Script(headers={"connection": "x-hop", "x-hop": "1", "keep-alive": "timeout=5", "x-end": "1"})
    hops = [
        ("Connection", "keep-alive, X-Secret-Hop"),
        ("X-Secret-Hop", "1"),
        ("TE", "trailers"),
        ("X-Far", "1"),
    ]
    answer = send(proxy.url, "/v1/x", b"{}", [*JSON, *hops, *script.to_header().items()])
    assert (answer.header("x-hop"), answer.header("keep-alive"), answer.header("x-end")) == (None, None, "1")
    seen = engine.requests[-1]
    assert (seen.header("x-secret-hop"), seen.header("te"), seen.header("x-far")) == (None, None, "1")


@pytest.mark.parametrize("path", ["/v1/embeddings", CHAT])
@pytest.mark.parametrize("size", [1, 2**16, 2**23])
def test_uploads_of_every_size_arrive_whole(
    engine: EngineThread, proxy: ProxyThread, path: str, size: int
) -> None:
    text = "ab" * (size // 2) or "a"
    body = json.dumps({**HELLO, "max_tokens": 1, "messages": [{"role": "user", "content": text}]}).encode()
    pieces = [body[i : i + 100_000] for i in range(0, len(body), 100_000)]
    engine.script(Script(status=200, body='{"choices": []}'), times=2)
    assert send(proxy.url, path, body).status == 200
    assert send(proxy.url, path, chunks=pieces).status == 200
    posts = [request for request in engine.requests if request.method == "POST"]
    assert [request.body[: len(body) - 1] for request in posts] == [body[:-1]] * 2


def test_answers_of_eight_mebibytes_arrive_whole(engine: EngineThread, proxy: ProxyThread) -> None:
    text = "x" * 2**23
    answer = send(proxy.url, "/v1/embeddings", text.encode())
    assert answer.body == text.encode()
    script = Script(status=200, body=json.dumps({"id": "big", "choices": [], "text": text}))
    engine.script(script)
    assert chat(proxy).json["text"] == text


def test_an_upload_that_waits_for_100_continue_is_told_to_go_on(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=60) as agent:
        body = json.dumps(HELLO).encode()
        for path in (CHAT, "/v1/embeddings"):
            head = [
                f"POST {path} HTTP/1.1",
                "Host: x",
                f"Content-Length: {len(body)}",
                "Expect: 100-continue",
            ]
            agent.sendall("\r\n".join([*head, "", ""]).encode())
            assert agent.recv(1000).startswith(b"HTTP/1.1 100")
            agent.sendall(body)
            got = b""
            while b"\r\n\r\n" not in got or len(got.partition(b"\r\n\r\n")[2]) < len(body):
                got += agent.recv(65536)
            assert got.startswith(b"HTTP/1.1 200")


ODD_ANSWERS = {
    "no server": http_answer(b"{}", "Content-Type: application/json"),
    "two cookies": http_answer(b"{}", "Set-Cookie: a=1", "Set-Cookie: b=2", "Server: x", "Content-Type: a/b"),
    "204": b"HTTP/1.1 204 No Content\r\nServer: x\r\nX-A: 1\r\n\r\n",
    "304": b'HTTP/1.1 304 Not Modified\r\nServer: x\r\nETag: "1"\r\n\r\n',
    "a redirect": http_answer(
        b"", "Location: http://elsewhere/v1/x", "Server: x", status="307 Temporary Redirect"
    ),
    "an odd reason": http_answer(b"{}", "Server: x", "Content-Type: a/b", status="299 Quite Fine"),
    "until the end": b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Type: a/b\r\nConnection: close\r\n\r\nabc",
    "an event stream of its own": STREAM_HEAD
    + http_chunks(b"event: x\nda", b'ta: {"a" :1}\n', b"\n", b"data: rest"),
}


@pytest.mark.parametrize("target", ["/v1/other", CHAT])
@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_odd_answers_arrive_as_they_are(make_proxy: MakeProxy, name: str, target: str) -> None:
    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(ODD_ANSWERS[name])
        return False

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        straight = send(upstream.url, target, HELLO)
        assert send(proxy.url, target, HELLO).end_to_end == straight.end_to_end


# -- time ----------------------------------------------------------------------------------------


def test_the_first_event_arrives_long_before_the_engine_has_finished(
    engine: EngineThread, proxy: ProxyThread
) -> None:
    pace = threading.Semaphore(1)
    engine.script(Script(tokens=11, pace=pace))
    with Call(proxy.url, CHAT, STREAM) as call:
        for _ in range(11):  # each of them is here before the engine makes the next
            assert call.read_until(b"\n\n").count(b"data: {") == 1
            pace.release()
        assert call.rest().count(b"data: {") == 1


def test_headers_arrive_before_the_first_event(engine: EngineThread, proxy: ProxyThread) -> None:
    pace = threading.Semaphore(0)
    engine.script(Script(tokens=2, pace=pace))
    with Call(proxy.url, CHAT, STREAM) as call:  # the headers have come: nothing else has
        pace.release(3)
        assert call.rest().endswith(b"data: [DONE]\n\n")


def test_other_answers_stream_as_well(make_proxy: MakeProxy) -> None:
    seen = threading.Event()

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(STREAM_HEAD + http_chunks(b"event: first\n\n", end=False))
        assert seen.wait(60), "the first event was held back"
        connection.sendall(http_chunks(b"event: last\n\n"))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        with Call(proxy.url, "/v1/responses", {"stream": True}) as call:
            assert call.read_until(b"\n\n") == b"event: first\n\n"
            seen.set()
            assert call.rest() == b"event: last\n\n"


def test_a_whole_answer_that_stays_as_it_is_comes_as_it_comes(make_proxy: MakeProxy) -> None:
    """Hosted models keep a long call alive by white space before the answer."""
    started, go_on = threading.Event(), threading.Event()
    whole = b'{"choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}]}'

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(
            STREAM_HEAD.replace(b"text/event-stream", b"application/json") + http_chunks(b"\n", end=False)
        )
        started.wait(20)
        connection.sendall(http_chunks(b" ", end=False))
        go_on.wait(20)
        connection.sendall(http_chunks(whole[:20], whole[20:]))
        return True

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url, proxy={"capture": "text"})
        with Call(proxy.url, CHAT, HELLO, JSON) as call:  # headers are here
            started.set()
            assert call.read_until(b"\n") == b"\n"  # the last piece so far is held back
            with proxy.store() as store:
                assert store.list_spans() == []
            go_on.set()
            assert call.rest() == b" " + whole
        (span,) = recorded(proxy)
    assert (span.response, span.error_class, span.fidelity) == (b"\n " + whole, None, Fidelity.TEXT)


def test_an_upload_is_passed_on_while_it_still_comes(make_proxy: MakeProxy) -> None:
    arrived = threading.Event()

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        while b"first" not in body:
            body += connection.recv(65536)
        arrived.set()
        while not body.endswith(b"0\r\n\r\n"):
            body += connection.recv(65536)
        connection.sendall(http_answer(b"{}", "Content-Type: application/json"))
        return True

    def slow() -> Iterator[bytes]:
        yield b"first"
        assert arrived.wait(60), "what came first was held back"
        yield b"last"

    with raw_upstream(answer) as upstream:
        proxy = make_proxy(upstream.base_url)
        assert send(proxy.url, "/v1/files", chunks=slow()).status == 200


# -- many at once --------------------------------------------------------------------------------


def test_many_calls_at_once_do_not_mix(engine: EngineThread, proxy: ProxyThread) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def one(number: int) -> None:
        draw = random.Random(number)
        messages = [{"role": "user", "content": f"task {number}"}]
        body = {**HELLO, "messages": messages, "stream": draw.random() < 0.5}
        script = Script(split=draw.choice([None, 50]))
        through = send(proxy.url, f"/rollout/r{number}{CHAT}", body, [*JSON, *script.to_header().items()])
        straight = send(engine.url, CHAT, body)
        assert events_or_bytes(through.end_to_end[3]) == events_or_bytes(straight.end_to_end[3])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(64)))
    spans = recorded(proxy, 64)
    assert {span.fidelity for span in spans} == {Fidelity.EXACT}
    for span in spans:
        request = json.loads(span.request)
        assert f"r{request['messages'][0]['content'].removeprefix('task ')}" == span.rollout_id
        expected = engine.model.generate(request)
        assert list(span.generations[0].response_token_ids) == expected.choices[0].token_ids
