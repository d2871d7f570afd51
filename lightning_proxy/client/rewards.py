"""``lightning_proxy.reward(...)``: one call that posts a reward. Standard library only."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_proxy.client.proxy import ProxyClient
from lightning_proxy.errors import EngineUnreachable, InvalidInput, StoreUnavailable

_HERE = "http://127.0.0.1:8080"
_ROUTE = "/reward"
_PAUSES_S = (0.2, 0.5, 1.0, 2.0)  # before each further try
_ROLLOUT_KEY = "lp-"  # what a key issued for a rollout begins with


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the ledger has now. ``created`` is false where the idempotency key was known."""

    reward_id: int
    rollout_id: str
    span_id: int | None
    created: bool


def reward(
    value: float | None = None,
    *,
    rollout_id: str | None = None,
    response_id: str | None = None,
    span_id: int | None = None,
    attempt: int | None = None,
    name: str | None = None,
    source: str | None = None,
    comment: str | None = None,
    demonstration: str | Mapping[str, Any] | None = None,
    thumb: Literal["up", "down"] | None = None,
    idempotency_key: str | None = None,
    url: str | None = None,
    token: str | None = None,
    timeout_s: float = 30.0,
) -> Receipt:
    """Post a reward for a rollout, one of its attempts, one response or one span; return once it is durable.

    Without a target it is for the rollout that this process runs under (``LIGHTNING_ROLLOUT_ID``, which
    `lightning-proxy run` sets). ``url`` is the proxy's address, by default ``LIGHTNING_REWARD_URL``, else
    port 8080 here; ``token`` by default ``LIGHTNING_PROXY__TOKEN``, else a rollout's key in
    ``OPENAI_API_KEY``. Where nothing answers, or the store is busy, it is posted again, always under one
    idempotency key, so that it is entered once.

    Raises ``InvalidInput`` (400), ``UnknownTarget`` (404), ``EngineRefused`` (any other refusal),
    ``EngineUnreachable`` or ``StoreUnavailable`` where no try got through.
    """
    if rollout_id is None and response_id is None and span_id is None:
        rollout_id = os.environ.get("LIGHTNING_ROLLOUT_ID")
        if rollout_id is None:
            raise InvalidInput(
                "whose reward is it? Give rollout_id, response_id or span_id, or use `lightning-proxy run`"
            )
    fields = {
        "value": value, "thumb": thumb, "demonstration": demonstration, "comment": comment,
        "rollout_id": rollout_id, "response_id": response_id, "span_id": span_id, "attempt": attempt,
        "name": name, "source": source, "idempotency_key": idempotency_key or f"client-{uuid.uuid4()}",
    }  # fmt: skip
    root = (url or os.environ.get("LIGHTNING_REWARD_URL") or _HERE).rstrip("/").removesuffix(_ROUTE)
    proxy = ProxyClient(root, token or _token(), timeout_s)
    body = {key: given for key, given in fields.items() if given is not None}
    return Receipt(**_posted(proxy, body))


def _posted(proxy: ProxyClient, body: Mapping[str, Any]) -> Any:
    for pause_s in _PAUSES_S:
        try:
            return proxy.request("POST", _ROUTE, body)
        except (EngineUnreachable, StoreUnavailable):
            time.sleep(pause_s)
    return proxy.request("POST", _ROUTE, body)


def _token() -> str | None:
    if token := os.environ.get("LIGHTNING_PROXY__TOKEN"):
        return token
    key = os.environ.get("OPENAI_API_KEY", "")
    return key if key.startswith(_ROLLOUT_KEY) else None
