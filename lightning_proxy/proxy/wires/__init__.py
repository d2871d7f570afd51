"""One module per API that generates tokens. No I/O.

A wire says what to add to a request so that the engine tells its tokens (``prepare``), and a
``Collector`` takes that out of the answer again while it records it. Streamed or not, the agent
gets what it would have got without us. ``wire_for`` is the table of paths.

===============  ===============================================================================
``base``         what every wire is
``choices``      answers made of choices: ``chat``, ``completions``
``responses``    Responses: as it is, or by way of Chat Completions where tools may be called
``translated``   one API for the agent, Chat Completions for the engine
``messages``     Anthropic's: ``messages_request`` and ``messages_answer`` translate,
                 ``messages_native`` records what is not translated
===============  ===============================================================================
"""

from __future__ import annotations

from .base import Captured, Collector, Prepared, Wire
from .chat import ChatWire
from .completions import CompletionsWire
from .messages import MessagesWire
from .responses import ResponsesWire

_WIRES: dict[str, Wire] = {
    "/v1/chat/completions": ChatWire(),
    "/v1/completions": CompletionsWire(),
    "/v1/messages": MessagesWire(),
    "/v1/responses": ResponsesWire(),
}


def wire_for(method: str, path: str) -> Wire | None:
    """The wire that a request speaks, or ``None`` where it generates nothing we capture."""
    return _WIRES.get(path) if method == "POST" else None


__all__ = ["Captured", "Collector", "Prepared", "ResponsesWire", "Wire", "wire_for"]
