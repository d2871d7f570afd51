"""A warm parent for many short runs of one Python script.

    python agent_host.py SCRIPT --concurrency 32 --timeout 60

Importing an agent's framework costs seconds of CPU, more than a whole rollout. So this process imports once,
and forks for each job; the child then runs SCRIPT as ``__main__`` with its own arguments and environment, as
``python SCRIPT ...`` would. The script knows nothing of this. What there is to import the first job tells: it
runs alone, and its modules are imported here before the others begin.

Jobs come in on stdin, one JSON object a line: ``{"id", "argv", "env"}``. Answers go out on stdout
as runs end: ``{"id", "status", "output"}``, status being the exit status, negative for a signal,
or ``"timeout"``. A run's stderr goes to ours. At the end of stdin the last runs are waited for.

Standard library alone, and run by its path: a child inherits nothing of lightning-proxy.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import IO, Any

_STDIN, _STDOUT, _TOLD = 0, 1, 3
_CANNED = (
    'data: {"id":"c","object":"chat.completion.chunk","created":0,"model":"m","choices":[{"index":0,"delta":'
    '{"role":"assistant","content":"","tool_calls":[{"index":0,"id":"t","type":"function","function":'
    '{"name":"f","arguments":"{}"}}]},"finish_reason":null}]}\n\ndata: [DONE]\n\n'
)


@dataclass(slots=True)
class Run:
    """One child: its job's id, its process, when it must have ended, what it prints into.

    That is a file and no pipe: a process that the script leaves behind would hold a pipe open.
    """

    job: Any
    pid: int
    deadline: float
    output: IO[bytes]
    timed_out: bool = False


class Host:
    """Forks for jobs, at most ``concurrency`` at a time, each for at most ``timeout_s``."""

    def __init__(self, script: str, *, concurrency: int, timeout_s: float) -> None:
        self._script = script
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._waiting: deque[dict[str, Any]] = deque()
        self._running: dict[int, Run] = {}  # by the descriptor that tells of the child's end
        self._selector = selectors.DefaultSelector()
        self._partial = b""
        self._more = True
        # What the first job's modules are; None once they are imported here.
        self._told: IO[bytes] | None = tempfile.TemporaryFile()  # noqa: SIM115  closed when it was read

    def serve(self) -> None:
        """Work until stdin has ended and all jobs are done."""
        self._selector.register(_STDIN, selectors.EVENT_READ)
        while self._more or self._waiting or self._running:
            most = self._concurrency if self._told is None else 1
            while self._waiting and len(self._running) < most:
                self._start(self._waiting.popleft())
            for key, _ in self._selector.select(self._patience()):
                if key.fd == _STDIN:
                    self._read_jobs()
                else:
                    self._end(key.fd)
            self._kill_overdue()

    def _patience(self) -> float | None:
        if not self._running:
            return None
        return max(0.0, min(run.deadline for run in self._running.values()) - time.monotonic())

    def _read_jobs(self) -> None:
        data = os.read(_STDIN, 65536)
        if not data:
            self._more = False
            self._selector.unregister(_STDIN)
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._waiting.extend(json.loads(line) for line in lines if line.strip())

    def _start(self, job: dict[str, Any]) -> None:
        output = tempfile.TemporaryFile()  # noqa: SIM115  closed when the run has ended
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), _STDOUT)
            self._become(job)
        end = os.pidfd_open(pid)
        self._running[end] = Run(job["id"], pid, time.monotonic() + self._timeout_s, output)
        self._selector.register(end, selectors.EVENT_READ)

    def _become(self, job: dict[str, Any]) -> None:
        """In the child: be ``python SCRIPT ...``, and end."""
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), _STDIN)
            if self._told is not None:
                os.dup2(self._told.fileno(), _TOLD)
            held = [*self._running, *(run.output.fileno() for run in self._running.values()), 64]
            os.closerange(_TOLD + (self._told is not None), max(held) + 8)
            os.environ.update(job["env"])
            sys.argv = [self._script, *job["argv"]]
            sys.path.insert(0, str(Path(self._script).resolve().parent))
            runpy.run_path(self._script, run_name="__main__")
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:  # noqa: BLE001  the script's own crash, told as Python would
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if self._told is not None:
                os.write(_TOLD, json.dumps(list(sys.modules)).encode())  # in the order of their import
            os._exit(status)

    def _end(self, fd: int) -> None:
        run = self._running.pop(fd)
        self._selector.unregister(fd)
        os.close(fd)
        _, ended = os.waitpid(run.pid, 0)
        with run.output:
            run.output.seek(0)
            output = run.output.read().decode(errors="replace")
        if self._told is not None:
            self._preload(self._told)
        status = "timeout" if run.timed_out else os.waitstatus_to_exitcode(ended)
        answer = {"id": run.job, "status": status, "output": output}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    def _preload(self, told: IO[bytes]) -> None:
        """Import what the run that ended has told; one that was killed told nothing, so the next one may."""
        told.seek(0)
        if names := told.read():
            import_all(names)
            told.close()
            self._told = None

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for run in self._running.values():
            if now >= run.deadline:
                run.timed_out = True
                run.deadline = now + 1.0  # by then its end has been told
                os.kill(run.pid, signal.SIGKILL)


class _Canned(BaseHTTPRequestHandler):
    """Answers any call with one short stream."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(_CANNED.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def import_all(told: bytes) -> None:
    """Import the modules that a run names, in its order; what only that run could import is left out."""
    for name in json.loads(told):
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001  a module of the script's own folder, or one made at run time
                continue
    if threading.active_count() > 1:
        print("agent_host: a module started a thread; runs are forked all the same", file=sys.stderr)
    gc.collect()
    gc.freeze()  # children share these pages


def warm_up() -> None:
    """Import what a call through the SDK needs, by making one to a server of our own."""
    import sqlite3  # noqa: F401  what a script may use beside the SDK

    import openai

    server = HTTPServer(("127.0.0.1", 0), _Canned)
    answering = threading.Thread(target=server.handle_request)
    answering.start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        for _ in client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "warm up"}], stream=True
        ):
            pass
    answering.join()  # a process must have one thread when it forks
    server.server_close()
    gc.collect()
    gc.freeze()  # children share these pages


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Run one script many times, quickly.")
    parser.add_argument("script")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--timeout", type=float, default=60.0)
    args = parser.parse_args()
    warm_up()
    Host(args.script, concurrency=args.concurrency, timeout_s=args.timeout).serve()


if __name__ == "__main__":
    main()
