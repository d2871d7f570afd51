"""`lightning-proxy run`: an unmodified command, on a real server that stands in for the proxy's routes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.client import ProxyClient
from lightning_proxy.errors import Conflict, EngineRefused, EngineUnreachable, InvalidInput, UnknownTarget
from lightning_proxy.runner import RolloutRequest, run_command
from lightning_proxy.runner.command import agent_environment
from lightning_proxy.runner.pool import Pool, patiently
from tests.conftest import wait_until

ROLLOUT = {
    "rollout_id": "r-1",
    "attempt": 1,
    "task_id": None,
    "state": "open",
    "api_key": "lp-secret",
    "base_url": "x",
}


class FakeProxy(ThreadingHTTPServer):
    """Registers and finishes rollouts, and keeps what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str, Any, str | None]] = []
        self.answers: dict[str, tuple[int, bytes]] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeProxy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(
            (self.command, self.path, json.loads(body) if body else None, self.headers["Authorization"])
        )
        status, answer = self.server.answers.get(self.command, (200, json.dumps(ROLLOUT).encode()))
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PATCH = do_GET = do_POST  # noqa: N815 - the names that http.server looks for

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[FakeProxy]:
    with FakeProxy() as server:
        yield server
        server.shutdown()


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def end_of(proxy: FakeProxy) -> tuple[str, str | None]:
    method, path, body, _ = proxy.requests[-1]
    assert (method, path) == ("PATCH", "/api/rollouts/r-1")
    return body["state"], body.get("reason")


def test_a_command_that_succeeds_ends_its_rollout_succeeded(proxy: FakeProxy) -> None:
    assert run_command(python("pass"), ProxyClient(proxy.url), RolloutRequest("r-1", "task-1", "writer")) == 0
    method, path, body, _ = proxy.requests[0]
    assert (method, path) == ("POST", "/api/rollouts")
    assert body == {"rollout_id": "r-1", "task_id": "task-1", "role": "writer"}
    assert end_of(proxy) == ("succeeded", None)


def test_a_failing_command_gives_its_exit_code_to_us_and_to_the_rollout(proxy: FakeProxy) -> None:
    assert run_command(python("raise SystemExit(3)"), ProxyClient(proxy.url)) == 3
    assert proxy.requests[0][2] == {}
    assert end_of(proxy) == ("failed", "exit code 3")
    assert proxy.requests[-1][2]["error_class"] == "agent_crash"


def test_a_command_that_is_killed_fails_its_rollout(proxy: FakeProxy) -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_command(python(program), ProxyClient(proxy.url)) == 128 + signal.SIGKILL
    assert end_of(proxy) == ("failed", "killed by SIGKILL")
    assert proxy.requests[-1][2]["error_class"] == "agent_crash"


def test_the_command_finds_the_proxy_through_its_environment(proxy: FakeProxy, tmp_path: Path) -> None:
    out = tmp_path / "env.json"
    program = f"import json, os; json.dump(dict(os.environ), open({str(out)!r}, 'w'))"
    run_command(python(program), ProxyClient(proxy.url), RolloutRequest(role="the writer"))
    env = json.loads(out.read_text())
    base = f"{proxy.url}/rollout/r-1/role/the%20writer"
    assert env["OPENAI_BASE_URL"] == env["OPENAI_API_BASE"] == f"{base}/v1"
    assert env["ANTHROPIC_BASE_URL"] == base
    assert env["OPENAI_API_KEY"] == env["ANTHROPIC_API_KEY"] == "lp-secret"
    assert env["LIGHTNING_ROLLOUT_ID"] == "r-1"
    assert env["LIGHTNING_REWARD_URL"] == f"{proxy.url}/reward"
    assert env["PATH"] == os.environ["PATH"]


