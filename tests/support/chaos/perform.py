"""Does on a stage what a plan says, step by step, and tells what is known when a promise is broken."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import harness
from chaos.kin import LEADER, Proc, Session, Violation
from chaos.plan import Abilities, Step
from chaos.stage import Stage

_SHOWN_STEPS = 30
_SHOWN_LINES = 30
_PATIENCE_S = 3.0


class Performance:
    """Performs one plan."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.last: collections.deque[Step] = collections.deque(maxlen=_SHOWN_STEPS)
        self._forget = False

    def run(self, steps: Iterable[Step], on_step: Callable[[Step], None] = lambda step: None) -> None:
        """Perform all of ``steps``; Violation when Reaper breaks a promise."""
        self.stage.start_daemon()
        for step in steps:
            self.last.append(step)
            on_step(step)
            getattr(self, "_" + step.op.replace("-", "_"))(**step.facts)
            self.stage.poll(0)

    # -- one method a step

    def _leader(self, token: str, **wish: Any) -> None:
        self.stage.start_leader(token, **wish)

    def _grow(self, token: str, workers: list[tuple[str, str]]) -> None:
        self.stage.start_workers(self.stage.sessions[token], workers)

    def _end(self, ends: list[tuple[str, str, int]], patient: bool) -> None:
        if patient:
            self._wait_seen([self.stage.sessions[token] for token, *_ in ends])
        else:
            for token, *_ in ends:
                self.stage.wait_up(self.stage.sessions[token])
        for token, manner, code in ends:
            self.stage.end_leader(self.stage.sessions[token], manner, code)

    _burst = _end

    def _wait_seen(self, sessions: list[Session]) -> None:
        """Wait a little for the daemon to see those who are known by descent alone: then it must end them."""
        stage = self.stage
        for session in sessions:
            stage.wait_up(session)
        give_up_s = stage.life.now_s() + _PATIENCE_S
        while stage.life.running and stage.life.now_s() < give_up_s:
            if all(session.told_s is not None and not stage.record.unsure(session) for session in sessions):
                return
            stage.poll(0.02)

    def _kill_workers(self, workers: list[str]) -> None:
        for token in workers:
            proc = self.stage.procs.get(token)
            if proc is None or proc.ended_s is not None or proc.session is None or proc.session.dead:
                continue
            if proc.fate == LEADER:
                self.stage.procs[f"{token}.shell"].ended_by_us = True
                self.stage.end_leader(proc.session, "kill")
            else:
                proc.end()

    def _unregister(self, token: str) -> None:
        self.stage.unregister(self.stage.sessions[token])

    def _stop(self, token: str) -> None:
        session = self.stage.sessions[token]
        if not self.stage.ask_to_stop(session) and not session.asked_to_stop:
            self.stage.end_leader(session, "kill")

    def _bystander(self, token: str, kind: str, stamp_of: str = "") -> None:
        stamp = ""
        if stamp_of:
            session = self.stage.sessions.get(stamp_of)  # None: it ended before the last calm
            if session is not None:
                self.stage.wait_until(
                    lambda: session.id is not None or session.dead, 60.0, "no leader registers"
                )
            stamp = (session.id if session is not None else None) or "1-1-00000000-00000000"
        self.stage.start_bystander(token, kind, stamp)

    def _dismiss(self, token: str) -> None:
        self.stage.wait_until(lambda: token in self.stage.procs, 60.0, f"the bystander {token} is not up")
        self.stage.dismiss(self.stage.procs[token])

    def _hold_daemon(self, for_s: float) -> None:
        self.stage.watched.hold(for_s)

    def _freeze_daemon(self, for_s: float) -> None:
        self.stage.watched.freeze(for_s)

    def _hold_gate(self, for_s: float) -> None:
        self.stage.watched.hold_gate(for_s)

    def _fill_disk(self) -> None:
        self.stage.fill_disk()

    def _free_disk(self) -> None:
        self.stage.free_disk()

    def _kill_daemon(self, after_s: float, forget: bool) -> None:
        self.stage.poll(after_s)
        self.stage.watched.kill()
        self._forget = forget

    def _restart_daemon(self, forget: bool) -> None:
        self.stage.stop_daemon()
        self._forget = forget

    def _start_daemon(self, eagerly: bool, read_only: bool) -> None:
        self.stage.watched.settings_are_good()
        self.stage.free_disk()
        # What a life on a disk that cannot be written learns is lost with it, and so is what was on that disk.
        if self._forget or read_only or self.stage.watched.is_read_only:
            self._forget = False
            self.stage.watched.let_write(True)
            self.stage.forget_state()
        if not read_only:
            self.stage.record.go_back_to(self.stage.watched.last_written())
        self.stage.watched.let_write(not read_only)
        if eagerly:
            self.stage.watched.launch()
        else:
            self.stage.start_daemon()

    def _reload(self, good: bool) -> None:
        self.stage.watched.reload(good=good)

    def _kill_gate(self) -> None:
        self.stage.watched.kill_gate()

    def _ask(self) -> None:
        self.stage.record.read_listing()

    def _pass(self, for_s: float) -> None:
        self.stage.poll(for_s)

    def _calm(self, ends: list[tuple[str, str, int]], bystanders: list[str]) -> None:
        del bystanders  # the stage dismisses everybody
        stage = self.stage
        stage.start_daemon()
        stage.free_disk()
        self._end(ends, patient=True)
        for session in list(stage.sessions.values()):
            if session.outer is None:
                stage.end_leader(session, "kill")
        stage.be_calm()


