"""/proc as it is, as a hostile process shapes it, and as it changes while it is read."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import platform
import resource
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reaperd.linux import procfs
from reaperd.linux.procfs import (
    PF_EXITING,
    PF_FORKNOEXEC,
    ProcessGone,
    ProcessHidden,
    ProcFS,
    environment_value,
    has_pending_sigkill,
    parse_fdinfo,
    parse_gid,
    parse_innermost_pid,
    parse_maps,
    parse_memfd_link,
    parse_mount_kinds,
    parse_mounted_at,
    parse_parent,
    parse_pids,
    parse_stat,
    parse_uid,
    parse_uids,
    parse_unix_sockets,
)
from reaperd.model import Namespaces, ProcessId

NOBODY = 65534
_SYS_EXIT = {"x86_64": 60, "i686": 1}.get(platform.machine(), 93)  # asm-generic/unistd.h


def stat_line(pid: int = 7, comm: bytes = b"python", **facts: Any) -> bytes:
    """Return a line as proc(5) describes it, with ``facts`` in their places."""
    fields = [b"0"] * 50
    places = {
        "state": 0,
        "ppid": 1,
        "flags": 6,
        "utime": 11,
        "stime": 12,
        "threads": 17,
        "start": 19,
        "rss": 21,
    }
    fields[0] = b"S"
    for name, value in {"threads": 1, **facts}.items():
        fields[{**places, "exit_status": 49}[name]] = str(value).encode()
    return b"%d (%s) %s\n" % (pid, comm, b" ".join(fields))


def status_text(**facts: str) -> bytes:
    lines = {"Name": "python", "State": "S (sleeping)", "Uid": "1000\t1000\t1000\t1000", **facts}
    return "".join(f"{name}:\t{value}\n" for name, value in lines.items()).encode()


class FakeProc:
    """A folder that looks like /proc to ProcFS."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.proc = ProcFS(str(root))

    def write(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def link(self, name: str, target: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)


@pytest.fixture
def fake(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


@contextlib.contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """Run ``work`` in a child until the block ends; the block begins once the child has written its first byte."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            work()
            os.write(writer, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert select.select([reader], [], [], 10)[0]
        assert os.read(reader, 1) == b"x", "the child failed"
        yield pid
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def environ_or_gone(proc: ProcFS, pid: int) -> bytes | None:
    """Return what a dead main thread has of an environment: newer kernels say that it is gone, older ones nothing."""
    try:
        return proc.environ(pid, pid)
    except ProcessGone:
        return None


def result_of(work: Callable[[], Any], *, uid: int | None = None) -> Any:
    """Return what ``work`` returns in a child, one that is ``uid`` where that is given; None when it fails."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            os.write(writer, json.dumps(work()).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    return json.loads(data) if data else None


# -- stat -------------------------------------------------------------------------------------------


def test_a_name_of_any_shape_changes_nothing_but_the_name() -> None:
    shapes = [
        "python",
        "",
        " ",
        ")",
        "(",
        "x) Z 1 (",
        "x) Z 1",
        ") ) ) )",
        "7 (x) S 1 1",
        "a\nb",
        "\n",
        "\t",
        "ü",
    ]
    for comm in shapes:
        stat = parse_stat(stat_line(7, comm.encode(), state="R", ppid=3, start=99, threads=2))
        assert stat.comm == comm
        assert (stat.id, stat.state, stat.ppid, stat.threads) == (ProcessId(7, 99), "R", 3, 2), comm
        assert parse_parent(stat_line(7, comm.encode(), ppid=3, start=99)) == (ProcessId(7, 99), 3), comm


def test_a_name_that_is_no_utf8_is_read_with_a_replacement() -> None:
    assert parse_stat(stat_line(7, b"a\xffb")).comm == "a\ufffdb"


def test_every_field_of_stat_comes_from_its_place() -> None:
    numbered = b"7 (x) S " + b" ".join(b"%d" % number for number in range(4, 53))
    stat = parse_stat(numbered)
    assert stat.ppid == 4
    assert stat.flags == 9
    assert stat.cpu_ticks == 14 + 15
    assert stat.threads == 20
    assert stat.id == ProcessId(7, 22)
    assert stat.rss_bytes == 24 * mmap.PAGESIZE
    assert stat.exit_status == 52


def test_a_line_of_a_newer_kernel_with_more_fields_is_read_the_same() -> None:
    assert parse_stat(stat_line(start=5)[:-1] + b" 1 2 3\n") == parse_stat(stat_line(start=5))


def test_what_is_no_stat_line_is_a_value_error() -> None:
    broken = [
        *(b"", b"7", b"7 (x)", b"7 (x) S", b"7 x S 1 2 3", b"(x) S", b") (".join([b"7"] * 60)),
        *(stat_line()[:-4], b"x" + stat_line()),
        *(stat_line(ppid="x"), stat_line(start=""), stat_line(state="\xff")),
    ]
    for data in broken:
        with pytest.raises(ValueError):  # noqa: PT011 (int() says why)
            pytest.fail(f"{data!r} was read as {parse_stat(data)}")


def test_a_parent_is_read_from_nothing_but_a_stat_line() -> None:
    short = b"7 (x) S " + b" ".join([b"1"] * 18)
    for data in (b"", b"7", b"7 (x)", b"7 x S 1 2 3", short, b"x" + stat_line(), stat_line(ppid="x")):
        with pytest.raises(ValueError):  # noqa: PT011 (int() says why)
            pytest.fail(f"{data!r} was read as {parse_parent(data)}")
    assert parse_parent(short + b" 9 1\n") == (ProcessId(7, 9), 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.one_of(st.binary(max_size=60), st.binary(max_size=30).map(lambda comm: stat_line(7, comm))))
def test_any_bytes_are_a_stat_line_or_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert parse_stat(data).id.pid == 7


def test_only_a_zombie_without_another_thread_is_dead() -> None:
    for state, threads in (("S", 1), ("R", 5), ("T", 1), ("t", 1), ("D", 1), ("I", 1), ("Z", 2)):
        assert not parse_stat(stat_line(state=state, threads=threads)).dead, state
    for state, threads in (("Z", 1), ("Z", 0), ("X", 0)):
        assert parse_stat(stat_line(state=state, threads=threads)).dead, state


def test_the_kernel_tells_who_has_not_executed_anything_since_its_fork() -> None:
    assert parse_stat(stat_line(flags=PF_FORKNOEXEC | 0x400000)).forked
    assert not parse_stat(stat_line(flags=0x400000)).forked


# -- status -----------------------------------------------------------------------------------------


def test_a_uid_is_one_only_where_all_three_that_matter_are() -> None:
    assert parse_uid(status_text(Uid="1000\t1000\t1000\t1000")) == 1000
    assert parse_uid(status_text(Uid="0\t0\t0\t0")) == 0
    assert parse_uid(status_text(Uid="1000\t1000\t1000\t0")) == 1000  # fsuid: not whose process it is
    for ids in ("1000\t0\t1000\t1000", "1000\t1000\t0\t1000", "0\t1000\t1000\t1000", "1000\t1000", ""):
        assert parse_uid(status_text(Uid=ids)) is None, ids


def test_a_status_without_ids_says_nothing() -> None:
    for text in (b"", b"Name:\tx\n", b"Uid:\t0\t0\t0\t0\n"):
        assert parse_uid(text) is None
        assert parse_gid(text) is None
        assert parse_innermost_pid(text) is None
        assert parse_uids(text) == frozenset()
        assert parse_pids(text) == ()


def test_a_name_cannot_pose_as_another_line_of_status() -> None:
    # The kernel writes a newline in the name as two characters (fs/proc/array.c).
    assert parse_uid(status_text(Name="x\\nUid:\t0\t0\t0")) == 1000
    assert parse_uid(status_text(Name="Uid:\t0\t0\t0\t0")) == 1000


def test_the_gid_is_the_real_one_and_the_pid_the_innermost() -> None:
    text = status_text(Gid="100\t200\t300\t400", NSpid="4711\t12\t3")
    assert parse_gid(text) == 100
    assert parse_innermost_pid(text) == 3
    assert parse_pids(text) == (4711, 12, 3)
    assert parse_innermost_pid(status_text(NSpid="4711")) == 4711


def test_whoever_has_a_uid_in_any_way_has_it() -> None:
    assert parse_uids(status_text(Uid="1\t2\t3\t4")) == {1, 2, 3, 4}
    assert parse_uids(status_text(Uid="1000\t1000\t1000\t1000")) == {1000}


def test_a_bound_socket_is_told_with_its_path_whatever_that_holds() -> None:
    text = b"""Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 20101 /run/a b
0000000000000000: 00000003 00000000 00000000 0001 03 20102
0000000000000000: 00000002 00000000 00010000 0001 01 20103 @/abstract
0000000000000000: 00000002 00000000 00010000 0001 01 20104 relative
0000000000000000: 00000002 00000000 00010000 0001 01 20105 /tmp/\xff
"""
    assert list(parse_unix_sockets(text)) == ["/run/a b", "/tmp/\udcff"]


def test_the_kind_of_a_file_system_is_told_by_the_id_of_its_mount() -> None:
    text = b"""36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
37 35 0:31 / /a\\040-\\040b rw shared:7 master:1 - tmpfs none rw
garbage
"""
    assert parse_mount_kinds(text) == {36: "ext3", 37: "tmpfs"}


def test_an_open_file_is_on_some_kind_of_file_system() -> None:
    for path, kind in (("/proc", "proc"), ("/dev/shm", "tmpfs"), ("/sys", "sysfs")):
        directory = os.open(path, os.O_RDONLY)
        try:
            assert ProcFS().file_system(directory) == kind
            assert ProcFS("/nowhere").file_system(directory) == ""
        finally:
            os.close(directory)


def test_a_pending_sigkill_is_seen_among_the_signals_of_the_thread_and_of_the_process() -> None:
    none, kill, others = "0000000000000000", "0000000000000100", "fffffffffffffeff"
    assert has_pending_sigkill(status_text(SigPnd=kill, ShdPnd=none))
    assert has_pending_sigkill(status_text(SigPnd=none, ShdPnd=kill))
    assert not has_pending_sigkill(status_text(SigPnd=others, ShdPnd=others, SigBlk=kill))
    assert not has_pending_sigkill(b"Name:\tx\n")


def test_a_process_on_its_way_out_says_so() -> None:
    assert parse_stat(stat_line(flags=PF_EXITING | 0x400000)).exiting
    assert not parse_stat(stat_line(flags=0x400000)).exiting


# -- environment, links, maps -----------------------------------------------------------------------


def test_a_variable_is_the_first_entry_of_that_very_name() -> None:
    for environ, value in (
        (b"MARK=x", "x"),
        (b"MARK=x\0", "x"),
        (b"A=1\0MARK=x\0B=2\0", "x"),
        (b"A=1\0MARK=\0B=2", ""),
        (b"MARK=first\0MARK=second\0", "first"),
        (b"A=1\0MARK=first\0MARK=second\0", "first"),
        (b"XMARK=x\0", ""),
        (b"A=MARK=x\0", ""),
        (b"MARKED=x\0", ""),
        (b"MARK", ""),
        (b"A=\nMARK=x\0", ""),
        (b"XMARK=x\0MARK=y\0", "y"),
        (b"MARK=a=b:c\0", "a=b:c"),
        (b"MARK=\xff\0", "\udcff"),
        (b"\0\0MARK=x\0", "x"),
        (b"", ""),
    ):
        assert environment_value(environ, "MARK") == value, environ


def test_a_memfd_is_known_by_its_link() -> None:
    for link, name in (
        ("/memfd:reaper:1-2 (deleted)", "reaper:1-2"),
        ("/memfd:reaper:1-2", "reaper:1-2"),
        ("/memfd: (deleted)", ""),
        ("/memfd:x (deleted) (deleted)", "x (deleted)"),
        ("/tmp/memfd:reaper:1-2 (deleted)", ""),
        ("memfd:reaper:1-2", ""),
        ("/dev/shm/reaper:1-2", ""),
        ("anon_inode:[pidfd]", ""),
        ("", ""),
    ):
        assert parse_memfd_link(link) == name, link


def test_mappings_are_all_that_name_a_file_as_they_stand() -> None:
    maps = (
        b"55d0-55d1 r--p 00000000 fe:00 12 /usr/bin/python3\n"
        b"7f00-7f01 rw-s 00000000 00:01 34                         /memfd:reaper:1 (deleted)\n"
        b"7f01-7f02 rw-p 00000000 00:00 0 \n"
        b"7f02-7f03 rw-p 00000000 00:00 0                          [heap]\n"
        b"7f03-7f04 r--s 00000000 00:15 9 /dev/shm/with blanks  in it \n"
        b"7f04-7f05 r--s 00000000 00:15 9 /dev/shm/\xff\\012\n"
        b"7f05-7f06 r--s 00000000 00:15 9 /a b c 00:01 34 /memfd:reaper:1\n"
        b"junk\n"
        b"a b c d e f\n"
    )
    assert list(parse_maps(maps)) == [
        ("55d0-55d1", "fe:00", 12, "/usr/bin/python3"),
        ("7f00-7f01", "00:01", 34, "/memfd:reaper:1 (deleted)"),
        ("7f02-7f03", "00:00", 0, "[heap]"),
        ("7f03-7f04", "00:15", 9, "/dev/shm/with blanks  in it "),
        ("7f04-7f05", "00:15", 9, "/dev/shm/\udcff\\012"),
        ("7f05-7f06", "00:15", 9, "/a b c 00:01 34 /memfd:reaper:1"),
    ]
    assert list(parse_maps(b"")) == []


def test_what_a_descriptor_is_is_told_by_its_mount_and_inode() -> None:
    text = b"pos:\t0\nflags:\t02000002\nmnt_id:\t14\nino:\t1033\nseals:\t0\n"
    assert parse_fdinfo(text) == (14, 1033)
    assert parse_fdinfo(text.replace(b"ino:\t1033\n", b"")) == (14, None)  # Linux < 5.14
    assert parse_fdinfo(b"") == (None, None)
    # Of a watched file inotify(7) tells the inode in a line of its own.
    assert parse_fdinfo(b"pos:\t0\nmnt_id:\t14\ninotify wd:1 ino:9 sdev:2\n") == (14, None)
    assert parse_fdinfo(b"pos:\t0\nmnt_id:\tx\nino:\t-1\n") == (None, None)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=120))
