"""One real daemon, its leaders and bystanders, and what is known of them: reports come in here, orders go out.

Every promise is checked while this waits (``promises.py``). A ``Violation`` is Reaper's fault; whatever else is raised is ours.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

import harness
from chaos.factory import Factory, Report, order
from chaos.kin import LEADER, NOT_YET_SPARED, TRACKER, WORKER, Proc, Session, Violation
from chaos.promises import Promises
from chaos.record import Record
from chaos.watched import SETTINGS, Watched
from harness import Cgroup, Scratch

from agent import wire
from chaos import kin
from reaperd.linux import pidfd

_UP_WITHIN_S = 60.0
_EVENTS_EVERY_S, _ASK_EVERY_S, _LOG_EVERY_S, _DEADLINES_EVERY_S = 0.5, 0.25, 0.5, 0.02


class Stage:
    """Holds everything that takes part, by pidfd."""

    def __init__(self, scratch: Scratch, run: str, settings: str = SETTINGS) -> None:
        self.run = run
        self.counts: dict[str, int] = {}
        self.procs: dict[str, Proc] = {}
        self.sessions: dict[str, Session] = {}
        self.by_id: dict[str, Session] = {}
        self.by_pid: dict[int, list[Proc]] = {}
        self.watched = Watched(scratch, run, self.count, settings)
        self.daemon, self.life = self.watched.daemon, self.watched.life
        self.promises = Promises(self.life, self.count)
        self.record = Record(self.watched, self.promises, self)
        self._next: dict[str, float] = {}
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._cgroups = self._make_cgroups()
        self.factories = [Factory(run, self.daemon.socket), Factory(run, self.daemon.socket, adopts=True)]
        for factory in self.factories:
            self._watch(factory.reports.fileno(), lambda factory=factory: self._hear(factory))  # type: ignore[misc]

    def _make_cgroups(self) -> dict[str, Cgroup]:
        root = next(
            (path for path in harness.CGROUP_ROOTS if os.path.exists(f"{path}/cgroup.controllers")), None
        )
        if root is None or not os.access(root, os.W_OK):
            return {}
        return {name: Cgroup(root, f"{self.run}-{name}") for name in ("leaders", "elsewhere")}

    @property
    def has_cgroups(self) -> bool:
        return bool(self._cgroups)

    def procs_file(self, name: str) -> str:
        return os.path.join(self._cgroups[name].path, "cgroup.procs")

    def count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number

    # -- waiting -------------------------------------------------------------------------------

    def poll(self, for_s: float) -> None:
        """Take in what is told, and check every promise, for that long; at least what is there already."""
        end_s = time.monotonic() + for_s
        while True:
            left_s = end_s - time.monotonic()
            for descriptor, _ in self._epoll.poll(min(max(0.0, left_s), 0.02)):
                callback = self._callbacks.get(descriptor)
                if callback is not None:
                    callback()
            self._tick()
            if left_s <= 0:
                return

    def wait_until(self, condition: Callable[[], bool], within_s: float, what: str) -> None:
        """Poll until ``condition`` holds; it is our own fault when it never does."""
        end_s = time.monotonic() + within_s - self.life.pauses.lost_s
        while not condition():
            if time.monotonic() - self.life.pauses.lost_s > end_s:
                log = self.daemon.read_log()[-5000:]
                raise RuntimeError(f"{what}: not within {within_s:g} s; the daemon's log ends with\n{log}")
            self.poll(0.005)

    def _watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        self._callbacks[descriptor] = callback
        self._epoll.register(descriptor, select.EPOLLIN)

    def _unwatch(self, descriptor: int) -> None:
        if self._callbacks.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def _tick(self) -> None:
        if self.watched.look_after():
            self._note_life()
        if self._due("deadlines", _DEADLINES_EVERY_S):
            self.promises.check_deadlines(self.sessions.values())
        if self._due("log", _LOG_EVERY_S):
            self.watched.read_log()
        if not self.life.running:
            return
        if self._due("events", _EVENTS_EVERY_S):
            self.record.read_events()
        if self.record.is_anybody_unsure() and self._due("listing", _ASK_EVERY_S):
            self.record.read_listing()

    def _due(self, what: str, every_s: float) -> bool:
        now_s = time.monotonic()
        if now_s < self._next.get(what, 0.0):
            return False
        self._next[what] = now_s + every_s
        return True

    # -- the daemon ----------------------------------------------------------------------------

    def start_daemon(self) -> None:
        """Start it, where that was not done, and return when it is ready."""
        if not self.watched.starting and not self.life.ready:
            self.watched.launch()
        self.wait_until(lambda: not self.watched.starting, _UP_WITHIN_S, "the daemon does not say READY")

    def stop_daemon(self) -> None:
        """SIGTERM it, not before it is ready, and return when it is gone."""
        self.start_daemon()
        self.watched.stop()

    def _note_life(self) -> None:
        """Count the times of who is dead from here on: a daemon that is killed takes its deadlines along."""
        self._next["events"] = 0.0
        for session in self.sessions.values():
            if session.dead_s is not None:
                session.counted_from_s = self.life.now_s()
                session.settled_from_s = None

    def forget_state(self) -> None:
        """Delete what the daemon, which is away, remembers."""
        self.watched.forget()
        self.record.forget()
        for session in self.sessions.values():
            session.lost = True
            session.begun = False
            session.ends.clear()
            for proc in session.procs:
                proc.sure = False
                if proc.owed and session.dead_s is not None:
                    proc.owed = kin.owes(session, proc)

    def fill_disk(self) -> None:
        """Fill the disk that the daemon writes on: what it knows it goes on knowing, and writes as soon as it can."""
        if self.watched.has_disk and self.life.ready and not self.watched.is_read_only:
            self.watched.fill_disk()
            self._note_unwritten()

    def free_disk(self) -> None:
        if self.watched.is_full:
            self._note_unwritten()
            self.watched.free_disk()
            self.record.disk_has_room()

    def _note_unwritten(self) -> None:
        for session in self.sessions.values():
            session.unwritten = session.lost = True

    # -- what processes tell -------------------------------------------------------------------

    def _hear(self, factory: Factory) -> None:
        for report in factory.read():
            self._take_in(report)

    def _take_in(self, report: Report) -> None:
        facts = report.facts
        match facts["what"]:
            case "up":
                assert report.pidfd is not None, "who is up hands its pidfd over"
                self._note_up(facts, report.pidfd)
            case "signal":
                self._note_signal(facts)
            case "registered":
                session = self.sessions[facts["token"]]
                session.id, session.accepted = facts["session"], facts["accepted"]
                session.told_s, session.registered_in_life = facts["at"], self.life.number
                self.by_id[facts["session"]] = session
                self.record.catch_up(session)
            case "started":
                self._note_started(self.sessions[facts["token"]], facts["workers"], facts["at"])
            case "tracking":
                proc, session = self.procs[facts["token"]], self._owner(facts["token"])
                proc.tracks = True
                if proc.fate == WORKER and (session.ordered_s is None or session.ordered_s > facts["at"]):
                    proc.fate = TRACKER
            case "crashed":
                raise RuntimeError(f"a process of ours failed: {facts}")

    def _owner(self, token: str) -> Session:
        session = self.procs[token].session
        assert session is not None, "only bystanders belong to no session"
        return session

    def _note_up(self, facts: dict[str, Any], handle: int) -> None:
        token, fate = facts["token"], facts["fate"]
        session = None
        if fate == LEADER:
            session = self.sessions.get(token)
            if session is None:  # below another leader, which has started it by itself
                outer = self.sessions[facts["outer"]]
                session = self.sessions[token] = Session(token, outer, outer.adopted, outer.own_cgroup)
                session.unwritten = session.lost = self.watched.is_full
        elif fate != "bystander":
            session = self.sessions[facts["leader"]]
        proc = Proc(
            token, facts["pid"], handle, fate, facts["marks"], facts["at"], session,
            silent=facts.get("silent", False), detached=facts.get("detached", False), parent=facts.get("parent"),
        )  # fmt: skip
        self.procs[token] = proc
        self.by_pid.setdefault(proc.pid, []).append(proc)
        if session is not None:
            if fate == LEADER:
                session.leader = proc
            else:
                session.procs.append(proc)
                if fate == "spared" and session.ordered_s is not None and session.ordered_s <= proc.at_s:
                    proc.fate = NOT_YET_SPARED  # it came too late to be safe
                if session.dead_s is not None:
                    proc.owed = kin.owes(session, proc)
                    session.settled_from_s = None
        self.count(fate)
        self._watch(handle, lambda: self._note_end(proc))

    def _note_started(self, session: Session, workers: list[str], at_s: float) -> None:
        session.started.update(workers)
        for token in workers:
            proc = self.procs.get(token)
            in_time = session.ordered_s is None or session.ordered_s > at_s
            if proc is not None and proc.fate == NOT_YET_SPARED and in_time:
                proc.fate = "spared"

    def _note_signal(self, facts: dict[str, Any]) -> None:
        if facts["code"] != 0:  # SI_USER: somebody's; all else is the kernel's
            return
        proc = self.procs[facts["token"]] if "token" in facts else self.by_pid[facts["pid"]][0]
        proc.signals.append((facts["at"], facts["number"], facts["sender"]))
        self.count("signals")
        name = signal.Signals(facts["number"]).name
        self.promises.check_touched(proc, facts["at"], f"got {name} from pid {facts['sender']}")

    def _note_end(self, proc: Proc) -> None:
        at_s = time.monotonic()
        self._unwatch(proc.pidfd)
        proc.ended_s, proc.status = at_s, pidfd.exit_status(proc.pidfd)
        session = proc.session
        if proc.fate == LEADER and session is not None:
            session.dead_s = at_s
            session.counted_from_s = self.life.now_s()
            for one in session.procs:
                one.owed = kin.owes(session, one)
        elif proc.ended_by_us and not proc.signals and session is not None and session.dead_s is not None:
            # Nobody may have seen it in between: whom only descent from it tells is then nobody's.
            for one in session.procs:
                if one.parent == proc.token and one.marks == kin.DESCENT and not one.sure:
                    one.owed = None
        # What it told before it ended comes first.
        for factory in self.factories:
            self._hear(factory)
        if not proc.ended_by_us:
            self.promises.check_touched(proc, at_s, "ended")
        os.close(proc.pidfd)
        proc.pidfd = -1
        others = self.by_pid.get(proc.pid, [])
        if proc in others:
            others.remove(proc)
        if not others:
            self.by_pid.pop(proc.pid, None)

    # -- orders --------------------------------------------------------------------------------

    def start_leader(self, token: str, **wish: Any) -> Session:
        """Have a leader started; it is up when it says so."""
        adopted, own_cgroup = bool(wish.pop("adopted", False)), bool(wish.pop("cgroup", False))
        session = self.sessions[token] = Session(
            token, None, adopted, own_cgroup, deaf=bool(wish.get("deaf"))
        )
        session.unwritten = session.lost = self.watched.is_full
        session.control = self.factories[adopted].start_leader(
            {
                "token": token,
                "name": token,
                "timeout": 1.0 if self.life.running else 0.2,
                "other_uid": harness.STRANGER,
                "uid": harness.STRANGER if wish.pop("other_user", False) else 0,
                "cgroup": self.procs_file("leaders") if own_cgroup else "",
                "elsewhere": self.procs_file("elsewhere") if self._cgroups else "",
                **wish,
            }
        )
        return session

    def start_workers(self, session: Session, workers: list[tuple[str, str]]) -> None:
        if session.control is not None:
            order(session.control, "start", workers=workers)

    def unregister(self, session: Session) -> None:
        if session.control is not None and order(session.control, "unregister"):
            session.unregistered_s = time.monotonic()

    def wait_up(self, session: Session) -> None:
        """Return when the leader is there; it may be dead again."""
        self.wait_until(lambda: session.leader is not None, _UP_WITHIN_S, f"{session.token} is not up")

    def end_leader(self, session: Session, manner: str, code: int = 0) -> None:
        """End a leader in that manner."""
        self.wait_up(session)
        if session.ordered_s is not None or session.leader is None or session.leader.ended_s is not None:
            return
        if manner == "term" and session.deaf:
            manner = "kill"
        asked = session.asked_to_stop  # a daemon that was asked to stop it has died since, or does so now
        session.manner, session.code = ("" if asked else manner), code
        session.ordered_s = time.monotonic()
        numbers = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "segv": signal.SIGSEGV}
        if manner in numbers:
            session.leader.send(numbers[manner])
        elif session.control is not None:
            order(session.control, "exit", manner=manner, code=code)

    def ask_to_stop(self, session: Session) -> bool:
        """Ask the daemon to end a leader; False when it was not to be asked."""
        self.wait_up(session)
        if session.id is None or session.dead or session.ordered_s is not None:
            return False
        session.asked_to_stop = True
        with contextlib.suppress(wire.WireError):  # no daemon knows it, or its leader has just died
            if self.watched.ask("stop", session=session.id) is not None:
                session.manner = "stop"
                session.stop_asked = (self.life.number, self.life.now_s())
                return True
        return False

    def start_bystander(self, token: str, kind: str, stamp: str = "") -> None:
        wish: dict[str, Any] = {"token": token, "orphan": kind == "orphan", "stamp": stamp}
        if kind.endswith("other-user"):
            wish["uid"] = harness.STRANGER
        if kind.endswith("elsewhere"):
            wish["cgroup"] = self.procs_file("elsewhere")
        self.factories[0].start_bystander(wish)

    def dismiss(self, proc: Proc) -> None:
        """End somebody whom nobody else may end, after a last look at it."""
        self.promises.check_untouched([proc])
        if proc.ended_s is None:
            proc.end()

    # -- calm ----------------------------------------------------------------------------------

    def be_calm(self) -> None:
        """With every leader dead: wait until all is over, then see that nothing is left, and forget everybody."""
        self.start_daemon()
        self.wait_until(self._all_dead, 60.0, "a leader does not end")
        self.wait_until(self._all_owed_gone, 400.0, "what must be gone is not, nor late")
        self.wait_until(self.record.is_complete, 400.0, "an end is not on record, nor late")
        self.promises.check_untouched(self.procs.values())
        for proc in self.procs.values():
            if proc.owed is not None and proc.session is not None and proc.session.dead_s is not None:
                self.count("owed" if proc.owed else "to be left alone")
            elif proc.fate in (WORKER, TRACKER):
                self.count("nobody can know")
            if proc.ended_s is None:
                proc.end()
        self.wait_until(
            lambda: all(p.ended_s is not None for p in self.procs.values()), 30.0, "SIGKILL ends nobody"
        )
        self.wait_until(self._nothing_listed, 30.0, "ps lists sessions")
        self.watched.read_log()
        for session in self.sessions.values():
            if session.control is not None:
                session.control.close()
        self.procs.clear()
        self.promises.forget()
        self.sessions.clear()
        self.by_id.clear()
        self.by_pid.clear()
        self._check_descriptors()

    def _all_dead(self) -> bool:
        """Say whether all leaders are; one below a leader that nobody must end is ended by us."""
        for session in list(self.sessions.values()):
            outer = session.outer
            if outer is not None and outer.dead_s is not None and session.dead_s is None:
                shell = self.procs[f"{session.token}.shell"]
                if not shell.owed:
                    shell.ended_by_us = True
                    self.end_leader(session, "kill")
        return all(session.dead_s is not None for session in self.sessions.values())

    def _all_owed_gone(self) -> bool:
        return not any(p.owed and p.ended_s is None for s in self.sessions.values() for p in s.procs)

    def _nothing_listed(self) -> bool:
        answer = self.watched.ask("ps")
        return answer is not None and not answer["sessions"]

    def _check_descriptors(self) -> None:
        """Raise Violation where the core holds more than it did before the first session."""
        end_s = time.monotonic() + 5.0
        while more := self.watched.more_descriptors():
            if time.monotonic() > end_s:
                raise Violation(f"LEAK: with no session left the core holds {more} more than at its start")
            self.poll(0.1)

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """End everybody, whatever state this is in."""
        for factory in self.factories:
            self._unwatch(factory.reports.fileno())
            for report in factory.read():
                if report.pidfd is not None:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(report.pidfd, signal.SIGKILL)
                    os.close(report.pidfd)
        for proc in self.procs.values():
            if proc.pidfd >= 0:
                proc.send(signal.SIGKILL)
                os.close(proc.pidfd)
        for session in self.sessions.values():
            if session.control is not None:
                session.control.close()
        for factory in self.factories:
            factory.close()
        self.watched.close()
        harness.end_leftovers(harness.marked(harness.RUN_MARK, self.run))
        for group in self._cgroups.values():
            group.remove()
        self._epoll.close()
