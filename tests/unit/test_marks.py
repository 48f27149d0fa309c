"""What a process carries: the page that it was forked with, the stamp that it was exec'ed with, and what only looks like one."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from specimens import (
    FILE_BYTES,
    ME,
    NOBODY,
    OTHER_ID,
    SOON_S,
    UID,
    Mine,
    child,
    executed,
    found,
    id_of,
    open_on_a_mount_of_ones_own,
    session,
)

from agent import wire
from agent.page import SessionPage, SparedMark
from reaperd.linux.procfs import ProcFS
from reaperd.marks import Pages
from reaperd.model import Process, Session, SessionKey
from reaperd.observer import Observer


def as_seen(one: Session, pid: int, *, hurried: bool = False) -> Process:
    """Return what an observer that covers ``one`` alone makes of ``pid``."""
    observer = Observer(Mine())
    try:
        return found(observer.census.look([one], hold=hurried, everyone=hurried), pid)
    finally:
        observer.census.handles.release()


@contextlib.contextmanager
def memfd(name: str, *, uid: int = UID) -> Iterator[int]:
    """Yield a memfd that ``uid`` has made."""
    if uid != UID:
        os.seteuid(uid)
    try:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(descriptor, FILE_BYTES)
    finally:
        if uid != UID:
            os.seteuid(UID)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def inode_of(descriptor: int) -> int:
    return os.fstat(descriptor).st_ino


# -- a forked process -------------------------------------------------------------------------------


def test_a_forked_child_is_seen_with_the_page_it_holds(page: SessionPage) -> None:
    with child() as pid:
        one = as_seen(session(page), pid)
        assert one.id == id_of(pid)
        assert (one.ppid, one.uid, one.forked, one.dead) == (ME, UID, True, False)
        assert one.pages == {session(page).id}
        assert one.argv == ()
        assert one.cgroup == wire.parse_cgroup(Path("/proc/self/cgroup").read_text())
        assert one.rss_bytes > 0
        assert one.comm == ProcFS().stat(ME).comm


def test_a_child_that_closed_all_its_descriptors_still_has_the_page_mapped(page: SessionPage) -> None:
    def close_all() -> None:
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if wire.PAGE_PREFIX in os.readlink(f"/proc/self/fd/{name}"):
                    os.close(int(name))  # mmap has a duplicate of its own

    with child(close_all) as pid:
        assert wire.PAGE_PREFIX not in "".join(ProcFS().descriptors(pid, pid).values())
        for hurried in (False, True):
            assert as_seen(session(page), pid, hurried=hurried).pages == {session(page).id}


def test_a_child_that_holds_the_page_under_another_number_is_found(page: SessionPage) -> None:
    def move() -> None:
        os.dup(page.fd)
        os.close(page.fd)

    with child(move) as pid:
        assert as_seen(session(page), pid).pages == {session(page).id}
        assert as_seen(session(page, page_fd=-1), pid).pages == {session(page).id}


def test_another_file_under_the_number_of_the_page_hides_nothing(page: SessionPage) -> None:
    def replace_page() -> None:
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, page.fd)

    with child(replace_page) as pid:
        assert as_seen(session(page), pid).pages == {session(page).id}


def test_the_page_of_another_session_under_the_number_of_the_page_hides_nothing(page: SessionPage) -> None:
    with memfd(wire.PAGE_PREFIX + OTHER_ID) as other:

        def put_another() -> None:
            os.dup(page.fd)
            os.dup2(other, page.fd)

        with child(put_another) as pid:
            observer = Observer(Mine())
            both = [session(page), session(id=OTHER_ID, page_fd=other, page_inode=inode_of(other))]
            assert found(observer.census.look(both, hold=False), pid).pages == {session(page).id, OTHER_ID}
            # Of the one that nobody has registered the other is no sign.
            assert as_seen(session(page), pid).pages == {session(page).id}


def test_a_child_of_two_sessions_carries_both_pages(page: SessionPage) -> None:
    with memfd(wire.PAGE_PREFIX + OTHER_ID) as other, child() as pid:
        both = [session(page), session(id=OTHER_ID, page_fd=other, page_inode=inode_of(other))]
        assert found(Observer(Mine()).census.look(both, hold=False), pid).pages == {
            session(page).id,
            OTHER_ID,
        }


def test_a_known_page_is_enough_where_nobody_is_to_wait_and_the_rest_is_read_later(page: SessionPage) -> None:
    proc = Mine()
    observer = Observer(proc)
    with child() as pid:
        one = found(observer.census.look([session(page)], hold=True, everyone=True), pid)
        assert (one.pages, one.cgroup) == ({session(page).id}, None)
        read = proc.reads[pid]
        later = found(observer.census.look([session(page)], hold=False), pid)
        assert proc.reads[pid] > read
        assert later.cgroup == observer.cgroup_path(pid)
    observer.census.handles.release()


def test_where_units_are_protected_the_cgroup_is_read_even_of_those_whose_page_tells_enough(
    page: SessionPage,
) -> None:
    observer = Observer(Mine())
    observer.census.reader.reads_cgroups = True
    with child() as pid:
        one = found(observer.census.look([session(page)], hold=True, everyone=True), pid)
        assert one.cgroup == observer.cgroup_path(pid)
    observer.census.handles.release()


# -- what tells a page from what only looks like one ------------------------------------------------


def test_a_page_is_known_by_its_inode_whatever_its_name() -> None:
    for name in (wire.PAGE_PREFIX + OTHER_ID, wire.PAGE_PREFIX, wire.SPARED_PREFIX + OTHER_ID):
        with memfd(name) as descriptor, child() as pid:
            one = session(page_fd=descriptor, page_inode=inode_of(descriptor))
            for hurried in (False, True):
                told = as_seen(one, pid, hurried=hurried)
                assert told.pages == {one.id}
                assert told.spared == frozenset()


def test_a_memfd_with_the_name_of_a_page_is_none_whoever_made_it(page: SessionPage) -> None:
    with memfd(wire.PAGE_PREFIX + session(page).id) as same_name:
        one = session(page)

        def take_the_place() -> None:
            os.dup2(same_name, page.fd)
            page.fd = -1
            drop_mappings(page)

        with child(take_the_place) as pid:
            assert wire.PAGE_PREFIX in ProcFS().descriptor(pid, pid, one.page_fd)
            assert as_seen(one, pid).pages == frozenset()


def drop_mappings(page: SessionPage) -> None:
    """Unmap the page of this process, and close what mmap keeps of it."""
    page._memory.close()


@pytest.mark.needs_root
@pytest.mark.parametrize("prefix", [wire.PAGE_PREFIX, wire.SPARED_PREFIX])
@pytest.mark.parametrize("how", ["descriptor", "mapped"])
def test_a_memfd_of_the_same_name_that_another_user_made_is_no_mark(prefix: str, how: str) -> None:
    with memfd(prefix + session().id, uid=NOBODY) as handed_over:

        def take() -> None:
            if how == "mapped":
                take.held = mmap.mmap(handed_over, FILE_BYTES)  # type: ignore[attr-defined]
                for name in os.listdir("/proc/self/fd"):
                    with contextlib.suppress(OSError):
                        if inode_of(int(name)) == inode_of(handed_over) and int(name) != handed_over:
                            os.close(int(name))
                os.close(handed_over)

        with child(take) as pid:
            assert (prefix in Path(f"/proc/{pid}/maps").read_text()) == (how == "mapped")
            for number in (handed_over, -1):
                told = as_seen(session(page_fd=number), pid)
                assert (told.pages, told.spared) == (frozenset(), frozenset())


@pytest.mark.needs_root
def test_the_page_of_another_users_session_with_the_same_id_is_no_mark(page: SessionPage) -> None:
    with memfd(wire.PAGE_PREFIX + session(page).id, uid=NOBODY) as theirs:

        def drop_our_page() -> None:
            os.close(page.fd)
            page.fd = -1
            drop_mappings(page)

        mine = session(page)
        squatter = mine._replace(uid=NOBODY, gid=NOBODY, page_fd=theirs, page_inode=inode_of(theirs))
        with child(drop_our_page) as pid:
            told = found(Observer(Mine()).census.look([mine, squatter], hold=False), pid)
            assert told.pages == frozenset()


def test_a_file_with_the_inode_of_a_page_is_none(tmp_path: Path) -> None:
    path = tmp_path / f"memfd:{wire.PAGE_PREFIX}{OTHER_ID}"
    path.write_bytes(b"x" * FILE_BYTES)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), FILE_BYTES), child() as pid:
        for number in (file.fileno(), -1):
            one = session(page_fd=number, page_inode=inode_of(file.fileno()))
            assert as_seen(one, pid).pages == frozenset()


@pytest.mark.needs_root
def test_a_file_that_is_called_like_a_memfd_and_has_the_inode_of_a_page_is_none(tmp_path: Path) -> None:
    name = f"memfd:{wire.PAGE_PREFIX}{session().id} (deleted)"
    reader, writer = os.pipe()

    def hold_one() -> None:
        descriptor = open_on_a_mount_of_ones_own(tmp_path, name)
        hold_one.held = mmap.mmap(descriptor, FILE_BYTES)  # type: ignore[attr-defined]
        os.write(writer, b"%d %d\n" % (descriptor, inode_of(descriptor)))

    with child(hold_one) as pid, open(reader, "rb") as told:
        os.close(writer)
        descriptor, inode = map(int, told.readline().split())
        assert os.readlink(f"/proc/{pid}/fd/{descriptor}") == f"/{name}"
        assert f" /{name}\n" in Path(f"/proc/{pid}/maps").read_text()
        for number in (descriptor, -1):
            assert as_seen(session(page_fd=number, page_inode=inode), pid).pages == frozenset()


# -- pages on record --------------------------------------------------------------------------------


ONE, TWO = SessionKey(1000, "one"), SessionKey(1001, "two")


def test_a_page_is_found_until_it_is_forgotten() -> None:
    pages = Pages()
    pages.add(7, 5, ONE)
    assert [pages.session_of(inode, 1000) for inode in (7, 8, None)] == ["one", None, None]
    pages.remove(8, 5)
    assert pages.session_of(7, 1000) == "one"
    pages.remove(7, 5)
    pages.remove(7, 5)
    assert pages.session_of(7, 1000) is None


def test_a_page_is_nobodys_but_its_owners() -> None:
    pages = Pages()
    pages.add(7, 5, ONE)
    pages.add(8, 5, TWO)
    assert [pages.session_of(7, uid) for uid in (1000, 1001, 0, None)] == ["one", None, None, None]
    assert [pages.session_of(8, uid) for uid in (1000, 1001)] == [None, "two"]


def test_a_number_is_looked_at_first_while_some_page_is_there() -> None:
    pages = Pages()
    for inode, number in ((1, 5), (2, 5), (3, 6)):
        pages.add(inode, number, ONE)
    assert sorted(pages.likely_fds()) == [5, 6]
    pages.remove(1, 5)
    assert sorted(pages.likely_fds()) == [5, 6]
    pages.remove(2, 5)
    assert pages.likely_fds() == [6]


def test_no_more_numbers_are_looked_at_first_than_a_few_however_many_leaders_invent() -> None:
    pages = Pages()
    for number in range(1000):
        pages.add(number + 1, number, ONE)
    assert len(pages.likely_fds()) <= 16


# -- an exec'ed process, a spared one, one that waits -----------------------------------------------


def test_an_executed_child_is_seen_with_the_stamps_in_its_environment(run: str) -> None:
    environment: dict[str, Any] = {
        wire.LINEAGE_VARIABLE: f"{OTHER_ID}:junk:{session().id}",
        wire.SPARED_VARIABLE: OTHER_ID,
        "REAPER_TEST_RUN": run,
    }
    with executed(**environment) as pid:
        for hurried in (False, True):
            one = as_seen(session(), pid, hurried=hurried)
            assert (one.forked, one.comm, one.argv) == (False, "cat", ("cat",))
            assert one.lineage == (OTHER_ID,)
            assert one.spared == {OTHER_ID}
            assert one.pages == frozenset()
            assert one.cgroup == wire.parse_cgroup(Path(f"/proc/{pid}/cgroup").read_text())


def test_a_forked_child_that_was_spared_is_seen_with_that_mark(page: SessionPage) -> None:
    one = session(page)

    def be_spared() -> None:
        be_spared.mark = SparedMark(OTHER_ID)  # type: ignore[attr-defined]
        page.close()

    with child(be_spared) as pid:
        told = as_seen(one, pid)
        assert told.spared == {OTHER_ID}
        assert told.pages == frozenset()


def test_a_spared_child_that_closed_all_its_descriptors_still_has_the_mark_mapped(page: SessionPage) -> None:
    one = session(page)

    def be_spared() -> None:
        mark = be_spared.mark = SparedMark(OTHER_ID)  # type: ignore[attr-defined]
        page.close()
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if inode_of(int(name)) == inode_of(mark.fd) and int(name) != mark.fd:
                    os.close(int(name))
        os.close(mark.fd)

    with child(be_spared) as pid:
        assert as_seen(one, pid).spared == {OTHER_ID}


def test_a_process_in_uninterruptible_sleep_is_read_too(page: SessionPage, tmp_path: Path) -> None:
    # vfork(2) keeps the parent in state D until its child, which waits to open a FIFO, has executed something.
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pid = os.fork()
    if pid == 0:
        opening = [(os.POSIX_SPAWN_OPEN, 9, str(fifo), os.O_RDONLY, 0)]
        with contextlib.suppress(BaseException):
            os.waitpid(os.posix_spawn("/bin/true", ["true"], {}, file_actions=opening), 0)
        os._exit(0)
    try:
        deadline_s = time.monotonic() + SOON_S
        while ProcFS().stat(pid).state != "D":
            assert time.monotonic() < deadline_s, "posix_spawn(3) does not use vfork(2) here"
            os.sched_yield()
        assert as_seen(session(page), pid).pages == {session(page).id}
    finally:
        os.close(os.open(fifo, os.O_WRONLY))
        os.waitpid(pid, 0)


def test_nothing_that_lies_in_memory_is_read_by_the_core_itself(page: SessionPage) -> None:
    class Guarded(Mine):
        """A /proc that lets nobody read what can block but a helper."""

        def environ(self, pid: int, task: int) -> bytes | None:
            assert os.getpid() != ME
            return super().environ(pid, task)

        def argv(self, pid: int, task: int) -> tuple[str, ...]:
            assert os.getpid() != ME
            return super().argv(pid, task)

        def maps(self, pid: int, task: int) -> bytes:
            assert os.getpid() != ME
            return super().maps(pid, task)

    observer = Observer(Guarded())
    with child(page.close) as pid, executed() as program:
        one = session(page)
        for facts in ({"hold": False}, {"hold": True, "everyone": True}):
            assert {pid, program} <= observer.census.look([one], **facts).processes.keys()  # type: ignore[arg-type]
        observer.census.look_below(one)
        observer.census.leader(one)
        observer.describe_leader(one)
        assert observer.cmdlines([id_of(program)]).get(program, ["cat"]) == ["cat"]
        observer.shm_mapped([id_of(pid)])
    observer.census.handles.release()


def test_a_process_whose_memory_cannot_be_read_holds_nobody_up_and_is_there_all_the_same(
    page: SessionPage,
) -> None:
    class Blocking(Mine):
        """A /proc in which the memory of one process cannot be read in time."""

        at = 0

        def environ(self, pid: int, task: int) -> bytes | None:
            if pid == self.at:
                signal.pause()
            return super().environ(pid, task)

    proc = Blocking()
    observer = Observer(proc)
    with child() as pid, executed(**{wire.LINEAGE_VARIABLE: OTHER_ID}) as program:
        proc.at = pid
        begin_s = time.monotonic()
        snapshot = observer.census.look([session(page)], hold=False)
        assert time.monotonic() - begin_s < SOON_S / 2
        one = found(snapshot, pid)
        assert (one.pages, one.lineage, one.spared) == ({session(page).id}, (), frozenset())
        assert found(snapshot, program).lineage == (OTHER_ID,)
