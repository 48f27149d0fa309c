"""The alarm rings while a process is dead of whose end nobody has taken note, and asking it never waits."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator

import pytest
from specimens import SOON_S, child, count_descriptors, die, end

from reaperd.linux.alarm import Alarm


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    before = count_descriptors()
    one = Alarm()
    yield one
    one._epoll.close()
    assert count_descriptors() == before


def is_readable(alarm: Alarm, within_s: float = 0.0) -> bool:
    poller = select.poll()
    poller.register(alarm.fileno(), select.POLLIN)
    return bool(poller.poll(within_s * 1000))


def test_it_rings_from_a_death_on_until_that_is_silenced(alarm: Alarm) -> None:
    assert not alarm.rings()
    with child() as pid:
        pidfd = os.pidfd_open(pid)
        alarm.watch(pidfd)
        os.kill(pid, signal.SIGSTOP)
        assert not alarm.rings()
        assert not is_readable(alarm)
        die(pid)
        assert [alarm.rings(), alarm.rings()] == [True, True]
        assert is_readable(alarm)
        end(pid)
        assert alarm.rings(), "waited for or not"
        alarm.silence(pidfd)
        assert not alarm.rings()
        assert not is_readable(alarm)
        os.close(pidfd)


def test_it_rings_as_long_as_one_of_many_is_not_silenced(alarm: Alarm) -> None:
    with child() as one, child() as two, child():
        pidfds = [os.pidfd_open(pid) for pid in (one, two)]
        for pidfd in pidfds:
            alarm.watch(pidfd)
        end(two)
        end(one)
        assert alarm.rings()
        alarm.silence(pidfds[0])
        assert alarm.rings()
        alarm.silence(pidfds[1])
        assert not alarm.rings()
        for pidfd in pidfds:
            os.close(pidfd)


def test_whoever_waits_for_something_else_can_wait_for_it_too(alarm: Alarm) -> None:
    with child() as pid:
        pidfd = os.pidfd_open(pid)
        alarm.watch(pidfd)
        os.kill(pid, signal.SIGKILL)
        assert is_readable(alarm, within_s=SOON_S)
        alarm.silence(pidfd)
        os.close(pidfd)


def test_to_be_told_twice_of_one_changes_nothing() -> None:
    """Whoever mends what an error has left half done does not know how far that came."""
    alarm = Alarm()
    reader, writer = os.pipe()
    alarm.watch(reader)
    alarm.watch(reader)
    os.write(writer, b"x")
    assert alarm.rings()
    alarm.silence(reader)
    alarm.silence(reader)
    assert not alarm.rings()
    os.close(reader)
    os.close(writer)
