"""A call that speaks one API to the agent and Chat Completions to the engine.

For APIs on which the engine does not tell its tokens. Where the engine itself serves such an API by
way of Chat Completions, nothing changes but where the translation happens. No I/O.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson

from lightning_proxy.proxy.sse import Event
from lightning_proxy.store import Generation

from .base import CAPTURE_FAULTS, Captured, Collector, Json, Untranslatable
from .choices import ChoicesCollector


class Refused(Exception):
    """The engine's own implementation of the agent's API would have refused to say this."""

    def __init__(self, status: int, body: Json) -> None:
        super().__init__(f"status {status}")
        self.status = status
        self.body = body


class Translation(ABC):
    """The way back of one call: what the engine says in Chat Completions, as the agent's API says it.

    Chunks and answers come without what capture added to them, and without the chunks that exist
    only because of capture: as the engine's own implementation of the agent's API gets them.
    """

    @abstractmethod
    def whole(self, answer: Json) -> Json:
        """A whole answer. May raise Refused."""

    @abstractmethod
    def chunk(self, chunk: Json) -> bytes:
        """The events that follow from one chunk of a stream; none, one or several."""

    @abstractmethod
    def done(self) -> bytes:
        """The events that end a stream, in place of ``[DONE]``."""

    @abstractmethod
    def failed(self, error: Json) -> bytes:
        """The events for an error that the engine sent inside a stream."""

    @abstractmethod
    def refusal(self, body: Json) -> Json:
        """The body of an answer with a status of 400 or more."""

    @abstractmethod
    def response(self) -> Json:
        """What the agent got so far, as a whole answer of its API would say it; for the record."""


class TranslatedCollector(Collector):
    """Records the chat answer, and returns its translation."""

    def __init__(self, chat: ChoicesCollector, translation: Translation) -> None:
        self._chat = chat
        self._translation = translation
        self.status = None
        self.ended = False
        self.failed = None
        self.fault = None

    def whole(self, body: bytes) -> bytes:
        """See :class:`Collector`."""
        answer = self._translated(orjson.loads, self._recorded(self._chat.whole, body))
        try:
            return orjson.dumps(self._translated(self._translation.whole, answer))
        except Refused as refused:
            self.status = refused.status
            return orjson.dumps(refused.body)

    def event(self, event: Event) -> bytes:
        """See :class:`Collector`."""
        if event.data is None:
            return event.raw
        if self.ended:
            return b""
        if event.data == b"[DONE]":
            made: bytes = self._translated(self._translation.done)
            self.ended = True
            return made
        data = self._recorded(self._chat.chunk, event.data)
        if data is None:
            return b""
        if self.failed is None and self._chat.failed is not None:
            self.failed = self._chat.failed
            return bytes(self._translated(lambda: self._translation.failed(orjson.loads(data)["error"])))
        return bytes(self._translated(lambda: self._translation.chunk(orjson.loads(data))))

    def refusal(self, body: bytes) -> bytes:
        """See :class:`Collector`. What is no JSON object goes through as it came."""
        try:
            return orjson.dumps(self._translation.refusal(orjson.loads(body)))
        except CAPTURE_FAULTS:
            return body

    def rest(self, rest: bytes) -> bytes:
        """See :class:`Collector`. A stream whose end was not said has no end that could be translated."""
        if not self.ended:
            raise Untranslatable("the stream ended without [DONE]")
        return b""

    @property
    def finished(self) -> bool:
        """See :class:`Collector`."""
        return self._chat.finished

    def captured(self) -> Captured:
        """See :class:`Collector`. The response is the one that the agent got."""
        response = self._translation.response()
        response_id = response.get("id")
        return replace(
            self._chat.captured(),
            response=orjson.dumps(response),
            response_id=response_id if isinstance(response_id, str) else None,
            usage=response.get("usage"),
        )

    def generations(self) -> tuple[Generation, ...]:
        """See :class:`Collector`."""
        return self._chat.generations()

    def _recorded(self, take: Callable[[bytes], bytes | None], data: bytes) -> bytes | None:
        """What capture makes of it; as it came where capture cannot read it, for translation may."""
        try:
            return take(data)
        except CAPTURE_FAULTS as error:
            self.fault = self.fault or error
            return data

    def _translated(self, translate: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return translate(*arguments)
        except CAPTURE_FAULTS as error:
            raise Untranslatable(f"{type(error).__name__}: {error}") from error
