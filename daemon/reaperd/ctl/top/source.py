"""Asks the daemon, in threads of its own: however long an answer takes, the screen goes on."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple

from agent import wire
from reaperd.ctl import CommandError
from reaperd.ctl.answers import QUESTIONS, ask_all
from reaperd.ctl.commands import user_of
from reaperd.ctl.link import Link, NoDaemonError, next_after
from reaperd.ctl.text import plain
from reaperd.ctl.top.model import Families, Picture, picture
from reaperd.ctl.units import list_of
from reaperd.times import rfc3339

MOST_EVENTS = 200  # that are kept for the screen
_RETRY_S = 1.0  # a daemon that is back is noticed so soon, whatever the interval
_GPU_PACE_S = 5.0


class News(NamedTuple):
    """What there is by now."""

    found: Picture
    events: tuple[dict[str, Any], ...]  # the last ones, the oldest first


class Lost(NamedTuple):
    """No daemon answers, or it refuses: a plain sentence."""

    reason: str


class Source:
    """Looks every ``interval_s`` and gives what it finds to ``tell``, in a thread of its own."""

    def __init__(
        self,
        link: Link,
        interval_s: float,
        tell: Callable[[News | Lost], None],
        gpu: Callable[[], Mapping[int, int]] = dict,
    ) -> None:
        # A reply that is as the last one, to the byte, need not be read again. It is changed by nobody here.
        self._link = link.reading_with(functools.lru_cache(len(QUESTIONS) + 1)(wire.decode))
        self._interval_s = interval_s
        self._tell = tell
        self._read_gpu = gpu
        self._held: Mapping[int, int] = {}
        self._gpu_due_s = 0.0
        self._user_of = functools.lru_cache(1024)(user_of)
        self._families = Families()
        self._events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        self._after: int | None = None  # the number of the last event that was seen
        self._wake = threading.Event()
        self._closed = False

    def start(self) -> None:
        """Begin to look."""
        threading.Thread(target=self._look_on, name="source", daemon=True).start()

    def poke(self) -> None:
        """Look at once: something has been done."""
        self._wake.set()

    def close(self) -> None:
        """Look no more."""
        self._closed = True
        self._wake.set()

    def _look_on(self) -> None:
        try:
            self._run()
        finally:
            if not self._closed:  # a mistake of ours: old figures must not pass for new ones
                self._tell(Lost("looking has failed: leave, and start it again"))

    def _run(self) -> None:
        while not self._closed:
            began_s = time.monotonic()
            self._wake.clear()
            wait_s = self._interval_s
            try:
                told: News | Lost = self._look()
            except CommandError as error:
                told = Lost(plain(error.reason if isinstance(error, NoDaemonError) else str(error)))
                wait_s = min(wait_s, _RETRY_S)
            if not self._closed:
                self._tell(told)
            self._wake.wait(max(0.0, began_s + wait_s - time.monotonic()))

    def _look(self) -> News:
        found = ask_all(self._link)
        self._follow()
        if time.monotonic() >= self._gpu_due_s:
            with contextlib.suppress(OSError):  # there is nothing left to start a helper with
                self._held = self._read_gpu()
            self._gpu_due_s = time.monotonic() + _GPU_PACE_S
        found_now = picture(found, user_of=self._user_of, gpu=self._held, families=self._families)
        return News(found_now, tuple(self._events))

    def _follow(self) -> None:
        """Take in the events that are new; at first the last ones there were."""
        if self._after is None:
            last = next_after(self._link.ask("events", since=rfc3339(datetime.now(timezone.utc))), 0)
            self._after = max(0, last - MOST_EVENTS)
        while True:
            reply = self._link.ask("events", after=self._after)
            events, before = list_of(reply, "events"), self._after
            self._after = next_after(reply, before)
            if self._after < before:  # a daemon that lost its history counts anew
                self._events.clear()
            self._events.extend(one for one in events if isinstance(one, dict))
            if not events or self._after <= before:
                return
