"""Workers that have lost their pool while their script lives: who is told of, when, and how often."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
from specimens import session

from reaperd import pages
from reaperd.ledger import Entry
from reaperd.linux.procfs import ProcessGone
from reaperd.model import ProcessId, Session
from reaperd.sessions import Sessions
from reaperd.strays import Strays

LEADER, SHELL, WORKER = ProcessId(100, 1000), ProcessId(50, 10), ProcessId(200, 2000)
AGE_S, PERCENT = 10.0, 50.0


class Machine:
    """One session with one worker, as the daemon would find it in /proc and in the session's page."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.ppid, self.ticks, self.dead = 1, 0, False
        self.id: ProcessId | None = WORKER
        self.stray: tuple[float, float] | None = (AGE_S, PERCENT)
        self.told: list[dict[str, Any]] = []
        self.session: Session = session(leader=LEADER)._replace(
            seen=frozenset((WORKER,)), adopters=frozenset((SHELL,))
        )
        self.sessions = mock.create_autospec(Sessions, instance=True)
        self.sessions.entries = {self.session.key: Entry(self.session)}
        self.sessions.record.side_effect = self.told.append
        self.strays = Strays(self.sessions, self, self)  # type: ignore[arg-type]

    def page_of(self, key: object) -> pages.Page:
        return pages.Page("", "", 1, 1, "", -1, (), 0, None, (), stray=self.stray)

    def stat(self, pid: int) -> Any:
        if self.id is None:
            raise ProcessGone(str(pid))
        return mock.Mock(id=self.id, ppid=self.ppid, cpu_ticks=self.ticks, dead=self.dead)

    def look(self, after_s: float, *, busy_s: float = 0.0) -> list[dict[str, Any]]:
        """Let time pass, of which the worker computes for ``busy_s``, look, and return what has been told so far."""
        self.now_s += after_s
        self.ticks += int(busy_s * 100)
        with mock.patch.object(time, "monotonic", return_value=self.now_s):
            self.strays.look()
        return self.told


@pytest.mark.parametrize("adopter", [1, SHELL.pid])
def test_who_is_lost_for_long_enough_and_computes_is_told_of_once(adopter: int) -> None:
    machine = Machine()
    machine.ppid = adopter
    assert machine.look(1.0) == []
    assert machine.look(AGE_S - 0.5, busy_s=AGE_S) == []
    (event,) = machine.look(1.0)
    assert (event["kind"], event["rule"], event["session"]) == ("orphan", "stray", machine.session.id)
    assert event["processes"][0]["pid"] == WORKER.pid
    assert event["processes"][0]["evidence"] == ["lost its pool 10 s ago, and uses 95 % of a core"]
    assert len(machine.look(60.0, busy_s=60.0)) == 1


def test_who_idles_is_told_of_once_it_computes() -> None:
    machine = Machine()
    machine.look(1.0)
    assert machine.look(20.0, busy_s=9.0) == []
    assert len(machine.look(20.0, busy_s=20.0)) == 1


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
def test_who_is_none_is_not_told_of(why: dict[str, Any]) -> None:
    machine = Machine()
    for name, value in why.items():
        setattr(machine, name, value)
    machine.look(1.0)
    assert machine.look(60.0, busy_s=60.0) == []


def test_a_session_whose_leader_is_dead_is_another_matter() -> None:
    machine = Machine()
    machine.sessions.entries = {machine.session.key: Entry(machine.session, died_at_s=0.5)}
    machine.look(1.0)
    assert machine.look(60.0, busy_s=60.0) == []


def test_who_gets_a_parent_again_begins_anew() -> None:
    machine = Machine()
    machine.look(1.0)
    machine.ppid = LEADER.pid
    machine.look(60.0, busy_s=60.0)
    machine.ppid = 1
    assert machine.look(1.0, busy_s=1.0) == []
    assert len(machine.look(AGE_S, busy_s=AGE_S)) == 1
