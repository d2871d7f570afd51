"""A question to an engine whose answer does not change: asked until it is answered, in nobody's way.

The first calls wait a moment for the answer. Where none came, later ones do not: they go without, and
it is asked again beside them, now and then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

from .tasks import Tasks

T = TypeVar("T")

_PATIENCE_S = 2.0  # for which a call waits
_AGAIN_S = 5.0  # after a question that was not answered
_REMEMBERED = 1000  # keys

Ask = Callable[[], Awaitable[T | None]]


class NobodyThere(Exception):
    """There was nobody to ask, which took no time: the next call may ask again."""


class Question(Generic[T]):
    """One question, asked by one call at a time for each key that an engine may want to see."""

    def __init__(self, name: str) -> None:
        self.answer: T | None = None
        self._name = name
        self._tasks = Tasks()
        self._asking: dict[tuple[str, ...], asyncio.Task[None]] = {}
        self._unanswered: dict[tuple[str, ...], float] = {}  # when, by the monotonic clock

    async def told(self, key: Mapping[str, str], ask: Ask[T]) -> T | None:
        """The answer; ``None`` while there is none.

        ``ask`` returns ``None`` where another moment, or another key, may bring one, or
        raises NobodyThere.
        """
        if self.answer is None and (asked := self.begun(key, ask)) is not None:
            who = tuple(key.values())
            if who not in self._unanswered:
                await asyncio.wait((asked,), timeout=_PATIENCE_S)
                if not asked.done():
                    self._note(who)  # no other call waits for this one
        return self.answer

    def begun(self, key: Mapping[str, str], ask: Ask[T]) -> asyncio.Task[None] | None:
        """Have it asked, without waiting; the task that does so, ``None`` where it is not time."""
        who = tuple(key.values())
        asked = self._asking.get(who)
        if asked is None and time.monotonic() - self._unanswered.get(who, -_AGAIN_S) >= _AGAIN_S:
            asked = self._asking[who] = self._tasks.spawn(self._name, self._put(who, ask))
        return asked

    async def _put(self, who: tuple[str, ...], ask: Ask[T]) -> None:
        try:
            answer = await ask()
            if answer is None:
                self._note(who)
            elif self.answer is None:
                self.answer = answer
        except NobodyThere:
            pass
        finally:
            del self._asking[who]

    def _note(self, who: tuple[str, ...]) -> None:
        if len(self._unanswered) >= _REMEMBERED:
            self._unanswered.clear()
        self._unanswered[who] = time.monotonic()
