"""Ends the agents of a runner that died. A program of its own: ``python warden.py``, standard library only.

Its input is a pipe that the runner holds open. An agent says ``+PGID`` there, itself, before it begins;
the runner says ``-PGID`` once that group has ended. When the pipe ends, the runner is gone, however it
went, and the groups that are left are ended: by TERM, and after a moment by KILL.
"""

from __future__ import annotations

import os
import signal
import sys
import time

GRACE_S = 5.0


def main() -> None:
    """Wait for the pipe's end, then leave nobody behind."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)  # what ends the runner must not end us first
    groups: set[int] = set()
    for line in sys.stdin:
        sign, group = line[:1], line[1:].strip()
        if group.isdecimal():
            (groups.add if sign == "+" else groups.discard)(int(group))
    end(groups, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while groups and time.monotonic() < deadline:
        time.sleep(0.02)
        groups = {group for group in groups if lives(group)}
    end(groups, signal.SIGKILL)


def end(groups: set[int], signum: int) -> None:
    """Send a signal to every group that is there."""
    for group in groups:
        try:
            os.killpg(group, signum)
        except OSError:
            pass  # it has ended


def lives(group: int) -> bool:
    """Whether anybody of a group is left."""
    try:
        os.killpg(group, 0)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
