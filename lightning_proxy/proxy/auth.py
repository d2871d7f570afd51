"""Who may do what.

With a token: the token opens everything, a key issued for a rollout the model's API in that rollout's
name. Without one only this machine can reach us, and nobody has to say who calls: an operator's tools
reach all of the engine through us. A key issued for a rollout says that an agent calls, and no agent
administers the engine; one that hides its key could as well go to the engine's own port.
"""

from __future__ import annotations

import hmac
import logging
from urllib.parse import unquote

from aiohttp import web

from lightning_proxy.errors import StoreError
from lightning_proxy.store import KeyOwner

from .attribution import Attribution, api_keys, from_headers, split_path
from .keys import Attributor
from .problem import problem

log = logging.getLogger(__name__)
_OPEN_PATHS = frozenset(("/healthz", "/readyz"))
_REWARD_PATH = "/reward"
_MOST_DECODINGS = 4  # of a path, one within the other
# What vLLM 0.31 lets its operator do, beside /v1 and below it: an upstream's base URL may end anywhere.
_ADMINISTRATION = frozenset((
    "abort_requests", "collective_rpc", "finish_weight_update", "init_weight_transfer_engine",
    "load_lora_adapter", "pause", "release_kv_cache_memory", "reset_encoder_cache", "reset_mm_cache",
    "reset_prefix_cache", "resume", "scale_elastic_ep", "sleep", "start_draft_weight_update",
    "start_profile", "start_weight_update", "stop_profile", "unload_lora_adapter", "update_weight_version",
    "update_weights", "wake_up",
))  # fmt: skip


class Guard:
    """Says what a request may not do.

    With ``keys_reward`` a rollout's key opens ``POST /reward`` too, for its own rollout; ``bound_to`` tells
    the route which that is.
    """

    def __init__(self, token: str | None, attributor: Attributor, *, keys_reward: bool = False) -> None:
        self._token = token
        self._attributor = attributor
        self._keys_reward = keys_reward

    async def refusal(self, request: web.Request, *, forwarded: bool) -> web.Response | None:
        """Why a request may not go on; ``None``: it may. ``forwarded``: it has no route of ours.

        Raises InvalidInput for a path that cannot be one.
        """
        if not forwarded and (self._token is None or request.path in _OPEN_PATHS):
            return None  # the open paths have no routes but GET and HEAD
        if self._token is not None and self._has(request, self._token):
            return None
        try:
            owner = await self._attributor.sender(request.headers)
        except StoreError as error:
            return None if self._token is None else _cannot_tell(error)
        if owner is None:
            return None if self._token is None else _not_admitted(request)
        if forwarded:
            return self._beyond(owner, request)
        if self._keys_reward and request.path == _REWARD_PATH:
            return None
        return _not_for_agents(owner, f"{request.method} {request.path}")

    def _beyond(self, owner: KeyOwner, request: web.Request) -> web.Response | None:
        """The refusal, where a forwarded request is not for a rollout's key."""
        split = split_path(request.raw_path)
        named = split.attribution or from_headers(request.headers)
        if named is not None and named.rollout_id != owner.rollout_id:
            return _another_rollout(owner, named)
        path = split.path.partition("?")[0]
        # What else an engine has beside /v1 is not known: without a token it is open to all anyway.
        good = not administers(path) if self._token is None else is_for_agents(request.method, path)
        return None if good else _not_for_agents(owner, f"{request.method} {path[:200]}")

    async def bound_to(self, request: web.Request) -> str | None:
        """The only rollout that an admitted request may change; ``None``: any."""
        if self._token is None or self._has(request, self._token):
            return None
        owner = await self._attributor.sender(request.headers)
        return None if owner is None else owner.rollout_id

    def _has(self, request: web.Request, token: str) -> bool:
        return any(hmac.compare_digest(_bytes(key), _bytes(token)) for key in api_keys(request.headers))


def is_for_agents(method: str, path: str) -> bool:
    """Whether a path, as it was sent, is of the model's API: below ``/v1``, and no administration.

    A client's look at the root is harmless.
    """
    if not path.strip("/"):
        return method in ("GET", "HEAD")
    return (path == "/v1" or path.startswith("/v1/")) and not administers(path)


def administers(path: str) -> bool:
    """Whether a path is of the engine's administration, or may be read so by a server behind us."""
    segments = _segments(path)
    if segments is None:
        return True
    below = segments[1:] if segments[:1] == ["v1"] else segments
    return bool(below) and below[0].lower() in _ADMINISTRATION


def _segments(path: str) -> list[str] | None:
    """The path decoded, without empty segments; ``None`` where a server might resolve it to another."""
    for _ in range(_MOST_DECODINGS):
        path, before = unquote(path), path
        if path == before:
            break
    else:
        return None
    segments = [segment for segment in path.replace("\\", "/").split("/") if segment]
    return None if "." in segments or ".." in segments else segments


def _not_for_agents(owner: KeyOwner, what: str) -> web.Response:
    return problem(
        403,
        "not_for_a_rollouts_key",
        f"{what} is not for the key of a rollout ({owner.rollout_id!r}): it opens the model's API, /v1/..., "
        "and none of its engine's administration; send the proxy's token",
    )


def _another_rollout(owner: KeyOwner, named: Attribution) -> web.Response:
    return problem(
        403,
        "key_of_another_rollout",
        f"the key was issued for rollout {owner.rollout_id!r}, and the {named.by} names "
        f"{named.rollout_id!r}: send the key of that rollout, or name none",
    )


def _cannot_tell(error: StoreError) -> web.Response:
    log.warning("a key could not be looked up: %s", error)
    answer = problem(503, "store_unavailable", f"the key cannot be looked up at the moment: {error}")
    answer.headers["Retry-After"] = "1"
    return answer


def _not_admitted(request: web.Request) -> web.Response:
    sent = "a key that is not known here" if api_keys(request.headers) else "no key"
    return problem(
        401,
        "invalid_api_key",
        f"the request carries {sent}: send the proxy's token as `Authorization: Bearer ...`",
    )


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")  # as aiohttp decodes what a header holds
