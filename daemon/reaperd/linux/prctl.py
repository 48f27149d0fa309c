"""prctl(2): what only a C library call can set on this process."""

from __future__ import annotations

import ctypes
import os

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME = 1, 4, 15
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38


def _prctl(option: int, argument: int | bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(
        option,
        ctypes.c_char_p(argument) if isinstance(argument, bytes) else ctypes.c_ulong(argument),
        0,
        0,
        0,
    ):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def forbid_new_privileges() -> None:
    """No execve(2) from here on can add privileges."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def forbid_tracing() -> None:
    """Nobody of the same uid may attach a debugger or read this process's memory."""
    _prctl(_PR_SET_DUMPABLE, 0)


def set_name(name: str) -> None:
    """Set what ps shows as the command (15 characters)."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def adopt_orphans() -> None:
    """Become the parent of whatever loses its own below this process, in place of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int) -> None:
    """Be sent a signal when the thread that forked this process ends; it holds across execve(2), save of a setuid program."""
    _prctl(_PR_SET_PDEATHSIG, number)
