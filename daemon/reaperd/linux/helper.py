"""A forked helper process for work that may block or that must be done as another user; its result comes through a pipe.

The core has one thread, so fork(2) without exec is safe, and the child starts within a millisecond. Beside other threads, ``work``
must need no lock that one of them may hold, or somebody must end a helper that does not answer.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

from reaperd.linux import pidfd
from reaperd.linux.alarm import Alarm

_END_S = 0.1
_CHUNK_BYTES = 65536
_WRITER, _QUESTIONS, _DONE = 3, 4, 5  # descriptors in a helper
FIRST_KEPT = _WRITER + 1
_PIPE_BYTES = 1024 * 1024  # for answers; with less, a helper waits until we read
_OUR_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MAX_RESULT_BYTES = 1024 * 1024


class Helper(NamedTuple):
    """A running helper; ``reader`` becomes readable when its result is there or it has died."""

    pid: int
    pidfd: int
    reader: int


def start_helper(work: Callable[[], Any], *, keep: tuple[int, ...] = ()) -> Helper:
    """Run ``work`` in a child that keeps none of our descriptors but ``keep``; its result must be fit for JSON.

    They are ``FIRST_KEPT`` and what follows there. OSError where processes or descriptors have run out.
    """
    return _start(lambda writer: _write(writer, json.dumps(work()).encode()), keep=keep)


def _start(work: Callable[[int], None], *, keep: tuple[int, ...] = ()) -> Helper:
    _wait_for_left_behind()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    # Until the child has signal handlers of its own, a signal to it would be noted as one to us.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OUR_SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            _run(work, writer, keep)
    except OSError:
        os.close(reader)
        os.close(writer)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(writer)
    os.set_blocking(reader, False)
    try:
        return Helper(pid, os.pidfd_open(pid), reader)
    except OSError:  # descriptors have run out; it ends by itself once it finds that nobody reads
        os.close(reader)
        _left_behind.append(pid)
        raise


def _run(work: Callable[[int], None], writer: int, keep: tuple[int, ...]) -> None:
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in _OUR_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OUR_SIGNALS)
        # Out of the way first: each may be another's number.
        high = [fcntl.fcntl(one, fcntl.F_DUPFD, 16) for one in (writer, *keep)]
        for place, one in enumerate(high, _WRITER):
            os.dup2(one, place)
        os.closerange(_WRITER + len(high), os.sysconf("SC_OPEN_MAX"))
        work(_WRITER)
        status = 0
    finally:
        os._exit(status)


def _write(writer: int, data: bytes) -> None:
    while data:
        data = data[os.write(writer, data) :]


def finish_helper(helper: Helper) -> Any:
    """Return the result of a helper that is done, None for one that failed or is not; it is ended and waited for."""
    data = b""
    try:
        while len(data) < _MAX_RESULT_BYTES and (chunk := os.read(helper.reader, _CHUNK_BYTES)):
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


class Answerer:
    """A helper that answers one question after another, for work that may block; kept as long as it is used.

    What ``answer`` takes and returns must be fit for JSON.
    """

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self._answer = answer
        self._running: Helper | None = None
        self._questions = -1  # the pipe that they go into
        self._done = -1  # an eventfd(2): it has answered all that it was asked
        self._used_at_s = 0.0

    def ask(
        self, items: Sequence[Any], *, stall_s: float, most_s: float, alarm: Alarm | None = None
    ) -> list[Any] | None:
        """Return the answers to ``items``, in order, up to the first at which it waits for longer than ``stall_s``.

        After ``most_s``, or where ``alarm`` rings, it is enough, too. None where processes or descriptors have run out.
        """
        # Somebody may have ended it meanwhile.
        if self._running is not None and pidfd.has_exited(self._running.pidfd):
            self.close()
        if self._running is None and not self._start():
            return None
        lines: list[bytes] = []
        try:
            lines = self._exchange(items, stall_s, time.monotonic() + most_s, alarm)
            self._used_at_s = time.monotonic()
            return [json.loads(line) for line in lines]
        finally:
            # Also where memory or descriptors have run out: an answer that comes late must never be taken for one to what is
            # asked next, which is about another process.
            if len(lines) < len(items):
                self.close()

    def _start(self) -> bool:
        with contextlib.ExitStack() as ours:
            try:
                questions, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                ours.callback(os.close, writer)
                try:
                    os.set_blocking(questions, True)
                    done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                    ours.callback(os.close, done)
                    self._running = _start(
                        lambda answers: _answer_all(_QUESTIONS, answers, _DONE, self._answer),
                        keep=(questions, done),
                    )
                finally:
                    os.close(questions)
            except OSError:
                return False
            with contextlib.suppress(OSError):  # a user may have only so much of all pipes
                fcntl.fcntl(self._running.reader, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            ours.pop_all()
            self._questions, self._done = writer, done
        return True

    def _exchange(
        self, items: Sequence[Any], stall_s: float, until_s: float, alarm: Alarm | None
    ) -> list[bytes]:
        assert self._running is not None, "it was started"
        unsent = b"".join(json.dumps(item).encode() + b"\n" for item in items)
        # Not the answers: to be woken for each of them would cost more than it takes to read what they tell.
        poller = select.poll()
        poller.register(self._running.pidfd, select.POLLIN)
        poller.register(self._done, select.POLLIN)
        poller.register(self._questions, select.POLLOUT)
        if alarm is not None:
            poller.register(alarm.fileno(), select.POLLIN)
        lines: list[bytes] = []
        data = rest = b""
        while len(lines) < len(items) and (left_s := until_s - time.monotonic()) > 0:
            # Of very much, only a part was taken in.
            more_is_there = len(data) >= _PIPE_BYTES
            ready = dict(poller.poll(0 if more_is_there else min(stall_s, left_s) * 1000))
            if self._questions in ready:
                try:
                    unsent = unsent[os.write(self._questions, unsent) :]
                except OSError:  # it is dead
                    break
                if not unsent:
                    poller.unregister(self._questions)
            if self._done in ready:
                os.eventfd_read(self._done)
            data = _drain(self._running.reader)
            *more, rest = (rest + data).split(b"\n")
            lines += more
            if alarm is not None and alarm.fileno() in ready:
                break
            # On a crowded machine it may only not have had its turn.
            stalls = not ready and not data and not more_is_there and _waits(self._running.pid)
            if self._running.pidfd in ready or stalls:
                break
        return lines

    @property
    def idle_since_s(self) -> float | None:
        """Since when, in monotonic seconds, it has had nothing to do; None where it does not run."""
        return self._used_at_s if self._running is not None else None

    def close(self) -> None:
        """End it; the next question starts another."""
        running, self._running = self._running, None
        if running is not None:
            os.close(self._questions)
            os.close(self._done)
            _let_go(running)


def _answer_all(questions: int, writer: int, done: int, answer: Callable[[Any], Any]) -> None:
    rest = b""
    while chunk := os.read(questions, _CHUNK_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            _write(writer, json.dumps(answer(json.loads(line))).encode() + b"\n")
        os.eventfd_write(done, 1)


def _drain(reader: int) -> bytes:
    """Return what can be read at once; little more than the pipe holds, for a helper may go on writing meanwhile."""
    chunks: list[bytes] = []
    size = 0
    with contextlib.suppress(BlockingIOError):
        while size < _PIPE_BYTES and (chunk := os.read(reader, _CHUNK_BYTES)):
            chunks.append(chunk)
            size += len(chunk)
    return b"".join(chunks)


def _waits(pid: int) -> bool:
    """Say whether it runs no more; where that cannot be read, for want of a descriptor, it may."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] != b"R"
    except OSError:
        return False


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


