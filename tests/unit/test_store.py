"""The state database: what was written is there after kill -9, and no damage to it ever stops the daemon."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from reaperd import database
from reaperd.model import Cause, CauseKind, Namespaces, ProcessId, Session, SessionKey
from reaperd.questions import Question
from reaperd.store import Size, Store
from reaperd.verdicts import Record

BOOT, OTHER_BOOT = "boot-1", "boot-0"

PLAIN = Session("plain", "", 1000, 100, ProcessId(7, 70), "2030-01-01T00:00:00Z")
FULL = Session(
    id="full",
    name="grid \u2603 \udcff 'quoted'; DROP TABLE sessions",
    uid=2**32 - 2,
    gid=0,
    leader=ProcessId(4194304, 2**62),
    started_at_utc="2030-01-01T00:00:00.123Z",
    page_fd=5,
    page_inode=1033,
    cgroup="/user.slice/\udcff",
    scope="/user.slice/user-1000.slice/reaper-1000-full-00000000.scope",
    adopters=frozenset((ProcessId(50, 10), ProcessId(51, 11))),
    subreapers=frozenset((ProcessId(50, 10),)),
    init=ProcessId(51, 11),
    namespaces=Namespaces("pid:[1]", "mnt:[2]", "time:[3]", "0:23"),
    oom_counter="/sys/fs/cgroup/memory.events",
    oom_kills=3,
    kept=frozenset((ProcessId(8, 80), ProcessId(9, 90))),
    spared=frozenset((ProcessId(10, 100),)),
    seen=frozenset((ProcessId(8, 80), ProcessId(11, 110))),
    cause=Cause(CauseKind.SIGNAL, 11, core_dumped=True, clean=False),
    groups=(100, 27),
    temp_dirs=("/tmp", "/scratch"),
    ending=True,
    attempt=(2, 4),
)


def open_store(directory: Path, boot_id: str = BOOT) -> Store:
    return Store(str(directory), boot_id, retry_s=0.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(open_store(tmp_path)) as one:
        yield one


def sessions_in(directory: Path, boot_id: str = BOOT) -> list[Session]:
    with closing(open_store(directory, boot_id)) as one:
        return one.sessions()


def execute(directory: Path, statement: str, *values: object) -> None:
    """Do to the file what only a person or a fault would."""
    with closing(sqlite3.connect(directory / "reaper.db")) as database, database:
        database.execute(statement, values)


def event(kind: str = "registered", session: str | None = "s", uid: int | None = 1000) -> dict[str, object]:
    return {"kind": kind, "session": session, "uid": uid}


def sequence(found: list[dict[str, object]]) -> list[object]:
    return [one["seq"] for one in found]


# -- sessions ---------------------------------------------------------------------------------------


def test_a_session_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        store.save(PLAIN)
        store.save(FULL)
    assert sorted(sessions_in(tmp_path), key=lambda one: one.id) == [FULL, PLAIN]


def test_the_full_session_of_these_tests_leaves_no_field_at_its_default() -> None:
    left = [name for name in Session._fields if getattr(FULL, name) == getattr(PLAIN, name)]
    assert left == []


def test_every_kind_of_cause_comes_back(store: Store) -> None:
    causes = [Cause(CauseKind.EXIT, 0, clean=True), Cause(CauseKind.OOM, 9), Cause(CauseKind.UNKNOWN)]
    for number, cause in enumerate(causes):
        store.save(Session(str(number), "", 0, 0, ProcessId(1, 1), "", cause=cause))
    assert [one.cause for one in sorted(store.sessions(), key=lambda one: one.id)] == causes


def test_saving_again_replaces_and_forgetting_removes(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        store.save(PLAIN)
        changed = PLAIN.keeping(frozenset((ProcessId(8, 80),)))
        store.save(changed)
        assert store.sessions() == [changed]
        store.forget(PLAIN.key)
        store.forget(SessionKey(1000, "never was"))
    assert sessions_in(tmp_path) == []


def test_sessions_of_another_boot_are_nobodys_and_are_dropped(tmp_path: Path) -> None:
    with closing(open_store(tmp_path, OTHER_BOOT)) as store:
        store.save(PLAIN)
    assert sessions_in(tmp_path, BOOT) == []
    assert sessions_in(tmp_path, OTHER_BOOT) == []


def test_what_is_on_record_of_processes_counts_in_its_own_namespaces_alone(tmp_path: Path) -> None:
    """In others, a pid and a start time are another process's. What is over stays over all the same."""
    era, suspect = f"{BOOT} 4026532999:4026531834 offsets", ProcessId(5, 50)
    with closing(Store(str(tmp_path), BOOT, era)) as one:
        one.save(PLAIN)
        one.settle(FULL.key)
        one.save_orphan(suspect, Record(lost_at_s=1.0))
        one.spare(suspect)
    with closing(Store(str(tmp_path), BOOT, era)) as same:
        assert (same.sessions(), set(same.orphans()), same.spared()) == ([PLAIN], {suspect}, {suspect})
    with closing(open_store(tmp_path)) as other:
        assert (other.sessions(), other.orphans(), other.spared()) == ([], {}, frozenset())
        assert other.is_settled(FULL.key)


