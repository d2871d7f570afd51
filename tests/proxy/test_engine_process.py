"""The supervisor, on a real process that serves /health and dies when told to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.config import Settings
from lightning_proxy.config.settings import EngineSettings
from lightning_proxy.errors import ConfigError, EngineDied
from lightning_proxy.proxy import served
from lightning_proxy.proxy.engine_process import EngineCommand, EngineProcess, build_command, has_tied_head
from lightning_proxy.proxy.hold import Hold
from lightning_proxy.proxy.metrics import Metrics
from lightning_proxy.proxy.reader import open_store
from lightning_proxy.proxy.switch import Switch
from lightning_proxy.proxy.tasks import Tasks
from lightning_proxy.store import Store

SCRIPT = Path(__file__).with_name("engine_script.py")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def script_command(settings: EngineSettings, policy: str, model: Path, port: int) -> EngineCommand:
    return EngineCommand(
        (sys.executable, str(SCRIPT), str(port), str(model), *settings.args), dict(os.environ)
    )


def engine(tmp_path: Path, *args: str, model: Path = Path("weights"), **settings: float) -> EngineProcess:
    return EngineProcess(
        EngineSettings.model_validate({"args": args, "log": tmp_path / "logs" / "engine.log", **settings}),
        policy="policy",
        model=lambda: model,
        port=free_port(),
        command=script_command,
        backoff_s=0.05,
    )


@contextlib.asynccontextmanager
async def running(process: EngineProcess) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.get_running_loop().create_task(process.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def get(process: EngineProcess, path: str) -> str:
    def read() -> str:
        url = process.url.removesuffix("/v1") + path
        with urllib.request.urlopen(url, timeout=60) as response:
            return str(response.read().decode())

    return await asyncio.to_thread(read)


async def get_and_lose(process: EngineProcess, path: str) -> None:
    with contextlib.suppress(OSError, urllib.error.URLError):
        await get(process, path)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def gone(*pids: int, within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


async def not_ready(process: EngineProcess) -> None:
    async with asyncio.timeout(60):
        while process.ready.is_set():  # noqa: ASYNC110 - the Event tells of its setting only
            await asyncio.sleep(0.01)


async def test_a_stop_ends_the_engine_and_its_children(tmp_path: Path) -> None:
    process = engine(tmp_path)
    async with running(process):
        await asyncio.wait_for(process.ready.wait(), 60)
        pids = [int(pid) for pid in (await get(process, "/children")).split()]
        assert all(alive(pid) for pid in pids)
    assert not alive(pids[0])
    assert await gone(*pids)  # its children were killed, and die when they are scheduled
    assert not process.ready.is_set()
    assert "serving weights" in (tmp_path / "logs" / "engine.log").read_text()


async def test_an_engine_that_died_comes_back_with_the_weights_active_then(tmp_path: Path) -> None:
    models = iter([Path("version-0"), Path("version-1")])
    process = engine(tmp_path)
    process._model = lambda: next(models)
    events: list[str] = []

    async def note(event: str) -> None:
        events.append(event)

    process.on_ready, process.on_down = (lambda: note("ready")), (lambda: note("down"))
    async with running(process):
        await asyncio.wait_for(process.ready.wait(), 60)
        assert await get(process, "/model") == "version-0"
        _, orphan = (int(pid) for pid in (await get(process, "/children")).split())
        await get_and_lose(process, "/die")
        await not_ready(process)
        assert await gone(orphan)
        await asyncio.wait_for(process.ready.wait(), 60)
        assert await get(process, "/model") == "version-1"
    assert events == ["ready", "down", "ready", "down"]


async def test_an_engine_whose_core_is_dead_is_replaced_though_its_server_answers(tmp_path: Path) -> None:
    process = engine(tmp_path)
    async with running(process):
        await asyncio.wait_for(process.ready.wait(), 60)
        first = await get(process, "/children")
        await get(process, "/kill-core")
        await not_ready(process)
        await asyncio.wait_for(process.ready.wait(), 60)
        assert await get(process, "/children") != first


async def test_an_engine_is_down_from_the_moment_it_is_given_up_however_long_its_end_takes(
    tmp_path: Path,
) -> None:
    process = engine(tmp_path, "deaf")
    down = asyncio.Event()

    async def note() -> None:
        down.set()

    process.on_down = note
    async with running(process):
        await asyncio.wait_for(process.ready.wait(), 10)
        server = int((await get(process, "/children")).split()[0])
        await get(process, "/kill-core")
        await asyncio.wait_for(down.wait(), 5)
        assert alive(server), "it ignores SIGTERM for longer than that"
        process._settings = engine(tmp_path)._settings  # the next one does not
        os.kill(server, signal.SIGKILL)
        await asyncio.wait_for(process.ready.wait(), 10)


async def test_an_engine_that_dies_while_its_version_is_looked_up_holds_no_call_once_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.model_validate({"store": {"db": tmp_path / "lightning.db"}})
    process, hold = engine(tmp_path), Hold()
    asked, over = threading.Event(), threading.Event()

    def slow_store(settings: Settings) -> Store:
        if not asked.is_set():
            asked.set()
            over.wait(10)
        return open_store(settings)

    monkeypatch.setattr(served, "open_store", slow_store)
    unused: Any = None
    metrics, tasks = Metrics(), Tasks()
    switch = Switch(
        policy="policy", engine=unused, hold=hold, writer=unused, metrics=metrics, tasks=tasks, tolerance=0.05
    )
    task = asyncio.get_running_loop().create_task(
        served.Served(settings, unused, hold, switch, process).supervise()
    )
    try:
        assert await asyncio.to_thread(asked.wait, 10)
        assert not hold.is_open
        await get_and_lose(process, "/die")
        await not_ready(process)
        await asyncio.wait_for(process.ready.wait(), 10)
        assert await hold.passed(5), hold.reasons
    finally:
        over.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_engine_that_keeps_dying_is_given_up_with_the_last_lines_of_its_log(tmp_path: Path) -> None:
    process = engine(tmp_path, "crash", max_restarts=2)
    with pytest.raises(EngineDied) as error:
        await asyncio.wait_for(process.run(), 60)
    assert "exit code 7, 3 time(s)" in str(error.value)
    assert "out of memory, as it were" in str(error.value)


async def test_an_engine_that_is_never_healthy_is_given_up_after_the_start_timeout(tmp_path: Path) -> None:
    process = engine(tmp_path, "never-healthy", max_restarts=0, start_timeout_s=0.5)
    with pytest.raises(EngineDied, match=r"not healthy within 0\.5 s"):
        await asyncio.wait_for(process.run(), 60)


async def test_killing_the_guard_and_the_server_leaves_nobody_behind(tmp_path: Path) -> None:
    process = engine(tmp_path)
    async with running(process):
        await asyncio.wait_for(process.ready.wait(), 60)
        server, child = (int(pid) for pid in (await get(process, "/children")).split())
        os.kill(os.getsid(server), signal.SIGKILL)
        os.kill(server, signal.SIGKILL)
        await not_ready(process)
        assert await gone(server, child)
        await asyncio.wait_for(process.ready.wait(), 60)


def test_killing_the_proxy_takes_the_engine_and_its_children_along(tmp_path: Path) -> None:
    port = free_port()
    program = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_engine_process import EngineProcess, EngineSettings, script_command
process = EngineProcess(EngineSettings(log=Path({str(tmp_path / "engine.log")!r})), policy="policy",
                        model=lambda: Path("weights"), port={port}, command=script_command)
async def main():
    task = asyncio.ensure_future(process.run())
    await process.ready.wait()
    print("ready", flush=True)
    await task
asyncio.run(main())
"""
    proxy = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert proxy.stdout is not None
    with proxy, proxy.stdout:
        assert proxy.stdout.readline() == "ready\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/children", timeout=60) as response:
            pids = [int(pid) for pid in response.read().split()]
        proxy.send_signal(signal.SIGKILL)
        proxy.wait()
    assert asyncio.run(gone(*pids))


