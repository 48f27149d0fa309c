"""One real daemon, its leaders and bystanders, and what is known of them: reports come in here, orders go out.

Every promise is checked while this waits (``check.py``). A ``Violation`` is Reaper's fault; whatever else is raised is ours.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any

import harness
from chaos.factory import Factory, Report, order
from chaos.kin import DESCENT, LEADER, NOT_YET_SPARED, STAMP, TRACKER, WORKER, Proc, Session
from chaos.life import Life
from harness import Cgroup, Daemon, Scratch

from agent import client, wire
from chaos import kin

GRACE_S = 0.5
EXIT_GRACE_S = 0.5
TRACKER_GRACE_S = 2.0
INTERVAL_S = 0.2
SETTINGS = f"""\
[daemon]
log_level = "info"
[scan]
interval = "{{interval}}"
[kill]
grace = "{GRACE_S}s"
exit_grace = "{EXIT_GRACE_S}s"
tracker_grace = "{TRACKER_GRACE_S}s"
"""
# No message told of such a session: it is found by its marks, when it is their turn (sweep.py).
ADOPTED_WITHIN_S = 17 * INTERVAL_S + 1.0
CONCLUDED_WITHIN_S = (
    60.0  # from the end of the last member to the event, on the daemon's clock: nothing is promised
)
ANSWERS_WITHIN_S = 15.0  # the gate's longest pause is 5 s
LATE_BY_S = (
    20.0  # on a machine that is busy with other things, and for who has SIGKILL pending: late is not lost
)
RECORDED_WITHIN_S = 0.3  # what the daemon has seen is on disk after its next turn
_UP_WITHIN_S = 60.0
_REPLY_WITHIN_S = 3.0
_EVENTS_EVERY_S, _ASK_EVERY_S, _LOG_EVERY_S = 0.5, 0.25, 0.5


class Violation(AssertionError):
    """Reaper broke a promise; ``about`` are the processes and ``sessions`` the sessions it concerns."""

    def __init__(self, text: str, about: Iterable[Proc] = (), sessions: Iterable[Session] = ()) -> None:
        super().__init__(text)
        self.about = list(about)
        self.sessions = [*sessions, *(p.session for p in self.about if p.session is not None)]


class Stage:
    """Holds everything that takes part, by pidfd."""

    def __init__(self, scratch: Scratch, run: str) -> None:
        self.run = run
        self.daemon = Daemon(scratch, run, config=SETTINGS.format(interval=f"{INTERVAL_S}s"))
        self.life = Life()
        self.procs: dict[str, Proc] = {}
        self.sessions: dict[str, Session] = {}
        self.by_id: dict[str, Session] = {}
        self.by_pid: dict[int, list[Proc]] = {}
        self.starting = False
        self.seen = 0  # the number of the last event
        self.counts: dict[str, int] = {}
        self._log_at = 0
        self._go_on_at_s: float | None = None
        self._next = dict.fromkeys(("events", "ask", "log", "due"), 0.0)
        self._silent_since_s: float | None = None
        self._baseline: dict[str, int] | None = None
        self._readies = 0
        self._late: set[Proc] = set()
        self._confirm: list[tuple[float, int, list[Proc]]] = []  # seen by the daemon, and on disk before long
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}
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
                watched = self._watched.get(descriptor)
                if watched is not None:
                    watched()
            self._tick()
            if left_s <= 0:
                return

    def wait_until(self, condition: Callable[[], bool], within_s: float, what: str) -> None:
        """Poll until ``condition`` holds; it is our own fault when it never does."""
        end_s = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > end_s:
                raise RuntimeError(f"{what}: not within {within_s:g} s")
            self.poll(0.005)

    def _watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        self._watched[descriptor] = callback
        self._epoll.register(descriptor, select.EPOLLIN)

    def _unwatch(self, descriptor: int) -> None:
        if self._watched.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def _tick(self) -> None:
        now_s = time.monotonic()
        if self._go_on_at_s is not None and self._go_on_at_s <= now_s:
            self.let_daemon_go_on()
        self._look_after_daemon()
        if self._due("due", 0.02):
            self.check_deadlines()
        if self._due("log", _LOG_EVERY_S):
            self.read_log()
        if not self.life.running:
            return
        if self._due("events", _EVENTS_EVERY_S):
            self.read_events()
        if self._unsure() and self._due("ask", _ASK_EVERY_S):
            self.ask_who_is_there()

    def _due(self, what: str, every_s: float) -> bool:
        now_s = time.monotonic()
        if now_s < self._next[what]:
            return False
        self._next[what] = now_s + every_s
        return True

    # -- the daemon ----------------------------------------------------------------------------

    def launch_daemon(self) -> None:
        """Start it and go on: it counts as there when it says that it is ready."""
        self._readies = self.daemon.drain_notifications().count("READY=1")
        self.daemon.launch()
        self.starting = True

    def start_daemon(self) -> None:
        """Start it and return when it is ready."""
        if not self.starting and not self.life.ready:
            self.launch_daemon()
        self.wait_until(lambda: not self.starting, _UP_WITHIN_S, "the daemon does not say READY")

    def _look_after_daemon(self) -> None:
        if not self.starting and not self.life.ready:
            return
        if self.starting and self.daemon.drain_notifications().count("READY=1") > self._readies:
            self.starting = False
            self.life.begin(self.daemon.pid)
            self._next["events"] = 0.0
            now_s = self.life.now_s()
            for session in self.sessions.values():
                if session.dead_s is not None:
                    session.counted_from_s = now_s
                    session.settled_from_s = None
            if self._baseline is None:
                self._baseline = self.descriptors()
        if self.daemon.process.poll() is not None:
            raise Violation(f"the daemon ended by itself with {self.daemon.process.returncode}")

    def kill_daemon(self) -> None:
        """SIGKILL it, whatever it does."""
        self._go_on_at_s = None
        self.life.end()
        self.starting = False
        self.daemon.kill9()

    def stop_daemon(self) -> None:
        """SIGTERM it and return when it is gone."""
        self.let_daemon_go_on()
        if self.starting:
            self.start_daemon()
        self.life.end()
        code = self.daemon.stop()
        if code != 0:
            raise Violation(f"the daemon left with {code} after SIGTERM")

    def forget_state(self) -> None:
        """Delete what the daemon, which is away, remembers."""
        shutil.rmtree(self.daemon.state, ignore_errors=True)
        self.seen = 0
        for session in self.sessions.values():
            session.lost = True
            session.begun = False
            session.ends.clear()
            for proc in session.procs:
                proc.sure = False
                if proc.owed and session.dead_s is not None:
                    proc.owed = kin.owes(session, proc)

    def hold_daemon(self, for_s: float) -> None:
        """SIGSTOP it, and let it go on after that time."""
        if self.life.running:
            self.life.stop()
            self.daemon.process.send_signal(signal.SIGSTOP)
            self._go_on_at_s = time.monotonic() + for_s

    def let_daemon_go_on(self) -> None:
        if self._go_on_at_s is not None:
            self._go_on_at_s = None
            self.daemon.process.send_signal(signal.SIGCONT)
            self.life.go_on()

    def reload(self, *, good: bool) -> None:
        """Give it other settings, or such as it must refuse."""
        if self.life.ready:
            with open(self.daemon.config, "w", encoding="utf-8") as file:
                file.write(SETTINGS.format(interval="210ms" if good else "never"))
            self.daemon.reload()

    def settings_are_good(self) -> None:
        """Put good settings back: no daemon starts with bad ones."""
        with open(self.daemon.config, "w", encoding="utf-8") as file:
            file.write(SETTINGS.format(interval=f"{INTERVAL_S}s"))

    def gates(self) -> list[int]:
        return [pid for pid in harness.children_of(self.daemon.pid) if "reaperd.gate" in harness.cmdline(pid)]

    def kill_gate(self) -> None:
        if self.life.running:
            for pid in self.gates():
                harness.end_process(pid)

    def ask(self, op: str, **fields: Any) -> dict[str, Any] | None:
        """Return the daemon's answer, None when there is none now; WireError where it refuses."""
        if not self.life.running:
            return None
        asked_s = self.life.now_s()
        try:
            answer = client.request(self.daemon.socket, {"op": op, **fields}, timeout_s=_REPLY_WITHIN_S)
        except client.Unreachable as error:
            if self._silent_since_s is None:
                self._silent_since_s = asked_s
            elif self.life.now_s() > self._silent_since_s + ANSWERS_WITHIN_S:
                raise Violation(f"the daemon has not answered for {ANSWERS_WITHIN_S:g} s: {error}") from None
            return None
        self._silent_since_s = None
        return answer

    def descriptors(self) -> dict[str, int]:
        """Return what the core has open, by kind, and how many of each."""
        found: dict[str, int] = {}
        directory = f"/proc/{self.daemon.pid}/fd"
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                kind = os.readlink(f"{directory}/{name}").partition(":[")[0]
                found[kind] = found.get(kind, 0) + 1
        return found

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

    def _note_up(self, facts: dict[str, Any], pidfd: int) -> None:
        token, fate = facts["token"], facts["fate"]
        session = None
        if fate == LEADER:
            session = self.sessions.get(token)
            if session is None:  # below another leader, which has started it by itself
                outer = self.sessions[facts["outer"]]
                session = self.sessions[token] = Session(token, outer, outer.adopted, outer.own_cgroup)
        elif fate != "bystander":
            session = self.sessions[facts["leader"]]
        proc = Proc(
            token, facts["pid"], pidfd, fate, facts["marks"], facts["at"], session,
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
        self._watch(pidfd, lambda: self._note_end(proc))

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
        self.check_touched(proc, facts["at"], f"got {name} from pid {facts['sender']}")

    def _note_end(self, proc: Proc) -> None:
        at_s = time.monotonic()
        self._unwatch(proc.pidfd)
        proc.ended_s = at_s
        session = proc.session
        if proc.fate == LEADER and session is not None:
            session.dead_s = at_s
            session.counted_from_s = self.life.now_s()
            for one in session.procs:
                one.owed = kin.owes(session, one)
        # What it told before it ended comes first.
        for factory in self.factories:
            self._hear(factory)
        if not proc.ended_by_us:
            self.check_touched(proc, at_s, "ended")
        os.close(proc.pidfd)
        proc.pidfd = -1
        others = self.by_pid.get(proc.pid, [])
        if proc in others:
            others.remove(proc)
        if not others:
            self.by_pid.pop(proc.pid, None)

    # -- promises ------------------------------------------------------------------------------

    def check_touched(self, proc: Proc, at_s: float, what: str) -> None:
        """Raise Violation where ``proc`` must not have been touched at ``at_s``."""
        if proc.untouchable:
            raise Violation(f"WRONG KILL: {proc.token}, {proc.fate}, {what}", [proc])
        assert proc.session is not None, "bystanders are untouchable"
        chain = proc.session.chain()
        if proc.fate == LEADER:
            if proc.session.ordered_s is not None or proc.session.asked_to_stop:
                return
            chain = chain[1:]
        dead = [session for session in chain if session.dead]
        if not dead:
            raise Violation(f"WRONG KILL: {proc.token}, whose leader lives, {what}", [proc])
        if proc.fate == TRACKER and not what.startswith("ended"):
            raise Violation(f"WRONG SIGNAL: the tracker {proc.token} {what}", [proc])
        innermost = dead[0]
        waits = len(dead) == 1 and innermost.ended_well and innermost.accepted and not innermost.lost
        if not waits or proc.fate in (TRACKER, LEADER) or innermost.ordered_s is None:
            return
        if not self.life.unbroken_since(innermost.ordered_s) or innermost is not proc.session:
            return
        if at_s < innermost.ordered_s + EXIT_GRACE_S:
            early_s = innermost.ordered_s + EXIT_GRACE_S - at_s
            raise Violation(
                f"TOO EARLY: {proc.token} {what} {early_s:.3f} s before exit_grace was over", [proc]
            )

    def check_deadlines(self) -> None:
        """Raise Violation where somebody outlived what section 4 of DESIGN.md promises."""
        if not self.life.running:
            return
        now_s = self.life.now_s()
        for session in list(self.sessions.values()):
            if session.dead_s is None:
                self._check_stop(session, now_s)
                continue
            left = [proc for proc in session.procs if proc.owed and proc.ended_s is None]
            for proc in left:
                self._check_deadline(session, proc, now_s)
            if left:
                session.settled_from_s = None
            elif session.settled_from_s is None:
                session.settled_from_s = now_s
            elif session.begun and not session.ends and now_s > session.settled_from_s + CONCLUDED_WITHIN_S:
                raise Violation(
                    f"LOST: session {session.token} has no end on record {CONCLUDED_WITHIN_S:g} s after it was over",
                    [], [session],
                )  # fmt: skip

    def _check_stop(self, session: Session, now_s: float) -> None:
        """Raise Violation where a leader outlived the end that somebody asked for: SIGTERM, grace, SIGKILL."""
        asked = session.stop_asked
        if asked is None or asked[0] != self.life.number or now_s < asked[1] + GRACE_S + 1.0 or session.dead:
            return
        assert session.leader is not None, "who is asked to stop is up"
        if not is_dying(session.leader.pid) and not is_busy():
            raise Violation(
                f"MISSED: the leader {session.token} was to be stopped, and lives", [session.leader]
            )

    def _check_deadline(self, session: Session, proc: Proc, now_s: float) -> None:
        late_s = now_s - session.counted_from_s - self.promised_s(session, proc)
        if late_s <= 0 or not proc.alive:
            return
        # A look at the clock again: this process may have waited for the processor between the two.
        late_s = self.life.now_s() - session.counted_from_s - self.promised_s(session, proc)
        if late_s <= 0:
            return
        if late_s < LATE_BY_S and (is_busy() or is_dying(proc.pid)):
            if proc not in self._late:
                self._late.add(proc)
                self.count("late, on a busy machine")
            return
        raise Violation(
            f"MISSED: {proc.token} ({proc.marks}) lives {late_s:.3f} s longer than promised"
            f" ({self.promised_s(session, proc):g} s of the daemon's time)",
            [proc],
        )

    def promised_s(self, session: Session, proc: Proc) -> float:
        """Return for how long ``proc`` may outlive its leader, on the daemon's clock."""
        promise_s = GRACE_S + 1.0
        if session.may_have_ended_well:
            promise_s += EXIT_GRACE_S
        if proc.tracks:
            promise_s += TRACKER_GRACE_S
        if not self._is_known(session):
            promise_s += ADOPTED_WITHIN_S
        return promise_s

    def _is_known(self, session: Session) -> bool:
        """Say whether a daemon was told of the session, or has started since it began, and kept what it knew."""
        if session.lost and session.unregistered_s is not None:
            return False
        return bool(session.accepted) or (
            session.id is not None and self.life.number > session.registered_in_life
        )

    def check_untouched(self) -> None:
        """Raise Violation where something was sent to somebody who keeps silent about it."""
        for proc in self.procs.values():
            if proc.ended_s is None and proc.untouchable and (traces := proc.traces()):
                raise Violation(f"WRONG SIGNAL: {proc.token}, {proc.fate}, has {traces}", [proc])

    # -- what the daemon tells -----------------------------------------------------------------

    def read_events(self) -> bool:
        """Take in what is new in the history; False when the daemon does not answer."""
        while True:
            answer = self.ask("events", after=self.seen)
            if answer is None:
                return False
            for event in answer["events"]:
                self.seen = event["seq"]
                self._note_event(event)
            if not answer["events"]:
                return True

    def _note_event(self, event: dict[str, Any]) -> None:
        kind, session = event["kind"], self.by_id.get(event["session"] or "")
        self.count(f"event {kind}")
        if kind == "stuck":
            raise Violation(f"a process outlived SIGKILL: {event}", [], [session] if session else [])
        if session is None:
            return
        if kind == "registered":
            session.begun = True
        if kind not in ("reaped", "ended"):
            return
        session.ends.append(event)
        if len(session.ends) > 1:
            raise Violation(f"TWICE: session {session.token} has {len(session.ends)} ends", [], [session])
        expected, told = session.expected_cause(), event["cause"]
        if expected is None or told is None:
            return
        told = {key: told[key] for key in ("kind", "code")}
        known = session.ordered_s is not None and self.life.unbroken_since(session.ordered_s)
        if told != expected and (told["kind"] != "unknown" or (known and session.accepted)):
            raise Violation(
                f"WRONG CAUSE: session {session.token} ended by {session.manner}: {told}, not {expected}",
                [],
                [session],
            )
        self._check_told(event, session)

    def _check_told(self, event: dict[str, Any], session: Session) -> None:
        for told in event["processes"]:
            for proc in self.by_pid.get(told["pid"], []):
                if proc.untouchable and told["signals"]:
                    raise Violation(
                        f"WRONG KILL: {proc.token}, {proc.fate}, says the event: {told}", [proc], [session]
                    )

    def ask_who_is_there(self) -> None:
        """Note which members that only descent tells are on the daemon's record; check that no living session is missing."""
        sent_s = time.monotonic()
        number = self.life.number
        answer = self.ask("ps")
        if answer is None:
            return
        listed = {one["id"]: one for one in answer["sessions"]}
        found = []
        for session in self.sessions.values():
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
            recorded_s = self.life.now_s() + RECORDED_WITHIN_S
            self._confirm.append((recorded_s, number, found))

    def _unsure(self) -> bool:
        """Say whether there is somebody alive of whom only a look at the daemon's record tells whether it was seen."""
        waiting = []
        for recorded_s, number, procs in self._confirm:
            if number != self.life.number:
                continue
            if self.life.now_s() < recorded_s:
                waiting.append((recorded_s, number, procs))
                continue
            for proc in procs:
                proc.sure = True
        self._confirm = waiting
        return any(self.unsure(session) for session in self.sessions.values())

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

    def read_log(self) -> None:
        """Raise Violation where the daemon's log has a traceback or an error."""
        with open(self.daemon.log, "rb") as file:
            file.seek(self._log_at)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._log_at += len(data)
        for line in data.decode("utf-8", "replace").splitlines():
            words = line.split(None, 2)
            level = words[1] if len(words) > 2 else ""
            if level == "WARNING":
                self.count("warning: " + " ".join(words[2].split()[:5]))
            refused = level == "ERROR" and "kept the old settings" in line
            if line.startswith("Traceback") or (level in ("ERROR", "CRITICAL") and not refused):
                raise Violation(f"the daemon's log says: {line}")

    # -- orders --------------------------------------------------------------------------------

    def start_leader(self, token: str, **wish: Any) -> Session:
        """Have a leader started; it is up when it says so."""
        adopted, own_cgroup = bool(wish.pop("adopted", False)), bool(wish.pop("cgroup", False))
        session = self.sessions[token] = Session(
            token, None, adopted, own_cgroup, deaf=bool(wish.get("deaf"))
        )
        session.control = self.factories[adopted].start_leader(
            {
                "token": token,
                "name": token,
                "timeout": 1.0 if self.life.running else 0.2,
                "other_uid": harness.STRANGER,
                "uid": harness.STRANGER if wish.pop("other_user", False) else 0,
                "cgroup": self.procs_file("leaders") if own_cgroup else "",
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
            if self.ask("stop", session=session.id) is not None:
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
        if proc.ended_s is None:
            if traces := proc.traces():
                raise Violation(f"WRONG SIGNAL: {proc.token}, {proc.fate}, has {traces}", [proc])
            proc.end()

    # -- calm ----------------------------------------------------------------------------------

    def be_calm(self) -> None:
        """With every leader dead: wait until all is over, then see that nothing is left, and forget everybody."""
        self.start_daemon()
        self.wait_until(self._all_dead, 60.0, "a leader does not end")
        self.wait_until(self._all_owed_gone, 120.0, "what must be gone is not, nor late")
        self.wait_until(self._all_on_record, 120.0, "an end is not on record, nor late")
        self.check_untouched()
        for proc in self.procs.values():
            if proc.ended_s is None:
                proc.end()
        self.wait_until(
            lambda: all(p.ended_s is not None for p in self.procs.values()), 30.0, "SIGKILL ends nobody"
        )
        self.wait_until(self._nothing_listed, 30.0, "ps lists sessions")
        self.read_log()
        for session in self.sessions.values():
            if session.control is not None:
                session.control.close()
        self.procs.clear()
        self._late.clear()
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

    def _all_on_record(self) -> bool:
        return self.read_events() and all(s.ends or not s.begun for s in self.sessions.values())

    def _nothing_listed(self) -> bool:
        answer = self.ask("ps")
        return answer is not None and not answer["sessions"]

    def _check_descriptors(self) -> None:
        """Raise Violation where the core holds more than it did before the first session."""
        assert self._baseline is not None, "a daemon was ready"
        end_s = time.monotonic() + 5.0
        while True:
            now = self.descriptors()
            more = {kind: now[kind] - self._baseline.get(kind, 0) for kind in now}
            more = {kind: count for kind, count in more.items() if count > 0}
            if not more:
                return
            if time.monotonic() > end_s:
                raise Violation(f"LEAK: with no session left the core holds {more} more than at its start")
            self.poll(0.1)

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """End everybody, whatever state this is in."""
        with contextlib.suppress(Exception):
            self.let_daemon_go_on()
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
        self.settings_are_good()
        self.daemon.close()
        harness.end_leftovers(harness.marked(harness.RUN_MARK, self.run))
        for group in self._cgroups.values():
            group.remove()
        self._epoll.close()


def is_dying(pid: int) -> bool:
    """Say whether SIGKILL is on its way to ``pid``: then it is the machine that is late."""
    for line in harness.read_proc(pid, "status").splitlines():
        if line.startswith((b"SigPnd:", b"ShdPnd:")) and int(line.split()[1], 16) >> 8 & 1:
            return True
    return False


def is_busy() -> bool:
    """Say whether so much wants to run here that nobody can promise a time."""
    return os.getloadavg()[0] > 2 * (os.cpu_count() or 1)
