from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from lightning_proxy.errors import Conflict, InvalidInput, LeaseHeld, LeaseLost, UnknownTarget
from lightning_proxy.store import (
    Backlog,
    PolicyVersion,
    RecordedRollout,
    RolloutState,
    RunState,
    Store,
    TrainingRun,
    VersionStatus,
)
from tests.store.support import POLICY, add_ready_rollout, make_span, output_of, start_script


def begin(store: Store, policy: str = POLICY, lease_s: float = 60.0) -> TrainingRun:
    return store.begin_run(policy, owner="here:1", lease_s=lease_s)


def ids(recorded: list[RecordedRollout]) -> list[str]:
    return [each.rollout.rollout_id for each in recorded]


def version(number: int = 1, policy: str = POLICY, parent: int | None = 0) -> PolicyVersion:
    return PolicyVersion(policy, number, f"/weights/{number}", VersionStatus.STAGED, parent=parent)


def test_a_run_begins_running_with_its_lease(store: Store) -> None:
    run = begin(store, lease_s=30)
    assert (run.policy, run.state, run.owner) == (POLICY, RunState.RUNNING, "here:1")
    assert run.lease_expires_at - run.started_at == pytest.approx(30, abs=1)
    assert store.list_runs(POLICY) == [run]
    assert store.get_run(run.run_id) == run


def test_a_second_run_of_a_policy_hears_who_holds_the_lease(store: Store) -> None:
    run = begin(store)
    with pytest.raises(
        LeaseHeld, match=rf"here:1 is training 'policy' since .*\(run {run.run_id}\).*runs out at"
    ):
        begin(store)
    begin(store, "another policy")


