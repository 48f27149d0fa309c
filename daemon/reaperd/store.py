"""reaper.db: sessions and the event history, so that a daemon killed at any moment loses nothing.

Losing the file costs history alone: sessions are found again by their marks. So no fault here ever stops the core.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sqlite3
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from agent import wire
from reaperd.model import Cause, CauseKind, Namespaces, ProcessId, Session, SessionKey
from reaperd.verdicts import Record

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 2
_SCHEMA = f"""
    PRAGMA user_version = {_SCHEMA_VERSION};
    CREATE TABLE sessions (
        uid INTEGER, id TEXT, boot_id TEXT NOT NULL, record TEXT NOT NULL, PRIMARY KEY (uid, id));
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, at_epoch_s REAL NOT NULL, kind TEXT NOT NULL, session TEXT,
        uid INTEGER, record TEXT NOT NULL);
    CREATE INDEX events_at ON events (at_epoch_s);
    CREATE TABLE settled (uid INTEGER, id TEXT, boot_id TEXT NOT NULL, PRIMARY KEY (uid, id));
    CREATE TABLE totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""
# Not of the schema: a file that was made before they were thought of gets them, too.
_ADDED = """
    CREATE TABLE IF NOT EXISTS orphans (
        pid INTEGER, start_ticks INTEGER, boot_id TEXT NOT NULL, record TEXT NOT NULL, PRIMARY KEY (pid, start_ticks));
    CREATE TABLE IF NOT EXISTS spared (
        pid INTEGER, start_ticks INTEGER, boot_id TEXT NOT NULL, PRIMARY KEY (pid, start_ticks));
    CREATE INDEX IF NOT EXISTS events_session ON events (session, seq);
    CREATE INDEX IF NOT EXISTS events_uid ON events (uid, seq);
"""
_BATCH, _MAX_BATCHES = 200, 4  # of events dropped, each time that one is added
_CACHE_KIB = 256
_MAX_REPLY_BYTES = 4 * 1024 * 1024


class Size(NamedTuple):
    """How much of the history there is, or may be."""

    events: int = 0
    stored_bytes: int = 0

    def exceeds(self, limit: Size) -> bool:
        """Say whether it is more than it may be."""
        return self.events > limit.events or self.stored_bytes > limit.stored_bytes

    def plus(self, events: int, stored_bytes: int) -> Size:
        """Return what it is with so much more."""
        return Size(max(0, self.events + events), max(0, self.stored_bytes + stored_bytes))


# A user makes events as fast as sessions can be registered, and large ones with many processes.
MAX_OF_ONE_UID = Size(20_000, 32 * 1024 * 1024)
MAX_OF_ALL = Size(200_000, 256 * 1024 * 1024)


