"""How a call's prompt goes on from what the model read and wrote before, told from token ids alone.

Agents send the conversation again with every call, and about half of them not as it was: arguments are
serialised anew, reasoning is dropped, histories are shortened. What was generated stays what the engine
generated; where the prompt differs, the call begins a row of its own (``trajectories``). How often, and
where the difference lies, is counted here: the fewer rows, the less is computed twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum

import numpy as np

from lightning_proxy.trainer.transitions import Transition


class Drift(StrEnum):
    """Relation of a call to the earlier call of its rollout with which it shares the longest beginning."""

    FIRST = "first"  # there is none that it shares a token with
    EXTENDED = "extended"  # its prompt begins with all of the other's prompt and answer
    REPEATED = "repeated"  # the same prompt: another answer, or a retry
    REWOUND = "rewound"  # its prompt is a beginning of the other's
    REWRITTEN = "rewritten"  # it differs within what the model wrote: sent back otherwise than it was
    EDITED = "edited"  # it differs within what the model read: shortened, updated, another agent's


def drifts(transitions: Iterable[Transition]) -> Counter[str]:
    """How many calls of each kind there are. The choices of one call count once."""
    counts: Counter[str] = Counter()
    by_rollout: dict[str, list[Transition]] = {}
    for transition in transitions:
        earlier = by_rollout.setdefault(transition.rollout_id, [])
        if not any(_same_call(transition, other) for other in earlier):
            counts[drift(transition, earlier)] += 1
        earlier.append(transition)
    return counts


def drift(call: Transition, earlier: Sequence[Transition]) -> Drift:
    """How ``call`` goes on from what came before it in its rollout."""
    prompt = np.asarray(call.prompt_ids)
    shared = [(_shared(prompt, other), other) for other in earlier]
    length, nearest = max(shared, key=lambda pair: pair[0], default=(0, None))
    if nearest is None or not length:
        return Drift.FIRST
    read, wrote = len(nearest.prompt_ids), len(nearest.response_ids)
    if length == read + wrote:
        return Drift.EXTENDED
    if length == len(prompt):
        return Drift.REPEATED if length == read else Drift.REWOUND
    return Drift.REWRITTEN if length >= read else Drift.EDITED


def _shared(prompt: np.ndarray[tuple[int], np.dtype[np.int32]], other: Transition) -> int:
    """Tokens that a prompt and another call's prompt and answer have in common from the start."""
    theirs = np.asarray(other.prompt_ids + other.response_ids)
    size = min(len(prompt), len(theirs))
    differing = np.flatnonzero(prompt[:size] != theirs[:size])
    return int(differing[0]) if len(differing) else size


def _same_call(one: Transition, other: Transition) -> bool:
    return one.span_id is not None and one.span_id == other.span_id
