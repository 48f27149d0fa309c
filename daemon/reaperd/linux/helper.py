"""A forked helper process for work that may block or that must be done as another user; its result comes through a pipe.

The core has one thread, so fork(2) without exec is safe, and the child starts within a millisecond.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_END_S = 0.1
_MAX_RESULT_BYTES = 1024 * 1024


class Helper(NamedTuple):
    """A running helper; ``reader`` becomes readable when its result is there or it has died."""

    pid: int
    pidfd: int
    reader: int


def start_helper(work: Callable[[], Any]) -> Helper:
    """Run ``work`` in a child that keeps none of our descriptors; its result must be fit for JSON.

    OSError where processes or descriptors have run out.
    """
    _wait_for_left_behind()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except OSError:
        os.close(reader)
        os.close(writer)
        raise
    if pid == 0:
        _run(work, writer)
    os.close(writer)
    os.set_blocking(reader, False)
    return Helper(pid, os.pidfd_open(pid), reader)


def _run(work: Callable[[], Any], writer: int) -> None:
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(writer, 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        data = json.dumps(work()).encode()
        while data:
            data = data[os.write(3, data) :]
        status = 0
    finally:
        os._exit(status)


def finish_helper(helper: Helper) -> Any:
    """Return the result of a helper that is done, None for one that failed or is not; it is ended and waited for."""
    data = b""
    try:
        while len(data) < _MAX_RESULT_BYTES and (chunk := os.read(helper.reader, 65536)):
            data += chunk
    except BlockingIOError:
        data = b""
    return _end(helper, data)


def _end(helper: Helper, data: bytes) -> Any:
    _let_go(helper)
    try:
        return json.loads(data)
    except ValueError:
        return None


class BoundedReader:
    """Runs work that may block in helpers, and leaves behind those that do not come back in time."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def run(self, work: Callable[[], Any]) -> Any:
        """Return what ``work`` returns, None when that takes too long."""
        try:
            running = start_helper(work)
        except OSError:
            return None
        # Read while it writes: a pipe holds 64 KiB.
        data, end_s = b"", time.monotonic() + self._timeout_s
        poller = select.poll()
        poller.register(running.reader, select.POLLIN)
        while len(data) < _MAX_RESULT_BYTES and poller.poll(max(0.0, end_s - time.monotonic()) * 1000):
            chunk = os.read(running.reader, 65536)
            if not chunk:
                return _end(running, data)
            data += chunk
        _let_go(running)
        return None


# Ended helpers that nobody could wait for yet: they may be as stuck as what they read.
_left_behind: list[int] = []


def _let_go(helper: Helper) -> None:
    """End a helper and wait for it, but not for long: in state D it does not end."""
    signal.pidfd_send_signal(helper.pidfd, signal.SIGKILL)
    poller = select.poll()
    poller.register(helper.pidfd, select.POLLIN)
    if poller.poll(_END_S * 1000):
        os.waitpid(helper.pid, 0)
    else:
        _left_behind.append(helper.pid)
    os.close(helper.pidfd)
    os.close(helper.reader)


def _wait_for_left_behind() -> None:
    for pid in tuple(_left_behind):
        if os.waitpid(pid, os.WNOHANG)[0]:
            _left_behind.remove(pid)


def become(uid: int, gid: int) -> None:
    """Act as ``uid`` and ``gid`` alone from here on, for good; nothing to do where we are that user already."""
    if os.geteuid() != 0 or uid == 0:
        return
    os.setgroups([gid])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
