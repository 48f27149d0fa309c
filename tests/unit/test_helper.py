"""Work in a child: its result comes back, it keeps nothing of ours, and it never outlives its use."""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from reaperd.linux import helper
from reaperd.linux.procfs import ProcFS

NOBODY = 65534
SOON_S = 10.0  # a deadline, not a wait


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fail a test that leaves a descriptor or a child behind."""
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def wait_for(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(SOON_S * 1000)


def result_of(work: Any) -> Any:
    running = helper.start_helper(work)
    wait_for(running.pidfd)
    return helper.finish_helper(running)


def fail() -> None:
    os.close(2)  # its traceback is nobody's business
    raise RuntimeError


def block() -> None:
    signal.pause()


# -- results ----------------------------------------------------------------------------------------


def test_the_result_of_the_work_comes_back() -> None:
    for value in (None, 0, 7, "ü☃", [1, [2]], {"a": None}, "x" * 50_000):
        assert result_of(lambda value=value: value) == value


def test_a_helper_that_fails_has_no_result() -> None:
    assert result_of(fail) is None
    assert result_of(object) is None
    assert result_of(lambda: os._exit(0)) is None
    assert result_of(lambda: os.kill(os.getpid(), signal.SIGKILL)) is None


def test_a_helper_that_is_not_done_is_ended_and_has_no_result() -> None:
    assert helper.finish_helper(helper.start_helper(block)) is None


def test_half_a_result_is_none() -> None:
    def say_half() -> None:
        os.write(3, b"123")
        signal.pause()

    running = helper.start_helper(say_half)
    wait_for(running.reader)
    assert helper.finish_helper(running) is None


def test_what_is_no_json_is_no_result() -> None:
    def say(data: bytes) -> None:
        os.write(3, data)
        os._exit(0)

    for data in (b"{", b"\xff\xfe", b"1 2"):
        assert result_of(lambda data=data: say(data)) is None


def test_a_result_without_end_is_not_read_for_ever() -> None:
    def babble() -> None:
        while True:
            os.write(3, b"x" * 65536)

    running = helper.start_helper(babble)
    os.set_blocking(running.reader, True)
    assert helper.finish_helper(running) is None


def test_the_reader_becomes_readable_when_the_helper_is_done_or_dead() -> None:
    for work in (lambda: 7, fail):
        running = helper.start_helper(work)
        wait_for(running.reader)
        wait_for(running.pidfd)
        helper.finish_helper(running)


# -- what it keeps ----------------------------------------------------------------------------------


def test_a_helper_keeps_no_descriptor_of_ours_but_the_standard_ones_and_its_own() -> None:
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
    kept = result_of(lambda: sorted(int(name) for name in os.listdir("/proc/self/fd")))
    for descriptor in held:
        os.close(descriptor)
    assert set(kept) <= {0, 1, 2, 3, 4}  # 4 lists them
    assert 3 in kept


def test_a_helper_dies_of_the_signals_that_the_daemon_catches() -> None:
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: caught.append(number))
        for number in before:
            assert result_of(lambda number=number: (os.kill(os.getpid(), number), 7)) is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert caught == []


def test_a_signal_to_a_helper_does_not_wake_the_daemon() -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    before = signal.set_wakeup_fd(writer)
    try:
        result_of(lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


# -- bounded ----------------------------------------------------------------------------------------


def test_bounded_work_returns_its_result_within_its_time() -> None:
    assert helper.BoundedReader(SOON_S).run(lambda: [os.getppid()]) == [os.getpid()]
    assert helper.BoundedReader(SOON_S).run(fail) is None


def test_bounded_work_with_a_result_longer_than_a_pipe_returns_it_too() -> None:
    assert helper.BoundedReader(0.1).run(lambda: "x" * 70_000) is not None


@pytest.mark.parametrize("work", ["babbles", "dribbles"])
def test_bounded_work_that_never_stops_talking_has_no_result_and_takes_no_longer(work: str) -> None:
    def babble() -> None:
        while True:
            os.write(3, b"x" * 65536)

    def dribble() -> None:
        for _ in range(200):
            os.write(3, b"x")
            select.select([], [], [], 0.005)

    begin_s = time.monotonic()
    bound_s = 1.0 if work == "babbles" else 0.05
    assert helper.BoundedReader(bound_s).run(babble if work == "babbles" else dribble) is None
    assert time.monotonic() - begin_s < 0.8


def test_bounded_work_that_takes_too_long_is_ended() -> None:
    begin_s, reader = time.monotonic(), helper.BoundedReader(0.01)
    assert reader.run(block) is None
    assert time.monotonic() - begin_s < SOON_S
    assert ProcFS().children(os.getpid()) == [], "it was ended and waited for"


@pytest.mark.needs_root
def test_where_no_process_can_be_made_there_is_no_helper_and_nothing_stays_open() -> None:
    def try_in_vain() -> list[Any]:
        helper.become(NOBODY, NOBODY)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        before, refused = len(os.listdir("/proc/self/fd")), False
        try:
            helper.start_helper(block)
        except BlockingIOError:  # EAGAIN, fork(2)
            refused = True
        bounded = helper.BoundedReader(SOON_S).run(block)
        return [refused, bounded, len(os.listdir("/proc/self/fd")) - before]

    assert result_of(try_in_vain) == [True, None, 0]


# -- another user -----------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_who_becomes_a_user_is_that_user_alone_and_for_good() -> None:
    def try_to_come_back() -> list[Any]:
        helper.become(NOBODY, NOBODY - 1)
        back = []
        for attempt in (os.setuid, os.seteuid, os.setgid):
            try:
                attempt(0)
                back.append(attempt.__name__)
            except PermissionError:
                pass
        return [os.getresuid(), os.getresgid(), os.getgroups(), back]

    assert result_of(try_to_come_back) == [[NOBODY] * 3, [NOBODY - 1] * 3, [NOBODY - 1], []]


def test_who_is_that_user_already_stays_as_it_is() -> None:
    def stay() -> list[Any]:
        before = (os.getresuid(), os.getresgid(), os.getgroups())
        helper.become(os.getuid(), os.getgid())
        return [before == (os.getresuid(), os.getresgid(), os.getgroups())]

    assert result_of(stay) == [True]


@pytest.mark.needs_root
def test_who_is_not_root_becomes_nobody_else() -> None:
    def try_another() -> list[int]:
        helper.become(NOBODY, NOBODY)
        helper.become(1, 1)
        return list(os.getresuid())

    assert result_of(try_another) == [NOBODY] * 3
