"""The one writer thread of an asyncio process, and its group commit.

Whatever waits when the thread gets round to it is written in one transaction. An idle process
commits at once. In a busy one, where commits follow one another and several spans are on their way,
a commit waits a moment for their company, since ten spans cost little more than one (PostgreSQL's
``commit_delay`` and ``commit_siblings`` do the same).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from lightning_proxy.errors import LightningError, StoreError, StoreUnavailable
from lightning_proxy.store.connection import Synchronous
from lightning_proxy.store.records import Span
from lightning_proxy.store.store import Store

T = TypeVar("T")

_log = logging.getLogger(__name__)

_WHY_DROPPED = "a span was dropped while the database was unavailable"
_LARGEST_BATCH = 256  # so that other processes get their turn, and the first in line their answer
_COMMIT_SIBLINGS = 4  # spans on their way from which on a commit waits
_COMMIT_DELAY_S = 0.005
_BUSY_S = 0.010  # since the last commit: longer ago, and company is unlikely to come
_MOST_FAULTS = 3  # of a job that breaks the connection or this code, time and again
_SHORTEST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_NO_SILENCE_S = 1.0  # a write that waited longer: signs of life may be waiting as well


class _Job:
    """A function to run, or a span to add, and the future of its result."""

    __slots__ = ("faults", "fn", "future", "size", "span")

    def __init__(
        self, future: asyncio.Future[Any], fn: Callable[[Store], Any] | None = None, span: Span | None = None
    ) -> None:
        self.future = future
        self.fn = fn
        self.span = span
        self.faults = 0  # errors that it was alone with
        self.size = 0 if span is None else _bytes_of(span)


_Outcome = tuple["asyncio.Future[Any]", Any, Exception | None]


class _Undone(Exception):  # a signal within this file
    """A job failed after it had written: the batch must run again with savepoints."""


class Writer:
    """Runs functions on a :class:`Store` in a thread of its own, many to a transaction.

    While the database is locked, full or unreadable, what was submitted stays in memory, its
    futures stay pending, and the transaction is tried again until it succeeds.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        synchronous: Synchronous = "normal",
        busy_timeout_s: float = 5.0,
        create: bool = True,
        max_pending: int = 10_000,
        max_pending_bytes: int = 256 * 2**20,
    ) -> None:
        """``max_pending``, ``max_pending_bytes``: of spans that may wait; see :meth:`submit_span`.

        The rest: :meth:`Store.open`.
        """
        self.path = Path(path)
        self.max_pending = max_pending
        self.max_pending_bytes = max_pending_bytes
        self.healthy = True  # False from a failed transaction until one succeeds
        self.on_their_way = 0  # spans that will come soon: kept by whoever knows, on the event loop
        self.dropped = 0  # spans given up since the start
        self.last_error: str | None = None  # of the last failed transaction
        self._open = partial(
            Store.open, path, synchronous=synchronous, busy_timeout_s=busy_timeout_s, create=create
        )
        self._lock = threading.Lock()  # guards everything below
        self._waiting: deque[_Job] = deque()
        self._waiting_spans = 0
        self._waiting_bytes = 0  # of these spans
        self._in_hand = 0  # jobs in the transaction that runs
        self._alone = 0  # jobs that are to be written one by one, for one of them may be at fault
        self._incomplete: dict[str, str] = {}  # rollouts that lost a span: why
        self._idle = False  # the thread waits on _wake
        self._closing = False
        self._committed_at = 0.0  # monotonic
        self._tried_since: float | None = None  # monotonic: when the transaction that runs was first tried
        self._wake = threading.Semaphore(0)
        self._give_up = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None

    @property
    def pending(self) -> int:
        """Jobs that have been submitted and not committed."""
        return len(self._waiting) + self._in_hand

    def start(self) -> None:
        """Open the database (see :meth:`Store.open` for what it raises) and start the thread."""
        if self._thread is not None:
            raise StoreError("this writer has been started already")
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        store = self._open()
        # A daemon: a process that ends without close() must not hang on a locked database.
        self._thread = threading.Thread(target=self._work, args=(store,), name="store-writer", daemon=True)
        self._thread.start()

    async def close(self, timeout_s: float = 10.0) -> None:
        """Write what waits, then end the thread.

        What cannot be written within ``timeout_s`` fails with ``StoreUnavailable``.
        """
        if self._thread is None or self._ended is None:
            return
        with self._lock:
            self._closing = True
            self._wake_up()
        done, _ = await asyncio.wait([self._ended], timeout=timeout_s)
        if not done:
            self._give_up.set()
            await self._ended
        self._thread.join()

    def submit(self, fn: Callable[[Store], T]) -> asyncio.Future[T]:
        """Run ``fn`` in the next transaction; the future has its result once that has committed.

        ``fn`` runs in the writer's thread, and again where the transaction must be repeated: it
        must do nothing but work on the store. Its exception undoes its own writes only. To be
        called on the event loop.
        """
        job = _Job(self._new_future(), fn=fn)
        with self._lock:
            self._enqueue(job)
            self._wake_up()
        return job.future

    def submit_span(self, span: Span) -> asyncio.Future[int]:
        """Add a span in the next transaction; the future has its id once that has committed.

        Where more than ``max_pending`` spans wait, or more than ``max_pending_bytes`` of them, the oldest
        are dropped: their futures fail with ``StoreUnavailable`` and their rollouts are marked
        incomplete as soon as that can be written.
        """
        job = _Job(self._new_future(), span=span)
        with self._lock:
            self._enqueue(job)
            self._count((job,), 1)
            dropped = self._drop_what_is_too_much()
            self._wake_up()
        for oldest in dropped:
            if not oldest.future.done():
                oldest.future.set_exception(self._lost())
        return job.future

    def _new_future(self) -> asyncio.Future[Any]:
        if self._loop is None:
            raise StoreError("this writer has not been started")
        return self._loop.create_future()

    def _enqueue(self, job: _Job) -> None:
        """Called with the lock held."""
        if self._closing:
            raise StoreError(f"this writer has ended: {self.last_error or 'it was closed'}")
        self._waiting.append(job)

    def _lost(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"more than {self.max_pending} spans, or {self.max_pending_bytes >> 20} MiB of them, wait: "
            "the oldest was dropped"
        )

    def _wake_up(self) -> None:
        """Called with the lock held."""
        if self._idle:
            self._idle = False
            self._wake.release()

    def _count(self, jobs: Iterable[_Job], sign: int) -> None:
        """The spans among jobs wait from now on (1), or no longer (-1). Called with the lock held."""
        for job in jobs:
            if job.span is not None:
                self._waiting_spans += sign
                self._waiting_bytes += sign * job.size

    def _drop_what_is_too_much(self) -> list[_Job]:
        """Called with the lock held. The spans of the transaction that runs are out of reach, and so
        is the newest one, however large."""
        dropped = []
        while self._waiting_spans > self.max_pending or (
            self._waiting_bytes > self.max_pending_bytes and self._waiting_spans > 1
        ):
            index = next(i for i, job in enumerate(self._waiting) if job.span is not None)
            job = self._waiting[index]
            del self._waiting[index]
            self._count((job,), -1)
            self._give_up_span(job, _WHY_DROPPED)
            dropped.append(job)
        return dropped

    def _give_up_span(self, job: _Job, why: str) -> None:
        """Called with the lock held."""
        if job.span is not None:
            self.dropped += 1
            self._incomplete.setdefault(job.span.rollout_id, why)

    # Everything below runs in the writer's thread.

    def _work(self, store: Store | None) -> None:
        """Write until the writer closes. Nothing else ends the thread: without it, nothing is recorded."""
        pause_s = _SHORTEST_PAUSE_S
        try:
            while batch := self._take():
                try:
                    store = store or self._open()
                    outcomes = self._write(store, batch)
                except BaseException as error:  # noqa: BLE001 - whatever it is, calls are to be recorded
                    if _is_broken(store, error):
                        _close(store)
                        store = None
                    self._failed(batch, error)
                    if self._give_up.wait(pause_s):
                        break
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                else:
                    pause_s = _SHORTEST_PAUSE_S
                    self._succeeded(outcomes)
        finally:
            self._finish()
            _close(store)
            self._call_loop(self._end)

    def _take(self) -> list[_Job]:
        """Wait until there is something to write, and take it; empty where the writer closes."""
        while not (self._waiting or self._closing):
            with self._lock:
                self._idle = not (self._waiting or self._closing)
            if self._idle:
                self._wake.acquire()
        if self._company_will_come():
            self._give_up.wait(_COMMIT_DELAY_S)
        with self._lock:
            size = 1 if self._alone else _LARGEST_BATCH
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), size))]
            self._in_hand = len(batch)
            self._count(batch, -1)
            return batch

    def _company_will_come(self) -> bool:
        busy = time.monotonic() - self._committed_at < _BUSY_S and not self._closing
        return busy and len(self._waiting) < self.on_their_way >= _COMMIT_SIBLINGS

    def _write(self, store: Store, batch: list[_Job]) -> list[_Outcome]:
        """Commit a batch. Savepoints cost more than the writes, so they are for when they are needed."""
        with self._lock:
            incomplete = dict(self._incomplete)
        self._tried_since = self._tried_since or time.monotonic()
        try:
            outcomes = self._transact(store, batch, incomplete, savepoints=False)
        except _Undone:
            outcomes = self._transact(store, batch, incomplete, savepoints=True)
        with self._lock:
            for rollout_id in incomplete:
                del self._incomplete[rollout_id]
        self._tried_since = None
        return outcomes

    def _transact(
        self, store: Store, batch: list[_Job], incomplete: dict[str, str], *, savepoints: bool
    ) -> list[_Outcome]:
        outcomes: list[_Outcome] = []
        with store.transaction():
            if time.monotonic() - (self._tried_since or 0.0) > _NO_SILENCE_S:
                store.forgive_downtime()  # before anything that takes silence for death
            for rollout_id, why in incomplete.items():
                store.mark_incomplete(rollout_id, why)
            for job in batch:
                if job.span is None and job.future.cancelled():  # nobody waits: a claim would be for nobody
                    continue
                changes = store.connection.total_changes
                try:
                    if savepoints:
                        with store.transaction():
                            result = _run(job, store)
                    else:
                        result = _run(job, store)
                except StoreUnavailable:
                    raise
                except Exception as error:  # goes to whoever submitted the job
                    if not savepoints and store.connection.total_changes != changes:
                        raise _Undone from error
                    outcomes.append((job.future, None, error))
                else:
                    outcomes.append((job.future, result, None))
        return outcomes

    def _failed(self, batch: list[_Job], error: BaseException) -> None:
        if self.healthy:
            _log.warning("%s: %s; %d writes wait and are tried again", self.path, error, self.pending)
        self.healthy = False
        self.last_error = str(error) if isinstance(error, StoreError) else repr(error)
        if not isinstance(error, (LightningError, sqlite3.Error)) and self._is_to_blame(batch, error):
            return
        with self._lock:
            self._waiting.extendleft(reversed(batch))
            self._count(batch, 1)
            self._in_hand = 0
            dropped = self._drop_what_is_too_much()
        if dropped:
            self._call_loop(_resolve, [(job.future, None, self._lost()) for job in dropped])

    def _is_to_blame(self, batch: list[_Job], error: BaseException) -> bool:
        """After an error that is neither the database's nor a job's own to its caller.

        The jobs are tried one by one, so that one which always brings it about is found, and given up.
        """
        if len(batch) > 1:
            self._alone = len(batch)
            return False
        job = batch[0]
        job.faults += 1
        if job.faults < _MOST_FAULTS:
            return False
        _log.error("%s: a write is given up: %r", self.path, error, exc_info=error)
        with self._lock:
            self._in_hand = 0
            self._give_up_span(job, f"a span could not be written: {error!r}")
        self._alone = max(0, self._alone - 1)
        given_up = StoreUnavailable(f"the write was given up: {error!r}")
        self._call_loop(_resolve, [(job.future, None, given_up)])
        return True

    def _succeeded(self, outcomes: list[_Outcome]) -> None:
        if not self.healthy:
            _log.warning("%s: can be written again; %d spans were dropped so far", self.path, self.dropped)
        self.healthy = True
        self._committed_at = time.monotonic()
        self._alone = max(0, self._alone - 1)
        self._in_hand = 0
        self._call_loop(_resolve, outcomes)

    def _finish(self) -> None:
        """Fail what is left: nothing, unless the database stayed unavailable."""
        with self._lock:
            self._closing = True
            left = list(self._waiting)
            self._waiting.clear()
            self.dropped += sum(job.span is not None for job in left)
        if left:
            _log.error("%s: %d writes are lost: %s", self.path, len(left), self.last_error)
            lost = StoreUnavailable(
                f"the writer ended before the database could be written: {self.last_error}"
            )
            self._call_loop(_resolve, [(job.future, None, lost) for job in left])

    def _end(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _call_loop(self, callback: Callable[..., object], *arguments: object) -> None:
        loop = cast(asyncio.AbstractEventLoop, self._loop)
        try:
            loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            if not loop.is_closed():  # closed: nobody waits for the futures any more
                raise


def _bytes_of(span: Span) -> int:
    """About what a span takes up in memory."""
    arrays = (
        array
        for generation in span.generations
        for array in (generation.prompt_token_ids, generation.response_token_ids, generation.logprobs)
    )
    return len(span.request) + len(span.response or b"") + sum(len(a) * a.itemsize for a in arrays)


def _is_broken(store: Store | None, error: BaseException) -> bool:
    """Whether a connection is good for nothing more: what it writes inside a transaction that it
    could not roll back would never be committed."""
    return not isinstance(error, StoreUnavailable) or (store is not None and store.connection.in_transaction)


def _close(store: Store | None) -> None:
    """Close a store as well as that can be done."""
    if store is not None:
        try:
            store.close()
        except sqlite3.Error as error:
            _log.warning("%s could not be closed: %r", store.path, error)


def _run(job: _Job, store: Store) -> Any:
    if job.span is not None:
        return store.write_span(job.span)
    return cast(Callable[[Store], Any], job.fn)(store)


def _resolve(outcomes: list[_Outcome]) -> None:
    for future, result, error in outcomes:
        if future.done():  # cancelled by whoever waited
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
