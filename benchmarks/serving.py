"""The serving processes that are compared, and the CPU time that they have used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  keepalive_requests 1000000;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_body_buffer_size 1m;
  upstream engine {{ server {engine}; keepalive 64; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


@dataclass(slots=True)
class Serving:
    """One serving process."""

    name: str
    process: subprocess.Popen[str]
    url: str

    def cpu_s(self) -> float:
        """CPU seconds so far, user and system, of the process and its children."""
        return sum(_cpu_s(pid) for pid in _family(self.process.pid))

    def stop(self) -> None:
        """SIGTERM, and wait: a proxy still commits what it holds."""
        self.process.terminate()
        self.process.wait(30)
        if self.process.stdout is not None:
            self.process.stdout.close()


def start_engine(folder: Path) -> Serving:
    """The fake engine: 64-token answers at once, 4 bytes a token."""
    command = [sys.executable, "-m", "tests.engine.fake_engine", "--bytes-per-token", "4"]
    return _start("the engine itself", [*command, "--keep-requests", "0"], folder)


def start_bare(folder: Path, engine: Serving) -> Serving:
    """The bare aiohttp forwarder."""
    command = [sys.executable, "-m", "benchmarks.bare_forwarder", "--upstream", engine.url]
    return _start("bare aiohttp forwarder", command, folder)


def start_proxy(folder: Path, engine: Serving) -> Serving:
    """lightning-proxy, capturing and committing into ``folder/lightning.db``."""
    command = [sys.executable, "-m", "lightning_proxy.cli", "serve", "--upstream", f"{engine.url}/v1"]
    return _start("lightning-proxy", [*command, "--port", "0", "--db", str(folder / "lightning.db")], folder)


def start_nginx(folder: Path, engine: Serving) -> Serving | None:
    """nginx with one worker; None where it is not installed."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        return None
    port = _free_port()
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, engine=engine.url.removeprefix("http://"), port=port))
    with (folder / "nginx.log").open("w") as log:
        process = subprocess.Popen(
            [binary, "-p", str(folder), "-c", str(config)], stdout=log, stderr=log, text=True
        )
    serving = Serving("nginx", process, f"http://127.0.0.1:{port}")
    _wait_for(serving, folder / "nginx.log")
    return serving


def _start(name: str, command: list[str], folder: Path) -> Serving:
    """Start a process that prints its address first."""
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    found = re.search(r"http://[\d.:]+", process.stdout.readline())
    if found is None:
        process.kill()
        raise RuntimeError(f"{name} did not start:\n{log.read_text()}")
    serving = Serving(name, process, found.group())
    _wait_for(serving, log)
    return serving


def _wait_for(serving: Serving, log: Path) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            urllib.request.urlopen(f"{serving.url}/v1/models", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError) as error:
            if time.monotonic() > deadline or serving.process.poll() is not None:
                serving.process.kill()
                raise RuntimeError(f"{serving.name} does not answer: {error}\n{log.read_text()}") from error
            time.sleep(0.05)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _family(pid: int) -> list[int]:
    """A process and its children, and theirs."""
    family = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            family += _family(int(child))
    return family


def _cpu_s(pid: int) -> float:
    """utime + stime; from the scheduler's nanoseconds where the kernel shows them."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except OSError:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
