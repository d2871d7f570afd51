"""An agent's process group: started with a log of its own, ended as a whole, never left behind.

Linux and macOS. Between the runner and the agent stands ``/bin/sh`` for one line, in which the new
group tells the warden of itself and then becomes the agent. So there is no moment in which a runner
could die and leave an agent that nobody knows of.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_proxy.errors import InvalidInput
from lightning_proxy.runner import warden

_BEGIN = 'echo "+$$" >&0; exec "$@" </dev/null'  # stdin is the pipe to the warden
_TAIL_BYTES = 2000
_TAIL_LINES = 3


class Warden:
    """The process that ends our agents, should we die before them."""

    def __init__(self, *, keep_open: int | None = None) -> None:
        """``keep_open``: a descriptor that stays open until the last agent has ended (a lock)."""
        read, self.pipe = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", warden.__file__],
                stdin=read,
                stdout=subprocess.DEVNULL,
                pass_fds=() if keep_open is None else (keep_open,),
                start_new_session=True,
            )
        finally:
            os.close(read)

    def check(self) -> None:
        """Raise ``InvalidInput`` where it has ended: an agent that is started now could be left behind."""
        if self._process.poll() is not None:
            raise InvalidInput(
                f"the process {self._process.pid}, which ends the agents of a runner that dies, was ended: "
                "leave it alone, and start the runner again"
            )

    def forget(self, group: int) -> None:
        """This group has ended; its number may be somebody else's soon."""
        try:
            os.write(self.pipe, b"-%d\n" % group)
        except OSError:
            pass  # the warden was killed: nobody remembers the group then

    def close(self) -> None:
        """End whatever is left, and the warden."""
        os.close(self.pipe)
        try:
            self._process.wait(warden.GRACE_S + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def how_it_ended(code: int) -> str:
    """An exit code in words; negative stands for a signal."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # real-time signals have no name
        return f"killed by signal {-code}"


class AgentProcess:
    """One command under way. ``wait`` is for one thread, everything else for any."""

    def __init__(
        self, argv: Sequence[str], *, env: Mapping[str, str], log: Path, warden: Warden, grace_s: float
    ) -> None:
        """Start it. Raises ``OSError`` where it cannot be started."""
        self.log = log
        self.ended_because: str | None = None  # why we ended it; None: we did not
        self._warden = warden
        self._grace_s = grace_s
        self._kill_at: float | None = None
        self._gone = False
        self._lock = threading.Lock()  # no signal to a group whose number is free again
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _BEGIN, "sh", *argv],
                env=dict(env),
                stdin=warden.pipe,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> int:
        """The command's exit code, negative for a signal, once its whole group has ended."""
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            self._signal(signal.SIGKILL)  # what it left running must not call in its name
            self._gone = True
            code = self._process.wait()
        self._warden.forget(self._process.pid)
        return code

    def end(self, why: str) -> None:
        """Ask it to end; the first reason stays. ``tick`` ends it for good after the grace."""
        with self._lock:
            if self.ended_because is None and not self._gone:
                self.ended_because = why
                self._kill_at = time.monotonic() + self._grace_s
                self._signal(signal.SIGTERM)

    def tick(self) -> None:
        """End what was asked to end and has not."""
        with self._lock:
            if self._kill_at is not None and time.monotonic() >= self._kill_at and not self._gone:
                self._signal(signal.SIGKILL)

    def kill(self) -> None:
        """End it now."""
        with self._lock:
            self._kill_at = time.monotonic()
            if not self._gone:
                self._signal(signal.SIGKILL)

    def last_lines(self) -> str:
        """The end of what it wrote, in one line."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(lines[-_TAIL_LINES:])[-400:]

    def written(self) -> int:
        """Bytes that it wrote so far."""
        try:
            return self.log.stat().st_size
        except OSError:
            return 0

    def _signal(self, signum: int) -> None:
        """Called with the lock held, before the leader is reaped: the number is still its group's."""
        try:
            os.killpg(self._process.pid, signum)
        except OSError:
            pass  # it has not become a group yet, or nobody is left in it