def test_any_bytes_are_mappings_and_a_descriptor_or_none(data: bytes) -> None:
    list(parse_maps(data))
    parse_fdinfo(data)
    list(parse_maps(b"7f00-7f01 r--p 0 00:01 34 " + data))


def test_the_image_is_told_by_where_code_stack_arguments_and_environment_are() -> None:
    def image(**places: int) -> int:
        fields = stat_line().split()
        for index in (25, 26, 27, 47, 49):
            fields[index] = b"1"
        numbers = {"startcode": 25, "endcode": 26, "startstack": 27, "arg_start": 47, "env_start": 49}
        for name, value in places.items():
            fields[numbers[name]] = b"%d" % value
        return parse_stat(b" ".join(fields)).image

    assert image() == image() != 0
    for name in ("startcode", "endcode", "startstack", "arg_start", "env_start"):
        assert image(**{name: 2}) != image(), name
    assert image(startstack=0) == 0, "the kernel tells it to nobody who may not see it"
    assert parse_stat(stat_line(utime=5, rss=9)).image == parse_stat(stat_line()).image == 0


# -- a folder like /proc ----------------------------------------------------------------------------


def test_the_listing_has_every_process_and_nothing_else(fake: FakeProc) -> None:
    for name in ("1/stat", "42/stat", "self/x", "sys/kernel/x", "-7/x", "7x/x"):
        fake.write(name, b"")
    listing = fake.proc.listing()
    assert set(listing) == {1, 42}
    assert listing[42] == (fake.root / "42").stat().st_ino


