"""Questions to the store, beside the one writer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from lightning_proxy.config import Settings
from lightning_proxy.store import RewardRule, Store


def open_store(settings: Settings) -> Store:
    """The store that the settings name."""
    store = Store.open(
        settings.store.db,
        synchronous=settings.store.synchronous,
        busy_timeout_s=settings.store.busy_timeout_s,
    )
    store.rule = RewardRule(**settings.reward_rule)
    return store


class Reader:
    """One connection for questions to the store, used by one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._store: Store | None = None

    def __call__(self, question: Callable[[Store], Any]) -> Any:
        """Ask the store. Blocking: call it off the loop."""
        with self._lock:
            if self._store is None:
                self._store = open_store(self._settings)
            return question(self._store)

    def close(self) -> None:
        """Close the connection, if there is one."""
        with self._lock:
            if self._store is not None:
                self._store.close()
