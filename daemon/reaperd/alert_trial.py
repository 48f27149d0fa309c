"""A test of the alerts: one message to each target, and what has come of each by now."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from reaperd.alert_groups import Outcome

_Known = tuple[Outcome, str]


class Job(NamedTuple):
    """Something that a helper is to do: ``done`` is told what came of it."""

    work: Callable[[], Any]
    most_s: float
    done: Callable[[Outcome, str], None]


class Trial:
    """One test; ``done`` is called once it is known what came of all. Times are monotonic seconds."""

    def __init__(self, number: int, until_s: float, done: Callable[[Trial], None]) -> None:
        self.number = number
        self.until_s = until_s
        self.jobs: collections.deque[Job] = collections.deque()  # that nobody has begun
        self._done = done
        self._shown: list[str] = []
        self._known: dict[int, _Known] = {}  # by place

    def add(self, shown: str, work: Callable[[], Any], most_s: float) -> None:
        """Have a target tried; ``shown`` is what people are told it is."""
        note = functools.partial(self._note, len(self._shown))
        self._shown.append(shown)
        self.jobs.append(Job(work, most_s, note))

    def take(self, now_s: float) -> Job | None:
        """Return what is to be begun next; None where there is nothing, or no time is left for an answer."""
        return self.jobs.popleft() if self.jobs and now_s + self.jobs[0].most_s <= self.until_s else None

    def _note(self, place: int, outcome: Outcome, reason: str) -> None:
        self._known[place] = outcome, reason
        if len(self._known) == len(self._shown):
            self._done(self)

    def results(self, after_s: float) -> list[dict[str, Any]]:
        """Return what is known of each target, ``after_s`` seconds after it was asked for."""
        begun = len(self._shown) - len(self.jobs)
        late = Outcome.FAILED, f"it did not answer within {after_s:g} s"
        untried = Outcome.FAILED, f"not tried within {after_s:g} s: others took that long"
        found = [
            self._known.get(place, late if place < begun else untried) for place in range(len(self._shown))
        ]
        return [
            {"target": shown, "sent": outcome is Outcome.SENT, "reason": reason or None}
            for shown, (outcome, reason) in zip(self._shown, found, strict=True)
        ]