def test_a_process_that_has_vanished_is_gone_whatever_is_asked(fake: FakeProc) -> None:
    proc = fake.proc
    questions: list[Callable[[], object]] = [
        lambda: proc.stat(7),
        lambda: proc.status(7),
        lambda: proc.environ(7, 7),
        lambda: proc.argv(7, 7),
        lambda: proc.cgroup(7),
        lambda: proc.maps(7, 7),
    ]
    for question in questions:
        with pytest.raises(ProcessGone):
            question()
    assert proc.tasks(7) == []
    assert proc.children(7) == []
    assert proc.descriptors(7, 7) == {}
    assert proc.descriptor(7, 7, 3) == ""
    assert proc.namespaces(7) == Namespaces()


def test_a_process_that_ends_between_open_and_read_is_gone(fake: FakeProc) -> None:
    with forked(lambda: None) as pid:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    # Opened anew, the inode of a dead process's file still opens; its read answers ESRCH.
    fake.link("7/stat", f"/proc/self/fd/{descriptor}")
    try:
        with open(fake.root / "7/stat", "rb") as file, pytest.raises(ProcessLookupError):
            file.read()
        with pytest.raises(ProcessGone):
            fake.proc.stat(7)
    finally:
        os.close(descriptor)


def test_a_thread_that_vanishes_takes_only_its_own_children_along(fake: FakeProc) -> None:
    fake.write("7/task/7/children", b"8 9 \n")
    fake.write("7/task/70/comm", b"")
    fake.write("7/task/71/children", b"")
    fake.write("7/task/72/children", b"10 ")
    assert sorted(fake.proc.children(7)) == [8, 9, 10]


