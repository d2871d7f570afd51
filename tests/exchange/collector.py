"""A collector: takes OTLP over HTTP as real ones do, and keeps what it was sent."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass
class Refusal:
    """What it answers instead of taking a request."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Collector:
    """What came, and what to answer."""

    url: str = ""
    requests: list[ExportTraceServiceRequest] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)  # for the next requests
    rejects: int = 0  # spans that it says it took a request without

    @property
    def spans(self) -> list[Span]:
        """All spans, in the order in which they came."""
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def take(self, path: str, headers: dict[str, str], body: bytes) -> Refusal:
        """Answer a request."""
        self.headers.append(headers)
        if self.refusals:
            return self.refusals.pop(0)
        if path != "/v1/traces":
            return Refusal(404, body=b"page not found")
        assert headers["content-type"] == "application/x-protobuf"
        plain = gzip.decompress(body) if headers.get("content-encoding") == "gzip" else body
        self.requests.append(ExportTraceServiceRequest.FromString(plain))
        partial = ExportTracePartialSuccess(rejected_spans=self.rejects, error_message="too old")
        answer = ExportTraceServiceResponse(partial_success=partial if self.rejects else None)
        return Refusal(200, body=answer.SerializeToString())


@contextmanager
def running_collector() -> Iterator[Collector]:
    """A collector on a free port."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = collector.take(self.path, headers, body)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
