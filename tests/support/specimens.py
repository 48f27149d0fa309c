"""Real processes for unit tests of what reads them: children that fork, exec or change on a cue, and sessions they lead."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agent.page import SessionPage
from reaperd.linux import helper
from reaperd.linux.procfs import ProcessGone, ProcFS, Stat
from reaperd.model import Cause, CauseKind, Process, ProcessId, Session, Snapshot

ME, UID = os.getpid(), os.getuid()
NOBODY = 65534
SOON_S = 10.0  # a deadline, not a wait
KILLED = Cause(CauseKind.SIGNAL, 9)
OTHER_ID = "7-7-00000007-00000007"
FILE_BYTES = mmap.PAGESIZE


@contextlib.contextmanager
def cued(work: Callable[[], object]) -> Iterator[tuple[int, Callable[[], None]]]:
    """Run a forked child that does ``work`` when the second of what is yielded is called, and then waits to be killed."""
    cue, told = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.close(cue[1])
            os.close(told[0])
            os.write(told[1], b"x")
            os.read(cue[0], 1)
            cued.here = cue[0], told[1]  # type: ignore[attr-defined]
            work()
            os.write(told[1], b"x")
            signal.pause()
        os._exit(1)
    os.close(cue[0])
    os.close(told[1])

    def await_word() -> None:
        assert select.select([told[0]], [], [], SOON_S)[0]
        assert os.read(told[0], 1) == b"x", "the child failed"

    def give_cue() -> None:
        os.write(cue[1], b"gx")  # the second byte is for the program that it executes
        await_word()

    try:
        await_word()
        yield pid, give_cue
    finally:
        os.close(cue[1])
        os.close(told[0])
        end(pid)


@contextlib.contextmanager
def child(work: Callable[[], object] = lambda: None) -> Iterator[int]:
    """Run ``work`` in a forked child, which then waits to be killed; the block begins when the work is done."""
    with cued(work) as (pid, give_cue):
        give_cue()
        yield pid


@contextlib.contextmanager
def changing(**environment: str) -> Iterator[tuple[int, Callable[[], None]]]:
    """Run a forked child that becomes a program with exactly this environment when it is given its cue."""

    def execute() -> None:
        for number, descriptor in enumerate(cued.here):  # type: ignore[attr-defined]
            os.dup2(descriptor, number)
        os.execve("/bin/cat", ["cat"], environment)  # it says the cue back once execve(2) is over

    with cued(execute) as both:
        yield both


@contextlib.contextmanager
def child_of_child() -> Iterator[tuple[int, int]]:
    """Run a child that has a child."""
    reader, writer = os.pipe()

    def have_a_child() -> None:
        if pid := os.fork():
            os.write(writer, b"%d\n" % pid)
        else:
            os.close(writer)
            signal.pause()

    with child(have_a_child) as pid, open(reader, "rb") as file:
        os.close(writer)
        grandchild = int(file.readline())
        try:
            yield pid, grandchild
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(grandchild, signal.SIGKILL)


@contextlib.contextmanager
def forking() -> Iterator[tuple[int, Callable[[], int]]]:
    """Run a child that has a child of its own when the second of what is yielded is called, which returns its pid."""
    reader, writer = os.pipe()

    def fork() -> None:
        if pid := os.fork():
            os.write(writer, b"%d\n" % pid)
        else:
            signal.pause()

    grandchildren: list[int] = []
    with cued(fork) as (pid, give_cue), open(reader, "rb") as file:
        os.close(writer)

        def fork_now() -> int:
            give_cue()
            grandchildren.append(int(file.readline()))
            return grandchildren[0]

        try:
            yield pid, fork_now
        finally:
            for grandchild in grandchildren:
                os.kill(grandchild, signal.SIGKILL)


@contextlib.contextmanager
def executed(**environment: str) -> Iterator[int]:
    """Run a program with exactly this environment."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x\n")  # what it says back, it says after execve(2) has set the environment
        process.stdin.flush()
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


