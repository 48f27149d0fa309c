"""Reads what one process is now, or what of it has changed. Knows nobody, and keeps nothing but pidfds.

While a snapshot of a dead leader's survivors is taken, a pidfd is opened for each process before anything of it is
read: whatever the evidence says then holds for exactly the process that a signal would reach.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterable
from typing import NamedTuple

from agent import wire
from reaperd.coverage import Coverage
from reaperd.linux import pidfd
from reaperd.linux.procfs import PF_KTHREAD, TICKS_PER_S, ProcessGone, ProcFS, Stat, parse_uid
from reaperd.marks import MarkReader, Marks
from reaperd.memory import Memory, Wish
from reaperd.model import Process, ProcessId

_YOUNG_TICKS = 2 * TICKS_PER_S  # old enough then to have become what it will be


class Known(NamedTuple):
    """What was read of one process."""

    id: ProcessId | None = None  # None: it could not be read, or is a zombie
    uid: int | None = None
    process: Process | None = None  # where it can belong to a covered session: with its marks
    image: int = 0  # 0: not enough was read to tell that the same program runs, or the kernel does not tell
    settled: bool = True  # it was no longer young
    inode: int = 0  # of /proc/PID


class Unread(NamedTuple):
    """A process whose memory is to be read yet."""

    known: Known  # once that is done
    marks: Marks
    wish: Wish
    before: Known | None = None  # what was known of it


class Handles:
    """The pidfds that were opened before their processes were read."""

    def __init__(self) -> None:
        self._held: dict[ProcessId, int] = {}
        # The reaper opens what is beyond this, and then compares start times.
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4

    def open(self, pid: int) -> int:
        """Return a pidfd of ``pid``, which is the caller's to close, -1 where enough are held; ProcessGone."""
        return pidfd.open_pid(pid) if len(self._held) < self._most else -1

    def hold(self, process_id: ProcessId, handle: int) -> bool:
        """Hold ``handle`` from now on; False where one of that process is held already."""
        return self._held.setdefault(process_id, handle) == handle

    def has_exited(self, process_id: ProcessId) -> bool:
        """Say whether a pidfd is held that says that its process has exited."""
        held = self._held.get(process_id)
        return held is not None and pidfd.has_exited(held)

    def claim(self, process_id: ProcessId) -> int | None:
        """Return the pidfd that was opened before ``process_id`` was read; it is the caller's to close from now on."""
        return self._held.pop(process_id, None)

    def close(self, process_id: ProcessId) -> None:
        """Close the pidfd of ``process_id``, where one is held."""
        if (handle := self.claim(process_id)) is not None:
            os.close(handle)

    def release(self) -> None:
        """Close the pidfds that nobody claimed."""
        while self._held:
            os.close(self._held.popitem()[1])


