"""The end of a proxy that is told to stop: in order, within its time, and at once where that is wanted."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from lightning_proxy.store import ErrorClass, Store
from tests.conftest import MakeProxyProcess, ProxyProcess
from tests.engine import EngineThread, Script
from tests.proxy.raw_http import CHAT, CUT, HELLO, Call, raw_upstream
from tests.proxy.test_websocket import ACCEPTED, UPGRADE

pytestmark = pytest.mark.drill
ENDLESS = Script(chunk_delay_s=0.2, tokens=1000)


@contextmanager
def open_websocket(make_proxy_process: MakeProxyProcess, env: dict[str, str]) -> Iterator[ProxyProcess]:
    """A proxy with a WebSocket under way, whose both ends are silent."""
    over = threading.Event()

    def answer(connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(ACCEPTED)
        over.wait(60)
        return False

    with raw_upstream(answer) as upstream, ExitStack() as at_the_end:
        at_the_end.callback(over.set)
        proxy = make_proxy_process(upstream.base_url, env=env)
        with Call(proxy.url, "/v1/responses", None, UPGRADE, method="GET") as call:
            assert call.response.status == 101
            yield proxy


@contextmanager
def open_stream(engine: EngineThread, proxy: ProxyProcess) -> Iterator[Call]:
    """A streamed call under way."""
    engine.script(ENDLESS)
    with Call(proxy.url, CHAT, {**HELLO, "stream": True, "max_tokens": 1000}) as call:
        call.read_until(b'"content":"')
        yield call


def stopped_in(proxy: ProxyProcess, *signals: tuple[float, signal.Signals]) -> tuple[int, float]:
    """The exit status after signals, each so many seconds after the one before, and how long it took."""
    begun = time.monotonic()
    for pause_s, signum in signals:
        time.sleep(pause_s)
        proxy.process.send_signal(signum)
    return proxy.process.wait(30), time.monotonic() - begun


LIMIT = {"LIGHTNING_PROXY__SHUTDOWN_TIMEOUT_S": "0.5"}
LONG = {"LIGHTNING_PROXY__SHUTDOWN_TIMEOUT_S": "60"}


def test_calls_that_do_not_end_in_time_are_cut_and_on_record(
    engine: EngineThread, make_proxy_process: MakeProxyProcess
) -> None:
    proxy = make_proxy_process(engine.base_url, env=LIMIT)
    with open_stream(engine, proxy) as call:
        code, took_s = stopped_in(proxy, (0.0, signal.SIGTERM))
        with pytest.raises(CUT):
            call.rest()
    assert code == 0
    assert 0.5 <= took_s < 5
    with Store.open(proxy.db) as store:
        (span,) = store.list_spans()
    assert span.error_class is ErrorClass.CLIENT_DISCONNECT
    assert span.generations[0].response_token_ids


def test_a_websocket_does_not_outlast_the_limit(make_proxy_process: MakeProxyProcess) -> None:
    with open_websocket(make_proxy_process, LIMIT) as proxy:
        code, took_s = stopped_in(proxy, (0.0, signal.SIGTERM))
    assert (code, took_s < 5) == (0, True)


def test_by_default_a_stop_is_over_before_docker_kills(
    engine: EngineThread, make_proxy_process: MakeProxyProcess
) -> None:
    proxy = make_proxy_process(engine.base_url)
    with open_stream(engine, proxy):
        code, took_s = stopped_in(proxy, (0.0, signal.SIGTERM))
    assert (code, took_s < 9) == (0, True)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once_and_keeps_what_was_recorded(
    engine: EngineThread, make_proxy_process: MakeProxyProcess, second: signal.Signals
) -> None:
    proxy = make_proxy_process(engine.base_url, env=LONG)
    with open_stream(engine, proxy):
        _, took_s = stopped_in(proxy, (0.0, signal.SIGTERM), (0.5, second))
    assert took_s < 4
    with Store.open(proxy.db) as store:
        (span,) = store.list_spans()
    assert span.error_class is ErrorClass.CLIENT_DISCONNECT


def test_a_second_signal_ends_a_websocket_too(make_proxy_process: MakeProxyProcess) -> None:
    with open_websocket(make_proxy_process, LONG) as proxy:
        _, took_s = stopped_in(proxy, (0.0, signal.SIGTERM), (0.5, signal.SIGTERM))
    assert took_s < 4
