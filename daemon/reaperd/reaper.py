"""The only place that signals anyone but our own helpers, always through a pidfd, and the owner of the pidfds of those who are to be ended."""

from __future__ import annotations

import enum
import logging
import os
import resource

from reaperd.linux import pidfd
from reaperd.linux.procfs import ProcessGone, ProcFS
from reaperd.model import ProcessId

log = logging.getLogger(__name__)


class Outcome(enum.Enum):
    """What became of a signal."""

    SENT = "sent"
    GONE = "gone"
    DENIED = "denied"


class Reaper:
    """Holds a pidfd for every process that is to be ended until it is gone."""

    def __init__(self, proc: ProcFS, untouchable: frozenset[ProcessId]) -> None:
        self._proc = proc
        self._untouchable = untouchable
        self._pidfds: dict[ProcessId, int] = {}
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2

    def take(self, target: ProcessId, handle: int | None) -> int | None:
        """Own a pidfd of ``target`` (``handle``, or one opened here) and return it; None when it is gone already."""
        if target in self._pidfds:
            if handle is not None:
                os.close(handle)
            return self._pidfds[target]
        if handle is None:
            try:
                handle = pidfd.open_pidfd(target, self._proc)
            except ProcessGone:
                return None
        self._pidfds[target] = handle
        return handle

    def is_full(self) -> bool:
        """Say whether no more processes can be held: some descriptors must be left for looking at them."""
        return len(self._pidfds) >= self._most

    def holds(self, target: ProcessId) -> bool:
        """Say whether ``target`` is held."""
        return target in self._pidfds

    def has_ended(self, target: ProcessId) -> bool:
        """Say whether ``target``, which was taken once, is dead."""
        handle = self._pidfds.get(target)
        return handle is None or pidfd.has_exited(handle)

    def handle(self, target: ProcessId) -> int:
        """Return the pidfd of ``target``, which must be held."""
        return self._pidfds[target]

    def send(self, target: ProcessId, number: int) -> Outcome:
        """Send a signal to ``target``; whoever is untouchable is refused here too, whatever was decided."""
        if target in self._untouchable or target.pid <= 1:
            log.error("refused to signal pid=%d: it must never be touched", target.pid)
            return Outcome.DENIED
        handle = self._pidfds.get(target)
        if handle is None:
            return Outcome.GONE
        try:
            pidfd.send_signal(handle, number)
        except ProcessGone:
            return Outcome.GONE
        except PermissionError:
            return Outcome.DENIED
        return Outcome.SENT

    def drop(self, target: ProcessId) -> None:
        """Close the pidfd of ``target``."""
        os.close(self._pidfds.pop(target))
