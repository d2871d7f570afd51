"""vLLM as a child of the proxy: started, watched, restarted, and never left behind.

``EngineProcess.run`` is the supervisor. ``vllm_command`` decides what is run and in which
environment. ``engine_guard`` is the small process between us and vLLM that ends it when we end.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import orjson

from lightning_proxy.config.settings import EngineSettings
from lightning_proxy.errors import ConfigError, EngineDied, MissingExtra

from . import engine_guard
from .tasks import Tasks

log = logging.getLogger(__name__)

RESTART_WINDOW_S = 600.0
_GUARD = (sys.executable, "-I", "-S", engine_guard.__file__)

# Without a GPU (measured on two cores): compiling costs 42 s on the first request, the warm-up as much again.
_CPU_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_CI_ENV": "1",  # no warm-up
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
_CPU_ARGS = (
    ("--dtype", "float32"),
    ("--max-num-seqs", "32"),
    ("--max-model-len", "auto"),
    ("--enforce-eager",),
)
# The access log would be a line for each of our own /health requests and each call.
_ALWAYS_ARGS = (
    ("--enable-auto-tool-choice",),
    ("--tool-call-parser", "hermes"),
    ("--disable-uvicorn-access-log",),
)
_OURS_ALONE = frozenset({"model", "served-model-name", "host", "port"})


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """What is run: the arguments, and the whole environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


CommandBuilder = Callable[[EngineSettings, str, Path, int], EngineCommand]
Callback = Callable[[], Awaitable[None]]


async def _nothing() -> None:
    return


