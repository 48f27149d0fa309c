"""Workers that have lost their pool while their script lives: reported once, as the session asks for, and left alone.

The session ends them when it ends. Until then they are the script's business, which may have reasons.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from agent.strays import Stray, Watch
from reaperd import report
from reaperd.leaders import Leaders
from reaperd.linux.procfs import ProcessGone, ProcFS, Stat
from reaperd.model import ProcessId, Session, SessionKey
from reaperd.sessions import Sessions

log = logging.getLogger(__name__)


class _Watched:
    """What is known of one session."""

    def __init__(self, thresholds: tuple[float, float]) -> None:
        self.thresholds = thresholds
        self.watch = Watch(*thresholds)
        self.told: set[tuple[int, int]] = set()


class Strays:
    """Looks for them in the sessions that ask for it in their pages."""

    def __init__(
        self,
        sessions: Sessions,
        leaders: Leaders,
        proc: ProcFS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sessions = sessions
        self._leaders = leaders
        self._proc = proc
        self._clock = clock
        self._watched: dict[SessionKey, _Watched] = {}

    def look(self) -> None:
        """Look once, and record an event for each that has been one for long enough."""
        watched = {}
        for key, entry in self._sessions.entries.items():
            page = self._leaders.page_of(key) if entry.died_at_s is None and entry.session.seen else None
            if page is not None and page.stray is not None:
                known = self._watched.get(key)
                same = known is not None and known.thresholds == page.stray
                watched[key] = known if known is not None and same else _Watched(page.stray)
        self._watched = watched
        for key, one in watched.items():
            with self._sessions.trying(key, "look for strays"):
                self._look_at(self._sessions.entries[key].session, one)

    def _look_at(self, session: Session, one: _Watched) -> None:
        lost: dict[tuple[int, int], int] = {stat.id: stat.cpu_ticks for stat in self._orphaned(session)}
        found = one.watch.look(self._clock(), lost)
        for stray in found:
            if stray.id not in one.told:
                self._tell(session, stray)
        one.told = {id_ for id_ in (*one.told, *(stray.id for stray in found)) if id_ in lost}

    def _orphaned(self, session: Session) -> Iterable[Stat]:
        """Return those of the members that somebody above the leader has adopted."""
        adopters = {1, *(id_.pid for id_ in session.adopters)}
        for id_ in session.seen:
            try:
                stat = self._proc.stat(id_.pid)
            except ProcessGone:
                continue
            if stat.id == id_ and stat.ppid in adopters and not stat.dead:
                yield stat

    def _tell(self, session: Session, stray: Stray) -> None:
        id_ = ProcessId(*stray.id)
        log.warning(
            "stray pid=%d session=%s name=%r uid=%d: lost its pool %.0f s ago and uses %.0f %% of a core",
            id_.pid, session.id, session.name, session.uid, stray.seconds, stray.percent,
        )  # fmt: skip
        evidence = f"lost its pool {stray.seconds:.0f} s ago, and uses {stray.percent:.0f} % of a core"
        process: dict[str, Any] = {
            "pid": id_.pid,
            "start_ticks": id_.start_ticks,
            "signal": None,
            "signals": [],
            "result": "kept",
            "evidence": [evidence],
        }
        self._sessions.record(report.session_event("orphan", session, rule="stray", processes=[process]))