def test_the_command_gets_no_secret_of_the_proxy(
    proxy: FakeProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "env.json"
    monkeypatch.setenv("LIGHTNING_PROXY__TOKEN", "open sesame")
    monkeypatch.setenv("LIGHTNING_PROXY__UPSTREAM_API_KEY", "open sesame")
    program = f"import json, os; json.dump(dict(os.environ), open({str(out)!r}, 'w'))"
    assert run_command(python(program), ProxyClient(proxy.url)) == 0
    assert "open sesame" not in json.loads(out.read_text()).values()


def test_where_child_signals_are_inherited_as_ignored_the_exit_code_is_known(proxy: FakeProxy) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert run_command(python("raise SystemExit(3)"), ProxyClient(proxy.url)) == 3
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert end_of(proxy) == ("failed", "exit code 3")


def test_the_address_is_the_one_by_which_we_reached_the_proxy() -> None:
    env = agent_environment("https://gateway.example/lp/", {"rollout_id": "a/b", "api_key": "k"})
    assert env["OPENAI_BASE_URL"] == "https://gateway.example/lp/rollout/a%2Fb/v1"


def start_run(proxy: FakeProxy, program: str) -> subprocess.Popen[str]:
    runner = (
        "import sys; from lightning_proxy.client import ProxyClient; "
        "from lightning_proxy.runner import run_command; "
        "sys.exit(run_command([sys.executable, '-c', sys.argv[2]], ProxyClient(sys.argv[1])))"
    )
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", runner, proxy.url, program], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def test_standard_streams_pass_through(proxy: FakeProxy) -> None:
    program = "import sys; print(sys.stdin.read().upper()); print('careful', file=sys.stderr)"
    out, err = start_run(proxy, program).communicate("hello", timeout=60)
    assert (out, err) == ("HELLO\n", "careful\n")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_command_and_cancels_the_rollout(
    proxy: FakeProxy, signum: signal.Signals
) -> None:
    program = (
        "import signal, sys, time\n"
        "def stop(signum, frame): print('got', signum, flush=True); sys.exit(5)\n"
        f"signal.signal({int(signum)}, stop)\n"
        "print('up', flush=True); time.sleep(60)\n"
    )
    run = start_run(proxy, program)
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    run.send_signal(signum)
    out, _ = run.communicate(timeout=60)
    assert out == f"got {int(signum)}\n"
    assert run.returncode == 5
    assert end_of(proxy) == ("cancelled", f"stopped by {signum.name}")


def test_a_command_that_is_not_there_registers_nothing(
    proxy: FakeProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["no-such-command-here"], ProxyClient(proxy.url)) == 127
    assert "no-such-command-here: command not found" in capsys.readouterr().err
    assert proxy.requests == []


def test_no_command_is_refused_with_an_example(proxy: FakeProxy) -> None:
    with pytest.raises(InvalidInput, match="lightning-proxy run -- python"):
        run_command([], ProxyClient(proxy.url))


def test_a_proxy_that_does_not_answer_is_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(EngineUnreachable, match="lightning-proxy serve"):
        run_command(python(f"open({str(tmp_path / 'ran')!r}, 'w')"), ProxyClient("http://127.0.0.1:9"))
    assert not (tmp_path / "ran").exists()


def test_an_end_that_cannot_be_recorded_leaves_the_exit_code_alone(
    proxy: FakeProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.answers["PATCH"] = (409, json.dumps({"error": {"message": "it is cancelled"}}).encode())
    assert run_command(python("raise SystemExit(4)"), ProxyClient(proxy.url)) == 4
    assert "it is cancelled" in caplog.text


# --- the client ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error"), [(400, InvalidInput), (404, UnknownTarget), (409, Conflict), (502, EngineRefused)]
)
def test_what_the_proxy_refuses_becomes_the_error_that_it_was(
    proxy: FakeProxy, status: int, error: type[Exception]
) -> None:
    proxy.answers["GET"] = (status, json.dumps({"error": {"message": "because"}}).encode())
    with pytest.raises(error, match="because"):
        ProxyClient(proxy.url).get("/api/x")


def test_a_store_that_does_not_write_for_a_moment_is_waited_for(proxy: FakeProxy) -> None:
    proxy.answers["POST"] = (503, b'{"error": {"message": "the store is not writing"}}')
    pool = Pool(ProxyClient(proxy.url), "worker", 60.0)

    def mended() -> None:
        wait_until(lambda: len(proxy.requests) >= 3)
        proxy.answers["POST"] = (200, b'{"assignments": []}')

    threading.Thread(target=mended, daemon=True).start()
    assert patiently(lambda: pool.claim(1, task_ids=None, prefer=None, wait_s=0), lambda: False) == []
    assert len(proxy.requests) >= 3


def test_a_missing_token_is_told_where_to_put_it(proxy: FakeProxy) -> None:
    proxy.answers["GET"] = (401, json.dumps({"error": {"message": "no key"}}).encode())
    with pytest.raises(EngineRefused, match=r"no key.*LIGHTNING_PROXY__TOKEN"):
        ProxyClient(proxy.url).get("/api/x")


def test_the_token_is_sent(proxy: FakeProxy) -> None:
    ProxyClient(proxy.url, "s3cret").get("/api/x")
    assert proxy.requests[0][3] == "Bearer s3cret"


def test_something_else_that_answers_is_recognised(proxy: FakeProxy) -> None:
    proxy.answers["GET"] = (200, b"<html>")
    with pytest.raises(EngineRefused, match="no lightning-proxy"):
        ProxyClient(proxy.url).get("/api/x")
    proxy.answers["GET"] = (404, b"<html>")
    with pytest.raises(EngineRefused, match="no lightning-proxy: status 404"):
        ProxyClient(proxy.url).get("/api/x")


def test_an_http_proxy_in_the_environment_is_not_asked_for_this_machine(
    proxy: FakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert ProxyClient(proxy.url).get("/api/x") == ROLLOUT
