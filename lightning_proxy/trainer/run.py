"""One pass of the trainer: ``train_once``, whose body is the summary; ``Trainer`` repeats it warm."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from lightning_proxy.config.settings import Settings
from lightning_proxy.errors import NothingToTrain
from lightning_proxy.store import Store
from lightning_proxy.trainer.backend import preload
from lightning_proxy.trainer.lease import Lease
from lightning_proxy.trainer.report import Outcome, Progress, TrainReport
from lightning_proxy.trainer.steps import Pass
from lightning_proxy.trainer.warm import WarmBackend, own_or


def train_once(
    settings: Settings,
    *,
    store: Store,
    progress: Progress,
    dry_run: bool = False,
    retry: bool = False,
    before: TrainReport | None = None,
    warm: WarmBackend | None = None,
) -> TrainReport:
    """Drain, train, publish: one pass over what was recorded since the last.

    Raises ``LeaseHeld`` where another run of the policy is in progress; after giving back all that was
    drained, ``Conflict`` where another version took over meanwhile, and ``TrainingError`` (or whatever else
    went wrong). That there is nothing to train on, or that the proxy did not take the version, is no error:
    the report says so. Nor is that what was made of the same before was refused; it is not made again,
    unless ``retry``. ``before``: the last report, if this process has made one with the same settings.
    """
    this = Pass(settings, store, progress)
    if dry_run:
        return this.preview()
    if not this.promote_staged():
        return this.report(Outcome.STAGED_ONLY)
    this.reward_automatically()
    try:
        this.expect_enough()
        if not retry:
            this.expect_something_new(before)
        with Lease(store, this.policy, settings.train.lease_s) as lease, own_or(warm) as engine:
            parent = this.starting_version()
            recorded = this.drain(lease)
            found = this.choose(recorded, parent)
            store.give_back(lease.run_id, found.for_later)
            if (collapse := this.collapse(found)) is not None:
                return this.stop(lease, found, collapse)
            if (batch := this.prepare(found)) is None:
                return this.commit_nothing(lease, found)
            backend = this.open(engine, parent)
            rows = this.compare(backend, batch, parent)
            lease.check()
            this.update(backend, rows, parent)
            lease.check()
            version = this.export(backend, engine, rows, parent, lease)
            report = this.report(Outcome.STAGED_ONLY).as_dict()
            lease.commit(report=report, version=version, groups=found.keys)
            engine.now_at(version.version)
    except NothingToTrain as nothing:
        return this.nothing(str(nothing))
    return this.report(this.promote(version.version))


class Trainer:
    """Passes of one process, with the update engine kept warm between them."""

    def __init__(
        self, settings: Settings, *, store: Store, progress: Progress, warm: WarmBackend | None = None
    ) -> None:
        """``warm``: an engine that this trainer shares with those of other policies."""
        self._settings = settings
        self._store = store
        self._progress = progress
        self._warm = warm or WarmBackend()
        self._last: TrainReport | None = None

    def train_once(self, *, dry_run: bool = False) -> TrainReport:
        """As the function of that name."""
        report = train_once(
            self._settings,
            store=self._store,
            progress=self._progress,
            dry_run=dry_run,
            before=self._last,
            warm=self._warm,
        )
        self._last = None if dry_run else report
        return report

    def preload(self) -> None:
        """Load now what the first pass would load. A wrong estimator is refused before there is work."""
        preload(self._settings.train)

    def close(self) -> None:
        """Give the update engine back."""
        self._warm.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
