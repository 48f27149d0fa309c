"""Who is left alone for a while after it failed, and ever longer each time it fails again."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import NamedTuple

FIRST_S, LONGEST_S = 5.0, 300.0
_MANY = 1000


class _Pause(NamedTuple):
    until_s: float
    length_s: float


class Pauses:
    """Of 5, 10, 20 ... 300 s each, where nobody says otherwise."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pauses: dict[Hashable, _Pause] = {}

    def begin(self, who: Hashable, first_and_longest_s: tuple[float, float] | None = None) -> float:
        """Leave ``who`` alone from now on, and return for how long: twice as long as the last time, within limits."""
        first_s, longest_s = first_and_longest_s or (FIRST_S, LONGEST_S)
        before = self._pauses.pop(who, None)
        length_s = first_s if before is None else min(max(first_s, 2 * before.length_s), longest_s)
        self._pauses[who] = _Pause(self._clock() + length_s, length_s)
        if len(self._pauses) > _MANY:
            self._forget_old()
        return length_s

    def until_s(self, who: Hashable) -> float | None:
        """Return until when ``who`` is left alone, None where that is over or never began."""
        pause = self._pauses.get(who)
        return pause.until_s if pause is not None and pause.until_s > self._clock() else None

    def __contains__(self, who: Hashable) -> bool:
        """Say whether ``who`` has failed, be it left alone yet or not."""
        return who in self._pauses

    def forget(self, who: Hashable) -> None:
        """Whoever it was is no more, or did not fail."""
        self._pauses.pop(who, None)

    def _forget_old(self) -> None:
        old_s = self._clock() - LONGEST_S
        self._pauses = {who: pause for who, pause in self._pauses.items() if pause.until_s > old_s}
