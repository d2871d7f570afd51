"""The steps of one pass, in the order in which ``run.train_once`` takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_proxy.config.settings import Settings
from lightning_proxy.errors import Conflict, NothingToTrain, PublishFailed, TrainingError, UnknownTarget
from lightning_proxy.store import (
    PolicyVersion,
    RecordedRollout,
    RewardRule,
    RunState,
    Store,
    VersionStatus,
)
from lightning_proxy.trainer import guard
from lightning_proxy.trainer.advice import advice
from lightning_proxy.trainer.algorithms import algorithm_of
from lightning_proxy.trainer.algorithms.base import Batch, Bench, Chosen
from lightning_proxy.trainer.automatic import AutomaticRewards
from lightning_proxy.trainer.backend import Backend
from lightning_proxy.trainer.batches import Rows, split_mini_batches
from lightning_proxy.trainer.guard import Collapse, Look
from lightning_proxy.trainer.lease import Lease
from lightning_proxy.trainer.publish import (
    clear_away,
    clear_leftovers,
    promote,
    roll_back,
    version_directory,
    write_version,
)
from lightning_proxy.trainer.report import Outcome, Progress, Stopwatch, TrainReport
from lightning_proxy.trainer.trajectories import Trajectory
from lightning_proxy.trainer.warm import WarmBackend

_PROBE_TOKENS = 64
# The settings that what comes of a pass depends on, beside those by which calls are recorded.
_DECISIVE = {"policy", "engine", "train", "guard", "failures", "automatic_rewards", "rewards"}
_PROMOTE_MARGIN_S = 60.0  # beyond the time that the proxy holds calls for


class Pass:
    """The steps of one pass, in order, and the report that they fill."""

    def __init__(self, settings: Settings, store: Store, progress: Progress) -> None:
        self.settings = settings
        self.store = store
        store.rule = RewardRule(**settings.reward_rule)
        self.progress = progress
        self.policy = settings.policy.name
        self.clock = Stopwatch()
        self.algorithm = algorithm_of(Bench(settings, store, progress, self.clock, self._update))
        self._report = TrainReport(Outcome.NOTHING, self.policy, "", algorithm=settings.train.algorithm)

    def report(self, outcome: Outcome, message: str | None = None) -> TrainReport:
        """The report so far, with this outcome."""
        message = self._report.message if message is None else message
        self._report = replace(
            self._report, outcome=outcome, message=message, seconds=dict(self.clock.seconds)
        )
        return self._report

    def nothing(self, why: str) -> TrainReport:
        """Nothing to train on. Where what an earlier pass staged has taken over, that is the update."""
        if (resumed := self._report.resumed_version) is None:
            return self.report(Outcome.NOTHING, why)
        message = f"version {resumed}, which an earlier pass staged, serves; {why}"
        return self.report(Outcome.TRAINED, message)

    def preview(self) -> TrainReport:
        """What a pass would train on; nothing is taken, and verl is not loaded."""
        demonstrated = self.settings.train.learns_from_demonstrations
        limit = self.settings.train.max_rollouts
        recorded = self.store.preview(self.policy, limit, demonstrated=demonstrated)
        found = self.choose(recorded, self.store.active_version(self.policy))
        self._count(found.trajectories(), given_back=0)  # nothing was taken
        counts = self._report.counts
        waiting = self.store.backlog(self.policy, demonstrated=demonstrated)
        enough = (
            "" if len(recorded) >= self.settings.train.min_rollouts else f"; {self._too_few(len(recorded))}"
        )
        lacking = {"unrewarded": waiting.rollouts_unrewarded, "held": waiting.rollouts_held}
        why = self._repetition() or advice(self._report, **lacking)
        return self.report(
            Outcome.DRY_RUN,
            f"{waiting.rollouts_ready} {self._ready} rollouts wait, {waiting.rollouts_unrewarded} have no "
            f"reward yet; {counts['rollouts']} of them could be trained on, in {counts['rows']} rows{enough}"
            + (f"; {why}" if why else ""),
        )

    def promote_staged(self) -> bool:
        """Promote a version that an earlier pass staged and could not promote. False: it still waits."""
        staged = self.store.staged_version(self.policy)
        if staged is None:
            return True
        if self._expect_in_line(staged.version).status is VersionStatus.REJECTED:
            return True
        self.progress(f"version {staged.version} was staged by an earlier run: promoting it first")
        if not Path(staged.path).is_dir():
            self.store.withdraw_version(
                self.policy, staged.version, f"its weights are gone from {staged.path}"
            )
            return True
        outcome = self.promote(staged.version)
        if outcome is Outcome.TRAINED:
            self._update(resumed_version=staged.version)
        return outcome is not Outcome.STAGED_ONLY

    def reward_automatically(self) -> None:
        """Enter the rewards that the traffic itself gives, where the settings ask for some."""
        automatic = AutomaticRewards(self.settings.automatic_rewards, self.store)
        if not automatic.on:
            return
        with self.clock.phase("automatic rewards"):
            entered = automatic.enter(self.policy, self.progress)
        if entered.judged:
            self._update(automatic=asdict(entered))

    def expect_enough(self) -> None:
        """Raise ``NothingToTrain`` where a run would find too little, without taking a lease for that."""
        newest = self.store.list_runs(self.policy, limit=1)
        if newest and newest[0].state is RunState.RUNNING:
            return  # it holds what the backlog lacks: beginning a run says who, or takes over
        waiting = self.store.backlog(self.policy, demonstrated=self.settings.train.learns_from_demonstrations)
        if waiting.rollouts_ready < self.settings.train.min_rollouts:
            none = not waiting.rollouts_ready
            lacking = {"unrewarded": waiting.rollouts_unrewarded, "held": waiting.rollouts_held}
            why = advice(self._report, **lacking) if none else None
            raise NothingToTrain(self._too_few(waiting.rollouts_ready) + (f"; {why}" if why else ""))

    def expect_something_new(self, before: TrainReport | None) -> None:
        """Raise ``NothingToTrain`` where this pass would only repeat a run whose result was refused; or the
        pass ``before``, which gave all back that it drained.
        """
        if (why := self._repetition()) is not None:
            raise NothingToTrain(why)
        if before is None or before.outcome is not Outcome.NOTHING or before.run_id is not None:
            return
        if before.work is not None and before.work == self._name_of_work():
            self._update(work=before.work)
            raise NothingToTrain(before.message)

    def _repetition(self) -> str | None:
        """Which refused run a pass would repeat, and what changes that; ``None`` where it would not."""
        for newest in self.store.list_runs(self.policy, limit=1):
            work = newest.report.get("work") if newest.state is RunState.FAILED else None
            if work is not None and work == self._name_of_work():
                return (
                    f"nothing is new since run {newest.run_id}, and another would come to the same: "
                    f"{newest.error}. It waits for more rewards or other settings; `lightning-proxy train "
                    "--retry` repeats it all the same"
                )
        return None

    def _name_of_work(self) -> str:
        """A name for what a pass would do now: the same weights, rollouts and settings come to the same."""
        train, active = self.settings.train, self.store.active_version(self.policy)
        ready = self.store.name_of_ready(
            self.policy, train.max_rollouts, demonstrated=train.learns_from_demonstrations
        )
        settings = self.settings.model_dump_json(include=_DECISIVE)
        work = f"{active.version if active else 0} {ready} {settings}"
        return hashlib.sha256(work.encode()).hexdigest()

    def starting_version(self) -> PolicyVersion:
        """The version that serves, else the model of the settings as version 0.

        Read under the lease: whatever takes over later is noticed when the run is committed.
        """
        if (staged := self.store.staged_version(self.policy)) is not None:
            raise Conflict(
                f"version {staged.version} of {self.policy!r} was staged meanwhile, by another trainer: what "
                "was made from its parent could not follow it. The next pass sees to it first"
            )
        active = self.store.active_version(self.policy)
        if active is None:
            model = self.settings.policy.model
            if model is None:
                raise TrainingError(
                    f"there are no weights to begin with for the policy {self.policy!r}: give [policy] model "
                    "in lightning.toml, or let `lightning-proxy serve --model PATH` enter them"
                )
            active = self.store.add_base_version(self.policy, model.resolve())
        if not Path(active.path).is_dir():
            raise TrainingError(f"the weights of version {active.version} are not at {active.path}")
        self._update(parent=active.version)
        return active

    def drain(self, lease: Lease) -> list[RecordedRollout]:
        """Take what waits; ``NothingToTrain``, which gives it back, where that is too little."""
        lease.work = self._name_of_work()
        with self.clock.phase("drain"):
            recorded = self.store.drain(
                lease.run_id,
                limit=self.settings.train.max_rollouts,
                demonstrated=self.settings.train.learns_from_demonstrations,
            )
        self._update(run_id=lease.run_id, work=lease.work)
        if len(recorded) < self.settings.train.min_rollouts:
            raise NothingToTrain(self._too_few(len(recorded)))
        self.progress(f"drained {len(recorded)} {self._ready} rollouts")
        return recorded

    def choose(self, recorded: Sequence[RecordedRollout], parent: PolicyVersion | None) -> Chosen:
        """What of the drained can be trained on, and what else there is to say of it."""
        with self.clock.phase("prepare"):
            found: Chosen = self.algorithm.choose(recorded, parent)
        self._update(**found.for_report())
        return found

    def prepare(self, found: Chosen) -> Batch | None:
        """Rows; ``None`` where there is nothing to train on."""
        batch = self.algorithm.batch(found)
        if batch is not None:
            self._count(batch.trajectories)
            counts = self._report.counts
            self.progress(
                f"training on {found.subject}: {counts['rows']} rows, {counts['tokens_trained']} tokens "
                f"(left out: {self._left_out_in_words()})"
            )
        return batch

    def commit_nothing(self, lease: Lease, found: Chosen) -> TrainReport:
        """Consume what can never be trained on. Where nothing is left to consume, there was no run."""
        why = advice(self._report)
        message = f"nothing to train on: {self._left_out_in_words()}" + (f"; {why}" if why else "")
        report = self.report(Outcome.NOTHING, message)
        if self.store.drop_run(lease.run_id):
            self._update(run_id=None)  # all of it waits for company: there was no run worth telling of
        else:
            lease.commit(report=report.as_dict(), version=None, groups=found.keys)
        return self.nothing(message)

    def collapse(self, found: Chosen) -> Collapse | None:
        """What the drained rollouts say against an update, if anything (``guard``)."""
        looks, settings = self._looks(), self.settings.guard
        there = self._versions_there() if looks else frozenset[int]()
        return guard.collapse(found.look, looks, settings, mixed=found.mixed, equal=found.equal, there=there)

    def _versions_there(self) -> frozenset[int]:
        """The versions that have served, or do, and whose weights are still on disk."""
        served = (VersionStatus.ACTIVE, VersionStatus.RETIRED)
        return frozenset(
            each.version
            for each in self.store.list_versions(self.policy)
            if each.status in served and Path(each.path).is_dir()
        )

    def _looks(self) -> list[Look]:
        """What earlier runs saw, oldest first; one that saw nothing new has no place among them."""
        reports = self.store.reports_with_rewards(self.policy, self.settings.guard.window)
        looks = [Look.at(report) for report in reversed(reports)]
        return [look for look in looks if look is not None]

    def stop(self, lease: Lease, found: Chosen, collapse: Collapse) -> TrainReport:
        """Consume what was drained without an update; go back to the best version where that is wanted.

        That first: until this run is committed, no other one begins with the version that is left.
        """
        report = self.report(Outcome.GUARDED, f"nothing is trained: {collapse.message}")
        self.progress(report.message)
        best = collapse.best
        if best is not None and self.settings.guard.roll_back and best != report.parent:
            report = self.report(Outcome.GUARDED, f"{report.message}; {self._go_back_to(best)}")
        lease.commit(report=report.as_dict(), version=None, groups=found.keys)
        return report

    def _go_back_to(self, version: int) -> str:
        """Have the proxy do it; what came of it, in words."""
        url, token = self.settings.train.proxy_url, self.settings.proxy.token
        try:
            roll_back(url, self.policy, version, token=token, timeout_s=self._promote_timeout_s())
        except PublishFailed as error:
            return f"that failed: {error}"
        return f"version {version} serves again"

    def _promote_timeout_s(self) -> float:
        return self.settings.proxy.hold_timeout_s + _PROMOTE_MARGIN_S

    def open(self, engine: WarmBackend, parent: PolicyVersion) -> Backend:
        """The update engine on the parent's weights."""
        with self.clock.phase("load"):
            backend = engine.at(self.settings, parent)
        self._update(optimizer=engine.optimizer)
        return backend

    def compare(self, backend: Backend, batch: Batch, parent: PolicyVersion) -> Rows:
        """The rows with what the loss needs of the weights before the update."""
        rows: Rows = self.algorithm.compare(backend, batch.rows, parent)
        return rows

    def update(self, backend: Backend, rows: Rows, parent: PolicyVersion) -> None:
        """All epochs over all mini-batches; ``CheckpointInvalid`` where a step was not finite."""
        train = self.settings.train
        steps: list[Mapping[str, float]] = []
        with self.clock.phase("update"):
            for epoch in range(train.epochs):
                generator = np.random.default_rng([train.seed, parent.version, epoch])
                mini_batches = split_mini_batches(rows.rollouts, train.mini_batch_rows, generator)
                weighed = self.algorithm.weigh(rows, len(mini_batches))
                for number, chosen in enumerate(mini_batches):
                    self.progress("updating", (epoch + number / len(mini_batches)) / train.epochs)
                    steps.append(self.algorithm.step(backend, weighed.select(chosen)))
            self.progress("updating", 1.0)
        means = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
        self._update(metrics={"steps": len(steps), **means, "first": dict(steps[0])})
        self.progress(
            f"{len(steps)} steps: {self.algorithm.in_words(means)}, gradient norm {means['grad_norm']:.4g}"
        )
        guard.check_steps(steps, self.settings.guard)
        if after := self.algorithm.after(backend, rows):
            self._update(metrics={**self._report.metrics, "after": dict(after)})
            self.progress(f"after the update: {self.algorithm.in_words(after)}")

    def export(
        self, backend: Backend, engine: WarmBackend, rows: Rows, parent: PolicyVersion, lease: Lease
    ) -> PolicyVersion:
        """Write and validate the new version, with the probe that the proxy verifies it by."""
        number = self.store.next_version(self.policy)
        assert engine.lineage is not None  # the engine is open
        train, present = self.settings.train, self.store.list_versions(self.policy)
        clear_leftovers(train, self.policy, present, self._has_ended)
        with self.clock.phase("export"):
            probe_rows = rows.first_tokens(_PROBE_TOKENS)
            logprobs = [float(value) for value in backend.logprobs(probe_rows)[1:]]
            guard.check_probe(logprobs)
            path = write_version(
                version_directory(train, self.policy, number, lease.run_id),
                backend,
                base=Path(parent.path),
                lineage=engine.lineage,
            )
        self._update(version=number)
        self.progress(f"wrote version {number} to {path}")
        return PolicyVersion(
            self.policy,
            number,
            str(path),
            VersionStatus.STAGED,
            parent=parent.version,
            probe={"prompt_token_ids": probe_rows.tokens.tolist(), "logprobs": logprobs},
        )

    def _has_ended(self, run_id: int) -> bool:
        """False for a run that this database does not know: it is of another one, which may need it."""
        try:
            run = self.store.get_run(run_id)
        except UnknownTarget:
            return False
        return run.policy == self.policy and run.state is not RunState.RUNNING

    def promote(self, version: int) -> Outcome:
        """Have the proxy take the version over; clear away what is not needed once it has, or has not."""
        settings = self.settings
        failure: PublishFailed | None = None
        with self.clock.phase("promote"):
            try:
                answer = promote(
                    settings.train.proxy_url,
                    self.policy,
                    version,
                    token=settings.proxy.token,
                    timeout_s=self._promote_timeout_s(),
                )
                self._update(promotion=dict(answer))
            except PublishFailed as error:
                failure = error
        # The store is the truth: an answer can be lost after the deed.
        present = self._expect_in_line(version)
        if present.status is VersionStatus.REJECTED:
            return Outcome.REJECTED
        if failure is not None and present.status is not VersionStatus.ACTIVE:
            self._say(f"version {version} is staged, the next `lightning-proxy train` promotes it: {failure}")
            return Outcome.STAGED_ONLY
        self._say(f"version {version} serves")
        self._clear_away()
        return Outcome.TRAINED

    def _clear_away(self) -> None:
        there = self._versions_there()
        best = guard.best_of([look for look in self._looks() if look.version in there])
        keep = frozenset() if best is None else frozenset((best.version,))
        clear_away(self.settings.train, self.policy, self.store.list_versions(self.policy), keep=keep)

    def _expect_in_line(self, version: int) -> PolicyVersion:
        """The version as it is now; one that would follow another than serves is rejected first."""
        present = self.store.reject_if_out_of_line(self.policy, version)
        if present.status is VersionStatus.REJECTED:
            self._say(f"version {version} was rejected and what it was trained on given back: {present.note}")
            self._clear_away()
        return present

    def _count(self, trajectories: Sequence[Trajectory], **others: int) -> None:
        rows = {
            "rows": len(trajectories),
            "tokens": sum(len(row.token_ids) for row in trajectories),
            "tokens_trained": sum(row.trained_tokens for row in trajectories),
        }
        self._update(counts={**self._report.counts, **rows, **others})

    @property
    def _ready(self) -> str:
        return "rewarded or demonstrated" if self.settings.train.learns_from_demonstrations else "rewarded"

    def _left_out_in_words(self) -> str:
        parts = [
            f"{number} {kind} ({reason.replace('_', ' ')})"
            for kind, reasons in self._report.left_out.items()
            for reason, number in reasons.items()
        ]
        return ", ".join(parts) or "nothing"

    def _too_few(self, ready: int) -> str:
        least = self.settings.train.min_rollouts
        return f"{ready} {self._ready} rollouts wait, [train] min_rollouts asks for {least}"

    def _say(self, message: str) -> None:
        self._update(message=message)
        self.progress(message)

    def _update(self, **values: Any) -> None:
        self._report = replace(self._report, **values)
