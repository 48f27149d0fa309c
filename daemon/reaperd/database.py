"""The file behind the store: opened whatever its state, and written to as soon as that is possible. No fault of it is raised.

What could not be written, on a full disk or while somebody else has the file locked, is kept in mind and written later, in
the order in which it was meant to be.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

# After a failure: waiting for a lock costs 20 ms each time, and nobody's reap is to wait for it.
RETRY_S = 0.5
_LOCK_S = 0.02
_CACHE_KIB = 256
_MOST_BYTES = 8 * 1024 * 1024  # of what could not be written; then the oldest of it is lost
_ROW_BYTES = 200
# How SQLite says that it is the disk's fault, or somebody else's: what could not be written can be later.
_PASSING = ("full", "locked", "disk I/O error", "readonly", "unable to open")


class Schema(NamedTuple):
    """The tables: SQL for a new file, SQL for every file, and the version that a file must have."""

    new: str
    added: str
    version: int


class _Write(NamedTuple):
    """A statement that is not committed yet."""

    statement: str
    values: tuple[Any, ...]
    size_bytes: int


class Database:
    """One file, or memory alone where that cannot be used."""

    def __init__(self, path: str, schema: Schema, retry_s: float = RETRY_S) -> None:
        self._retry_s = retry_s
        self._retry_at_s = 0.0  # nothing is written before
        self._is_ailing = False
        self._pending: collections.deque[_Write] = collections.deque()  # since the last commit
        self._pending_bytes = 0
        self._lost = False  # some of it was, since the last commit
        self.connection = _open(path, schema)

    def read(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return all rows, none where the file fails."""
        with self.faults_told():
            return self.connection.execute(statement, values).fetchall()
        return []

    def write(self, statement: str, *values: Any) -> None:
        """Have a statement carried out, with all that was written since the last commit or not at all."""
        size_bytes = _ROW_BYTES + sum(len(value) for value in values if isinstance(value, str))
        self._pending.append(_Write(statement, values, size_bytes))
        self._pending_bytes += size_bytes
        while self._pending_bytes > _MOST_BYTES and len(self._pending) > 1 and self._is_ailing:
            self._pending_bytes -= self._pending.popleft().size_bytes
            self._lost = True
        if self._may_try() and (self.connection.in_transaction or len(self._pending) == 1):
            self._carry_out([self._pending[-1]])

    def commit(self) -> bool:
        """Make what was written last, if anything was; False where some of it is lost for good."""
        # Where no transaction is open, all that had been carried out was undone by the failure of a later one.
        if (
            self._pending
            and self._may_try()
            and (self.connection.in_transaction or self._carry_out([*self._pending]))
        ):
            with self.faults_told(writing=True):
                self.connection.execute("COMMIT")
                self._pending.clear()
                self._pending_bytes = 0
                self._is_ailing = False
        lost, self._lost = self._lost, False
        return not lost

    @property
    def has_pending(self) -> bool:
        """Whether anything is not committed yet."""
        return bool(self._pending)

    @property
    def is_behind(self) -> bool:
        """Whether something was written that cannot be read yet, for it could not be carried out."""
        return bool(self._pending) and not self.connection.in_transaction

    def close(self) -> None:
        """Commit, and close the file."""
        self._retry_at_s = 0.0
        self.commit()
        self.connection.close()

    @contextlib.contextmanager
    def faults_told(self, *, writing: bool = False) -> Iterator[None]:
        """Tell once of what goes wrong in the block, and go on behind it."""
        try:
            yield
        # A full disk, a lock, a file that somebody overwrote; sqlite's own sentences quote that as it is.
        except (sqlite3.Error, UnicodeDecodeError, MemoryError) as error:
            if not self._is_ailing:
                log.warning("cannot use the state database: %s; trying again until that is over", error)
            self._is_ailing = True
            if writing:
                self._retry_at_s = time.monotonic() + self._retry_s
                with contextlib.suppress(sqlite3.Error):
                    self.connection.rollback()

    def _may_try(self) -> bool:
        return time.monotonic() >= self._retry_at_s

    def _carry_out(self, writes: Sequence[_Write]) -> bool:
        """Say whether all of ``writes`` were carried out; one that never can be is lost, and what was before it undone."""
        with self.faults_told(writing=True):
            if not self.connection.in_transaction:
                self.connection.execute("BEGIN")
            for write in writes:
                try:
                    self.connection.execute(write.statement, write.values)
                except sqlite3.Error as error:
                    if not any(words in str(error) for words in _PASSING):
                        self._pending.remove(write)
                        self._pending_bytes -= write.size_bytes
                        self._lost = True
                    raise
            return True
        return False


def _open(path: str, schema: Schema) -> sqlite3.Connection:
    for attempt in ("first", "again"):
        try:
            return _connect(path, schema)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            # OperationalError is the disk's fault (full, read-only, locked); all else is the file's.
            if isinstance(error, sqlite3.OperationalError) or attempt == "again":
                log.warning("cannot use %r: %s; events and sessions are kept in memory only", path, error)
                break
            try:
                aside = _move_aside(path)
            except OSError as refusal:
                log.warning("cannot use %r: %s, and cannot move it aside: %s", path, error, refusal.strerror)
                break
            log.warning("cannot read %r: %s; moved it to %r and began a new one", path, error, aside)
    return _connect(":memory:", schema)


def _connect(path: str, schema: Schema) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=_LOCK_S, isolation_level=None)
    # One text that is no UTF-8 would be the end of reading all that were asked for with it.
    database.text_factory = lambda data: data.decode("utf-8", "replace")
    try:
        # Of a long history, quick_check alone would leave 2 MiB in the cache, for as long as the daemon lives.
        database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        # kill -9 loses nothing that was written; only a power failure does, and no session outlives that.
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            database.executescript(f"BEGIN; {schema.new} COMMIT;")
        elif version != schema.version:
            raise sqlite3.DatabaseError(f"its version is {version}, this daemon knows {schema.version}")
        if database.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("it is corrupt")
        database.executescript(f"BEGIN; {schema.added} COMMIT;")
    except BaseException:
        database.close()
        raise
    return database


def _move_aside(path: str) -> str:
    aside = f"{path}.broken-{time.time_ns()}"
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(path + suffix, aside + suffix)
    return aside
