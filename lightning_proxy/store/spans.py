"""Spans with their generations. Adding one is the hot path of the whole system."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import orjson

from lightning_proxy.errors import UnknownTarget
from lightning_proxy.store.archive import Archive, Said, id_list
from lightning_proxy.store.connection import translated
from lightning_proxy.store.records import ConversationEnd, ErrorClass, Finding, Span
from lightning_proxy.store.rollouts import encode
from lightning_proxy.words import Fidelity

# Constant texts, so that SQLite's statements stay prepared in the connection's cache.
_ADD_SPAN = """
INSERT INTO spans (
  rollout_id, attempt, role, wire, model, policy, policy_version, policy_version_end,
  attributed_by, attribution_confidence, started_at, first_byte_at, ended_at, streamed, status,
  response_id, fidelity, error_class, error, usage, sampling, request, response, retry, conversation,
  redacted, prompt_tokens, response_tokens
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, x'', ?, ?, ?, ?, ?, ?)"""
_ADD_FINDING = "INSERT INTO findings (span_id, error_class, detail, call_id, at) VALUES (?, ?, ?, ?, ?)"
_FINDINGS = """
SELECT * FROM findings WHERE span_id IN (SELECT value FROM json_each(?)) ORDER BY rowid"""
# Of spans from before these counts were kept; length() does not read what it measures.
_RAW_COUNTS = """
SELECT span_id, sum(length(prompt_token_ids)) FILTER (WHERE choice = 0) / 4 AS prompt_tokens,
  sum(length(response_token_ids)) / 4 AS response_tokens