@pytest.mark.parametrize("lease_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_lease_is_a_positive_number_of_seconds(store: Store, lease_s: float) -> None:
    with pytest.raises(InvalidInput, match="lease"):
        begin(store, lease_s=lease_s)


def test_a_drain_gives_the_oldest_with_all_that_a_trainer_needs(store: Store) -> None:
    for index in range(5):
        add_ready_rollout(store, f"r{index}", value=index)
    second = store.add_span(make_span(rollout_id="r1", started_at=5000.0))
    run = begin(store)
    drained = store.drain(run.run_id, limit=3)
    assert ids(drained) == ["r0", "r1", "r2"]
    assert [len(each.spans) for each in drained] == [1, 2, 1]
    assert drained[1].spans[1].span_id == second
    assert drained[1].spans[0].generations == make_span().generations
    assert [each.rewards[0].value for each in drained] == [0, 1, 2]
    assert ids(store.drain(run.run_id, limit=3)) == ["r3", "r4"]
    assert store.drain(run.run_id, limit=3) == []


def test_a_drain_leaves_what_is_not_ready(store: Store) -> None:
    store.add_span(make_span(rollout_id="unrewarded"))
    store.create_rollout(rollout_id="no span")
    store.add_reward(value=1.0, rollout_id="no span")
    add_ready_rollout(store, "of another policy", policy="other")
    add_ready_rollout(store, "of no policy", policy=None)
    add_ready_rollout(store, "retried and silent")
    store.issue_key("retried and silent", attempt=2)
    add_ready_rollout(store, "ready")
    assert ids(store.drain(begin(store).run_id, limit=10)) == ["ready"]


def test_a_drain_gives_only_the_last_attempt_and_its_rewards(store: Store) -> None:
    first, second = store.add_span(make_span()), store.add_span(make_span(attempt=2))
    store.add_reward(value=0.0, rollout_id="r1", attempt=1)
    store.add_reward(value=0.1, span_id=first)
    assert store.preview(POLICY, 10) == []
    store.add_reward(value=0.2, span_id=second)
    (recorded,) = store.drain(begin(store).run_id, limit=10)
    assert recorded.attempt == 2
    assert [span.span_id for span in recorded.spans] == [second]
    assert [reward.value for reward in recorded.rewards] == [0.2]


def test_a_drain_gives_failed_incomplete_and_open_rollouts_alike_for_the_trainer_to_judge(
    store: Store,
) -> None:
    for rollout_id in ("open", "failed", "incomplete"):
        add_ready_rollout(store, rollout_id)
    store.finish_rollout("failed", RolloutState.FAILED)
    store.mark_incomplete("incomplete", "a span was dropped")
    drained = store.drain(begin(store).run_id, limit=10)
    assert ids(drained) == ["open", "failed", "incomplete"]
    assert drained[2].rollout.incomplete == "a span was dropped"


def test_a_preview_takes_nothing(store: Store) -> None:
    add_ready_rollout(store, "r1")
    assert (
        store.preview(POLICY, 10) == store.preview(POLICY, 10) == store.drain(begin(store).run_id, limit=10)
    )


def test_a_policy_does_not_consume_for_another(store: Store) -> None:
    add_ready_rollout(store, "r1")
    store.add_span(make_span(policy="other"))
    assert ids(store.drain(begin(store).run_id, limit=10)) == ["r1"]
    assert ids(store.drain(begin(store, "other").run_id, limit=10)) == ["r1"]


def test_a_committed_run_has_consumed_and_staged(store: Store) -> None:
    store.add_base_version(POLICY, "/weights/0")
    add_ready_rollout(store, "r1")
    run = begin(store)
    store.drain(run.run_id, limit=10)
    store.commit_run(run.run_id, report={"loss": 0.5}, version=version())
    done = store.get_run(run.run_id)
    assert (done.state, done.report) == (RunState.COMMITTED, {"loss": 0.5})
    assert done.ended_at is not None
    staged = store.staged_version(POLICY)
    assert staged is not None
    assert staged.run_id == run.run_id
    assert staged.created_at > 0
    assert store.drain(begin(store).run_id, limit=10) == []


def test_a_run_may_commit_without_a_version(store: Store) -> None:
    run = begin(store)
    store.commit_run(run.run_id, report={"reason": "no spread"}, version=None)
    assert store.list_versions(POLICY) == []


@pytest.mark.parametrize(("made", "error"), [(version(0), Conflict), (version(1, "other"), InvalidInput)])
def test_a_commit_with_an_impossible_version_changes_nothing(
    store: Store, made: PolicyVersion, error: type[Exception]
) -> None:
    store.add_base_version(POLICY, "/weights/0")
    run = begin(store)
    with pytest.raises(error):
        store.commit_run(run.run_id, report={}, version=made)
    assert store.get_run(run.run_id) == run


def test_a_failed_run_gives_back_all_it_drained(store: Store) -> None:
    add_ready_rollout(store, "r1")
    run = begin(store)
    store.drain(run.run_id, limit=10)
    store.fail_run(run.run_id, "out of memory", report={"rollouts": 1})
    store.fail_run(run.run_id, "again")
    failed = store.get_run(run.run_id)
    assert (failed.state, failed.error, failed.report) == (RunState.FAILED, "out of memory", {"rollouts": 1})
    assert ids(store.drain(begin(store).run_id, limit=10)) == ["r1"]


def test_a_run_that_has_ended_can_do_nothing_more(store: Store) -> None:
    run = begin(store)
    store.commit_run(run.run_id, report={}, version=None)
    with pytest.raises(Conflict, match="committed"):
        store.fail_run(run.run_id, "late")
    for late in (
        lambda: store.drain(run.run_id, limit=1),
        lambda: store.renew_lease(run.run_id, 10),
        lambda: store.give_back(run.run_id, ["r1"]),
        lambda: store.commit_run(run.run_id, report={}, version=None),
    ):
        with pytest.raises(LeaseLost, match="is committed"):
            late()


def test_what_is_given_back_is_for_a_later_run(store: Store) -> None:
    for index in range(3):
        add_ready_rollout(store, f"r{index}")
    run = begin(store)
    store.drain(run.run_id, limit=10)
    store.give_back(run.run_id, ["r0", "r2", "unknown"])
    store.commit_run(run.run_id, report={}, version=None)
    assert ids(store.drain(begin(store).run_id, limit=10)) == ["r0", "r2"]


def test_a_run_that_gave_all_back_can_be_forgotten_and_no_other(store: Store) -> None:
    for index in range(2):
        add_ready_rollout(store, f"r{index}")
    run = begin(store)
    store.drain(run.run_id, limit=10)
    store.give_back(run.run_id, ["r0"])
    assert not store.drop_run(run.run_id)
    assert store.get_run(run.run_id) == run
    store.give_back(run.run_id, ["r1"])
    assert store.drop_run(run.run_id)
    assert store.list_runs(POLICY) == []
    assert begin(store).run_id > run.run_id, "its number is not given away again"
    with pytest.raises(UnknownTarget):
        store.drop_run(run.run_id)


def test_what_waits_has_another_name_as_soon_as_any_of_it_changes(store: Store) -> None:
    names = [store.name_of_ready(POLICY, 10)]
    add_ready_rollout(store, "r0")
    names.append(store.name_of_ready(POLICY, 10))
    store.add_reward(value=0.5, rollout_id="r0")
    names.append(store.name_of_ready(POLICY, 10))
    store.add_span(make_span(rollout_id="r0", response_id="another"))
    names.append(store.name_of_ready(POLICY, 10))
    assert len(set(names)) == 4
    store.add_span(make_span(rollout_id="unrewarded", response_id="a third"))
    assert store.name_of_ready(POLICY, 10) == names[-1]
    run = begin(store)
    assert store.name_of_ready(POLICY, 10) == names[-1]
    store.drain(run.run_id, limit=10)
    store.fail_run(run.run_id, "back again")
    assert store.name_of_ready(POLICY, 10) == names[-1]
    store.commit_run(begin(store).run_id, report={}, version=None)
    assert store.name_of_ready(POLICY, 10) != names[-1], "what it is compared with may be another"


def test_a_lease_that_ran_out_passes_everything_to_the_next_run(store: Store) -> None:
    add_ready_rollout(store, "r1")
    lost = begin(store)
    store.drain(lost.run_id, limit=10)
    store.renew_lease(lost.run_id, 0.01)
    time.sleep(0.02)
    with pytest.raises(LeaseLost, match="ran out at"):
        store.commit_run(lost.run_id, report={}, version=version())
    run = begin(store)
    assert ids(store.drain(run.run_id, limit=10)) == ["r1"]
    assert store.get_run(lost.run_id).error == "its lease ran out"
    with pytest.raises(LeaseLost, match="its lease ran out"):
        store.commit_run(lost.run_id, report={}, version=version())
    store.fail_run(lost.run_id, "late")
    assert store.get_run(lost.run_id).error == "its lease ran out"
    store.commit_run(run.run_id, report={}, version=version(parent=None))


def test_a_renewed_lease_lasts(store: Store) -> None:
    run = begin(store, lease_s=10)
    store.renew_lease(run.run_id, 60)
    assert store.get_run(run.run_id).lease_expires_at >= run.started_at + 60
    with pytest.raises(InvalidInput, match="lease"):
        store.renew_lease(run.run_id, 0)


def test_an_unknown_run_is_named(store: Store) -> None:
    with pytest.raises(UnknownTarget, match="no training run 7"):
        store.drain(7, limit=1)


def test_the_backlog_counts_what_waits(store: Store) -> None:
    assert store.backlog(POLICY) == Backlog(0, 0, 0)
    add_ready_rollout(store, "r1")
    add_ready_rollout(store, "r2")
    store.add_span(make_span(rollout_id="r2"))
    store.add_span(make_span(rollout_id="r2", policy=None))
    store.add_span(make_span(rollout_id="unrewarded"))
    assert store.backlog(POLICY) == Backlog(rollouts_ready=2, rollouts_unrewarded=1, spans=3)
    store.drain(begin(store).run_id, limit=1)
    assert store.backlog(POLICY) == Backlog(rollouts_ready=1, rollouts_unrewarded=1, spans=2)


def test_runs_are_listed_newest_first(store: Store) -> None:
    runs = [begin(store, f"p{index}") for index in range(3)]
    assert [run.run_id for run in store.list_runs()] == [run.run_id for run in runs[::-1]]
    assert len(store.list_runs(limit=2)) == 2
    assert store.list_runs("p1") == [runs[1]]


_RACER = """
import os, random, sys, time
from lightning_proxy.errors import Conflict, LeaseHeld, LeaseLost
from lightning_proxy.store import PolicyVersion, Store, VersionStatus

path, seed = sys.argv[1], int(sys.argv[2])
chance = random.Random(seed)
with Store.open(path) as store:
    while True:
        try:
            run = store.begin_run("policy", owner=str(seed), lease_s=0.25)
        except LeaseHeld:
            time.sleep(0.005)
            continue
        try:
            drained = [each.rollout.rollout_id for each in store.drain(run.run_id, limit=4)]
            if not drained:  # nobody else holds anything: this run is the only one
                store.commit_run(run.run_id, report={}, version=None)
                break
        except LeaseLost:  # so slow can a busy machine be
            continue
        what = chance.choice(["commit", "commit", "fail", "give back", "reject", "oversleep", "die"])
        if what == "die":
            os._exit(9)
        if what == "fail":
            store.fail_run(run.run_id, "on purpose")
            continue
        if what == "oversleep":
            time.sleep(0.3)
        kept = drained
        try:
            if what == "give back":
                store.give_back(run.run_id, drained[:1])
                kept = drained[1:]
            with store.transaction():
                number, active = store.next_version("policy"), store.active_version("policy")
                made = PolicyVersion("policy", number, "/weights", VersionStatus.STAGED,
                                     parent=None if active is None else active.version)
                store.commit_run(run.run_id, report={"trained": kept}, version=made)
        except LeaseLost:
            continue
        except Conflict:  # another one waits to take over
            store.fail_run(run.run_id, "overtaken")
            continue
        if what == "reject":
            store.reject_version("policy", number, "on purpose")
        else:
            store.activate_version("policy", number)
"""


def test_racing_processes_that_fail_and_die_consume_every_rollout_exactly_once(
    store: Store, db: Path
) -> None:
    expected = {f"r{index}" for index in range(60)}
    for rollout_id in sorted(expected):
        add_ready_rollout(store, rollout_id)
    seeds = random.sample(range(10_000), 40)
    racing = [start_script(_RACER, db, str(seeds.pop())) for _ in range(3)]
    deaths = 0
    while racing and seeds:
        for process in racing[:]:
            if process.poll() is None:
                continue
            racing.remove(process)
            deaths += process.returncode == 9
            output_of(process, returncode=process.returncode if process.returncode == 9 else 0)
            if process.returncode == 9:
                racing.append(start_script(_RACER, db, str(seeds.pop())))
        time.sleep(0.01)
    assert not racing, "the processes did not come to an end"
    states = Counter((run.state, run.error) for run in store.list_runs(POLICY, limit=10_000))
    print(deaths, "processes died;", dict(states))
    committed = [run for run in store.list_runs(POLICY, limit=10_000) if run.state is RunState.COMMITTED]
    trained = Counter(rollout_id for run in committed for rollout_id in run.report.get("trained", []))
    assert trained == dict.fromkeys(expected, 1), f"after {deaths} deaths"