def vllm_command(
    settings: EngineSettings, policy: str, model: Path, port: int, *, shown_as: str | None = None
) -> EngineCommand:
    """vLLM's OpenAI server for the weights in ``model``, under the name ``policy``.

    ``shown_as``: another name that it takes, and that its answers show whichever was asked for.
    MissingExtra if vLLM is not installed; ConfigError if ``engine.args`` sets what is ours to set.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtra(
            "vLLM is not installed: pip install 'lightning-proxy[gpu]' (or 'lightning-proxy[cpu]' where "
            "there is no GPU); or serve --upstream URL in front of an engine that runs elsewhere"
        )
    cpu = runs_on_cpu()
    if cpu and has_tied_head(model):
        log.warning(
            "%s ties its output head to its embeddings: vLLM's CPU build keeps a packed copy of such a "
            "head that a change of weights does not reach, so new versions will be rejected; untie the "
            "head, or serve it on a GPU", model,
        )  # fmt: skip
    return build_command(settings, policy, model, port, cpu=cpu, shown_as=shown_as)


def has_tied_head(model: Path) -> bool:
    """Whether the model's output head is its input embeddings, by its config.json (default: no)."""
    try:
        config = orjson.loads((model / "config.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return False  # vLLM will say what is wrong with it
    return isinstance(config, dict) and config.get("tie_word_embeddings") is True


def build_command(
    settings: EngineSettings,
    policy: str,
    model: Path,
    port: int,
    *,
    cpu: bool,
    shown_as: str | None = None,
) -> EngineCommand:
    """The command line and environment. The user's own arguments and variables replace our defaults."""
    chosen = {_option_name(word) for word in settings.args if word.startswith("--")}
    if taken := sorted(chosen & _OURS_ALONE):
        raise ConfigError(
            f"engine.args sets --{taken[0]}, which is chosen by lightning-proxy; "
            "weights and their name are policy.model and policy.name"
        )
    defaults = (*_ALWAYS_ARGS, *(_CPU_ARGS if cpu else ()))
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    argv += ["--served-model-name", *([shown_as] if shown_as else []), policy]  # answers show the first
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    argv += [word for option in defaults if _option_name(option[0]) not in chosen for word in option]
    env = {"VLLM_NO_USAGE_STATS": "1", **(_CPU_ENV if cpu else {}), **os.environ, **settings.env}
    env["VLLM_SERVER_DEV_MODE"] = "1"  # the routes through which weights are changed
    return EngineCommand((*argv, *settings.args), env)


def _option_name(word: str) -> str:
    """``--no-enforce_eager=x`` is about ``enforce-eager``: vLLM takes all those spellings."""
    return word.lstrip("-").partition("=")[0].replace("_", "-").removeprefix("no-")


def runs_on_cpu() -> bool:
    """Whether vLLM is its CPU build here, or the machine shows neither an NVIDIA nor an AMD device."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return not (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists())
    return True


class EngineProcess:
    """One supervised vLLM on ``port`` of this machine.

    ``model()`` is asked at each start, so a restarted engine comes back with the weights that are
    active then. ``ready`` is set while the engine answers /health. ``on_ready`` is awaited after it
    was set, ``on_down`` after it was cleared; what they raise ends ``run``.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        policy: str,
        model: Callable[[], Path],
        port: int,
        on_ready: Callback = _nothing,
        on_down: Callback = _nothing,
        command: CommandBuilder = vllm_command,
        backoff_s: float = 1.0,
    ) -> None:
        self.ready = asyncio.Event()
        self.weights: Path | None = None  # that the engine was started on, the last time
        self.on_ready, self.on_down = on_ready, on_down
        self._settings, self._policy, self._model, self._port = settings, policy, model, port
        self._command, self._backoff_s = command, backoff_s

    @property
    def url(self) -> str:
        """Base URL as one would put it into OPENAI_BASE_URL."""
        return f"http://127.0.0.1:{self._port}/v1"

    async def run(self) -> None:
        """Keep the engine up until cancelled; then it is stopped before this returns.

        EngineDied when it ended more than ``max_restarts`` times within ten minutes, with the last
        lines of its log; MissingExtra or ConfigError when it cannot be started at all.
        """
        ends: deque[float] = deque()
        while True:
            why = await self._run_once()
            ends.append(time.monotonic())
            while ends[0] < ends[-1] - RESTART_WINDOW_S:
                ends.popleft()
            if len(ends) > self._settings.max_restarts:
                raise EngineDied(f"vLLM {why}, {len(ends)} time(s) within ten minutes; {self._last_lines()}")
            pause = min(self._backoff_s * 2 ** (len(ends) - 1), 30.0)
            log.warning(
                "vLLM %s; starting it again in %.1f s (its output: %s)", why, pause, self._settings.log
            )
            await asyncio.sleep(pause)

    async def _run_once(self) -> str:
        """One life of the process; returns how it ended."""
        self.weights = self._model()
        command = self._command(self._settings, self._policy, self.weights, self._port)
        guard, leash = await self._spawn(command)
        tasks = Tasks()
        log.info("vLLM is starting on port %d (process group of %d)", self._port, guard.pid)
        watch = tasks.spawn("engine health", self._watch())
        ended = tasks.spawn("engine process", guard.wait())
        try:
            await asyncio.wait({watch, ended}, return_when=asyncio.FIRST_COMPLETED)
            return f"ended with exit code {ended.result()}" if ended.done() else watch.result()
        finally:
            was_ready = self.ready.is_set()
            self.ready.clear()
            watch.cancel()
            os.close(
                leash
            )  # the guard now ends what is left of the engine, whether or not we are there to wait
            try:
                if was_ready:  # at once: to end an engine may take a while, and nobody should call it then
                    await self.on_down()
            finally:
                await asyncio.gather(ended, watch, return_exceptions=True)
                engine_guard.end_session(guard.pid)  # somebody may have killed the guard

    async def _spawn(self, command: EngineCommand) -> tuple[asyncio.subprocess.Process, int]:
        """Start the guard with the engine below it; returns it and the descriptor that holds it on."""
        held, leash = os.pipe()
        self._settings.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._settings.log.open("ab") as output:
                guard = await asyncio.create_subprocess_exec(
                    *_GUARD,
                    *command.argv,
                    stdin=held,
                    stdout=output,
                    stderr=output,
                    env=dict(command.env),
                    start_new_session=True,  # a Ctrl-C at the terminal is ours to handle
                )
        except BaseException:
            os.close(leash)
            raise
        finally:
            os.close(held)
        return guard, leash

    async def _watch(self) -> str:
        """Set ``ready`` when /health answers; returns when the engine is late or calls itself dead."""
        deadline = time.monotonic() + self._settings.start_timeout_s
        timeout = aiohttp.ClientTimeout(total=5.0)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while (status := await self._health(session)) != 200:
                if time.monotonic() > deadline:
                    return f"was not healthy within {self._settings.start_timeout_s:g} s"
                await asyncio.sleep(0.25)
            self.ready.set()
            await self.on_ready()
            while (
                status != 503
            ):  # vLLM's word for a dead engine core; no answer at all may just be a busy machine
                await asyncio.sleep(1.0)
                status = await self._health(session)
        return "says that its engine core is dead"

    async def _health(self, session: aiohttp.ClientSession) -> int | None:
        """Status of /health, or None without an answer."""
        try:
            async with session.get(f"http://127.0.0.1:{self._port}/health") as response:
                return response.status
        except (aiohttp.ClientError, TimeoutError):
            return None

    def _last_lines(self, count: int = 15) -> str:
        with self._settings.log.open("rb") as output:
            output.seek(0, os.SEEK_END)
            output.seek(max(0, output.tell() - 16_384))
            lines = output.read().decode("utf-8", "replace").splitlines()[-count:]
        return f"the last lines of {self._settings.log}:\n" + "\n".join(f"  {line}" for line in lines)
