"""The update engine kept open between passes, for as long as it holds the weights that serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lightning_proxy.config.settings import Settings
from lightning_proxy.store import PolicyVersion
from lightning_proxy.trainer.backend import Backend, open_backend
from lightning_proxy.trainer.publish import Lineage, read_lineage, state_directory


class WarmBackend:
    """An update engine and the version whose weights it holds. In the middle of an update: no version's.

    There is one at a time, whatever the number of policies: another policy's takes its place.
    """

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._policy = ""
        self._version: int | None = None
        self.lineage: Lineage | None = None
        self.optimizer = ""

    def at(self, settings: Settings, parent: PolicyVersion) -> Backend:
        """The engine with the weights and the optimiser of this version, loaded unless it has them."""
        holds = (self._policy, self._version)
        if self._backend is not None and holds == (parent.policy, parent.version):
            self._version = None
            self.optimizer = "carried over"
            return self._backend
        self.discard()
        train = settings.train
        saved = read_lineage(parent)
        misfit = "there is no saved state" if saved is None else saved.misfit(train)
        goes_on = saved is not None and misfit is None
        # With LoRA a state is the adapter's alone: it goes onto the weights that it is relative to.
        begins_with = saved.base if saved is not None and goes_on and train.lora_rank else parent.path
        self._backend, self._policy = open_backend(train, Path(begins_with)), parent.policy
        if saved is not None and goes_on:
            # Moments of another loss's gradients would push the first steps where that one wanted to go.
            same = saved.algorithm == train.algorithm
            self._backend.load_state(state_directory(parent), optimizer=same)
            self.lineage = replace(saved, algorithm=train.algorithm)
            self.optimizer = "carried over" if same else f"began anew: the last pass was {saved.algorithm}"
        else:
            self.lineage = Lineage(
                parent.path, train.workers, train.lora_rank, train.lora_alpha, train.algorithm
            )
            self.optimizer = f"began anew: {misfit}"
        return self._backend

    def now_at(self, version: int) -> None:
        """The weights are those of this version now."""
        self._version = version

    def discard_unless_whole(self) -> None:
        """Close the engine if its weights are no version's."""
        if self._version is None:
            self.discard()

    def discard(self) -> None:
        """Close the engine."""
        if self._backend is not None:
            self._backend.close()
        self._backend = self._version = self.lineage = None


@contextmanager
def own_or(warm: WarmBackend | None) -> Iterator[WarmBackend]:
    """The caller's engine, or one for this pass only. An error in mid-update makes either unusable."""
    engine = warm or WarmBackend()
    try:
        yield engine
    except BaseException:
        engine.discard_unless_whole()
        raise
    finally:
        if warm is None:
            engine.discard()
