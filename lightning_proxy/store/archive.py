"""Where the content of spans lies: writing it, and reading back what is wanted of it."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from lightning_proxy.store.connection import translated
from lightning_proxy.store.content import (
    Content,
    Encoded,
    best_base,
    content_of,
    decode,
    decode_response,
    encode,
    extends,
    first_of,
    leading_ids,
)
from lightning_proxy.store.packing import unpack_ids, unpack_logprobs
from lightning_proxy.store.recent import MOST_ENDS, Attempt, Recent
from lightning_proxy.store.records import Generation, Span
from lightning_proxy.store.rollouts import Rollouts

_ADD = """
INSERT INTO contents (span_id, base, root, depth, chain, response, request, tokens)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""
_NEWEST = """
SELECT span_id FROM spans WHERE rollout_id = ? AND attempt = ? ORDER BY span_id DESC LIMIT ?"""
_BASES = "SELECT span_id, base FROM contents WHERE span_id IN (SELECT value FROM json_each(?))"
_READ = """
SELECT span_id, base, root, depth, chain, response, request, tokens FROM contents
WHERE span_id IN (SELECT value FROM json_each(?)) ORDER BY span_id"""
_READ_WITHOUT_TOKENS = _READ.replace(", tokens", ", NULL AS tokens", 1)
_RESPONSES = """
SELECT s.span_id, iif(c.span_id IS NULL, s.response, NULL) AS raw, c.response, c.request, r.response AS first,
  r.request AS first_request
FROM spans AS s LEFT JOIN contents AS c USING (span_id) LEFT JOIN contents AS r ON r.span_id = c.root
WHERE s.span_id IN (SELECT value FROM json_each(?)) AND s.response IS NOT NULL"""
# Spans of a database from before contents were a table of their own hold them themselves.
_RAW = """
SELECT span_id, request, response FROM spans WHERE span_id IN (SELECT value FROM json_each(?))"""
_RAW_GENERATIONS = """
SELECT * FROM generations WHERE span_id IN (SELECT value FROM json_each(?)) ORDER BY span_id, choice"""
_MOST_CHECKED = 10_000


@dataclass(frozen=True, slots=True)
class Said:
    """What a span holds beside its head."""

    request: bytes
    response: bytes | None
    generations: tuple[Generation, ...]


@dataclass(slots=True)
class Told:
    """A span's content, ready to be written."""

    new: Content
    base: Content | None
    replaced: Content | None  # the base, where it has nothing that the new one has not
    encoded: Encoded


