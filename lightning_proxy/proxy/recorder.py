"""A finished call becomes a committed span, without ever being the agent's trouble."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_proxy.errors import StoreError, StoreUnavailable
from lightning_proxy.store import Span, Writer

from .metrics import Metrics

log = logging.getLogger(__name__)


class Recorder:
    """Hands spans to the writer and waits for their commit, up to a limit.

    A store that was slower than the limit is not waited for again until it has committed
    something: one locked database delays calls once, not every call. Its spans stay queued.
    """

    def __init__(self, writer: Writer, metrics: Metrics, *, timeout_s: float) -> None:
        self._writer = writer
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._waiting_helps = True

    @contextmanager
    def call_under_way(self) -> Iterator[None]:
        """A call whose span will come at the end of the block: its neighbours may wait for it."""
        self._writer.on_their_way += 1
        try:
            yield
        finally:
            self._writer.on_their_way -= 1

    async def commit(self, span: Span) -> None:
        """Return once the span is durable, or the store is in trouble."""
        committed = self.submit(span)
        if committed is None or not (self._waiting_helps and self._writer.healthy):
            return
        # asyncio.wait() does the same at several times the cost, on every call.
        loop = asyncio.get_running_loop()
        in_time: asyncio.Future[bool] = loop.create_future()
        committed.add_done_callback(lambda _: _settle(in_time, True))
        limit = loop.call_later(self._timeout_s, _settle, in_time, False)
        try:
            waited_enough = not await in_time
        finally:
            limit.cancel()
        if waited_enough:
            self._waiting_helps = False
            self._metrics.capture_faults.labels("slow_store").inc()
            log.warning(
                "the store did not commit within %.1f s; calls go on and their spans wait in memory (%s)",
                self._timeout_s, self._writer.last_error or "busy",
            )  # fmt: skip

    def submit(self, span: Span) -> asyncio.Future[int] | None:
        """Queue a span without waiting for it; ``None`` where the writer takes nothing any more."""
        started = time.perf_counter()
        try:
            committed = self._writer.submit_span(span)
        except StoreError as error:  # it has ended: that is no reason for a call to fail
            self._lost(span, error)
            return None
        committed.add_done_callback(lambda future: self._committed(future, span, started))
        return committed

    def _committed(self, future: asyncio.Future[int], span: Span, started: float) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._waiting_helps = True
            self._metrics.commit_seconds.observe(time.perf_counter() - started)
            self._metrics.spans.labels(span.wire, span.fidelity.value).inc()
            return
        self._lost(span, error)

    def _lost(self, span: Span, error: BaseException) -> None:
        self._metrics.capture_faults.labels("span_lost").inc()
        log.error("a span of rollout %s was lost: %s", span.rollout_id, error)
        if not isinstance(error, StoreUnavailable):  # else the writer marks it by itself
            self.mark_incomplete(span.rollout_id, f"a span could not be stored: {error}")

    def mark_incomplete(self, rollout_id: str, why: str) -> None:
        """Note durably that capture lost something of this rollout."""

        def mark(store: Any) -> None:
            store.mark_incomplete(rollout_id, why)

        try:
            marked = self._writer.submit(mark)
        except StoreError as error:
            log.error("rollout %s could not be marked incomplete (%s): %s", rollout_id, why, error)
            return
        marked.add_done_callback(
            lambda future: future.cancelled() or future.exception()  # seen, whatever it was
        )


def _settle(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)
