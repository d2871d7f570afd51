"""``POST /reward``."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from lightning_proxy.errors import InvalidInput
from lightning_proxy.proxy.metrics import Metrics
from lightning_proxy.store import Reward

from .access import Access
from .requests import answer, fields_of, read_json

_REWARD_FIELDS = frozenset(
    (
        "value",
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


class RewardRoutes:
    """The ledger of rewards."""

    def __init__(self, access: Access, metrics: Metrics) -> None:
        self._access = access
        self._metrics = metrics

    def routes(self) -> list[web.RouteDef]:
        """The routes of this file."""
        return [
            web.post("/reward", self.reward),
        ]

    async def reward(self, request: web.Request) -> web.Response:
        """Take one reward or a list; answer once all of it is durable, or none of it is."""
        posted = await read_json(request)
        if isinstance(posted, list):
            many = [self._fields(item, f"rewards[{i}]") for i, item in enumerate(posted)]
            results = await self._access.write(lambda store: [store.add_reward(**item) for item in many])
            self._metrics.rewards.inc(sum(created for _, created in results))
            return answer({"rewards": [_reward_answer(*result) for result in results]})
        one = self._fields(posted, "the reward")
        reward, created = await self._access.write(lambda store: store.add_reward(**one))
        self._metrics.rewards.inc(int(created))
        return answer(_reward_answer(reward, created), 201 if created else 200)

    def _fields(self, item: Any, what: str) -> dict[str, Any]:
        return self._access.kept(_reward_fields(item, what), "comment")


def _reward_fields(item: Any, what: str) -> dict[str, Any]:
    fields = fields_of(item, _REWARD_FIELDS, what)
    if "value" not in fields:
        raise InvalidInput(f"{what} lacks 'value': a finite number")
    return fields


def _reward_answer(reward: Reward, created: bool) -> dict[str, Any]:
    return {
        "reward_id": reward.reward_id,
        "rollout_id": reward.rollout_id,
        "span_id": reward.span_id,
        "created": created,
    }
