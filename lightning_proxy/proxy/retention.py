"""Old rollouts are deleted now and then, and single ones when somebody asks, beside the calls."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence

from lightning_proxy.errors import Conflict, StoreError
from lightning_proxy.store import Store
from lightning_proxy.store.retention import Deleted, Selection, delete_rollouts, empty_log, find_rollouts

from .threads import OneThread

log = logging.getLogger(__name__)
INTERVAL_S = 3600.0


class Retention:
    """Deletes on a connection of its own, in a thread, in transactions that others get between."""

    def __init__(self, open_store: Callable[[], Store], keep_days: float) -> None:
        """``keep_days``: of silence, after which a rollout is deleted; 0 keeps all of them."""
        self.keep_days = keep_days
        self._open_store = open_store
        self._thread = OneThread("retention")
        self._lock = threading.Lock()  # one deletion at a time
        self._closing = threading.Event()

    async def keep(self, interval_s: float = INTERVAL_S) -> None:
        """Delete what is old, again and again, until cancelled."""
        while True:
            try:
                deleted = await self._thread.run(self.delete_old)
            except StoreError as error:
                log.warning("old rollouts could not be deleted, and will be tried again: %s", error)
            else:
                if deleted.rollouts:
                    log.info("deleted %d old rollouts with %d calls", deleted.rollouts, deleted.spans)
            await asyncio.sleep(interval_s)

    def delete_old(self) -> Deleted:
        """Delete the rollouts in which nothing has happened for ``keep_days``. Blocking."""
        selection = Selection(silent_since=time.time() - self.keep_days * 86400)
        with self._lock, self._open_store() as store:
            return self._delete(store, find_rollouts(store, selection).rollout_ids)

    async def delete(self, rollout_id: str) -> Deleted:
        """As ``delete_one``, without blocking."""
        return await self._thread.run(self.delete_one, rollout_id)

    def delete_one(self, rollout_id: str) -> Deleted:
        """Delete one rollout. Raises UnknownTarget, and Conflict where a training run holds it. Blocking."""
        with self._lock, self._open_store() as store:
            found = find_rollouts(store, Selection(rollout_ids=(rollout_id,)))
            deleted = self._delete(store, found.rollout_ids)
        if found.held or deleted.held:
            raise Conflict(
                f"rollout {rollout_id!r} is held by a training run that is running: "
                "delete it once the run has ended"
            )
        return deleted

    def close(self) -> None:
        """Let a deletion that is under way end after its present rollout."""
        self._closing.set()

    def _delete(self, store: Store, rollout_ids: Sequence[str]) -> Deleted:
        if not rollout_ids:
            return Deleted()
        deleted = delete_rollouts(store, (one for one in rollout_ids if not self._closing.is_set()))
        if not empty_log(store):
            log.info("what was deleted stays in the log for a while: somebody is reading")
        return deleted
