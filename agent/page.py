"""The session page as its leader holds it: a sealed memfd of 4 KiB, open and mapped for the life of the process.

Forked workers inherit the descriptor and the mapping, so the page marks them as family, and the daemon
can read it after the leader was killed.
"""

from __future__ import annotations

import _thread
import fcntl
import mmap
import os
import sys

from agent import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# linux/fcntl.h; the constants are in Python's fcntl module for some versions only.
_F_ADD_SEALS = 1033
_SIZE_SEALS = 0x2 | 0x4  # SHRINK, GROW
_ALL_SEALS = _SIZE_SEALS | 0x1 | 0x10  # SEAL, FUTURE_WRITE


class SessionPage:
    """One page. All writes go through its mapping: write(2) is sealed off for everybody, once no exec is to come."""

    def __init__(
        self,
        session: str,
        name: str,
        start_ticks: int,
        boot_id: str,
        *,
        realm: str = "",
        attempt: tuple[int, int] | None = None,
        status_file: str | None = None,
        for_exec: bool = False,
        inherited_fd: int = -1,
    ) -> None:
        """Make, map and seal the page; OSError where the kernel lacks memfd sealing (Linux 5.1).

        ``for_exec`` makes one whose descriptor outlives execve(2), and that the program which is run then can map anew and
        seal for good: that is ``inherited_fd``.
        """
        self._identity = (session, name, start_ticks, boot_id)
        self.attempt = attempt
        self._sockets: list[str] = []
        self._fields: dict[str, Any] = {"realm": realm, "attempt": attempt, "status_file": status_file}
        self._flags = 0
        self._record_bytes = 0
        self._lock = _thread.RLock()  # a signal handler may write in the middle of a write
        if inherited_fd >= 0:
            self.fd = inherited_fd
        else:
            self.fd = _above_standard(
                os.memfd_create(wire.PAGE_PREFIX + session, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            )
        try:
            if inherited_fd < 0:
                os.ftruncate(self.fd, wire.PAGE_BYTES)
            self._inode = os.fstat(self.fd).st_ino
            self._memory, self._duplicate = _map(self.fd, wire.PAGE_BYTES)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _SIZE_SEALS if for_exec else _ALL_SEALS)
            os.set_inheritable(self.fd, for_exec)
        except OSError:
            os.close(self.fd)
            raise
        self._sequence = int.from_bytes(self._memory[wire.SEQUENCE_SLICE], "little") & 0xFFFFFFFE

    def write_record(self, sockets: list[str]) -> None:
        """Say who the leader is and which daemon's socket it belongs to (all that were tried, where none answered)."""
        record = wire.pack_record(*self._identity, self.fd, sockets, **self._fields)
        self._sockets = sockets
        self._record_bytes = len(record)
        self._write(wire.RECORD_AT, record)

    @property
    def sockets(self) -> list[str]:
        """The sockets that the record names."""
        return self._sockets

    def say(self, **fields: object) -> dict[str, object]:
        """Put optional fields of the record (``wire.pack_record``) to these values, None for none, and return what they were.

        WireError: no room, and they are as they were.
        """
        before, self._fields = self._fields, {**self._fields, **fields}
        try:
            self.write_record(self._sockets)
        except wire.WireError:
            self._fields = before
            raise
        return {name: before.get(name) for name in fields}

    def write_progress(self, done: float, total: float | None, message: str) -> None:
        """Say how far the work is."""
        self._write(wire.PROGRESS_AT, wire.pack_progress(done, total, message))

    def write_spared(self, processes: list[tuple[int, int]]) -> None:
        """Name the processes, as (pid, start ticks), that are meant to outlive the leader."""
        self._write(wire.SPARED_AT, wire.pack_spared(processes))

    def raise_flag(self, flag: int) -> None:
        """Set ``wire.CLOSING`` or ``wire.ENDED``."""
        self._flags |= flag
        self._write(wire.RECORD_AT, b"")

    def _write(self, at: int, data: bytes) -> None:
        with self._lock:
            if self.fd < 0:  # closed by another thread
                return
            memory = self._memory
            self._sequence = (self._sequence + 2) & 0xFFFFFFFE
            memory[wire.SEQUENCE_SLICE] = (self._sequence | 1).to_bytes(4, "little")
            memory[at : at + len(data)] = data
            header = wire.pack_header(self._sequence, self._flags, self._record_bytes)
            memory[: len(header)] = header

    def after_fork(self) -> None:
        """Make the page usable in a forked child: another thread of the parent may have held the lock."""
        self._lock = _thread.RLock()

    def close(self) -> None:
        """Unmap and close the page: the mark is gone from this process.

        A program that closed all its descriptors (as daemons do) may have given our numbers to files of its own: then
        nothing is closed, and the mapping stays.
        """
        with self._lock:
            if self.fd < 0:
                return
            if self._is_ours(self.fd) and (self._duplicate < 0 or self._is_ours(self._duplicate)):
                self._memory.close()
                os.close(self.fd)
            else:
                _abandoned.append(self._memory)
            self.fd = -1

    def _is_ours(self, descriptor: int) -> bool:
        return _has_inode(descriptor, self._inode)


# Mappings whose descriptors are the program's by now: were they collected, mmap would close those.
_abandoned: list[mmap.mmap] = []


def _above_standard(descriptor: int) -> int:
    """Return a descriptor of the same that is no program's standard input, output or error, which may have been closed."""
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


def _map(descriptor: int, size: int) -> tuple[mmap.mmap, int]:
    """Return a mapping, and the number of the duplicate that mmap keeps of ``descriptor`` before Python 3.13, else -1."""
    if sys.version_info >= (3, 13):
        return mmap.mmap(descriptor, size, trackfd=False), -1
    os.close(likely := os.dup(descriptor))  # the lowest number that is free, unless another thread is quicker
    memory, inode = mmap.mmap(descriptor, size), os.fstat(descriptor).st_ino
    if _has_inode(likely, inode):
        return memory, likely
    numbers = (int(name) for name in os.listdir("/proc/self/fd"))
    return memory, next((one for one in numbers if one != descriptor and _has_inode(one, inode)), -1)


def _has_inode(descriptor: int, inode: int) -> bool:
    try:
        return os.fstat(descriptor).st_ino == inode
    except OSError:  # it is closed by now
        return False


class SparedMark:
    """What a forked child that was started under ``spared()`` carries instead of the page."""

    def __init__(self, session: str) -> None:
        """Make and map the mark; it holds nothing but its name."""
        self.fd = os.memfd_create(wire.SPARED_PREFIX + session, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, mmap.PAGESIZE)
        self._memory = mmap.mmap(self.fd, mmap.PAGESIZE)
