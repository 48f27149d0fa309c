"""The session page: what its leader writes the daemon reads whole, and nothing else passes for one."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import wire
from agent.handover import take_over
from agent.page import SessionPage, SparedMark
from reaperd import pages
from reaperd.linux import page

ID = "4711-2a-0000000b-0000000c"
UID = os.getuid()
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
IN_OPEN = 0x20  # linux/inotify.h
SEAL_SEAL, SEAL_SHRINK, SEAL_GROW, SEAL_WRITE, SEAL_FUTURE_WRITE = 0x1, 0x2, 0x4, 0x8, 0x10
ALL_SEALS = SEAL_SEAL | SEAL_SHRINK | SEAL_GROW | SEAL_FUTURE_WRITE


@pytest.fixture
def leader() -> Iterator[SessionPage]:
    one = SessionPage(ID, "grid", 42, "boot")
    one.write_record(["/run/reaper/reaper.sock"])
    yield one
    if one.fd >= 0:
        one.close()


def path_of(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def read(descriptor: int) -> pages.Page:
    """Open a page as the daemon does, and read it."""
    ours = page.open_page(path_of(descriptor), uid=UID)
    try:
        return page.read_page(ours)
    finally:
        os.close(ours)


@contextlib.contextmanager
def memfd(
    data: bytes = b"",
    *,
    size: int = wire.PAGE_BYTES,
    seals: int = ALL_SEALS,
    name: str = wire.PAGE_PREFIX + ID,
) -> Iterator[int]:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, data, 0)
        fcntl.fcntl(descriptor, F_ADD_SEALS, seals)
        yield descriptor
    finally:
        os.close(descriptor)


def refused(path: str, *, uid: int = UID) -> BaseException:
    """Return why a page is refused, having checked that nothing stays open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises((OSError, wire.WireError)) as caught:
        os.close(page.open_page(path, uid=uid))
    assert len(os.listdir("/proc/self/fd")) == before
    return caught.value


# -- what a leader writes ---------------------------------------------------------------------------


def test_a_page_is_read_as_its_leader_wrote_it(leader: SessionPage) -> None:
    leader.write_progress(3, 64, "fold 3")
    leader.write_spared([(7, 70)])
    told = read(leader.fd)
    assert (told.id, told.name, told.start_ticks, told.boot_id) == (ID, "grid", 42, "boot")
    assert told.page_fd == leader.fd
    assert told.sockets == ("/run/reaper/reaper.sock",)
    assert told.progress == (3.0, 64.0, "fold 3")
    assert told.spared == ((7, 70),)
    assert told.flags == 0


def test_flags_add_up_and_outlive_every_later_write(leader: SessionPage) -> None:
    leader.raise_flag(wire.CLOSING)
    leader.raise_flag(wire.ENDED)
    leader.write_progress(1, None, "")
    leader.write_record(["/other"])
    told = read(leader.fd)
    assert told.flags == wire.CLOSING | wire.ENDED
    assert told.sockets == ("/other",)
    assert told.progress == (1.0, None, "")


def test_a_shorter_record_leaves_nothing_of_a_longer_one(leader: SessionPage) -> None:
    leader.write_record(["/" + "x" * 100] * 8)
    leader.write_record(["/y"])
    assert read(leader.fd).sockets == ("/y",)


def test_every_write_moves_the_sequence_and_leaves_it_even(leader: SessionPage) -> None:
    seen = set()
    for number in range(5):
        leader.write_progress(number, None, "")
        sequence = pages.page_sequence(os.pread(leader.fd, wire.PAGE_BYTES, 0))
        assert sequence % 2 == 0
        seen.add(sequence)
    assert len(seen) == 5


def test_nobody_can_write_resize_or_unseal_a_page_but_through_its_mapping(leader: SessionPage) -> None:
    assert fcntl.fcntl(leader.fd, F_GET_SEALS) & ALL_SEALS == ALL_SEALS
    attempts = (
        lambda: os.pwrite(leader.fd, b"x", 0),
        lambda: os.ftruncate(leader.fd, 0),
        lambda: os.ftruncate(leader.fd, 2 * wire.PAGE_BYTES),
        lambda: mmap.mmap(leader.fd, wire.PAGE_BYTES),
    )
    for attempt in attempts:
        with pytest.raises(PermissionError):
            attempt()


