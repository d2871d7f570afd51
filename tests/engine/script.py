"""What a test can ask of one request: a reply, a fault, a delay."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

HEADER = "x-fake-engine"  # a script as JSON, in a header of the request that it is for


@dataclass(frozen=True, slots=True)
class Script:
    """One request's fate. Everything at its default is an ordinary answer.

    It comes by ``EngineThread.script(...)``, as JSON by ``POST /_script`` (with ``times`` and
    ``path``), or as JSON in the request's ``x-fake-engine`` header. What a test opens while it runs
    comes by ``EngineThread.script(...)`` alone.
    """

    # The reply.
    text: str | None = None
    tool_calls: tuple[tuple[str, str], ...] = ()  # (name, arguments as JSON text)
    tokens: int | None = None
    tokens_per_chunk: int = 1

    # An answer of its own.
    status: int | None = None
    body: str | None = None  # with `status`; default: vLLM's error body
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)  # added to what goes out

    # Trouble.
    reset: bool = False  # the connection is reset before a byte of the answer
    cut_after: int | None = None  # bytes of the body, or events of a stream, after which it ends
    cut_by: Literal["close", "reset"] = "close"
    error_after: int | None = None  # events after which a stream carries an error event, then [DONE]
    without_done: bool = False  # a stream ends cleanly, but without [DONE]
    garbage: bool = False  # an event, or the body, is not JSON

    # Form.
    split: int | None = None  # bytes per write and per HTTP chunk, whatever they split
    line_end: Literal["\n", "\r\n", "\r"] = "\n"
    comments: bool = False  # ": keep-alive" before each event
    hidden_length: bool = False  # a whole answer is sent chunked, without Content-Length

    # Time.
    delay_s: float = 0.0  # before the first byte
    chunk_delay_s: float = 0.0  # before each event of a stream, or each token of a whole answer
    until: threading.Event | None = None  # before the first byte, until a test sets it
    pace: threading.Semaphore | None = None  # likewise, one for each event or token

    @staticmethod
    def from_json(text: str | bytes) -> Script:
        """A script from its JSON. Raises ``ValueError`` naming what it does not know."""
        return Script().with_(json.loads(text))

    def with_(self, changes: Mapping[str, Any]) -> Script:
        """A copy with changes. Raises ``ValueError`` naming what it does not know."""
        unknown = changes.keys() - {f.name for f in fields(self)}
        if unknown:
            raise ValueError(f"no such thing in a script: {', '.join(sorted(unknown))}")
        if "tool_calls" in changes:
            changes = {**changes, "tool_calls": tuple((n, a) for n, a in changes["tool_calls"])}
        return replace(self, **changes)

    def to_header(self) -> dict[str, str]:
        """The header that carries what is not at its default."""
        plain = Script()
        chosen = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != getattr(plain, f.name)
        }
        return {HEADER: json.dumps(chosen)}
