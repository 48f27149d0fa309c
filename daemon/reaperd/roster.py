"""All sessions on record: found by id, by leader and by uid, and picked out when something is to be done for them.

What happens to one session must not cost what all of them cost: two thousand can be on record.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping

from reaperd.ledger import Entry
from reaperd.model import ProcessId, SessionKey


class Roster:
    """Sessions by key; ``deadline_of`` tells when something is due for one at the latest, None for never."""

    def __init__(self, deadline_of: Callable[[Entry], float | None]) -> None:
        self._deadline_of = deadline_of
        self._entries: dict[SessionKey, Entry] = {}
        self._by_leader: dict[ProcessId, set[SessionKey]] = {}
        self._by_uid: Counter[int] = Counter()
        self._changed: dict[SessionKey, None] = {}  # in order
        self._due_s: dict[SessionKey, float] = {}
        self._queue: list[tuple[float, SessionKey]] = []  # with leftovers of earlier deadlines

    @property
    def entries(self) -> Mapping[SessionKey, Entry]:
        """All of them, the oldest first."""
        return self._entries

    def put(self, entry: Entry) -> None:
        """Take a session on, or what it has become."""
        session = entry.session
        if session.key not in self._entries:
            self._by_leader.setdefault(session.leader, set()).add(session.key)
            self._by_uid[session.uid] += 1
        self._entries[session.key] = entry
        self._changed[session.key] = None

    def remove(self, key: SessionKey) -> Entry:
        """Take a session off."""
        entry = self._entries.pop(key)
        session = entry.session
        ids = self._by_leader[session.leader]
        ids.discard(key)
        if not ids:
            del self._by_leader[session.leader]
        self._by_uid[session.uid] -= 1
        if not self._by_uid[session.uid]:
            del self._by_uid[session.uid]
        self._changed.pop(key, None)
        self._due_s.pop(key, None)
        return entry

    def count_of(self, uid: int) -> int:
        """Return how many sessions ``uid`` has."""
        return self._by_uid[uid]

    def led_by(self, leader: ProcessId) -> list[Entry]:
        """Return the sessions of one leader."""
        return [self._entries[key] for key in self._by_leader.get(leader, ())]

    def touch(self) -> None:
        """Have all of them looked through: the rules have changed."""
        self._changed.update(dict.fromkeys(self._entries))

    def take_due(self, now_s: float) -> list[Entry]:
        """Return those that have changed since the last time, or whose time has come; the oldest change first."""
        while self._queue and self._queue[0][0] <= now_s:
            due_s, key = heapq.heappop(self._queue)
            if self._due_s.get(key) == due_s:
                self._changed[key] = None
        changed, self._changed = self._changed, {}
        entries = [self._entries[key] for key in changed if key in self._entries]
        for entry in entries:
            key, due = entry.session.key, self._deadline_of(entry)
            if due is None:
                self._due_s.pop(key, None)
            elif self._due_s.get(key) != due or due <= now_s:
                self._due_s[key] = due
                heapq.heappush(self._queue, (due, key))
        return entries

    def next_deadline(self) -> float | None:
        """Return the earliest monotonic second at which something is due, None when nothing is."""
        if self._changed:
            return 0.0
        while self._queue and self._due_s.get(self._queue[0][1]) != self._queue[0][0]:
            heapq.heappop(self._queue)
        return self._queue[0][0] if self._queue else None
