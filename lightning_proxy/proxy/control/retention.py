"""``DELETE /api/rollouts/{rollout_id}``: a rollout is gone, with all that was recorded of it."""

from __future__ import annotations

from aiohttp import web

from lightning_proxy.proxy.retention import Retention

from .requests import answer


class RetentionRoutes:
    """Deleting what was recorded."""

    def __init__(self, retention: Retention) -> None:
        self._retention = retention

    def routes(self) -> list[web.RouteDef]:
        """The routes of this file."""
        return [web.delete("/api/rollouts/{rollout_id}", self.delete_rollout)]

    async def delete_rollout(self, request: web.Request) -> web.Response:
        """Its spans, rewards, attempts and keys too; 409 while a training run holds it."""
        rollout_id = request.match_info["rollout_id"]
        deleted = await self._retention.delete(rollout_id)
        return answer({"rollout_id": rollout_id, "deleted": True, "spans": deleted.spans})
