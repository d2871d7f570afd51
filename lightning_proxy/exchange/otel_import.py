"""Spans that others traced become ours: text only, without token ids.

Files hold OTLP as the collector's file exporter writes it (JSON, one request per line; or protobuf, each
message with its length before it), or one message in JSON or protobuf; gzip is undone.

A rollout is a conversation or session, else a trace. Its calls' roles are the agents' names. Importing
the same span again changes nothing.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from lightning_proxy.errors import InvalidInput, MissingExtra
from lightning_proxy.redaction import Redactor
from lightning_proxy.store import ErrorClass, Fidelity, Span, Store

from .messages import Json
from .otel_dialects import Event, TracedCall, TracedSpan, kind_of, read_call, sampling_of, usage_of

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

_CONVERSATION = (
    "gen_ai.conversation.id",
    "session.id",
    "traceloop.association.properties.session_id",
    "traceloop.association.properties.chat_id",
)
_AGENT = ("gen_ai.agent.name", "graph.node.name", "agent.name", "traceloop.agent.name")
_BATCH = 200  # spans in a transaction
_KNOWN_ERRORS = frozenset(ErrorClass)


@dataclass(slots=True)
class ImportReport:
    """What became of the spans that were read."""

    calls: int = 0
    known: int = 0  # imported before, or recorded here in the first place
    wrappers: int = 0  # a framework's span around the span of the same call
    without_content: int = 0  # of the calls: the tracer kept no messages
    rewards: int = 0
    rollouts: set[str] = field(default_factory=set)
    other_steps: Counter[str] = field(default_factory=Counter)  # spans of agents that are no model call
    unknown: int = 0  # spans of something else


@dataclass(frozen=True, slots=True)
class _Place:
    """What a call must know of the spans above it."""

    parent: str
    conversation: str | None
    agent: str | None
    attempt: int
    task: str | None
    is_call: bool


def import_files(store: Store, paths: Sequence[Path], *, redactor: Redactor | None = None) -> ImportReport:
    """Import all files; they are read twice, for a span's parents may come after it.

    Raises ``InvalidInput`` for a file that holds no traces, ``MissingExtra`` for protobuf without the
    extra ``export``.
    """
    places: dict[str, _Place] = {}
    for path in paths:
        for span in read_file(path):
            places[span.span_id] = _place(span)
    importer = _Importer(store, places, redactor)
    for path in paths:
        importer.take_all(read_file(path))
    return importer.report


# -- reading -----------------------------------------------------------------------------------------


def read_file(path: Path) -> Iterator[TracedSpan]:
    """The spans of a file, one at a time. Raises ``InvalidInput``, ``MissingExtra``."""
    with path.open("rb") as file:
        begin = file.read(2)
    opened: Callable[..., Any] = gzip.open if begin == b"\x1f\x8b" else open
    with opened(path, "rb") as file:
        first = file.read(64).lstrip()[:1]
        file.seek(0)
        try:
            yield from _json_spans(file) if first in (b"{", b"[") else _protobuf_spans(file.read())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"{path} holds no OTLP traces: {type(error).__name__}: {error}") from error


def _json_spans(file: Iterable[bytes]) -> Iterator[TracedSpan]:
    """JSON lines, or one document over many lines."""
    begun: list[bytes] = []
    for line in file:
        if not line.strip():
            continue
        begun.append(line)
        try:
            document = orjson.loads(line if len(begun) == 1 else b"".join(begun))
        except orjson.JSONDecodeError:
            continue  # goes on in the next line
        begun.clear()
        for one in document if isinstance(document, list) else [document]:
            yield from _of_document(one)
    if begun:
        raise ValueError("its JSON does not end")


def _of_document(document: Json) -> Iterator[TracedSpan]:
    for resource in document["resourceSpans"]:
        for scope in resource.get("scopeSpans") or resource.get("instrumentationLibrarySpans") or ():
            for span in scope.get("spans") or ():
                status = span.get("status") or {}
                yield TracedSpan(
                    span["traceId"].lower(),
                    span["spanId"].lower(),
                    (span.get("parentSpanId") or "").lower(),
                    span.get("name") or "",
                    int(span["startTimeUnixNano"]) / 1e9,
                    int(span.get("endTimeUnixNano") or span["startTimeUnixNano"]) / 1e9,
                    _json_attributes(span),
                    [
                        Event(e.get("name") or "", int(e.get("timeUnixNano") or 0) / 1e9, _json_attributes(e))
                        for e in span.get("events") or ()
                    ],
                    status.get("code") in (2, "STATUS_CODE_ERROR"),
                    status.get("message") or "",
                )


def _json_attributes(of: Json) -> Json:
    return {each["key"]: _json_value(each.get("value") or {}) for each in of.get("attributes") or ()}


def _json_value(value: Json) -> Any:
    for kind, inner in value.items():
        match kind:
            case "intValue":
                return int(inner)
            case "arrayValue":
                return [_json_value(item) for item in inner.get("values") or ()]
            case "kvlistValue":
                return {item["key"]: _json_value(item["value"]) for item in inner.get("values") or ()}
            case _:
                return inner
    return None


def _protobuf_spans(data: bytes) -> Iterator[TracedSpan]:
    for message in _protobuf_messages(data):
        for resource in message.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    yield TracedSpan(
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.name,
                        span.start_time_unix_nano / 1e9,
                        (span.end_time_unix_nano or span.start_time_unix_nano) / 1e9,
                        _values(span.attributes),
                        [Event(e.name, e.time_unix_nano / 1e9, _values(e.attributes)) for e in span.events],
                        span.status.code == 2,
                        span.status.message,
                    )


def _protobuf_messages(data: bytes) -> Iterator[TracesData]:
    try:
        from google.protobuf.message import DecodeError
        from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
    except ImportError as error:
        raise MissingExtra(
            "traces in protobuf need opentelemetry-proto: pip install 'lightning-proxy[export]', "
            "or let the collector write JSON"
        ) from error
    try:
        if _is_framed(data):
            at = 0
            while at < len(data):
                end = at + 4 + int.from_bytes(data[at : at + 4], "big")
                yield TracesData.FromString(data[at + 4 : end])
                at = end
        else:
            yield TracesData.FromString(data)
    except DecodeError as error:
        raise ValueError(f"neither JSON nor protobuf: {error}") from error


def _is_framed(data: bytes) -> bool:
    """Whether it is lengths and messages, to the last byte. A bare message begins with another byte."""
    at = 0
    while at + 4 <= len(data):
        at += 4 + int.from_bytes(data[at : at + 4], "big")
    return at == len(data) and data[:1] != b"\x0a"


def _values(attributes: Iterable[Any]) -> Json:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _values(value.kvlist_value.values)
    return None if kind is None else getattr(value, kind)


# -- writing -----------------------------------------------------------------------------------------


class _Importer:
    """Writes traced calls as spans."""

    def __init__(self, store: Store, places: Mapping[str, _Place], redactor: Redactor | None) -> None:
        self.report = ImportReport()
        self._store = store
        self._places = places
        self._redactor = redactor
        self._from_here: set[str] = set()  # traces that were exported from this very database
        self._above_calls = {
            above for place in places.values() if place.is_call for above in self._ids_above(place)
        }

    def take_all(self, spans: Iterable[TracedSpan]) -> None:
        """Import a file's spans, some to a transaction."""
        batch: list[TracedSpan] = []
        for span in spans:
            batch.append(span)
            if len(batch) == _BATCH:
                self._take(batch)
                batch = []
        self._take(batch)

    def _take(self, batch: Sequence[TracedSpan]) -> None:
        with self._store.transaction():
            for span in batch:
                self._take_one(span)

    def _take_one(self, span: TracedSpan) -> None:
        kind, report = kind_of(span), self.report
        if kind == "call" and span.span_id not in self._above_calls:
            self._take_call(span)
        elif kind == "call":
            report.wrappers += 1
        elif kind is not None:
            report.other_steps[kind] += 1
        else:
            report.unknown += 1
        if kind != "call" and span.trace_id not in self._from_here:
            self._take_rewards(span, None)

    def _take_call(self, traced: TracedSpan) -> None:
        if self._is_ours(traced):
            self._from_here.add(traced.trace_id)
            self.report.known += 1
            return
        span = self._span(traced, read_call(traced))
        kept = span if self._redactor is None else self._redactor.span(span)
        span_id = self._store.add_imported_span(_origin(traced), kept)
        if span_id is None:
            self.report.known += 1
            return
        place = self._places[traced.span_id]
        task = next((above.task for above in (place, *self._above(place)) if above.task), None)
        self._store.create_rollout(rollout_id=span.rollout_id, task_id=task)
        self.report.calls += 1
        self.report.rollouts.add(span.rollout_id)
        if span.fidelity is Fidelity.INCOMPLETE:
            self.report.without_content += 1
        self._take_rewards(traced, span_id)

    def _is_ours(self, traced: TracedSpan) -> bool:
        """Whether the span was exported from this very database."""
        number = traced.first("lightning.span.id")
        if not isinstance(number, int):
            return False
        spans = self._store.list_spans(
            rollout_id=traced.first("lightning.rollout.id"), before=number + 1, limit=1
        )
        return (
            bool(spans) and spans[0].span_id == number and abs(spans[0].started_at - traced.started_at) < 1e-3
        )

    def _span(self, traced: TracedSpan, call: TracedCall) -> Span:
        place = self._places[traced.span_id]
        above = [place, *self._above(place)]
        model = traced.first("gen_ai.request.model", "llm.model_name", "gen_ai.response.model")
        sampling = sampling_of(traced)
        request = {"model": model, "messages": call.messages, **({"tools": call.tools} if call.tools else {})}
        response_id = traced.first("gen_ai.response.id")
        response = {
            "id": response_id,
            "object": "chat.completion",
            "model": traced.first("gen_ai.response.model") or model,
            "choices": call.choices,
            "usage": usage_of(traced),
        }
        error_class, error = _error_of(traced) if traced.failed else (None, None)
        complete = bool(call.messages) and (bool(call.choices) or error_class is not None)
        return Span(
            rollout_id=self._rollout_id(traced, above),
            attempt=max(each.attempt for each in above),
            role=next((each.agent for each in above if each.agent), None),
            wire="chat",
            model=None if model is None else str(model),
            attributed_by="import",
            attribution_confidence=1.0,
            started_at=traced.started_at,
            ended_at=traced.ended_at,
            status=None if error_class else 200,
            request=orjson.dumps(request | sampling),
            response=None if error_class else orjson.dumps(response),
            response_id=None if response_id is None else str(response_id),
            fidelity=Fidelity.TEXT if complete else Fidelity.INCOMPLETE,
            error_class=error_class,
            error=error,
            usage=usage_of(traced),
            sampling=sampling,
        )

    def _rollout_id(self, traced: TracedSpan, above: Iterable[_Place]) -> str:
        named = next((each.conversation for each in above if each.conversation), None)
        return _fit_for_a_path(named) if named else f"otel-{traced.trace_id}"

    def _take_rewards(self, traced: TracedSpan, span_id: int | None) -> None:
        """Evaluations: of the call itself, or of the rollout where they are of a step above the calls."""
        for number, event in enumerate(traced.events):
            value = event.attributes.get("gen_ai.evaluation.score.value")
            if event.name != "gen_ai.evaluation.result" or not isinstance(value, int | float):
                continue
            place = self._places[traced.span_id]
            target: Json = {"span_id": span_id}
            if span_id is None:
                target = {"rollout_id": self._rollout_id(traced, [place, *self._above(place)])}
                self._store.create_rollout(**target)
            comment = event.attributes.get("gen_ai.evaluation.explanation")
            _, new = self._store.add_reward(
                **target,
                value=float(value),
                name=str(event.attributes.get("gen_ai.evaluation.name") or "reward"),
                source=event.attributes.get("lightning.reward.source") or "otel",
                comment=self._redactor.text(comment) if self._redactor and comment else comment,
                idempotency_key=f"otel-{traced.trace_id}-{traced.span_id}-{number}",
            )
            self.report.rewards += new

    def _above(self, place: _Place) -> Iterator[_Place]:
        return (self._places[span_id] for span_id in self._ids_above(place) if span_id in self._places)

    def _ids_above(self, place: _Place) -> Iterator[str]:
        """The ids of the spans above, nearest first; a ring of them ends where it began."""
        seen: set[str] = set()
        above: _Place | None = place
        while above is not None and above.parent and above.parent not in seen:
            seen.add(above.parent)
            yield above.parent
            above = self._places.get(above.parent)


