"""A pidfd stands for one process for ever: opened for exactly that one, or not at all."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
from collections.abc import Callable, Iterator

import pytest

from reaperd.linux import pidfd
from reaperd.linux.procfs import ProcessGone, ProcFS, parse_gid, parse_uid
from reaperd.model import ProcessId
from reaperd.reaper import Outcome, Reaper

NOBODY = 65534
PROC = ProcFS()


@contextlib.contextmanager
def child(work: Callable[[], object] = signal.pause) -> Iterator[int]:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


@contextlib.contextmanager
def closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def pid_behind(descriptor: int) -> int:
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pid:"))


def end(pid: int, number: int = signal.SIGKILL) -> None:
    """End a child and leave it a zombie."""
    os.kill(pid, number)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def id_of(pid: int) -> ProcessId:
    return PROC.stat(pid).id


# -- opening ----------------------------------------------------------------------------------------


def test_a_pidfd_is_opened_for_exactly_the_process_that_is_meant() -> None:
    with child() as pid, closing(pidfd.open_pidfd(id_of(pid), PROC)) as descriptor:
        assert pid_behind(descriptor) == pid


def test_no_pidfd_is_opened_for_another_process_with_the_same_pid() -> None:
    with child() as pid:
        before, now = count_descriptors(), id_of(pid)
        for ticks in (now.start_ticks - 1, now.start_ticks + 1, 0):
            with pytest.raises(ProcessGone):
                pidfd.open_pidfd(ProcessId(pid, ticks), PROC)
        assert count_descriptors() == before


def test_a_pid_that_is_given_away_between_opening_and_reading_is_noticed() -> None:
    class Reused(ProcFS):
        """A /proc in which the pid belongs to somebody else by the time it is read."""

        def stat(self, pid: int):  # type: ignore[no-untyped-def]
            found = super().stat(pid)
            return found._replace(id=ProcessId(pid, found.id.start_ticks + 1))

    with child() as pid:
        before = count_descriptors()
        with pytest.raises(ProcessGone):
            pidfd.open_pidfd(id_of(pid), Reused())
        assert count_descriptors() == before


def test_a_process_that_was_waited_for_is_gone() -> None:
    with child() as pid:
        target = id_of(pid)
        end(pid)
        os.waitpid(pid, 0)
        before = count_descriptors()
        with pytest.raises(ProcessGone):
            pidfd.open_pidfd(target, PROC)
        with pytest.raises(ProcessGone):
            pidfd.open_pid(pid)
        assert count_descriptors() == before


def test_a_process_that_vanishes_between_opening_and_reading_is_gone_and_nothing_stays_open() -> None:
    with child() as pid:
        before = count_descriptors()
        with pytest.raises(ProcessGone):
            pidfd.open_pidfd(id_of(pid), ProcFS("/nonexistent"))
        assert count_descriptors() == before


def test_what_is_no_pid_of_a_process_is_gone() -> None:
    for pid in (0, -1, -(2**31), 2**22 + 1):
        with pytest.raises(ProcessGone):
            pidfd.open_pid(pid)


def test_a_lack_of_descriptors_is_no_sign_that_a_process_is_gone() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with child() as pid:
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        held = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            with pytest.raises(OSError, match="Too many open files"):
                pidfd.open_pid(pid)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in held:
                os.close(descriptor)


# -- the peer of a connection -----------------------------------------------------------------------


def test_the_peer_of_a_connection_is_known_by_a_pidfd_where_the_kernel_has_one() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        descriptor = pidfd.peer_pidfd(ours)
        if descriptor is None:
            pytest.skip("this kernel has no SO_PEERPIDFD")
        with closing(descriptor):
            assert pid_behind(descriptor) == os.getpid()


def test_a_connection_that_has_no_peer_process_has_no_pidfd() -> None:
    with socket.socket(socket.AF_INET) as one:
        assert pidfd.peer_pidfd(one) is None


# -- the end of a process ---------------------------------------------------------------------------


def test_a_living_and_a_stopped_process_have_not_exited_and_a_zombie_has() -> None:
    with child() as pid, closing(pidfd.open_pid(pid)) as descriptor:
        assert not pidfd.has_exited(descriptor)
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        assert not pidfd.has_exited(descriptor)
        end(pid)
        assert pidfd.has_exited(descriptor)
        os.waitpid(pid, 0)
        assert pidfd.has_exited(descriptor)


@pytest.mark.parametrize(("work", "status"), [(signal.pause, signal.SIGKILL), (lambda: os._exit(3), 3 << 8)])
def test_how_a_process_ended_is_told_once_its_parent_has_waited_for_it(
    work: Callable[[], object], status: int
) -> None:
    with child(work) as pid, closing(pidfd.open_pid(pid)) as descriptor:
        if status == signal.SIGKILL:
            assert pidfd.exit_status(descriptor) is None
            end(pid)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        os.waitpid(pid, 0)
        told = pidfd.exit_status(descriptor)
        if told is None:
            pytest.skip("this kernel has no PIDFD_INFO_EXIT")
        assert told == status


def test_what_is_no_pidfd_has_no_exit_status() -> None:
    with closing(os.open("/dev/null", os.O_RDONLY)) as descriptor:
        assert pidfd.exit_status(descriptor) is None


# -- who a process is -------------------------------------------------------------------------------


def info_of(descriptor: int) -> pidfd.Info:
    told = pidfd.info(descriptor)
    if told is None:
        pytest.skip("this kernel has no PIDFD_GET_INFO")
    return told


def as_status_says(pid: int) -> pidfd.Info:
    status = PROC.status(pid)
    gid = parse_gid(status)
    assert gid is not None
    return pidfd.Info(PROC.stat(pid).ppid, parse_uid(status), gid)


def test_a_pidfd_tells_what_the_status_tells() -> None:
    me = os.getpid()
    with closing(pidfd.open_pid(me)) as descriptor:
        assert info_of(descriptor) == as_status_says(me) == (os.getppid(), os.getuid(), os.getgid())
    with closing(pidfd.open_pid(1)) as descriptor:
        assert info_of(descriptor) == as_status_says(1)


@pytest.mark.needs_root
def test_a_pidfd_tells_a_uid_only_where_all_three_that_matter_are_one() -> None:
    for ids in (
        *((NOBODY, 0, 0), (0, NOBODY, 0), (0, 0, NOBODY), (NOBODY, NOBODY, 0)),
        *((NOBODY, NOBODY, NOBODY), (2**32 - 2, 2**32 - 2, 2**32 - 2)),
    ):
        reader, writer = os.pipe()

        def become(ids: tuple[int, int, int] = ids, writer: int = writer) -> None:
            os.setresgid(7, 8, 9)
            os.setresuid(*ids)
            os.write(writer, b"x")
            signal.pause()

        with child(become) as pid, closing(reader), closing(pidfd.open_pid(pid)) as descriptor:
            os.close(writer)
            assert os.read(reader, 1) == b"x"
            told = info_of(descriptor)
            assert told == as_status_says(pid) == (os.getpid(), ids[0] if len(set(ids)) == 1 else None, 7)


def test_a_pidfd_tells_who_adopted_a_process() -> None:
    reader, writer = os.pipe()

    def have_a_child() -> None:
        if pid := os.fork():
            os.write(writer, b"%d\n" % pid)
        signal.pause()

    with child(have_a_child) as pid, open(reader, "rb") as file:
        os.close(writer)
        grandchild = int(file.readline())
        with closing(pidfd.open_pid(grandchild)) as descriptor:
            try:
                assert info_of(descriptor).ppid == pid
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                assert info_of(descriptor).ppid == PROC.stat(grandchild).ppid != pid
            finally:
                os.kill(grandchild, signal.SIGKILL)


def test_a_process_that_was_waited_for_has_nothing_to_tell() -> None:
    with child() as pid, closing(pidfd.open_pid(pid)) as descriptor:
        info_of(descriptor)
        end(pid)
        os.waitpid(pid, 0)
        with pytest.raises(ProcessGone):
            pidfd.info(descriptor)


def test_a_zombie_tells_what_its_status_tells_or_is_gone() -> None:
    with child() as pid, closing(pidfd.open_pid(pid)) as descriptor:
        info_of(descriptor)
        end(pid)
        with contextlib.suppress(ProcessGone):
            assert pidfd.info(descriptor) == as_status_says(pid)


def test_what_is_no_pidfd_tells_nothing() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, closing(os.open("/dev/null", os.O_RDONLY)) as null:
        for descriptor in (null, ours.fileno()):
            assert pidfd.info(descriptor) is None
    assert pidfd.info(null) is None, "not even a descriptor"


# -- signals ----------------------------------------------------------------------------------------


def test_a_signal_reaches_the_process_behind_the_pidfd() -> None:
    with child() as pid, closing(pidfd.open_pid(pid)) as descriptor:
        pidfd.send_signal(descriptor, signal.SIGKILL)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(5000)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_a_signal_to_a_process_that_was_waited_for_says_that_it_is_gone() -> None:
    with child() as pid, closing(pidfd.open_pid(pid)) as descriptor:
        end(pid)
        pidfd.send_signal(descriptor, signal.SIGTERM)  # a zombie takes it, and nothing happens
        os.waitpid(pid, 0)
        with pytest.raises(ProcessGone):
            pidfd.send_signal(descriptor, signal.SIGTERM)


# -- the one who signals ----------------------------------------------------------------------------


@contextlib.contextmanager
def reaper(*untouchable: ProcessId) -> Iterator[Reaper]:
    one = Reaper(PROC, frozenset(untouchable))
    before = count_descriptors()
    yield one
    assert count_descriptors() == before


def test_a_reaper_signals_whom_it_holds_and_tells_when_that_one_is_gone() -> None:
    with child() as pid, reaper() as one:
        target = id_of(pid)
        handle = one.take(target, None)
        assert one.holds(target)
        assert one.handle(target) == handle
        assert one.send(target, signal.SIGKILL) is Outcome.SENT
        os.waitpid(pid, 0)
        assert one.send(target, signal.SIGKILL) is Outcome.GONE
        one.drop(target)
        assert not one.holds(target)


def test_a_reaper_signals_nobody_whom_it_does_not_hold() -> None:
    with child() as pid, reaper() as one:
        assert one.send(id_of(pid), signal.SIGKILL) is Outcome.GONE
        assert not PROC.stat(pid).dead
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)


def test_a_reaper_takes_nobody_who_is_gone_or_another_by_now() -> None:
    with child() as pid, reaper() as one:
        other = ProcessId(pid, id_of(pid).start_ticks + 1)
        assert one.take(other, None) is None
        assert not one.holds(other)


def test_a_reaper_holds_one_pidfd_for_a_process_however_often_it_takes_it() -> None:
    with child() as pid, reaper() as one:
        target = id_of(pid)
        given = os.pidfd_open(pid)
        assert one.take(target, given) == given
        assert one.take(target, os.pidfd_open(pid)) == given
        assert one.take(target, None) == given
        one.drop(target)


def test_a_reaper_refuses_to_signal_the_untouchable_whatever_was_decided() -> None:
    with child() as pid, reaper(id_of(pid)) as one:
        target = id_of(pid)
        one.take(target, None)
        assert one.send(target, signal.SIGKILL) is Outcome.DENIED
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        one.drop(target)


def test_a_process_with_the_pid_of_one_that_was_untouchable_is_none() -> None:
    with child() as pid, reaper(ProcessId(pid, id_of(pid).start_ticks - 1)) as one:
        target = id_of(pid)
        one.take(target, None)
        assert one.send(target, signal.SIGKILL) is Outcome.SENT
        one.drop(target)


def test_a_reaper_refuses_init_and_whole_process_groups_even_where_nobody_named_them() -> None:
    with child() as pid, reaper() as one:
        for number in (1, 0, -1, -pid):
            target = ProcessId(number, 0)
            one.take(target, os.pidfd_open(pid))
            assert one.send(target, signal.SIGKILL) is Outcome.DENIED
            one.drop(target)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)


@pytest.mark.needs_root
def test_a_reaper_without_the_right_to_signal_says_so() -> None:
    def signal_the_parent() -> None:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        one, target = Reaper(PROC, frozenset()), id_of(os.getppid())
        one.take(target, None)
        os._exit(7 if one.send(target, 0) is Outcome.DENIED else 8)

    with child(signal_the_parent) as pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_pidfd_tells_the_pids_of_its_process_until_that_was_waited_for() -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    handle = os.pidfd_open(pid)
    try:
        assert pidfd.pids_of(handle, ProcFS()) == (pid,)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert pidfd.pids_of(handle, ProcFS()) == (-1,)
    finally:
        os.close(handle)
