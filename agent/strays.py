"""When a worker that has lost its pool while its script lives is a stray: for how long, and how busy. Pure.

A daemon asks this of all its sessions, and a training session without one of itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

Id = tuple[int, int]  # pid, start ticks
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_LEAST_S = 0.1  # CPU time comes in ticks of 10 ms: a share is told over no less than ten


class Stray(NamedTuple):
    """A worker past both thresholds."""

    id: Id
    seconds: float  # since it was first seen without its pool
    percent: float  # of a core, between the last two looks


class _Seen(NamedTuple):
    since_s: float
    at_s: float
    cpu_ticks: int
    percent: float = 0.0


class Watch:
    """Remembers from look to look since when each was seen without its pool, and what CPU it had used by then."""

    def __init__(self, age_s: float, cpu_percent: float) -> None:
        self._age_s, self._cpu_percent = age_s, cpu_percent
        self._seen: dict[Id, _Seen] = {}

    def look(self, now_s: float, lost: Mapping[Id, int]) -> list[Stray]:
        """Return the strays at the monotonic ``now_s``; ``lost`` has the CPU ticks of all that have no pool now."""
        before, seen = self._seen, {}
        for id_, cpu_ticks in lost.items():
            one = before.get(id_, _Seen(now_s, now_s, cpu_ticks))
            passed_s = now_s - one.at_s
            if passed_s >= _LEAST_S:
                percent = 100 * (cpu_ticks - one.cpu_ticks) / _TICKS_PER_S / passed_s
                one = _Seen(one.since_s, now_s, cpu_ticks, percent)
            seen[id_] = one
        self._seen = seen
        return [
            Stray(id_, now_s - one.since_s, one.percent)
            for id_, one in seen.items()
            if now_s - one.since_s >= self._age_s
            and one.at_s > one.since_s
            and one.percent >= self._cpu_percent
        ]
