"""reaper.db: sessions and the event history, so that a daemon killed at any moment loses nothing.

Losing the file costs history alone: sessions are found again by their marks. So no fault here ever stops the core.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

from reaperd.model import Cause, CauseKind, Namespaces, ProcessId, Session

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 1
_SCHEMA = f"""
    PRAGMA user_version = {_SCHEMA_VERSION};
    CREATE TABLE sessions (id TEXT PRIMARY KEY, boot_id TEXT NOT NULL, record TEXT NOT NULL);
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, at_epoch_s REAL NOT NULL, kind TEXT NOT NULL, session TEXT,
        uid INTEGER, record TEXT NOT NULL);
    CREATE INDEX events_at ON events (at_epoch_s);
    CREATE TABLE settled (id TEXT PRIMARY KEY, boot_id TEXT NOT NULL);
    CREATE TABLE totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""


class Store:
    """The database in the state directory; when it cannot be used, one in memory, with a warning."""

    def __init__(self, directory: str, boot_id: str) -> None:
        self._boot_id = boot_id
        self._ailing = False
        self._database = self._open(os.path.join(directory, "reaper.db"))

    def _open(self, path: str) -> sqlite3.Connection:
        for attempt in ("first", "again"):
            try:
                return self._connect(path)
            except sqlite3.DatabaseError as error:
                # OperationalError is the disk's fault (full, read-only, locked); all else is the file's.
                if isinstance(error, sqlite3.OperationalError) or attempt == "again":
                    log.warning("cannot use %r: %s; events and sessions are kept in memory only", path, error)
                    break
                aside = _move_aside(path)
                log.warning("cannot read %r: %s; moved it to %r and began a new one", path, error, aside)
        return self._connect(":memory:")

    def _connect(self, path: str) -> sqlite3.Connection:
        database = sqlite3.connect(path, timeout=0.02, isolation_level=None)
        try:
            # kill -9 loses nothing that was written; only a power failure does, and no session outlives that.
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                database.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            elif version != _SCHEMA_VERSION:
                raise sqlite3.DatabaseError(f"its version is {version}, this daemon knows {_SCHEMA_VERSION}")
            if database.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("it is corrupt")
        except BaseException:
            database.close()
            raise
        return database

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    # -- sessions ----------------------------------------------------------------------------

    def sessions(self) -> list[Session]:
        """Return the sessions on record for this boot; what cannot be read is left out."""
        found = []
        rows = self._read("SELECT record FROM sessions WHERE boot_id = ?", self._boot_id)
        for (text,) in rows:
            try:
                found.append(_session(json.loads(text)))
            except (ValueError, TypeError, LookupError) as error:
                log.warning("cannot read a session on record: %r", error)
        for table in ("sessions", "settled"):
            self._write(f"DELETE FROM {table} WHERE boot_id != ?", self._boot_id)  # noqa: S608 - a literal
        return found

    def save(self, session: Session) -> None:
        """Put ``session`` on record as it is now."""
        self._write(
            "REPLACE INTO sessions VALUES (?, ?, ?)", session.id, self._boot_id, json.dumps(_record(session))
        )

    def forget(self, session_id: str) -> None:
        """Take a session off the record."""
        self._write("DELETE FROM sessions WHERE id = ?", session_id)

    def is_settled(self, session_id: str) -> bool:
        """Say whether a session of this boot is over, though processes with its marks may live on."""
        return bool(
            self._read("SELECT 1 FROM settled WHERE id = ? AND boot_id = ?", session_id, self._boot_id)
        )

    def settle(self, session_id: str) -> None:
        """Put on record that a session is over for good."""
        self._write("REPLACE INTO settled VALUES (?, ?)", session_id, self._boot_id)

    # -- events ------------------------------------------------------------------------------

    def add_event(self, event: dict[str, Any], at_epoch_s: float) -> int:
        """Append an event and return its number; ``at_epoch_s`` is in seconds since 1970."""
        return self._write(
            "INSERT INTO events (at_epoch_s, kind, session, uid, record) VALUES (?, ?, ?, ?, ?)",
            at_epoch_s, event["kind"], event.get("session"), event.get("uid"), json.dumps(event),
        )  # fmt: skip

    def events(
        self,
        *,
        after: int = 0,
        since_epoch_s: float = 0.0,
        session: str | None = None,
        uid: int | None = None,
        limit: int = 500,
    ) -> list[dict[str, Any]]:
        """Return events after number ``after``, oldest first; of one session or one uid, where asked for."""
        rows = self._read(
            "SELECT seq, record FROM events WHERE seq > ? AND at_epoch_s >= ? AND (? IS NULL OR session = ?)"
            " AND (? IS NULL OR uid = ? OR uid IS NULL) ORDER BY seq LIMIT ?",
            after, since_epoch_s, session, session, uid, uid, limit,
        )  # fmt: skip
        found = []
        for seq, record in rows:
            with contextlib.suppress(ValueError, TypeError):  # a row that somebody has damaged
                found.append({"seq": seq, **json.loads(record)})
        return found

    def last_event(self) -> int:
        """Return the number of the newest event, 0 where there is none."""
        for (seq,) in self._read("SELECT max(seq) FROM events"):
            return seq or 0
        return 0

    def prune(self, keep_s: float) -> None:
        """Drop events older than ``keep_s``."""
        self._write("DELETE FROM events WHERE at_epoch_s < ?", time.time() - keep_s)

    def add_total(self, name: str, amount: int) -> None:
        """Add to a sum that outlives the events."""
        self._write(
            "INSERT INTO totals VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            name,
            amount,
        )

    def total(self, name: str) -> int:
        """Return a sum."""
        for (value,) in self._read("SELECT value FROM totals WHERE name = ?", name):
            return int(value)
        return 0

    # -- the file ----------------------------------------------------------------------------

    def _read(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._fault_is_no_failure():
            return self._database.execute(statement, values).fetchall()
        return []

    def _write(self, statement: str, *values: Any) -> int:
        with self._fault_is_no_failure():
            row = self._database.execute(statement, values).lastrowid
            self._ailing = False
            return row or 0
        return 0

    @contextlib.contextmanager
    def _fault_is_no_failure(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:  # a full disk, a lock, a file that somebody overwrote
            if not self._ailing:
                log.warning("cannot use the state database: %s; going on without", error)
            self._ailing = True


def _move_aside(path: str) -> str:
    aside = f"{path}.broken-{time.time_ns()}"
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(path + suffix, aside + suffix)
    return aside


def _record(session: Session) -> dict[str, Any]:
    cause = session.cause
    return {
        "id": session.id,
        "name": session.name,
        "uid": session.uid,
        "gid": session.gid,
        "leader": session.leader,
        "started_at": session.started_at_utc,
        "page_fd": session.page_fd,
        "cgroup": session.cgroup,
        "adopters": sorted(session.adopters),
        "namespaces": [session.namespaces.pid, session.namespaces.mnt, session.namespaces.time],
        "oom_counter": session.oom_counter,
        "oom_kills": session.oom_kills,
        "spared": sorted(session.spared),
        "seen": sorted(session.seen),
        "kept": sorted(session.kept),
        "cause": None if cause is None else [cause.kind.value, cause.code, cause.core_dumped, cause.clean],
        "temp_dirs": session.temp_dirs,
        "ending": session.ending,
    }


def _session(record: dict[str, Any]) -> Session:
    cause = record["cause"]
    return Session(
        id=record["id"],
        name=record["name"],
        uid=record["uid"],
        gid=record["gid"],
        leader=ProcessId(*record["leader"]),
        started_at_utc=record["started_at"],
        page_fd=record["page_fd"],
        cgroup=record["cgroup"],
        adopters=frozenset(ProcessId(*pair) for pair in record["adopters"]),
        namespaces=Namespaces(*record["namespaces"]),
        oom_counter=record["oom_counter"],
        oom_kills=record["oom_kills"],
        kept=frozenset(ProcessId(*pair) for pair in record["kept"]),
        seen=frozenset(ProcessId(*pair) for pair in record["seen"]),
        spared=frozenset(ProcessId(*pair) for pair in record["spared"]),
        cause=None if cause is None else Cause(CauseKind(cause[0]), *cause[1:]),
        temp_dirs=tuple(record["temp_dirs"]),
        ending=record["ending"],
    )
