"""Whom to look for: whoever can belong to a session that we know of, by uid and age, and the pages that tell of one."""

from __future__ import annotations

from reaperd.marks import Pages
from reaperd.model import ProcessId, Session, SessionKey


class Coverage:
    """The sessions that processes are read for."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._sessions: dict[SessionKey, Session] = {}
        self._oldest: dict[int, int] = {}  # the start ticks of each uid's first leader

    def __contains__(self, key: SessionKey) -> bool:
        return key in self._sessions

    def add(self, session: Session) -> bool:
        """Look for the processes of ``session``, too; say whether older ones of its user matter than did before."""
        self._sessions[session.key] = session
        if session.page_inode is not None:
            self._pages.add(session.page_inode, session.page_fd, session.key)
        ticks = session.leader.start_ticks
        lowers = ticks < self._oldest.get(session.uid, ticks + 1)
        if lowers:
            self._oldest[session.uid] = ticks
        return lowers

    def remove(self, key: SessionKey) -> None:
        """Look no longer for the page of a session; for its processes until ``narrow()``."""
        session = self._sessions.pop(key, None)
        if session is not None and session.page_inode is not None:
            self._pages.remove(session.page_inode, session.page_fd)

    def narrow(self) -> bool:
        """Look for the processes of those that are left alone; say whether that may be fewer."""
        oldest: dict[int, int] = {}
        for session in self._sessions.values():
            ticks = session.leader.start_ticks
            oldest[session.uid] = min(ticks, oldest.get(session.uid, ticks))
        before, self._oldest = self._oldest, oldest
        return oldest != before

    @property
    def first_ticks(self) -> int | None:
        """When the first of all leaders started; None: there is no session."""
        return min(self._oldest.values(), default=None)

    def can_belong(self, uid: int | None, id_: ProcessId) -> bool:
        """Say whether a process of ``uid`` can belong to some session: by uid and age."""
        oldest = self._oldest.get(uid) if uid is not None else None
        return oldest is not None and oldest <= id_.start_ticks