def open_on_a_mount_of_ones_own(directory: Path, name: str) -> int:
    """Return a descriptor of a new file in the root of a mount that nobody can see; mount(2), unshare(2).

    Of a mount that was detached, links in /proc tell paths from its root on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private, recursive, detach = 0x20000, 1 << 18, 1 << 14, 2
    assert libc.unshare(new_mounts) == 0
    assert libc.mount(None, b"/", None, private | recursive, None) == 0
    assert libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, None) == 0
    path = directory / name
    path.write_bytes(b"x" * FILE_BYTES)
    descriptor = os.open(path, os.O_RDWR)
    assert libc.umount2(os.fsencode(directory), detach) == 0
    return descriptor


def die(pid: int) -> None:
    """Kill a child and leave it a zombie."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def end(pid: int) -> None:
    """Kill a child and wait for it, if that was not done before."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def id_of(pid: int) -> ProcessId:
    return ProcFS().stat(pid).id


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Mine(ProcFS):
    """A /proc that lists init, this process and all below it, and nobody else of the machine."""

    def __init__(self, *, older_s: float = 0.0, slow_s: float = 0.0) -> None:
        """All are as much older; reading one takes so long, which leaves time for few to be read in turn."""
        super().__init__()
        self.older_ticks, self.slow_s = int(older_s * 100), slow_s
        self.stats: Counter[int] = Counter()
        self.reads: Counter[int] = Counter()  # in full
        self.inodes: dict[int, int] = {}  # where a pid was given to another process
        self._mine = {1, ME}  # and who was adopted by somebody else meanwhile

    def listing(self) -> dict[int, int]:
        pending = list(self._mine - {1})
        while pending:
            with contextlib.suppress(ProcessGone):
                below = set(super().children(pending.pop())) - self._mine
                self._mine |= below
                pending += below
        return {
            pid: self.inodes.get(pid, inode) for pid, inode in super().listing().items() if pid in self._mine
        }

    def stat(self, pid: int) -> Stat:
        self.stats[pid] += 1
        until_s = time.monotonic() + self.slow_s
        while time.monotonic() < until_s:
            pass
        told = super().stat(pid)
        return told._replace(id=ProcessId(pid, told.id.start_ticks - self.older_ticks))

    def living_task(self, stat: Stat) -> int:
        self.reads[stat.id.pid] += 1
        return super().living_task(stat)


def session(page: SessionPage | None = None, **facts: Any) -> Session:
    """Return a session that this process leads."""
    if page is None:
        return Session("none", "", UID, os.getgid(), id_of(ME), "")._replace(**facts)
    one = Session(page._identity[0], "", UID, os.getgid(), id_of(ME), "")
    return one._replace(**{"page_fd": page.fd, "page_inode": os.fstat(page.fd).st_ino, **facts})


def dead_session(page: SessionPage | None = None, **facts: Any) -> Session:
    return session(page, cause=KILLED, **facts)


def found(snapshot: Snapshot, pid: int) -> Process:
    return snapshot.processes[pid]


def seen(snapshot: Snapshot, pid: int) -> Process | None:
    return snapshot.processes.get(pid)


@contextlib.contextmanager
def mapping(path: Path) -> Iterator[None]:
    """Map a file by mmap(2) alone: Python's mmap keeps a descriptor."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    with open(path, "rb") as file:
        at = libc.mmap(None, FILE_BYTES, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(0))
    yield
    libc.munmap(ctypes.c_void_p(at), FILE_BYTES)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Fail a block that leaves a descriptor or a child behind."""
    descriptors, children = count_descriptors(), ProcFS().children(ME)
    yield
    assert count_descriptors() == descriptors
    for pid in helper._left_behind:  # on a crowded machine even SIGKILL takes its time
        os.waitpid(pid, 0)
    helper._left_behind.clear()
    assert ProcFS().children(ME) == children
