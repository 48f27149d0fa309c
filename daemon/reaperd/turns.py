"""Whose request is answered next: users take turns, and each pays with the time that its requests cost the core. Pure.

Nobody's requests may keep the core from another's: one that is dear is followed by another user's, and who has used up its
share waits. Only a user who asks for far more than is answered is told so.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

_MAX_ACCOUNTS = 1000


class Share(NamedTuple):
    """How much of the core's time a user may take: ``per_s`` of each second, and so much that was not used before."""

    per_s: float
    saved_s: float


ORDINARY = Share(0.2, 1.0)
GENEROUS = Share(0.8, 5.0)


class _Account(NamedTuple):
    """What a user has left; less than nothing after a request that cost more."""

    left_s: float
    at_s: float


class Turns(Generic[T]):
    """The requests that wait, by uid."""

    def __init__(self, generous: frozenset[int], most: int) -> None:
        """``most`` requests may wait; a quarter of them may be one user's, and beyond that everybody may have one.

        Many sessions of one user begin together, where a queue system starts them. But each request keeps a descriptor.
        """
        self._generous = generous
        self._most = most
        self._waiting: dict[int, collections.deque[T]] = {}  # whose turn is next comes first
        self._count = 0
        self._accounts: dict[int, _Account] = {}

    def add(self, uid: int, request: T) -> bool:
        """Let a request wait for its turn; False where too many of its user's, or in all, wait already."""
        queue = self._waiting.get(uid)
        if queue is not None and (len(queue) >= max(1, self._most // 4) or self._count >= self._most):
            return False
        if self._count >= 2 * self._most:
            return False
        self._waiting.setdefault(uid, collections.deque()).append(request)
        self._count += 1
        return True

    def is_generous(self, uid: int) -> bool:
        """Say whether ``uid`` may take more than others."""
        return uid in self._generous

    def take(self, now_s: float) -> T | None:
        """Return the request whose turn it is, None where nobody who waits has anything left."""
        for uid, queue in self._waiting.items():
            if self._left_s(uid, now_s) > 0:
                del self._waiting[uid]
                request = queue.popleft()
                self._count -= 1
                if queue:
                    self._waiting[uid] = queue
                return request
        return None

    def charge(self, uid: int, cost_s: float, now_s: float) -> None:
        """Take what a request has cost from its user's account."""
        left_s = self._left_s(uid, now_s) - cost_s
        self._accounts[uid] = _Account(left_s, now_s)
        if len(self._accounts) > _MAX_ACCOUNTS:
            self._close_full_accounts(now_s)

    def next_at_s(self, now_s: float) -> float | None:
        """Return when somebody who waits has something left, None where nobody waits."""
        return min((now_s + self._lacks_s(uid, now_s) for uid in self._waiting), default=None)

    def drain(self) -> Iterator[T]:
        """Yield all that wait, who do so no longer."""
        waiting, self._waiting, self._count = self._waiting, {}, 0
        for queue in waiting.values():
            yield from queue

    def _share(self, uid: int) -> Share:
        return GENEROUS if uid in self._generous else ORDINARY

    def _left_s(self, uid: int, now_s: float) -> float:
        share, account = self._share(uid), self._accounts.get(uid)
        if account is None:
            return share.saved_s
        return min(share.saved_s, account.left_s + (now_s - account.at_s) * share.per_s)

    def _lacks_s(self, uid: int, now_s: float) -> float:
        """Return how long it takes until ``uid`` has something left: a millisecond's worth, not nothing and a bit."""
        left_s = self._left_s(uid, now_s)
        return 0.0 if left_s > 0 else (0.001 - left_s) / self._share(uid).per_s

    def _close_full_accounts(self, now_s: float) -> None:
        self._accounts = {
            uid: account
            for uid, account in self._accounts.items()
            if self._left_s(uid, now_s) < self._share(uid).saved_s
        }
