"""prctl(2): what only a C library call can set on this process."""

from __future__ import annotations

import ctypes
import os

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_PDEATHSIG, _PR_SET_NAME = 4, 38, 1, 15


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


def die_with_parent(signal_number: int) -> None:
    """Have ``signal_number`` sent when the thread that forked this process ends; see prctl(2) on exec and setuid."""
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def set_name(name: str) -> None:
    """Set what ps shows as the command (15 characters)."""
    _prctl(_PR_SET_NAME, name.encode()[:15])
