"""A training run as a context: begun, kept alive, and given back if anything goes wrong."""

from __future__ import annotations

import os
import socket
import threading
from types import TracebackType
from typing import Self

from lightning_proxy.errors import CheckpointInvalid, LeaseLost, StoreError, StoreUnavailable
from lightning_proxy.store import RunState, Store


class Lease:
    """Holds a training run while the block runs; a thread renews its lease three times per length.

    Leaving the block by an exception fails the run, which gives everything back that it drained.
    Leaving it normally does nothing: the block commits the run itself.
    """

    def __init__(self, store: Store, policy: str, lease_s: float) -> None:
        self._store = store
        self._lease_s = lease_s
        self._ended = threading.Event()
        self._lost: LeaseLost | None = None
        self.work: str | None = None  # the name of what is done, for a run that fails by what came of it
        owner = f"{socket.gethostname()}:{os.getpid()}"
        self.run_id = store.begin_run(policy, owner=owner, lease_s=lease_s).run_id
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)

    def check(self) -> None:
        """Raise ``LeaseLost`` if a renewal was refused."""
        if self._lost is not None:
            raise self._lost

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._heart.join()
        if error is None:
            return
        run = self._store.get_run(self.run_id)
        if run.state is RunState.RUNNING:
            self._fail(error)
        elif run.state is RunState.FAILED and isinstance(error, OSError):
            # Whoever took its place has cleared its files away.
            raise LeaseLost(f"run {self.run_id} is failed: {run.error}") from error

    def _fail(self, error: BaseException) -> None:
        report = {"work": self.work} if isinstance(error, CheckpointInvalid) else {}
        try:
            self._store.fail_run(self.run_id, f"{type(error).__name__}: {error}", report)
        except StoreError as second:
            error.add_note(f"run {self.run_id} could not be failed ({second}); its lease will run out")

    def _beat(self) -> None:
        with Store.open(self._store.path, create=False) as store:  # a connection is one thread's
            while not self._ended.wait(self._lease_s / 3):
                try:
                    store.renew_lease(self.run_id, self._lease_s)
                except StoreUnavailable:
                    continue  # two more beats fit into the lease
                except LeaseLost as lost:
                    self._lost = lost
                    return
