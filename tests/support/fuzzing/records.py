"""What is on record: rows and files of the state database that make no sense, and status files that anybody wrote."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import tempfile
import typing
from collections.abc import Iterator
from typing import Any

from fuzzing.dice import Dice, noise
from fuzzing.target import Check, Refused, Target, outcome, stateless

from agent import status
from agent.status import Status, StatusError
from reaperd.model import Cause, CauseKind, Namespaces, ProcessId, Session
from reaperd.questions import Question
from reaperd.store import Store
from reaperd.verdicts import Record

BOOT = "c2f4bd2f-77d7-4ac0-9d4f-92a3e0dc0d5e"
_ID = "2859-2f1c4-eb9f3362-3e9773f4"
SESSION = Session(
    id=_ID, name="grid", uid=1000, gid=1000, leader=ProcessId(2859, 192964), started_at_utc="2026-01-31T12:00:00.000Z",
    page_fd=3, page_inode=77, cgroup="/a", adopters=frozenset({ProcessId(1, 0)}), init=ProcessId(1, 0),
    namespaces=Namespaces("pid:[1]", "mnt:[2]", "time:[3]"), oom_counter="/sys/x", oom_kills=0,
    kept=frozenset({ProcessId(9, 9)}), seen=frozenset({ProcessId(9, 9)}), groups=(1000, 4), attempt=(1, 4),
    spared=frozenset({ProcessId(8, 8)}), cause=Cause(CauseKind.SIGNAL, 9, core_dumped=False, clean=True),
)  # fmt: skip
EVENT = {
    "at": "2026-01-31T12:00:00.000Z", "kind": "reaped", "session": _ID, "name": "grid", "uid": 1000,
    "cause": {"kind": "signal", "code": 9}, "leader": {"pid": 2859, "start_ticks": 192964},
    "processes": [{"pid": 2868, "start_ticks": 1, "framework": "loky", "signal": "SIGTERM", "evidence": ["a"], "result": "killed"}],
    "latency_s": 0.016, "freed": {"rss_bytes": 1, "shm_bytes": 0, "gpu_bytes": 0},
}  # fmt: skip
_TABLES = {"sessions": 4, "events": 5, "orphans": 4, "spared": 3, "settled": 3, "totals": 2}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the log out of what is printed: a warning for each row would be all there is."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class _Rows:
    """A store, and a second connection through which somebody else writes into it."""

    def __init__(self, directory: str) -> None:
        self.store = Store(directory, BOOT)
        self._database = sqlite3.connect(os.path.join(directory, "reaper.db"), isolation_level=None)
        self._database.execute("PRAGMA synchronous = OFF")
        self.store.save(SESSION)
        self.store.add_event(EVENT, 1.0)
        self.store.save_orphan(ProcessId(5, 6), Record(1.5, (), ProcessId(1, 2), 2.5, 3.5, 1000))
        self.store.commit()
        self._records = {
            table: json.loads(self._database.execute(f"SELECT record FROM {table}").fetchone()[0])
            for table in ("sessions", "events", "orphans")
        }

    def write(self, dice: Dice) -> None:
        """Put rows in the place of those that are there."""
        self._database.execute("BEGIN")
        for table in _TABLES:
            self._database.execute(f"DELETE FROM {table}")
        for _ in range(dice.below(5) + 1):
            table = dice.choose([*_TABLES])
            columns = [self._column(dice) for _ in range(_TABLES[table])]
            if table in self._records:
                columns[-1] = self._record(dice, table)
            if table != "totals" and dice.below(4):
                columns[0 if table == "events" else 2] = 7.0 if table == "events" else BOOT
            if table == "events":
                columns = [
                    abs(dice.number()) % 2**40,
                    *columns,
                ]  # after the largest there is, no event can be added
            marks = ", ".join("?" * len(columns))
            with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeError):  # what no column takes
                self._database.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", columns)
        # What is TEXT to the database need not be any.
        self._database.execute(f"UPDATE {dice.choose([*self._records])} SET record = CAST(record AS TEXT)")
        self._database.execute("COMMIT")

    def _column(self, dice: Dice) -> Any:
        kind = dice.below(6)
        if kind < 3:
            return (None, 1.5, float("inf"))[kind]
        if kind == 3:
            return dice.number()
        return dice.name(30) if kind == 4 else dice.text()

    def _record(self, dice: Dice, table: str) -> Any:
        """Return a record as the store writes it with some of it changed, or anything at all."""
        if dice.below(8) == 0:
            return dice.choose((self._column(dice), "[" * 5000, '{"a":' * 3000))
        record = json.loads(json.dumps(self._records[table]))
        for _ in range(dice.below(3)):
            if isinstance(record, dict):
                key = dice.choose([*record])
                if dice.below(6) == 0:
                    record.pop(key)
                else:
                    record[key] = dice.value()
            else:
                record[dice.below(len(record))] = dice.value()
        text = json.dumps(record)
        return text.encode() if dice.below(8) == 0 else text

    def read(self) -> None:
        """Read everything: what makes no sense is left out, and what is left makes sense."""
        store = self.store
        events = store.events()
        for pid in (2868, 2859):
            store.events_about(pid, uid=None)
        for event in (
            *events,
            *store.events(Question(session=_ID)),
            *store.events(Question(uid=1000), limit=3),
            *store.events(Question(owner=1000, kinds=("ended", "reaped"))),
            *store.events_of_kinds("reaped"),
        ):
            assert isinstance(event, dict)
            json.dumps(event)
        assert type(store.last_event()) is int
        assert type(store.total("reaped")) is int
        assert type(store.is_settled(SESSION.key)) is bool
        for id_ in store.spared():
            assert_type(id_, ProcessId, "spared")
        for id_, record in store.orphans().items():
            assert_type(id_, ProcessId, "orphan")
            assert_type(record, Record, "record")
        sessions = store.sessions()
        for session in sessions:
            assert_type(session, Session, "session")
        store.prune(1e9)
        store.add_event(EVENT, 1.0)
        if sessions:
            for session in sessions:
                store.forget(session.key)
                store.save(session)
            assert {s.key: s for s in store.sessions()} == {s.key: s for s in sessions}
        assert store.commit()

    def close(self) -> None:
        self._database.close()
        self.store.close()


def assert_type(value: Any, hint: Any, where: str) -> None:
    """Fail where ``value`` is not what the annotation ``hint`` promises, all that is in it included."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        assert isinstance(value, dict), f"{where}: {value!r}"
    elif origin is frozenset or (origin is tuple and arguments[-1] is Ellipsis):
        assert isinstance(value, origin), f"{where}: {value!r}"
        for one in value:
            assert_type(one, arguments[0], where)
    elif origin is tuple:
        assert isinstance(value, tuple), f"{where}: {value!r}"
        assert len(value) == len(arguments), f"{where}: {value!r}"
        for one, each in zip(value, arguments, strict=True):
            assert_type(one, each, where)
    elif arguments:  # a union
        kinds = [each for each in arguments if each is not type(None)]
        if value is not None:
            assert_type(value, kinds[0], where)
        else:
            assert type(None) in arguments, f"{where}: {value!r}"
    elif hasattr(hint, "_fields"):
        assert type(value) is hint, f"{where}: {value!r}"
        for name, each in typing.get_type_hints(hint).items():
            assert_type(getattr(value, name), each, f"{where}.{name}")
    else:
        assert type(value) is hint, f"{where}: {value!r}"