class Store:
    """The database in the state directory; when it cannot be used, one in memory, with a warning.

    Processes are on record for an ``era``: a boot, and the namespaces in which their pids and start times are theirs. Read in
    others, those of the living would be taken for the dead. What is over stays over for the whole boot.
    """

    def __init__(
        self,
        directory: str,
        boot_id: str,
        era: str = "",
        *,
        most_of_one_uid: Size = MAX_OF_ONE_UID,
        most_of_all: Size = MAX_OF_ALL,
    ) -> None:
        self._boot_id = boot_id
        self._era = era or boot_id
        self._ailing = False
        self._lost = False  # something was, since the last commit
        self._database = self._open(os.path.join(directory, "reaper.db"))
        self._most_of_one_uid, self._most_of_all = most_of_one_uid, most_of_all
        self._sizes: dict[int | None, Size] = {}  # of the history, by uid
        self._total = Size()
        self._measure()
        self._cut_to_size()

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
            # Of a long history, quick_check alone would leave 2 MiB in the cache, for as long as the daemon lives.
            database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
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
            database.executescript(f"BEGIN; {_ADDED} COMMIT;")
        except BaseException:
            database.close()
            raise
        return database

    def commit(self) -> bool:
        """Make what was written last, if anything was; False where some of it is lost, on a full disk for one."""
        if self._database.in_transaction:
            with self._fault_is_no_failure():
                self._database.execute("COMMIT")
        lost, self._lost = self._lost, False
        return not lost

    def close(self) -> None:
        """Close the file."""
        self.commit()
        self._database.close()

    # -- sessions ----------------------------------------------------------------------------

    def sessions(self) -> list[Session]:
        """Return the sessions on record for this boot; what cannot be read is left out."""
        found = []
        rows = self._read("SELECT record FROM sessions WHERE boot_id = ?", self._era)
        for (text,) in rows:
            try:
                found.append(_session(json.loads(text)))
            except (ValueError, TypeError, LookupError, wire.WireError) as error:
                log.warning("cannot read a session on record: %r", error)
        self._write("DELETE FROM sessions WHERE boot_id != ?", self._era)
        self._write("DELETE FROM settled WHERE boot_id != ?", self._boot_id)
        return found

    def save(self, session: Session) -> None:
        """Put ``session`` on record as it is now."""
        record = json.dumps(_record(session))
        self._write("REPLACE INTO sessions VALUES (?, ?, ?, ?)", *session.key, self._era, record)

    def forget(self, key: SessionKey) -> None:
        """Take a session off the record."""
        self._write("DELETE FROM sessions WHERE uid = ? AND id = ?", *key)

    def is_settled(self, key: SessionKey) -> bool:
        """Say whether a session of this boot is over, though processes with its marks may live on."""
        where = "WHERE uid = ? AND id = ? AND boot_id = ?"
        return bool(self._read(f"SELECT 1 FROM settled {where}", *key, self._boot_id))  # noqa: S608 - a literal

    def settle(self, key: SessionKey) -> None:
        """Put on record that a session is over for good."""
        self._write("REPLACE INTO settled VALUES (?, ?, ?)", *key, self._boot_id)

    # -- orphans that nobody registered ------------------------------------------------------

    def orphans(self) -> dict[ProcessId, Record]:
        """Return what is on record of suspects for this boot; what cannot be read is left out."""
        for table in ("orphans", "spared"):
            self._write(f"DELETE FROM {table} WHERE boot_id != ?", self._era)  # noqa: S608 - a literal
        found = {}
        for pid, start_ticks, text in self._read("SELECT pid, start_ticks, record FROM orphans"):
            with contextlib.suppress(ValueError, TypeError, LookupError):
                found[ProcessId(int(pid), int(start_ticks))] = _orphan(json.loads(text))
        return found

    def save_orphan(self, id_: ProcessId, record: Record) -> None:
        """Put what is remembered of a suspect on record, its samples apart."""
        text = json.dumps(
            [record.lost_at_s, record.lost_parent, record.quarantined_at_s, record.condemned_at_s, record.uid]
        )
        self._write("REPLACE INTO orphans VALUES (?, ?, ?, ?)", *id_, self._era, text)

    def forget_orphan(self, id_: ProcessId) -> None:
        """Take a suspect off the record."""
        self._write("DELETE FROM orphans WHERE pid = ? AND start_ticks = ?", *id_)

    def spared(self) -> frozenset[ProcessId]:
        """Return who was spared by hand in this boot."""
        rows = self._read("SELECT pid, start_ticks FROM spared WHERE boot_id = ?", self._era)
        return frozenset(ProcessId(int(pid), int(ticks)) for pid, ticks in rows)

    def spare(self, id_: ProcessId) -> None:
        """Put on record that a process is spared."""
        self._write("REPLACE INTO spared VALUES (?, ?, ?)", *id_, self._era)

    def spare_no_longer(self, id_: ProcessId) -> None:
        """Take it off the record that a process is."""
        self._write("DELETE FROM spared WHERE pid = ? AND start_ticks = ?", *id_)

    def events_of_kinds(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the events of some kinds, oldest first."""
        marks = ", ".join("?" * len(kinds))
        rows = self._read(f"SELECT record FROM events WHERE kind IN ({marks}) ORDER BY seq", *kinds)  # noqa: S608
        found = []
        for (record,) in rows:
            with contextlib.suppress(ValueError, TypeError):
                found.append(json.loads(record))
        return found

    def events_about(self, pid: int, *, uid: int | None, limit: int = 20) -> list[dict[str, Any]]:
        """Return the newest events that name the process ``pid``, oldest first; of one uid, where asked for."""
        like = f'%"pid": {pid},%'
        found = []
        for seq, record in self._read(
            "SELECT seq, record FROM events WHERE record LIKE ? AND (? IS NULL OR uid = ?) ORDER BY seq DESC LIMIT ?",
            *(like, uid, uid, 4 * limit),
        ):
            with contextlib.suppress(ValueError, TypeError):
                event = json.loads(record)
                if any(
                    one.get("pid") == pid for one in (*event["processes"], event.get("leader") or {}) if one
                ):
                    found.append({"seq": seq, **event})
        return found[:limit][::-1]

    # -- events ------------------------------------------------------------------------------

    def add_event(self, event: dict[str, Any], at_epoch_s: float) -> int:
        """Append an event and return its number, 0 where that fails; ``at_epoch_s`` is in seconds since 1970.

        The oldest go where there are too many of its uid, or in all.
        """
        uid, record = event.get("uid"), json.dumps(event)
        seq = self._write(
            "INSERT INTO events (at_epoch_s, kind, session, uid, record) VALUES (?, ?, ?, ?, ?)",
            at_epoch_s, event["kind"], event.get("session"), uid, record,
        )  # fmt: skip
        if seq:
            self._note(uid, 1, len(record))
            self._drop_oldest(seq, uid)
        return seq

    def _drop_oldest(self, before: int, uid: int | None) -> None:
        """Drop some events before number ``before`` where there are too many; a file that has many more shrinks slowly."""
        for _ in range(_MAX_BATCHES):
            if self._sizes[uid].exceeds(self._most_of_one_uid):
                self._drop_batch(self._most_of_one_uid, before, "AND uid IS ?", uid)
            if self._total.exceeds(self._most_of_all):
                self._drop_batch(self._most_of_all, before, "")

    def _drop_batch(self, limit: Size, before: int, which: str, *values: Any) -> None:
        rows = self._read(
            f"SELECT seq, uid, length(record) FROM events WHERE seq < ? {which} ORDER BY seq LIMIT ?",  # noqa: S608
            before, *values, min(_BATCH, max(1, limit.events // 20)),
        )  # fmt: skip
        if rows:
            self._write(f"DELETE FROM events WHERE seq <= ? {which}", rows[-1][0], *values)  # noqa: S608
        for _, uid, stored_bytes in rows:
            self._note(uid, -1, -stored_bytes)

    def _note(self, uid: int | None, events: int, stored_bytes: int) -> None:
        self._sizes[uid] = self._sizes.get(uid, Size()).plus(events, stored_bytes)
        self._total = self._total.plus(events, stored_bytes)

    def events(
        self,
        *,
        after: int = 0,
        since_epoch_s: float = 0.0,
        session: str | None = None,
        uid: int | None = None,
        limit: int = 500,
    ) -> list[dict[str, Any]]:
        """Return events after number ``after``, oldest first; of one session, or of one uid and the daemon, where asked for.

        Not all of them where they are very large: who wants more asks again after the last.
        """
        where = "seq > ? AND at_epoch_s >= ?"
        values: list[Any] = [after, since_epoch_s]
        if session is not None:
            where += " AND session = ?"
            values.append(session)
        select = "SELECT seq, record FROM events WHERE"
        # Each half by its index, in order and no further than the limit: OR would read all there is of both.
        whose = ["uid IS NULL", "uid = ?"] if uid is not None else []
        halves = [f"SELECT * FROM ({select} {where} AND {one} ORDER BY seq LIMIT ?)" for one in whose]  # noqa: S608
        statement = " UNION ALL ".join(halves) or f"{select} {where}"
        if uid is not None:
            values = [*values, limit, *values, uid, limit]
        found = []
        for seq, record in self._read_some(f"{statement} ORDER BY seq LIMIT ?", *values, limit):
            with contextlib.suppress(ValueError, TypeError):  # a row that somebody has damaged
                found.append({"seq": seq, **json.loads(record)})
        return found

    def _read_some(self, statement: str, *values: Any) -> list[tuple[int, str]]:
        rows: list[tuple[int, str]] = []
        read_bytes = 0
        with self._fault_is_no_failure():
            for seq, record in self._database.execute(statement, values):
                rows.append((seq, record))
                read_bytes += len(record)
                if read_bytes > _MAX_REPLY_BYTES:
                    break
        return rows

    def last_event(self) -> int:
        """Return the number of the newest event, 0 where there is none."""
        for (seq,) in self._read("SELECT max(seq) FROM events"):
            return seq or 0
        return 0

    def prune(self, keep_s: float) -> None:
        """Drop events older than ``keep_s``."""
        self._write("DELETE FROM events WHERE at_epoch_s < ?", time.time() - keep_s)
        self._measure()

    def _measure(self) -> None:
        """See how much history there is."""
        statement = "SELECT uid, count(*), sum(length(record)) FROM events GROUP BY uid"
        self._sizes = {uid: Size(*size) for uid, *size in self._read(statement)}
        self._total = Size()
        for size in self._sizes.values():
            self._total = self._total.plus(*size)

    def _cut_to_size(self) -> None:
        """Drop the oldest events of a file that was filled before there was a limit."""
        cuts: list[tuple[int, str, tuple[int | None, ...]]] = [
            (self._most_of_one_uid.events, "WHERE uid IS ?", (uid,))
            for uid, size in self._sizes.items()
            if size.events > self._most_of_one_uid.events
        ]
        if self._total.events > self._most_of_all.events:
            cuts.append((self._most_of_all.events, "WHERE TRUE", ()))
        for kept, which, values in cuts:
            oldest = f"SELECT seq FROM events {which} ORDER BY seq DESC LIMIT 1 OFFSET ?"  # noqa: S608 - literals
            self._write(
                f"DELETE FROM events {which} AND seq <= ({oldest})",  # noqa: S608 - literals
                *values, *values, kept,
            )  # fmt: skip
        if cuts:
            self._measure()

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
            if not self._database.in_transaction:
                self._database.execute("BEGIN")
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
            self._ailing = self._lost = True
            with contextlib.suppress(sqlite3.Error):
                self._database.rollback()


_MORE_THAN_ANY = 2**63  # start ticks are the largest: unsigned long in proc(5), 10 ms each


def _orphan(told: Any) -> Record:
    lost_at_s, lost_parent, quarantined_at_s, condemned_at_s, uid = told
    times = [at_s for at_s in (lost_at_s, quarantined_at_s, condemned_at_s) if at_s is not None]
    if not all(isinstance(at_s, float) and math.isfinite(at_s) for at_s in times) or lost_at_s is None:
        raise ValueError("a time is none")
    parent = None if lost_parent is None else ProcessId(*map(int, lost_parent))
    return Record(lost_at_s, (), parent, quarantined_at_s, condemned_at_s, None if uid is None else int(uid))


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
        "page_inode": session.page_inode,
        "cgroup": session.cgroup,
        "adopters": sorted(session.adopters),
        "subreapers": sorted(session.subreapers),
        "init": session.init,
        "namespaces": list(session.namespaces),
        "oom_counter": session.oom_counter,
        "oom_kills": session.oom_kills,
        "spared": sorted(session.spared),
        "seen": sorted(session.seen),
        "kept": sorted(session.kept),
        "cause": None if cause is None else [cause.kind.value, cause.code, cause.core_dumped, cause.clean],
        "groups": session.groups,
        "temp_dirs": session.temp_dirs,
        "ending": session.ending,
        "attempt": session.attempt,
    }


def _session(record: dict[str, Any]) -> Session:
    cause = record["cause"]
    session = Session(
        id=record["id"],
        name=record["name"],
        uid=record["uid"],
        gid=record["gid"],
        leader=ProcessId(*record["leader"]),
        started_at_utc=record["started_at"],
        page_fd=record["page_fd"],
        page_inode=record["page_inode"],
        cgroup=record["cgroup"],
        adopters=frozenset(ProcessId(*pair) for pair in record["adopters"]),
        subreapers=frozenset(ProcessId(*pair) for pair in record.get("subreapers", ())),
        init=None if record["init"] is None else ProcessId(*record["init"]),
        namespaces=Namespaces(*record["namespaces"]),
        oom_counter=record["oom_counter"],
        oom_kills=record["oom_kills"],
        kept=frozenset(ProcessId(*pair) for pair in record["kept"]),
        seen=frozenset(ProcessId(*pair) for pair in record["seen"]),
        spared=frozenset(ProcessId(*pair) for pair in record["spared"]),
        cause=None if cause is None else Cause(CauseKind(cause[0]), *cause[1:]),
        groups=tuple(record.get("groups", ())),
        temp_dirs=tuple(record["temp_dirs"]),
        ending=record["ending"],
        attempt=wire.attempt_field(record),
    )
    init = () if session.init is None else (session.init,)
    ids = (
        session.leader,
        *session.adopters,
        *session.subreapers,
        *init,
        *session.kept,
        *session.seen,
        *session.spared,
    )
    numbers = (
        session.uid,
        session.gid,
        *session.groups,
        session.page_fd,
        *(number for id_ in ids for number in id_),
    )
    if not all(type(number) is int and -1 <= number < _MORE_THAN_ANY for number in numbers):
        raise ValueError("a uid, a gid, a descriptor, a pid or a start time is none")
    if not all(isinstance(text, str) for text in (session.id, session.name, *session.temp_dirs)):
        raise ValueError("an id, a name or a folder is no text")
    return session
