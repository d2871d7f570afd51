"""Sends OpenTelemetry spans to a collector: OTLP over HTTP, in protobuf, compressed.

https://opentelemetry.io/docs/specs/otlp/#otlphttp
"""

from __future__ import annotations

import email.utils
import gzip
import http.client
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtelSpan

from lightning_proxy.errors import ExportFailed, InvalidInput

from .otel import resource, scope

_RETRYABLE = frozenset((429, 502, 503, 504))
_MOST_SPANS = 512  # in one request
_MOST_BYTES = 3 * 2**20  # collectors refuse what is over 4 MiB unless told otherwise
_LONGEST_PAUSE_S = 30.0


def endpoint_of(url: str) -> str:
    """Where spans go: a base URL gets ``/v1/traces``, as with OTEL_EXPORTER_OTLP_ENDPOINT.

    Raises ``InvalidInput`` for what is no URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInput(f"--endpoint is {url!r}: a URL such as http://127.0.0.1:4318 is needed")
    return url if parts.path.rstrip("/").endswith("/v1/traces") else f"{url.rstrip('/')}/v1/traces"


@dataclass(slots=True)
class Sender:
    """A collector. What it will not take for the moment is sent again, as long as ``patience_s``."""

    endpoint: str
    headers: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    timeout_s: float = 30.0
    patience_s: float = 120.0
    sleep: Callable[[float], None] = time.sleep
    rejected: int = 0  # spans that the collector took a request without
    why_rejected: str = ""

    def send(self, spans: Iterable[OtelSpan]) -> int:
        """Send them in batches; returns how many. Raises ``ExportFailed``."""
        sent, batch, size = 0, list[OtelSpan](), 0
        for span in spans:
            length = span.ByteSize()
            if batch and (len(batch) >= _MOST_SPANS or size + length > _MOST_BYTES):
                sent += self._post(batch)
                batch, size = [], 0
            batch.append(span)
            size += length
        return sent + (self._post(batch) if batch else 0)

    def _post(self, spans: list[OtelSpan]) -> int:
        scope_spans = ScopeSpans(scope=scope(self.version), spans=spans)
        message = ExportTraceServiceRequest(
            resource_spans=[ResourceSpans(resource=resource(), scope_spans=[scope_spans])]
        )
        body = gzip.compress(message.SerializeToString(), 6)
        deadline = time.monotonic() + self.patience_s
        pause_s = 1.0
        while True:
            status, answer, retry_after_s = self._once(body)
            if 200 <= status < 300:
                self._note(answer)
                return len(spans)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            wait_s = retry_after_s if retry_after_s is not None else pause_s * random.uniform(0.5, 1.0)
            if (status and status not in _RETRYABLE) or time.monotonic() + wait_s > deadline:
                raise ExportFailed(self._refusal(status, answer))
            self.sleep(wait_s)

    def _once(self, body: bytes) -> tuple[int, bytes, float | None]:
        """Status (0: no answer), body, and the pause that it asks for."""
        headers = {
            "Content-Type": "application/x-protobuf",
            "Content-Encoding": "gzip",
            "User-Agent": f"lightning-proxy/{self.version}",
            **self.headers,
        }
        request = urllib.request.Request(self.endpoint, body, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return response.status, response.read(), None
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), _seconds(error.headers.get("Retry-After"))
        except (OSError, http.client.HTTPException) as error:
            return 0, str(getattr(error, "reason", error)).encode(), None

    def _note(self, answer: bytes) -> None:
        try:
            partial = ExportTraceServiceResponse.FromString(answer).partial_success
        except DecodeError:  # some answer in JSON whatever they were sent
            return
        if partial.rejected_spans:
            self.rejected += partial.rejected_spans
            self.why_rejected = partial.error_message

    def _refusal(self, status: int, answer: bytes) -> str:
        said = answer[:300].decode("utf-8", "replace").strip()
        if not status:
            return f"no collector answers at {self.endpoint} ({said}): start one, or say where it is"
        hint = {
            401: "; give its key with --header",
            403: "; give its key with --header",
            404: "; --endpoint must be the address of an OTLP/HTTP receiver, often port 4318",
            415: "; it must take OTLP in protobuf",
        }.get(status, "")
        return f"the collector at {self.endpoint} answered {status}: {said!r}{hint}"


def _seconds(retry_after: str | None) -> float | None:
    """A ``Retry-After``: seconds, or a date."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
