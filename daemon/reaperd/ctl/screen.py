"""A terminal that is drawn in place, and that is as it was before on any way out.

Plain ANSI, and the VT100's switches for the cursor and for lines that run on beyond the edge. No more is asked of it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

_BEGIN = b"\033[?25l\033[?7l\033[2J"  # no cursor, no wrapping: a narrower window must not shift the lines
_END = b"\033[0m\033[?7h\033[?25h\r\n"
_HOME = "\033[H"
_REST_OF_LINE, _REST_OF_SCREEN = "\033[K", "\033[J"
_FATAL = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT)


class Signalled(BaseException):
    """A signal asks us to end: first the terminal must be put back."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Screen:
    """The terminal on standard output; ``drawing()`` makes one."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.fileno()
        self._encoding = sys.stdout.encoding or "ascii"
        self._wakes, self._wake = os.pipe()
        os.set_blocking(self._wakes, False)
        os.set_blocking(self._wake, False)  # as signal.set_wakeup_fd() wants it
        self._before: dict[int, Any] = {}
        self._wake_before = -1
        self._ending = False

    @property
    def height(self) -> int:
        """How many lines there are."""
        try:
            lines = os.get_terminal_size(self._terminal).lines
        except OSError:
            lines = 0
        return lines or 24  # 0: a terminal that never learned its size

    def draw(self, lines: list[str]) -> None:
        """Show ``lines`` and nothing else."""
        ends = f"{_REST_OF_LINE}\r\n"
        text = _HOME + ends.join(lines) + _REST_OF_LINE + _REST_OF_SCREEN
        self._write(text.encode(self._encoding, "backslashreplace"))

    def wait(self, within_s: float) -> bool:
        """Wait that long, or until there is something to be drawn afresh: then return True."""
        if not select.select([self._wakes], [], [], max(0.0, within_s))[0]:
            return False
        os.read(self._wakes, 4096)
        return True

    def begin(self) -> None:
        """Take the terminal over."""
        self._wake_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in _FATAL:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup(1) leaves SIGHUP
                self._before[number] = signal.signal(number, self._end)
        self._before[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, _note)
        self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._suspend)
        self._write(_BEGIN)

    def end(self) -> None:
        """Give the terminal back."""
        self._ending = True
        with contextlib.suppress(OSError):  # it may be gone itself
            self._write(_END)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wake_before)
        os.close(self._wakes)
        os.close(self._wake)

    def _end(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self._ending:  # a second one must not keep the first from putting the terminal back
            self._ending = True
            raise KeyboardInterrupt if number == signal.SIGINT else Signalled(number)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Give the terminal to the shell for as long as we are stopped."""
        del frame
        self._write(_END)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        signal.signal(number, self._suspend)  # here we have been told to go on
        self._write(_BEGIN)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._terminal, data) :]


def _note(number: int, frame: FrameType | None) -> None:
    """Let the signal be: it has woken up who waits."""
    del number, frame


@contextlib.contextmanager
def drawing() -> Iterator[Screen]:
    """Lend the terminal; Ctrl-C raises KeyboardInterrupt, what else would end us Signalled, and both leave it in order."""
    screen = Screen()
    try:
        screen.begin()
        yield screen
    finally:
        screen.end()