def test_a_session_that_cannot_be_read_is_left_out_and_the_others_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(open_store(tmp_path)) as store:
        store.save(PLAIN)
    for number, record in enumerate(
        ("", "{", "null", "[]", "7", "{}", '{"cause": null}', '{"cause": ["x", 1]}')
    ):
        execute(tmp_path, "INSERT INTO sessions VALUES (?, ?, ?, ?)", 1000, f"bad-{number}", BOOT, record)
    assert sessions_in(tmp_path) == [PLAIN]
    assert len([one for one in caplog.records if "cannot read a session" in one.message]) == 8


@pytest.mark.parametrize(
    "nonsense",
    [
        {"uid": "root"},
        {"uid": None},
        {"gid": 1.5},
        {"page_fd": True},
        {"leader": ["x", 1]},
        {"leader": [2**70, 1]},
        {"init": [1, "x"]},
        *({name: [[5, -2]]} for name in ("kept", "seen", "spared", "adopters", "subreapers")),
        {"name": 7},
        {"id": "\udc80"},
        {"temp_dirs": [None]},
        {"temp_dirs": "/tmp"},
        {"groups": ["1"]},
        {"cgroup": 5},
        {"started_at": None},
        {"namespaces": [1, 2, 3]},
        {"namespaces": "abc"},
        {"page_inode": "x"},
        {"oom_kills": 1.5},
        {"ending": 1},
        {"cause": ["signal", "x", False, False]},
        {"cause": ["signal", 9, 0, 0]},
    ],
    ids=str,
)
def test_a_session_whose_record_makes_no_sense_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, nonsense: dict[str, object]
) -> None:
    with closing(open_store(tmp_path)) as store:
        store.save(FULL)
    for name, value in nonsense.items():
        execute(
            tmp_path, f"UPDATE sessions SET record = json_set(record, '$.{name}', json(?))", json.dumps(value)
        )
    assert sessions_in(tmp_path) == []
    assert "cannot read a session on record" in caplog.text


@pytest.mark.parametrize("table", ["sessions", "orphans", "events"])
@pytest.mark.parametrize(
    "record", ["[" * 100_000, '{"a":' * 50_000, b"\xff", "[Infinity, null, null, null, Infinity]"]
)
def test_a_row_that_no_json_comes_of_does_not_keep_the_others_from_being_read(
    tmp_path: Path, table: str, record: str | bytes
) -> None:
    suspect = Record(1.5, (), ProcessId(1, 2), None, None, 1000)
    with closing(open_store(tmp_path)) as store:
        store.save(PLAIN)
        store.save_orphan(ProcessId(5, 6), suspect)
        store.add_event({**event(), "processes": [{"pid": 7, "role": "worker"}]}, 1.0)
    rows = {
        "sessions": (1000, "bad", BOOT, record),
        "orphans": (8, 9, BOOT, record),
        "events": (None, 1.0, "registered", "s", 1000, record),
    }[table]
    execute(tmp_path, f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows))})", *rows)
    # What is TEXT to the database need not be any.
    execute(tmp_path, f"UPDATE {table} SET record = CAST(record AS TEXT)")
    with closing(open_store(tmp_path)) as store:
        assert store.sessions() == [PLAIN]
        assert store.orphans() == {ProcessId(5, 6): suspect}
        assert [one["seq"] for one in store.events()] == [1]
        assert len(store.events_of_kinds("registered")) == 1
        assert len(store.events_about(7, uid=None)) == 1


