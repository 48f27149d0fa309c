"""A reaperd to which a thousand events a second happen from SIGUSR1 to SIGUSR2: ``stormy.py PYTHON -m reaperd ...`` becomes it.

Everything is the daemon's own but the cause of these events: they are recorded by its loop, ten every 10 ms.
"""

from __future__ import annotations

import signal
import sys
import time

from reaperd import __main__, loop, report

EVERY_S, AT_ONCE = 0.01, 10
_PROCESS = {
    "pid": 4711,
    "framework": "loky",
    "signal": "SIGKILL",
    "result": "killed",
    "evidence": ["leader 4700 is gone"],
}


class Stormy(loop.Daemon):
    """Records events by the clock."""

    _next_s = float("inf")

    def _serve(self) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: self._storm_from(0.0))
        signal.signal(signal.SIGUSR2, lambda *_: self._storm_from(float("inf")))
        super()._serve()

    def _storm_from(self, next_s: float) -> None:
        self._next_s = next_s

    def _timeout_s(self) -> float | None:
        usual_s, storm_s = super()._timeout_s(), max(0.0, self._next_s - time.monotonic())
        return storm_s if usual_s is None else min(usual_s, storm_s)

    def _do_due(self, now_s: float) -> None:
        super()._do_due(now_s)
        self._next_s = max(self._next_s, now_s - 1.0)  # what could not be made up for in a second is left out
        while self._next_s <= now_s:
            self._next_s += EVERY_S
            for number in range(AT_ONCE):
                event = report.event("killed", uid=1000 + number, name="storm", processes=[_PROCESS])
                self._core.sessions.record(event)


if __name__ == "__main__":
    __main__.Daemon = Stormy  # type: ignore[misc]
    __main__.main(sys.argv[4:])