@contextlib.contextmanager
def opened_rows() -> Iterator[Check]:
    """Rows that make no sense stop nothing."""
    with tempfile.TemporaryDirectory(prefix="reaper-fuzz-") as directory, _quietly():
        rows = _Rows(directory)

        def check(data: bytes) -> None:
            rows.write(Dice(data))
            rows.read()

        try:
            yield check
        finally:
            rows.close()


@contextlib.contextmanager
def opened_file() -> Iterator[Check]:
    """A file that is no database, or a broken one, is kept aside or done without, and what is saved then is there."""
    with tempfile.TemporaryDirectory(prefix="reaper-fuzz-") as directory, _quietly():

        def check(data: bytes) -> None:
            for name in os.listdir(directory):
                os.unlink(os.path.join(directory, name))
            with open(os.path.join(directory, "reaper.db"), "wb") as file:
                file.write(_whole(data))
            store = Store(directory, BOOT)
            try:
                store.sessions()
                store.orphans()
                store.events()
                store.save(SESSION)
                store.add_event(EVENT, 1.0)
                if store.commit():
                    assert SESSION in store.sessions()
                    assert store.events(Question(session=_ID))
            finally:
                store.close()

        yield check


def _whole(data: bytes) -> bytes:
    """Return a database of 4 KiB pages with some bytes of it changed: places and values in turn."""
    dice = Dice(data)
    if dice.below(4) == 0:
        return dice.rest()
    found = bytearray(_database())
    while dice:
        at = dice.below(2**31) % len(found)
        patch = dice.take(dice.below(8) + 1)
        found[at : at + len(patch)] = patch
    return bytes(found[: len(found) - dice.below(2) * 100])