def test_numbers_that_are_none_are_left_out_of_who_is_spared_and_of_sums(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        store.spare(ProcessId(5, 6))
        store.add_total("reaped", 3)
    execute(tmp_path, "INSERT INTO spared VALUES (?, ?, ?)", b"\x06", "x", BOOT)
    execute(tmp_path, "INSERT INTO totals VALUES (?, ?)", "freed_bytes", "many")
    with closing(open_store(tmp_path)) as store:
        assert store.spared() == {ProcessId(5, 6)}
        assert (store.total("reaped"), store.total("freed_bytes")) == (3, 0)


@pytest.mark.parametrize(
    "nonsense",
    [7, [], {"kind": 7}, {"kind": "x", "at": 7}, {"kind": "x", "processes": 7}, {"kind": "x", "processes": [7]},
     {"kind": "x", "processes": [{"pid": "7"}]}, {"kind": "x", "processes": [{}]}, {"kind": "x", "leader": 7}],
    ids=str,
)  # fmt: skip
def test_an_event_that_makes_no_sense_is_left_out(tmp_path: Path, nonsense: object) -> None:
    with closing(open_store(tmp_path)) as store:
        store.add_event(event(), 1.0)
        store.add_event(event(), 1.0)
    execute(tmp_path, "UPDATE events SET record = ? WHERE seq = 1", json.dumps(nonsense))
    with closing(open_store(tmp_path)) as store:
        assert [one["seq"] for one in store.events()] == [2]
        assert len(store.events_of_kinds("registered")) == 1
        assert store.events_about(7, uid=None) == []


def test_the_same_id_of_two_users_is_two_sessions(tmp_path: Path) -> None:
    theirs = PLAIN._replace(uid=1001, leader=ProcessId(9, 90))
    with closing(open_store(tmp_path)) as store:
        store.save(PLAIN)
        store.save(theirs)
        store.settle(theirs.key)
    with closing(open_store(tmp_path)) as store:
        assert sorted(store.sessions(), key=lambda one: one.uid) == [PLAIN, theirs]
        assert store.is_settled(theirs.key)
        assert not store.is_settled(PLAIN.key)
        store.forget(theirs.key)
        assert store.sessions() == [PLAIN]


def test_a_session_that_is_over_for_good_stays_so_across_daemons_and_forgetting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    over = SessionKey(1000, "s")
    with closing(open_store(tmp_path)) as store:
        assert not store.is_settled(over)
        store.save(PLAIN)
        store.settle(over)
        store.settle(over)
        store.settle(PLAIN.key)
        store.forget(PLAIN.key)
    with closing(open_store(tmp_path)) as store:
        assert store.sessions() == []
        assert store.is_settled(over)
        assert store.is_settled(PLAIN.key)
        assert not store.is_settled(SessionKey(1000, ""))
        assert not store.is_settled(SessionKey(1000, "other"))
        assert not store.is_settled(SessionKey(1001, "s"))
    assert caplog.records == []


def test_a_session_that_was_over_is_nothing_to_another_boot_and_is_dropped(tmp_path: Path) -> None:
    over = SessionKey(1000, "s")
    with closing(open_store(tmp_path, OTHER_BOOT)) as store:
        store.settle(over)
        assert store.is_settled(over)
    with closing(open_store(tmp_path)) as store:
        assert not store.is_settled(over)
        store.sessions()
    with closing(open_store(tmp_path, OTHER_BOOT)) as store:
        assert not store.is_settled(over), "pids mean something else since"


# -- the file ---------------------------------------------------------------------------------------


def killed(tmp_path: Path, work: Callable[[Store], None]) -> None:
    """Do ``work`` on a store in a daemon that is killed right after it."""
    pid = os.fork()
    if pid == 0:
        try:
            work(open_store(tmp_path))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def test_what_was_committed_outlives_a_kill_at_any_moment(tmp_path: Path) -> None:
    def write(store: Store) -> None:
        store.save(FULL)
        store.add_event(event(), 1.0)
        store.add_total("reaped", 3)
        store.commit()

    killed(tmp_path, write)
    with closing(open_store(tmp_path)) as store:
        assert store.sessions() == [FULL]
        assert store.last_event() == 1
        assert store.total("reaped") == 3
    assert (tmp_path / "reaper.db").read_bytes()[18:20] == b"\2\2", (
        "it is not in WAL mode (sqlite.org/fileformat.html)"
    )


def test_what_belongs_together_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def end(store: Store) -> None:
        store.save(PLAIN)
        store.commit()
        store.add_event(event("reaped"), 1.0)
        store.add_total("reaped", 3)
        store.settle(PLAIN.key)
        store.forget(PLAIN.key)

    killed(tmp_path, end)
    with closing(open_store(tmp_path)) as store:
        assert store.sessions() == [PLAIN]
        assert store.last_event() == 0
        assert store.total("reaped") == 0
        assert not store.is_settled(PLAIN.key)


def test_what_is_not_committed_yet_is_told_here_and_to_nobody_else(tmp_path: Path, store: Store) -> None:
    def others() -> tuple[int, int]:
        with closing(sqlite3.connect(tmp_path / "reaper.db")) as database:
            ((sessions,),) = database.execute("SELECT count(*) FROM sessions")
            ((events,),) = database.execute("SELECT count(*) FROM events")
            return sessions, events

    store.save(PLAIN)
    store.add_event(event(), 1.0)
    assert (store.sessions(), store.last_event()) == ([PLAIN], 1)
    assert others() == (0, 0)
    store.commit()
    assert others() == (1, 1)
    store.commit()  # nothing was written since


def test_closing_commits(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        store.save(PLAIN)
    assert sessions_in(tmp_path) == [PLAIN]


def test_a_commit_that_fails_is_told_and_the_next_one_is_whole(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.save(PLAIN)
    execute_on(store, "PRAGMA query_only = ON")
    store.add_event(event(), 1.0)
    execute_on(store, "PRAGMA query_only = OFF")
    assert [one.levelno for one in caplog.records] == [logging.WARNING]
    store.commit()
    store.save(FULL)
    store.commit()
    assert FULL in store.sessions()


def execute_on(store: Store, statement: str) -> None:
    """Do to a store's own connection what a fault of the disk does."""
    store._database.connection.execute(statement)


def test_a_file_that_somebody_else_has_locked_is_told_once_and_used_again_afterwards(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(tmp_path / "reaper.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.save(PLAIN)
        store.add_event(event(), 1.0)
        store.commit()
        assert len(caplog.records) == 1
        store.save(FULL)
        other.execute("ROLLBACK")
    assert store.commit()
    assert sorted(store.sessions(), key=lambda one: one.id) == [FULL, PLAIN], (
        "what came in between is not lost"
    )
    assert sequence(store.events()) == [1]
    assert len(caplog.records) == 1


def test_while_nothing_can_be_written_nobody_waits_for_it_and_everybody_is_told_what_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    over, one = SessionKey(1000, "over"), ProcessId(8, 80)
    with (
        closing(Store(str(tmp_path), BOOT, retry_s=3600.0)) as store,
        closing(sqlite3.connect(tmp_path / "reaper.db", isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        began_s = time.monotonic()
        for number in range(200):
            assert store.add_event(event(), float(number)) == number + 1
            assert store.commit(), "nothing is lost yet"
        assert time.monotonic() - began_s < 1.0, "one lock was waited for, not two hundred"
        store.spare(one)
        store.settle(over)
        assert store.spared() == {one}
        assert store.is_settled(over)
        assert store.last_event() == 200
        other.execute("ROLLBACK")
    assert len(caplog.records) == 1
    with closing(open_store(tmp_path)) as store:
        assert len(store.events()) == 200, "closing tries once more"
        assert store.spared() == {one}
        assert store.is_settled(over)
        store.spare_no_longer(one)
        assert store.spared() == frozenset()


def test_of_what_cannot_be_written_for_long_the_oldest_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_MOST_BYTES", 20_000)
    with closing(open_store(tmp_path)) as store:
        with closing(sqlite3.connect(tmp_path / "reaper.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for number in range(30):
                store.add_event({**event(), "text": "x" * 1000}, float(number))
                kept = store.commit()
            assert not kept
            other.execute("ROLLBACK")
        assert store.commit()
        numbers = sequence(store.events())
    assert numbers == list(range(31 - len(numbers), 31))
    assert 10 < len(numbers) < 20


def test_a_damaged_database_that_cannot_be_moved_aside_is_left_and_all_kept_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reaper.db").write_bytes(b"this is no database at all " * 100)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with closing(open_store(tmp_path)) as store:
        store.save(PLAIN)
        assert store.sessions() == [PLAIN]
    assert "Read-only" in caplog.text
    assert (tmp_path / "reaper.db").read_bytes().startswith(b"this is no database")


def test_a_database_of_an_older_daemon_is_kept_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(tmp_path / "reaper.db")) as database:
        database.executescript(
            "PRAGMA user_version = 1; CREATE TABLE sessions (id TEXT PRIMARY KEY, boot_id TEXT, record TEXT);"
        )
    with closing(open_store(tmp_path)) as store:
        store.save(PLAIN)
        assert store.sessions() == [PLAIN]
    assert [one.levelname for one in caplog.records] == ["WARNING"]
    assert list(tmp_path.glob("reaper.db.broken-*"))


def test_a_file_that_is_no_database_is_moved_aside_and_a_new_one_begun(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "reaper.db").write_bytes(b"this is no database at all " * 100)
    with closing(open_store(tmp_path)) as store:
        store.save(PLAIN)
    assert sessions_in(tmp_path) == [PLAIN]
    (aside,) = tmp_path.glob("reaper.db.broken-*")
    assert aside.read_bytes().startswith(b"this is no database")
    assert [one.levelname for one in caplog.records] == ["WARNING"]


def test_a_database_that_is_damaged_in_the_middle_is_moved_aside(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        for number in range(300):
            store.add_event({**event(), "text": "x" * 200, "number": number}, 1.0)
    path = tmp_path / "reaper.db"
    data = bytearray(path.read_bytes())
    data[8192:20480] = b"\xa5" * 12288
    path.write_bytes(data)
    with closing(open_store(tmp_path)) as store:
        assert store.last_event() == 0
        store.save(PLAIN)
        assert store.sessions() == [PLAIN]
    assert list(tmp_path.glob("reaper.db.broken-*"))


def test_a_database_about_whose_damage_sqlite_says_no_utf8_is_moved_aside(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    path = tmp_path / "reaper.db"
    # What the schema says of a table stands in the first page as it was written, and in sqlite's sentence about it.
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE sessions", b"CREATE \xa3ABLE sessions"))
    with closing(open_store(tmp_path)) as store:
        store.save(PLAIN)
        assert store.sessions() == [PLAIN]
    assert list(tmp_path.glob("reaper.db.broken-*"))


def test_a_database_of_a_newer_daemon_is_kept_aside_and_not_written(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    execute(tmp_path, "PRAGMA user_version = 99")
    with closing(open_store(tmp_path)) as store:
        store.save(PLAIN)
        assert store.sessions() == [PLAIN]
    (aside,) = (one for one in tmp_path.glob("reaper.db.broken-*") if one.name[-4:] not in ("-wal", "-shm"))
    with closing(sqlite3.connect(aside)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (99,)


def test_where_no_file_can_be_made_all_is_kept_in_memory_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "reaper.db").mkdir()
    for directory in (tmp_path, tmp_path / "missing"):
        with closing(open_store(directory)) as store:
            store.save(PLAIN)
            assert store.sessions() == [PLAIN]
    assert [one.levelname for one in caplog.records] == ["WARNING", "WARNING"]
    assert (tmp_path / "reaper.db").is_dir()


def test_a_fault_of_the_file_while_it_is_used_is_told_once_and_never_raised(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    for table in ("sessions", "events", "totals", "settled"):
        execute(tmp_path, f"DROP TABLE {table}")
    store.save(PLAIN)
    store.forget(SessionKey(1000, "s"))
    store.settle(SessionKey(1000, "s"))
    store.prune(1.0)
    store.add_total("reaped", 1)
    assert store.add_event(event(), 1.0) == 1, "who waits for it is told all the same"
    assert store.is_settled(SessionKey(1000, "s")), "what is over stays over"
    assert not store.commit()
    assert store.sessions() == []
    assert store.events() == []
    assert store.total("reaped") == 0
    assert [one.levelno for one in caplog.records] == [logging.WARNING]


def test_a_fault_that_comes_back_after_it_was_gone_is_told_again(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    execute(tmp_path, "ALTER TABLE totals RENAME TO away")
    store.add_total("reaped", 1)
    execute(tmp_path, "ALTER TABLE away RENAME TO totals")
    store.add_total("reaped", 1)
    store.commit()
    execute(tmp_path, "ALTER TABLE totals RENAME TO away")
    store.add_total("reaped", 1)
    assert len(caplog.records) == 2


# -- events -----------------------------------------------------------------------------------------


def test_what_a_full_disk_took_back_is_written_later_under_its_number(tmp_path: Path) -> None:
    with closing(Store(str(tmp_path), BOOT, retry_s=0.0)) as store:
        assert store.add_event(event(), 1.0) == 1
        assert store.commit()
        assert [store.add_event(event(), 2.0), store.add_event(event(), 2.0)] == [2, 3]
        # So large that it does not fit into the cache: that it is too much shows before the commit.
        database = store._database.connection
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")
        assert store.add_event({**event(), "text": "x" * 100_000}, 3.0) == 4
        assert store.commit(), "nothing is lost for good"
        assert [one["seq"] for one in store.events()] == [1]
        assert store.last_event() == 4, "somebody was told of it"
        database.execute("PRAGMA max_page_count = 100000")
        assert store.add_event(event(), 4.0) == 5
        assert store.commit()
        assert [one["seq"] for one in store.events()] == [1, 2, 3, 4, 5]


def test_events_come_back_oldest_first_with_their_numbers(store: Store) -> None:
    assert store.events() == []
    assert store.last_event() == 0
    numbers = [store.add_event({**event(), "n": n, "text": "\u2603"}, float(n)) for n in range(3)]
    assert numbers == [1, 2, 3]
    found = store.events()
    assert sequence(found) == numbers
    assert found[2] == {"seq": 3, **event(), "n": 2, "text": "\u2603"}
    assert store.last_event() == 3


def test_events_are_asked_for_by_number_time_session_and_limit(store: Store) -> None:
    for n in range(1, 7):
        store.add_event(event(session="even" if n % 2 == 0 else "odd"), 100.0 + n)
    assert sequence(store.events(Question(after=4))) == [5, 6]
    assert sequence(store.events(Question(since_epoch_s=105.0))) == [5, 6]
    assert sequence(store.events(Question(session="even"))) == [2, 4, 6]
    assert sequence(store.events(Question(session="even", after=2), limit=1)) == [4]
    assert sequence(store.events(limit=2)) == [1, 2]
    assert store.events(Question(session="neither")) == []


def test_what_is_asked_for_by_owner_and_kind_too_meets_all_of_it(store: Store) -> None:
    store.add_event(event("started", None, None), 1.0)
    for kind, session, uid in (("reaped", "a", 1000), ("ended", "b", 1000), ("reaped", "c", 1001)):
        store.add_event(event(kind, session, uid), 2.0)
    store.add_event(event("killed", None, 1000), 3.0)
    assert sequence(store.events(Question(owner=1000))) == [2, 3, 5]
    assert sequence(store.events(Question(kinds=("reaped",)))) == [2, 4]
    assert sequence(store.events(Question(kinds=("killed", "started", "reaped")))) == [1, 2, 4, 5]
    assert sequence(store.events(Question(kinds=("killed", "reaped"), owner=1000))) == [2, 5]
    assert sequence(store.events(Question(kinds=("killed", "reaped"), owner=1000, after=2))) == [5]
    assert sequence(store.events(Question(kinds=("killed", "reaped"), owner=1000, since_epoch_s=2.5))) == [5]
    assert sequence(store.events(Question(kinds=("killed", "reaped"), owner=1000), limit=1)) == [2]
    assert sequence(store.events(Question(kinds=("ended", "reaped"), session="b"))) == [3]
    assert sequence(store.events(Question(session="c", owner=1001))) == [4]
    assert store.events(Question(session="c", owner=1000)) == []
    assert store.events(Question(kinds=("breach",))) == []


def test_asking_for_an_owner_shows_nobody_more_than_it_may_see(store: Store) -> None:
    store.add_event(event("started", None, None), 1.0)
    store.add_event(event("reaped", "a", 1000), 1.0)
    store.add_event({**event("reaped", "b", 1000), "container": "pid:[7]"}, 1.0)
    store.add_event(event("reaped", "c", 1001), 1.0)
    assert sequence(store.events(Question(uid=1000, owner=1000))) == [2, 3]
    assert sequence(store.events(Question(uid=1000, owner=1000, container="pid:[7]"))) == [3]
    for foreign in (
        Question(uid=1000, owner=1001),
        Question(uid=1000, owner=1001, kinds=("reaped", "started")),
    ):
        assert store.events(foreign) == []
    assert sequence(store.events(Question(uid=1000, kinds=("reaped", "started")))) == [1, 2, 3]
    assert sequence(store.events(Question(uid=1000, kinds=("started",)))) == [1]


def test_a_user_is_told_its_own_events_and_the_daemons(store: Store) -> None:
    store.add_event(event("started", None, None), 1.0)
    store.add_event(event(uid=1000), 2.0)
    store.add_event(event(uid=1001), 3.0)
    store.add_event(event(uid=0), 4.0)
    assert sequence(store.events(Question(uid=1000))) == [1, 2]
    assert sequence(store.events(Question(uid=0))) == [1, 4]
    assert sequence(store.events(Question(uid=None))) == [1, 2, 3, 4]
    assert sequence(store.events(Question(uid=1000, session="s"))) == [2]


class Clock:
    """The time of day, as the test has it."""

    def __init__(self, at_epoch_s: float) -> None:
        self.at_epoch_s = at_epoch_s

    def __call__(self) -> float:
        return self.at_epoch_s


DAY_S = 86_400.0


def test_old_events_are_dropped_and_numbers_never_used_again(tmp_path: Path) -> None:
    now = Clock(1e9)
    with closing(Store(str(tmp_path), BOOT, now_epoch_s=now)) as store:
        for day in (0, 1, 2):
            store.add_event(event(), 1e9 + day * DAY_S)
        now.at_epoch_s = 1e9 + 90 * DAY_S
        assert not store.prune(90 * DAY_S)
        assert sequence(store.events()) == [1, 2, 3], "the oldest is as old as may be"
        now.at_epoch_s += 1 + DAY_S
        assert not store.prune(90 * DAY_S)
        assert sequence(store.events()) == [3]
        assert not store.prune(1.0)
        assert store.events() == []
        assert store.add_event(event(), now.at_epoch_s) == 4
        assert not store.prune(1.0)
        assert sequence(store.events()) == [4]


def test_of_many_old_events_some_are_dropped_at_a_time_and_those_of_a_clock_that_was_set_back_too(
    tmp_path: Path,
) -> None:
    with closing(Store(str(tmp_path), BOOT, now_epoch_s=Clock(1e9))) as store:
        store.add_event(event(), 1e9)
        for number in range(450):
            store.add_event(event(uid=number % 7), 1.0)
        left = [len(store.events())]
        while store.prune(DAY_S):
            assert store.commit()
            left.append(len(store.events()))
        assert left == [451, 251, 51]
        assert sequence(store.events()) == [1]


def test_what_is_dropped_no_longer_counts_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    now = Clock(1e9)
    with closing(Store(str(tmp_path), BOOT, most_of_one_uid=Size(10, 10**6), now_epoch_s=now)) as store:
        for at_epoch_s in (*[1.0] * 8, *[1e9] * 2):
            store.add_event(event(uid=1), at_epoch_s)
        assert not store.prune(DAY_S)
        for _ in range(8):
            store.add_event(event(uid=1), 1e9)
        assert sequence(store.events()) == [9, 10, *range(11, 19)], (
            "the place of those that were dropped is free"
        )
        store.add_event(event(uid=1), 1e9)
        assert len(store.events()) == 10, "and no more than that"


def test_where_the_file_cannot_be_written_old_events_stay_until_it_can(tmp_path: Path) -> None:
    now = Clock(1e9)
    with closing(
        Store(str(tmp_path), BOOT, most_of_one_uid=Size(3, 10**6), now_epoch_s=now, retry_s=0.0)
    ) as store:
        for at_epoch_s in (1.0, 1e9, 1e9):
            store.add_event(event(uid=1), at_epoch_s)
        assert store.commit()
        with closing(sqlite3.connect(tmp_path / "reaper.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert [store.prune(DAY_S) for _ in range(3)] == [False, True, True]
            assert len(store.events()) == 3
            other.execute("ROLLBACK")
        assert store.commit()
        assert not store.prune(DAY_S)
        assert sequence(store.events()) == [2, 3]
        store.add_event(event(uid=1), 1e9)
        assert sequence(store.events()) == [2, 3, 4], "it was counted once"


def test_totals_outlive_the_events_and_the_daemon(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        assert store.total("reaped") == 0
        store.add_total("reaped", 3)
        store.add_total("reaped", 4)
        store.add_total("freed_bytes", 2**50)
        store.add_event(event(), 0.0)
        store.prune(1.0)
    with closing(open_store(tmp_path, "boot-2")) as store:
        assert store.total("reaped") == 7
        assert store.total("freed_bytes") == 2**50


# -- a history without end --------------------------------------------------------------------------


def steps_of(store: Store, limit: int = 500, **asked: object) -> int:
    """Return how many thousands of steps of SQLite's machine a question takes: what it costs on any computer."""
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    store._database.connection.set_progress_handler(count, 1000)
    store.events(Question(**asked), limit=limit)  # type: ignore[arg-type]
    store._database.connection.set_progress_handler(None, 1000)
    return steps


def lengthen(directory: Path, events: int) -> None:
    with closing(sqlite3.connect(directory / "reaper.db")) as database, database:
        database.executemany(
            "INSERT INTO events (at_epoch_s, kind, session, uid, record) VALUES (1.0, 'ended', 's', 7, ?)",
            (('{"kind": "ended"}',) for _ in range(events)),
        )


def test_a_question_about_few_events_costs_little_in_a_long_history(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    lengthen(tmp_path, 20_000)
    with closing(open_store(tmp_path)) as store:
        assert steps_of(store, session="nope") <= 1
        assert steps_of(store, uid=8) <= 1
        assert steps_of(store, uid=8, session="s") <= 400, "it must look whose each of them is"
        assert steps_of(store, uid=7, limit=10) <= 1
        assert steps_of(store, session="s", after=19_990) <= 1
        assert steps_of(store, kinds=("reaped", "killed")) <= 1
        assert steps_of(store, uid=7, kinds=("reaped", "killed")) <= 1
        assert steps_of(store, owner=7, kinds=("reaped",)) <= 1
        assert steps_of(store, owner=8) <= 1
        assert steps_of(store, uid=8, owner=7) <= 1
        assert steps_of(store, session="nope", kinds=("ended",)) <= 1
        assert steps_of(store, kinds=("ended", "reaped"), limit=10) <= 1
        assert steps_of(store, since_epoch_s=2.0) <= 1
        assert steps_of(store, since_epoch_s=2.0, kinds=("ended",), uid=7) <= 1
        assert sequence(store.events(Question(uid=7, after=19_998))) == [19_999, 20_000]


def test_a_file_of_an_earlier_daemon_gets_the_indexes_too(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    execute(tmp_path, "DROP INDEX events_session")
    for index in ("events_uid", "events_kind", "events_uid_kind"):
        execute(tmp_path, f"DROP INDEX {index}")
    lengthen(tmp_path, 20_000)
    with closing(open_store(tmp_path)) as store:
        assert steps_of(store, session="nope") <= 1
        assert steps_of(store, uid=8) <= 1
        assert steps_of(store, uid=7, kinds=("reaped",)) <= 1
        assert steps_of(store, kinds=("reaped",)) <= 1


def test_the_oldest_events_of_a_uid_go_where_it_has_too_many(tmp_path: Path) -> None:
    with closing(Store(str(tmp_path), BOOT, most_of_one_uid=Size(3, 10_000))) as store:
        store.add_event(event(uid=2), 1.0)
        store.add_event(event("started", None, None), 1.0)
        for _ in range(6):
            store.add_event(event(uid=1), 1.0)
        assert sequence(store.events()) == [1, 2, 6, 7, 8]
        store.add_event({**event(uid=1), "text": "x" * 9_880}, 1.0)
        assert sequence(store.events()) == [1, 2, 8, 9], "so many bytes are too many, too"
        store.add_event({**event(uid=1), "text": "x" * 20_000}, 1.0)
        assert sequence(store.events()) == [1, 2, 10], "an event is never dropped for its own sake"
    with closing(Store(str(tmp_path), BOOT, most_of_one_uid=Size(3, 10_000))) as store:
        store.add_event(event(uid=1), 1.0)
        assert sequence(store.events()) == [1, 2, 11], "what was there before counts"


def test_the_oldest_events_go_where_there_are_too_many_in_all(tmp_path: Path) -> None:
    with closing(Store(str(tmp_path), BOOT, most_of_all=Size(40, 10**6))) as store:
        for number in range(100):
            store.add_event(event(uid=number), 1.0)
            assert len(store.events()) <= 40
        assert sequence(store.events())[-1] == 100
        assert len(store.events()) >= 38
        store.prune(1.0)
        for number in range(40):
            store.add_event(event(uid=number), 4e9)
        assert len(store.events()) == 40, "what was pruned does not count"


def test_a_file_that_was_filled_before_there_was_a_limit_is_cut_to_size(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        for uid in (1, 2, None, 1, 2, 1, 1):
            store.add_event(event(uid=uid), 1.0)
    with closing(Store(str(tmp_path), BOOT, most_of_one_uid=Size(2, 10_000))) as store:
        assert sequence(store.events()) == [2, 3, 5, 6, 7]
    with closing(Store(str(tmp_path), BOOT, most_of_all=Size(3, 10_000))) as store:
        assert sequence(store.events()) == [5, 6, 7]
        store.add_event(event(uid=3), 1.0)
        assert sequence(store.events()) == [6, 7, 8]


def test_very_large_events_come_a_few_at_a_time(store: Store) -> None:
    for _ in range(5):
        store.add_event({**event(), "text": "x" * 3_000_000}, 1.0)
    assert sequence(store.events()) == [1, 2]
    assert sequence(store.events(Question(uid=1000, after=2))) == [3, 4]
    assert sequence(store.events(Question(after=4))) == [5]
