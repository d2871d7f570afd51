"""What a pass says where there is nothing to learn from."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from lightning_proxy.trainer.advice import advice
from lightning_proxy.trainer.report import Outcome, TrainReport
from lightning_proxy.trainer.transitions import Reason


def report(rollouts: Mapping[str, int], calls: Mapping[str, int], trained: int = 0) -> TrainReport:
    return TrainReport(
        Outcome.NOTHING,
        "policy",
        "",
        counts={"rollouts": trained},
        left_out={"rollouts": rollouts, "calls": calls},
    )


@pytest.mark.parametrize(
    ("rollouts", "calls", "said"),
    [
        ({"no_transition": 4}, {"greedy": 8}, r"^all calls were at temperature 0.*\[\[exploration\]\]"),
        ({"no_transition": 4}, {"greedy": 6, "error": 2}, r"^most calls \(6 of 8\) were at temperature 0"),
        ({"no_transition": 4}, {"not_exact": 8}, r"^all calls .* token ids: .*\[proxy\] capture"),
        ({"no_transition": 4}, {"failure_truncated": 8}, r"masked for the failure truncated"),
        ({"no_transition": 4}, {"redacted": 8}, r"\[\[redaction\]\]"),
        ({"no_transition": 4}, {"error": 8}, r"^all calls ended in an error"),
        ({"group_all_equal": 8, "group_too_small": 1}, {}, r"^every group agrees"),
        ({"group_too_small": 8, "group_all_equal": 1}, {}, r"same task id.*--group-size"),
        ({"incomplete_rollout": 3}, {}, r"^capture lost calls"),
        ({"failure_upstream_error": 3}, {}, r"dropped for the failure upstream_error.*rollouts --failed"),
    ],
)
def test_it_says_what_most_of_it_is_due_to_and_what_would_change_it(
    rollouts: dict[str, int], calls: dict[str, int], said: str
) -> None:
    import re

    found = advice(report(rollouts, calls))
    assert found is not None
    assert re.search(said, found), found


def test_without_rewards_it_says_how_to_give_some() -> None:
    assert "none of the 5 recorded rollouts" in (advice(report({}, {}), unrewarded=5) or "")
    assert advice(report({}, {})) is None


def test_what_waits_for_its_group_is_spoken_of_before_missing_rewards() -> None:
    assert "3 wait for the rest of their group" in (advice(report({}, {}), unrewarded=5, held=3) or "")


def test_where_there_is_something_to_train_on_it_says_nothing() -> None:
    assert advice(report({"group_all_equal": 8}, {"greedy": 3}, trained=2), unrewarded=9) is None


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.NO_TRANSITION])
def test_every_reason_is_spoken_of_without_failing(reason: Reason) -> None:
    assert advice(report({reason: 1}, {})) is None or "None" not in str(advice(report({reason: 1}, {})))
    assert "calls" in str(advice(report({"no_transition": 1}, {reason: 1})))
