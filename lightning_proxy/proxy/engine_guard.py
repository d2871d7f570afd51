"""Runs the engine so that nothing of it outlives the proxy, however the proxy ends.

The proxy starts this file as a process of its own, with the engine's command as arguments, and
holds the other end of its standard input. That end closes when the proxy asks for a stop, and also
when the proxy dies of anything, ``kill -9`` included: the kernel closes it. Then the engine's whole
process group gets SIGTERM, and SIGKILL ten seconds later. When the engine ends by itself, what it
left in its group is killed too, and its exit code becomes ours.

Should the guard itself be killed, the proxy calls ``end_session``.

Linux's PR_SET_PDEATHSIG alone would not do: it reaches the direct child only, and vLLM's API server,
killed that way, leaves its engine core running with the memory it holds.

Standard library only, run with ``-I -S``: it holds 12 MB.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from types import FrameType

GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Run ``command`` until it ends or standard input does; returns the exit status for the shell."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake)
    for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, _noted)
    engine = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_die_with_the_guard
    )
    stopping_since: float | None = None
    while engine.poll() is None:
        if stopping_since is not None and time.monotonic() - stopping_since > GRACE_S:
            break
        readable, _, _ = select.select([woken, *([0] if stopping_since is None else [])], [], [], 1.0)
        signals = os.read(woken, 64) if woken in readable else b""
        asked = 0 in readable or any(number != signal.SIGCHLD for number in signals)
        if asked and stopping_since is None:
            stopping_since = time.monotonic()
            _signal_group(engine.pid, signal.SIGTERM)
    _signal_group(engine.pid, signal.SIGKILL)
    code = engine.wait()
    return code if code >= 0 else 128 - code


def end_session(session: int) -> None:
    """Kill whoever is left in a session (Linux only); for the proxy, when its guard has ended."""
    if sys.platform != "linux":
        return
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            if os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has ended meanwhile


def _noted(signum: int, frame: FrameType | None) -> None:
    """Nothing to do: the wakeup descriptor has the signal's number."""


def _die_with_the_guard() -> None:
    """Should somebody kill the guard itself, its child gets SIGTERM (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_group(group: int, signum: int) -> None:
    try:
        os.killpg(group, signum)
    except ProcessLookupError:
        return  # nobody is left in it


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
