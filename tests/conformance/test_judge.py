"""The judge of real clients finds what it is there to find."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conformance.clients import Client
from conformance.judge import Attribution, Outcome, attribution, judge
from lightning_proxy.store import Fidelity, Span

CLIENT = Client("it", "it", "it.py", "all of it", streams="never")
GOOD = Outcome(
    0,
    [
        {"line": line, "called": [f"{line}-0", f"{line}-1"], "answer": f"It is {line}-2."}
        for line in ("amber", "birch")
    ],
    "",
    ["/v1/chat/completions"] * 6,
)


def span(line: str, rollout: str = "r", **more: Any) -> Span:
    given = {"wire": "chat", "fidelity": Fidelity.EXACT, "request": f"Ride from {line}-0".encode(), **more}
    return Span(rollout, 1, started_at=0.0, ended_at=1.0, **given)


SPANS = [span(line, line) for line in ("amber", "birch") * 3]


def test_a_run_that_is_as_it_should_be_passes() -> None:
    verdict = judge(CLIENT, GOOD, GOOD, SPANS)
    assert (verdict.wrong, verdict.calls, verdict.spans) == ([], 6, {"chat exact": 6})


@pytest.mark.parametrize(
    ("proxied", "spans", "told"),
    [
        (replace(GOOD, status=1, errors="Boom"), SPANS, "proxied: exit 1: Boom"),
        (replace(GOOD, results=GOOD.results[:1]), SPANS, "no result for birch"),
        (replace(GOOD, results=[{**GOOD.results[0], "called": []}, GOOD.results[1]]), SPANS, "the tool was"),
        (replace(GOOD, results=[{**GOOD.results[0], "answer": None}, GOOD.results[1]]), SPANS, "it answered"),
        (replace(GOOD, results=[{**GOOD.results[0], "pieces": 3}, GOOD.results[1]]), SPANS, "it printed"),
        (GOOD, SPANS[:5], "spans: {'chat exact': 5}, expected 6 chat exact"),
        (GOOD, [*SPANS[:5], span("birch", fidelity=Fidelity.TEXT)], "spans: "),
        (GOOD, [*SPANS[:5], span("birch", "birch", streamed=True)], "streamed spans"),
        (GOOD, [*SPANS[:5], span("birch", "amber")], "1 rollouts hold calls of several runs"),
    ],
)
def test_a_fault_is_found(proxied: Outcome, spans: list[Span], told: str) -> None:
    assert told in "\n".join(judge(CLIENT, GOOD, proxied, spans).wrong)


def test_a_client_may_be_expected_to_give_text_at_least() -> None:
    spans = [*SPANS[:5], span("birch", fidelity=Fidelity.TEXT)]
    assert judge(replace(CLIENT, fidelity="text"), GOOD, GOOD, spans).wrong == []
    spans = [*SPANS[:5], span("birch", fidelity=Fidelity.INCOMPLETE)]
    assert judge(replace(CLIENT, fidelity="text"), GOOD, GOOD, spans).wrong != []


def test_an_agent_that_fails_without_the_proxy_has_not_passed() -> None:
    broken = replace(GOOD, status=1, results=[])
    verdict = judge(CLIENT, broken, broken, SPANS)
    assert verdict.fails_alone
    assert "straight: exit 1" in "\n".join(verdict.wrong)


def test_a_client_of_another_api_than_expected_is_found() -> None:
    other = replace(GOOD, calls=["/v1/responses"] * 6)
    assert "was to speak chat" in "\n".join(judge(CLIENT, other, other, SPANS).wrong)


def test_calls_of_an_api_that_is_forwarded_unread_are_compared_at_the_engine() -> None:
    unread = replace(CLIENT, wire="responses", fidelity="none")
    straight = replace(GOOD, calls=["/v1/responses"] * 6)
    assert judge(unread, straight, straight, []).wrong == []
    assert judge(unread, straight, replace(straight, calls=["/v1/responses"] * 7), []).wrong != []


@pytest.mark.parametrize(
    ("rollouts", "expected"),
    [
        ("aaabbb", Attribution(6, 6, 0)),  # each run in a rollout of its own
        ("abcdef", Attribution(6, 2, 0)),  # each call in a rollout of its own
        ("aaaaaa", Attribution(6, 3, 1)),  # all in one
        ("aabbbb", Attribution(6, 5, 1)),  # a call of the first run in the second's
    ],
)
def test_calls_are_right_in_the_rollout_that_most_calls_of_their_run_are_in(
    rollouts: str, expected: Attribution
) -> None:
    lines = ["amber"] * 3 + ["birch"] * 3
    spans = [span(line, rollout) for line, rollout in zip(lines, rollouts, strict=True)]
    assert attribution(spans) == expected
