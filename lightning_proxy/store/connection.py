"""One SQLite connection: opening, migrating, transactions, and SQLite's errors in our words.

Everything else in this room is SQL on top of :class:`Connection`.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from lightning_proxy.errors import (
    InvalidInput,
    LightningError,
    StoreError,
    StoreUnavailable,
    UnknownTarget,
)

SCHEMA_VERSION = 12  # PRAGMA user_version once every one of migrations/ has been applied

Synchronous = Literal["normal", "full"]

_Parameters = Sequence[Any] | Mapping[str, Any]

# Primary result codes of what may be over in a moment. SQLite has extended codes in the upper bits.
_UNAVAILABLE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_CORRUPT,
}


def translated(error: BaseException) -> LightningError | None:
    """The error of ours for one of SQLite's; ``None`` where it is no error of the database."""
    if isinstance(error, sqlite3.Error):
        # An error that Python's module finds by itself (a closed connection, say) has no code.
        code: int | None = error.__dict__.get("sqlite_errorcode")
        if code is not None and code & 0xFF in _UNAVAILABLE:
            return StoreUnavailable(f"the database cannot be used at the moment: {error}")
        return StoreError(f"the database refused: {error}")
    if isinstance(error, OverflowError | UnicodeEncodeError):
        return InvalidInput(f"a value cannot be stored: {error}")
    return None


class _Transaction:
    """``BEGIN IMMEDIATE`` .. ``COMMIT``, or a savepoint inside a transaction that has begun."""

    __slots__ = ("_inner", "_owner")

    def __init__(self, owner: Connection) -> None:
        self._owner = owner
        self._inner = False

    def __enter__(self) -> None:
        connection = self._owner.connection
        try:
            # Savepoints of one name nest: ROLLBACK TO and RELEASE mean the innermost.
            self._inner = connection.in_transaction
            connection.execute("SAVEPOINT inner_one" if self._inner else "BEGIN IMMEDIATE")
            if not self._inner:
                self._owner.begun()
        except sqlite3.Error as error:
            raise translated(error) or error from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._owner.connection.execute("RELEASE inner_one" if self._inner else "COMMIT")
                if not self._inner:
                    self._owner.committed()
                return
            except sqlite3.Error as refused:
                error = refused
        try:
            self._roll_back()
        finally:
            ours = translated(error)
            if ours is not None:
                raise ours from error

    def _roll_back(self) -> None:
        self._owner.forget()
        connection = self._owner.connection
        if not connection.in_transaction:  # a full disk makes SQLite roll back by itself
            return
        if self._inner:
            connection.execute("ROLLBACK TO inner_one")
            connection.execute("RELEASE inner_one")
        else:
            connection.execute("ROLLBACK")


class Connection:
    """An open database of the present schema, to be used by one thread at a time."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        """Use :meth:`open`."""
        self.connection = connection
        self.path = path
        # (rollout, attempt) pairs whose rows are known to exist: spares two statements a span.
        self._known_attempts: set[tuple[str, int]] = set()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        synchronous: Synchronous = "normal",
        busy_timeout_s: float = 5.0,
        create: bool = True,
    ) -> Self:
        """Open the database at ``path``, made or migrated to the present schema where need be.

        ``synchronous="normal"`` keeps every commit through the death of any process, ``"full"``
        through the loss of power too. Raises ``UnknownTarget`` where there is no file and
        ``create`` is false, ``StoreError`` for a newer schema or a file of something else,
        ``StoreUnavailable`` where it stays locked for ``busy_timeout_s``.
        """
        path = Path(path)
        if not create and not path.exists():
            raise UnknownTarget(
                f"no database at {path}; `lightning-proxy serve` makes one, and `--db` names another"
            )
        if not path.parent.is_dir():
            raise StoreError(f"cannot make the database {path}: the directory {path.parent} does not exist")
        try:
            connection = sqlite3.connect(
                path,
                timeout=busy_timeout_s,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=256,
            )
        except sqlite3.Error as error:
            raise StoreUnavailable(f"cannot open the database {path}: {error}") from error
        try:
            _prepare(connection, path, synchronous, busy_timeout_s)
        except sqlite3.Error as error:
            connection.close()
            ours = translated(error)
            raise type(ours or StoreError())(f"cannot open the database {path}: {error}") from error
        except BaseException:
            connection.close()
            raise
        connection.row_factory = sqlite3.Row
        return cls(connection, path)

    def close(self) -> None:
        """Close it. A transaction that has not committed is rolled back."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def transaction(self) -> AbstractContextManager[None]:
        """``BEGIN IMMEDIATE`` .. ``COMMIT``, rolled back on any exception; nested, a savepoint.

        Raises ``StoreUnavailable`` where the database is locked, full or unreadable.
        """
        return _Transaction(self)

    def begun(self) -> None:
        """Called where a transaction has begun: others have written before it, and cannot until it ends."""

    def committed(self) -> None:
        """Called where a transaction has ended well."""

    def forget(self) -> None:
        """Drop what is remembered of the tables: called where rows may have been rolled back."""
        self._known_attempts.clear()

    def rows(self, sql: str, parameters: _Parameters = ()) -> list[sqlite3.Row]:
        """All rows of a query."""
        try:
            return self.connection.execute(sql, parameters).fetchall()
        except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
            raise translated(error) or error from error

    def each(self, sql: str, parameters: _Parameters = ()) -> Iterator[sqlite3.Row]:
        """The rows of a query one at a time, for who may not want them all."""
        try:
            yield from self.connection.execute(sql, parameters)
        except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
            raise translated(error) or error from error

    def row(self, sql: str, parameters: _Parameters = ()) -> sqlite3.Row | None:
        """The first row of a query."""
        found = self.rows(sql, parameters)
        return found[0] if found else None

    def scalar(self, sql: str, parameters: _Parameters = ()) -> Any:
        """The first column of the first row; ``None`` where there is no row."""
        found = self.rows(sql, parameters)
        return found[0][0] if found else None


def _prepare(
    connection: sqlite3.Connection, path: Path, synchronous: Synchronous, busy_timeout_s: float
) -> None:
    # Of a new file. Spans of 2 to 5 KB leave less of small pages empty, and a commit writes fewer bytes.
    connection.execute("PRAGMA page_size=1024")
    _enter_wal(connection, busy_timeout_s)
    connection.execute("PRAGMA synchronous=FULL" if synchronous == "full" else "PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten; recording deletes nothing
    connection.execute("PRAGMA journal_size_limit=67108864")  # bytes; a log once grown longer is cut
    connection.execute(
        "PRAGMA wal_autocheckpoint=16000"
    )  # pages, 16 MiB: pages written often are copied once
    if _schema_version(connection) != SCHEMA_VERSION:
        _migrate(connection, path)


def _enter_wal(connection: sqlite3.Connection, busy_timeout_s: float) -> None:
    """SQLite does not wait for locks while it changes the journal mode, so we do."""
    deadline = time.monotonic() + busy_timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _schema_version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """All pending migrations and the new ``user_version`` in one transaction."""
    from sqlite_utils import Database  # here, for it takes a quarter of a second and is needed once

    from lightning_proxy.store.migrations import migrations

    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _schema_version(connection)  # another process may have been first
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"the database {path} has schema {version}, this lightning-proxy knows {SCHEMA_VERSION}: "
                "install a newer lightning-proxy, or give it another file with --db"
            )
        if version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise StoreError(f"{path} is a database of something else: give another file with --db")
        if version < SCHEMA_VERSION:
            migrations.apply(Database(connection, recursive_triggers=False, execute_plugins=False))
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
