"""The leaders: a pidfd of each that lives, its session page, and what of that page the session goes by."""

from __future__ import annotations

import contextlib
import os

from agent import wire
from reaperd import ledger, pages
from reaperd.linux import pidfd
from reaperd.linux.page import OpenPage
from reaperd.model import SessionKey
from reaperd.observer import Observer
from reaperd.sessions import Sessions


class Leaders:
    """Holds what is open of them, by session."""

    def __init__(self, sessions: Sessions, observer: Observer) -> None:
        self._sessions = sessions
        self._observer = observer
        self._handles: dict[SessionKey, int] = {}  # pidfds
        self._pages: dict[SessionKey, OpenPage] = {}
        self._named: dict[SessionKey, tuple[tuple[int, int], ...]] = {}  # as spared, when last looked at

    def hold(self, key: SessionKey, handle: int | None, opened: OpenPage | None) -> None:
        """Hold the pidfd and the page of a session's leader; what is open is ours."""
        if handle is not None:
            self._handles[key] = handle
        if opened is not None:
            self._pages[key] = opened

    def handle(self, key: SessionKey) -> int | None:
        """Return the pidfd of a leader, None where it was dead when the session was taken on."""
        return self._handles.get(key)

    def is_dead(self, key: SessionKey) -> bool:
        """Say whether a leader is dead, though nobody may have taken note yet."""
        return key not in self._handles or pidfd.has_exited(self._handles[key])

    def read_page(self, key: SessionKey) -> int:
        """Take from the page what only the leader knows, and return its flags."""
        told = self.page_of(key)
        if told is None:
            return 0
        session = self._sessions.entries[key].session
        if told.flags & wire.ENDED and not session.ending:
            self._sessions.apply(key, ledger.Unregistered())
        if told.spared != self._named.get(key, ()):
            self._named[key] = told.spared
            self._sessions.apply(key, ledger.Spared(self._observer.named_by(session, told.spared)))
        return told.flags

    def page_of(self, key: SessionKey) -> pages.Page | None:
        """Return what a session's page says now, None where it has none or says nonsense."""
        opened = self._pages.get(key)
        if opened is not None:
            with contextlib.suppress(wire.WireError, OSError):
                try:
                    return opened.read()
                except pages.TornPage:
                    return opened.read(writer_is_dead=self.is_dead(key))
        return None

    def forget(self, key: SessionKey) -> None:
        """Close what is open of one."""
        self._named.pop(key, None)
        handle = self._handles.pop(key, None)
        if handle is not None:
            os.close(handle)
        opened = self._pages.pop(key, None)
        if opened is not None:
            opened.close()

    def close(self) -> None:
        """Close what is open of all."""
        for key in {*self._handles, *self._pages}:
            self.forget(key)