_made: list[bytes] = []


def _database() -> bytes:
    if not _made:
        with tempfile.TemporaryDirectory(prefix="reaper-fuzz-") as directory:
            store = Store(directory, BOOT)
            store.save(SESSION)
            store.add_event(EVENT, 1.0)
            store.close()
            with open(os.path.join(directory, "reaper.db"), "rb") as file:
                _made.append(file.read())
    return _made[0]


# -- status files ---------------------------------------------------------------------------------


def check_status_file(data: bytes) -> None:
    """What is read of a status file has the types that it is said to have, and written anew it says the same."""
    found = outcome(status.parse_status, data, raises=(StatusError,))
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        read = outcome(status.read_status, f"/proc/self/fd/{file.fileno()}", raises=(StatusError,))
    assert isinstance(read, Refused) == isinstance(found, Refused)
    if isinstance(found, Refused):
        return
    assert_type(found, Status, "status")
    assert found.state in ("running", "completed", "failed", "interrupted", "killed")
    assert read.state in (found.state, "killed", "unknown")
    assert read._replace(state="") == found._replace(state="")
    text = json.dumps(found._asdict(), ensure_ascii=False, allow_nan=False).encode("utf-8")
    if len(text) <= status.MAX_FILE_BYTES:
        assert status.parse_status(text) == found


_STATUS = {
    "state": "running", "name": "risk", "session": _ID, "pid": 2859, "start_ticks": 192964, "boot_id": BOOT,
    "started_at": "2026-01-31T12:00:00.000Z", "ended_at": None, "progress": {"done": 1, "total": 2, "message": "x"},
    "error": None, "cause": {"kind": "signal", "code": 9}, "host": "h", "pid_namespace": 4026531836,
}  # fmt: skip

TARGETS = (
    Target("status-file", stateless(check_status_file), lambda: [
        json.dumps(_STATUS).encode(), json.dumps({**_STATUS, "state": "failed", "error": "ValueError: x"}, indent=1).encode(),
        *(json.dumps({**_STATUS, **odd}).encode() for odd in ({"pid": True}, {"cause": []}, {"host": 7}, {"state": "unknown"})),
    ], (b'"state": "killed"', b'"pid": ', b"NaN", b"\\ud800", b"Infinity", b'"progress": {', b"null", b"1e999")),
    Target("store-rows", opened_rows, lambda: noise(40, 400), longest=800, cost=8),
    Target("store-file", opened_file, lambda: [b"\1" + b"\0" * 9, b"\0SQLite format 3\0", b"\1" + bytes(range(1, 120))],
           longest=400, cost=40),
)  # fmt: skip
