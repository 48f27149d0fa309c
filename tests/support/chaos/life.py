"""The time that a daemon had: promises are counted in it, not in the time that passed.

It runs while the daemon is ready, not stopped, not waiting for a processor that others use, and while the machine runs.
"""

from __future__ import annotations

import threading
import time

from harness import read_proc

_BEAT_S, _MISSED_S = 0.05, 0.15


class Pauses:
    """Counts the seconds for which nothing of ours ran: everything was frozen, or the machine was suspended."""

    def __init__(self) -> None:
        self.lost_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        before_s = time.monotonic()
        while not self._over.wait(_BEAT_S):
            now_s = time.monotonic()
            if now_s - before_s > _BEAT_S + _MISSED_S:
                self.lost_s += now_s - before_s - _BEAT_S
            before_s = now_s

    def close(self) -> None:
        self._over.set()
        self._thread.join()


class Life:
    """A clock that stands still while there is no daemon to keep a promise."""

    def __init__(self) -> None:
        self._had_s = 0.0
        self._since_s: float | None = None
        self._waited_s = 0.0
        self._lost_s = 0.0
        self._pid = 0
        self.pauses = Pauses()
        self.ready = False
        self.stopped = False
        self.number = 0  # of the life: each READY begins one
        self.ready_at_s = 0.0  # on this clock
        self.broken_at_s = 0.0  # monotonic: when a daemon was last away or stopped

    def begin(self, pid: int) -> None:
        """Note that the daemon ``pid`` is ready."""
        self._pid, self.ready, self.stopped = pid, True, False
        self.number += 1
        self._go()
        self.ready_at_s = self.now_s()
        self.broken_at_s = time.monotonic()

    def end(self) -> None:
        """Note that the daemon is gone, or is asked to go."""
        self._stand_still()
        self.ready = self.stopped = False

    def stop(self) -> None:
        """Note that the daemon was stopped by a signal."""
        self._stand_still()
        self.stopped = True

    def go_on(self) -> None:
        """Note that it goes on."""
        if self.stopped:
            self.stopped = False
            self._go()
            self.broken_at_s = time.monotonic()

    @property
    def running(self) -> bool:
        return self.ready and not self.stopped

    def unbroken_since(self, moment_s: float) -> bool:
        """Say whether the daemon was there all the time since the monotonic ``moment_s``."""
        return self.running and self.broken_at_s <= moment_s

    def now_s(self) -> float:
        """Return the seconds that daemons had so far."""
        if self._since_s is None:
            return self._had_s
        waited_s = max(0.0, self._read_waited_s() - self._waited_s) + self.pauses.lost_s - self._lost_s
        return self._had_s + max(0.0, time.monotonic() - self._since_s - waited_s)

    def _go(self) -> None:
        self._since_s, self._waited_s = time.monotonic(), self._read_waited_s()
        self._lost_s = self.pauses.lost_s

    def _stand_still(self) -> None:
        self._had_s, self._since_s = self.now_s(), None

    def _read_waited_s(self) -> float:
        """Return how long the daemon was ready to run and did not, the second figure of /proc/PID/schedstat."""
        words = read_proc(self._pid, "schedstat").split()
        return int(words[1]) / 1e9 if len(words) == 3 else self._waited_s
