"""One captured call while it is under way. No I/O: bytes in, bytes and a span out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import orjson

from lightning_proxy.redaction import Redactor
from lightning_proxy.store import ErrorClass, Fidelity, Generation, Span

from .attribution import Attribution
from .failures import class_of_event, class_of_status
from .redaction import answer_without_secrets, without_secrets
from .sse import Event, SseParser
from .wires import Prepared, Wire
from .wires.base import CAPTURE_FAULTS, Collector, Json

T = TypeVar("T")
log = logging.getLogger(__name__)

_LONGEST_ERROR = 4096


@dataclass(slots=True)
class Call:
    """What is known of a call so far.

    ``feed`` and ``whole`` take the answer as the engine sends it and return it as the agent gets
    it. Whatever goes wrong in capture is noted in ``fault``; the answer goes through regardless.
    Where the agent's API is translated and the engine's answer cannot be, they raise
    ``Untranslatable``.
    """

    wire: Wire
    body: bytes  # as the agent sent it, without the encoding that it may have been sent in
    request: Json  # the same, parsed; {} where it is no JSON object
    prepared: Prepared
    attribution: Attribution
    altered: bool = False  # what went to the engine is not what the agent sent
    secrets: tuple[str, ...] = ()  # keys that came with the request: not to be stored
    redactor: Redactor | None = None  # rules on what must not be stored
    policy: str | None = None
    policy_version: int | None = None
    started_at: float = field(default_factory=time.time)
    first_byte_at: float | None = None
    status: int | None = None
    streamed: bool = False
    ended: bool = False  # the answer is whole
    fault: str | None = None
    _error_body: bytes | None = None
    _events: SseParser = field(init=False, default_factory=SseParser)

    # -- the answer on its way through -------------------------------------------------------

    def feed(self, chunk: bytes) -> bytes:
        """Take a piece of a streamed answer; return what of it the agent gets now."""
        if self.first_byte_at is None:
            self.first_byte_at = time.time()
        return b"".join([self._event(event) for event in self._events.feed(chunk)])

    def finish_stream(self) -> bytes:
        """The stream came to a clean end; return what is left of it."""
        rest = self._collector.rest(self._events.rest())
        self.ended = True
        return rest

    def whole(self, body: bytes) -> bytes:
        """Take a whole answer; return it as the agent gets it."""
        self.first_byte_at = time.time()
        try:
            answer = self._whole(body)
        except CAPTURE_FAULTS as error:
            self.note_fault(error)
            self._error_body = answer = body
        self.ended = True
        return answer

    def _whole(self, body: bytes) -> bytes:
        if self.status is not None and self.status >= 400:
            self._error_body = body
            return self._collector.refusal(body)
        answer = self._collector.whole(body)
        if self._collector.status is not None:
            self.status, self._error_body = self._collector.status, answer
        return answer

    def _event(self, event: Event) -> bytes:
        if event.data is None:
            return event.raw
        try:
            piece = self._collector.event(event)
        except CAPTURE_FAULTS as error:
            self.note_fault(error)
            return event.raw
        self.ended = self._collector.ended
        return piece

    @property
    def _collector(self) -> Collector:
        return self.prepared.collector

    def note_fault(self, error: Exception) -> None:
        """Capture of this call went wrong: its span is incomplete."""
        if self.fault is None:
            self.fault = f"{type(error).__name__}: {error}"
            log.warning("capture of a %s call failed: %s", self.wire.name, self.fault)

    # -- the record of it --------------------------------------------------------------------

    def span(
        self,
        *,
        policy_version_end: int | None,
        error_class: ErrorClass | None = None,
        error: str | None = None,
    ) -> Span:
        """The call as a span: a response, or an error where there is one."""
        if self._collector.fault is not None:
            self.note_fault(self._collector.fault)
        if error_class is None:
            error_class, error = self._own_error()
        captured = None if error_class else self._unless_faulty(self._collector.captured)
        if captured is None and error_class is None:
            error_class, error = ErrorClass.CAPTURE_FAULT, self.fault
        attribution = self.attribution
        strand = attribution.strand
        span = Span(
            rollout_id=attribution.rollout_id,
            attempt=attribution.attempt,
            role=attribution.role,
            attributed_by=attribution.by,
            attribution_confidence=attribution.confidence,
            wire=self.wire.name,
            started_at=self.started_at,
            first_byte_at=self.first_byte_at,
            ended_at=time.time(),
            streamed=self.streamed,
            status=self.status,
            request=self.body,
            sampling=dict(self.prepared.sampling),  # which may be added to, later than a record may change
            model=_text_or_none(self.request.get("model")),
            policy=self.policy,
            policy_version=self.policy_version,
            policy_version_end=policy_version_end,
            response=answer_without_secrets(captured.response, self.secrets) if captured else None,
            response_id=captured.response_id if captured else None,
            usage=captured.usage if captured else None,
            generations=captured.generations if captured else self._generations(),
            fidelity=self._fidelity(captured.fidelity if captured else None),
            error_class=error_class,
            error=self._for_the_record(error),
            retry=attribution.retry,
            conversation=None if strand is None else strand.ended(captured.response if captured else None),
        )
        return span if self.redactor is None else _shortened(self.redactor.span(span, self.request))

    def _for_the_record(self, error: str | None) -> str | None:
        """An error without keys, and short: but rules must see all of it before it is cut."""
        if not error:
            return None
        error = without_secrets(error, self.secrets)
        return error[:_LONGEST_ERROR] if self.redactor is None else error

    def _generations(self) -> tuple[Generation, ...]:
        return self._unless_faulty(self._collector.generations) or ()

    def _unless_faulty(self, capture: Callable[[], T]) -> T | None:
        try:
            return capture()
        except CAPTURE_FAULTS as error:
            self.note_fault(error)
            return None

    def _fidelity(self, of_answer: Fidelity | None) -> Fidelity:
        if self.fault is not None or of_answer is None:
            return Fidelity.INCOMPLETE
        return of_answer

    def _own_error(self) -> tuple[ErrorClass | None, str | None]:
        """The error that the answer itself holds, if it does."""
        if self.status is not None and self.status >= 400:
            text = (self._error_body or b"").decode("utf-8", "replace")
            if self._collector.status is not None:  # the engine answered well, and what it said is refused
                return ErrorClass.MALFORMED_TOOL_CALL, text
            return class_of_status(self.status, text), text
        if self._collector.failed is not None:
            return class_of_event(self._collector.failed), self._collector.failed
        if self.fault is not None:
            return ErrorClass.CAPTURE_FAULT, self.fault
        if self.streamed and not self._collector.finished:
            return ErrorClass.CUT_STREAM, "the stream ended without a finish reason"
        return None, None


def parse_request(body: bytes) -> Json:
    """The request as a JSON object; {} where it is none, which the engine will say better."""
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return request if isinstance(request, dict) else {}


def _shortened(span: Span) -> Span:
    if span.error is None or len(span.error) <= _LONGEST_ERROR:
        return span
    return replace(span, error=span.error[:_LONGEST_ERROR])


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None