def test_a_file_of_any_size_is_read_whole(fake: FakeProc) -> None:
    for size in (0, 1, 1023, 1024, 4095, 4096, 4097, 70_000, 300_000):
        fake.write("7/task/7/environ", b"x" * size)
        assert fake.proc.environ(7, 7) == b"x" * size, size


def test_a_variable_at_the_end_of_a_big_environment_is_found(fake: FakeProc) -> None:
    fake.write("7/task/7/environ", b"A=" + b"x" * 200_000 + b"\0MARK=here\0")
    assert environment_value(fake.proc.environ(7, 7) or b"", "MARK") == "here"


def test_a_file_without_end_is_not_read_for_ever(fake: FakeProc) -> None:
    fake.link("7/task/7/environ", "/dev/zero")

    def read() -> int:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 256 * 1024 * 1024,) * 2)
        return len(fake.proc.environ(7, 7) or b"")

    assert 1024 * 1024 <= result_of(read) <= 64 * 1024 * 1024


def test_a_command_line_is_its_words(fake: FakeProc) -> None:
    for text, argv in (
        (b"", ()),
        (b"python\0", ("python",)),
        (b"python\0-c\0\0x\0", ("python", "-c", "", "x")),
        (b"nginx: worker", ("nginx: worker",)),
        (b"a\0\xff\0", ("a", "\ufffd")),
    ):
        fake.write("7/task/7/cmdline", text)
        assert fake.proc.argv(7, 7) == argv, text


