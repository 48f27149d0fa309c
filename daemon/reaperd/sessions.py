"""All sessions and what has become of each: applied, put on record, told of. Looks at no process, and signals nobody."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from reaperd import ledger
from reaperd.aside import Aside
from reaperd.ledger import Entry, Happening
from reaperd.model import ProcessId, Session, SessionKey
from reaperd.policy import Policy
from reaperd.roster import Roster
from reaperd.store import Store
from reaperd.times import now_utc
from reaperd.waiters import News

_OURS = 40  # descriptors, that the daemon has open or needs for a look
_FEW = 8  # sessions, which a user may have though all others have taken what there is


class Sessions:
    """The sessions by key, and the rules in force."""

    def __init__(self, store: Store, policy: Policy) -> None:
        self.policy = policy
        # Each takes two descriptors as long as it lives, and some must be left to end those of the dead by.
        self.most = max(1, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OURS) // 4)
        self.aside = Aside()
        self.listeners: list[Callable[[News], None]] = []  # called with each event once it is recorded
        self._store = store
        self._roster = Roster(self._deadline_of)
        self._unsaved: dict[SessionKey, None] = {}

    @property
    def entries(self) -> Mapping[SessionKey, Entry]:
        """All sessions on record."""
        return self._roster.entries

    def heed(self, policy: Policy) -> None:
        """Go by other rules from now on."""
        self.policy = policy
        self.touch()

    def touch(self) -> None:
        """Look anew what is due for each."""
        self._roster.touch()

    def add(self, session: Session) -> None:
        """Take a session on."""
        self._roster.put(Entry(session))
        self._unsaved[session.key] = None

    def remove(self, key: SessionKey) -> Entry:
        """Take a session off; what is on record of it stays."""
        entry = self._roster.remove(key)
        self._unsaved.pop(key, None)
        self.aside.forget(key)
        return entry

    def has_no_room_for(self, uid: int) -> bool:
        """Say whether ``uid`` has as many sessions as one user may have, or all users have as many as there can be."""
        count, in_all = self._roster.count_of(uid), len(self.entries)
        if count >= self.policy.max_per_uid:
            return True
        return in_all >= self.most and (count >= _FEW or in_all >= self.most + self.most // 4)

    def led_by(self, leader: ProcessId) -> list[Entry]:
        """Return the sessions that ``leader`` leads: it can have many pages, and lead but one session."""
        return [entry for entry in self._roster.led_by(leader) if not entry.session.ending]

    def apply(self, key: SessionKey, happening: Happening) -> None:
        """Take in what has happened to a session."""
        before = self.entries[key]
        after = ledger.apply(before, happening)
        self._roster.put(after)
        if after.session != before.session:
            self._unsaved[key] = None

    @contextlib.contextmanager
    def trying(self, key: SessionKey, what: str, *, tell_exhaustion: bool = False) -> Iterator[None]:
        """Set a session aside where the block raises anything, and look what is due for it later."""
        with self.aside.trying(key, what, tell_exhaustion=tell_exhaustion):
            yield
        if self.aside.until_s(key) is not None and key in self.entries:
            self._roster.put(self.entries[key])

    # -- what is due -------------------------------------------------------------------------

    def take_due(self, now_s: float) -> list[Entry]:
        """Return those that something may be due for, and that are not set aside."""
        return [one for one in self._roster.take_due(now_s) if self.aside.until_s(one.session.key) is None]

    def next_deadline(self) -> float | None:
        """Return the monotonic second at which something is due for one of them, None when nothing is."""
        return self._roster.next_deadline()

    def _deadline_of(self, entry: Entry) -> float | None:
        aside_until_s = self.aside.until_s(entry.session.key)
        return aside_until_s or ledger.deadline(entry, self.policy.tracker_grace_s)

    # -- the record --------------------------------------------------------------------------

    def record(self, event: dict[str, Any]) -> None:
        """Put an event into the history and tell of it."""
        event, at_epoch_s = {"at": now_utc(), **event}, time.time()
        news = News(self._store.add_event(event, at_epoch_s), at_epoch_s, event)
        for hear in self.listeners:
            hear(news)

    def save(self) -> None:
        """Put on record what has changed: before we wait, and after all that others wait for."""
        unsaved, self._unsaved = self._unsaved, {}
        for key in unsaved:
            if key in self.entries:
                with self.trying(key, "keep the record"):
                    self._store.save(self.entries[key].session)
        if not self._store.commit():
            self._unsaved = unsaved | self._unsaved

    def put_on_record(self, key: SessionKey) -> None:
        """Put one session on record at once: whoever is told that it is taken on relies on it, however we end."""
        with self.trying(key, "keep the record"):
            self._store.save(self.entries[key].session)
        if self._store.commit():
            self._unsaved.pop(key, None)
