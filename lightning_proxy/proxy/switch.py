"""Promotion: a policy version's weights take over behind the proxy, or the former ones come back.

Calls are held, never refused, meanwhile; calls under way pause between two tokens and go on under
the new weights. A version counts as active only after the engine gave the logprobs that the
trainer computed for a fixed prompt.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_proxy.errors import (
    Conflict,
    EngineError,
    EngineRefused,
    EngineUnreachable,
    LightningError,
    PublishFailed,
    StoreError,
)
from lightning_proxy.store import PolicyVersion, Store, VersionStatus, Writer

from .engine import Engine, Faulty, NeverReached
from .hold import Hold
from .metrics import Metrics
from .tasks import Tasks

log = logging.getLogger(__name__)
CHANGING = "weights are changing"
PAUSED = "the engine is paused and does not resume"
_LAST_TRY_S = 5.0
_LOOK_AGAIN_S = 1.0
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0  # between tries


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
        # An engine whose weights were changed and that somebody starts again, runs others than before.
        self._changed = False
        self._doubted = False  # a connection failed since: it may have been started again
        self._gone = False  # nobody was there: it was
        self._checking: asyncio.Task[None] | None = None

    # -- what calls are stamped with --------------------------------------------------------

    @property
    def version(self) -> int | None:
        """The version that runs now; ``None`` where that is not known."""
        return None if self._doubted else self.version_under_way

    @property
    def version_under_way(self) -> int | None:
        """The version that a call under way is answered by, which an engine started again would have cut."""
        if self._lost:
            return None
        return self._serving.version if self._serving is not None else 0

    @property
    def serving(self) -> PolicyVersion | None:
        """The version that the engine runs, as far as we know."""
        return self._serving

    @property
    def matters_who_runs(self) -> bool:
        """Whether an engine that somebody starts again would run something else."""
        return self._changed or self._lost

    # -- changes -----------------------------------------------------------------------------

    def started_with(self, version: PolicyVersion | None) -> None:
        """The engine was started on this version's weights."""
        self._runs(version)

    def lost(self) -> None:
        """What the engine runs is not known: nothing is stamped with a version that may be wrong."""
        self._lost, self._doubted, self._gone = True, False, False

    def _runs(self, version: PolicyVersion | None) -> None:
        self._serving, self._lost, self._doubted, self._gone = version, False, False, False

    def doubt(self, *, gone: bool) -> None:
        """A connection to an engine that somebody else keeps up failed. ``gone``: nobody was there.

        Until the engine is known to run what it ran, calls count as no version's; they are not held.
        """
        if not self.matters_who_runs:
            return
        self._doubted = True
        self._gone = self._gone or gone
        if self._checking is None or self._checking.done():
            self._checking = self._tasks.spawn(f"what runs for {self.policy}", self._make_sure())

    async def _make_sure(self) -> None:
        """Once the engine answers: ask for the probe's logprobs, or load the active version again."""
        while self._doubted:
            there = await self._engine.is_there()
            self._gone = self._gone or there is False
            try:
                if there and self._gone:
                    log.warning("the engine was away: the active version of %s is loaded again", self.policy)
                    await self.restore_active()
                elif there:
                    await self._check()
                else:
                    await asyncio.sleep(_LOOK_AGAIN_S)
            except EngineUnreachable as error:
                log.warning("the engine went away again: %s", error)
                self._doubted = self._gone = True
                await asyncio.sleep(_LOOK_AGAIN_S)
            except (EngineError, PublishFailed, StoreError) as error:
                log.error("the engine does not run the active version of %s: %s", self.policy, error)
                self.lost()

    async def _check(self) -> None:
        """The engine is there right after a connection broke: it is the same one, if its logprobs are."""
        async with self._one_at_a_time:
            serving = self._serving
            if self._doubted and serving is not None and not self._lost:
                try:
                    await self._verify(serving)
                except (PublishFailed, EngineRefused):
                    self._gone = True
                    return
            self._doubted = self._gone

    async def restore_active(self) -> None:
        """Make an engine that somebody else started run the active version, and go on if it is paused."""
        async with self._one_at_a_time:
            active = await self._writer.submit(lambda store: store.active_version(self.policy))
            if active is None:
                self._runs(None)
                return
            await self._bring_to(active)

    async def _bring_to(self, active: PolicyVersion) -> None:
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
            former, started = self._serving, time.perf_counter()
            try:
                with self._hold.closed(CHANGING):
                    difference = await self._take_over(target)
            except PublishFailed as failure:
                note = str(failure)
                await self._writer.submit(lambda store: _reject(store, target, note))
                raise
            seconds = time.perf_counter() - started
            await self._activate(target, former)
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
            self._still_runs(target)
        except LightningError:
            if self._serving is not former or self._lost != was_lost:  # else the engine is as it was
                await self._put_back(former)
            raise
        return difference

    async def _activate(self, target: PolicyVersion, former: PolicyVersion | None) -> None:
        """Note that the version serves. No call waits for that: the store may be in trouble.

        A proxy that dies before leaves weights that are not the active ones in the engine. They are
        replaced when it starts again; until then they are what calls are stamped with.
        """
        try:
            await self._writer.submit(lambda store: store.activate_version(target.policy, target.version))
        except LightningError:  # rejected or deleted meanwhile, or the store has closed
            with self._hold.closed(CHANGING):
                await self._put_back(former)
            raise
        if self._serving is not target:  # started again meanwhile, on what was active then
            await self._bring_to(target)

    async def _load(self, version: PolicyVersion) -> None:
        """Make the engine run a version. From its first token on, calls count as this version's."""
        directory = Path(version.path)
        if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
            # vLLM answers a bad path by dying a call later.
            raise PublishFailed(
                f"{directory} holds no config.json with *.safetensors that can be read from here"
            )
        async with self._paused():
            self._changed = True
            try:
                await self._engine.reload_weights(directory)
            except EngineError:
                self.lost()
                raise
            self._runs(version)
        self._still_runs(version)

    def _still_runs(self, version: PolicyVersion) -> None:
        """Raise EngineUnreachable unless a version that was loaded just now is what runs."""
        if self._lost or self._serving is not version:
            raise EngineUnreachable(f"the engine went away while it took over version {version.version}")

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """The engine stands still for the length of a block, and goes on at its end, whatever happened.

        Also after a pause that failed: it may be in force though its answer was lost, unless the
        engine never heard of it or refused it.
        """
        try:
            await self._engine.pause()
        except (EngineError, asyncio.CancelledError) as error:
            refused = isinstance(error, EngineRefused) and not isinstance(error, Faulty)
            if not (refused or isinstance(error, NeverReached)):
                await self._go_on(after=error, surely_paused=False)
            raise
        try:
            yield
        except (Exception, asyncio.CancelledError) as error:
            await self._go_on(after=error)
            raise
        await self._go_on()

    async def _go_on(self, after: BaseException | None = None, *, surely_paused: bool = True) -> None:
        """Return when the engine is paused no longer: until then nobody would get an answer from it."""
        if isinstance(after, asyncio.CancelledError):  # this process ends: one more try is all there is
            with suppress(EngineError, TimeoutError):
                async with asyncio.timeout(_LAST_TRY_S):
                    await self._engine.resume()
            return
        if (refusal := await self._resumed()) is None:
            return
        if not surely_paused and await self._engine.generates(self.policy):
            return
        log.error("the engine is paused and does not resume; it is asked until it does: %s", refusal)
        pause_s = _SHORTEST_PAUSE_S
        with self._hold.closed(f"{PAUSED}: {refusal}"):
            while refusal is not None:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                refusal = await self._resumed()
        log.warning("the engine resumed")

    async def _resumed(self) -> EngineError | None:
        """Whether it goes on; if not, why."""
        try:
            await self._engine.resume()
        except NeverReached as error:
            self.lost()  # nobody listens: it has ended, and what comes after it may run anything
            return error
        except EngineError as error:
            return error
        return None

    async def _verify(self, version: PolicyVersion) -> float | None:
        """Largest difference (nats) between the engine's and the trainer's probe logprobs."""
        if version.probe is None:
            return None
        try:
            ids = [int(token) for token in version.probe["prompt_token_ids"]]
            expected = [float(value) for value in version.probe["logprobs"]]
            if len(expected) != max(len(ids) - 1, 0):
                raise ValueError(f"{len(expected)} logprobs of {len(ids)} tokens")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise PublishFailed(
                f"version {version.version} has no fixed prompt with its logprobs that can be read: {error!r}"
            ) from error
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
