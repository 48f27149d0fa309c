"""The core's end of a companion: a real child that is fed, falls silent, dies, and comes back, and is never waited for."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import repeat_until

from reaperd.companion import MAX_WAITING_BYTES, Companion
from reaperd.poller import Poller

SOON_S = 20.0
# Says back what it is told, and ends with the core.
ECHO = """
import socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
for line in channel.makefile("rb"):
    channel.sendall(line)
"""
DEAF = "import signal; signal.pause()"


class Loop:
    """As much of the daemon's loop as a companion needs."""

    def __init__(self) -> None:
        self.poller = Poller()
        self.heard: list[dict[str, Any]] = []
        self.companion: Companion

    def turn(self) -> None:
        self.poller.wait(0.05)
        self.companion.exchange(time.monotonic())
        self.companion.step(time.monotonic())

    def until(self, done: Callable[[], bool]) -> None:
        def look() -> bool | None:
            self.turn()
            return done() or None

        repeat_until(look, SOON_S, "what is asked of the companion")

    def hears(self, *messages: dict[str, Any]) -> None:
        self.until(lambda: len(self.heard) >= len(messages))
        assert self.heard == list(messages)
        self.heard.clear()


@contextlib.contextmanager
def running(code: str, **options: Any) -> Iterator[Loop]:
    loop = Loop()
    command = (sys.executable, "-I", "-S", "-c", code)
    loop.companion = Companion("echo", command, loop.poller, on_message=loop.heard.append, **options)
    before = descriptors()
    loop.companion.start(time.monotonic())
    try:
        yield loop
    finally:
        loop.companion.close(time.monotonic())
        assert descriptors() == before
        loop.poller._epoll.close()
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def pid_of(loop: Loop) -> int:
    assert loop.companion.pid is not None
    return loop.companion.pid


def test_a_companion_is_greeted_and_then_fed_and_what_it_says_is_heard() -> None:
    with running(ECHO, greeting=lambda: [{"settings": 1}]) as loop:
        assert loop.companion.feed({"n": 2})
        loop.hears({"settings": 1}, {"n": 2})
        assert (loop.companion.dropped, loop.companion.lives_lost) == (0, 0)


def test_a_message_that_is_larger_than_any_socket_holds_arrives_whole() -> None:
    with running(ECHO.replace("sendall(line)", "sendall(b'%d\\n' % len(line))")) as loop:
        large = {"text": "x" * (4 * MAX_WAITING_BYTES)}
        assert loop.companion.feed(large)
        loop.until(lambda: not loop.companion._waiting)


def test_one_that_takes_nothing_loses_what_does_not_fit_and_nobody_waits_for_it() -> None:
    with running(DEAF) as loop:
        message = {"text": "x" * 1000}
        fed = 0
        while loop.companion.feed(message):
            fed += 1
            assert fed < 10_000
        assert loop.companion.dropped == 1
        assert not loop.companion.feed(message)
        assert loop.companion.dropped == 2
        assert len(loop.companion._waiting) <= MAX_WAITING_BYTES
        assert fed * 1000 > MAX_WAITING_BYTES


def test_one_that_was_stopped_gets_what_waited_once_it_goes_on() -> None:
    with running(ECHO) as loop:
        loop.companion.feed({"n": 0})
        loop.hears({"n": 0})
        os.kill(pid_of(loop), signal.SIGSTOP)
        sent = [{"n": number, "text": "x" * 5000} for number in range(80)]
        assert all(loop.companion.feed(message) for message in sent)
        os.kill(pid_of(loop), signal.SIGCONT)
        loop.hears(*sent)


def test_one_that_died_is_started_anew_greeted_again_and_counted() -> None:
    with running(ECHO, greeting=lambda: [{"settings": 1}]) as loop:
        loop.hears({"settings": 1})
        first = pid_of(loop)
        os.kill(first, signal.SIGKILL)
        loop.hears({"settings": 1})
        assert pid_of(loop) != first
        assert loop.companion.lives_lost == 1


def test_what_it_is_fed_while_there_is_none_of_it_is_dropped_and_counted() -> None:
    with running("") as loop:
        loop.until(lambda: loop.companion.lives_lost == 1)
        assert loop.companion.pid is None
        assert not loop.companion.feed({"n": 1})
        assert loop.companion.dropped == 1


def test_those_that_die_young_are_started_ever_more_seldom() -> None:
    with running("") as loop:
        pauses = []
        for lives in range(1, 10):
            loop.until(lambda lives=lives: loop.companion.lives_lost == lives)
            due_s = loop.companion.next_deadline()
            assert due_s is not None
            pauses.append(due_s - time.monotonic())
            loop.companion.step(due_s)
            loop.companion._started_at_s = time.monotonic()
        # A little has passed since each was set.
        assert pauses[0] <= 1.0
        assert all(after > before for before, after in itertools.pairwise(pauses[:6]))
        assert 30 < pauses[-1] <= 60


