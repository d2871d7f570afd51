"""``/api/rollouts`` and ``/api/spans``: what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from lightning_proxy.errors import InvalidInput
from lightning_proxy.proxy.attribution import checked_id
from lightning_proxy.proxy.keys import Attributor
from lightning_proxy.store import ErrorClass, KeyOwner, Rollout, RolloutState, Store, as_json

from .access import Access
from .requests import answer, choice_of, fields_of, limit_of, optional_choice, read_json, text_of, whole

_HEAD_ONLY = frozenset({"request", "response", "generations"})
_CHANGE_FIELDS = frozenset(("state", "reason", "error_class"))
_ROLLOUT_FIELDS = frozenset(("rollout_id", "task_id", "metadata", "role"))


class RolloutRoutes:
    """Rollouts and their spans."""

    def __init__(self, access: Access, attributor: Attributor, base_url: Callable[[], str]) -> None:
        self._access = access
        self._attributor = attributor
        self._base_url = base_url

    def routes(self) -> list[web.RouteDef]:
        """The routes of this file."""
        return [
            web.post("/api/rollouts", self.create_rollouts),
            web.get("/api/rollouts", self.list_rollouts),
            web.get("/api/rollouts/{rollout_id}", self.show_rollout),
            web.patch("/api/rollouts/{rollout_id}", self.finish_rollout),
            web.get("/api/spans", self.list_spans),
            web.get("/api/spans/{span_id}", self.show_span),
        ]

    async def create_rollouts(self, request: web.Request) -> web.Response:
        """Register one rollout or a list, with a base URL and a key that name it."""
        posted = await read_json(request, empty={})
        items = posted if isinstance(posted, list) else [posted]
        wanted = [fields_of(item, _ROLLOUT_FIELDS, "the rollout") for item in items]
        for item in wanted:
            _check_rollout(item)
        wanted = [self._access.kept(item, "metadata") for item in wanted]
        made = await self._access.write(lambda store: [_create(store, item) for item in wanted])
        answers = []
        for rollout, _, key, role in made:
            self._attributor.remember(key, KeyOwner(rollout.rollout_id, 1, role))
            answers.append(self._rollout_answer(rollout, key, role))
        if isinstance(posted, list):
            return answer({"rollouts": answers}, 201)
        return answer(answers[0], 201 if made[0][1] else 200)

    def _rollout_answer(self, rollout: Rollout, key: str, role: str | None) -> dict[str, Any]:
        suffix = f"/role/{role}" if role else ""
        return {
            "rollout_id": rollout.rollout_id,
            "attempt": 1,
            "task_id": rollout.task_id,
            "state": rollout.state.value,
            "api_key": key,
            "base_url": f"{self._base_url()}/rollout/{rollout.rollout_id}{suffix}/v1",
        }

    async def list_rollouts(self, request: web.Request) -> web.Response:
        """Newest first; ``state``, ``task_id``, ``limit``."""
        state = request.query.get("state")
        task_id = request.query.get("task_id")
        limit = limit_of(request)
        wanted = optional_choice(RolloutState, state, "state of a rollout")
        found = await self._access.read(
            lambda store: store.list_rollouts(state=wanted, task_id=task_id, limit=limit)
        )
        return answer({"rollouts": as_json(found)})

    async def show_rollout(self, request: web.Request) -> web.Response:
        """One rollout with the heads of its spans and its reward ledger."""
        rollout_id = request.match_info["rollout_id"]

        def read(store: Store) -> dict[str, Any]:
            return {
                "rollout": as_json(store.get_rollout(rollout_id)),
                "spans": as_json(
                    store.list_spans(rollout_id=rollout_id, limit=1000, content=False), leave_out=_HEAD_ONLY
                ),
                "rewards": as_json(store.list_rewards(rollout_id)),
            }

        return answer(await self._access.read(read))

    async def finish_rollout(self, request: web.Request) -> web.Response:
        """``{"state": "succeeded" | "failed" | "cancelled", "reason"?, "error_class"?}``"""
        posted = fields_of(await read_json(request), _CHANGE_FIELDS, "the change")
        if "state" not in posted:
            raise InvalidInput("the change lacks 'state': succeeded, failed or cancelled")
        state = choice_of(RolloutState, posted["state"], "state of a rollout")
        error_class = optional_choice(ErrorClass, posted.get("error_class"), "error_class")
        rollout_id = request.match_info["rollout_id"]
        text_of(posted, "reason")  # else refused
        reason = self._access.kept(posted, "reason").get("reason")

        def finish(store: Store) -> Rollout:
            if state is RolloutState.FAILED:
                return store.fail_rollout(rollout_id, reason, error_class)
            return store.finish_rollout(rollout_id, state, reason, error_class)

        done = await self._access.write(finish)
        return answer(as_json(done))

    async def list_spans(self, request: web.Request) -> web.Response:
        """Heads of spans, newest first; ``rollout_id``, ``limit``, ``before``."""
        rollout_id, limit = request.query.get("rollout_id"), limit_of(request)
        before = whole(request.query["before"], "before") if "before" in request.query else None
        found = await self._access.read(
            lambda store: store.list_spans(rollout_id=rollout_id, limit=limit, before=before, content=False)
        )
        return answer({"spans": as_json(found, leave_out=_HEAD_ONLY)})

    async def show_span(self, request: web.Request) -> web.Response:
        """One span, whole."""
        span_id = whole(request.match_info["span_id"], "a span id")
        return answer(as_json(await self._access.read(lambda store: store.get_span(span_id))))


def _create(store: Store, item: Mapping[str, Any]) -> tuple[Rollout, bool, str, str | None]:
    role = item.get("role")
    rollout, created = store.create_rollout(
        rollout_id=item.get("rollout_id"), task_id=item.get("task_id"), metadata=item.get("metadata")
    )
    return rollout, created, store.issue_key(rollout.rollout_id, 1, role), role


def _check_rollout(item: Mapping[str, Any]) -> None:
    for name in ("rollout_id", "role"):
        if item.get(name) is not None:
            if not isinstance(item[name], str):
                raise InvalidInput(f"{name} is {item[name]!r}: a text is needed")
            checked_id(item[name], name)
    if item.get("task_id") is not None and not isinstance(item["task_id"], str):
        raise InvalidInput(f"task_id is {item['task_id']!r}: a text is needed")
    if item.get("metadata") is not None and not isinstance(item["metadata"], dict):
        raise InvalidInput(f"metadata is {item['metadata']!r}: an object is needed")
