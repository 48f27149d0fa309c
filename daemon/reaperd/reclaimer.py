"""What dead sessions hold by name: measured while their members live, then freed by one helper at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from reaperd import reclaim
from reaperd.linux import helper, pidfd, shm
from reaperd.model import ProcessId, Session
from reaperd.observer import Observer
from reaperd.poller import Poller

log = logging.getLogger(__name__)

_RETRY_S = 1.0  # where processes have run out
_LONGEST_S = 30.0  # then a helper that hangs on a dead file system is ended


class Reclaimer:
    """Owns the helper process that reclaims."""

    def __init__(self, poller: Poller, observer: Observer, on_done: Callable[[str, int], None]) -> None:
        """``on_done`` is called with a session id and the bytes of /dev/shm that the session holds still."""
        self._poller = poller
        self._observer = observer
        self._on_done = on_done
        self._mapped: dict[str, frozenset[str]] = {}
        self._queue: list[reclaim.Claim] = []
        self._claims: list[reclaim.Claim] = []
        self._helper: helper.Helper | None = None
        self.deadline_s: float | None = None
        self._retry_at_s = 0.0

    def measure(self, session: Session, members: Iterable[ProcessId]) -> int:
        """Note which nameless segments ``members`` have mapped, while they can be asked; return the bytes held in all."""
        names = shm.shared_names(session.uid)
        for id_ in members if names else ():
            mapped = shm.mapped_names(self._observer.marks.mapped_paths(id_.pid), names)
            self._mapped[session.id] = self._mapped.get(session.id, frozenset()) | mapped
        return shm.held_bytes(session.leader.pid, self._mapped.get(session.id, frozenset()), session.uid)

    def ask(self, session: Session, until_epoch_s: float) -> None:
        """Have what ``session`` held when its leader died freed as soon as a helper is at hand."""
        self._queue.append(reclaim.Claim(session, self._mapped.pop(session.id, frozenset()), until_epoch_s))

    def step(self) -> bool:
        """Note a helper that is done and start the next; True when something was done."""
        finished = self._finish()
        if self._helper is None and self._queue and time.monotonic() >= self._retry_at_s:
            self._start()
        return finished

    def _start(self) -> None:
        try:
            self._helper = helper.start_helper(reclaim.reclaim_work(self._queue, self._observer.proc.root))
        except OSError as error:
            log.warning("cannot start a helper: %s, trying again", error.strerror)
            self.deadline_s = self._retry_at_s = time.monotonic() + _RETRY_S
            return
        self._claims, self._queue = self._queue, []
        self.deadline_s = time.monotonic() + _LONGEST_S
        self._poller.watch(self._helper.pidfd, lambda: None)

    def _finish(self) -> bool:
        if self._helper is None or self.deadline_s is None:
            return False
        if not pidfd.has_exited(self._helper.pidfd):
            if time.monotonic() < self.deadline_s:
                return False
            log.warning("gave up reclaiming for %d sessions after %g s", len(self._claims), _LONGEST_S)
        freed_bytes = self.close()
        log.debug("freed by name bytes=%s sessions=%d", freed_bytes, len(self._claims))
        claims, self._claims = self._claims, []
        for claim in claims:
            session = claim.session
            self._on_done(session.id, shm.held_bytes(session.leader.pid, claim.mapped, session.uid))
        return True

    def close(self) -> object:
        """End the helper and return its result."""
        result = None
        if self._helper is not None:
            self._poller.unwatch(self._helper.pidfd)
            result = helper.finish_helper(self._helper)
        self._helper = self.deadline_s = None
        return result
