"""Why a rollout failed: the root cause, from how its agent ended and what its last call met.

An agent whose model is out of reach crashes. That it crashed is what its exit code says; what to mend,
and what training must not hold against the policy, is the call that failed before.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_proxy.store.records import INFRASTRUCTURE, ErrorClass, Span

# How an agent can end without saying why.
_UNEXPLAINED = frozenset((ErrorClass.AGENT_CRASH, ErrorClass.SILENT_DEATH, ErrorClass.TIMEOUT))
# What in a last call that ended well can have ended the agent, the most telling first.
_TELLING = (
    ErrorClass.AGENT_LOOP,
    ErrorClass.MALFORMED_TOOL_CALL,
    ErrorClass.TRUNCATED,
    ErrorClass.REFUSAL,
    ErrorClass.TOOL_FAILURE,
)
_SHOWN = 200  # characters of an error


def root_cause(
    said: ErrorClass | None, reason: str | None, spans: Sequence[Span]
) -> tuple[ErrorClass | None, str | None]:
    """Class and reason of a failed rollout, of which ``said`` and ``reason`` are told.

    ``spans``: those of its last attempt, or the last few of them, in any order. A class that explains
    itself stays. An unexplained end (or none told) is explained by the last call: by its error, else,
    where the agent crashed or fell silent, by what was found in it. The reason then says both.
    """
    last = last_call(spans)
    if last is None or not (said is None or said in _UNEXPLAINED):
        return said, reason
    error = error_of(last)
    if error is not None:
        why = f"its last call ended in {error.value}: {last.error or '?':.{_SHOWN}}"
        return error, _both(reason, why)
    found = {each.error_class: each.detail for each in last.findings}
    telling = _TELLING if said in (ErrorClass.AGENT_CRASH, ErrorClass.SILENT_DEATH) else _TELLING[:1]
    cause = next((each for each in telling if each in found), None)
    if said is None or cause is None:
        return said, reason
    return cause, _both(reason, f"its last call has {cause.value}: {found[cause]:.{_SHOWN}}")


def last_call(spans: Sequence[Span]) -> Span | None:
    """The call that ended last. One that the agent left is no cause of anything: it left by ending."""
    kept = [span for span in spans if span.error_class != ErrorClass.CLIENT_DISCONNECT]
    return max(kept, key=lambda span: (span.ended_at, span.span_id or 0), default=None)


def error_of(span: Span) -> ErrorClass | None:
    """The class of a call's error; ``None`` where it has none, or one from before there were classes."""
    return span.error_class if isinstance(span.error_class, ErrorClass) else None


def failed_by_infrastructure(said: ErrorClass | None, spans: Sequence[Span]) -> ErrorClass | None:
    """The fault of engine, network or proxy by which a failed rollout ended; ``None`` for any other end.

    A ``TIMEOUT`` is one where a call of the rollout ran into it, and none where its attempt did.
    """
    cause, _ = root_cause(said, None, spans)
    if cause is ErrorClass.TIMEOUT:
        last = last_call(spans)
        return cause if last is not None and last.error_class == ErrorClass.TIMEOUT else None
    return cause if cause in INFRASTRUCTURE else None


def _both(reason: str | None, why: str) -> str:
    return why if not reason else f"{reason}; {why}"
