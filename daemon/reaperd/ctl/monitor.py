"""``reaperctl monitor``: what there is, again every interval, until the duration is over or somebody has seen enough."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import select
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from typing import Protocol

from reaperd.ctl import DONE, CommandError, render_monitor
from reaperd.ctl.answers import ask_all
from reaperd.ctl.link import Link, NoDaemonError
from reaperd.ctl.render_monitor import Figures
from reaperd.ctl.screen import Screen, Signalled, drawing
from reaperd.ctl.terminal import look_of_stdout, put_now, tell
from reaperd.ctl.text import plain

_RETRY_S = 1.0  # a daemon that is back is noticed so soon, whatever the interval


class Sheet(Protocol):
    """What the figures are put on."""

    def show(self, found: Figures) -> None:
        """Show what there is now."""

    def lose(self, reason: str) -> None:
        """Say that no daemon answers any more."""

    def find(self) -> None:
        """Say that one is back."""

    def wait(self, within_s: float) -> None:
        """Let so much time pass."""


def monitor(options: Namespace) -> int:
    """Show what there is, every interval."""
    with _looking(options) as look_by:
        end_s = time.monotonic() + options.duration if options.duration else math.inf
        look = functools.partial(look_by, end_s)
        try:
            first = look()  # before the terminal is taken over: there may be no daemon
        except NoDaemonError as error:
            raise error.or_here() from None
        try:
            with _sheet(options) as sheet:
                watch(look, sheet, first, interval_s=options.interval, end_s=end_s)
        except Signalled as ended:
            return 128 + ended.number  # as a shell says it
    return DONE


@contextlib.contextmanager
def _looking(options: Namespace) -> Iterator[Callable[[float], Figures]]:
    """Give what looks, and is over by a monotonic second: at the daemon's answers, or with --local from here.

    From here, nobody knows of sessions.
    """
    if not options.local:
        yield functools.partial(_look, Link.of(options))
        return
    from reaperd.ctl import local

    with local.watching() as records:
        yield lambda _: render_monitor.figures(None, records(), None, datetime.now(timezone.utc))


def watch(
    look: Callable[[], Figures],
    sheet: Sheet,
    first: Figures,
    *,
    interval_s: float,
    end_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Put ``first``, and then every ``interval_s`` what ``look`` finds, on ``sheet``, nothing from ``end_s`` on (monotonic)."""
    found: Figures | None = first
    due_s = clock()
    while True:
        if clock() >= end_s:  # looking took too long
            return
        if found is not None:
            sheet.show(found)
        now_s = clock()
        # What could not be done in time is left out, not made up for; one that is not due yet stays as it is.
        due_s += interval_s * (math.floor((now_s - due_s) / interval_s) + 1)
        next_s = due_s if found is not None else min(due_s, now_s + _RETRY_S)
        sheet.wait(min(next_s, end_s) - now_s)
        if clock() >= end_s:
            return
        lost = found is None
        try:
            found = look()
        except CommandError as error:
            found = None
            if not lost and clock() < end_s:
                reason = error.reason if isinstance(error, NoDaemonError) else str(error)
                sheet.lose(f"{reason}; waiting for it to come back")
        else:
            if lost:
                sheet.find()


def _look(link: Link, end_s: float) -> Figures:
    """Return what there is; NoDaemonError, CommandError. No answer is waited for beyond ``end_s``."""
    found = ask_all(link, end_s)
    return render_monitor.figures(found.sessions, found.orphans, found.status, found.at)


# -- what the figures are put on ------------------------------------------------------------------


def _sheet(options: Namespace) -> AbstractContextManager[Sheet]:
    if options.json:
        return contextlib.nullcontext(_Lines())
    tty = sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return _on_screen() if tty else contextlib.nullcontext(_Paper())


class _Endless:
    """A stream that lines are added to."""

    def lose(self, reason: str) -> None:
        tell(reason)

    def find(self) -> None:
        tell("the daemon is back")

    def wait(self, within_s: float) -> None:
        select.select([], [], [], max(0.0, within_s))


class _Lines(_Endless):
    """An object of JSON a line."""

    def show(self, found: Figures) -> None:
        put_now(json.dumps(render_monitor.document(found)))


class _Paper(_Endless):
    """A block of lines after the other."""

    def show(self, found: Figures) -> None:
        put_now("\n".join([*render_monitor.frame(found, look_of_stdout()), ""]))


class _Drawn:
    """A terminal on which each block takes the place of the one before."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._shown: Figures | str = ""  # a text: why there is nothing to show

    def show(self, found: Figures) -> None:
        self._shown = found
        self._draw()

    def lose(self, reason: str) -> None:
        self._shown = plain(reason)
        self._draw()

    def find(self) -> None:
        """Say nothing: the figures are to be seen again."""

    def wait(self, within_s: float) -> None:
        until_s = time.monotonic() + within_s
        while self._screen.wait(until_s - time.monotonic()):
            if time.monotonic() < until_s:
                self._draw()  # in another size, or after a stop

    def _draw(self) -> None:
        look, height = look_of_stdout(), self._screen.height
        shown = self._shown
        if isinstance(shown, str):
            lines = render_monitor.lost(datetime.now(timezone.utc), shown, look)[:height]
        else:
            lines = render_monitor.frame(shown, look, height=height)
        self._screen.draw(lines)


@contextlib.contextmanager
def _on_screen() -> Iterator[Sheet]:
    with drawing() as screen:
        yield _Drawn(screen)
