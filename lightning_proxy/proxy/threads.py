"""A thread of its own for each kind of work that blocks, so that none waits behind another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class OneThread:
    """Runs what blocks, one after another. What its waiting caller cancels before its turn never runs.

    The loop's own threads, which everybody shares, are for what computes and ends soon.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def run(self, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Have it run; the future has its result. To be called on the event loop."""
        return asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)