def test_a_deaf_engine_is_killed_when_the_grace_is_over() -> None:
    program = (
        "import sys; from lightning_proxy.proxy import engine_guard; "
        "engine_guard.GRACE_S = 0.3; sys.exit(engine_guard.main(sys.argv[1:]))"
    )
    port = free_port()
    command = [sys.executable, "-c", program, sys.executable, str(SCRIPT), str(port), "weights", "deaf"]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert guard.stdin is not None
    assert guard.stdout is not None
    with guard, guard.stdout:
        assert "serving" in guard.stdout.readline()
        guard.stdin.close()
        assert guard.wait(60) == 128 + signal.SIGKILL


# --- the command line ---------------------------------------------------------------------------


def words(settings: EngineSettings, *, cpu: bool) -> tuple[str, ...]:
    return build_command(settings, "policy", Path("/weights"), 8123, cpu=cpu).argv


def test_the_command_serves_the_policys_name_on_loopback_with_tool_calls() -> None:
    line = " ".join(words(EngineSettings(), cpu=False))
    assert "-m vllm.entrypoints.openai.api_server --model /weights --served-model-name policy" in line
    assert "--host 127.0.0.1 --port 8123" in line
    assert "--enable-auto-tool-choice --tool-call-parser hermes" in line
    assert "--enforce-eager" not in line


