"""The policies that are served here: each with its engine, its gate, its switch, and their life.

What happens to one policy's weights is nothing to the calls of another: they have nothing in common but
the store.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from lightning_proxy.config import Settings
from lightning_proxy.errors import (
    ConfigError,
    EngineError,
    EngineUnreachable,
    PublishFailed,
    StoreError,
    UnknownTarget,
)
from lightning_proxy.store import PolicyVersion, VersionStatus, Writer

from .engine import Engine
from .engine_process import EngineProcess, vllm_command
from .hold import Hold
from .reader import open_store
from .switch import Switch
from .tasks import Tasks

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 5.0  # no engine starts faster
STARTING = "the engine is starting"
RESTORING = "the active version is being restored"


@dataclass(slots=True)
class Served:
    """One policy: which engine runs it, and what holds its calls while its weights change."""

    settings: Settings  # as if this policy were the only one
    engine: Engine
    hold: Hold
    switch: Switch
    process: EngineProcess | None = None  # vLLM, where it is our child

    @property
    def policy(self) -> str:
        """The policy's name."""
        return self.settings.policy.name

    async def begin(self, writer: Writer, tasks: Tasks) -> None:
        """Enter the weights that the user brought, and bring an engine that runs to the active ones."""
        if (model := self.settings.policy.model) is not None:
            path = str(model.resolve())
            await writer.submit(lambda store: store.add_base_version(self.policy, path))
        if self.process is None:
            await self._begin_with_active(writer, tasks)
            tasks.spawn(f"look after the engine of {self.policy}", self._watch())

    def broke(self, error: Exception) -> None:
        """A call's connection to the engine failed, or broke off in mid-answer."""
        if self.process is None:
            self.switch.doubt(gone=isinstance(error, aiohttp.ClientConnectorError))

    async def _watch(self) -> None:
        """An engine that somebody else keeps up may be started again while nobody calls it."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            if self.switch.matters_who_runs and await self.engine.is_there() is False:
                self.switch.doubt(gone=True)

    async def _begin_with_active(self, writer: Writer, tasks: Tasks) -> None:
        """Version 0 is what the engine was started with; any other has to be loaded again.

        So has version 0 where there are others: a proxy that died in mid-change leaves the engine
        paused, or on weights that are not the active ones.
        """
        versions = await writer.submit(lambda store: store.list_versions(self.policy))
        active = next((version for version in versions if version.status is VersionStatus.ACTIVE), None)
        if active is None or len(versions) == 1:
            self.switch.started_with(active)
            return
        self.hold.close(RESTORING)
        tasks.spawn(f"restore the active version of {self.policy}", self._restore())

    async def _restore(self) -> None:
        """Bring an engine that somebody else started to the active version, once it answers."""
        try:
            await self.engine.answers()
            await self.switch.restore_active()
        except (EngineError, PublishFailed) as error:
            log.error("the engine does not run the active version of the policy %s: %s", self.policy, error)
            self.switch.lost()
            if isinstance(error, EngineUnreachable):
                self.switch.doubt(gone=True)  # it is tried again once it is back
        finally:
            self.hold.release(RESTORING)

    async def supervise(self) -> None:
        """Keep our own vLLM up, and hold calls while it is not. Raises as ``EngineProcess.run``."""
        process = self.process
        assert process is not None, "asked of those that are our children"
        self.hold.close(STARTING)

        async def ready() -> None:
            try:
                version = await asyncio.to_thread(self._version_of, process.weights)
            except StoreError as error:
                log.error("which version of %s vLLM runs could not be looked up: %s", self.policy, error)
                self.switch.lost()
            else:
                self.switch.started_with(version)
            self.hold.release(STARTING)
            log.info("vLLM is ready for %s", self.policy)

        async def down() -> None:
            self.hold.close(STARTING)

        process.on_ready, process.on_down = ready, down
        await process.run()

    def _version_of(self, weights: Path | None) -> PolicyVersion | None:
        """The version with these weights. Blocking.

        Not the active one, which may be another by now; and not by the writer, which may have to wait.
        """
        with open_store(self.settings) as store:
            versions = store.list_versions(self.policy)
        same = [version for version in versions if Path(version.path) == weights]
        active = (version for version in same if version.status is VersionStatus.ACTIVE)
        return next(active, same[0] if same else None)


class Policies:
    """All of them, that of ``[policy]`` first."""

    def __init__(self, main: Served, others: Sequence[Served] = ()) -> None:
        self.main = main
        self._by_name = {each.policy: each for each in (main, *others)}

    def __iter__(self) -> Iterator[Served]:
        return iter(self._by_name.values())

    def of(self, name: str) -> Served:
        """One policy. Raises ``UnknownTarget``."""
        if (found := self._by_name.get(name)) is None:
            there = ", ".join(map(repr, self._by_name))
            one = f"it is {there}" if len(self._by_name) == 1 else f"there are {there}"
            raise UnknownTarget(f"no policy {name!r} is served here: {one}")
        return found

    def version_of(self, name: str | None) -> int | None:
        """The version that runs at the end of a call to this policy; ``None`` where it is not known."""
        served = self._by_name.get(name) if name is not None else None
        return None if served is None else served.switch.version_under_way

    @property
    def waiting(self) -> int:
        """Calls held right now."""
        return sum(each.hold.waiting for each in self)

    @property
    def held_because(self) -> list[str]:
        """Why calls are held; of which policy, where there are several."""
        return [self.about(each, reason) for each in self for reason in each.hold.reasons]

    def about(self, served: Served, what: str) -> str:
        """What is said of a policy, with its name where there are several."""
        return what if len(self._by_name) == 1 else f"{what} ({served.policy})"


def engine_process(settings: Settings, shown_as: str | None = None) -> EngineProcess:
    """vLLM for the policy of these settings, not started yet.

    ``shown_as``: the name that its answers show, for calls that ask for another policy's name. Raises
    ``ConfigError`` where there are no weights to serve.
    """
    name, model = settings.policy.name, settings.policy.model
    if model is None:
        raise ConfigError(
            "nothing to forward to: give --upstream URL (an engine that runs) or --model PATH (we start vLLM)"
        )
    if not (model / "config.json").is_file():
        raise ConfigError(f"{model} holds no config.json: a directory in Hugging Face's layout is needed")

    def weights() -> Path:
        with open_store(settings) as store:
            active = store.active_version(name)
        return Path(active.path) if active is not None else model.resolve()

    command = functools.partial(vllm_command, shown_as=shown_as)
    return EngineProcess(settings.engine, policy=name, model=weights, port=_free_port(), command=command)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