def end_children(keep: Container[int] = (), *, within_s: float = 1.0) -> None:
    """SIGKILL this process's children but ``keep``, with those that it adopts as their parents end, and wait for them.

    For a process of one thread. What forks faster than that, or is in state D, is left after ``within_s``.
    """
    end_s = time.monotonic() + within_s
    while (pids := [pid for pid in _children() if pid not in keep]) and time.monotonic() < end_s:
        for pid in pids:
            descriptor = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                poller = select.poll()
                poller.register(descriptor, select.POLLIN)
                if poller.poll(_END_S * 1000):
                    os.waitpid(pid, 0)
                    if pid in _left_behind:
                        _left_behind.remove(pid)
            finally:
                os.close(descriptor)


def _children() -> list[int]:
    try:
        with open("/proc/thread-self/children", "rb") as file:
            return list(map(int, file.read().split()))
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return []


def run_as(uid: int, gid: int, work: Callable[[], Any], *, longest_s: int, groups: Sequence[int] = ()) -> Any:
    """Return the result of ``work``, done in a child that is the user, for a user's rights can't be given back.

    None where it has failed, or took longer: should it wait for a dead file system, nobody may be left to end it.
    """

    def as_user() -> Any:
        become(uid, gid, groups)
        signal.alarm(longest_s)
        return work()

    child = start_helper(as_user)
    os.set_blocking(child.reader, True)
    return finish_helper(child)


def become(uid: int, gid: int, groups: Sequence[int] = ()) -> None:
    """Act as ``uid``, ``gid`` and the supplementary ``groups`` alone from here on, for good; nothing to do where we are that user already."""
    if os.geteuid() != 0 or uid == 0:
        return
    os.setgroups([gid, *groups])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
