"""What of the drained likelihood can be learnt from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_proxy.config.settings import PolicySettings, Settings
from lightning_proxy.config.train import TrainSettings
from lightning_proxy.errors import TrainingError
from lightning_proxy.store import Fidelity, Generation, Reward
from lightning_proxy.trainer.algorithms.candidates import candidates
from lightning_proxy.trainer.algorithms.demonstrations import demonstrations_of
from lightning_proxy.trainer.transitions import LeftOut, Terms
from tests.trainer.algorithms.making import Letters, shown
from tests.trainer.recording import POLICY, failed_span, generation, recorded, span

SETTINGS = Settings(policy=PolicySettings(name=POLICY), train=TrainSettings(algorithm="sft"))
CALL = generation([1, 2], [3, 4])


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": {"temperature": 0}},
        {"sampling": {"frequency_penalty": 1.0}},
        {"sampling": {"tool_choice": "required"}},
        {"fidelity": Fidelity.RETOKENIZED},
    ],
    ids=["greedy", "penalised", "constrained", "retokenized"],
)
def test_how_an_answer_was_sampled_does_not_matter(changes: dict[str, Any]) -> None:
    [kept] = candidates(
        [recorded("a", [span("a", CALL, **changes)], Reward("a", 1.0))], SETTINGS, None
    ).rollouts
    assert kept.transitions[0].sampling.temperature == 1.0
    assert not kept.transitions[0].logprobs_are_raw


def test_logprobs_that_nobody_told_are_unknown_not_certain() -> None:
    untold = Generation(CALL.prompt_token_ids, CALL.response_token_ids, CALL.logprobs[:0])
    each = recorded("a", [span("a", untold, fidelity=Fidelity.RETOKENIZED)], Reward("a", 1.0))
    [kept] = candidates([each], SETTINGS, None).rollouts
    assert all(map(math.isnan, kept.transitions[0].logprobs))


def test_a_return_that_another_run_has_consumed_is_none_of_this_one() -> None:
    each = replace(recorded("a", [span("a", CALL)], Reward("a", 1.0)), for_return=False)
    found = candidates([each], SETTINGS, None)
    assert (list(found.rollouts), found.reward_mean, found.left_out.as_dict()["rollouts"]) == ([], None, {})


def demonstrate(*demonstrations: Reward, **changes: Any) -> tuple[list[tuple[int | None, str]], LeftOut]:
    """Which call is answered how, in a rollout of two calls, one of another model, and one that failed."""
    spans = [
        span("a", CALL),
        span("a", generation([1, 2, 3, 4, 5], [6]), **changes),
        span("a", generation([7], [8]), policy=None),
        failed_span("a"),
    ]
    left_out = LeftOut()
    each = replace(recorded("a", spans), demonstrations=demonstrations)
    made = demonstrations_of([each], Terms(POLICY, 8, sampled=False), Letters, left_out)
    return [(one.right.span_id, "".join(map(chr, one.right.response_ids))) for one in made], left_out


def test_a_demonstration_is_for_its_call_or_for_the_last_that_ended_well() -> None:
    made, left_out = demonstrate(shown("of", span_id=1), shown("all"), shown("try", attempt=1))
    assert made == [(1, "of"), (2, "all"), (2, "try")]
    assert not left_out.demonstrations


@pytest.mark.parametrize(
    ("demonstration", "changes", "reason"),
    [
        (shown("x", span_id=99), {}, "no_call"),
        (shown("x", span_id=3), {}, "other_policy"),
        (shown("x", span_id=4), {}, "error"),
        (shown("x", span_id=2), {"redacted": "email"}, "redacted"),
        (shown("x", span_id=2), {"fidelity": Fidelity.TEXT}, "not_exact"),
        (shown("xxxx", span_id=2), {}, "too_long"),
        (shown("!"), {}, "unrenderable"),
    ],
)
def test_a_demonstration_that_cannot_be_used_is_counted(
    demonstration: Reward, changes: dict[str, Any], reason: str
) -> None:
    made, left_out = demonstrate(demonstration, **changes)
    assert (made, left_out.as_dict()["demonstrations"]) == ([], {reason: 1})


def test_the_last_call_of_a_rollout_that_lost_one_is_not_known() -> None:
    left_out = LeftOut()
    lost = recorded("a", [span("a", CALL)], incomplete="the disk was full")
    each = replace(lost, demonstrations=(shown("x"), shown("y", span_id=1)))
    made = demonstrations_of([each], Terms(POLICY, 8, sampled=False), Letters, left_out)
    assert [one.right.response_ids.tolist() for one in made] == [[ord("y")]]
    assert left_out.demonstrations == {"incomplete_rollout": 1}


def test_demonstrations_without_a_model_say_what_is_missing() -> None:
    each = replace(recorded("a", [span("a", CALL)]), for_return=False, demonstrations=(shown("x"),))
    with pytest.raises(TrainingError, match=r"give \[policy\] model"):
        candidates([each], SETTINGS, None)


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    nowhere = Settings(policy=PolicySettings(name=POLICY, model=tmp_path), train=SETTINGS.train)
    each = replace(recorded("a", [span("a", CALL)]), for_return=False, demonstrations=(shown("x"),))
    with pytest.raises(TrainingError, match="need the tokenizer of"):
        candidates([each], nowhere, None)
