"""The content of the last spans of each attempt, in memory: what the next one is told by."""

from __future__ import annotations

from collections import OrderedDict

from lightning_proxy.store.content import Content

Attempt = tuple[str, int]  # rollout id and number

_MOST_ATTEMPTS = 10_000
_MOST_BYTES = 64 * 2**20  # some hundred conversations of 60,000 tokens
MOST_ENDS = 4  # conversations of one attempt that are told apart: an agent's and its sub-agents'


class Recent:
    """For each attempt the ends of its conversations, newest first; of the attempts those used last."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._ends: OrderedDict[Attempt, list[Content]] = OrderedDict()
        self._changed: set[Attempt] = set()  # in the transaction that runs

    def __contains__(self, attempt: Attempt) -> bool:
        return attempt in self._ends

    def ends(self, attempt: Attempt) -> list[Content]:
        """What is known of an attempt, newest first; not to be changed."""
        return self._ends.get(attempt) or []

    def add(self, attempt: Attempt, content: Content, extended: Content | None = None) -> None:
        """A new end; it takes the place of the one that it holds whole (``extended``)."""
        ends = [content, *(end for end in self.ends(attempt) if end is not extended)]
        gone = ends.pop() if len(ends) > MOST_ENDS else None
        self._bytes += content.size - (gone.size if gone else 0) - (extended.size if extended else 0)
        self._ends[attempt] = ends
        self._ends.move_to_end(attempt)
        self._changed.add(attempt)
        self._make_room()

    def put(self, attempt: Attempt, ends: list[Content]) -> None:
        """Set all ends of an attempt."""
        self.drop(attempt)
        self._ends[attempt] = ends
        self._bytes += sum(end.size for end in ends)
        self._make_room()

    def _make_room(self) -> None:
        while len(self._ends) > 1 and (self._bytes > self._most_bytes or len(self._ends) > _MOST_ATTEMPTS):
            self.drop(next(iter(self._ends)))

    def drop(self, attempt: Attempt) -> None:
        """Forget an attempt."""
        self._bytes -= sum(end.size for end in self._ends.pop(attempt, ()))

    def committed(self) -> None:
        """What was added is there to stay."""
        self._changed.clear()

    def rolled_back(self) -> set[Attempt]:
        """Forget the attempts that the transaction added to, for some of it may be gone; returns which."""
        changed, self._changed = self._changed, set()
        for attempt in changed:
            self.drop(attempt)
        return changed

    def clear(self) -> None:
        """Forget everything."""
        self._ends.clear()
        self._changed.clear()
        self._bytes = 0
