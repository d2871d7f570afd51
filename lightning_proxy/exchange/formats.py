"""The formats by name, and what an export in each of them did, in words and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_proxy import __version__
from lightning_proxy.errors import InvalidInput, MissingExtra
from lightning_proxy.store import Store
from lightning_proxy.words import ExportFormat, Per

from . import dspy, jsonl, llama_factory, parquet
from .messages import Json
from .records import Selection, attempts, spans_of
from .rows import ROLLOUT_COLUMNS, SPAN_COLUMNS, rollout_row, span_row


@dataclass(frozen=True, slots=True)
class Target:
    """Where an export goes, and how much of everything."""

    out: Path | None = None
    per: Per = Per.SPAN
    tokens: bool = True
    raw: bool = False
    min_gap: float = 0.0  # of preferences
    endpoint: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bool = False  # over OTLP

    def path(self, example: str) -> Path:
        """Where the file goes. Raises ``InvalidInput`` where that was not said."""
        if self.out is None:
            raise InvalidInput(f"where to? Give --out, e.g. --out {example}")
        return self.out


@dataclass(frozen=True, slots=True)
class Exported:
    """How an export went."""

    message: str
    numbers: Json


def export(format_: ExportFormat, store: Store, selection: Selection, target: Target) -> Exported:
    """Export the selection in this format. Raises what the formats raise."""
    return FORMATS[format_](store, selection, target)


def _jsonl(store: Store, selection: Selection, target: Target) -> Exported:
    path = target.path("spans.jsonl")
    columns = SPAN_COLUMNS if target.per is Per.SPAN else ROLLOUT_COLUMNS
    rows = jsonl.write(path, _rows(store, selection, target), columns)
    return Exported(
        f"{rows} {target.per.value}s to {path}, their types to {jsonl.features_path(path)}", {"rows": rows}
    )


def _parquet(store: Store, selection: Selection, target: Target) -> Exported:
    path = target.path("spans.parquet")
    columns = SPAN_COLUMNS if target.per is Per.SPAN else ROLLOUT_COLUMNS
    rows = parquet.write(path, _rows(store, selection, target), columns)
    return Exported(f"{rows} {target.per.value}s to {path}", {"rows": rows})


def _rows(store: Store, selection: Selection, target: Target) -> Iterator[Json]:
    how = {"tokens": target.tokens, "raw": target.raw}
    for recorded in attempts(store, selection):
        spans = spans_of(store, recorded, selection)
        if target.per is Per.SPAN:
            for span in spans:
                yield span_row(recorded, span, **how)
        elif (all_of_them := list(spans)) or selection.all_spans:
            yield rollout_row(recorded, all_of_them, **how)


def _llama_factory(store: Store, selection: Selection, target: Target) -> Exported:
    directory = target.path("data/")
    done = llama_factory.write(store, selection, directory, min_gap=target.min_gap)
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(done.left_out.items()))
    return Exported(
        f"{done.conversations} conversations, {done.demonstrations} demonstrations and {done.preferences} "
        f"preferences to {directory}" + (f"; left out: {left_out}" if left_out else ""),
        {
            "conversations": done.conversations,
            "demonstrations": done.demonstrations,
            "preferences": done.preferences,
            "left_out": dict(done.left_out),
        },
    )


def _dspy(store: Store, selection: Selection, target: Target) -> Exported:
    path = target.path("examples.json")
    examples = dspy.write(store, selection, path)
    return Exported(f"{examples} examples to {path}", {"examples": examples})


def _otlp(store: Store, selection: Selection, target: Target) -> Exported:
    try:
        from . import otel, otlp
    except ImportError as error:
        raise MissingExtra(
            "OpenTelemetry needs opentelemetry-proto: pip install 'lightning-proxy[export]'"
        ) from error
    if target.endpoint is None:
        raise InvalidInput("where to? Give --endpoint, e.g. --endpoint http://127.0.0.1:4318")
    sender = otlp.Sender(otlp.endpoint_of(target.endpoint), target.headers, __version__)
    sent = sender.send(
        span
        for recorded in attempts(store, selection)
        for span in otel.trace_of(recorded, spans_of(store, recorded, selection), content=target.content)
    )
    message = f"{sent} spans to {sender.endpoint}"
    if not target.content:
        message += ", without what was said (--content sends that too)"
    if sender.rejected:
        message += f"; it rejected {sender.rejected} of them: {sender.why_rejected}"
    return Exported(message, {"spans": sent, "rejected": sender.rejected})


FORMATS: Mapping[ExportFormat, Callable[[Store, Selection, Target], Exported]] = {
    ExportFormat.JSONL: _jsonl,
    ExportFormat.PARQUET: _parquet,
    ExportFormat.LLAMA_FACTORY: _llama_factory,
    ExportFormat.DSPY: _dspy,
    ExportFormat.OTLP: _otlp,
}
