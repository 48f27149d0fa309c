"""reaper.db: sessions and the event history, so that a daemon killed at any moment loses nothing.

Losing the file costs history alone: sessions are found again by their marks. So no fault here ever stops the core.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from reaperd import stored
from reaperd.database import RETRY_S, Database, Schema
from reaperd.model import ProcessId, Session, SessionKey
from reaperd.questions import Question, is_of, select_events
from reaperd.verdicts import Record

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 2
_NEW = f"""
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
    CREATE INDEX IF NOT EXISTS events_kind ON events (kind, seq);
    CREATE INDEX IF NOT EXISTS events_uid_kind ON events (uid, kind, seq);
"""
_SCHEMA = Schema(_NEW, _ADDED, _SCHEMA_VERSION)
_BATCH, _MAX_BATCHES = 200, 4  # of events dropped, each time that one is added
_MAX_REPLY_BYTES = 4 * 1024 * 1024
_MOST_OF_ONE_PID = 20  # events that name it
_ALL = Question()


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
        retry_s: float = RETRY_S,
        now_epoch_s: Callable[[], float] = time.time,
    ) -> None:
        self._boot_id = boot_id
        self._now_epoch_s = now_epoch_s
        self._era = era or boot_id
        self._database = Database(os.path.join(directory, "reaper.db"), _SCHEMA, retry_s)
        self._read, self._write = self._database.read, self._database.write
        # What is gone by must not depend on whether it could be written yet.
        self._settling: set[SessionKey] = set()
        self._spared = self._spared_on_record()
        self._seq = self._last_given()
        self._most_of_one_uid, self._most_of_all = most_of_one_uid, most_of_all
        self._sizes: dict[int | None, Size] = {}  # of the history, by uid
        self._total = Size()
        self._measure()
        self._cut_to_size()

    def commit(self) -> bool:
        """Make what was written last, if anything was; False where some of it is lost for good.

        What cannot be written for the time being, on a full disk for one, is not lost: that is done by a later commit.
        """
        whole = self._database.commit()
        if not self._database.has_pending:
            self._settling.clear()
        return whole

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    # -- sessions ----------------------------------------------------------------------------

    def sessions(self) -> list[Session]:
        """Return the sessions on record for this boot; what cannot be read is left out."""
        found = []
        rows = self._read("SELECT record FROM sessions WHERE boot_id = ?", self._era)
        for (text,) in rows:
            try:
                found.append(stored.parse_session(text))
            except ValueError as error:
                log.warning("cannot read a session on record: %s", error)
        self._write("DELETE FROM sessions WHERE boot_id != ?", self._era)
        self._write("DELETE FROM settled WHERE boot_id != ?", self._boot_id)
        return found

    def save(self, session: Session) -> None:
        """Put ``session`` on record as it is now."""
        record = stored.pack_session(session)
        self._write("REPLACE INTO sessions VALUES (?, ?, ?, ?)", *session.key, self._era, record)

    def forget(self, key: SessionKey) -> None:
        """Take a session off the record."""
        self._write("DELETE FROM sessions WHERE uid = ? AND id = ?", *key)

    def is_settled(self, key: SessionKey) -> bool:
        """Say whether a session of this boot is over, though processes with its marks may live on."""
        if key in self._settling:
            return True
        where = "WHERE uid = ? AND id = ? AND boot_id = ?"
        return bool(self._read(f"SELECT 1 FROM settled {where}", *key, self._boot_id))  # noqa: S608 - a literal

    def settle(self, key: SessionKey) -> None:
        """Put on record that a session is over for good."""
        self._settling.add(key)
        self._write("REPLACE INTO settled VALUES (?, ?, ?)", *key, self._boot_id)

    # -- orphans that nobody registered ------------------------------------------------------

    def orphans(self) -> dict[ProcessId, Record]:
        """Return what is on record of suspects for this boot; what cannot be read is left out."""
        for table in ("orphans", "spared"):
            self._write(f"DELETE FROM {table} WHERE boot_id != ?", self._era)  # noqa: S608 - a literal
        found = {}
        for pid, start_ticks, text in self._read("SELECT pid, start_ticks, record FROM orphans"):
            with contextlib.suppress(ValueError):
                found[stored.parse_process_id(pid, start_ticks)] = stored.parse_suspect(text)
        return found

    def save_orphan(self, id_: ProcessId, record: Record) -> None:
        """Put what is remembered of a suspect on record, its samples apart."""
        row = (*id_, self._era, stored.pack_suspect(record))
        self._write("REPLACE INTO orphans VALUES (?, ?, ?, ?)", *row)

    def forget_orphan(self, id_: ProcessId) -> None:
        """Take a suspect off the record."""
        self._write("DELETE FROM orphans WHERE pid = ? AND start_ticks = ?", *id_)

    def spared(self) -> frozenset[ProcessId]:
        """Return who was spared by hand in this boot."""
        return self._spared

    def _spared_on_record(self) -> frozenset[ProcessId]:
        found = set()
        for row in self._read("SELECT pid, start_ticks FROM spared WHERE boot_id = ?", self._era):
            with contextlib.suppress(ValueError):
                found.add(stored.parse_process_id(*row))
        return frozenset(found)

    def spare(self, id_: ProcessId) -> None:
        """Put on record that a process is spared."""
        self._spared |= {id_}
        self._write("REPLACE INTO spared VALUES (?, ?, ?)", *id_, self._era)

    def spare_no_longer(self, id_: ProcessId) -> None:
        """Take it off the record that a process is."""
        self._spared -= {id_}
        self._write("DELETE FROM spared WHERE pid = ? AND start_ticks = ?", *id_)

    def events_of_kinds(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the events of some kinds, oldest first."""
        marks = ", ".join("?" * len(kinds))
        rows = self._read(f"SELECT record FROM events WHERE kind IN ({marks}) ORDER BY seq", *kinds)  # noqa: S608
        found = []
        for (record,) in rows:
            with contextlib.suppress(ValueError):
                found.append(stored.parse_event(record))
        return found

    def events_about(self, pid: int, *, uid: int | None) -> list[dict[str, Any]]:
        """Return the newest events that name the process ``pid``, oldest first; of one uid, where asked for."""
        like = f'%"pid": {pid},%'
        found = []
        for seq, record in self._read(
            "SELECT seq, record FROM events WHERE record LIKE ? AND (? IS NULL OR uid = ?) ORDER BY seq DESC LIMIT ?",
            *(like, uid, uid, 4 * _MOST_OF_ONE_PID),
        ):
            with contextlib.suppress(ValueError):
                event = stored.parse_event(record)
                if any(
                    one.get("pid") == pid for one in (*event.get("processes", ()), event.get("leader") or {})
                ):
                    found.append({"seq": seq, **event})
        return found[:_MOST_OF_ONE_PID][::-1]

    # -- events ------------------------------------------------------------------------------

    def add_event(self, event: dict[str, Any], at_epoch_s: float) -> int:
        """Append an event and return its number; ``at_epoch_s`` is in seconds since 1970.

        The oldest go where there are too many of its uid, or in all.
        """
        uid, record = event.get("uid"), json.dumps(event)
        self._seq += 1
        self._write(
            "REPLACE INTO events (seq, at_epoch_s, kind, session, uid, record) VALUES (?, ?, ?, ?, ?, ?)",
            self._seq, at_epoch_s, event["kind"], event.get("session"), uid, record,
        )  # fmt: skip
        self._note(uid, 1, len(record))
        self._drop_oldest(self._seq, uid)
        return self._seq

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

    def events(self, asked: Question = _ALL, *, limit: int = 500) -> list[dict[str, Any]]:
        """Return the first ``limit`` events asked for, oldest first.

        Not so many where they are very large: who wants more asks again after the last.
        """
        statement, values = select_events(asked, self._first_since(asked), limit)
        found = []
        for seq, record in self._read_some(statement, *values):
            with contextlib.suppress(ValueError):  # a row that somebody has damaged
                event = {"seq": seq, **stored.parse_event(record)}
                if is_of(asked.container, event):
                    found.append(event)
        return found

    def _first_since(self, asked: Question) -> int:
        """Return the number of the first event that is young enough, 1 where that need not be known.

        Else all that is older would be looked at, to see that it is. Who asks on, after the last that it was told, is beyond it.
        """
        if not asked.since_epoch_s or asked.after:
            return 1
        # Without the sign, SQLite would go through the table from its beginning.
        for (first,) in self._read("SELECT min(+seq) FROM events WHERE at_epoch_s >= ?", asked.since_epoch_s):
            return self._seq + 1 if first is None else int(first)
        return 1

    def _read_some(self, statement: str, *values: Any) -> list[tuple[int, str]]:
        rows: list[tuple[int, str]] = []
        read_bytes = 0
        with self._database.faults_told():
            for seq, record in self._database.connection.execute(statement, values):
                rows.append((seq, record))
                read_bytes += len(record)
                if read_bytes > _MAX_REPLY_BYTES:
                    break
        return rows

    def last_event(self) -> int:
        """Return the number of the newest event, 0 where there never was one."""
        return self._seq

    def _last_given(self) -> int:
        for (seq,) in self._read("SELECT seq FROM sqlite_sequence WHERE name = 'events'"):
            return int(seq)
        return 0

    def prune(self, keep_s: float) -> bool:
        """Drop some of the events older than ``keep_s``, and say whether there are more: nobody's reap is to wait for all."""
        if self._database.is_behind:  # those that were to be dropped before may be there still
            return True
        rows = self._read(
            "SELECT seq, uid, length(record) FROM events WHERE at_epoch_s < ? ORDER BY at_epoch_s LIMIT ?",
            self._now_epoch_s() - keep_s,
            _BATCH,
        )
        if rows:
            marks = ", ".join("?" * len(rows))
            self._write(f"DELETE FROM events WHERE seq IN ({marks})", *(seq for seq, _, _ in rows))  # noqa: S608
        for _, uid, stored_bytes in rows:
            self._note(uid, -1, -stored_bytes)
        return len(rows) == _BATCH

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
            return value if isinstance(value, int) else 0
        return 0