def test_a_page_that_is_for_another_program_is_inherited_mapped_anew_and_then_sealed_for_good() -> None:
    first = SessionPage(ID, "grid", 42, "boot", attempt=(2, 4), for_exec=True)
    first.write_record(["/run/reaper/reaper.sock"])
    first.write_progress(1, 2, "before")
    sequence = pages.page_sequence(os.pread(first.fd, wire.PAGE_BYTES, 0))
    assert os.get_inheritable(first.fd)
    assert read(first.fd).attempt == (2, 4)
    descriptor = os.dup(first.fd)
    first.close()  # as execve(2) does with the mapping
    os.set_inheritable(descriptor, True)

    found = take_over(ID)
    assert found is not None
    second, paths, name = found
    try:
        assert (second.fd, paths, name) == (descriptor, ["/run/reaper/reaper.sock"], "grid")
        assert not os.get_inheritable(second.fd)
        assert fcntl.fcntl(second.fd, F_GET_SEALS) & ALL_SEALS == ALL_SEALS
        second.write_record(paths)
        told = read(second.fd)
        assert (told.attempt, told.progress, told.page_fd) == ((2, 4), (1.0, 2.0, "before"), descriptor)
        assert pages.page_sequence(os.pread(descriptor, wire.PAGE_BYTES, 0)) > sequence
    finally:
        second.close()


def test_a_session_whose_page_is_not_there_is_not_taken_over() -> None:
    other = SessionPage(ID.replace("-", "-1", 1), "grid", 42, "boot", for_exec=True)
    try:
        assert take_over(ID) is None
    finally:
        other.close()


def test_a_page_is_not_inherited_by_what_is_executed(leader: SessionPage) -> None:
    assert not os.get_inheritable(leader.fd)


def test_a_forked_child_shares_the_page_and_can_write_it_whoever_held_its_lock(leader: SessionPage) -> None:
    leader._lock.acquire()  # as another thread of the parent may have, at the moment of the fork
    pid = os.fork()
    if pid == 0:
        leader.after_fork()
        leader.write_progress(9, 10, "from the child")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    leader._lock.release()
    assert read(leader.fd).progress == (9.0, 10.0, "from the child")


def test_what_the_page_has_no_room_for_leaves_it_as_it_was(leader: SessionPage) -> None:
    assert leader.say(status_file="/run.json", stray=(1.0, 2.0)) == {"status_file": None, "stray": None}
    with pytest.raises(wire.WireError):
        leader.say(status_file="/" + "x" * wire.PAGE_BYTES)
    leader.write_record(["/other"])
    told = read(leader.fd)
    assert (told.status_file, told.stray, told.sockets) == ("/run.json", (1.0, 2.0), ("/other",))
    assert leader.say(status_file=None) == {"status_file": "/run.json"}
    assert (read(leader.fd).status_file, read(leader.fd).stray) == ("", (1.0, 2.0))


def test_a_signal_handler_may_write_in_the_middle_of_a_write(leader: SessionPage) -> None:
    with leader._lock:
        leader.write_progress(2, 3, "handler")
    leader.write_progress(4, 5, "after")
    assert read(leader.fd).progress == (4.0, 5.0, "after")


def test_a_closed_page_is_gone_from_this_process_and_takes_no_more_writes(leader: SessionPage) -> None:
    before = len(os.listdir("/proc/self/fd"))
    leader.close()
    leader.close()
    assert leader.fd == -1
    assert len(os.listdir("/proc/self/fd")) < before
    assert ID not in Path("/proc/self/maps").read_text()
    leader.write_progress(1, 2, "another thread did not know")
    leader.raise_flag(wire.ENDED)


