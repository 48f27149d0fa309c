"""Pidfds of members that only descent tells, while their leader lives: a pid that changed hands tells nothing any more."""

from __future__ import annotations

import contextlib
import os
import resource
import select
from collections import Counter

from reaperd.linux import pidfd
from reaperd.linux.procfs import ProcessGone, ProcFS
from reaperd.model import ProcessId, SessionKey


class Kept:
    """Holds one pidfd for each, whatever the number of sessions that keep it; asked all at once who is dead.

    One user has a share of what may be open. Those beyond it are compared by their start times alone.
    """

    def __init__(self, proc: ProcFS) -> None:
        self._proc = proc
        self._most_of_one = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 32
        self._most = self._most_of_one * 4
        self._uids: dict[ProcessId, int] = {}
        self._of_uid: Counter[int] = Counter()
        self._epoll = select.epoll()  # never waited on: that a worker ended is no reason to wake up
        self._pidfds: dict[ProcessId, int] = {}
        self._ids: dict[int, ProcessId] = {}
        self._of: dict[SessionKey, frozenset[ProcessId]] = {}
        self._count: Counter[ProcessId] = Counter()

    def hold(self, key: SessionKey, members: frozenset[ProcessId]) -> None:
        """Hold ``members``, and no longer those of this session that are not among them."""
        before = self._of.get(key, frozenset())
        if members == before:
            return
        self._of[key] = members
        self._count.update(members - before)
        for id_ in members - before:
            if id_ not in self._pidfds and self._has_room(key.uid):
                with contextlib.suppress(ProcessGone, OSError):
                    self._take(id_, pidfd.open_pidfd(id_, self._proc), key.uid)
        for id_ in before - members:
            self._count[id_] -= 1
            if not self._count[id_]:
                del self._count[id_]
                self._release(id_)
        if not members:
            del self._of[key]

    def _has_room(self, uid: int) -> bool:
        return len(self._pidfds) < self._most and self._of_uid[uid] < self._most_of_one

    def _take(self, id_: ProcessId, handle: int, uid: int) -> None:
        self._pidfds[id_] = handle
        self._uids[id_] = uid
        self._of_uid[uid] += 1
        self._ids[handle] = id_
        self._epoll.register(handle, select.EPOLLIN)

    def _release(self, id_: ProcessId) -> None:
        handle = self._pidfds.pop(id_, None)
        if handle is not None:
            del self._ids[handle]
            self._of_uid[self._uids.pop(id_)] -= 1
            self._epoll.unregister(handle)
            os.close(handle)

    def dead(self) -> frozenset[ProcessId]:
        """Return who of all has ended."""
        if not self._pidfds:
            return frozenset()
        return frozenset(self._ids[handle] for handle, _ in self._epoll.poll(0, len(self._pidfds)))

    def copy_handle(self, id_: ProcessId) -> int | None:
        """Return a pidfd of ``id_`` for the caller to close, None where none is held."""
        handle = self._pidfds.get(id_)
        return None if handle is None else os.dup(handle)
