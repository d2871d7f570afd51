"""Histories that come back inside a rewritten prompt (DSPy): told by passages of the replies. No I/O.

DSPy's agents send no assistant turn: each call is a system prompt and one user message, in which what
the model said so far is written out. Such a call goes on with an earlier one where system prompt and
the beginning of the user message are the same, the message has grown, and it holds, word for word, the
longest line of that call's reply. More than one rollout that it could be: it stays alone.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from .conversation import ASSISTANT, SYSTEM, USER, Turn

if TYPE_CHECKING:
    from .lineage import Owner

_HEAD = 64  # characters of the user message that must be the same
_SHORTEST, _LONGEST = 24, 200  # characters of a passage; shorter ones occur by chance
_MOST_PROMPTS = 1_000
_MOST_ALIKE = 64


class _Passage(NamedTuple):
    owner: Owner
    text: str
    prompt_length: int


@dataclass(slots=True)
class _Alike:
    """Passages of replies to prompts that begin alike."""

    passages: deque[_Passage] = field(default_factory=lambda: deque(maxlen=_MOST_ALIKE))
    shortest: int = sys.maxsize  # characters of the shortest of those prompts


class Passages:
    """The longest line of each reply to a prompt without assistant turns, by how the prompt begins."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, str], _Alike] = OrderedDict()

    def find(self, turns: Sequence[Turn], weak: int) -> Owner | None:
        """Whose reply this prompt holds, if exactly one rollout's."""
        alike = self._known.get(key) if (key := _key(turns)) is not None else None
        if alike is None or alike.shortest >= len(turns[-1].text):
            return None
        prompt = turns[-1].text
        found: Owner | None = None
        for passage in alike.passages:
            owner = passage.owner
            if passage.prompt_length >= len(prompt) or (owner.weak and weak and owner.weak != weak):
                continue
            if passage.text in prompt:
                if found is not None and found.rollout_id != owner.rollout_id:
                    return None
                found = owner
        return found

    def remember(self, owner: Owner, turns: Sequence[Turn], reply: Sequence[Turn]) -> None:
        """Note the passage by which a call that goes on from here would be known."""
        if (key := _key(turns)) is None or len(reply) != 1 or reply[0].kind is not ASSISTANT:
            return
        line = max(reply[0].text.splitlines(), key=len, default="").strip()
        if len(line) < _SHORTEST:
            return
        alike = self._known.setdefault(key, _Alike())
        self._known.move_to_end(key)
        alike.passages.append(_Passage(owner, line[:_LONGEST], len(turns[-1].text)))
        alike.shortest = min(alike.shortest, len(turns[-1].text))
        if len(self._known) > _MOST_PROMPTS:
            self._known.popitem(last=False)


def _key(turns: Sequence[Turn]) -> tuple[int, str] | None:
    if len(turns) != 2 or turns[0].kind is not SYSTEM or turns[1].kind is not USER:
        return None
    return hash(turns[0].text), turns[1].text[:_HEAD]
