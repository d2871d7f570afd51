from __future__ import annotations

import pytest
from pydantic import ValidationError

from lightning_proxy.config import Settings
from lightning_proxy.config.consequences import (
    INFRASTRUCTURE,
    OTHERS,
    Consequence,
    Kind,
    consequence_of,
)
from lightning_proxy.store import INFRASTRUCTURE as OF_THE_STORE
from lightning_proxy.store import ErrorClass


def test_the_classes_are_the_stores() -> None:
    assert set(INFRASTRUCTURE) == {each.value for each in OF_THE_STORE}
    assert {each.value for each in ErrorClass} == INFRASTRUCTURE | OTHERS
    assert not INFRASTRUCTURE & OTHERS


@pytest.mark.parametrize(
    ("text", "consequence"),
    [
        ("train", Consequence(Kind.TRAIN)),
        ("mask", Consequence(Kind.MASK)),
        ("drop", Consequence(Kind.DROP)),
        ("partial 0.5", Consequence(Kind.PARTIAL, 0.5)),
        (" penalty  -1 ", Consequence(Kind.PENALTY, -1.0)),
    ],
)
def test_a_consequence_is_a_word_and_where_need_be_a_number(text: str, consequence: Consequence) -> None:
    assert consequence_of("truncated", text) == consequence


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("truncate", "drop", "did you mean 'truncated'?"),
        ("truncated", "ignore", "train, mask, drop, or partial and penalty with a number"),
        ("truncated", "partial", "a number from 0 to 1"),
        ("truncated", "partial 2", "a number from 0 to 1"),
        ("truncated", "penalty 0.5", "a number below 0"),
        ("truncated", "penalty nan", "a number below 0"),
        ("truncated", "penalty -inf", "a number below 0"),
        ("truncated", "drop 1", "takes no number"),
        ("agent_crash", "mask", "belongs to no call"),
        *[
            (name, text, "never count against the policy")
            for name in sorted(INFRASTRUCTURE)
            for text in ("penalty -1", "partial 0.5", "train")
        ],
    ],
)
def test_what_cannot_be_is_refused_saying_what_can(name: str, text: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Settings.model_validate({"failures": {"training": {name: text}}})


@pytest.mark.parametrize("name", sorted(INFRASTRUCTURE))
def test_faults_of_the_infrastructure_are_masked_or_dropped(name: str) -> None:
    Settings.model_validate({"failures": {"training": {name: "mask"}}})
    Settings.model_validate({"failures": {"training": {name: "drop"}}})


def test_patterns_must_be_patterns_and_a_loop_has_two_rounds() -> None:
    with pytest.raises(ValidationError, match="no regular expression"):
        Settings.model_validate({"failures": {"tool_error_patterns": ["("]}})
    with pytest.raises(ValidationError, match="one reply is no loop"):
        Settings.model_validate({"failures": {"loop_after": 1}})
