"""Holds a process just before a chosen system call, with ptrace(2): a race is then a sequence of steps, not of luck."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

# linux/ptrace.h
_CONT, _DETACH, _SYSCALL, _SEIZE, _INTERRUPT = 7, 17, 24, 0x4206, 0x4207
_GET_EVENT_MESSAGE = 0x4201
_GET_SYSCALL_INFO = 0x420E  # Linux 5.3
_TRACESYSGOOD, _TRACEFORK = 0x1, 0x2
_FORKED = 1  # PTRACE_EVENT_FORK
_ENTRY = 1  # PTRACE_SYSCALL_INFO_ENTRY
_STOPPED_AT_CALL = signal.SIGTRAP | 0x80
_WALL = 0x40000000
_PATIENCE_S = 0.1

# The same number on every architecture: asm-generic/unistd.h.
PIDFD_SEND_SIGNAL, PIDFD_OPEN = 424, 434


class Call(NamedTuple):
    """A system call that is about to be made."""

    number: int
    arguments: tuple[int, ...]
    paths: tuple[bytes, ...]  # what the first two arguments point to, where they do


class _Info(ctypes.Structure):
    _fields_ = [
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
        ("more", ctypes.c_uint64),
    ]


class Tracer:
    """Traces the main thread of ``pid``, from the thread that made this; whoever is traced runs on after ``close()``."""

    def __init__(self, pid: int, *, hold_children: bool = False) -> None:
        self.pid = pid
        self.children: list[int] = []  # held before they have done anything
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self._libc.ptrace.restype = ctypes.c_long
        self._ptrace(_SEIZE, 0, _TRACESYSGOOD | (_TRACEFORK if hold_children else 0))
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        self._stopped = self._ended = self._at_call = False
        self._signal = self._event = 0

    def _ptrace(self, request: int, address: int = 0, data: int = 0) -> int:
        result: int = self._libc.ptrace(request, self.pid, address, data)
        if result < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"ptrace request {request:#x} of {self.pid}: {os.strerror(error)}")
        return result

    def hold(self) -> None:
        """Stop it where it is."""
        self._ptrace(_INTERRUPT)
        while not self._wait(_PATIENCE_S):
            pass

    def run_until(self, wanted: Callable[[Call], bool], give_up: Callable[[], bool]) -> bool:
        """Let it run until it is about to make a ``wanted`` call, and hold it there; False when it is time to give up.

        ``give_up`` is asked whenever a call of any kind is about to be made, and now and then while none is. It is
        held then as well.
        """
        self._ptrace(_SYSCALL)
        while not self._ended:
            if not self._wait(_PATIENCE_S):
                if give_up():
                    self.hold()
                    return False
                continue
            if not self._ended and self._at_entry(call := _Info()):
                if give_up():
                    return False
                if wanted(self._describe(call)):
                    return True
            if not self._ended:
                self._ptrace(_SYSCALL, 0, self._signal)
        return False

    def run_while(self, wanted: Callable[[], bool]) -> None:
        """Let it run while ``wanted``, and hold every child that it forks meanwhile; it is held itself afterwards."""
        while wanted() and not self._ended:
            if self._stopped:
                self._ptrace(_CONT, 0, self._signal)
                self._stopped = False
            if self._wait(_PATIENCE_S / 10) and self._event == _FORKED:
                message = ctypes.c_ulong()
                self._ptrace(_GET_EVENT_MESSAGE, 0, ctypes.addressof(message))
                self.children.append(message.value)
        if not self._stopped and not self._ended:
            self.hold()

    def _wait(self, within_s: float) -> bool:
        """Say whether it stopped or ended within that time."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            end_s = time.monotonic() + within_s
            while (found := os.waitpid(self.pid, _WALL | os.WNOHANG)) == (0, 0):
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    return False
                signal.sigtimedwait({signal.SIGCHLD}, left_s)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._note(found[1])
        return True

    def _note(self, status: int) -> None:
        self._stopped = os.WIFSTOPPED(status)
        self._ended = not self._stopped
        self._signal, self._event = 0, status >> 16
        if self._stopped:
            number = os.WSTOPSIG(status)
            self._at_call = number == _STOPPED_AT_CALL
            if not self._at_call and not self._event:  # a signal on its way to it, not an event of ptrace's
                self._signal = number

    def _at_entry(self, info: _Info) -> bool:
        if not self._at_call:
            return False
        self._ptrace(_GET_SYSCALL_INFO, ctypes.sizeof(info), ctypes.addressof(info))
        return bool(info.op == _ENTRY)

    def _describe(self, info: _Info) -> Call:
        arguments = tuple(info.arguments)
        return Call(info.number, arguments, tuple(map(self._read_text, arguments[:2])))

    def _read_text(self, address: int) -> bytes:
        with contextlib.suppress(OSError, OverflowError, ValueError):
            return os.pread(self._memory, 256, address).partition(b"\0")[0]
        return b""

    def close(self) -> None:
        """Let it go."""
        os.close(self._memory)
        if not self._stopped and not self._ended:
            self.hold()
        if self._ended:
            return
        for child in self.children:
            os.waitpid(child, _WALL)  # it has stopped before it ran
            self._libc.ptrace(_DETACH, child, 0, 0)
        try:
            self._ptrace(_DETACH, 0, self._signal)
        except ProcessLookupError:  # it was killed: its parent hears of that once we have
            os.waitpid(self.pid, _WALL)