def test_the_main_thread_is_read_while_it_lives_else_one_that_does(fake: FakeProc) -> None:
    for task, state in ((7, "Z"), (70, "X"), (71, "S"), (72, "Z")):
        fake.write(f"7/task/{task}/stat", stat_line(task, state=state))
    fake.write("7/task/69/comm", b"")  # vanishes while it is looked at
    assert fake.proc.living_task(parse_stat(stat_line(7, state="S"))) == 7
    assert fake.proc.living_task(parse_stat(stat_line(7, state="Z", threads=2))) == 71
    (fake.root / "7/task/71/stat").write_bytes(stat_line(71, state="Z"))
    assert fake.proc.living_task(parse_stat(stat_line(7, state="Z", threads=2))) == 7


def test_descriptors_are_read_as_they_stand(fake: FakeProc) -> None:
    fake.link("7/task/7/fd/0", "/dev/null")
    fake.link("7/task/7/fd/12", "/memfd:reaper:1 (deleted)")
    fake.write("7/task/7/fd/13", b"")  # closed in the meantime: no link any more
    assert fake.proc.descriptors(7, 7) == {0: "/dev/null", 12: "/memfd:reaper:1 (deleted)", 13: ""}
    assert fake.proc.descriptor(7, 7, 12) == "/memfd:reaper:1 (deleted)"
    assert len(fake.proc.descriptors(7, 7, most=2)) == 2


class Old(ProcFS):
    """A /proc of Linux < 5.14, whose fdinfo does not tell the inode."""

    def _read(self, name: str, *, records: bool = False) -> bytes:
        text = super()._read(name, records=records)
        return text.replace(b"\nino:", b"\nwas:") if "/fdinfo/" in name else text