class ProcessReader:
    """Reads one /proc."""

    def __init__(self, proc: ProcFS, marks: MarkReader, coverage: Coverage, handles: Handles) -> None:
        self._proc = proc
        self._marks = marks
        self._coverage = coverage
        self._handles = handles
        self.reads_cgroups = False  # also of those whose page tells whose they are

    def read(self, pid: int, *, hold: bool) -> tuple[Known, Unread | None]:
        """Return what ``pid`` is now, and what of it is to be read yet; ProcessGone, or what reading it raises."""
        handle = self._handles.open(pid)
        try:
            stat = self._proc.stat(pid)
            if stat.dead:
                return Known(), None
            known, unread = self._describe(stat, handle, hurried=hold)
            if hold and handle >= 0 and known.process is not None and self._handles.hold(stat.id, handle):
                handle = -1
            return known, unread
        finally:
            if handle >= 0:
                os.close(handle)

    def read_again(self, pid: int, known: Known | None) -> Known | None:
        """Return ``known`` brought up to date, where the process still runs the program that it ran then."""
        if known is None or known.id is None or not known.image:
            return None
        process = known.process
        if process is None and self._coverage.can_belong(known.uid, known.id):
            return None
        stat = self._proc.stat(pid)
        if stat.dead or (stat.id, stat.image) != (known.id, known.image) or stat.state == "D":
            return None
        if not known.settled:
            handle = pidfd.open_pid(pid)
            try:
                if self._uid(pid, handle) != known.uid:
                    return None
            finally:
                os.close(handle)
        if process is not None:
            now = (stat.ppid, stat.comm, stat.rss_bytes, stat.cpu_ticks)
            if now != (process.ppid, process.comm, process.rss_bytes, process.cpu_ticks):
                ppid, comm, rss_bytes, cpu_ticks = now
                process = process._replace(ppid=ppid, comm=comm, rss_bytes=rss_bytes, cpu_ticks=cpu_ticks)
        settled = known.settled or is_settled(stat)
        if process is known.process and settled == known.settled:
            return known
        return known._replace(process=process, settled=settled)

    def read_alone(self, pids: Iterable[int], *, memory: bool = True) -> dict[int, Process]:
        """Return what ``pids`` are, of those that can belong to a session; nothing of it is kept."""
        found: dict[int, Process] = {}
        unread: dict[int, Unread] = {}
        for pid in pids:
            with contextlib.suppress(ProcessGone, PermissionError, ValueError):
                known, rest = self.read(pid, hold=False)
                if known.process is not None:
                    found[pid] = known.process
                if rest is not None:
                    unread[pid] = rest
        if memory and unread:
            for pid, told in self._marks.memory.read([one.wish for one in unread.values()]).items():
                found[pid] = self.with_memory(unread[pid], found[pid], told)
        return found

    def with_memory(self, one: Unread, process: Process, memory: Memory) -> Process:
        """Return ``process`` with the marks that lie in its memory."""
        return marked(process, self._marks.with_memory(one.marks, memory, process.id.pid, one.known.uid))

    def _describe(self, stat: Stat, handle: int, *, hurried: bool) -> tuple[Known, Unread | None]:
        id_, pid = stat.id, stat.id.pid
        first_ticks = self._coverage.first_ticks
        if first_ticks is None or id_.start_ticks < first_ticks or stat.flags & PF_KTHREAD:
            return Known(id_), None  # that never changes
        uid = self._uid(pid, handle)
        if not self._coverage.can_belong(uid, id_):
            return Known(id_, uid, None, stat.image, is_settled(stat)), None
        marks, wish = self._marks.read_descriptors(stat, uid, hurried=hurried)
        process = Process(
            id=id_,
            ppid=stat.ppid,
            uid=uid,
            comm=stat.comm,
            forked=stat.forked,
            pages=marks.pages,
            spared=marks.spared,
            # A session page tells enough.
            cgroup=wire.parse_cgroup(self._proc.cgroup(pid)) if wish or self.reads_cgroups else None,
            rss_bytes=stat.rss_bytes,
            cpu_ticks=stat.cpu_ticks,
        )
        known = Known(id_, uid, process, 0, settled=False)
        if wish is None:
            return known, None
        whole = known._replace(image=stat.image, settled=is_settled(stat))
        return known, Unread(whole, marks, wish)

    def _uid(self, pid: int, handle: int) -> int | None:
        told = pidfd.info(handle) if handle >= 0 else None
        return told.uid if told is not None else parse_uid(self._proc.status(pid))


def marked(process: Process, marks: Marks) -> Process:
    """Return ``process`` with ``marks``."""
    argv, lineage, pages, spared = marks
    return process._replace(argv=argv, lineage=lineage, pages=pages, spared=spared)


def is_settled(stat: Stat) -> bool:
    """Say whether a process is old enough to have become what it will be."""
    return ticks_now() - stat.id.start_ticks > _YOUNG_TICKS


def ticks_now() -> float:
    """Return what the start ticks of a process that starts now would be."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_PER_S
