"""How the monitor goes on and ends, and that a terminal is as it was before on every way out."""

from __future__ import annotations

import fcntl
import math
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import pytest

from reaperd.ctl import CommandError, monitor, render_monitor
from reaperd.ctl.link import NoDaemonError

WITHIN_S = 30.0
FIGURES = render_monitor.figures([], [], {}, datetime(2026, 1, 31, tzinfo=timezone.utc))


class Sheet:
    """Notes what happens on it; time passes at once where ``wait`` is asked to let it pass."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seen: list[tuple[str, float]] = []

    def show(self, found: render_monitor.Figures) -> None:
        assert found is FIGURES
        self.seen.append(("shown", self.clock.now_s))

    def lose(self, reason: str) -> None:
        self.seen.append((reason, self.clock.now_s))

    def find(self) -> None:
        self.seen.append(("back", self.clock.now_s))

    def wait(self, within_s: float) -> None:
        self.clock.now_s += within_s


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


def run(
    answers: Iterator[Any] | None = None, *, interval_s: float, end_s: float, looking_s: float = 0.0
) -> list[tuple[str, float]]:
    """Return what the monitor did, and when, in a time that passes only where it waits or looks."""
    clock = Clock()
    sheet = Sheet(clock)

    def look() -> render_monitor.Figures:
        clock.now_s += looking_s
        answer = next(answers) if answers else FIGURES
        if isinstance(answer, BaseException):
            raise answer
        return FIGURES

    monitor.watch(look, sheet, FIGURES, interval_s=interval_s, end_s=end_s, clock=clock.monotonic)
    return sheet.seen


# -- intervals ------------------------------------------------------------------------------------


def test_there_is_a_block_at_once_and_one_each_interval_until_the_duration_is_over() -> None:
    assert run(interval_s=2, end_s=5) == [("shown", 0), ("shown", 2), ("shown", 4)]


def test_nothing_is_drawn_once_the_duration_is_over() -> None:
    assert run(interval_s=2, end_s=4) == [("shown", 0), ("shown", 2)]
    assert run(interval_s=2, end_s=4.5, looking_s=1) == [("shown", 0), ("shown", 3)]
    assert run(interval_s=2, end_s=0) == []


def test_what_took_too_long_is_left_out_and_not_made_up_for() -> None:
    assert run(interval_s=2, end_s=12, looking_s=2.5) == [("shown", 0), ("shown", 4.5), ("shown", 8.5)]


def test_a_daemon_that_goes_away_is_told_of_once_and_so_is_its_return() -> None:
    gone = NoDaemonError("no daemon answers: /s", "Start one")
    seen = run(iter([gone, gone, CommandError("busy"), *[FIGURES] * 3]), interval_s=2, end_s=8.5)
    assert seen == [
        ("shown", 0),
        ("no daemon answers: /s; waiting for it to come back", 2),
        ("back", 5),
        ("shown", 5),
        ("shown", 6),
        ("shown", 8),
    ]


def test_one_that_is_back_is_noticed_sooner_than_a_long_interval() -> None:
    seen = run(iter([CommandError("gone"), FIGURES, FIGURES]), interval_s=60, end_s=100)
    assert [at for _, at in seen] == [0, 60, 61, 61]


def test_one_that_goes_away_as_the_duration_ends_is_not_told_of() -> None:
    assert run(iter([CommandError("gone")]), interval_s=2, end_s=3, looking_s=1) == [("shown", 0)]


# -- the terminal ---------------------------------------------------------------------------------

PROGRAM = """
import math, sys
from reaperd.ctl.screen import Signalled, drawing
try:
    with drawing() as screen:
        screen.draw([f"drawn {screen.height}"])
        if sys.argv[1] == "fail":
            raise OSError("gone")
        if sys.argv[1] == "leave":
            sys.exit(0)
        while screen.wait(60):
            screen.draw([f"afresh {screen.height}"])
except Signalled as ended:
    sys.exit(128 + ended.number)
except KeyboardInterrupt:
    sys.exit(130)
"""
RESTORED = b"\x1b[0m\x1b[?7h\x1b[?25h\r\r\n"
HIDDEN = b"\x1b[?25l\x1b[?7l"


class Terminal:
    """A program with a terminal of its own."""

    def __init__(self, how: str) -> None:
        self.ours, theirs = pty.openpty()
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, how],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.DEVNULL,
            **({"process_group": 0} if sys.version_info >= (3, 11) else {}),
        )
        os.close(theirs)

    def read_until(self, text: bytes) -> None:
        end_s = time.monotonic() + WITHIN_S
        while text not in self.seen:
            assert select.select([self.ours], [], [], max(0.0, end_s - time.monotonic()))[0], self.seen
            self.seen += os.read(self.ours, 65536)

    def rest(self) -> bytes:
        """Return all that was written once the program is gone."""
        self.process.wait(WITHIN_S)
        while select.select([self.ours], [], [], 0)[0]:
            try:
                self.seen += os.read(self.ours, 65536)
            except OSError:  # the other end is closed, and all is read
                break
        return self.seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


@pytest.fixture
def terminal() -> Iterator[Callable[[str], Terminal]]:
    opened: list[Terminal] = []

    def open_one(how: str) -> Terminal:
        opened.append(Terminal(how))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


@pytest.mark.parametrize(("how", "code"), [("leave", 0), ("fail", 1)])
def test_a_terminal_is_given_back_in_order(terminal: Callable[[str], Terminal], how: str, code: int) -> None:
    one = terminal(how)
    assert one.rest().startswith(HIDDEN)
    assert one.seen.endswith(RESTORED)
    assert one.process.returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_a_terminal_is_given_back_before_a_signal_ends_us(
    terminal: Callable[[str], Terminal], number: signal.Signals
) -> None:
    one = terminal("wait")
    one.read_until(b"drawn")
    one.process.send_signal(number)
    assert one.rest().endswith(RESTORED)
    assert one.process.returncode == 128 + number


def test_in_another_size_it_is_drawn_afresh_at_once(terminal: Callable[[str], Terminal]) -> None:
    one = terminal("wait")
    one.read_until(b"drawn 24")
    fcntl.ioctl(one.ours, termios.TIOCSWINSZ, struct.pack("HHHH", 7, 40, 0, 0))
    one.process.send_signal(signal.SIGWINCH)  # the kernel tells only whose terminal it is in the foreground
    one.read_until(b"afresh 7")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Popen has no process_group")
def test_while_stopped_the_terminal_is_the_shells(terminal: Callable[[str], Terminal]) -> None:
    one = terminal("wait")
    one.read_until(b"drawn")
    one.process.send_signal(signal.SIGTSTP)
    stopped = os.waitid(os.P_PID, one.process.pid, os.WSTOPPED | os.WNOWAIT)
    assert stopped is not None
    one.read_until(RESTORED)
    one.seen = b""
    one.process.send_signal(signal.SIGCONT)
    one.read_until(b"afresh")
    assert one.seen.startswith(HIDDEN)


def test_without_a_duration_there_is_no_end() -> None:
    gone = iter([FIGURES, FIGURES, KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        run(gone, interval_s=1, end_s=math.inf)
