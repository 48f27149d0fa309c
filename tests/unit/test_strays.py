"""Workers that have lost their pool while their script lives: who is reported, when, and how often."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from specimens import session

from agent.strays import Watch
from reaperd import pages
from reaperd.ledger import Entry
from reaperd.linux.procfs import TICKS_PER_S, ProcessGone
from reaperd.model import ProcessId, Session
from reaperd.strays import Strays

LEADER, SHELL, WORKER = ProcessId(100, 1000), ProcessId(50, 10), ProcessId(200, 2000)
AGE_S, PERCENT = 10.0, 50.0


# -- from look to look ------------------------------------------------------------------------------


class Looks:
    """Looks at one worker."""

    def __init__(self) -> None:
        self._watch, self._now_s, self._ticks = Watch(AGE_S, PERCENT), 0.0, 0

    def after(self, seconds: float, *, busy: float = 0.0, lost: bool = True) -> list[tuple[float, float]]:
        """Let time pass, in which the worker computes for a share of it, and return what a look then finds."""
        self._now_s += seconds
        self._ticks += round(seconds * busy * TICKS_PER_S)
        found = self._watch.look(self._now_s, {WORKER: self._ticks} if lost else {})
        return [(one.seconds, round(one.percent)) for one in found]


def test_a_stray_is_who_has_been_lost_for_long_enough_and_computes() -> None:
    looks = Looks()
    assert looks.after(1.0, busy=1.0) == []
    assert looks.after(AGE_S - 0.5, busy=1.0) == []
    assert looks.after(1.0, busy=0.8) == [(AGE_S + 0.5, 80)]


def test_who_idles_by_now_is_none_whatever_it_did_before_and_the_other_way_round() -> None:
    looks = Looks()
    looks.after(1.0)
    assert looks.after(3600.0, busy=1.0) == [(3600.0, 100)]
    assert looks.after(30.0, busy=0.1) == []
    assert looks.after(3600.0, busy=0.0) == []
    assert looks.after(30.0, busy=0.9) == [(7260.0, 90)]


def test_two_looks_at_nearly_the_same_time_tell_the_same() -> None:
    looks = Looks()
    looks.after(1.0)
    assert looks.after(AGE_S, busy=0.6) == [(AGE_S, 60)]
    assert looks.after(0.001) == [(AGE_S + 0.001, 60)]


def test_the_first_look_finds_nobody_however_short_the_age() -> None:
    watch = Watch(0.0, 0.0)
    assert watch.look(1.0, {WORKER: 10}) == []


def test_who_gets_a_parent_again_begins_anew() -> None:
    looks = Looks()
    looks.after(1.0)
    looks.after(60.0, busy=1.0, lost=False)
    assert looks.after(1.0, busy=1.0) == []
    assert looks.after(AGE_S, busy=1.0) == [(AGE_S, 100)]


# -- whom the daemon looks at -----------------------------------------------------------------------


class Sessions:
    """One session."""

    def __init__(self, one: Session) -> None:
        self.entries = {one.key: Entry(one)}
        self.recorded: list[dict[str, Any]] = []
        self.record = self.recorded.append

    def trying(self, key: object, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Machine:
    """One worker, as the daemon finds it in /proc, and what stands in the page of its session."""

    def __init__(self) -> None:
        self.now_s, self.ticks = 0.0, 0
        self.ppid, self.dead = 1, False
        self.id: ProcessId | None = WORKER
        self.stray: tuple[float, float] | None = (AGE_S, PERCENT)
        self.session = session(leader=LEADER)._replace(
            seen=frozenset((WORKER,)), adopters=frozenset((SHELL,))
        )
        self.sessions = Sessions(self.session)
        self.strays = Strays(self.sessions, self, self, clock=lambda: self.now_s)  # type: ignore[arg-type]

    def page_of(self, key: object) -> pages.Page:
        return pages.Page("", "", 1, 1, "", -1, (), 0, None, (), stray=self.stray)

    def stat(self, pid: int) -> Any:
        if self.id is None:
            raise ProcessGone(str(pid))
        return SimpleNamespace(id=self.id, ppid=self.ppid, cpu_ticks=self.ticks, dead=self.dead)

    def look(self, after_s: float) -> list[dict[str, Any]]:
        """Let time pass, of which the worker computes throughout, look, and return what has been recorded so far."""
        self.now_s += after_s
        self.ticks += round(after_s * TICKS_PER_S)
        self.strays.look()
        return self.sessions.recorded


@pytest.mark.parametrize("adopter", [1, SHELL.pid])
def test_a_stray_is_reported_once(adopter: int) -> None:
    machine = Machine()
    machine.ppid = adopter
    machine.look(1.0)
    (event,) = machine.look(AGE_S)
    assert (event["kind"], event["rule"], event["session"]) == ("orphan", "stray", machine.session.id)
    assert event["processes"][0]["pid"] == WORKER.pid
    assert event["processes"][0]["evidence"] == ["lost its pool 10 s ago, and uses 100 % of a core"]
    assert len(machine.look(60.0)) == 1


def test_a_session_that_asks_otherwise_is_looked_at_anew() -> None:
    machine = Machine()
    machine.look(1.0)
    machine.stray = (2 * AGE_S, PERCENT)
    assert machine.look(AGE_S) == []
    assert machine.look(AGE_S) == []
    assert len(machine.look(AGE_S)) == 1


@pytest.mark.parametrize(
    "why",
    [
        {"ppid": LEADER.pid},
        {"ppid": 300},  # somebody else's job by now
        {"dead": True},
        {"id": None},
        {"id": ProcessId(WORKER.pid, 2001)},  # another process with that pid
        {"stray": None},
    ],
)
def test_who_is_none_is_not_reported(why: dict[str, Any]) -> None:
    machine = Machine()
    for name, value in why.items():
        setattr(machine, name, value)
    machine.look(1.0)
    assert machine.look(60.0) == []


def test_a_session_whose_leader_is_dead_is_another_matter() -> None:
    machine = Machine()
    machine.sessions.entries = {machine.session.key: Entry(machine.session, died_at_s=0.5)}
    machine.look(1.0)
    assert machine.look(60.0) == []
