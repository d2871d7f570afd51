"""The task pool as a runner sees it: each thing that can be asked of it, over HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from lightning_proxy.client.proxy import ProxyClient
from lightning_proxy.errors import Conflict, EngineRefused, EngineUnreachable, StoreUnavailable

T = TypeVar("T")
log = logging.getLogger(__name__)

# The proxy, or its store, may be back in a moment.
AWAY = (EngineUnreachable, EngineRefused, StoreUnavailable)
_SHORTEST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 3.0


@dataclass(frozen=True, slots=True)
class Pool:
    """The pool behind a proxy, for one worker. Everything raises as ``ProxyClient.request`` does."""

    proxy: ProxyClient
    worker: str
    lease_s: float

    def claim(
        self, limit: int, *, task_ids: Sequence[str] | None, prefer: str | None, wait_s: float
    ) -> list[dict[str, Any]]:
        """Attempts to carry out; waits up to ``wait_s`` for the first."""
        body = {"worker": self.worker, "limit": limit, "lease_s": self.lease_s, "wait_s": wait_s}
        optional = {"task_ids": task_ids, "prefer": prefer}
        body |= {name: value for name, value in optional.items() if value is not None}
        given: list[dict[str, Any]] = self.proxy.request("POST", "/api/tasks/claim", body)["assignments"]
        return given

    def heartbeat(self, given: dict[str, Any], *, alive: bool) -> str | None:
        """Keep the lease; why to stop, where that is so."""
        answer = self.proxy.request("POST", _path(given, "heartbeat"), {"alive": alive})
        return (answer["reason"] or "it ended") if answer["stop"] else None

    def finish(
        self, given: dict[str, Any], state: str, reason: str | None, error_class: str | None
    ) -> dict[str, Any]:
        """Record an end; the rollout as it is now."""
        end = {"state": state, "reason": reason, "error_class": error_class}
        rollout: dict[str, Any] = self.proxy.request("POST", _path(given, "finish"), end)
        return rollout

    def release(self, given: dict[str, Any], reason: str) -> None:
        """Give an attempt back. Raises ``Conflict`` where it has ended."""
        answer = self.proxy.request("POST", _path(given, "release"), {"reason": reason})
        if not answer["released"]:
            raise Conflict(f"not given back: {answer['reason']}")

    def abandon(self) -> int:
        """What a former runner of our name held is lost."""
        lost: int = self.proxy.request("POST", "/api/tasks/abandon", {"worker": self.worker})["abandoned"]
        return lost


def enqueue(proxy: ProxyClient, tasks: Sequence[dict[str, Any]]) -> int:
    """Put tasks into the pool, all or none; returns how many were not there before."""
    made = proxy.request("POST", "/api/tasks", list(tasks))["tasks"]
    return sum(task["created"] for task in made)


def progress(proxy: ProxyClient, task_ids: Sequence[str] | None) -> dict[str, Any]:
    """How far these tasks are, or all."""
    question = {} if task_ids is None else {"task_ids": list(task_ids)}
    counts: dict[str, Any] = proxy.request("POST", "/api/tasks/progress", question)
    return counts


def patiently(call: Callable[[], T], until: Callable[[], bool]) -> T | None:
    """The call's result, tried again while the proxy is away; None where ``until`` came true first."""
    pause_s = _SHORTEST_PAUSE_S
    while True:
        try:
            return call()
        except AWAY as error:
            if pause_s == _SHORTEST_PAUSE_S:
                log.warning("%s; trying again", error)
            if until():
                return None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _path(given: dict[str, Any], what: str) -> str:
    return f"/api/rollouts/{quote(given['rollout_id'], safe='')}/attempts/{given['attempt']}/{what}"
