"""Transitions that extend one another, merged into one training row by their token ids."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_proxy.trainer.transitions import Transition


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a transition's response lies in its row."""

    start: int
    transition: Transition


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One training row. The tokens of its pieces are trained, all others are context.

    ``token_ids`` is the last transition's prompt and response; each earlier one's is a prefix of it.
    """

    rollout_id: str
    token_ids: array[int]
    pieces: tuple[Piece, ...]

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that the policy generated."""
        return sum(len(piece.transition.response_ids) for piece in self.pieces)


def merge(transitions: Sequence[Transition]) -> list[Trajectory]:
    """Rows in which every generated token of these transitions is trained exactly once.

    A transition extends a row where its prompt starts with all of that row's tokens (an earlier
    call's prompt and response, to the token); of several such rows it takes the longest. A row is
    extended by its first such transition only: calls that branch off from the same one (retries,
    parallel calls, a rewound conversation) begin rows of their own, in which what was generated
    before is context. Without any match each transition is a row, which is always right, only slower.
    """
    rows: list[tuple[bytes, list[Piece]]] = []  # a row's tokens as bytes: comparing is one memcmp
    for transition in transitions:
        prompt = transition.prompt_ids.tobytes()
        extended = [index for index, (tokens, _) in enumerate(rows) if prompt.startswith(tokens)]
        pieces: list[Piece] = []
        if extended:
            _, pieces = rows.pop(max(extended, key=lambda index: len(rows[index][0])))
        pieces.append(Piece(len(transition.prompt_ids), transition))
        rows.append((prompt + transition.response_ids.tobytes(), pieces))
    return [_trajectory(pieces) for _, pieces in rows]


def _trajectory(pieces: list[Piece]) -> Trajectory:
    last = pieces[-1].transition
    return Trajectory(last.rollout_id, last.prompt_ids + last.response_ids, tuple(pieces))
