"""Peers that wait for events: told of those that happen, from memory, and never by asking the history again. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from reaperd.questions import Question

T = TypeVar("T")

MAX_OF_ONE, MAX_OF_ALL = 64, 1024


class News(NamedTuple):
    """An event that has just been recorded."""

    seq: int
    at_epoch_s: float
    event: dict[str, Any]


class Waiter(Generic[T]):
    """A peer with a question, that is answered at ``to``."""

    __slots__ = ("question", "to", "uid", "until_s")

    def __init__(self, to: T, uid: int, question: Question, until_s: float) -> None:
        self.to, self.uid, self.question, self.until_s = to, uid, question, until_s


# What tells who may be meant by an event: most wait for other sessions' and other users'.
_Key = tuple[str | None, int | None]


class Waiters(Generic[T]):
    """All who wait."""

    def __init__(self) -> None:
        self._waiting: dict[_Key, list[Waiter[T]]] = {}
        self._of: Counter[int] = Counter()
        self._news: list[News] = []
        self._next_s: float | None = None  # at the latest: whoever has been answered may have been the one

    def may_wait(self, uid: int) -> bool:
        """Say whether there is room for one more of ``uid``."""
        return self._of[uid] < MAX_OF_ONE and self._of.total() < MAX_OF_ALL

    def add(self, waiter: Waiter[T]) -> None:
        """Let somebody wait for what happens from now on."""
        self._waiting.setdefault((waiter.question.session, waiter.question.uid), []).append(waiter)
        self._of[waiter.uid] += 1
        if self._next_s is None or waiter.until_s < self._next_s:
            self._next_s = waiter.until_s

    def note(self, news: News) -> None:
        """Note an event; who waits for it is told by ``take``."""
        if self._of:
            self._news.append(news)

    def has_news(self) -> bool:
        """Say whether something has happened since the last ``take``."""
        return bool(self._news)

    def next_deadline(self) -> float | None:
        """Return when somebody may have waited long enough."""
        return self._next_s

    def take(self, now_s: float) -> list[tuple[T, tuple[News, ...]]]:
        """Return whom to answer with which news: for what they waited, or none where they have waited long enough."""
        news, self._news = self._news, []
        answers: list[tuple[T, tuple[News, ...]]] = []
        for key, told in self._news_by_key(news).items():
            answers += self._tell(key, told, now_s)
        if self._next_s is not None and self._next_s <= now_s:
            for key in list(self._waiting):
                answers += self._tell(key, [], now_s)
            left = (waiter.until_s for waiting in self._waiting.values() for waiter in waiting)
            self._next_s = min(left, default=None)
        return answers

    def _news_by_key(self, news: list[News]) -> dict[_Key, list[News]]:
        found: dict[_Key, list[News]] = {}
        for one in news:
            session, uid = one.event["session"], one.event["uid"]
            if uid is None:
                keys: set[_Key] = set(self._waiting)  # it is everybody's, and rare
            else:
                keys = {(None, None), (None, uid), (session, None), (session, uid)} & self._waiting.keys()
            for key in keys:
                found.setdefault(key, []).append(one)
        return found

    def _tell(self, key: _Key, news: list[News], now_s: float) -> Iterator[tuple[T, tuple[News, ...]]]:
        left = []
        for waiter in self._waiting.pop(key, ()):
            told = tuple(one for one in news if waiter.question.covers(*one))
            if told or waiter.until_s <= now_s:
                self._of[waiter.uid] -= 1
                if not self._of[waiter.uid]:
                    del self._of[waiter.uid]
                yield waiter.to, told
            else:
                left.append(waiter)
        if left:
            self._waiting[key] = left
