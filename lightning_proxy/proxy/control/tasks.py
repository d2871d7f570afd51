"""``/api/tasks`` and the attempts that were leased: the task pool for workers anywhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from lightning_proxy.errors import InvalidInput, LightningError, UnknownTarget
from lightning_proxy.proxy.keys import Attributor
from lightning_proxy.store import (
    Assignment,
    ErrorClass,
    KeyOwner,
    Prefer,
    RolloutState,
    Store,
    TaskState,
    TaskSummary,
    as_json,
    new_task,
)

from .access import Access
from .requests import answer, choice_of, fields_of, limit_of, optional_choice, read_json, text_of, whole

log = logging.getLogger(__name__)

_CLAIM_FIELDS = frozenset(("worker", "limit", "lease_s", "prefer", "task_ids", "wait_s"))
_HEARTBEAT_FIELDS = frozenset(("lease_s", "alive"))
_FINISH_FIELDS = frozenset(("state", "reason", "error_class", "exit_code"))
_LONGEST_WAIT_S = 30.0
_MOST_AT_ONCE = 1000
_LOOK_AGAIN_S = 1.0  # while a claim waits: another process may have changed the pool
_SHORTEST_WAIT_S = 0.01
_SWEEP_S = 2.0


class TaskRoutes:
    """Tasks, claims, heartbeats and ends."""

    def __init__(self, access: Access, attributor: Attributor, base_url: Callable[[], str]) -> None:
        self._access = access
        self._attributor = attributor
        self._base_url = base_url
        self._changed = asyncio.Condition()  # there may be something to claim

    def routes(self) -> list[web.RouteDef]:
        """The routes of this file."""
        attempt = "/api/rollouts/{rollout_id}/attempts/{attempt}"
        return [
            web.post("/api/tasks", self.enqueue),
            web.get("/api/tasks", self.list_tasks),
            web.post("/api/tasks/claim", self.claim),
            web.post("/api/tasks/progress", self.progress),
            web.post("/api/tasks/abandon", self.abandon),
            web.get("/api/tasks/{task_id}", self.show),
            web.post("/api/tasks/{task_id}/cancel", self.cancel),
            web.post(f"{attempt}/heartbeat", self.heartbeat),
            web.post(f"{attempt}/finish", self.finish),
            web.post(f"{attempt}/release", self.release),
        ]

    async def sweep_now_and_then(self) -> None:
        """Fail the silent and the late, also while nobody claims. Runs as long as the proxy does."""
        forgiven = False
        while True:
            try:
                if not forgiven:
                    await self._access.write(lambda store: store.forgive_downtime())
                    forgiven = True
                await asyncio.sleep(_SWEEP_S)
                if await self._access.read(lambda store: store.pool_is_overdue()):
                    await self._access.write(lambda store: store.sweep_tasks())
                    await self._tell()
            except LightningError as error:
                log.warning("the task pool was not looked after: %s", error)
                await asyncio.sleep(_SWEEP_S)

    # -- tasks -----------------------------------------------------------------------------------

    async def enqueue(self, request: web.Request) -> web.Response:
        """One task or a list, all or none; one that is there takes over the settings given anew."""
        posted = await read_json(request)
        if isinstance(posted, list):
            tasks = [new_task(item, f"tasks[{i}]") for i, item in enumerate(posted)]
        else:
            tasks = [new_task(posted)]
        done = await self._access.write(lambda store: store.enqueue_tasks(tasks))
        await self._tell()
        answers = [{**as_json(task), "created": created} for task, created in done]
        if isinstance(posted, list):
            return answer({"tasks": answers}, 201)
        return answer(answers[0], 201 if done[0][1] else 200)

    async def list_tasks(self, request: web.Request) -> web.Response:
        """In the order of their enqueuing; ``state``, ``limit``, ``after`` (a task id)."""
        state, after = request.query.get("state"), request.query.get("after")
        limit = limit_of(request)
        wanted = optional_choice(TaskState, state, "state of a task")
        found = await self._access.read(
            lambda store: store.list_tasks(state=wanted, limit=limit, after=after)
        )
        return answer({"tasks": [_summary(each) for each in found]})

    async def show(self, request: web.Request) -> web.Response:
        """One task with its rollouts."""
        task_id = request.match_info["task_id"]
        summary, rollouts = await self._access.read(
            lambda store: (store.get_task(task_id), store.rollouts_of_task(task_id))
        )
        return answer({**_summary(summary), "rollouts": rollouts})

    async def cancel(self, request: web.Request) -> web.Response:
        """``{"reason"?}``: hand out nothing more, and cancel what has not ended."""
        posted = fields_of(await read_json(request, empty={}), frozenset(("reason",)), "the cancellation")
        task_id, reason = request.match_info["task_id"], self._reason(posted)
        return answer(_summary(await self._access.write(lambda store: store.cancel_task(task_id, reason))))

    async def progress(self, request: web.Request) -> web.Response:
        """``{"task_ids"?: [...]}``: counts over these tasks, or over all."""
        posted = fields_of(await read_json(request, empty={}), frozenset(("task_ids",)), "the question")
        task_ids = _task_ids(posted)
        return answer(as_json(await self._access.read(lambda store: store.pool_progress(task_ids))))

    # -- workers ---------------------------------------------------------------------------------

    async def claim(self, request: web.Request) -> web.Response:
        """``{"worker", "limit"?, "lease_s"?, "prefer"?, "task_ids"?, "wait_s"?}`` -> assignments."""
        posted = fields_of(await read_json(request), _CLAIM_FIELDS, "the claim")
        worker = text_of(posted, "worker")
        if not worker:
            raise InvalidInput("the claim lacks 'worker': a name, so that it can be said who has what")
        limit = posted.get("limit", 1)
        if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= _MOST_AT_ONCE:
            raise InvalidInput(f"limit is {limit!r:.80}: 1 to {_MOST_AT_ONCE} is possible")
        prefer, task_ids = optional_choice(Prefer, posted.get("prefer"), "preference"), _task_ids(posted)
        lease_s = _seconds(posted, "lease_s", 60.0)
        deadline = asyncio.get_running_loop().time() + min(_seconds(posted, "wait_s", 0.0), _LONGEST_WAIT_S)

        def claim(store: Store) -> tuple[list[Assignment], float | None]:
            given = store.claim_tasks(worker, limit=limit, lease_s=lease_s, prefer=prefer, task_ids=task_ids)
            return given, None if given else store.next_retry_at()

        while True:
            given, retry_at = await self._access.write(claim, for_who_waits=True)
            left_s = deadline - asyncio.get_running_loop().time()
            if given or left_s <= 0:
                return answer({"assignments": [self._assignment(each) for each in given]})
            pause_s = _LOOK_AGAIN_S if retry_at is None else max(retry_at - time.time(), _SHORTEST_WAIT_S)
            await self._wait(min(left_s, pause_s, _LOOK_AGAIN_S))

    async def heartbeat(self, request: web.Request) -> web.Response:
        """``{"lease_s"?, "alive"?}`` -> ``{"stop", "reason", "lease_expires_at"}``."""
        posted = fields_of(await read_json(request, empty={}), _HEARTBEAT_FIELDS, "the heartbeat")
        rollout_id, attempt = _attempt(request)
        lease_s = _seconds(posted, "lease_s", None)
        alive = posted.get("alive", True)
        if not isinstance(alive, bool):
            raise InvalidInput(f"alive is {alive!r:.80}: true or false is needed")
        state = await self._access.write(
            lambda store: store.heartbeat_attempt(rollout_id, attempt, lease_s=lease_s, alive=alive)
        )
        return answer(as_json(state))

    async def finish(self, request: web.Request) -> web.Response:
        """``{"state": "succeeded" | "failed" | "cancelled", "reason"?, "error_class"?, "exit_code"?}``"""
        posted = fields_of(await read_json(request), _FINISH_FIELDS, "the end")
        if "state" not in posted:
            raise InvalidInput("the end lacks 'state': succeeded, failed or cancelled")
        state = choice_of(RolloutState, posted["state"], "state of a rollout")
        error_class = optional_choice(ErrorClass, posted.get("error_class"), "error_class")
        rollout_id, attempt = _attempt(request)
        reason = self._reason(posted)
        if reason is None and state is RolloutState.FAILED and posted.get("exit_code") is not None:
            reason = f"exit code {posted['exit_code']}"
        rollout = await self._access.write(
            lambda store: store.finish_attempt(rollout_id, attempt, state, reason, error_class)
        )
        await self._tell()
        return answer(as_json(rollout))

    async def release(self, request: web.Request) -> web.Response:
        """``{"reason"?}``: give an attempt back; it does not count. One that has ended stays as it is."""
        posted = fields_of(await read_json(request, empty={}), frozenset(("reason",)), "the release")
        rollout_id, attempt = _attempt(request)
        reason = self._reason(posted)
        ended = await self._access.write(lambda store: store.release_attempt(rollout_id, attempt, reason))
        await self._tell()
        return answer({"released": ended is None, "reason": ended})

    async def abandon(self, request: web.Request) -> web.Response:
        """``{"worker"}``: what it held when it ended is lost; it is back and knows nothing of it."""
        posted = fields_of(await read_json(request), frozenset(("worker",)), "the message")
        worker = text_of(posted, "worker")
        if not worker:
            raise InvalidInput("the message lacks 'worker', the name that the attempts were claimed with")
        lost = await self._access.write(lambda store: store.abandon_worker(worker))
        await self._tell()
        return answer({"abandoned": lost})

    def _reason(self, posted: dict[str, Any]) -> str | None:
        """The reason as it may be written: without what rules find."""
        reason = text_of(posted, "reason")
        return text_of(self._access.kept({"reason": reason}, "reason"), "reason")

    def _assignment(self, given: Assignment) -> dict[str, Any]:
        self._attributor.remember(given.api_key, KeyOwner(given.rollout_id, given.attempt))
        task = given.task
        return {
            "rollout_id": given.rollout_id,
            "attempt": given.attempt,
            "task_id": task.task_id,
            "round": task.round,
            "input": as_json(task.input),
            "metadata": as_json(task.metadata),
            "resources": as_json(task.resources),
            "api_key": given.api_key,
            "base_url": f"{self._base_url()}/rollout/{given.rollout_id}/attempt/{given.attempt}/v1",
            "lease_expires_at": given.lease_expires_at,
            "timeout_s": task.timeout_s,
            "silence_s": task.silence_s,
        }

    # -- waiting ---------------------------------------------------------------------------------

    async def _tell(self) -> None:
        """Wake the claims that wait."""
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self, seconds: float) -> None:
        """Until the pool changes, or some seconds have gone."""
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait()
        except TimeoutError:
            pass


def _summary(summary: TaskSummary) -> dict[str, Any]:
    """Task and counts on one level."""
    flat: dict[str, Any] = as_json(summary)
    return {**flat.pop("task"), **flat}


def _attempt(request: web.Request) -> tuple[str, int]:
    number = whole(request.match_info["attempt"], "an attempt")
    if number == 0:
        raise UnknownTarget("attempts are counted from 1")
    return request.match_info["rollout_id"], number


def _task_ids(posted: dict[str, Any]) -> list[str] | None:
    value = posted.get("task_ids")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InvalidInput("task_ids must be a list of texts")
    return value


def _seconds(posted: dict[str, Any], name: str, default: Any) -> Any:
    value = posted.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise InvalidInput(f"{name} is {value!r:.80}: a number of seconds is needed")
    return value
