"""Work in a child: its result comes back, it keeps nothing of ours, and it never outlives its use."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reaperd.linux import helper
from reaperd.linux.alarm import Alarm
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
        assert helper.finish_helper(running) == (7 if work is not fail else None)


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


# -- many things at once ----------------------------------------------------------------------------


def burn(seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        pass


def map_all(work: Callable[[Any], Any], items: Iterable[Any], **bounds: Any) -> Any:
    """Return what a helper that is asked but once answers."""
    with asking(work) as one:
        return ask(one, items, **bounds)


@contextlib.contextmanager
def asking(work: Callable[[Any], Any]) -> Iterator[helper.Answerer]:
    one = helper.Answerer(work)
    yield one
    one.close()
    one.close()


def ask(one: helper.Answerer, items: Iterable[Any], **bounds: Any) -> Any:
    return one.ask(list(items), **{"stall_s": 0.05, "most_s": SOON_S, **bounds})


def test_of_what_comes_without_end_no_more_is_taken_in_than_a_pipe_holds(tmp_path: Path) -> None:
    with open(tmp_path / "much", "wb+") as much:
        much.truncate(64 << 20)
        assert len(helper._drain(much.fileno())) <= helper._PIPE_BYTES + helper._CHUNK_BYTES


def test_very_much_is_answered_in_order() -> None:
    assert map_all(lambda item: str(item) * (1 << 20), range(8)) == [str(one) * (1 << 20) for one in range(8)]


def test_the_results_come_back_in_order() -> None:
    assert map_all(lambda item: [item, os.getppid()], range(500)) == [
        [item, os.getpid()] for item in range(500)
    ]
    assert map_all(lambda item: None, "ab") == [None, None]
    assert map_all(lambda item: item, ()) == []


def test_results_longer_than_a_pipe_and_ones_with_line_breaks_come_back_whole() -> None:
    items = ["x" * 1_000_000, "a\nb\n", "\udcff\u2603", ""]
    assert map_all(lambda item: item, items) == items


def test_work_that_blocks_ends_the_row_and_what_came_before_is_kept() -> None:
    begin_s = time.monotonic()
    assert map_all(lambda item: item if item < 3 else block(), range(6)) == [0, 1, 2]
    assert time.monotonic() - begin_s < SOON_S / 2
    assert map_all(lambda item: block(), range(6)) == []


def test_half_a_result_before_it_blocks_is_none() -> None:
    def say_half(item: int) -> int:
        if item == 1:
            os.write(3, b"[1, 2")
            block()
        return item

    assert map_all(say_half, range(3)) == [0]


def test_work_that_is_only_slow_is_waited_for() -> None:
    begin_s = time.monotonic()
    assert map_all(lambda item: burn(0.12), range(2), stall_s=0.02) == [None, None]
    assert time.monotonic() - begin_s > 0.2


def test_after_its_time_it_is_enough_however_busy_the_work_is() -> None:
    begin_s = time.monotonic()
    done = map_all(lambda item: burn(0.05), range(400), most_s=0.3)
    assert 0 < len(done) < 100
    assert time.monotonic() - begin_s < SOON_S
    assert map_all(lambda item: item, range(9), most_s=0.0) == []


def test_work_that_dies_ends_the_row() -> None:
    def die_at(fatal: int) -> Callable[[int], int]:
        return lambda item: os.kill(os.getpid(), signal.SIGKILL) or 0 if item == fatal else item

    assert map_all(die_at(2), range(5)) == [0, 1]
    assert map_all(lambda item: fail() if item == 1 else item, range(5)) == [0]


def test_a_result_that_is_no_json_ends_the_row() -> None:
    def one(item: int) -> object:
        os.close(2) if item == 1 else None
        return object() if item == 1 else item

    assert map_all(one, range(5)) == [0]


def test_the_alarm_ends_the_row_at_once() -> None:
    alarm = Alarm()
    reader, writer = os.pipe()
    alarm.watch(reader)
    try:
        assert map_all(lambda item: item, range(3), alarm=alarm) == [0, 1, 2]

        def ring_at_two(item: int) -> int:
            return os.kill(os.getppid(), signal.SIGUSR1) or block() or 0 if item == 2 else item

        before = signal.signal(signal.SIGUSR1, lambda number, frame: os.write(writer, b"x"))
        try:
            begin_s = time.monotonic()
            done = map_all(ring_at_two, range(5), alarm=alarm, stall_s=SOON_S)
            assert time.monotonic() - begin_s < SOON_S / 2
            assert done == [0, 1][: len(done)]
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert map_all(lambda item: block(), range(5), alarm=alarm, stall_s=SOON_S) == []
    finally:
        os.close(reader)
        os.close(writer)
        alarm._epoll.close()


def test_whoever_did_the_work_is_ended_and_waited_for() -> None:
    for work in (lambda item: item, lambda item: block(), lambda item: os._exit(0)):
        map_all(work, range(2), stall_s=0.01)
        assert ProcFS().children(os.getpid()) == []


def test_one_helper_answers_until_it_is_closed_and_then_another_does() -> None:
    with asking(lambda item: [item, os.getpid()]) as one:
        assert one.idle_since_s is None
        assert ProcFS().children(os.getpid()) == []
        ((_, first),) = ask(one, [1])
        since_s = one.idle_since_s
        assert since_s is not None
        assert ProcFS().children(os.getpid()) == [first]
        assert ask(one, [2, 3]) == [[2, first], [3, first]]
        assert ask(one, []) == []
        assert one.idle_since_s is not None
        assert one.idle_since_s > since_s
        one.close()
        assert one.idle_since_s is None
        assert ProcFS().children(os.getpid()) == []
        ((_, second),) = ask(one, [4])
        assert second != first


def test_after_one_that_blocked_or_died_or_was_interrupted_another_answers() -> None:
    def work(item: str) -> object:
        if item == "block":
            block()
        if item == "die":
            os._exit(0)
        return os.getpid()

    with asking(work) as one:
        pids = []
        for item in ("block", "die"):
            pids += ask(one, ["x"])
            assert ask(one, ["x", item, "x"]) == pids[-1:]
        pids += ask(one, ["x"])
        assert ask(one, ["x"] * 9, most_s=0.0) == []
        pids += ask(one, ["x"])
        assert len(set(pids)) == len(pids) == 4


def test_what_was_not_answered_is_no_answer_to_what_is_asked_next() -> None:
    with asking(lambda item: item) as one:
        ask(one, range(5000), most_s=0.0)
        assert ask(one, ["next"]) == ["next"]


class FailingAlarm(Alarm):
    """Fails as everything may where memory has run out, when it is asked for the second time."""

    asked = 0

    def fileno(self) -> int:
        self.asked += 1
        if self.asked > 1:
            raise MemoryError
        return super().fileno()


def test_nor_is_what_was_answered_when_we_had_run_out_of_memory(tmp_path: Path) -> None:
    """Each answer is about one process: to take one for another's would make a member of a stranger."""
    with asking(lambda item: item) as one:
        with pytest.raises(MemoryError):
            ask(one, range(5000), alarm=FailingAlarm())
        assert ask(one, ["next"]) == ["next"]


def test_one_that_died_while_nobody_asked_is_replaced_by_the_next_question() -> None:
    with asking(lambda item: os.getpid()) as one:
        (first,) = ask(one, [1])
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        (second,) = ask(one, [1])
        assert second != first


def test_a_helper_that_answers_keeps_no_descriptor_of_ours_either() -> None:
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
    (kept,) = map_all(lambda item: sorted(int(name) for name in os.listdir("/proc/self/fd")), [1])
    for descriptor in held:
        os.close(descriptor)
    assert set(kept) <= {0, 1, 2, 3, 4, 5, 6}  # 6 lists them


def test_a_helper_that_answers_ends_with_whoever_asks() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            one = helper.Answerer(lambda item: os.getpid())
            os.write(writer, b"%d\n" % ask(one, [1])[0])
            signal.pause()
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as told:
        answering = os.pidfd_open(int(told.readline()))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_for(answering)
    os.close(answering)


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
        mapped = map_all(lambda item: item, [1])
        return [refused, mapped, len(os.listdir("/proc/self/fd")) - before]

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