def test_one_that_says_that_nothing_can_be_done_is_not_started_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    code = """
import socket, sys
socket.socket(fileno=int(sys.argv[1])).sendall(b'{"hopeless": "there is no\\\\nmodule x"}\\n')
"""
    with running(code) as loop, caplog.at_level(logging.INFO):
        loop.until(lambda: bool(loop.companion.hopeless) and loop.companion.pid is None)
        assert loop.companion.next_deadline() is None
        assert loop.companion.lives_lost == 0
        assert [record.getMessage() for record in caplog.records] == ["echo: there is no\\nmodule x"]
        loop.companion.stop(time.monotonic())
        loop.companion.start(time.monotonic())
        assert (loop.companion.hopeless, loop.companion.pid is not None) == ("", True)


def test_of_what_it_wants_logged_only_so_much_is(caplog: pytest.LogCaptureFixture) -> None:
    with running(ECHO) as loop, caplog.at_level(logging.INFO):
        for _ in range(100):
            loop.companion.feed({"log": "error", "text": "disk full"})
        loop.companion.feed({"n": 1})
        loop.hears({"n": 1})
        assert {record.getMessage() for record in caplog.records} == {"echo: disk full"}
        assert 10 <= len(caplog.records) < 20
        assert caplog.records[0].levelno == logging.ERROR


def test_what_no_companion_of_ours_says_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    nonsense = [b"", b"{", b"[" * 5000, b"7", b"null", b"\xff", b'{"log": 1, "text": 2, "n": 3}']
    code = f"""
import socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
channel.sendall({b"".join(line + bytes([10]) for line in nonsense)!r})
channel.recv(1)
"""
    with running(code) as loop:
        loop.hears({"log": 1, "text": 2, "n": 3})
        assert loop.companion.lives_lost == 0


def test_one_that_never_ends_its_line_is_ended() -> None:
    code = """
import socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
while True:
    channel.sendall(b"x" * 1000)
"""
    with running(code) as loop:
        loop.until(lambda: loop.companion.lives_lost == 1)


def test_one_that_was_stopped_for_good_is_ended_without_a_wait() -> None:
    with running(DEAF) as loop:
        pid = pid_of(loop)
        os.kill(pid, signal.SIGSTOP)
        loop.companion.stop(time.monotonic())
        assert loop.companion.pid is None
        loop.until(lambda: not os.path.exists(f"/proc/{pid}"))
        assert loop.companion.next_deadline() is None
        assert not loop.companion.feed({})
        assert loop.companion.dropped == 0


def test_one_that_may_say_last_words_says_them_and_one_that_goes_on_is_ended() -> None:
    code = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).recv(1)"
    for each, most_s in ((code, 3600.0), (DEAF, 0.2)):
        with running(each, last_words_s=most_s) as loop:
            pid = pid_of(loop)
            loop.companion.stop(time.monotonic())
            assert os.path.exists(f"/proc/{pid}")
            loop.until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))


def test_as_the_daemon_ends_one_that_does_not_is_ended_after_its_time() -> None:
    with running("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", last_words_s=0.2) as loop:
        pid = pid_of(loop)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        loop.companion.close(time.monotonic())
        assert not os.path.exists(f"/proc/{pid}")


def test_it_has_of_our_descriptors_its_channel_alone_and_of_our_environment_what_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REAPER_SECRET", "x")
    monkeypatch.setenv("GIVEN", "y")
    code = """
import json, os, socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
listing = os.listdir("/proc/self/fd")
opened = sorted(int(one) for one in listing if os.path.exists(f"/proc/self/fd/{one}"))
told = {"open": opened, "channel": channel.fileno(), "names": sorted(os.environ), "core": int(sys.argv[2])}
channel.sendall(json.dumps(told).encode() + b"\\n")
channel.recv(1)
"""
    with open("/dev/null") as file:
        os.set_inheritable(file.fileno(), True)
        with running(code, environment=("GIVEN",)) as loop:
            loop.until(lambda: bool(loop.heard))
    (told,) = loop.heard
    assert told["open"] == [0, 1, 2, told["channel"]]
    assert told["core"] == os.getpid()
    assert "GIVEN" in told["names"]
    assert "REAPER_SECRET" not in told["names"]


def test_a_message_is_one_line_of_json() -> None:
    from reaperd.companion_process import pack

    assert json.loads(pack({"text": "a\nb"})) == {"text": "a\nb"}
    assert pack({"text": "a\nb"}).count(b"\n") == 1