class Archive(Rollouts):
    """The contents' part of the store.

    A span's content refers to that of an earlier span of the same attempt, so it is read along the
    chain of these. What the next spans will be told by is remembered; it is asked for anew when
    another connection has written something since.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        """Use :meth:`open`."""
        super().__init__(connection, path)
        self._recent = Recent()
        self._looked = False  # whether others have written: once a transaction
        self._data_version = 0  # SQLite's: changes when another connection has committed
        self._deletions = 0  # how many there had been when we last looked
        self._spent = 0  # span ids up to this one have been given out before, and stay with the deleted
        self._checked: set[Attempt] = set()  # attempts of which everything is known

    def begun(self) -> None:
        """A transaction has begun."""
        self._looked = False

    def committed(self) -> None:
        """What was added is there to stay."""
        self._recent.committed()

    def forget(self) -> None:
        """Drop what is remembered of rows that may have been rolled back."""
        super().forget()
        self._checked -= self._recent.rolled_back()
        self._looked = False

    def tell(self, span: Span) -> Told:
        """Encode a span's content by what is known of its attempt. Raises ``TypeError`` for odd arrays."""
        new = content_of(span)
        base, shared = best_base(new, self._ends((span.rollout_id, span.attempt)))
        encoded = encode(span, new, base, shared)
        new.chain = encoded.size
        if base is None:
            return Told(new, None, None, encoded)
        new.depth = base.depth + 1
        new.chain += base.chain
        new.root = first_of(base)
        return Told(new, base, base if extends(base, shared) else None, encoded)

    def write_content(self, attempt: Attempt, span_id: int, told: Told) -> None:
        """Store the content of a span whose row has just been added."""
        new, base, encoded = told.new, told.base, told.encoded
        self.connection.execute(
            _ADD,
            (
                span_id,
                None if base is None else base.span_id,
                None if new.root is None else new.root.span_id,
                new.depth,
                new.chain,
                encoded.response,
                encoded.request,
                encoded.tokens,
            ),
        )
        new.span_id = span_id
        self._recent.add(attempt, new, told.replaced)

    def attempt_is_new(self, attempt: Attempt) -> None:
        """An attempt has just been made: there is nothing to be told by, and no need to look."""
        self._recent.put(attempt, [])
        self._checked.add(attempt)

    def look_at_others(self) -> None:
        """Notice, once a transaction, what other connections have committed."""
        if self._looked:
            return
        self._looked = True
        (version,) = self.connection.execute("PRAGMA data_version").fetchone()
        if version != self._data_version:
            self._data_version = version
            self._checked.clear()
            self.read_deletions()

    def read_deletions(self) -> None:
        """Forget which attempts there are where something has been deleted since we last looked."""
        count, self._spent = self.connection.execute("SELECT count, last_span_id FROM deletions").fetchone()
        if count != self._deletions:
            self._deletions = count
            self._known_attempts.clear()
            self._checked.clear()

    def forget_content(self) -> None:
        """Drop all that is remembered of content: it may have been deleted."""
        self._recent.clear()
        self._checked.clear()

    def free_id(self, span_id: int) -> int:
        """Give a span whose id was once another's, which has been deleted, one of its own."""
        if span_id <= self._spent:
            fresh = self._spent + 1
            self.connection.execute("UPDATE spans SET span_id = ? WHERE span_id = ?", (fresh, span_id))
            return fresh
        return span_id

    def delete_newest_spans(self, rollout_id: str, most: int) -> int:
        """Delete spans of a rollout with their content, and their rewards; returns how many.

        Newest first, so that what is left can be read. Runs in the caller's transaction.
        """
        sql = "SELECT span_id FROM spans WHERE rollout_id = ? ORDER BY span_id DESC LIMIT ?"
        gone = id_list(row["span_id"] for row in self.rows(sql, (rollout_id, most)))
        execute = self.connection.execute
        for table in ("rewards", "contents", "generations", "spans"):
            count = execute(f"DELETE FROM {table} WHERE span_id IN (SELECT value FROM json_each(?))", (gone,))
        execute(
            "UPDATE deletions SET count = count + 1, last_span_id = "
            "max(last_span_id, (SELECT coalesce(max(value), 0) FROM json_each(?)))",
            (gone,),
        )
        self.read_deletions()
        self.forget_content()
        return count.rowcount

    # -- reading --

    def contents_of(self, span_ids: Sequence[int], *, tokens: bool = True) -> dict[int, Said]:
        """What these spans hold; without ``tokens``, no generations."""
        wanted = set(span_ids)
        found: dict[int, Said] = {}
        for content, response, generations in self._read(wanted, {}, tokens=tokens):
            if content.span_id in wanted:
                found[content.span_id] = Said(content.request, response, generations)
        raw = sorted(wanted - found.keys())
        return found | self._read_raw(raw, tokens=tokens) if raw else found

    def responses_of(self, span_ids: Sequence[int]) -> dict[int, bytes]:
        """The responses of those of these spans that have one; nothing else is read."""
        found = {}
        for row in self.rows(_RESPONSES, (id_list(span_ids),)):
            if row["raw"] is not None:
                found[row["span_id"]] = row["raw"]
            else:
                first = b""
                if row["first"] is not None:
                    first = decode_response(row["first"], row["first_request"], b"")
                found[row["span_id"]] = decode_response(row["response"], row["request"], first)
        return found

    def _ends(self, attempt: Attempt) -> list[Content]:
        """What a span of this attempt can be told by, newest first."""
        if attempt not in self._checked or attempt not in self._recent:
            self._check(attempt)
        return self._recent.ends(attempt)

    def _check(self, attempt: Attempt) -> None:
        """Bring what is known of an attempt up to date."""
        if len(self._checked) >= _MOST_CHECKED:
            self._checked.clear()
        self._checked.add(attempt)
        present = [row[0] for row in self.rows(_NEWEST, (*attempt, MOST_ENDS))]
        ends = self._recent.ends(attempt)
        newest = ends[0].span_id if ends else 0
        if present and present[0] == newest:  # spans are deleted newest first: the older ones are there too
            return
        there = {row["span_id"] for row in self.rows(_BASES, (id_list(end.span_id for end in ends),))}
        known = {end.span_id: end for end in ends if end.span_id in there}
        # What is older than the newest that we know, and not known, has been extended by what is known.
        missing = {span_id for span_id in present if span_id > newest or not known}
        read = [content for content, *_ in self._read(missing, known) if content.span_id in missing]
        self._recent.put(attempt, [*read[::-1], *known.values()][:MOST_ENDS])

    def _read(
        self, wanted: Collection[int], known: Mapping[int, Content], *, tokens: bool = True
    ) -> Iterator[tuple[Content, bytes | None, tuple[Generation, ...]]]:
        """Decode these spans and what they are told by, oldest first; what is ``known`` is not read again.

        Holds at a time only what later ones are told by.
        """
        bases = self._chains(wanted, known)
        uses = Counter(base for base in bases.values() if base is not None)
        held = dict(known)
        sql = _READ if tokens else _READ_WITHOUT_TOKENS
        try:
            for row in self.connection.execute(sql, (id_list(bases),)):
                base = None if row["base"] is None else held[row["base"]]
                if base is not None:
                    uses[base.span_id] -= 1
                    if not uses[base.span_id]:
                        del held[base.span_id]
                encoded = Encoded(row["response"], row["request"], row["tokens"])
                request, response, generations = decode(encoded, base)
                content = Content(
                    request=request,
                    response=response or b"",
                    ids=leading_ids(generations),
                    depth=row["depth"],
                    chain=row["chain"],
                    span_id=row["span_id"],
                    root=None if base is None else first_of(base),
                )
                if uses[content.span_id]:
                    held[content.span_id] = content
                yield content, response, generations
        except sqlite3.Error as error:
            raise translated(error) or error from error

    def _chains(self, wanted: Collection[int], known: Mapping[int, Content]) -> dict[int, int | None]:
        """The spans that must be read for these, each with its base."""
        bases: dict[int, int | None] = {}
        ask = set(wanted)
        while ask:
            found = {row["span_id"]: row["base"] for row in self.rows(_BASES, (id_list(ask),))}
            bases |= found
            ask = {base for base in found.values() if base is not None} - bases.keys() - known.keys()
        return bases

    def _read_raw(self, span_ids: Sequence[int], *, tokens: bool) -> dict[int, Said]:
        generations: defaultdict[int, list[Generation]] = defaultdict(list)
        for row in self.rows(_RAW_GENERATIONS, (id_list(span_ids),)) if tokens else ():
            generations[row["span_id"]].append(
                Generation(
                    prompt_token_ids=unpack_ids(row["prompt_token_ids"]),
                    response_token_ids=unpack_ids(row["response_token_ids"]),
                    logprobs=unpack_logprobs(row["logprobs"]),
                    finish_reason=row["finish_reason"],
                )
            )
        return {
            row["span_id"]: Said(row["request"], row["response"], tuple(generations[row["span_id"]]))
            for row in self.rows(_RAW, (id_list(span_ids),))
        }


def id_list(span_ids: Iterable[int | None]) -> str:
    """Ids as one parameter of a query: ``IN (SELECT value FROM json_each(?))``."""
    return orjson.dumps(sorted(each for each in span_ids if each is not None)).decode()