@pytest.mark.parametrize("proc", [ProcFS(), Old()], ids=["new", "old"])
def test_the_inode_of_a_memfd_is_told_and_of_nothing_else(proc: ProcFS, tmp_path: Path) -> None:
    me = os.getpid()
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "memfd:x").write_bytes(b"x")
    reader, writer = os.pipe()
    anonymous = os.open(tmp_path, os.O_RDWR | os.O_TMPFILE)
    others = [
        *(reader, writer, anonymous, os.pidfd_open(me)),
        *(
            os.open(path, os.O_RDONLY)
            for path in (tmp_path / "file", tmp_path / "memfd:x", tmp_path, "/dev/null")
        ),
    ]
    memfd = os.memfd_create("any name")
    try:
        assert proc.memfd_inode(me, me, memfd) == os.fstat(memfd).st_ino
        assert [proc.memfd_inode(me, me, number) for number in others] == [None] * len(others)
        assert proc.memfd_inode(me, me, 10**6) is None
        assert proc.memfd_inode(2**22 + 1, 2**22 + 1, 0) is None
    finally:
        for descriptor in (*others, memfd):
            os.close(descriptor)


@pytest.mark.parametrize("proc", [ProcFS(), Old()], ids=["new", "old"])
def test_what_is_no_memfd_is_never_asked_about_by_its_link(
    proc: ProcFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = os.getpid()
    asked = []
    stat = os.stat

    def note(path: Any, **options: Any) -> os.stat_result:
        asked.append(str(path))
        return stat(path, **options)

    memfd, file = os.memfd_create("x"), os.open(tmp_path, os.O_RDONLY)
    try:
        monkeypatch.setattr(os, "stat", note)
        proc.memfd_inode(me, me, file)
        assert asked == []
        proc.memfd_inode(me, me, memfd)
        monkeypatch.undo()
        assert asked == ([f"/proc/{me}/task/{me}/fd/{memfd}"] if isinstance(proc, Old) else [])
    finally:
        os.close(memfd)
        os.close(file)


@pytest.mark.needs_root
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="this kernel has no FUSE")
@pytest.mark.parametrize("proc", [ProcFS(), Old()], ids=["new", "old"])
def test_a_file_of_a_file_system_that_never_answers_holds_nobody_up(proc: ProcFS, tmp_path: Path) -> None:
    def ask() -> bool:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x20000) == 0
        assert libc.mount(None, b"/", None, 1 << 18 | 1 << 14, None) == 0
        server = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
        assert libc.mount(b"dead", os.fsencode(tmp_path), b"fuse", 0, options) == 0
        number = os.open(tmp_path, os.O_PATH)
        me = os.getpid()
        return proc.memfd_inode(me, me, number) is None and proc.descriptors(me, me)[number] == str(tmp_path)

    with deadline():
        assert result_of(ask) is True


