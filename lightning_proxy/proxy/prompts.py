"""Completions: which lengths of a prompt could be an earlier prompt and its completion. No I/O."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

_HEAD = 16  # characters by which prompts are sorted
_MOST_HEADS = 200
_MOST_LENGTHS = 256
_DIGEST_BYTES = 16


class Prompts:
    """Lengths of the texts (prompt and completion) seen so far, by how they begin.

    A text has no messages at whose ends it could be hashed, so the ends that occurred are remembered.
    """

    def __init__(self) -> None:
        self._lengths: OrderedDict[str, OrderedDict[int, None]] = OrderedDict()

    def points(self, prompt: str) -> list[bytes]:
        """Digests of the beginnings of this prompt that may be known, the shortest first."""
        lengths = sorted(n for n in self._lengths.get(prompt[:_HEAD], ()) if n <= len(prompt))
        return _digests(prompt, lengths)

    def remember(self, prompt: str, completions: Iterable[str]) -> list[bytes]:
        """Note where these texts end; returns their digests. Clients may cut white space off the end."""
        digests = []
        for completion in completions:
            text = prompt + completion
            if not completion.strip() or len(text) < _HEAD:
                continue
            ends = sorted({len(text), len(text.rstrip())})
            lengths = self._lengths.setdefault(text[:_HEAD], OrderedDict())
            self._lengths.move_to_end(text[:_HEAD])
            for end in ends:
                lengths[end] = None
                lengths.move_to_end(end)
            while len(lengths) > _MOST_LENGTHS:
                lengths.popitem(last=False)
            digests += _digests(text, ends)
        while len(self._lengths) > _MOST_HEADS:
            self._lengths.popitem(last=False)
        return digests


def _digests(text: str, lengths: Sequence[int]) -> list[bytes]:
    """Of ``text[:n]`` for each of the ascending lengths, in one pass."""
    hasher, digests, done = hashlib.sha256(b"prompt:"), [], 0
    for length in lengths:
        hasher.update(text[done:length].encode("utf-8", "surrogatepass"))
        digests.append(hasher.digest()[:_DIGEST_BYTES])
        done = length
    return digests
