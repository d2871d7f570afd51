from __future__ import annotations

import pytest

from lightning_proxy.errors import Conflict, UnknownTarget
from lightning_proxy.store import PolicyVersion, RunState, Store, VersionStatus
from tests.store.support import POLICY, add_ready_rollout


def stage(store: Store, version: int, parent: int | None = 0) -> int:
    """Run the trainer up to a staged version; returns the run's id."""
    run = store.begin_run(POLICY, owner="here:1", lease_s=60)
    store.drain(run.run_id, limit=100)
    made = PolicyVersion(
        POLICY,
        version,
        f"/weights/{version}",
        VersionStatus.STAGED,
        parent=parent,
        probe={"logprobs": [-0.5]},
    )
    store.commit_run(run.run_id, report={}, version=made)
    return run.run_id


def statuses(store: Store) -> dict[int, str]:
    return {version.version: version.status.value for version in store.list_versions(POLICY)}


def test_the_base_version_is_active_and_entered_once(store: Store) -> None:
    base = store.add_base_version(POLICY, "/weights/base")
    assert (base.version, base.status, base.parent) == (0, VersionStatus.ACTIVE, None)
    assert store.add_base_version(POLICY, "/weights/base") == base
    with pytest.raises(Conflict, match="/weights/base"):
        store.add_base_version(POLICY, "/weights/other")
    assert store.list_versions() == [base]


def test_a_policy_that_nobody_entered_has_nothing(store: Store) -> None:
    assert store.active_version(POLICY) is None
    assert store.staged_version(POLICY) is None
    assert store.list_versions(POLICY) == []
    assert store.next_version(POLICY) == 0
    with pytest.raises(UnknownTarget, match="version 0 of the policy 'policy'"):
        store.get_version(POLICY, 0)


def test_activating_a_staged_version_retires_the_former_one(store: Store) -> None:
    store.add_base_version(POLICY, "/weights/0")
    run_id = stage(store, 1)
    staged = store.staged_version(POLICY)
    assert staged is not None
    assert (staged.run_id, staged.probe, staged.parent) == (run_id, {"logprobs": [-0.5]}, 0)
    assert store.next_version(POLICY) == 2
    active = store.activate_version(POLICY, 1, note="replaced by 1")
    assert active == store.active_version(POLICY)
    assert statuses(store) == {1: "active", 0: "retired"}
    assert store.get_version(POLICY, 0).note == "replaced by 1"
    assert store.staged_version(POLICY) is None


def test_a_retired_version_can_serve_again(store: Store) -> None:
    store.add_base_version(POLICY, "/weights/0")
    stage(store, 1)
    store.activate_version(POLICY, 1)
    back = store.activate_version(POLICY, 0, note="rolled back")
    assert back.note is None
    assert statuses(store) == {1: "retired", 0: "active"}
    assert store.activate_version(POLICY, 0) == back


def test_rejecting_a_version_gives_back_what_its_run_drained(store: Store) -> None:
    store.add_base_version(POLICY, "/weights/0")
    add_ready_rollout(store, "r1")
    run_id = stage(store, 1)
    assert store.preview(POLICY, 10) == []
    store.reject_version(POLICY, 1, "logprobs differ by 0.3")
    store.reject_version(POLICY, 1, "again")
    assert statuses(store) == {1: "rejected", 0: "active"}
    assert store.get_version(POLICY, 1).note == "logprobs differ by 0.3"
    run = store.get_run(run_id)
    assert run.state is RunState.FAILED
    assert run.error == "version 1 was rejected: logprobs differ by 0.3"
    assert [each.rollout.rollout_id for each in store.preview(POLICY, 10)] == ["r1"]
    assert store.next_version(POLICY) == 2


def test_a_rejected_version_never_serves_and_a_serving_one_is_not_rejected(store: Store) -> None:
    store.add_base_version(POLICY, "/weights/0")
    stage(store, 1)
    store.reject_version(POLICY, 1, "bad")
    with pytest.raises(Conflict, match="rejected: bad"):
        store.activate_version(POLICY, 1)
    with pytest.raises(Conflict, match="active"):
        store.reject_version(POLICY, 0, "bad")
    with pytest.raises(UnknownTarget):
        store.reject_version(POLICY, 7, "bad")


def test_a_version_is_staged_behind_the_one_that_serves_and_behind_no_other(store: Store) -> None:
    stage(store, 1, parent=None)  # a policy may begin with what a run made
    with pytest.raises(Conflict, match="version 1 of 'policy' was staged meanwhile"):
        stage(store, 2, parent=None)
    store.activate_version(POLICY, 1)
    for parent, made_from in ((0, "version 0"), (None, "no other version")):
        expire(store)
        with pytest.raises(Conflict, match=f"2 of 'policy' .* made from {made_from}, but version 1 serves"):
            stage(store, 2, parent=parent)
    assert statuses(store) == {1: "active"}
    expire(store)
    stage(store, 2, parent=1)


def expire(store: Store) -> None:
    """End the run that was refused, as its lease does."""
    for run in store.list_runs(POLICY):
        if run.state is RunState.RUNNING:
            store.fail_run(run.run_id, "refused")


def test_what_a_refused_run_drained_waits_for_another(store: Store) -> None:
    store.add_base_version(POLICY, "/weights/0")
    add_ready_rollout(store, "r1")
    with pytest.raises(Conflict):
        stage(store, 1, parent=7)
    expire(store)
    assert store.list_runs(POLICY)[0].state is RunState.FAILED
    assert [each.rollout.rollout_id for each in store.preview(POLICY, 10)] == ["r1"]


def test_a_staged_version_takes_over_from_its_parent_only(store: Store) -> None:
    """An operator goes back to 0 while version 2, made from 1, waits."""
    store.add_base_version(POLICY, "/weights/0")
    stage(store, 1)
    store.activate_version(POLICY, 1)
    add_ready_rollout(store, "r1")
    stage(store, 2, parent=1)
    assert store.reject_if_out_of_line(POLICY, 2).status is VersionStatus.STAGED
    store.activate_version(POLICY, 0)
    with pytest.raises(Conflict, match=r"version 2 of 'policy' .* made from version 1, but version 0 serves"):
        store.activate_version(POLICY, 2)
    rejected = store.reject_if_out_of_line(POLICY, 2)
    assert rejected.status is VersionStatus.REJECTED
    assert rejected.note == "it was made from version 1, but version 0 serves now"
    assert [each.rollout.rollout_id for each in store.preview(POLICY, 10)] == ["r1"]
    assert store.activate_version(POLICY, 1).version == 1, "one that has served may serve again"
    assert store.reject_if_out_of_line(POLICY, 0).status is VersionStatus.RETIRED


def test_the_newest_staged_version_comes_first_and_policies_do_not_mix(store: Store) -> None:
    store.add_base_version(POLICY, "/weights/0")
    store.add_base_version("other", "/weights/other")
    stage(store, 1)
    with store.transaction():  # as older databases may have it
        store.insert_version(PolicyVersion(POLICY, 2, "/weights/2", VersionStatus.STAGED, parent=1))
    staged = store.staged_version(POLICY)
    assert staged is not None
    assert staged.version == 2
    assert [(each.policy, each.version) for each in store.list_versions()] == [
        ("other", 0),
        (POLICY, 2),
        (POLICY, 1),
        (POLICY, 0),
    ]
    assert store.staged_version("other") is None
