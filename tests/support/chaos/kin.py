"""Who belongs to whom, from what every process told of itself: what Reaper finds out is held against this."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from harness import has_ended, read_proc

# How a member can be known, once its leader is dead.
PAGE, STAMP, DESCENT, NONE = "page", "stamp", "descent", "none"
# What may become of a process: the first three are members; the others must never be touched.
LEADER, WORKER, TRACKER = "leader", "worker", "tracker"
UNTOUCHABLE = ("spared", "stranger", "bystander")
NOT_YET_SPARED = "spared-when-started"


@dataclass(eq=False)
class Proc:
    """One process. ``session`` is the innermost one that it belongs to, None for bystanders."""

    token: str
    pid: int
    pidfd: int
    fate: str
    marks: str
    at_s: float  # monotonic: when it was what it is
    session: Session | None = field(repr=False)
    silent: bool = False  # another program by now, with all signals blocked: none may be pending
    detached: bool = False
    parent: str | None = None  # the token of the worker below which it stands, where that matters
    tracks: bool = False  # looks like a resource tracker by now
    ended_s: float | None = None
    status: int | None = None  # wait(2), where its parent has waited for it and the kernel tells (Linux 6.15)
    ended_by_us: bool = False
    sure: bool = False  # on the daemon's record as a member that only descent tells
    owed: bool | None = None  # once its leader is dead: whether Reaper must end it (None: it may)
    signals: list[tuple[float, int, int]] = field(default_factory=list)  # when, which, from whom

    @property
    def alive(self) -> bool:
        """Whether it is, as the kernel says: news of its end may still be on the way."""
        return self.ended_s is None and not has_ended(self.pidfd)

    @property
    def untouchable(self) -> bool:
        return self.fate in UNTOUCHABLE

    def send(self, number: int) -> None:
        """Send a signal ourselves."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def end(self) -> None:
        """SIGKILL it ourselves."""
        self.ended_by_us = True
        self.send(signal.SIGKILL)

    def traces(self) -> str:
        """Return what signals have left on a process that must get none: pending ones, or that it is stopped."""
        found = []
        for line in read_proc(self.pid, "status").splitlines():
            name, _, value = line.decode("ascii", "replace").partition(":")
            if self.silent and name in ("SigPnd", "ShdPnd") and int(value, 16):
                found.append(f"{name} {value.strip()}")
            if name == "State" and value.strip()[:1] in "Tt":
                found.append(f"State {value.strip()}")
        return ", ".join(found)


@dataclass(eq=False)
class Session:
    """What one leader started."""

    token: str
    outer: Session | None
    adopted: bool  # what it leaves goes to a subreaper that is no init
    own_cgroup: bool
    control: socket.socket | None = None
    leader: Proc | None = None
    procs: list[Proc] = field(default_factory=list)
    id: str | None = None
    accepted: bool | None = None  # by a daemon, at registration
    told_s: float | None = None  # monotonic: when it said whether it was
    registered_in_life: int = -1
    started: set[str] = field(default_factory=set)
    unregistered_s: float | None = None  # when it was told to
    lost: bool = False  # the daemon's state was deleted since
    unwritten: bool = (
        False  # the daemon's disk was full in its time: what it tells of the session may be lost
    )
    deaf: bool = False
    # Its end: what was done to the leader, and what Reaper should tell of it.
    ordered_s: float | None = None
    manner: str = ""
    code: int = 0
    asked_to_stop: bool = False
    stop_asked: tuple[int, float] | None = None  # in which life of the daemon, and when on its clock
    dead_s: float | None = None
    counted_from_s: float = 0.0  # on the daemon's clock
    settled_from_s: float | None = None  # on the daemon's clock: since nobody is left whom Reaper must end
    # What the daemon's history says, since its state was last deleted.
    begun: bool = False
    ends: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ended_well(self) -> bool:
        """Whether what is left is to have ``exit_grace``."""
        return self.manner in ("clean", "exception", "unregister", "unregister-at-once") or (
            self.unregistered_s is not None and self.manner == "at-once"
        )

    @property
    def may_have_ended_well(self) -> bool:
        """Whether a daemon that was away can take it so: the page says no more than that the session was ended."""
        return self.ended_well or self.unregistered_s is not None

    @property
    def dead(self) -> bool:
        """Whether the leader is: asked of the kernel, for news of it may still be on the way."""
        return self.dead_s is not None or (self.leader is not None and not self.leader.alive)

    def chain(self) -> list[Session]:
        """Return this session and those around it, innermost first."""
        return [self, *(self.outer.chain() if self.outer is not None else [])]

    def expected_cause(self) -> dict[str, Any] | None:
        """Return the cause that an event must tell, None where it can be another."""
        match self.manner:
            case "kill":
                return {"kind": "signal", "code": 9}
            case "term":
                return {"kind": "signal", "code": 15}
            case "segv":
                return {"kind": "signal", "code": 11}
            case "exception":
                return {"kind": "exit", "code": 1}
            case "at-once" | "clean" | "unregister" | "unregister-at-once":
                return {"kind": "exit", "code": self.code}
            case "stop":
                return {"kind": "signal", "code": 9 if self.deaf else 15}
        return None


def owes(session: Session, proc: Proc) -> bool | None:
    """Say whether Reaper must end ``proc``, now that the leader of ``session`` is dead; None where it may.

    DESIGN.md section 3 names what it cannot find: who carries no mark, was not seen, and has no parent among the members.
    And in the root cgroup, an exec'ed one counts only where its parent adopts: a subreaper must be seen to have done so.
    """
    if proc.untouchable:
        return False
    if proc.fate == NOT_YET_SPARED:
        return None
    proven = not session.adopted or session.own_cgroup or proc.sure
    if proc.marks == STAMP and not proven:
        known = session.accepted and not session.lost
        witness = any(p.marks == PAGE and p.fate == WORKER and p.alive for p in session.procs)
        return True if known and witness else None
    if proc.marks == DESCENT:
        if proc.sure:
            return True
        above = next((p for p in session.procs if p.token == proc.parent), None)
        return owes(session, above) if above is not None and above.alive else None
    return True


class Violation(AssertionError):
    """Reaper broke a promise; ``about`` are the processes and ``sessions`` the sessions it concerns."""

    def __init__(self, text: str, about: Iterable[Proc] = (), sessions: Iterable[Session] = ()) -> None:
        super().__init__(text)
        self.about = list(about)
        self.sessions = [*sessions, *(p.session for p in self.about if p.session is not None)]
