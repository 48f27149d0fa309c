"""Workers that have lost their pool while their script lives: told of once, as the session asks for, and left alone.

The session ends them when it ends. Until then they are the script's business, which may have reasons.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from reaperd import report
from reaperd.leaders import Leaders
from reaperd.linux.procfs import TICKS_PER_S, ProcessGone, ProcFS, Stat
from reaperd.model import ProcessId, Session, SessionKey
from reaperd.sessions import Sessions

log = logging.getLogger(__name__)


class _Lost(NamedTuple):
    """Who has lost its pool."""

    since_s: float  # monotonic
    cpu_ticks: int  # by then
    told: bool = False


class Strays:
    """Looks for them in the sessions that ask for it in their pages."""

    def __init__(self, sessions: Sessions, leaders: Leaders, proc: ProcFS) -> None:
        self._sessions = sessions
        self._leaders = leaders
        self._proc = proc
        self._lost: dict[SessionKey, dict[ProcessId, _Lost]] = {}

    def look(self) -> None:
        """Look once, and record an event for each that has been one for long enough."""
        asking = {}
        for key, entry in self._sessions.entries.items():
            page = self._leaders.page_of(key) if entry.died_at_s is None and entry.session.seen else None
            if page is not None and page.stray is not None:
                asking[key] = entry.session, page.stray
        self._lost = {key: self._lost.get(key, {}) for key in asking}
        for key, (session, thresholds) in asking.items():
            with self._sessions.trying(key, "look for strays"):
                self._look_at(session, *thresholds)

    def _look_at(self, session: Session, age_s: float, cpu_percent: float) -> None:
        now_s, before = time.monotonic(), self._lost[session.key]
        found = {}
        for stat in self._orphaned(session):
            one = before.get(stat.id, _Lost(now_s, stat.cpu_ticks))
            for_s = now_s - one.since_s
            percent = 100 * (stat.cpu_ticks - one.cpu_ticks) / TICKS_PER_S / for_s if for_s else 0.0
            if not one.told and for_s and for_s >= age_s and percent >= cpu_percent:
                self._tell(session, stat, for_s, percent)
                one = one._replace(told=True)
            found[stat.id] = one
        self._lost[session.key] = found

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

    def _tell(self, session: Session, stat: Stat, for_s: float, percent: float) -> None:
        log.warning(
            "stray pid=%d session=%s name=%r uid=%d: lost its pool %.0f s ago and uses %.0f %% of a core",
            stat.id.pid, session.id, session.name, session.uid, for_s, percent,
        )  # fmt: skip
        evidence = f"lost its pool {for_s:.0f} s ago, and uses {percent:.0f} % of a core"
        process: dict[str, Any] = {
            "pid": stat.id.pid,
            "start_ticks": stat.id.start_ticks,
            "signal": None,
            "signals": [],
            "result": "kept",
            "evidence": [evidence],
        }
        self._sessions.record(report.session_event("orphan", session, rule="stray", processes=[process]))
