"""What one target of alerts is told, and when: many events become few messages, and what fails is tried again. Pure.

The rules of this file:

1. The first event of a kind is told of after a second, in which others may join it. From then on there is at most one message
   about that kind in a window, which is twice as long each time that more came during it, and short again after a quiet one.
2. A message tells all that waits, of whatever kind. Of each kind it counts every event, and has the first few in detail.
3. A message that fails goes back to what waits, so that the next attempt tells that and what has come since. Attempts grow
   rarer; after an hour of them, what waits is given up.
4. Whatever comes, what is kept is a count and a few lines for each kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

FEW = 5  # events of a kind that are told in detail
SETTLE_S = 1.0
LONGEST_WINDOW_S = 3600.0
FIRST_RETRY_S, LONGEST_RETRY_S, GIVE_UP_AFTER_S = 2.0, 300.0, 3600.0


class Outcome(Enum):
    """What came of an attempt to send a message."""

    SENT = "sent"
    FAILED = "failed"
    HOPELESS = "hopeless"  # no later attempt can succeed


class Group(NamedTuple):
    """The events of one kind in one message."""

    kind: str
    events: int
    first_at: str  # RFC 3339
    last_at: str
    lines: tuple[str, ...]  # of the first few

    def joined(self, later: Group) -> Group:
        """Return this group and a later one of the same kind as one."""
        return Group(
            self.kind,
            self.events + later.events,
            self.first_at,
            later.last_at,
            (*self.lines, *later.lines)[:FEW],
        )


Message = tuple[Group, ...]


def count_in(groups: Iterable[Group]) -> int:
    """Return how many events they tell of."""
    return sum(group.events for group in groups)


class _Window(NamedTuple):
    until_s: float
    length_s: float


class Outbox:
    """What waits for one target. Times are monotonic seconds."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._waiting: dict[str, Group] = {}
        self._came_at_s: dict[str, float] = {}  # the first of those that wait
        self._windows: dict[str, _Window] = {}
        self._on_its_way: Message = ()
        self._retry_s = FIRST_RETRY_S
        self._retry_at_s = 0.0
        self.failing_since_s: float | None = None

    def note(self, group: Group, now_s: float) -> None:
        """Take in an event, or several of a kind."""
        if group.kind in self._waiting:
            self._waiting[group.kind] = self._waiting[group.kind].joined(group)
        else:
            self._waiting[group.kind] = group
            self._came_at_s[group.kind] = now_s

    def count(self) -> int:
        """Return how many events wait, or are on their way."""
        return count_in(self._waiting.values()) + count_in(self._on_its_way)

    @property
    def is_sending(self) -> bool:
        """Whether a message is on its way."""
        return bool(self._on_its_way)

    def next_deadline(self) -> float | None:
        """Return when there is a message to send; None while one is on its way, or nothing waits."""
        if self._on_its_way or not self._waiting:
            return None
        return max(self._retry_at_s, min(map(self._due_s, self._waiting)))

    def _due_s(self, kind: str) -> float:
        window = self._windows.get(kind)
        return max(self._came_at_s[kind] + SETTLE_S, window.until_s if window else 0.0)

    def take(self, now_s: float, *, at_once: bool = False) -> Message:
        """Return the message that is due, or () where none is; ``done`` is to be called with what came of it.

        ``at_once``: do not wait for more to come.
        """
        due_s = self.next_deadline()
        if due_s is None or (due_s > now_s and not at_once):
            return ()
        for kind in self._waiting:
            window = self._windows.get(kind)
            grows = window is not None and self._came_at_s[kind] < window.until_s
            length_s = (
                min(2 * window.length_s, max(LONGEST_WINDOW_S, self.window_s))
                if window and grows
                else self.window_s
            )
            self._windows[kind] = _Window(now_s + length_s, length_s)
        self._on_its_way = tuple(self._waiting.values())
        self._waiting, self._came_at_s = {}, {}
        return self._on_its_way

    def done(self, outcome: Outcome, now_s: float) -> int:
        """Note what came of the message on its way; return how many events are given up."""
        message, self._on_its_way = self._on_its_way, ()
        if outcome is Outcome.SENT:
            self._retry_s, self._retry_at_s, self.failing_since_s = FIRST_RETRY_S, 0.0, None
            return 0
        for group in message:
            later = self._waiting.get(group.kind)
            self._waiting[group.kind] = group.joined(later) if later else group
            self._came_at_s[group.kind] = now_s
            self._windows.pop(group.kind, None)  # nothing was told: there is nothing to spare anybody from
        if self.failing_since_s is None:
            self.failing_since_s = now_s
        if outcome is Outcome.FAILED and now_s - self.failing_since_s < GIVE_UP_AFTER_S:
            self._retry_at_s = now_s + self._retry_s
            self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)
            return 0
        given_up = count_in(self._waiting.values())
        self._waiting, self._came_at_s = {}, {}
        self._retry_s, self._retry_at_s, self.failing_since_s = FIRST_RETRY_S, 0.0, None
        return given_up