@contextlib.contextmanager
def deadline() -> Iterator[None]:
    """Fail what takes longer than ten seconds."""

    def give_up(number: int, frame: object) -> None:
        raise AssertionError("it waits, for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_namespaces_are_read_one_by_one(fake: FakeProc) -> None:
    fake.link("7/ns/pid", "pid:[1]")
    fake.link("7/ns/mnt", "mnt:[2]")
    assert fake.proc.namespaces(7) == Namespaces("pid:[1]", "mnt:[2]", "")


# -- the real one -----------------------------------------------------------------------------------


def test_this_process_is_who_it_is() -> None:
    proc, me = ProcFS(), os.getpid()
    stat = proc.stat(me)
    assert stat.id.pid == me
    assert stat.ppid == os.getppid()
    assert not stat.dead
    assert stat.rss_bytes > 1024 * 1024
    assert stat.id.start_ticks / procfs.TICKS_PER_S < float(Path("/proc/uptime").read_text().split()[0])
    assert parse_uid(proc.status(me)) == os.getuid()
    assert parse_gid(proc.status(me)) == os.getgid()
    assert proc.listing()[me] == os.stat(f"/proc/{me}").st_ino
    assert proc.cgroup(me) == Path("/proc/self/cgroup").read_text()
    assert proc.namespaces(me).pid == os.readlink("/proc/self/ns/pid")
    assert proc.boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert me in proc.tasks(me)


def test_a_child_a_descriptor_and_a_mapping_of_this_process_are_found() -> None:
    proc, me = ProcFS(), os.getpid()
    number = os.memfd_create("reaper-test-name")
    os.ftruncate(number, mmap.PAGESIZE)
    inode = os.fstat(number).st_ino
    with mmap.mmap(number, mmap.PAGESIZE), forked(lambda: None) as pid:
        assert pid in proc.children(me)
        assert parse_memfd_link(proc.descriptor(me, me, number)) == "reaper-test-name"
        assert parse_memfd_link(proc.descriptors(pid, pid)[number]) == "reaper-test-name"
        os.close(number)
        mapped = [one for one in parse_maps(proc.maps(me, me)) if "reaper-test-name" in one.path]
        assert [parse_memfd_link(one.path) for one in mapped] == ["reaper-test-name"]
        assert (mapped[0].device, mapped[0].inode) == (proc.memfd_device(), inode)
        assert proc.stat(pid).forked
        assert proc.descriptor(me, me, number) == ""
        assert os.stat(proc.descriptor_path(pid, pid, number)).st_ino == inode


def test_a_big_environment_of_a_real_process_is_read_to_its_end(run: str) -> None:
    environment = {"A": "x" * 100_000, "B": "y" * 100_000, "MARK": "here", "REAPER_TEST_RUN": run}
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x\n")  # what it says back, it says after execve(2) has set the environment
        process.stdin.flush()
        process.stdout.readline()
        proc = ProcFS()
        assert environment_value(proc.environ(process.pid, process.pid) or b"", "MARK") == "here"
        assert proc.argv(process.pid, process.pid) == ("cat",)
        assert not proc.stat(process.pid).forked
        process.stdin.close()


def test_a_fork_has_the_image_of_its_parent_and_every_program_one_of_its_own(run: str) -> None:
    proc, me = ProcFS(), os.getpid()
    with forked(lambda: None) as pid:
        assert proc.stat(pid).image == proc.stat(me).image != 0
    images = {proc.stat(me).image}
    for mark in ("x", "y", "x"):
        environment = {"MARK": mark, "REAPER_TEST_RUN": run}
        with subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"x\n")
            process.stdin.flush()
            process.stdout.readline()
            assert proc.stat(process.pid).image == proc.stat(process.pid).image
            images.add(proc.stat(process.pid).image)
            process.stdin.close()
    assert len(images) == 4


def test_a_zombie_is_dead_and_has_neither_environment_nor_command_line() -> None:
    proc = ProcFS()
    with forked(lambda: None) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        stat = proc.stat(pid)
        assert stat.dead
        assert stat.exit_status == signal.SIGKILL
        assert not environ_or_gone(proc, pid)
        assert proc.argv(pid, pid) == ()
        os.waitpid(pid, 0)
        with pytest.raises(ProcessGone):
            proc.stat(pid)


def test_a_process_whose_main_thread_alone_has_ended_lives_and_is_read_through_another() -> None:
    reader, writer = os.pipe()

    def lose_the_main_thread() -> None:
        def say_when_alone() -> None:
            while parse_stat(Path("/proc/self/stat").read_bytes()).state != "Z":
                os.sched_yield()
            os.write(writer, b"x")
            signal.pause()

        threading.Thread(target=say_when_alone).start()
        ctypes.CDLL(None).syscall(_SYS_EXIT, 0)  # ends this thread alone, and Python knows nothing of it

    pid = os.fork()
    if pid == 0:
        lose_the_main_thread()
        os._exit(1)
    try:
        assert select.select([reader], [], [], 10)[0]
        proc = ProcFS()
        stat = proc.stat(pid)
        task = proc.living_task(stat)
        assert (stat.state, stat.threads, stat.dead) == ("Z", 2, False)
        assert task != pid
        assert proc.environ(pid, task) == Path("/proc/self/environ").read_bytes()
        assert not environ_or_gone(proc, pid)
        assert proc.descriptors(pid, task)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


@pytest.mark.needs_root
def test_what_belongs_to_another_user_is_told_as_far_as_everybody_may_know_it() -> None:
    def ask() -> dict[str, Any]:
        proc, other = ProcFS(), os.getppid()
        return {
            "pid": proc.stat(other).id.pid,
            "uid": parse_uid(proc.status(other)),
            "argv": len(proc.argv(other, other)) > 0,
            "environ": proc.environ(other, other),
            "descriptors": proc.descriptors(other, other),
            "descriptor": proc.descriptor(other, other, 0),
            "maps": list(parse_maps(proc.maps(other, other))),
            "image": proc.stat(other).image,
            "namespaces": proc.namespaces(other).pid,
        }

    assert result_of(ask, uid=NOBODY) == {
        "pid": os.getpid(),
        "uid": 0,
        "argv": True,
        "environ": None,
        "descriptors": {},
        "descriptor": "",
        "maps": [],
        "image": 0,
        "namespaces": "",
    }


