"""One ``serve --model`` for all tests here: real vLLM takes most of a minute to start."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import lightning_proxy.demo
from lightning_proxy.store import Store
from tests.conftest import COMMIT_TIMEOUT_S, wait_until

WEIGHTS = Path(lightning_proxy.demo.__file__).with_name("weights")
MODEL = "tiny-sql"
START_S = 600.0  # a slow, busy machine
# vLLM puts as many tokens into a chunk as are ready, so that on a busy machine some kinds of chunks
# come in one stream and not in the next, with us or without.
TRIES = 6


@dataclass(slots=True)
class Served:
    """A running ``serve --model``: the proxy's address, the engine's own, database and process."""

    url: str
    engine_url: str
    db: Path
    process: subprocess.Popen[str]
    log: Path

    def store(self) -> Store:
        """A connection to the database of its own."""
        return Store.open(self.db)


@contextmanager
def serving(directory: Path, *args: str) -> Iterator[Served]:
    """``serve --model`` with further arguments for vLLM."""
    config = directory / "lightning.toml"
    config.write_text(
        f'[policy]\nname = "{MODEL}"\n[engine]\nargs = {json.dumps(["--max-model-len", "2048", *args])}\n'
        f"[proxy]\nhold_timeout_s = {START_S}\ncommit_timeout_s = {COMMIT_TIMEOUT_S}\n"
    )
    command = [str(Path(sys.executable).with_name("lightning-proxy")), "serve", "--model", str(WEIGHTS)]
    command += ["--port", "0", "--db", "lightning.db", "--config", str(config)]
    log = directory / "proxy.log"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=directory, stdout=subprocess.PIPE, stderr=errors, text=True, env=environ
        )
    assert process.stdout is not None
    try:
        found = re.search(r"http://[^\s/]+", process.stdout.readline())
        assert found is not None, log.read_text()
        url = found.group()
        wait_until(lambda: process.poll() is not None or is_ready(url), START_S)
        assert process.poll() is None, log.read_text()
        yield Served(url, engine_of(process), directory / "lightning.db", process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        process.stdout.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Real vLLM behind a real proxy process."""
    with serving(tmp_path_factory.mktemp("served")) as running:
        yield running


def is_ready(url: str) -> bool:
    """Whether calls go straight through."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=30) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def engine_of(process: subprocess.Popen[str]) -> str:
    """The address of the vLLM that a ``serve`` process started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        command = command_of(child)
        if "--port" in command:
            return f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    raise AssertionError("no vLLM among the children of serve")


def command_of(process: psutil.Process) -> list[str]:
    """A process's command line; [] where it has ended since it was found."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
