"""Our own routes: rewards, rollouts, spans, policies, runs, health. Shapes are DESIGN section 4."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import orjson
from aiohttp import web

from lightning_proxy.errors import (
    EngineError,
    InvalidInput,
    LightningError,
    PublishFailed,
    RequestError,
    StoreUnavailable,
)
from lightning_proxy.store import KeyOwner, Reward, Rollout, RolloutState, Store, Writer, as_json

from .attribution import checked_id
from .engine import Engine
from .hold import Hold
from .keys import Attributor
from .metrics import Metrics
from .switch import Switch

T = TypeVar("T")
_HEAD_ONLY = frozenset({"request", "response", "generations"})
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
_ROLLOUT_FIELDS = frozenset(("rollout_id", "task_id", "metadata", "role"))
_STORE_PATIENCE_S = 15.0


class Control:
    """Handlers of ``/reward``, ``/api/``, ``/healthz``, ``/readyz`` and ``/metrics``."""

    def __init__(
        self,
        *,
        writer: Writer,
        read: Callable[[Callable[[Store], Any]], Any],
        switch: Switch,
        hold: Hold,
        engine: Engine,
        attributor: Attributor,
        metrics: Metrics,
        base_url: Callable[[], str],
    ) -> None:
        self._writer = writer
        self._read_blocking = read
        self._switch = switch
        self._hold = hold
        self._engine = engine
        self._attributor = attributor
        self._metrics = metrics
        self._base_url = base_url

    def routes(self) -> list[web.RouteDef]:
        """Every route that is ours; all others are forwarded."""
        return [
            web.post("/reward", self.reward),
            web.post("/api/rollouts", self.create_rollouts),
            web.get("/api/rollouts", self.list_rollouts),
            web.get("/api/rollouts/{rollout_id}", self.show_rollout),
            web.patch("/api/rollouts/{rollout_id}", self.finish_rollout),
            web.get("/api/spans", self.list_spans),
            web.get("/api/spans/{span_id}", self.show_span),
            web.get("/api/policies", self.list_policies),
            web.post("/api/policies/{policy}/versions/{version}/promote", self.promote),
            web.post("/api/policies/{policy}/rollback", self.rollback),
            web.get("/api/runs", self.list_runs),
            web.get("/api/stats", self.stats),
            web.get("/healthz", self.healthz),
            web.get("/readyz", self.readyz),
            web.get("/metrics", self.show_metrics),
        ]

    # -- rewards -----------------------------------------------------------------------------

    async def reward(self, request: web.Request) -> web.Response:
        """Take one reward or a list; answer once all of it is durable, or none of it is."""
        posted = await _json(request)
        if isinstance(posted, list):
            many = [_reward_fields(item, f"rewards[{i}]") for i, item in enumerate(posted)]
            results = await self._write(lambda store: [store.add_reward(**item) for item in many])
            self._metrics.rewards.inc(sum(created for _, created in results))
            return _answer({"rewards": [_reward_answer(*result) for result in results]})
        one = _reward_fields(posted, "the reward")
        reward, created = await self._write(lambda store: store.add_reward(**one))
        self._metrics.rewards.inc(int(created))
        return _answer(_reward_answer(reward, created), 201 if created else 200)

    # -- rollouts ----------------------------------------------------------------------------

    async def create_rollouts(self, request: web.Request) -> web.Response:
        """Register one rollout or a list, with a base URL and a key that name it."""
        posted = await _json(request, empty={})
        items = posted if isinstance(posted, list) else [posted]
        wanted = [_fields(item, _ROLLOUT_FIELDS, "the rollout") for item in items]
        for item in wanted:
            _check_rollout(item)
        made = await self._write(lambda store: [_create(store, item) for item in wanted])
        answers = []
        for rollout, _, key, role in made:
            self._attributor.remember(key, KeyOwner(rollout.rollout_id, 1, role))
            answers.append(self._rollout_answer(rollout, key, role))
        if isinstance(posted, list):
            return _answer({"rollouts": answers}, 201)
        return _answer(answers[0], 201 if made[0][1] else 200)

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
        limit = _limit(request)
        wanted = None if state is None else _rollout_state(state)
        found = await self._read(
            lambda store: store.list_rollouts(state=wanted, task_id=task_id, limit=limit)
        )
        return _answer({"rollouts": as_json(found)})

    async def show_rollout(self, request: web.Request) -> web.Response:
        """One rollout with the heads of its spans and its reward ledger."""
        rollout_id = request.match_info["rollout_id"]

        def read(store: Store) -> dict[str, Any]:
            return {
                "rollout": as_json(store.get_rollout(rollout_id)),
                "spans": as_json(store.list_spans(rollout_id=rollout_id, limit=1000), leave_out=_HEAD_ONLY),
                "rewards": as_json(store.list_rewards(rollout_id)),
            }

        return _answer(await self._read(read))

    async def finish_rollout(self, request: web.Request) -> web.Response:
        """``{"state": "succeeded" | "failed" | "cancelled", "reason"?}``"""
        posted = _fields(await _json(request), frozenset(("state", "reason")), "the change")
        if "state" not in posted:
            raise InvalidInput("the change lacks 'state': succeeded, failed or cancelled")
        state = _rollout_state(posted["state"])
        rollout_id = request.match_info["rollout_id"]
        done = await self._write(lambda store: store.finish_rollout(rollout_id, state, posted.get("reason")))
        return _answer(as_json(done))

    # -- spans, policies, runs ---------------------------------------------------------------

    async def list_spans(self, request: web.Request) -> web.Response:
        """Heads of spans, newest first; ``rollout_id``, ``limit``, ``before``."""
        rollout_id, limit = request.query.get("rollout_id"), _limit(request)
        before = _whole(request.query["before"], "before") if "before" in request.query else None
        found = await self._read(
            lambda store: store.list_spans(rollout_id=rollout_id, limit=limit, before=before)
        )
        return _answer({"spans": as_json(found, leave_out=_HEAD_ONLY)})

    async def show_span(self, request: web.Request) -> web.Response:
        """One span, whole."""
        span_id = _whole(request.match_info["span_id"], "a span id")
        return _answer(as_json(await self._read(lambda store: store.get_span(span_id))))

    async def list_policies(self, request: web.Request) -> web.Response:
        """Every policy, its active version and all its versions."""
        versions = await self._read(lambda store: store.list_versions())
        policies: dict[str, dict[str, Any]] = {}
        for version in versions:
            entry = policies.setdefault(
                version.policy, {"policy": version.policy, "active": None, "versions": []}
            )
            entry["versions"].append(as_json(version))
            if version.status == "active":
                entry["active"] = version.version
        return _answer({"policies": list(policies.values())})

    async def promote(self, request: web.Request) -> web.Response:
        """Let a version take over; answers when it has, or says why it could not."""
        version = _whole(request.match_info["version"], "a version")
        return _answer(as_json(await self._switch.promote(request.match_info["policy"], version)))

    async def rollback(self, request: web.Request) -> web.Response:
        """Go back to ``{"version": n}``, by default to the parent of the active version."""
        posted = _fields(await _json(request, empty={}), frozenset(("version",)), "the rollback")
        version = posted.get("version")
        if version is not None and (not isinstance(version, int) or isinstance(version, bool)):
            raise InvalidInput(f"version is {version!r}: a whole number is needed")
        return _answer(as_json(await self._switch.rollback(request.match_info["policy"], version)))

    async def list_runs(self, request: web.Request) -> web.Response:
        """Training runs, newest first."""
        limit = _limit(request)
        runs = await self._read(lambda store: store.list_runs(limit=limit))
        return _answer({"runs": as_json(runs)})

    # -- the state of things -----------------------------------------------------------------

    async def stats(self, request: web.Request) -> web.Response:
        """Counts of everything, and what the proxy is doing."""
        counts = await self._read(lambda store: store.stats())
        serving = self._switch.serving
        return _answer(
            {
                **counts,
                "policy": self._switch.policy,
                "serving_version": serving.version if serving else None,
                "held_calls": self._hold.waiting,
                "held_because": list(self._hold.reasons),
                "spans_pending": self._writer.pending,
                "spans_dropped": self._writer.dropped,
            }
        )

    async def healthz(self, request: web.Request) -> web.Response:
        """The process answers."""
        return _answer({"status": "ok"})

    async def readyz(self, request: web.Request) -> web.Response:
        """Calls go straight through to an engine that answers, and spans are written."""
        waits_for = list(self._hold.reasons)
        if not self._writer.healthy:
            waits_for.append(f"the store: {self._writer.last_error}")
        if not waits_for and not await self._engine.healthy():
            waits_for.append("the engine does not answer")
        return _answer({"ready": not waits_for, "waits_for": waits_for}, 503 if waits_for else 200)

    async def show_metrics(self, request: web.Request) -> web.Response:
        """Prometheus' text format."""
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    # -- ways to the store -------------------------------------------------------------------

    async def _write(self, change: Callable[[Store], T]) -> T:
        """Run a change through the one writer; return when it is durable."""
        future = self._writer.submit(change)
        done, _ = await asyncio.wait((future,), timeout=_STORE_PATIENCE_S)
        if not done:
            future.cancel()  # nobody waits for it; it may be written yet, which a key makes safe
            raise StoreUnavailable(
                f"the store is not writing ({self._writer.last_error or 'busy'}); try again, with the same "
                "idempotency_key"
            )
        return future.result()

    async def _read(self, question: Callable[[Store], T]) -> T:
        answer: T = await asyncio.to_thread(self._read_blocking, question)
        return answer


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


