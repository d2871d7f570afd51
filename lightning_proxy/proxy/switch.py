"""Promotion: a policy version's weights take over behind the proxy, or the former ones come back.

Calls are held, never refused, meanwhile; calls under way pause between two tokens and go on under
the new weights. A version counts as active only after the engine gave the logprobs that the
trainer computed for a fixed prompt.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from lightning_proxy.errors import (
    Conflict,
    EngineError,
    EngineRefused,
    LightningError,
    PublishFailed,
)
from lightning_proxy.store import PolicyVersion, Store, VersionStatus, Writer

from .engine import Engine
from .hold import Hold
from .metrics import Metrics
from .tasks import Tasks

log = logging.getLogger(__name__)
CHANGING = "weights are changing"


@dataclass(frozen=True, slots=True)
class Promotion:
    """A version that took over: how long calls were held, and how far the probe was off (nats)."""

    policy: str
    version: int
    status: str
    swap_s: float
    verify_max_diff: float | None


class Switch:
    """Knows which version of its policy the engine runs, and changes it, one change at a time."""

    def __init__(
        self,
        *,
        policy: str,
        engine: Engine,
        hold: Hold,
        writer: Writer,
        metrics: Metrics,
        tasks: Tasks,
        tolerance: float,
    ) -> None:
        self.policy = policy
        self._engine = engine
        self._hold = hold
        self._writer = writer
        self._metrics = metrics
        self._tasks = tasks
        self._tolerance = tolerance
        self._one_at_a_time = asyncio.Lock()
        # What the engine runs. None as long as the policy has no version in the store: such calls
        # count as version 0, what the user brought. Once `_lost`, nothing is known.
        self._serving: PolicyVersion | None = None
        self._lost = False

    # -- what calls are stamped with --------------------------------------------------------

    @property
    def version(self) -> int | None:
        """The version that runs now; ``None`` where that is not known."""
        if self._lost:
            return None
        return self._serving.version if self._serving is not None else 0

    @property
    def serving(self) -> PolicyVersion | None:
        """The version that the engine runs, as far as we know."""
        return self._serving

    # -- changes -----------------------------------------------------------------------------

    def started_with(self, version: PolicyVersion | None) -> None:
        """The engine was started on this version's weights."""
        self._runs(version)

    def lost(self) -> None:
        """What the engine runs is not known: nothing is stamped with a version that may be wrong."""
        self._lost = True

    def _runs(self, version: PolicyVersion | None) -> None:
        self._serving, self._lost = version, False

    async def restore_active(self) -> None:
        """Make an engine that somebody else started run the active version, and go on if it is paused."""
        active = await self._writer.submit(lambda store: store.active_version(self.policy))
        if active is None:
            self._runs(None)
            return
        async with self._one_at_a_time:
            with self._hold.closed(CHANGING):
                try:
                    await self._load(active)
                except EngineRefused:
                    if active.version != 0 or self._lost:
                        raise
                    self._runs(active)  # weights that cannot be changed are those it began with
                await self._verify(active)

    async def promote(self, version: int) -> Promotion:
        """Let a version of this switch's policy take over.

        Raises UnknownTarget, Conflict (one that must not serve: ``Store.activate_version``), EngineError
        (the engine is as before), or PublishFailed (its logprobs were wrong: it is rejected and the former
        version is back).
        """
        # Whoever asked may hang up: a change that has begun is brought to its end all the same.
        change = self._tasks.spawn(f"promotion of version {version} of {self.policy}", self._outcome(version))
        outcome: Promotion | LightningError = await asyncio.shield(change)
        if isinstance(outcome, LightningError):
            raise outcome
        return outcome

    async def _outcome(self, version: int) -> Promotion | LightningError:
        try:
            return await self._promote(version)
        except LightningError as error:
            log.warning("version %d of %s did not take over: %s", version, self.policy, error)
            return error

    async def _promote(self, version: int) -> Promotion:
        policy = self.policy
        async with self._one_at_a_time:
            target = await self._writer.submit(lambda store: _that_may_serve(store, policy, version))
            started = time.perf_counter()
            with self._hold.closed(CHANGING):
                difference = await self._take_over(target)
            seconds = time.perf_counter() - started
        self._metrics.swap_seconds.observe(seconds)
        log.info("version %d of %s took over in %.3f s", version, policy, seconds)
        return Promotion(policy, version, VersionStatus.ACTIVE.value, seconds, difference)

    async def rollback(self, version: int | None) -> Promotion:
        """Go back to a version; by default to the parent of the active one. Raises as ``promote``."""
        if version is None:
            active = await self._writer.submit(lambda store: store.active_version(self.policy))
            if active is None or active.parent is None:
                raise Conflict(f"policy {self.policy!r} has no earlier version to go back to")
            version = active.parent
        return await self.promote(version)

    async def _take_over(self, target: PolicyVersion) -> float | None:
        former, was_lost = self._serving, self._lost
        try:
            await self._load(target)
            difference = await self._verify(target)
            await self._writer.submit(lambda store: store.activate_version(target.policy, target.version))
        except LightningError as failure:
            if self._serving is not former or self._lost != was_lost:  # else the engine is as it was
                await self._put_back(former)
            if isinstance(failure, PublishFailed):
                note = str(failure)
                await self._writer.submit(lambda store: _reject(store, target, note))
            raise
        return difference

    async def _load(self, version: PolicyVersion) -> None:
        """Make the engine run a version. From its first token on, calls count as this version's."""
        directory = Path(version.path)
        if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
            # vLLM answers a bad path by dying a call later.
            raise PublishFailed(
                f"{directory} holds no config.json with *.safetensors that can be read from here"
            )
        async with self._engine.paused():
            try:
                await self._engine.reload_weights(directory)
            except EngineError:
                self.lost()
                raise
            self._runs(version)

    async def _verify(self, version: PolicyVersion) -> float | None:
        """Largest difference (nats) between the engine's and the trainer's probe logprobs."""
        if version.probe is None:
            return None
        ids = [int(token) for token in version.probe["prompt_token_ids"]]
        expected = [float(value) for value in version.probe["logprobs"]]
        got = await self._engine.prompt_logprobs(self.policy, ids)
        difference = max((abs(a - b) for a, b in zip(got, expected, strict=True)), default=0.0)
        if not difference <= self._tolerance:
            raise PublishFailed(
                f"under version {version.version} the engine's logprobs of the fixed prompt are off by "
                f"{difference:.4g} nats, more than train.verify_tolerance {self._tolerance:g}"
            )
        return difference

    async def _put_back(self, former: PolicyVersion | None) -> None:
        if former is None:
            log.error("the store does not know the weights that the engine began with: restart the engine")
            self.lost()
            return
        try:
            await self._load(former)
        except (EngineError, PublishFailed) as error:
            log.error("version %d could not be put back: %s", former.version, error)
            self.lost()


def _that_may_serve(store: Store, policy: str, version: int) -> PolicyVersion:
    """The version; Conflict, before the engine is touched, where it could not be activated afterwards."""
    target = store.get_version(policy, version)
    store.expect_may_serve(target)
    return target


def _reject(store: Store, version: PolicyVersion, note: str) -> None:
    """A staged version that fails is rejected, and what it was made of is given back."""
    if version.status is VersionStatus.STAGED:
        store.reject_version(version.policy, version.version, note)
