"""A Messages answer as it comes: put together for the record, and left as it is."""

from __future__ import annotations

from typing import Any

import orjson

from lightning_proxy.proxy.sse import Event
from lightning_proxy.store import Fidelity, Generation

from .base import Captured, Collector, Json

# What a delta of a content block grows, and by which of its fields.
_GROWS = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}


class MessageRecord:
    """A message put together from its stream events, as a whole answer would say it."""

    def __init__(self) -> None:
        self.message: Json = {}
        self._blocks: dict[int, Json] = {}
        self._arguments: dict[int, str] = {}

    def take(self, event: Json) -> None:
        """Add one event. Raises KeyError or TypeError where it is none of a message's."""
        kind = event.get("type")
        if kind == "message_start":
            self.message = {**event["message"]}
        elif kind == "content_block_start":
            self._blocks[event["index"]] = {**event["content_block"]}
        elif kind == "content_block_delta":
            self._grow(event["index"], event["delta"])
        elif kind == "message_delta":
            self.message |= event["delta"]
            if event.get("usage"):
                self.message["usage"] = {**(self.message.get("usage") or {}), **event["usage"]}

    def _grow(self, index: int, delta: Json) -> None:
        block = self._blocks[index]
        kind = delta.get("type")
        if kind == "input_json_delta":
            self._arguments[index] = self._arguments.get(index, "") + delta["partial_json"]
        elif kind == "citations_delta":
            block["citations"] = [*(block.get("citations") or ()), delta["citation"]]
        elif kind in _GROWS:
            name = _GROWS[kind]
            block[name] = (block.get(name) or "") + delta[name]

    def whole(self) -> Json:
        """The message so far; {} before its start."""
        if not self.message:
            return {}
        content = [self._block(index) for index in sorted(self._blocks)]
        return {**self.message, "content": content}

    def _block(self, index: int) -> Json:
        block, arguments = self._blocks[index], self._arguments.get(index)
        return {**block, "input": _parsed(arguments)} if arguments else block


class NativeMessages(Collector):
    """Records an answer of an API that tells no tokens; the agent gets it byte for byte."""

    def __init__(self) -> None:
        self._whole: bytes | None = None
        self._message: Json = {}
        self._record = MessageRecord()
        self.ended = False
        self.failed = None

    def whole(self, body: bytes) -> bytes:
        """See :class:`Collector`."""
        message = orjson.loads(body)
        if not isinstance(message, dict):
            raise TypeError("not a message")
        self._message, self._whole = message, body
        return body

    def event(self, event: Event) -> bytes:
        """See :class:`Collector`."""
        parsed = orjson.loads(event.data or b"{}")
        if parsed["type"] == "error":
            self.failed = orjson.dumps(parsed.get("error")).decode()
        self.ended = self.ended or parsed["type"] == "message_stop"
        self._record.take(parsed)
        return event.raw

    @property
    def finished(self) -> bool:
        """See :class:`Collector`."""
        return self.ended or self._record.message.get("stop_reason") is not None

    def captured(self) -> Captured:
        """See :class:`Collector`."""
        message = self._message or self._record.whole()
        response_id, usage = message.get("id"), message.get("usage")
        return Captured(
            response=self._whole or orjson.dumps(message),
            response_id=response_id if isinstance(response_id, str) else None,
            fidelity=Fidelity.TEXT,
            usage=usage if isinstance(usage, dict) else None,
            generations=(),
        )

    def generations(self) -> tuple[Generation, ...]:
        """See :class:`Collector`."""
        return ()


def _parsed(arguments: str) -> Any:
    """Arguments spelled as they came; as text where they are no JSON, as in an answer that was cut."""
    raw = arguments.encode()
    try:
        orjson.loads(raw)
    except orjson.JSONDecodeError:
        return arguments
    return orjson.Fragment(raw)
