"""A training run as a context: begun, kept alive, and given back if anything goes wrong."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

from lightning_proxy.errors import CheckpointInvalid, LeaseLost, StoreError, StoreUnavailable
from lightning_proxy.store import PolicyVersion, RunState, Store

T = TypeVar("T")

_PAUSE_S = 0.5  # between two tries of a write; each waits for the lock by itself


class Lease:
    """Holds a training run while the block runs; a thread renews its lease three times per length.

    Leaving the block by an exception fails the run, which gives everything back that it drained.
    Leaving it normally does nothing: the block commits the run itself.

    A database that is locked or full for a while costs patience, not an update: what must be written is tried
    again for as long as the lease lasts.
    """

    def __init__(self, store: Store, policy: str, lease_s: float) -> None:
        self._store = store
        self._lease_s = lease_s
        self._ended = threading.Event()
        self._lost: LeaseLost | None = None
        self._expires_at = time.time() + lease_s  # no later than the store has it
        self.work: str | None = None  # the name of what is done, for a run that fails by what came of it
        owner = f"{socket.gethostname()}:{os.getpid()}"
        self.run_id = self._insist(lambda: store.begin_run(policy, owner=owner, lease_s=lease_s)).run_id
        self._expires_at = store.get_run(self.run_id).lease_expires_at
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)

    def check(self) -> None:
        """Raise ``LeaseLost`` if a renewal was refused, or nothing renews it any more."""
        if self._lost is not None:
            raise self._lost

    def commit(
        self,
        *,
        report: Mapping[str, Any],
        version: PolicyVersion | None,
        groups: Mapping[str, str] | None = None,
    ) -> None:
        """As ``Store.commit_run``, whose errors it raises."""
        self._insist(
            lambda: self._store.commit_run(self.run_id, report=report, version=version, groups=groups)
        )

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._heart.join()
        if error is not None:
            self._fail(error)

    def _insist(self, write: Callable[[], T]) -> T:
        while True:
            try:
                return write()
            except StoreUnavailable:
                if time.time() + _PAUSE_S >= self._expires_at:
                    raise
                time.sleep(_PAUSE_S)

    def _fail(self, error: BaseException) -> None:
        report = {"work": self.work} if isinstance(error, CheckpointInvalid) else {}
        try:
            run = self._store.get_run(self.run_id)
            if run.state is RunState.RUNNING:
                self._store.fail_run(self.run_id, f"{type(error).__name__}: {error}", report)
        except StoreError as second:
            error.add_note(f"run {self.run_id} could not be failed ({second}); its lease will run out")
            return
        if run.state is RunState.FAILED and isinstance(error, OSError):
            # Whoever took its place has cleared its files away.
            raise LeaseLost(f"run {self.run_id} is failed: {run.error}") from error

    def _beat(self) -> None:
        try:
            with ExitStack() as at_the_end:
                self._renew(at_the_end)
        except LeaseLost as lost:
            self._lost = lost
        except Exception as error:  # noqa: BLE001  whatever ends this thread: the block must hear of it
            self._lost = LeaseLost(f"nothing renews the lease of run {self.run_id} any more: {error!r}")

    def _renew(self, at_the_end: ExitStack) -> None:
        store: Store | None = None  # of its own: a connection is one thread's
        pause_s = self._lease_s / 3
        while not self._ended.wait(pause_s):
            pause_s = self._lease_s / 30  # after a lock, soon again: the next third may be too late
            try:
                if store is None:
                    store = at_the_end.enter_context(Store.open(self._store.path, create=False))
                begun = time.time()
                store.renew_lease(self.run_id, self._lease_s)
                self._expires_at = begun + self._lease_s
            except StoreUnavailable:
                continue
            pause_s = self._lease_s / 3