def test_reading_leaves_no_descriptor_open() -> None:
    proc, me = ProcFS(), os.getpid()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        proc.stat(me)
        proc.environ(me, me)
        proc.maps(me, me)
        proc.memfd_inode(me, me, 0)
        proc.listing()
        with pytest.raises(ProcessGone):
            proc.stat(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_last_pid_changes_with_every_fork_and_every_thread() -> None:
    proc = ProcFS()
    seen = [proc.last_pid()]
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    seen.append(proc.last_pid())
    thread = threading.Thread(target=os.getpid)
    thread.start()
    thread.join()
    seen.append(proc.last_pid())
    assert len(set(seen)) == 3


def test_of_a_command_line_of_megabytes_the_beginning_is_told() -> None:
    command = ["sh", "-c", "read line", *(["\u00ff" * 60_000] * 10)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        end_s = time.monotonic() + 10.0
        argv: tuple[str, ...] = ()
        while argv[:1] != ("sh",):  # nothing tells when another process has exec'ed
            assert time.monotonic() < end_s
            argv = ProcFS().argv(process.pid, process.pid)
        process.communicate()
    assert argv[:3] == ("sh", "-c", "read line")
    assert sum(len(word.encode()) for word in argv) <= 1 << 16


MOUNTINFO = b"""\
22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw
30 22 0:25 / /dev/shm rw - tmpfs tmpfs rw
31 22 0:26 /inner /tmp rw master:1 - tmpfs tmpfs rw
32 22 0:27 / /mnt\\040x rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("text", "point", "found"),
    [
        (MOUNTINFO, "/dev/shm", "0:25"),
        (MOUNTINFO, "/", "254:0"),
        (MOUNTINFO, "/tmp", ""),  # a part of one
        (MOUNTINFO, "/nowhere", ""),
        (MOUNTINFO + b"33 30 0:28 / /dev/shm rw - tmpfs tmpfs rw\n", "/dev/shm", "0:28"),  # on top of it
        (MOUNTINFO + b"33 30 0:25 /sub /dev/shm rw - tmpfs tmpfs rw\n", "/dev/shm", ""),
        (b"", "/dev/shm", ""),
        (b"\xff / /dev/shm\n1 2 3 4\n\n", "/dev/shm", ""),
    ],
)
def test_which_file_system_is_seen_at_a_place_is_told_by_the_last_mount_there(
    text: bytes, point: str, found: str
) -> None:
    assert parse_mounted_at(text, point) == found


def test_a_process_that_may_not_be_asked_about_is_hidden_and_one_that_may_not_be_read_is_not(
    fake: FakeProc, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, expected in ((errno.EPERM, ProcessHidden), (errno.EACCES, PermissionError)):

        def refuse(*_: object, number: int = number) -> int:
            raise PermissionError(number, os.strerror(number))

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(expected):
            fake.proc.stat(7)


def test_a_proc_that_does_not_know_us_is_not_of_our_pid_namespace(fake: FakeProc) -> None:
    assert ProcFS().is_of_our_pid_namespace()
    assert not fake.proc.is_of_our_pid_namespace()
    for pids, ours in (
        (f"{os.getpid()}", True),
        (f"{os.getpid()}\t{os.getpid()}", False),
        (f"9\t{os.getpid()}", False),
    ):
        fake.write("self/status", f"Name:\tx\nNSpid:\t{pids}\n".encode())
        assert fake.proc.is_of_our_pid_namespace() == ours


class Deep(ProcFS):
    """Where somebody is in a control group whose path the kernel does not tell."""

    def _read(self, name: str, *, records: bool = False) -> bytes:
        if name.endswith("/cgroup"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        return super()._read(name, records=records)


def test_who_is_in_too_deep_a_control_group_to_be_told_is_hidden() -> None:
    with pytest.raises(ProcessHidden):
        Deep().cgroup(os.getpid())
