"""pidfd_open(2) and what a pidfd can do: wait, signal, tell how a process ended.

A pidfd stands for one process for ever; a pid does not. Nothing in Reaper signals a pid.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import socket
import struct
from typing import NamedTuple

from reaperd.linux.procfs import ProcessGone, ProcessHidden, ProcFS, parse_pids, parse_uid
from reaperd.model import ProcessId

_SO_PEERPIDFD = 77  # asm-generic/socket.h, Linux 6.5
# _IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info), linux/pidfd.h.
_PIDFD_GET_INFO = 3 << 30 | 64 << 16 | 0xFF << 8 | 11
_PIDFD_INFO_CREDS = 1 << 1  # Linux 6.13
_PIDFD_INFO_EXIT = 1 << 3  # Linux 6.15
_INFO = struct.Struct("=QQ11Ii")


def open_pid(pid: int) -> int:
    """Return a pidfd for whoever has ``pid`` now; ProcessGone when nobody has."""
    try:
        return os.pidfd_open(pid)
    except (ProcessLookupError, ValueError):
        raise ProcessGone(str(pid)) from None
    except OSError as error:
        # EINVAL, since Linux 6.16 ENOENT: the pid is a thread's; ENODATA: it is being reaped. No process to hold.
        if error.errno in (errno.EINVAL, errno.ENOENT, errno.ENODATA):
            raise ProcessGone(str(pid)) from None
        raise


def open_pidfd(target: ProcessId, proc: ProcFS) -> int:
    """Return a pidfd for exactly ``target``; ProcessGone if it has exited, ProcessHidden where that cannot be told.

    Open first, then compare: a start time read after pidfd_open(2) that still matches means that ``target`` held the
    pid all along, so the descriptor is its.
    """
    pidfd = open_pid(target.pid)
    try:
        try:
            found = proc.stat(target.pid).id
        except ProcessGone:
            if has_exited(pidfd):
                raise ProcessGone(str(target.pid)) from None
            raise ProcessHidden(str(target.pid)) from None
        if found != target:
            raise ProcessGone(str(target.pid))
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd


def is_hidden(pid: int, proc: ProcFS) -> bool:
    """Say whether there is a process ``pid`` that /proc does not show: one of hidepid's (proc(5)), which is not gone."""
    try:
        pidfd = open_pid(pid)
    except ProcessGone:
        return False
    try:
        proc.stat(pid)
    except ProcessGone:
        return not has_exited(pidfd)
    finally:
        os.close(pidfd)
    return False


def peer_pidfd(connection: socket.socket) -> int | None:
    """Return a pidfd for the process that connected, None where the kernel has no SO_PEERPIDFD."""
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except ProcessLookupError:
        raise ProcessGone("the peer") from None
    except OSError:
        return None


def has_exited(pidfd: int) -> bool:
    """Say whether the process is dead, waited for or not."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def send_signal(pidfd: int, number: int) -> None:
    """Send a signal; ProcessGone when the process was waited for already, PermissionError as kill(2)."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        raise ProcessGone("pidfd") from None


def pids_of(pidfd: int, proc: ProcFS) -> tuple[int, ...]:
    """Return the pid of the process in the namespace of ``proc`` and in each below it; (-1,) when it was waited for."""
    return parse_pids(proc.fdinfo(pidfd))


def try_on_ourselves() -> None:
    """Open a pidfd of this process and send it signal 0; OSError where the kernel or a seccomp filter refuses either."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        send_signal(pidfd, 0)
    finally:
        os.close(pidfd)


class Info(NamedTuple):
    """What a pidfd tells of a living process, at a tenth of what /proc/PID/status costs."""

    ppid: int
    uid: int | None  # None where real, effective and saved uid differ
    gid: int  # the real one


def info(pidfd: int) -> Info | None:
    """Return what the kernel tells, None on Linux < 6.13; ProcessGone."""
    buffer = bytearray(_INFO.size)
    struct.pack_into("=Q", buffer, 0, _PIDFD_INFO_CREDS)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, buffer)
    except ProcessLookupError:
        raise ProcessGone("pidfd") from None
    except OSError:
        return None
    mask, _, _, _, ppid, ruid, rgid, euid, _, suid, *_ = _INFO.unpack(buffer)
    if not mask & _PIDFD_INFO_CREDS:
        return None
    return Info(ppid, ruid if ruid == euid == suid else None, rgid)


def info_of(pid: int) -> Info | None:
    """Return what the kernel tells of ``pid``, as ``info()``; ProcessGone."""
    handle = open_pid(pid)
    try:
        return info(handle)
    finally:
        os.close(handle)


def uid_of(pid: int, proc: ProcFS) -> int | None:
    """Return the uid of ``pid``, by the quicker way where the kernel has it; None where its ids differ; ProcessGone."""
    told = info_of(pid)
    return parse_uid(proc.status(pid)) if told is None else told.uid


def exit_status(pidfd: int) -> int | None:
    """Return the wait status of a process that its parent has waited for, None before that or on Linux < 6.15."""
    buffer = bytearray(_INFO.size)
    struct.pack_into("=Q", buffer, 0, _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, buffer)
    except OSError:
        return None
    mask, *_, status = _INFO.unpack(buffer)
    return int(status) if mask & _PIDFD_INFO_EXIT else None
