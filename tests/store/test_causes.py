"""The root cause of a failed rollout, as a table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_proxy.store import ErrorClass, Finding, Span, failed_by_infrastructure, root_cause
from tests.store.support import make_span

E = ErrorClass


def call(*findings: ErrorClass, error: ErrorClass | None = None, at: float = 0.0) -> Span:
    made = make_span(findings=tuple(Finding(each, f"some {each.value}") for each in findings))
    made = replace(made, started_at=at, ended_at=at + 1)
    return made if error is None else replace(made, response=None, error_class=error, error="it said so")


FAILED = call(error=E.UPSTREAM_ERROR)
LEFT = call(error=E.CLIENT_DISCONNECT, at=9)
TABLE: dict[str, tuple[ErrorClass | None, list[Span], ErrorClass | None]] = {
    "no calls": (E.AGENT_CRASH, [], E.AGENT_CRASH),
    "a crash after a good call": (E.AGENT_CRASH, [call()], E.AGENT_CRASH),
    "a crash after an upstream's error": (E.AGENT_CRASH, [FAILED], E.UPSTREAM_ERROR),
    "a crash after an overflow": (E.AGENT_CRASH, [call(error=E.CONTEXT_OVERFLOW)], E.CONTEXT_OVERFLOW),
    "an error that was got over": (E.AGENT_CRASH, [FAILED, call(at=5)], E.AGENT_CRASH),
    "in whatever order they are given": (E.AGENT_CRASH, [call(at=5), FAILED], E.AGENT_CRASH),
    "a call that the crash cut off": (E.AGENT_CRASH, [FAILED, LEFT], E.UPSTREAM_ERROR),
    "only that": (E.AGENT_CRASH, [LEFT], E.AGENT_CRASH),
    "a crash on a malformed call": (E.AGENT_CRASH, [call(E.MALFORMED_TOOL_CALL)], E.MALFORMED_TOOL_CALL),
    "the most telling first": (E.AGENT_CRASH, [call(E.TOOL_FAILURE, E.AGENT_LOOP)], E.AGENT_LOOP),
    "only in the last call": (E.AGENT_CRASH, [call(E.REFUSAL), call(at=5)], E.AGENT_CRASH),
    "silence after an error": (E.SILENT_DEATH, [call(error=E.RATE_LIMITED)], E.RATE_LIMITED),
    "silence after a call": (E.SILENT_DEATH, [call()], E.SILENT_DEATH),
    "out of time in an outage": (E.TIMEOUT, [FAILED], E.UPSTREAM_ERROR),
    "out of time in a loop": (E.TIMEOUT, [call(E.AGENT_LOOP)], E.AGENT_LOOP),
    "out of time after a refusal": (E.TIMEOUT, [call(E.REFUSAL)], E.TIMEOUT),
    "what explains itself": (E.REFUSAL, [FAILED], E.REFUSAL),
    "no class told, an error": (None, [FAILED], E.UPSTREAM_ERROR),
    "no class told, a good call": (None, [call(E.TRUNCATED)], None),
    "an error of no class": (E.AGENT_CRASH, [replace(FAILED, error_class="cut")], E.AGENT_CRASH),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_root_cause_is_what_the_last_call_met(name: str) -> None:
    said, spans, cause = TABLE[name]
    assert root_cause(said, "exit code 1", spans)[0] is cause


def test_the_reason_says_both() -> None:
    assert root_cause(E.AGENT_CRASH, "exit code 1", [FAILED])[1] == (
        "exit code 1; its last call ended in upstream_error: it said so"
    )
    assert root_cause(E.AGENT_CRASH, "exit code 1", [call(E.TRUNCATED)])[1] == (
        "exit code 1; its last call has truncated: some truncated"
    )
    assert root_cause(E.AGENT_CRASH, "exit code 1", [call()])[1] == "exit code 1"
    assert root_cause(None, None, [FAILED])[1] == "its last call ended in upstream_error: it said so"


@pytest.mark.parametrize(
    ("said", "spans", "fault"),
    [
        (E.AGENT_CRASH, [FAILED], E.UPSTREAM_ERROR),
        (E.AGENT_CRASH, [call()], None),
        (E.AGENT_CRASH, [call(error=E.CONTEXT_OVERFLOW)], None),
        (E.UPSTREAM_UNREACHABLE, [], E.UPSTREAM_UNREACHABLE),
        (E.TIMEOUT, [call()], None),
        (E.TIMEOUT, [call(error=E.TIMEOUT)], E.TIMEOUT),
        (E.AGENT_CRASH, [call(error=E.TIMEOUT)], E.TIMEOUT),
        (E.TIMEOUT, [FAILED, LEFT], E.UPSTREAM_ERROR),
        (None, [], None),
    ],
)
def test_a_time_limit_of_the_attempt_is_no_fault_of_the_infrastructure(
    said: ErrorClass | None, spans: list[Span], fault: ErrorClass | None
) -> None:
    assert failed_by_infrastructure(said, spans) is fault
