"""Asks the daemon now and then, and keeps what it said: the page shows the course of things, not only this moment."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

from reaperd.ctl import CommandError
from reaperd.ctl.link import Link, NoDaemonError, next_after
from reaperd.ctl.orphans import complete
from reaperd.ctl.ui import here
from reaperd.ctl.ui.shaping import Point, mine, point
from reaperd.ctl.units import list_of, number_of
from reaperd.times import rfc3339

EVERY_S = 5.0  # from one point of the charts to the next
FRESH_S = 1.0  # who asks sooner gets what was answered before
_POINTS = 720  # an hour
_EVENTS = 5000
_NEVER = float("-inf")
HISTORY_DAYS = 7


class Facts(NamedTuple):
    """What the daemon said at one moment; where none answers, why, and what would help."""

    at: datetime
    status: Any = None
    sessions: tuple[Any, ...] = ()
    orphans: tuple[Any, ...] = ()
    no_daemon: str = ""
    advice: str = ""


class Recorder:
    """One for all who look at the page: they have the same rights."""

    def __init__(self, link: Link, uid: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.link = link
        self.owner = None if uid == 0 else uid  # root sees everybody's
        self._clock = clock
        self._asking = threading.Lock()  # held by who asks the daemon, however long that takes
        self._lock = threading.Lock()
        self._facts = Facts(datetime.now(timezone.utc))
        self._asked_at_s = self._pointed_at_s = _NEVER
        self._points: deque[Point] = deque(maxlen=_POINTS)
        self._events: deque[Any] = deque(maxlen=_EVENTS)
        self._after = 0

    def start(self) -> Recorder:
        """Go on by itself, until the server ends."""
        threading.Thread(target=self._go_on, name="reaper-recorder", daemon=True).start()
        return self

    def _go_on(self) -> None:
        while True:
            self.look()
            time.sleep(EVERY_S)

    def look(self) -> Facts:
        """Return what there is now, or was a second ago."""
        # Who comes while somebody asks gets what was said before, once there is any.
        if self._is_fresh() or not self._asking.acquire(blocking=self._asked_at_s == _NEVER):
            return self._facts
        try:
            if not self._is_fresh():
                self._facts = self._ask()
                self._asked_at_s = self._clock()
                if self._asked_at_s - self._pointed_at_s >= 0.8 * EVERY_S:
                    self._pointed_at_s = self._asked_at_s
                    self._note()
            return self._facts
        finally:
            self._asking.release()

    def _is_fresh(self) -> bool:
        return self._clock() - self._asked_at_s < FRESH_S

    def points(self) -> list[Point]:
        """Return the course of things, oldest first."""
        with self._lock:
            return list(self._points)

    def events(self) -> list[Any]:
        """Return what happened in the last days, oldest first."""
        with self._lock:
            return list(self._events)

    def _ask(self) -> Facts:
        at = datetime.now(timezone.utc)
        try:
            status = self.link.ask("status").get("status")
            sessions = mine(list_of(self.link.ask("ps"), "sessions"), self.owner)
        except NoDaemonError as error:
            return Facts(at, no_daemon=error.reason, advice=error.advice)
        except CommandError as error:
            return Facts(at, no_daemon=str(error))
        try:
            orphans = mine(list_of(self.link.ask("orphans"), "orphans"), self.owner)
        except CommandError:  # it has no time for that while a leader dies
            orphans = list(self._facts.orphans)
        return Facts(at, status, tuple(sessions), tuple(orphans))

    def _note(self) -> None:
        facts = self._facts
        with self._lock:
            self._points.append(point(facts.at, facts.status, facts.sessions, facts.orphans))
        if facts.no_daemon:
            return
        since = rfc3339(facts.at - timedelta(days=HISTORY_DAYS))
        try:
            while True:  # a long history comes in several replies
                reply = self.link.ask("events", after=self._after, since=since)
                found, before = list_of(reply, "events"), self._after
                self._after = next_after(reply, before)
                with self._lock:
                    if self._after < before:  # it counts anew
                        self._events.clear()
                    self._events.extend(one for one in found if self._concerns(one))
                if not found or self._after <= before:
                    return
        except CommandError:
            pass  # the next time

    def _concerns(self, event: Any) -> bool:
        """Say whether an event is the user's, or nobody's: a daemon tells an admin of everybody's."""
        return self.owner is None or number_of(event, "uid") in (None, self.owner)

    # -- asking for more, and for deeds ------------------------------------------------------

    def cleanable(self, *, leftovers: bool) -> tuple[dict[str, Any], str]:
        """Return what a clean-up would end, and why that was looked up without a daemon, "" where one answered. CommandError."""
        try:
            return complete(self.link.ask, self.owner)("cleanup", dry_run=True, leftovers=leftovers), ""
        except NoDaemonError as error:
            return here.ask(self.owner, "cleanup", dry_run=True, leftovers=leftovers), error.reason

    def ask_to_end(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ask what ``cleanable()`` was asked of; CommandError."""
        try:
            return complete(self.link.ask, self.owner)(op, **fields)
        except NoDaemonError:
            return here.ask(self.owner, op, **fields)


def of_this_process(sockets: list[str], timeout_s: float) -> Recorder:
    """Return the recorder of this process's user."""
    return Recorder(Link(sockets, timeout_s=timeout_s), os.geteuid())
