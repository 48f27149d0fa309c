"""The state database: what was written is there after kill -9, and no damage to it ever stops the daemon."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pytest

from reaperd.model import Cause, CauseKind, Namespaces, ProcessId, Session
from reaperd.store import Store

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
    cgroup="/user.slice/\udcff",
    adopters=frozenset((ProcessId(50, 10), ProcessId(51, 11))),
    namespaces=Namespaces("pid:[1]", "mnt:[2]", "time:[3]"),
    oom_counter="/sys/fs/cgroup/memory.events",
    oom_kills=3,
    kept=frozenset((ProcessId(8, 80), ProcessId(9, 90))),
    spared=frozenset((ProcessId(10, 100),)),
    seen=frozenset((ProcessId(8, 80), ProcessId(11, 110))),
    cause=Cause(CauseKind.SIGNAL, 11, core_dumped=True, clean=False),
    temp_dirs=("/tmp", "/scratch"),
    ending=True,
)


def open_store(directory: Path, boot_id: str = BOOT) -> Store:
    return Store(str(directory), boot_id)


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
    left = [one.name for one in fields(Session) if getattr(FULL, one.name) == getattr(PLAIN, one.name)]
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
        store.forget(PLAIN.id)
        store.forget("never was")
    assert sessions_in(tmp_path) == []


def test_sessions_of_another_boot_are_nobodys_and_are_dropped(tmp_path: Path) -> None:
    with closing(open_store(tmp_path, OTHER_BOOT)) as store:
        store.save(PLAIN)
    assert sessions_in(tmp_path, BOOT) == []
    assert sessions_in(tmp_path, OTHER_BOOT) == []


def test_a_session_that_cannot_be_read_is_left_out_and_the_others_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(open_store(tmp_path)) as store:
        store.save(PLAIN)
    for number, record in enumerate(
        ("", "{", "null", "[]", "7", "{}", '{"cause": null}', '{"cause": ["x", 1]}')
    ):
        execute(tmp_path, "INSERT INTO sessions VALUES (?, ?, ?)", f"bad-{number}", BOOT, record)
    assert sessions_in(tmp_path) == [PLAIN]
    assert len([one for one in caplog.records if "cannot read a session" in one.message]) == 8


def test_a_session_that_is_over_for_good_stays_so_across_daemons_and_forgetting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(open_store(tmp_path)) as store:
        assert not store.is_settled("s")
        store.save(PLAIN)
        store.settle("s")
        store.settle("s")
        store.settle(PLAIN.id)
        store.forget(PLAIN.id)
    with closing(open_store(tmp_path)) as store:
        assert store.sessions() == []
        assert store.is_settled("s")
        assert store.is_settled(PLAIN.id)
        assert not store.is_settled("")
        assert not store.is_settled("other")
    assert caplog.records == []


def test_a_session_that_was_over_is_nothing_to_another_boot_and_is_dropped(tmp_path: Path) -> None:
    with closing(open_store(tmp_path, OTHER_BOOT)) as store:
        store.settle("s")
        assert store.is_settled("s")
    with closing(open_store(tmp_path)) as store:
        assert not store.is_settled("s")
        store.sessions()
    with closing(open_store(tmp_path, OTHER_BOOT)) as store:
        assert not store.is_settled("s"), "pids mean something else since"


# -- the file ---------------------------------------------------------------------------------------


def test_what_was_written_outlives_a_kill_at_any_moment(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            store = open_store(tmp_path)
            store.save(FULL)
            store.add_event(event(), 1.0)
            store.add_total("reaped", 3)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    with closing(open_store(tmp_path)) as store:
        assert store.sessions() == [FULL]
        assert store.last_event() == 1
        assert store.total("reaped") == 3
    assert (tmp_path / "reaper.db").read_bytes()[18:20] == b"\2\2", (
        "it is not in WAL mode (sqlite.org/fileformat.html)"
    )


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
    store.forget("s")
    store.prune(1.0)
    store.add_total("reaped", 1)
    assert store.add_event(event(), 1.0) == 0
    assert store.sessions() == []
    assert not store.is_settled("s")
    assert store.events() == []
    assert store.last_event() == 0
    assert store.total("reaped") == 0
    assert [one.levelno for one in caplog.records] == [logging.WARNING]


def test_a_fault_that_comes_back_after_it_was_gone_is_told_again(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    execute(tmp_path, "ALTER TABLE totals RENAME TO away")
    store.add_total("reaped", 1)
    execute(tmp_path, "ALTER TABLE away RENAME TO totals")
    store.add_total("reaped", 1)
    execute(tmp_path, "ALTER TABLE totals RENAME TO away")
    store.add_total("reaped", 1)
    assert len(caplog.records) == 2


# -- events -----------------------------------------------------------------------------------------


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
    assert sequence(store.events(after=4)) == [5, 6]
    assert sequence(store.events(since_epoch_s=105.0)) == [5, 6]
    assert sequence(store.events(session="even")) == [2, 4, 6]
    assert sequence(store.events(session="even", after=2, limit=1)) == [4]
    assert sequence(store.events(limit=2)) == [1, 2]
    assert store.events(session="neither") == []


def test_a_user_is_told_its_own_events_and_the_daemons(store: Store) -> None:
    store.add_event(event("started", None, None), 1.0)
    store.add_event(event(uid=1000), 2.0)
    store.add_event(event(uid=1001), 3.0)
    store.add_event(event(uid=0), 4.0)
    assert sequence(store.events(uid=1000)) == [1, 2]
    assert sequence(store.events(uid=0)) == [1, 4]
    assert sequence(store.events(uid=None)) == [1, 2, 3, 4]
    assert sequence(store.events(uid=1000, session="s")) == [2]


def test_old_events_are_dropped_and_numbers_never_used_again(store: Store) -> None:
    for at_s in (0.0, 1.0):
        store.add_event(event(), at_s)
    store.prune(3600.0)
    assert store.events() == []
    assert store.add_event(event(), 4e9) == 3
    store.prune(3600.0)
    assert sequence(store.events()) == [3]


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
