"""What Reaper promises, held against what became of processes: nobody touched who must not be, nobody alive who must not be."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

import harness
from chaos.kin import LEADER, TRACKER, Proc, Session, Violation
from chaos.life import Life
from chaos.watched import EXIT_GRACE_S, GRACE_S, INTERVAL_S, TRACKER_GRACE_S

# No message told of such a session: it is found by its marks, when it is their turn (sweep.py).
ADOPTED_WITHIN_S = 17 * INTERVAL_S + 1.0
# From the end of the last member to the event, on the daemon's clock; nothing is promised about it.
CONCLUDED_WITHIN_S = 120.0
# On a machine that is busy with other things, and for who has SIGKILL pending: late is not lost.
LATE_BY_S = 60.0


class Promises:
    """Raises Violation. Times are the daemon's own: ``life`` stands still while there is none."""

    def __init__(self, life: Life, count: Callable[[str], None]) -> None:
        self.life = life
        self._count = count
        self._late: set[Proc] = set()
        # Monotonic: when so much wanted to run last that nobody can promise a time.
        self._busy_s = float("-inf")

    def forget(self) -> None:
        """Forget who was late: nobody is left."""
        self._late.clear()

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
        if not waits or proc.tracks or proc.fate == LEADER or innermost.ordered_s is None:
            return
        if not self.life.unbroken_since(innermost.ordered_s) or innermost is not proc.session:
            return
        if at_s < innermost.ordered_s + EXIT_GRACE_S:
            early_s = innermost.ordered_s + EXIT_GRACE_S - at_s
            raise Violation(
                f"TOO EARLY: {proc.token} {what} {early_s:.3f} s before exit_grace was over", [proc]
            )

    def check_deadlines(self, sessions: Iterable[Session]) -> None:
        """Raise Violation where somebody outlived what section 4 of DESIGN.md promises."""
        if is_busy():
            self._busy_s = time.monotonic()
        if not self.life.running:
            return
        now_s = self.life.now_s()
        for session in sessions:
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
            elif (
                session.begun
                and not (session.ends or session.unwritten)
                and now_s > session.settled_from_s + CONCLUDED_WITHIN_S
            ):
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
        if not is_dying(session.leader.pid) and self._busy_s < time.monotonic() - LATE_BY_S:
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
        assert session.dead_s is not None, "only who is dead has a deadline"
        if late_s < LATE_BY_S and (self._busy_s > session.dead_s or is_dying(proc.pid)):
            if proc not in self._late:
                self._late.add(proc)
                self._count("late, on a busy machine")
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
        if not self.is_known(session):
            promise_s += ADOPTED_WITHIN_S
        return promise_s

    def is_known(self, session: Session) -> bool:
        """Say whether a daemon was told of the session, or has started since it began, and kept what it knew."""
        if session.unregistered_s is not None and (session.lost or not session.accepted):
            return False  # nobody has a page that names a leader who lives
        return bool(session.accepted) or (
            session.id is not None and self.life.number > session.registered_in_life
        )

    def check_untouched(self, procs: Iterable[Proc]) -> None:
        """Raise Violation where something was sent to somebody who keeps silent about it."""
        for proc in procs:
            if proc.ended_s is None and proc.untouchable and (traces := proc.traces()):
                raise Violation(f"WRONG SIGNAL: {proc.token}, {proc.fate}, has {traces}", [proc])


def is_dying(pid: int) -> bool:
    """Say whether SIGKILL is on its way to ``pid``: then it is the machine that is late."""
    for line in harness.read_proc(pid, "status").splitlines():
        if line.startswith((b"SigPnd:", b"ShdPnd:")) and int(line.split()[1], 16) >> 8 & 1:
            return True
    return False


def is_busy() -> bool:
    """Say whether so much wants to run here that nobody can promise a time."""
    return os.getloadavg()[0] > 2 * (os.cpu_count() or 1)
