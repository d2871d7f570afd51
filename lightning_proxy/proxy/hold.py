"""Calls wait here, instead of being refused, while the engine cannot take them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Hold:
    """A gate with named reasons to be closed. Open when there are none."""

    def __init__(self) -> None:
        self._reasons: dict[str, None] = {}  # in the order in which they came
        self._open = asyncio.Event()
        self._open.set()
        self.waiting = 0  # calls held right now

    @property
    def is_open(self) -> bool:
        return not self._reasons

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(self._reasons)

    def close(self, reason: str) -> None:
        """Hold calls for this reason, which counts once however often it is given."""
        self._reasons[reason] = None
        self._open.clear()

    def release(self, reason: str) -> None:
        """Take a reason away; the last one lets everybody go. Unknown: no effect."""
        self._reasons.pop(reason, None)
        if not self._reasons:
            self._open.set()

    @contextmanager
    def closed(self, reason: str) -> Iterator[None]:
        """Hold calls for the length of a block: one block at a time for a reason."""
        self.close(reason)
        try:
            yield
        finally:
            self.release(reason)

    async def passed(self, timeout_s: float) -> bool:
        """Wait until the gate is open; False if it did not open in time."""
        if self._open.is_set():
            return True
        self.waiting += 1
        try:
            await asyncio.wait_for(self._open.wait(), timeout_s)
        except TimeoutError:
            return False
        finally:
            self.waiting -= 1
        return True
