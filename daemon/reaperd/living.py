"""The sessions whose leaders live: who belongs to them, looked at from time to time so that nobody is lost at the end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from reaperd import decide, ledger
from reaperd.kept import Kept
from reaperd.leaders import Leaders
from reaperd.model import Family, ProcessId, Session, SessionKey, Snapshot
from reaperd.observer import Observer
from reaperd.sessions import Sessions


class Living:
    """Looks at them."""

    def __init__(self, sessions: Sessions, observer: Observer, leaders: Leaders, kept: Kept) -> None:
        self._sessions = sessions
        self._observer = observer
        self._leaders = leaders
        self._kept = kept
        # What a session was last judged by: the observer's count of changes, and the session.
        self._judged: dict[SessionKey, tuple[int, Session]] = {}

    def look(self, only: Iterable[SessionKey] | None = None) -> dict[SessionKey, Family]:
        """Look who belongs to the sessions whose leaders live (``only`` some), and keep in mind whom only descent tells.

        Raises Interrupted where another leader dies meanwhile.
        """
        return self._sessions.aside.together(self._living(only), self._look_at, "look at the members")

    def scan(self, listing: dict[int, int]) -> None:
        """Look at all living leaders' sessions, at what has changed alone; ``listing`` is of all processes.

        Raises Interrupted where a leader dies meanwhile.
        """
        keys = self._living(None)
        if keys:
            self._observer.census.read_new(listing)
        self._sessions.aside.together(
            keys,
            lambda some: self._look_at(some, listing, changed_only=True),
            "look at the members",
        )
        entries = (self._sessions.entries[key] for key in keys if key in self._sessions.entries)
        seen = (id_ for entry in entries for id_ in (entry.session.leader, *entry.session.seen))
        processes = (self._observer.census.known.processes.get(id_.pid) for id_ in seen)
        self._observer.usage.note(process for process in processes if process is not None)
        if all(entry.died_at_s is None for entry in self._sessions.entries.values()):
            self._observer.marks.memory.close()  # nobody needs it before the next scan

    def look_below(self, key: SessionKey) -> None:
        """Take in whom a leader has started before its session was taken on."""
        session = self._sessions.entries[key].session
        below = self._observer.census.look_below(session)
        if below.processes or session.kept or session.seen:
            family = decide.judge(session, below, self._sessions.policy)
            # Workers that stand elsewhere are found by the looks that follow.
            self._sessions.apply(key, ledger.Looked(family, time.monotonic(), 0.0, complete=False))
            self._kept.hold(key, self._sessions.entries[key].session.kept)

    def lose_dead(self, key: SessionKey, dead: frozenset[ProcessId]) -> None:
        """Forget members whose pidfd says that they are dead: their pid may be somebody else's."""
        lost = dead & self._sessions.entries[key].session.kept
        if lost:
            self._sessions.apply(key, ledger.MembersLost(lost))
            self._kept.hold(key, self._sessions.entries[key].session.kept)

    def judge_anew(self) -> None:
        """Judge all of them anew at the next scan: the rules have changed."""
        self._judged.clear()

    def forget(self, key: SessionKey) -> None:
        """The session is no more."""
        self._judged.pop(key, None)

    def _living(self, only: Iterable[SessionKey] | None) -> list[SessionKey]:
        return [
            key
            for key in (self._sessions.entries if only is None else only)
            if self._sessions.entries[key].died_at_s is None and self._sessions.aside.until_s(key) is None
        ]

    def _look_at(
        self, keys: Sequence[SessionKey], listing: dict[int, int] | None = None, *, changed_only: bool = False
    ) -> dict[SessionKey, Family]:
        """Return who belongs to the sessions; ``changed_only``: where that may be others than the last time."""
        dead = self._kept.dead()
        for key in keys:
            self.lose_dead(key, dead)
            self._leaders.read_page(key)
        sessions = [self._sessions.entries[key].session for key in keys]
        members = [id_ for session in sessions for id_ in (session.leader, *session.seen, *session.kept)]
        snapshot = self._observer.census.look(sessions, hold=False, again=members, listing=listing)
        # Whose pidfd says that it is dead, and who is there all the same, is another process with the same pid and tick.
        reused = frozenset(filter(self._observer.proc.is_alive, self._kept.dead()))
        families = {}
        oom_kills: dict[str, int | None] = {}
        for key in keys:
            if self._leaders.is_dead(key):
                continue  # its pid, too, may be another's
            self.lose_dead(key, reused)
            if not (changed_only and self._is_unchanged(key)):
                families[key] = self._judge_living(key, snapshot, for_scan=changed_only)
            self._refresh_oom(key, oom_kills)
        return families

    def _judge_living(self, key: SessionKey, snapshot: Snapshot, *, for_scan: bool) -> Family:
        """Take in who belongs to a living leader's session; scans alone are far enough apart to say that nobody does."""
        session = self._sessions.entries[key].session
        family = decide.judge(session, snapshot, self._sessions.policy)
        whole = session.uid not in {*snapshot.unread.values(), *snapshot.vanished}
        self._sessions.apply(key, ledger.Looked(family, time.monotonic(), 0.0, complete=whole and for_scan))
        session = self._sessions.entries[key].session
        self._kept.hold(key, session.kept)
        if whole:
            self._judged[key] = self._observer.census.known.changes, session
        return family

    def _is_unchanged(self, key: SessionKey) -> bool:
        """Say whether judging a session anew can tell nothing that it did not tell the last time."""
        changes, session = self._judged.get(key, (-1, None))
        now = self._sessions.entries[key].session
        return changes == self._observer.census.known.changes and session is now and not now.ending

    def _refresh_oom(self, key: SessionKey, read: dict[str, int | None]) -> None:
        """Take the counter as it stands while the leader lives: whoever was killed so far, it was not the leader.

        The kernel counts, then kills, and who is killed may take seconds to free its memory: a leader that is
        condemned may be the one that was counted. ``read`` has the counters that were read for others already.
        """
        session = self._sessions.entries[key].session
        if session.oom_counter not in read:
            read[session.oom_counter] = self._observer.oom_kills_in(session)
        count = read[session.oom_counter]
        if count != session.oom_kills and not self._observer.is_condemned(session.leader.pid):
            self._sessions.apply(key, ledger.OomCounted(count))
