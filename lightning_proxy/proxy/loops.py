"""Agents that repeat themselves, told from their traffic. No I/O."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from lightning_proxy.store import Span

from .conversation import Json

_MOST_AGENTS = 4096


@dataclass(slots=True)
class _Agent:
    """What one role of an attempt did last."""

    request: int = 0  # hash of the body
    requests: int = 0  # equal ones in a row
    reply: int = 0
    replies: int = 0
    items: int = 0  # of the conversation
    ended_at: float = 0.0


class Loops:
    """Counts equal replies and equal requests in a row, by rollout, attempt and role; bounded.

    A reply repeats the one before where the conversation has grown by it, or the request is the same: a
    checker that says "ok" to one text after another is in no loop. Calls that run beside one another
    repeat nothing.
    """

    def __init__(self, after: int) -> None:
        """``after``: how many in a row are a loop; 0 looks for none."""
        self._after = after
        self._agents: OrderedDict[tuple[str, int, str | None], _Agent] = OrderedDict()

    def seen(self, span: Span, request: Json, reply: str) -> str | None:
        """Note a call; what repeats itself, where it has done so often enough. ``reply``: "" for none."""
        if not self._after:
            return None
        agent = self._agent((span.rollout_id, span.attempt, span.role))
        body = hash(span.request)
        items = _items(request)
        follows = span.started_at >= agent.ended_at
        agent.ended_at = max(agent.ended_at, span.ended_at)
        if not follows:
            return None
        same = body == agent.request
        agent.requests = agent.requests + 1 if same else 1
        agent.request = body
        if reply:
            digest = hash(reply)
            goes_on = same or items > agent.items or "previous_response_id" in request
            agent.replies = agent.replies + 1 if digest == agent.reply and goes_on else 1
            agent.reply = digest
        agent.items = items
        if agent.replies >= self._after:
            return f"the same reply {agent.replies} times in a row"
        if agent.requests >= self._after:
            return f"the same request {agent.requests} times in a row"
        return None

    def _agent(self, key: tuple[str, int, str | None]) -> _Agent:
        agent = self._agents.get(key)
        if agent is None:
            agent = self._agents[key] = _Agent()
            if len(self._agents) > _MOST_AGENTS:
                self._agents.popitem(last=False)
        else:
            self._agents.move_to_end(key)
        return agent


def _items(request: Json) -> int:
    given = request.get("messages", request.get("input", request.get("prompt")))
    return len(given) if isinstance(given, (list, str)) else 0
