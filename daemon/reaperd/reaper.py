"""The only place that signals anyone but our own helpers, and the owner of the pidfds of those who are to be ended.

Through such a pidfd always, or through a control group in which nobody else is.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import resource
import time
from collections.abc import Collection

from reaperd.linux import pidfd
from reaperd.linux.cgroups import CGroups, is_gone
from reaperd.linux.exhaustion import is_exhaustion
from reaperd.linux.procfs import ProcessGone, ProcFS
from reaperd.model import ProcessId

log = logging.getLogger(__name__)

_FREEZES_WITHIN_S = 0.01  # all groups of one look together
_THAW_AGAIN_S = 0.05


class Outcome(enum.Enum):
    """What became of a signal."""

    SENT = "sent"
    GONE = "gone"
    DENIED = "denied"


class Reaper:
    """Holds a pidfd for every process that is to be ended until it is gone."""

    def __init__(
        self, proc: ProcFS, untouchable: frozenset[ProcessId], cgroups: CGroups | None = None
    ) -> None:
        self._proc = proc
        self._cgroups = cgroups or CGroups()
        self._untouchable = untouchable
        self._pidfds: dict[ProcessId, int] = {}
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._frozen: set[str] = set()  # the control groups that are to be thawed yet
        self.thaw_due_s: float | None = None  # when ``thaw_late()`` is to be called

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

    def hold_still(self, cgroups: Collection[str]) -> None:
        """Freeze all in control groups of sessions' own, as far as that can be done: nobody in them forks any more.

        Who is in state D holds still anyway: he is not waited for.
        """
        frozen = []
        for one in cgroups:
            try:
                self._cgroups.freeze(one)
                self._frozen.add(one)
                frozen.append(one)
            except OSError as error:  # it is gone with the last in it
                log.debug("cannot freeze cgroup %r: %s", one, error.strerror)
        until_s = time.monotonic() + _FREEZES_WITHIN_S
        for one in frozen:
            with contextlib.suppress(OSError):
                if not self._cgroups.wait_frozen(one, until_s):
                    log.debug("not all of cgroup %r hold still", one)

    def let_go_on(self, cgroup: str) -> None:
        """Thaw all in a control group; where that fails, whoever we have frozen there is thawed later."""
        try:
            self._cgroups.thaw(cgroup)
        except OSError as error:
            # It is gone with the last in it, or is not ours: that is all the same. Descriptors may have run out, too.
            if not is_gone(error) and (cgroup in self._frozen or is_exhaustion(error)):
                if self.thaw_due_s is None:
                    log.warning("cannot thaw cgroup %r: %s, trying again", cgroup, error.strerror)
                self._frozen.add(cgroup)
                self.thaw_due_s = time.monotonic() + _THAW_AGAIN_S
                return
            log.debug("cannot thaw cgroup %r: %s", cgroup, error.strerror)
        self._frozen.discard(cgroup)

    def thaw_late(self, now_s: float) -> None:
        """Thaw who could not be thawed when it was due: whoever was spared in there must not hold still for ever."""
        if self.thaw_due_s is None or now_s < self.thaw_due_s:
            return
        for one in tuple(self._frozen):
            self.let_go_on(one)
        if not self._frozen:
            self.thaw_due_s = None

    def kill_all(self, cgroup: str, targets: Collection[ProcessId]) -> bool:
        """Send SIGKILL to all in a control group at once, and say whether that was done: none but ``targets`` may be in it.

        All in it hold still meanwhile, so nobody comes in between.
        """
        living = {one.pid for one in targets if one not in self._untouchable and not self.has_ended(one)}
        residents = self._cgroups.residents(cgroup)
        if not residents or not residents <= living:
            return False
        try:
            self._cgroups.kill(cgroup)
        except OSError:  # before Linux 5.14
            return False
        return True

    def drop(self, target: ProcessId) -> None:
        """Close the pidfd of ``target``."""
        os.close(self._pidfds.pop(target))
