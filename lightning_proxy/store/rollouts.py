"""Rollouts, their attempts, and the keys that name them."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from collections.abc import Mapping
from typing import Any

import orjson

from lightning_proxy.errors import Conflict, InvalidInput, UnknownTarget
from lightning_proxy.store.connection import Connection
from lightning_proxy.store.records import Attempt, ErrorClass, KeyOwner, Rollout
from lightning_proxy.words import RolloutState

_ADD_ROLLOUT = "INSERT OR IGNORE INTO rollouts (rollout_id, state, created_at) VALUES (?, 'open', ?)"
_ADD_ATTEMPT = """
INSERT OR IGNORE INTO attempts (rollout_id, number, started_at, state) VALUES (?, ?, ?, 'open')"""
_MOST_KNOWN = 10_000
_LONGEST_ID = 256


class Rollouts(Connection):
    """The rollouts' part of the store."""

    def create_rollout(
        self,
        *,
        rollout_id: str | None = None,
        task_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> tuple[Rollout, bool]:
        """Make a rollout and its attempt 1; true where it was not there before.

        One that is there is kept; a task and metadata are added to it where it had none.
        Raises ``Conflict`` where it belongs to another task, ``InvalidInput`` for an id that does
        not fit into a path.
        """
        if rollout_id is None:
            rollout_id = "ro-" + secrets.token_hex(8)
        check_id("rollout_id", rollout_id)
        if task_id is not None:
            check_id("task_id", task_id)
        encoded = encode(metadata or {})
        now = time.time()
        with self.transaction():
            made = self.connection.execute(_ADD_ROLLOUT, (rollout_id, now)).rowcount == 1
            self.connection.execute(_ADD_ATTEMPT, (rollout_id, 1, now))
            present = self.get_rollout(rollout_id)
            if task_id is not None and present.task_id not in (None, task_id):
                raise Conflict(f"rollout {rollout_id!r} is of task {present.task_id!r}, not of {task_id!r}")
            self.connection.execute(
                "UPDATE rollouts SET task_id = coalesce(task_id, ?), "
                "metadata = CASE metadata WHEN '{}' THEN ? ELSE metadata END WHERE rollout_id = ?",
                (task_id, encoded, rollout_id),
            )
            return self.get_rollout(rollout_id), made

    def issue_key(self, rollout_id: str, attempt: int = 1, role: str | None = None) -> str:
        """A new API key whose calls belong to this attempt (made here, where it is a retry's).

        Only its SHA-256 is kept. Raises ``UnknownTarget`` for an unknown rollout.
        """
        check_attempt(attempt)
        key = "lp-" + secrets.token_urlsafe(24)
        with self.transaction():
            self.get_rollout(rollout_id)
            self.connection.execute(_ADD_ATTEMPT, (rollout_id, attempt, time.time()))
            self.connection.execute(
                "INSERT INTO rollout_keys (key_sha256, rollout_id, attempt, role) VALUES (?, ?, ?, ?)",
                (_hashed(key), rollout_id, attempt, role),
            )
        return key

    def owner_of_key(self, key: str) -> KeyOwner | None:
        """Whose calls come with this key; ``None`` where it was not issued here."""
        sql = "SELECT rollout_id, attempt, role FROM rollout_keys WHERE key_sha256 = ?"
        row = self.row(sql, (_hashed(key),))
        return None if row is None else KeyOwner(row["rollout_id"], row["attempt"], row["role"])

    def get_rollout(self, rollout_id: str) -> Rollout:
        """One rollout. Raises ``UnknownTarget``."""
        row = self.row("SELECT * FROM rollouts WHERE rollout_id = ?", (rollout_id,))
        if row is None:
            raise UnknownTarget(f"no rollout {rollout_id!r}")
        return rollout_from(row)

    def list_attempts(self, rollout_id: str) -> list[Attempt]:
        """Its attempts, first to last."""
        rows = self.rows("SELECT * FROM attempts WHERE rollout_id = ? ORDER BY number", (rollout_id,))
        return [
            Attempt(
                **{
                    **dict(row),
                    "state": RolloutState(row["state"]),
                    "error_class": error_class_from(row["error_class"]),
                }
            )
            for row in rows
        ]

    def finish_rollout(
        self,
        rollout_id: str,
        state: RolloutState,
        reason: str | None = None,
        error_class: ErrorClass | None = None,
        *,
        presumed: bool = False,
    ) -> Rollout:
        """End a rollout and its last attempt, if that is open; the same end again changes nothing.

        ``presumed``: nobody told that it ended. Whoever does so later has the last word. Raises
        ``UnknownTarget``, ``Conflict`` where it has ended otherwise, ``InvalidInput`` for ``OPEN`` and for a
        success with an ``error_class``.
        """
        if state is RolloutState.OPEN:
            raise InvalidInput("a rollout ends as succeeded, failed or cancelled; open is where it starts")
        if state is RolloutState.SUCCEEDED and error_class is not None:
            raise InvalidInput(
                f"a rollout that succeeded has no error_class, and this has {error_class.value}"
            )
        failure = None if error_class is None else error_class.value
        now = time.time()
        with self.transaction():
            present = self.get_rollout(rollout_id)
            if present.state is state and not present.presumed:
                return present
            if present.state is not RolloutState.OPEN and (presumed or not present.presumed):
                raise Conflict(f"rollout {rollout_id!r} has already ended as {present.state.value}")
            self.connection.execute(
                "UPDATE rollouts SET state = ?, ended_at = ?, reason = ?, error_class = ?, presumed = ? "
                "WHERE rollout_id = ?",
                (state.value, now, reason, failure, presumed, rollout_id),
            )
            self.connection.execute(
                "UPDATE attempts SET state = ?, ended_at = ?, reason = ?, error_class = ? "
                "WHERE rollout_id = ? AND state = 'open' "
                "AND number = (SELECT max(number) FROM attempts WHERE rollout_id = ?)",
                (state.value, now, reason, failure, rollout_id, rollout_id),
            )
            return self.get_rollout(rollout_id)

    def mark_incomplete(self, rollout_id: str, why: str) -> None:
        """Capture has lost a span of this rollout. The first reason stays. Makes the rollout if unknown."""
        with self.transaction():
            self.know_attempt(rollout_id, 1, time.time())
            self.connection.execute(
                "UPDATE rollouts SET incomplete = coalesce(incomplete, ?) WHERE rollout_id = ?",
                (why, rollout_id),
            )

    def know_attempt(self, rollout_id: str, attempt: int, at: float) -> bool:
        """See to it that the rows of this attempt and its rollout exist; true where the attempt was made.

        Runs in the caller's transaction.
        """
        pair = (rollout_id, attempt)
        if pair in self._known_attempts:
            return False
        self.connection.execute(_ADD_ROLLOUT, (rollout_id, at))
        made = self.connection.execute(_ADD_ATTEMPT, (rollout_id, attempt, at)).rowcount == 1
        if len(self._known_attempts) >= _MOST_KNOWN:
            self._known_attempts.clear()
        self._known_attempts.add(pair)
        return made


def rollout_from(row: sqlite3.Row) -> Rollout:
    """A row of ``rollouts``."""
    return Rollout(
        rollout_id=row["rollout_id"],
        task_id=row["task_id"],
        state=RolloutState(row["state"]),
        created_at=row["created_at"],
        ended_at=row["ended_at"],
        reason=row["reason"],
        error_class=error_class_from(row["error_class"]),
        presumed=bool(row["presumed"]),
        incomplete=row["incomplete"],
        metadata=orjson.loads(row["metadata"]),
    )


def error_class_from(text: str | None) -> ErrorClass | None:
    """A column with the class of a failure."""
    return None if text is None else ErrorClass(text)


def encode(value: Mapping[str, Any]) -> str:
    """A mapping as JSON text. Raises ``InvalidInput`` for what JSON cannot hold."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    except TypeError as error:
        raise InvalidInput(f"not JSON: {error}") from error


def check_id(name: str, value: object) -> None:
    """Raise ``InvalidInput`` unless ``value`` is a text that fits into one segment of a path."""
    if not isinstance(value, str) or not 1 <= len(value) <= _LONGEST_ID:
        raise InvalidInput(f"{name} must be a text of 1 to {_LONGEST_ID} characters, not {value!r:.80}")
    if "/" in value or not value.isprintable():
        raise InvalidInput(f"{name} must be printable and without '/', not {value!r:.80}")


def check_attempt(attempt: object) -> None:
    """Raise ``InvalidInput`` unless ``attempt`` is a number from 1 up."""
    if not isinstance(attempt, int) or isinstance(attempt, bool) or attempt < 1:
        raise InvalidInput(f"attempt must be a whole number from 1 up, not {attempt!r:.80}")


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
