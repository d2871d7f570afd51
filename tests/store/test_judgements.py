"""Automatic rewards are entered with the note that they were, in one transaction."""

from __future__ import annotations

import pytest

from lightning_proxy.errors import UnknownTarget
from lightning_proxy.store import RolloutState, Store, Unjudged
from tests.store.support import POLICY, add_ready_rollout, make_span

NOW = 2000.0  # the spans of these tests ended at 1001.5


def unjudged(store: Store, *, kinds: str = "a b", quiet_since: float = NOW) -> list[str]:
    found = store.unjudged(POLICY, kinds=kinds, quiet_since=quiet_since)
    return sorted(each.rollout_id for each in found)


def test_what_ended_is_rewarded_or_is_quiet_is_there_until_it_is_judged(store: Store) -> None:
    store.add_span(make_span(rollout_id="open"))
    span_id = store.add_span(make_span(rollout_id="ended"))
    store.finish_rollout("ended", RolloutState.FAILED)
    add_ready_rollout(store, "rewarded")
    store.add_span(make_span(rollout_id="of another policy", policy="other"))
    assert unjudged(store) == ["ended", "open", "rewarded"]
    assert unjudged(store, quiet_since=500.0) == ["ended", "rewarded"]
    ended = store.unjudged(POLICY, kinds="a b", quiet_since=500.0)[0]
    assert ended == Unjudged("ended", 1, span_id, RolloutState.FAILED)
    assert store.enter_judgement(ended, "a b", [{"rollout_id": "ended", "value": 1.0}]) == 1
    assert unjudged(store, quiet_since=500.0) == ["rewarded"]
    assert unjudged(store, kinds="a b c", quiet_since=500.0) == ["ended", "rewarded"]


def test_a_further_call_an_end_and_a_further_attempt_ask_for_another_judgement(store: Store) -> None:
    def judge() -> None:
        [each] = store.unjudged(POLICY, kinds="a", quiet_since=NOW)
        store.enter_judgement(each, "a", [])
        assert unjudged(store, kinds="a") == []

    store.add_span(make_span())
    judge()
    store.add_span(make_span())
    judge()
    store.add_span(make_span(attempt=2))
    judge()
    store.finish_rollout("r1", RolloutState.SUCCEEDED)
    judge()


def test_a_judgement_that_cannot_be_entered_whole_is_not_entered(store: Store) -> None:
    store.add_span(make_span())
    [each] = store.unjudged(POLICY, kinds="a", quiet_since=NOW)
    with pytest.raises(UnknownTarget):
        store.enter_judgement(each, "a", [{"rollout_id": "r1", "value": 1.0}, {"span_id": 99, "value": 1.0}])
    assert store.list_rewards("r1") == []
    assert unjudged(store, kinds="a") == ["r1"]


def test_what_a_run_holds_or_has_consumed_is_not_judged(store: Store) -> None:
    add_ready_rollout(store, "r1")
    run = store.begin_run(POLICY, owner="here", lease_s=60)
    store.drain(run.run_id, limit=10)
    assert unjudged(store) == []
    store.fail_run(run.run_id, "boom")
    assert unjudged(store) == ["r1"]