FROM generations WHERE span_id IN (SELECT value FROM json_each(?)) GROUP BY span_id"""

_ENDS = """
SELECT span_id, rollout_id, attempt, conversation, EXISTS (
  SELECT 1 FROM spans AS later WHERE later.rollout_id = ends.rollout_id
    AND later.attempt = ends.attempt AND later.span_id > ends.span_id AND later.error_class IS NULL
) AS extended
FROM spans AS ends WHERE {} = ? AND response IS NOT NULL ORDER BY span_id DESC LIMIT ?"""
_ENDS_BY_CONVERSATION = _ENDS.format("conversation")
_ENDS_BY_RESPONSE = _ENDS.format("response_id")
_MANY_REQUESTS = 50  # that are held at a time
_BEYOND_ALL = 2**63 - 1
_READ_AT_ONCE = 64  # spans that `iterate_spans` holds in memory
_MOST_ENDS = 16  # rollouts with the same history that are told apart; the newest
_OF_ATTEMPT = "SELECT * FROM spans WHERE rollout_id = ? AND attempt = ? ORDER BY started_at, span_id"


class Spans(Archive):
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
            self.look_at_others()
            if self.know_attempt(span.rollout_id, span.attempt, span.started_at):
                self.attempt_is_new((span.rollout_id, span.attempt))
            return self._insert(span)
        except sqlite3.IntegrityError as error:
            # Somebody else may have deleted the rollout that we remember.
            foreign = error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY
            if not foreign or (span.rollout_id, span.attempt) not in self._known_attempts:
                raise translated(error) or error from error
            self._known_attempts.clear()
            self.forget_content()
            return self.write_span(span)
        except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
            raise translated(error) or error from error

    def _insert(self, span: Span) -> int:
        told = self.tell(span)
        generations = span.generations
        counted = bool(generations) and span.redacted is None  # else there are no token ids
        # Plain ints and texts: for enums and bools sqlite3 looks for an adapter each time.
        span_id = self.connection.execute(
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
                None if span.error_class is None else str(span.error_class),
                span.error,
                encode(span.usage) if span.usage is not None else None,
                encode(span.sampling) if span.sampling else "{}",
                None if span.response is None else b"",
                span.retry,
                span.conversation,
                span.redacted,
                len(generations[0].prompt_token_ids) if counted else None,
                sum(len(one.response_token_ids) for one in generations) if counted else None,
            ),
        ).lastrowid
        assert span_id is not None  # an INSERT into a table with a rowid has one
        span_id = self.free_id(span_id)
        self.write_content((span.rollout_id, span.attempt), span_id, told)
        if span.findings:
            self._add_findings(span_id, span)
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
        content: bool = True,
    ) -> list[Span]:
        """Spans, newest first; ``before`` is the span id to go on from.

        Without ``content`` they come as heads: request and response are empty, there are no generations,
        and nothing of what the spans hold is read.
        """
        wanted = {"rollout_id = ?": rollout_id, "attempt = ?": attempt, "span_id < ?": before}
        where = " AND ".join(clause for clause, value in wanted.items() if value is not None) or "1"
        values = [value for value in wanted.values() if value is not None]
        sql = f"SELECT * FROM spans WHERE {where} ORDER BY span_id DESC LIMIT ?"
        return self._spans(sql, (*values, limit), content=content)

    def spans_of_attempt(self, rollout_id: str, attempt: int) -> tuple[Span, ...]:
        """All spans of one attempt, in the order in which they were started."""
        return tuple(self._spans(_OF_ATTEMPT, (rollout_id, attempt)))

    def heads_of_attempt(self, rollout_id: str, attempt: int) -> tuple[Span, ...]:
        """The same as heads: see :meth:`list_spans`."""
        return tuple(self._spans(_OF_ATTEMPT, (rollout_id, attempt), content=False))

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
            wanted = id_list(ids[start : start + _READ_AT_ONCE])
            yield from self._spans(
                "SELECT * FROM spans WHERE span_id IN (SELECT value FROM json_each(?)) "
                "ORDER BY started_at, span_id",
                (wanted,),
            )

    def recent_requests(self, limit: int) -> Iterator[tuple[str, str | None, str, bytes]]:
        """``(rollout id, role, wire, request)`` of the newest spans, newest first, some at a time."""
        sql = (
            "SELECT span_id, rollout_id, role, wire FROM spans WHERE span_id < ? "
            "ORDER BY span_id DESC LIMIT ?"
        )
        before = _BEYOND_ALL
        while limit > 0 and (rows := self.rows(sql, (before, min(limit, _MANY_REQUESTS)))):
            limit -= len(rows)
            before = rows[-1]["span_id"]
            said = self.contents_of([row["span_id"] for row in rows], tokens=False)
            for span_id, rollout_id, role, wire in rows:
                if span_id in said:  # else it was deleted meanwhile
                    yield rollout_id, role, wire, said[span_id].request

    def conversation_ends(
        self, digests: Sequence[bytes], response_ids: Sequence[str] = ()
    ) -> tuple[ConversationEnd, ...]:
        """The calls that a next one may go on from, oldest first.

        By the first of the response ids that is known, else by the first such digest.
        """
        for sql, keys in ((_ENDS_BY_RESPONSE, response_ids), (_ENDS_BY_CONVERSATION, digests)):
            for key in keys:
                if rows := self.rows(sql, (key, _MOST_ENDS)):
                    responses = self.responses_of([row["span_id"] for row in rows])
                    return tuple(
                        ConversationEnd(
                            rollout_id=row["rollout_id"],
                            attempt=row["attempt"],
                            conversation=row["conversation"],
                            response=responses[row["span_id"]],
                            extended=bool(row["extended"]),
                        )
                        for row in reversed(rows)
                        if row["span_id"] in responses  # else it was deleted meanwhile
                    )
        return ()

    def _spans(self, sql: str, parameters: Sequence[Any], *, content: bool = True) -> list[Span]:
        rows = self.rows(sql, parameters)
        return self._with_findings(self._content_of(rows) if content else self._heads_of(rows))

    def _content_of(self, rows: Sequence[sqlite3.Row]) -> list[Span]:
        said = self.contents_of([row["span_id"] for row in rows])
        # What was deleted between the two questions is left out.
        return [_span_from(row, said[row["span_id"]]) for row in rows if row["span_id"] in said]

    def _heads_of(self, rows: Sequence[sqlite3.Row]) -> list[Span]:
        uncounted = [row["span_id"] for row in rows if row["prompt_tokens"] is None]
        counts = {row["span_id"]: dict(row) for row in self.rows(_RAW_COUNTS, (id_list(uncounted),))}
        return [_span_from({**dict(row), **counts.get(row["span_id"], {})}, _head_only(row)) for row in rows]

    def _add_findings(self, span_id: int, span: Span) -> None:
        self.connection.executemany(
            _ADD_FINDING,
            [
                (span_id, one.error_class.value, one.detail, one.call_id, span.ended_at)
                for one in span.findings
            ],
        )

    def _with_findings(self, spans: list[Span]) -> list[Span]:
        """The spans with what was found in them: few have anything."""
        found: defaultdict[int | None, list[Finding]] = defaultdict(list)
        for row in self.rows(_FINDINGS, (id_list([span.span_id for span in spans]),)):
            kind = ErrorClass(row["error_class"])
            found[row["span_id"]].append(Finding(kind, row["detail"], row["call_id"]))
        return [
            replace(span, findings=tuple(found[span.span_id])) if span.span_id in found else span
            for span in spans
        ]


def _head_only(row: sqlite3.Row) -> Said:
    return Said(b"", None if row["error_class"] is not None else b"", ())


def _span_from(row: sqlite3.Row | dict[str, Any], said: Said) -> Span:
    values = dict(row)
    values["error_class"] = _known(values["error_class"])
    values["fidelity"] = Fidelity(values["fidelity"])
    values["streamed"] = bool(values["streamed"])
    values["usage"] = None if values["usage"] is None else orjson.loads(values["usage"])
    values["sampling"] = orjson.loads(values["sampling"])
    if values["prompt_tokens"] is None and said.generations:  # from before these counts were kept
        values["prompt_tokens"] = len(said.generations[0].prompt_token_ids)
        values["response_tokens"] = sum(len(one.response_token_ids) for one in said.generations)
    values |= {"request": said.request, "response": said.response, "generations": said.generations}
    return Span(**values)


def _known(error_class: str | None) -> ErrorClass | str | None:
    """The class that a text names; the text itself where there is no such class (any more)."""
    try:
        return None if error_class is None else ErrorClass(error_class)
    except ValueError:
        return error_class