def test_closing_a_page_closes_nothing_of_a_program_that_closed_our_descriptors() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            one = SessionPage(ID, "grid", 42, "boot")
            for name in os.listdir("/proc/self/fd"):
                if int(name) > 2 and int(name) != writer:
                    with contextlib.suppress(OSError):
                        os.close(int(name))
            mine = [os.open("/dev/null", os.O_RDONLY) for _ in range(16)]
            one.close()
            del one
            gc.collect()
            still = [descriptor for descriptor in mine if os.path.exists(f"/proc/self/fd/{descriptor}")]
            os.write(writer, b"kept" if still == mine else b"lost")
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read() == b"kept"
    os.waitpid(pid, 0)


@pytest.mark.parametrize("number", ["fd", "_duplicate"])
def test_closing_a_page_closes_nothing_of_a_program_that_has_one_of_our_numbers(number: str) -> None:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            one = SessionPage(ID, "grid", 42, "boot")
            ours = getattr(one, number)
            if ours < 0:  # Python 3.13 keeps no duplicate
                os._exit(0)
            null = os.open("/dev/null", os.O_RDONLY)
            os.dup2(null, ours)
            one.close()
            del one
            gc.collect()
            os._exit(0 if os.path.samestat(os.fstat(ours), os.fstat(null)) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("taken", [False, True])
def test_the_duplicate_that_a_mapping_keeps_is_known_though_another_thread_took_the_number_it_should_have(
    monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    if taken:
        monkeypatch.setattr(os, "dup", lambda descriptor: fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 200))
    one = SessionPage(ID, "grid", 42, "boot")
    try:
        if sys.version_info >= (3, 13):
            assert one._duplicate < 0
        else:
            assert one._duplicate not in (one.fd, -1)
            assert os.path.sameopenfile(one._duplicate, one.fd)
    finally:
        one.close()


def test_a_spared_mark_is_seen_by_its_name_and_is_no_page() -> None:
    mark = SparedMark(ID)
    try:
        assert os.readlink(path_of(mark.fd)) == f"/memfd:{wire.SPARED_PREFIX}{ID} (deleted)"
        assert wire.SPARED_PREFIX + ID in Path("/proc/self/maps").read_text()
        refused(path_of(mark.fd))
    finally:
        mark._memory.close()
        os.close(mark.fd)


@contextlib.contextmanager
def watched(path: Path) -> Iterator[Callable[[], bool]]:
    """Yield what says whether anybody has opened ``path`` meanwhile (inotify(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert descriptor >= 0
    assert libc.inotify_add_watch(descriptor, os.fsencode(path), IN_OPEN) >= 0

    def was_opened() -> bool:
        try:
            return bool(os.read(descriptor, 4096))
        except BlockingIOError:
            return False

    try:
        yield was_opened
    finally:
        os.close(descriptor)


# -- what passes for a page -------------------------------------------------------------------------


def test_only_a_memfd_of_a_size_that_is_right_and_sealed_and_of_its_owner_is_a_page() -> None:
    with memfd() as good:
        os.close(page.open_page(path_of(good), uid=UID))
        assert "belongs to uid" in str(refused(path_of(good), uid=UID + 1))
    for size in (0, 1, wire.PAGE_BYTES - 1, wire.PAGE_BYTES + 1, 2 * wire.PAGE_BYTES):
        with memfd(size=size) as odd:
            assert "size" in str(refused(path_of(odd)))
    for seals in (0, SEAL_SHRINK, SEAL_GROW, ALL_SEALS & ~SEAL_SHRINK, ALL_SEALS & ~SEAL_GROW):
        with memfd(seals=seals) as loose:
            assert "sealed" in str(refused(path_of(loose)))
    with memfd(seals=SEAL_SHRINK | SEAL_GROW) as for_exec:
        os.close(page.open_page(path_of(for_exec), uid=UID))


def test_a_memfd_of_another_name_is_no_page() -> None:
    for name in ("other", "reaper", wire.SPARED_PREFIX + ID):
        with memfd(name=name) as other:
            assert "name" in str(refused(path_of(other)))


def test_a_file_that_lies_in_a_directory_is_no_page(tmp_path: Path) -> None:
    file = tmp_path / "page"
    file.write_bytes(b"\0" * wire.PAGE_BYTES)
    refused(str(file))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.write_bytes(b"x")], ids=["fifo", "file"])
def test_what_a_stranger_has_under_another_name_is_never_even_opened(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path / "x")
    descriptor = os.open(tmp_path / "x", os.O_RDWR)
    try:
        with watched(tmp_path / "x") as was_opened:
            assert "name" in str(refused(path_of(descriptor)))
            assert not was_opened()
    finally:
        os.close(descriptor)


@pytest.mark.needs_root
def test_what_bears_the_name_of_a_page_and_is_no_file_is_never_even_opened(tmp_path: Path) -> None:
    fifo = tmp_path / f"memfd:{wire.PAGE_PREFIX}{ID}"
    os.mkfifo(fifo)
    (tmp_path / "link").symlink_to(
        f"/{fifo.name}"
    )  # the text of the link is a page's, in a root of one's own
    with watched(fifo) as was_opened:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                os.chroot(tmp_path)
                os._exit(7 if "name" in str(refused_within("/link")) else 8)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert not was_opened()


def refused_within(path: str) -> wire.WireError | None:
    """Return why a page is refused where there is no /proc."""
    try:
        page.open_page(path, uid=UID)
    except wire.WireError as error:
        return error
    return None


def test_an_unlinked_file_that_has_no_seals_is_no_page(tmp_path: Path) -> None:
    file = tmp_path / "page"
    file.write_bytes(b"\0" * wire.PAGE_BYTES)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        file.unlink()
        refused(path_of(descriptor))
    finally:
        os.close(descriptor)


def test_a_fifo_or_a_folder_in_the_place_of_a_page_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    def give_up(number: int, frame: object) -> None:
        raise AssertionError("it waits for a writer, for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        for name in ("fifo", ".", "missing"):
            refused(str(tmp_path / name))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_page_is_opened_for_reading_alone_and_never_handed_on() -> None:
    with memfd() as good:
        ours = page.open_page(path_of(good), uid=UID)
        try:
            assert fcntl.fcntl(ours, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            assert not os.get_inheritable(ours)
        finally:
            os.close(ours)


# -- reading ----------------------------------------------------------------------------------------


def test_a_page_whose_writer_was_killed_in_the_middle_of_a_write_is_read_as_it_is() -> None:
    record = wire.pack_record(ID, "grid", 5, "boot", 3, ["/s"])
    data = wire.pack_header(3, 0, len(record)).ljust(wire.RECORD_AT, b"\0") + record
    with memfd(data) as stuck:
        assert page.read_page(stuck, writer_is_dead=True).name == "grid"
    with pytest.raises(pages.TornPage):
        pages.parse_page(data.ljust(wire.PAGE_BYTES, b"\0"))


def test_a_page_that_is_broken_is_refused_at_once() -> None:
    for data in (b"", b"junk", wire.pack_header(2, 0, 0), wire.pack_header(2, 0, 60000)):
        with memfd(data) as broken, pytest.raises(wire.WireError) as caught:
            page.read_page(broken)
        assert not isinstance(caught.value, pages.TornPage)


def test_what_is_read_while_the_leader_writes_is_whole(leader: SessionPage) -> None:
    leader.write_progress(0, 0, "0" * 900)
    pid = os.fork()
    if pid == 0:
        leader.after_fork()
        for number in range(1_000_000):
            leader.write_progress(number, number, str(number % 10) * 900)
        os._exit(0)
    whole = 0
    try:
        for _ in range(300):
            with contextlib.suppress(pages.TornPage):
                progress = read(leader.fd).progress
                assert progress is not None
                assert progress.total == progress.done
                assert progress.message == str(int(progress.done) % 10) * 900
                whole += 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert whole > 30


# -- a page that stays open -------------------------------------------------------------------------


@contextlib.contextmanager
def opened(descriptor: int) -> Iterator[page.OpenPage]:
    before = len(os.listdir("/proc/self/fd"))
    one = page.OpenPage(page.open_page(path_of(descriptor), uid=UID))
    yield one
    one.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_page_that_stays_open_is_read_again_only_when_it_was_written(leader: SessionPage) -> None:
    with opened(leader.fd) as one:
        first = one.read()
        assert first.id == ID
        assert one.read() is first
        assert one.read(writer_is_dead=True) is first
        leader.write_progress(1, 2, "x")
        second = one.read()
        assert second is not first
        assert second.progress == (1.0, 2.0, "x")
        assert one.read() is second


def test_every_kind_of_write_is_noticed(leader: SessionPage) -> None:
    with opened(leader.fd) as one:
        one.read()
        leader.raise_flag(wire.CLOSING)
        assert one.read().flags == wire.CLOSING
        leader.write_spared([(7, 70)])
        assert one.read().spared == ((7, 70),)
        leader.write_record(["/other"])
        assert one.read().sockets == ("/other",)
        leader.write_record(["/third"])  # of the same length
        assert one.read().sockets == ("/third",)


def test_what_was_written_last_is_read_however_fast_it_was_written(leader: SessionPage) -> None:
    with opened(leader.fd) as one:
        pid = os.fork()
        if pid == 0:
            leader.after_fork()
            for number in range(20_000):
                leader.write_progress(number, number, str(number % 10) * 900)
            os._exit(0)
        while not os.waitpid(pid, os.WNOHANG)[0]:
            with contextlib.suppress(pages.TornPage):
                progress = one.read().progress
                assert progress is None or progress.message == str(int(progress.done) % 10) * 900
        progress = one.read().progress
        assert progress is not None
        assert progress.done == 19_999


def test_a_page_that_is_written_between_the_look_at_its_header_and_the_reading_is_read_again(
    leader: SessionPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = os.pread
    reads = []

    def write_after_the_first(descriptor: int, size: int, at: int) -> bytes:
        data = pread(descriptor, size, at)
        reads.append(size)
        if len(reads) == 1:
            leader.write_progress(1, 1, "meanwhile")
        if len(reads) == 3:
            leader.write_progress(2, 2, "afterwards")
        return data

    with opened(leader.fd) as one:
        monkeypatch.setattr(os, "pread", write_after_the_first)
        first = one.read().progress
        assert first is not None
        assert first.message == "meanwhile"
        second = one.read().progress
        assert second is not None
        assert second.message == "afterwards"


def test_a_page_that_was_left_in_the_middle_of_a_write_is_read_when_its_writer_is_dead() -> None:
    record = wire.pack_record(ID, "grid", 5, "boot", 3, ["/s"])
    whole = wire.pack_header(2, 0, len(record)).ljust(wire.RECORD_AT, b"\0") + record
    torn = wire.pack_header(3, 0, len(record)).ljust(wire.RECORD_AT, b"\0") + record
    descriptor = os.memfd_create(wire.PAGE_PREFIX + ID, os.MFD_CLOEXEC)
    os.ftruncate(descriptor, wire.PAGE_BYTES)
    one = page.OpenPage(descriptor)
    try:
        os.pwrite(descriptor, whole, 0)
        assert one.read().name == "grid"
        os.pwrite(descriptor, torn, 0)
        for _ in range(2):
            with pytest.raises(pages.TornPage):
                one.read()
        assert one.read(writer_is_dead=True).name == "grid"
    finally:
        one.close()


def test_a_page_that_became_nonsense_is_refused_as_long_as_it_is() -> None:
    with memfd(wire.pack_header(2, 0, 60_000)) as broken, opened(broken) as one:
        for _ in range(2):
            with pytest.raises(wire.WireError):
                one.read()


def test_every_page_has_an_inode_of_its_own(leader: SessionPage) -> None:
    with memfd() as other, opened(leader.fd) as one, opened(leader.fd) as same, opened(other) as two:
        assert one.inode == same.inode == os.fstat(leader.fd).st_ino
        assert two.inode != one.inode