def _reward_fields(item: Any, what: str) -> dict[str, Any]:
    fields = _fields(item, _REWARD_FIELDS, what)
    if "value" not in fields:
        raise InvalidInput(f"{what} lacks 'value': a finite number")
    return fields


def _rollout_state(text: object) -> RolloutState:
    try:
        return RolloutState(str(text))
    except ValueError:
        known = ", ".join(state.value for state in RolloutState)
        raise InvalidInput(f"{text!r} is no state of a rollout; there are {known}") from None


def _reward_answer(reward: Reward, created: bool) -> dict[str, Any]:
    return {
        "reward_id": reward.reward_id,
        "rollout_id": reward.rollout_id,
        "span_id": reward.span_id,
        "created": created,
    }


async def _json(request: web.Request, *, empty: Any = None) -> Any:
    body = await request.read()
    if not body and empty is not None:
        return empty
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the body is no JSON: {error}") from None


def _fields(item: Any, known: frozenset[str], what: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InvalidInput(f"{what} must be a JSON object, and is {str(item)[:80]!r}")
    unknown = sorted(set(item) - known)
    if unknown:
        raise InvalidInput(
            f"{what} has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    return item


def _whole(text: str, what: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise InvalidInput(f"{text[:80]!r} cannot be {what}: a whole number is needed")
    return int(text)


def _limit(request: web.Request) -> int:
    limit = _whole(request.query.get("limit", "100"), "limit")
    if not 1 <= limit <= 10_000:
        raise InvalidInput(f"limit is {limit}: 1 to 10000 is possible")
    return limit


def _answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")


def http_status(error: LightningError) -> tuple[int, str]:
    """The status and code with which an error of ours leaves the house."""
    match error:
        case RequestError():
            return error.status, error.code
        case StoreUnavailable():
            return 503, "store_unavailable"
        case PublishFailed():
            return 409, "version_rejected"
        case EngineError():
            return 502, "engine_error"
        case _:
            return 500, "internal_error"