def test_a_machine_without_a_gpu_gets_the_measured_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    command = build_command(EngineSettings(), "policy", Path("/weights"), 8123, cpu=True)
    assert "--enforce-eager" in command.argv
    assert command.env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert command.env["TORCH_COMPILE_DISABLE"] == "1"


@pytest.mark.parametrize("cpu", [True, False])
def test_weight_swapping_routes_are_always_on(cpu: bool) -> None:
    command = build_command(EngineSettings(env={"VLLM_SERVER_DEV_MODE": "0"}), "p", Path("w"), 1, cpu=cpu)
    assert command.env["VLLM_SERVER_DEV_MODE"] == "1"


def test_what_the_user_sets_replaces_our_default_in_every_spelling() -> None:
    settings = EngineSettings(
        args=("--tool_call_parser=qwen3", "--no-enforce-eager", "--dtype", "bfloat16"),
        env={"VLLM_CPU_KVCACHE_SPACE": "4"},
    )
    argv = words(settings, cpu=True)
    assert "hermes" not in argv
    assert "--enforce-eager" not in argv
    assert argv.count("--dtype") == 1
    assert "float32" not in argv
    assert build_command(settings, "p", Path("w"), 1, cpu=True).env["VLLM_CPU_KVCACHE_SPACE"] == "4"


def test_the_shells_environment_beats_our_defaults_and_the_settings_beat_the_shell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert build_command(EngineSettings(), "p", Path("w"), 1, cpu=True).env["VLLM_CPU_KVCACHE_SPACE"] == "2"
    settings = EngineSettings(env={"VLLM_CPU_KVCACHE_SPACE": "3"})
    assert build_command(settings, "p", Path("w"), 1, cpu=True).env["VLLM_CPU_KVCACHE_SPACE"] == "3"


@pytest.mark.parametrize("argument", ["--port=1", "--model", "--served_model_name"])
def test_what_is_ours_to_choose_cannot_be_set_by_the_user(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"chosen by lightning-proxy"):
        words(EngineSettings(args=(argument, "x")), cpu=True)


def test_a_tied_head_is_recognised_by_the_models_configuration(tmp_path: Path) -> None:
    for text, tied in (('{"tie_word_embeddings": true}', True), ("{}", False), ("no json", False)):
        (tmp_path / "config.json").write_text(text)
        assert has_tied_head(tmp_path) is tied
    assert not has_tied_head(tmp_path / "absent")
