"""What a runner is called, so that the next one of that name knows the former to be dead."""

from __future__ import annotations

import fcntl
import itertools
import os
import secrets
import socket
from pathlib import Path

from lightning_proxy.errors import InvalidInput


class Name:
    """A name that nobody else has while this is open: a lock on a file in the directory of the logs.

    The warden of the runner shares the lock, so that the name is free only when the runner's last
    agent has ended.
    """

    def __init__(self, directory: Path, wanted: str | None = None) -> None:
        """``wanted``, or this machine's next free one.

        Raises ``InvalidInput`` where ``wanted`` is taken, or the directory cannot be used.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._take(directory, wanted)
        except OSError as error:
            raise InvalidInput(f"the directory for logs, {directory}, cannot be used: {error}") from None

    def close(self) -> None:
        """Let go of the name."""
        os.close(self.lock)

    def _take(self, directory: Path, wanted: str | None) -> None:
        if wanted is not None:
            file = directory / f".runner-{wanted.replace('/', '_')}"
            if not self._lock(file):
                raise InvalidInput(f"a runner called {wanted!r} is at work: give this one another name")
            self.text = wanted
            return
        for number in itertools.count(1):
            if self._lock(directory / f".runner-{number}"):
                break
        # A part of its own, since machines may have one name and directories are copied.
        own = os.read(self.lock, 100).decode() or f"{socket.gethostname()}-{secrets.token_hex(4)}"
        os.pwrite(self.lock, own.encode(), 0)
        self.text = own

    def _lock(self, file: Path) -> bool:
        self.lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.lock)
            return False
        return True