def abilities(stage: Stage) -> Abilities:
    """Return what can be done here."""
    return Abilities(
        other_users=os.geteuid() == 0,
        cgroups=stage.has_cgroups,
        freezing=stage.watched.can_freeze,
        mounts=stage.watched.has_disk,
    )


# -- what is known when a promise is broken -----------------------------------------------------------


def evidence(violation: Violation, performance: Performance) -> str:
    """Return the facts about a broken promise: steps, processes, and what Reaper says of the sessions."""
    stage = performance.stage
    parts = [f"VIOLATION {violation}", "", "the last steps:", *map(str, performance.last), ""]
    log = stage.daemon.read_log().splitlines()
    for proc in dict.fromkeys(violation.about):
        parts += [_proc_facts(proc), *(f"  log: {line}" for line in log if f"pid={proc.pid} " in line)]
    for session in dict.fromkeys(violation.sessions):
        parts += [_session_facts(session), _told_of(stage, session)]
    parts += ["the end of the daemon's log:", *log[-_SHOWN_LINES:]]
    parts.append(f"the daemon: pid={stage.daemon.pid} life={stage.life.number} running={stage.life.running}")
    return "\n".join(parts)


def _proc_facts(proc: Proc) -> str:
    pid = proc.pid
    lines = [f"process {proc}"]
    if proc.ended_s is None:
        wanted = (b"Name", b"State", b"PPid", b"Uid", b"SigPnd", b"ShdPnd", b"SigBlk", b"SigIgn", b"Threads")
        status = [line for line in harness.read_proc(pid, "status").splitlines() if line.startswith(wanted)]
        lines.append("  status: " + b"; ".join(status).decode("utf-8", "replace").replace("\t", " "))
        for name in ("stat", "cgroup"):
            lines.append(f"  {name}: " + harness.read_proc(pid, name).decode("utf-8", "replace").strip())
        lines.append(f"  cmdline: {harness.cmdline(pid)}")
        marks = [word for word in harness.read_environment(pid).split(b"\0") if word.startswith(b"REAPER_")]
        lines.append(f"  environment: {marks}")
        mapped = [line for line in harness.read_proc(pid, "maps").splitlines() if b"reaper" in line]
        lines.append(f"  mapped: {mapped}")
        lines.append(f"  above: {_ancestry(pid)}")
    return "\n".join(lines)


def _ancestry(pid: int) -> str:
    found: list[str] = []
    while pid > 1 and len(found) < 20:
        pid = harness.parent_of(pid)
        found.append(f"{pid} {' '.join(harness.cmdline(pid))[:60]!r}")
    return " <- ".join(found)


def _session_facts(session: Session) -> str:
    own = {name: value for name, value in vars(session).items() if name not in ("procs", "leader", "outer")}
    lines = [f"session {own}", f"  leader: {session.leader and session.leader.pid}"]
    for proc in session.procs:
        lines.append(
            f"  {proc.token}: pid={proc.pid} {proc.fate} marks={proc.marks} sure={proc.sure} owed={proc.owed}"
            f" at_s={proc.at_s:.3f} ended_s={proc.ended_s} by_us={proc.ended_by_us} signals={proc.signals}"
        )
    return "\n".join(lines)


def _told_of(stage: Stage, session: Session) -> str:
    if session.id is None:
        return "  it has no id"
    lines = []
    stage.watched.let_go_on()
    done = stage.daemon.ctl("ps", "--json")
    listed = json.loads(done.stdout) if done.returncode == 0 else done.stderr
    lines.append(
        f"  ps: {[one for one in listed if one['id'] == session.id] if isinstance(listed, list) else listed}"
    )
    done = stage.daemon.ctl("events", "--json", "--session", session.id)
    lines.append(f"  events: {done.stdout or done.stderr}")
    own = [line for line in stage.daemon.read_log().splitlines() if session.id in line]
    lines += ["  log:", *own[-40:]]
    return "\n".join(lines)