def _place(span: TracedSpan) -> _Place:
    attempt = span.first("lightning.rollout.attempt")
    conversation, agent = span.first(*_CONVERSATION), span.first(*_AGENT)
    task = span.first("lightning.task.id")
    return _Place(
        span.parent_id,
        None if conversation is None else str(conversation),
        None if agent is None else str(agent),
        attempt if isinstance(attempt, int) and attempt > 0 else 1,
        None if task is None else str(task),
        kind_of(span) == "call",
    )


def _fit_for_a_path(name: str) -> str:
    """As ids of rollouts must be; another tracer's may be anything."""
    return "".join(c if c.isprintable() and c != "/" else "_" for c in name)[:256]


def _origin(span: TracedSpan) -> bytes:
    return bytes.fromhex(span.trace_id + span.span_id)


def _error_of(span: TracedSpan) -> tuple[str, str]:
    kind = str(span.first("error.type") or "")
    said = next((e.attributes.get("exception.message") for e in span.events if e.name == "exception"), None)
    text = span.message or str(said or kind or "the tracer says no more than that it failed")
    if kind in _KNOWN_ERRORS:
        return kind, text
    if kind.isdecimal():
        status = int(kind)
        known = ErrorClass.RATE_LIMITED if status == 429 else ErrorClass.UPSTREAM_REFUSED
        return (known if status < 500 else ErrorClass.UPSTREAM_ERROR).value, text
    if "timeout" in kind.lower() or "timedout" in kind.lower():
        return ErrorClass.TIMEOUT.value, text
    if "ratelimit" in kind.lower().replace("_", ""):
        return ErrorClass.RATE_LIMITED.value, text
    return ErrorClass.UPSTREAM_ERROR.value, text
