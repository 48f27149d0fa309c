"""What the daemon tells of sessions, in its history and its listing, held against what is known of them."""

from __future__ import annotations

import time
from typing import Any, Protocol

from chaos.kin import DESCENT, STAMP, TRACKER, WORKER, Proc, Session, Violation
from chaos.promises import Promises
from chaos.watched import Watched

from reaperd.database import RETRY_S

RECORDED_WITHIN_S = 0.3  # what the daemon has seen is on disk after its next turn
WRITES_AGAIN_WITHIN_S = RETRY_S + RECORDED_WITHIN_S  # once its disk has room


class Known(Protocol):
    """Who takes part."""

    sessions: dict[str, Session]
    by_id: dict[str, Session]
    by_pid: dict[int, list[Proc]]

    def count(self, what: str) -> None:
        """Count something that is told at the end."""


class Record:
    """Reads history and listing; Violation where they are wrong."""

    def __init__(self, watched: Watched, promises: Promises, known: Known) -> None:
        self._watched = watched
        self._promises = promises
        self._known = known
        self._seen = 0  # the number of the last event
        self.orphans: set[int] = set()  # the pids of those whom nobody registered that were told of
        self._early: dict[
            str, list[dict[str, Any]]
        ] = {}  # of sessions whose leaders have not told yet that they began
        # Of the daemon's time: until then, on a disk that was full, it has not tried again.
        self._written_from_s = 0.0
        self._confirm: list[tuple[float, int, list[Proc]]] = []  # seen by the daemon, and on disk before long

    def forget(self) -> None:
        """Begin anew: the daemon's state was deleted."""
        self._seen = 0
        self._early.clear()

    def skip_to(self, last: int) -> None:
        """Take in only what comes after event number ``last``."""
        self._seen = last

    def go_back_to(self, last: int) -> None:
        """Take in anew what comes after event number ``last``: a full disk took back what there was after it."""
        self._seen = min(self._seen, last)

    def disk_has_room(self) -> None:
        """What the daemon has seen meanwhile is on disk once it has tried again, and not before."""
        self._written_from_s = self._watched.life.now_s() + WRITES_AGAIN_WITHIN_S

    def catch_up(self, session: Session) -> None:
        """Take in what the history said of a session before its leader did."""
        for event in self._early.pop(session.id or "", []):
            self._note_event(event)

    def read_events(self) -> bool:
        """Take in what is new in the history; False when the daemon does not answer."""
        while True:
            answer = self._watched.ask("events", after=self._seen)
            if answer is None:
                return False
            for event in answer["events"]:
                self._seen = event["seq"]
                self._known.count(f"event {event['kind']}")
                self._note_event(event)
            if not answer["events"]:
                return True

    def is_complete(self) -> bool:
        """Say whether every session that began has its end; Violation where it never will, for it is not listed any more."""
        answer = self._watched.ask("ps")
        # In this order: a session goes off the list after its end went on record.
        if answer is None or not self.read_events():
            return False
        listed = {one["id"] for one in answer["sessions"]}
        for session in self._known.sessions.values():
            if session.accepted and not session.lost and not session.begun:
                raise Violation(
                    f"LOST: session {session.token} was accepted, and no event says so", [], [session]
                )
            if session.unwritten:
                if session.dead and session.id in listed:
                    return False  # it is not over, whatever was written of it
                continue
            if session.begun and not session.ends and session.id not in listed:
                raise Violation(
                    f"LOST: session {session.token} has begun, and no end is on record", [], [session]
                )
        return all(
            session.ends or not session.begun or session.unwritten
            for session in self._known.sessions.values()
        )

    def _note_event(self, event: dict[str, Any]) -> None:
        kind, session = event["kind"], self._known.by_id.get(event["session"] or "")
        if kind == "orphan":
            self.orphans.update(process["pid"] for process in event["processes"])
        if kind == "stuck":
            raise Violation(f"a process outlived SIGKILL: {event}", [], [session] if session else [])
        if session is None:
            if event["session"]:
                self._early.setdefault(event["session"], []).append(event)
            return
        if kind == "registered":
            session.begun = True
        if kind not in ("reaped", "ended"):
            return
        session.ends.append(event)
        if len(session.ends) > 1 and not session.unwritten:
            raise Violation(f"TWICE: session {session.token} has {len(session.ends)} ends", [], [session])
        expected, told = session.expected_cause(), event["cause"]
        if expected is None or told is None:
            return
        told = {key: told[key] for key in ("kind", "code")}
        seen = session.ordered_s is not None and self._watched.life.unbroken_since(session.ordered_s)
        if told != expected and (
            told["kind"] != "unknown" or (seen and session.accepted and self._promises.is_known(session))
        ):
            raise Violation(
                f"WRONG CAUSE: session {session.token} ended by {session.manner}: {told}, not {expected}",
                [],
                [session],
            )
        self._check_told(event, session)

    def _check_told(self, event: dict[str, Any], session: Session) -> None:
        for told in event["processes"]:
            for proc in self._known.by_pid.get(told["pid"], []):
                if proc.untouchable and told["signals"]:
                    raise Violation(
                        f"WRONG KILL: {proc.token}, {proc.fate}, says the event: {told}", [proc], [session]
                    )

    def read_listing(self) -> None:
        """Note which members that only descent tells are on the daemon's record; check that no living session is missing."""
        sent_s = time.monotonic()
        number = self._watched.life.number
        answer = self._watched.ask("ps")
        if answer is None:
            return
        listed = {one["id"]: one for one in answer["sessions"]}
        found = []
        for session in self._known.sessions.values():
            one = listed.get(session.id or "")
            if one is None:
                self._check_listed(session, sent_s)
                continue
            by_descent = {
                worker["pid"]
                for worker in one["workers"]
                if not any(mark in " ".join(worker["evidence"]) for mark in ("page", "REAPER_LINEAGE"))
            }
            members = {worker["pid"] for worker in one["workers"]}
            for proc in session.procs:
                wanted = by_descent if proc.marks == DESCENT else members
                if proc.ended_s is None and not proc.sure and session.dead_s is None and proc.pid in wanted:
                    found.append(proc)
        if found:
            recorded_s = self._watched.life.now_s() + RECORDED_WITHIN_S
            self._confirm.append((recorded_s, number, found))

    def is_anybody_unsure(self) -> bool:
        """Say whether there is somebody alive of whom only a look at the daemon's record tells whether it was seen."""
        waiting = []
        for recorded_s, number, procs in self._confirm:
            if number != self._watched.life.number:
                continue
            if self._watched.life.now_s() < max(recorded_s, self._written_from_s) or self._watched.is_full:
                waiting.append((recorded_s, number, procs))
                continue
            for proc in procs:
                proc.sure = True
        self._confirm = waiting
        return any(self.unsure(session) for session in self._known.sessions.values())

    def unsure(self, session: Session) -> bool:
        """Say whether a member of ``session`` is still to be seen by the daemon."""
        if session.dead_s is not None or session.unregistered_s is not None:
            return False
        needs = (DESCENT, STAMP) if session.adopted and not session.own_cgroup else (DESCENT,)
        return any(
            proc.ended_s is None and not proc.sure and proc.marks in needs and proc.fate in (WORKER, TRACKER)
            for proc in session.procs
        )

    def _check_listed(self, session: Session, sent_s: float) -> None:
        """Raise Violation where a session that was accepted, and whose leader lives, is not listed."""
        if not session.accepted or session.told_s is None or session.told_s > sent_s:
            return
        ending = any(one.ordered_s or one.dead or one.asked_to_stop for one in session.chain())
        if session.unregistered_s is None and not ending:
            raise Violation(
                f"LOST: session {session.token}, whose leader lives, is not listed", [], [session]
            )
