"""What training makes of a class of failure, as ``failures.training`` in the settings says it."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from enum import StrEnum

# By name, for this room knows nothing of the store; a test holds both to be the same.
INFRASTRUCTURE = frozenset(
    ("upstream_unreachable", "upstream_error", "upstream_refused", "rate_limited", "timeout", "engine_error",
     "cut_stream", "client_disconnect", "capture_fault", "proxy_fault")
)  # fmt: skip
OTHERS = frozenset(
    ("context_overflow", "refusal", "truncated", "malformed_tool_call", "tool_failure", "agent_crash",
     "agent_loop", "silent_death")
)  # fmt: skip


_OF_NO_CALL = frozenset(("agent_crash", "silent_death"))


class Kind(StrEnum):
    """What is done with the calls and the rollouts of a class."""

    TRAIN = "train"  # nothing: the given reward says it all
    MASK = "mask"  # such calls are context, not trained
    PARTIAL = "partial"  # such calls are trained with a part of their credit and advantage
    PENALTY = "penalty"  # a number below 0 is added to the rollout's return, once per such call
    DROP = "drop"  # rollouts with such a call, or that ended by it, are left out


@dataclass(frozen=True, slots=True)
class Consequence:
    """A kind, with its number: the part (0 to 1) of ``PARTIAL``, the penalty of ``PENALTY``."""

    kind: Kind
    number: float = 0.0


def consequence_of(name: str, text: str) -> Consequence:
    """One entry of ``failures.training``. Raises ``ValueError``, saying what would be right."""
    if name not in INFRASTRUCTURE | OTHERS:
        near = difflib.get_close_matches(name, INFRASTRUCTURE | OTHERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "docs/failures.md has them all"
        raise ValueError(f"{name!r} is no class of failure: {hint}")
    word, _, rest = text.strip().partition(" ")
    if word not in tuple(Kind):
        raise ValueError(
            f"{name} = {text!r}: train, mask, drop, or partial and penalty with a number are possible"
        )
    kind = Kind(word)
    if name in INFRASTRUCTURE and kind not in (Kind.MASK, Kind.DROP):
        raise ValueError(
            f"{name} = {text!r}: faults of engine and network never count against the policy; "
            "mask (the default) and drop are possible"
        )
    if kind is Kind.MASK and name in _OF_NO_CALL:
        raise ValueError(
            f"{name} = {text!r}: it belongs to no call that could be masked; "
            "train, partial, penalty and drop are possible"
        )
    return Consequence(kind, _number(name, kind, rest.strip()))


def _number(name: str, kind: Kind, text: str) -> float:
    if kind not in (Kind.PARTIAL, Kind.PENALTY):
        if text:
            raise ValueError(f"{name} = '{kind} {text}': {kind} takes no number")
        return 0.0
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if kind is Kind.PARTIAL and not 0 <= number <= 1:
        raise ValueError(f"{name} = '{kind} {text}': a number from 0 to 1 is needed, as in 'partial 0.5'")
    if kind is Kind.PENALTY and not -math.inf < number < 0:
        raise ValueError(f"{name} = '{kind} {text}': a number below 0 is needed, as in 'penalty -0.5'")
    return number
