"""Spans with their generations. Adding one is the hot path of the whole system."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from lightning_proxy.errors import UnknownTarget
from lightning_proxy.store.connection import translated
from lightning_proxy.store.packing import pack_ids, pack_logprobs, unpack_ids, unpack_logprobs
from lightning_proxy.store.records import ConversationEnd, Fidelity, Generation, Span
from lightning_proxy.store.rollouts import Rollouts, encode

# Constant texts, so that SQLite's statements stay prepared in the connection's cache.
_ADD_SPAN = """
INSERT INTO spans (
  rollout_id, attempt, role, wire, model, policy, policy_version, policy_version_end,
  attributed_by, attribution_confidence, started_at, first_byte_at, ended_at, streamed, status,
  response_id, fidelity, error_class, error, usage, sampling, request, response, retry, conversation, redacted
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_ADD_GENERATION = """
INSERT INTO generations (span_id, choice, finish_reason, prompt_token_ids, response_token_ids, logprobs)
VALUES (?, ?, ?, ?, ?, ?)"""
_GENERATIONS = """
SELECT * FROM generations WHERE span_id IN (SELECT value FROM json_each(?)) ORDER BY span_id, choice"""


_ENDS = """
SELECT rollout_id, attempt, conversation, response, EXISTS (
  SELECT 1 FROM spans AS later WHERE later.rollout_id = ends.rollout_id
    AND later.attempt = ends.attempt AND later.span_id > ends.span_id AND later.error_class IS NULL
) AS extended
FROM spans AS ends WHERE {} = ? AND response IS NOT NULL ORDER BY span_id DESC LIMIT ?"""
_ENDS_BY_CONVERSATION = _ENDS.format("conversation")
_ENDS_BY_RESPONSE = _ENDS.format("response_id")
_READ_AT_ONCE = 64  # spans that `iterate_spans` holds in memory
_MOST_ENDS = 16  # rollouts with the same history that are told apart; the newest


class Spans(Rollouts):
    """The spans' part of the store."""

    def add_span(self, span: Span) -> int:
        """Record a span with its generations, and its rollout and attempt where they are new.

        Returns its id. Raises ``StoreError`` for one that has both a response and an error, or neither.
        """
        with self.transaction():
            return self.write_span(span)

    def add_imported_span(self, origin: bytes, span: Span) -> int | None:
        """Record a span that was traced elsewhere, once per ``origin``; ``None`` where it is known.

        One that was imported and deleted since does not come back.
        """
        with self.transaction():
            if self.rows("SELECT 1 FROM imported WHERE origin = ?", (origin,)):
                return None
            self.connection.execute("INSERT INTO imported (origin) VALUES (?)", (origin,))
            return self.write_span(span)

    def write_span(self, span: Span) -> int:
        """:meth:`add_span` for a caller in a transaction, who rolls back if this raises."""
        try:
            self.know_attempt(span.rollout_id, span.attempt, span.started_at)
            return self._insert(span)
        except sqlite3.IntegrityError as error:
            # Somebody else may have deleted the rollout that we remember.
            pair = (span.rollout_id, span.attempt)
            foreign = error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY
            if not foreign or pair not in self._known_attempts:
                raise translated(error) or error from error
            self._known_attempts.discard(pair)
            return self.write_span(span)
        except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
            raise translated(error) or error from error

    def _insert(self, span: Span) -> int:
        execute = self.connection.execute
        # Plain ints and texts: for enums and bools sqlite3 looks for an adapter each time.
        span_id = execute(
            _ADD_SPAN,
            (
                span.rollout_id,
                span.attempt,
                span.role,
                span.wire,
                span.model,
                span.policy,
                span.policy_version,
                span.policy_version_end,
                span.attributed_by,
                span.attribution_confidence,
                span.started_at,
                span.first_byte_at,
                span.ended_at,
                1 if span.streamed else 0,
                span.status,
                span.response_id,
                span.fidelity.value,
                span.error_class,
                span.error,
                encode(span.usage) if span.usage is not None else None,
                encode(span.sampling) if span.sampling else "{}",
                span.request,
                span.response,
                span.retry,
                span.conversation,
                span.redacted,
            ),
        ).lastrowid
        assert span_id is not None  # an INSERT into a table with a rowid has one
        for choice, generation in enumerate(span.generations):
            execute(
                _ADD_GENERATION,
                (
                    span_id,
                    choice,
                    generation.finish_reason,
                    pack_ids(generation.prompt_token_ids),
                    pack_ids(generation.response_token_ids),
                    pack_logprobs(generation.logprobs),
                ),
            )
        return span_id

    def get_span(self, span_id: int) -> Span:
        """One span. Raises ``UnknownTarget``."""
        found = self._spans("SELECT * FROM spans WHERE span_id = ?", (span_id,))
        if not found:
            raise UnknownTarget(f"no span {span_id}")
        return found[0]

    def list_spans(
        self,
        *,
        rollout_id: str | None = None,
        attempt: int | None = None,
        limit: int = 100,
        before: int | None = None,
    ) -> list[Span]:
        """Spans, newest first, with their generations; ``before`` is the span id to go on from."""
        wanted = {"rollout_id = ?": rollout_id, "attempt = ?": attempt, "span_id < ?": before}
        where = " AND ".join(clause for clause, value in wanted.items() if value is not None) or "1"
        values = [value for value in wanted.values() if value is not None]
        sql = f"SELECT * FROM spans WHERE {where} ORDER BY span_id DESC LIMIT ?"
        return self._spans(sql, (*values, limit))

    def spans_of_attempt(self, rollout_id: str, attempt: int) -> tuple[Span, ...]:
        """All spans of one attempt, in the order in which they were started."""
        return tuple(
            self._spans(
                "SELECT * FROM spans WHERE rollout_id = ? AND attempt = ? ORDER BY started_at, span_id",
                (rollout_id, attempt),
            )
        )

    def iterate_spans(self, rollout_id: str, attempt: int) -> Iterator[Span]:
        """The same, some at a time: for whoever reads more than memory holds."""
        ids = [
            row["span_id"]
            for row in self.rows(
                "SELECT span_id FROM spans WHERE rollout_id = ? AND attempt = ? ORDER BY started_at, span_id",
                (rollout_id, attempt),
            )
        ]
        for start in range(0, len(ids), _READ_AT_ONCE):
            wanted = orjson.dumps(ids[start : start + _READ_AT_ONCE]).decode()
            yield from self._spans(
                "SELECT * FROM spans WHERE span_id IN (SELECT value FROM json_each(?)) "
                "ORDER BY started_at, span_id",
                (wanted,),
            )

    def recent_requests(self, limit: int) -> Iterator[tuple[str, str | None, str, bytes]]:
        """``(rollout id, role, wire, request)`` of the newest spans, newest first, one at a time."""
        sql = "SELECT rollout_id, role, wire, request FROM spans ORDER BY span_id DESC LIMIT ?"
        for row in self.connection.execute(sql, (limit,)):
            yield tuple(row)

    def conversation_ends(
        self, digests: Sequence[bytes], response_ids: Sequence[str] = ()
    ) -> tuple[ConversationEnd, ...]:
        """The calls that a next one may go on from, oldest first.

        By the first of the response ids that is known, else by the first such digest.
        """
        for sql, keys in ((_ENDS_BY_RESPONSE, response_ids), (_ENDS_BY_CONVERSATION, digests)):
            for key in keys:
                if rows := self.rows(sql, (key, _MOST_ENDS)):
                    return tuple(
                        ConversationEnd(**{**dict(row), "extended": bool(row["extended"])})
                        for row in reversed(rows)
                    )
        return ()

    def _spans(self, sql: str, parameters: Sequence[Any]) -> list[Span]:
        rows = self.rows(sql, parameters)
        generations: defaultdict[int, list[Generation]] = defaultdict(list)
        for row in self.rows(_GENERATIONS, (orjson.dumps([row["span_id"] for row in rows]).decode(),)):
            generations[row["span_id"]].append(
                Generation(
                    prompt_token_ids=unpack_ids(row["prompt_token_ids"]),
                    response_token_ids=unpack_ids(row["response_token_ids"]),
                    logprobs=unpack_logprobs(row["logprobs"]),
                    finish_reason=row["finish_reason"],
                )
            )
        return [_span_from(row, tuple(generations[row["span_id"]])) for row in rows]


def _span_from(row: sqlite3.Row, generations: tuple[Generation, ...]) -> Span:
    values = dict(row)
    values["fidelity"] = Fidelity(values["fidelity"])
    values["streamed"] = bool(values["streamed"])
    values["usage"] = None if values["usage"] is None else orjson.loads(values["usage"])
    values["sampling"] = orjson.loads(values["sampling"])
    return Span(**values, generations=generations)
