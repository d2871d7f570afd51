"""``POST /reward``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from lightning_proxy.errors import InvalidInput, UnknownTarget
from lightning_proxy.proxy.metrics import Metrics
from lightning_proxy.store import Reward, Store

from .access import Access
from .requests import answer, fields_of, read_json

_REWARD_FIELDS = frozenset(
    (
        "value",
        "thumb",
        "demonstration",
        "rollout_id",
        "response_id",
        "span_id",
        "attempt",
        "name",
        "source",
        "comment",
        "idempotency_key",
    )
)
# Down is below what no verdict at all adds to a return, which is 0: most users give none.
_THUMBS = {"up": 1.0, "down": -1.0}
_LONGEST_LIST = 20_000  # a list is one transaction, and calls that end meanwhile wait for it (some 0.5 s)


class RewardRoutes:
    """The ledger of rewards."""

    def __init__(
        self, access: Access, metrics: Metrics, bound_to: Callable[[web.Request], Awaitable[str | None]]
    ) -> None:
        """``bound_to``: the only rollout that a request may reward; ``None``: any."""
        self._access = access
        self._bound_to = bound_to
        self._metrics = metrics

    def routes(self) -> list[web.RouteDef]:
        """The routes of this file."""
        return [
            web.post("/reward", self.reward),
        ]

    async def reward(self, request: web.Request) -> web.Response:
        """Take one reward or a list; answer once all of it is durable, or none of it is."""
        posted = await read_json(request)
        only = await self._bound_to(request)
        if isinstance(posted, list):
            if len(posted) > _LONGEST_LIST:
                raise InvalidInput(
                    f"a list of {len(posted)} rewards is too long: send {_LONGEST_LIST} at a time"
                )
            many = [self._fields(item, f"rewards[{i}]") for i, item in enumerate(posted)]
            results = await self._access.write(lambda store: _enter(store, many, only))
            self._metrics.rewards.inc(sum(created for _, created in results))
            return answer({"rewards": [_reward_answer(*result) for result in results]})
        one = self._fields(posted, "the reward")
        [(reward, created)] = await self._access.write(lambda store: _enter(store, one, only))
        self._metrics.rewards.inc(int(created))
        return answer(_reward_answer(reward, created), 201 if created else 200)

    def _fields(self, item: Any, what: str) -> dict[str, Any]:
        return self._access.kept(_reward_fields(item, what), "comment", "demonstration")


def _enter(
    store: Store, given: dict[str, Any] | list[dict[str, Any]], only: str | None
) -> list[tuple[Reward, bool]]:
    """Enter one or all of a list, or nothing; with ``only`` no other rollout is there."""
    with store.transaction():
        results = store.add_rewards(given) if isinstance(given, list) else [store.add_reward(**given)]
        for reward, _ in results:
            if only not in (None, reward.rollout_id):
                raise UnknownTarget(f"this key is for rollout {only!r} and rewards no other")
    return results


def _reward_fields(item: Any, what: str) -> dict[str, Any]:
    fields = dict(fields_of(item, _REWARD_FIELDS, what))
    if "thumb" in fields:
        thumb = fields.pop("thumb")
        if not isinstance(thumb, str) or thumb not in _THUMBS:
            raise InvalidInput(f"thumb of {what} is {thumb!r:.80}: up or down is possible")
        if fields.get("value") is not None:
            raise InvalidInput(f"{what} has both value and thumb: keep one")
        return {"name": "thumb", **fields, "value": _THUMBS[thumb]}
    if all(fields.get(field) is None for field in ("value", "comment", "demonstration")):
        raise InvalidInput(
            f"{what} lacks 'value', a finite number (or 'thumb', up or down; or a 'demonstration' or a "
            "'comment' alone)"
        )
    return fields


def _reward_answer(reward: Reward, created: bool) -> dict[str, Any]:
    return {
        "reward_id": reward.reward_id,
        "rollout_id": reward.rollout_id,
        "span_id": reward.span_id,
        "created": created,
    }
