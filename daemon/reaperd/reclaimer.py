"""What dead sessions hold by name: measured while their members live, then freed by helpers, each for one user."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from reaperd import reclaim
from reaperd.linux import helper, pidfd, shm
from reaperd.model import ProcessId, Session, SessionKey
from reaperd.observer import Observer
from reaperd.poller import Poller

log = logging.getLogger(__name__)

_RETRY_S = 1.0  # where processes have run out
_LONGEST_S = 30.0  # then a helper that hangs on a dead file system is ended
_MAX_AT_ONCE = 8


class _Run(NamedTuple):
    """A helper at work for one user."""

    helper: helper.Helper
    claims: list[reclaim.Claim]
    deadline_s: float


class Reclaimer:
    """Owns the helper processes that reclaim: one for each user, for a user's folders can make one wait or fail."""

    def __init__(
        self,
        poller: Poller,
        observer: Observer,
        on_done: Callable[[SessionKey, int], None],
        work: Callable[[list[reclaim.Claim], str], Callable[[], int]] = reclaim.reclaim_work,
    ) -> None:
        """``on_done`` is called with a session's key and the bytes of /dev/shm that the session holds still."""
        self._poller = poller
        self._observer = observer
        self._on_done = on_done
        self._work = work
        self._mapped: dict[SessionKey, frozenset[str]] = {}
        self._queue: dict[int, list[reclaim.Claim]] = {}  # by uid
        self._running: dict[int, _Run] = {}
        self._retry_at_s = 0.0

    @property
    def deadline_s(self) -> float | None:
        """When there is something to do though no helper has ended, None for never."""
        due = [run.deadline_s for run in self._running.values()]
        if self._retry_at_s and self._queue:
            due.append(self._retry_at_s)
        return min(due, default=None)

    def measure(self, session: Session, members: Iterable[ProcessId]) -> int:
        """Note which nameless segments ``members`` have mapped, while they can be asked; return the bytes held in all."""
        if shm.may_have_segments(session.uid):
            mapped = shm.segments_among(self._observer.shm_mapped(members), session.uid)
            self._mapped[session.key] = self._mapped.get(session.key, frozenset()) | mapped
        return shm.held_bytes(session.leader.pid, self._mapped.get(session.key, frozenset()), session.uid)

    def has_names(self, session: Session) -> bool:
        """Say whether there are names in /dev/shm that carry the leader's pid and are its user's."""
        return shm.has_names_of(session.leader.pid, session.uid)

    def ask(
        self, session: Session, until_epoch_s: float, last_word: reclaim.LastWord | None, *, frees: bool
    ) -> None:
        """Have the last word of ``session`` written, and what it held when its leader died freed, as soon as a helper is at hand."""
        mapped = self._mapped.pop(session.key, frozenset())
        claim = reclaim.Claim(session, mapped, until_epoch_s, last_word, frees)
        self._queue.setdefault(session.uid, []).append(claim)

    def has(self, key: SessionKey) -> bool:
        """Say whether what ``key`` held is being freed, or is yet to be."""
        claims = [*self._queue.get(key.uid, ())]
        if key.uid in self._running:
            claims += self._running[key.uid].claims
        return any(claim.session.key == key for claim in claims)

    def forget(self, key: SessionKey) -> None:
        """Nobody will ask for this session's any more."""
        self._mapped.pop(key, None)

    def step(self) -> bool:
        """Note helpers that are done and start the next; True when something was done."""
        now_s = time.monotonic()
        finished = [uid for uid, run in self._running.items() if self._is_over(run, now_s)]
        for uid in finished:
            self._finish(self._running.pop(uid))
        for uid in [uid for uid in self._queue if uid not in self._running]:
            if len(self._running) >= _MAX_AT_ONCE or now_s < self._retry_at_s:
                break
            self._start(uid, now_s)
        return bool(finished)

    def _start(self, uid: int, now_s: float) -> None:
        claims = self._queue[uid]
        try:
            started = helper.start_helper(self._work(claims, self._observer.proc.root))
        except (OSError, MemoryError) as error:
            log.warning("cannot start a helper: %s, trying again", error)
            self._retry_at_s = now_s + _RETRY_S
            return
        self._retry_at_s = 0.0
        del self._queue[uid]
        self._running[uid] = _Run(started, claims, now_s + _LONGEST_S)
        self._poller.watch(started.pidfd, lambda: None)

    def _is_over(self, run: _Run, now_s: float) -> bool:
        if pidfd.has_exited(run.helper.pidfd):
            return True
        if now_s < run.deadline_s:
            return False
        log.warning(
            "gave up reclaiming for uid=%d sessions=%d after %g s",
            run.claims[0].session.uid, len(run.claims), _LONGEST_S,
        )  # fmt: skip
        return True

    def _finish(self, run: _Run) -> None:
        freed_bytes = self._end(run)
        log.debug("freed by name bytes=%s sessions=%d", freed_bytes, len(run.claims))
        for claim in run.claims:
            session = claim.session
            self._on_done(session.key, shm.held_bytes(session.leader.pid, claim.mapped, session.uid))

    def _end(self, run: _Run) -> object:
        self._poller.unwatch(run.helper.pidfd)
        return helper.finish_helper(run.helper)

    def close(self) -> None:
        """End the helpers."""
        while self._running:
            self._end(self._running.popitem()[1])
