"""Whom sessions lay claim to, and whom they were meant to leave alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
from specimens import ME, child, id_of

from agent import wire
from reaperd.claims import Claims, Marks
from reaperd.ledger import Entry
from reaperd.linux.procfs import ProcFS
from reaperd.model import Process, ProcessId, Session, SessionKey
from reaperd.verdicts import Parent, Suspect

DEAD_LEADERS = wire.format_session_id(ME, 1, 1, 2)  # we have not started then
UID = 1000


class Sessions(NamedTuple):
    entries: Mapping[SessionKey, Entry] = {}


def sessions(*found: Session) -> Any:
    return Sessions({session.key: Entry(session) for session in found})


def session(id_: str, **facts: Any) -> Session:
    return Session(id_, "", UID, UID, ProcessId(7, 7), "", **facts)


def suspect(**marks: Any) -> Suspect:
    return Suspect(Process(ProcessId(500, 9), 1, UID, "python3", **marks), None, Parent(1, "init", "adopts"))


@pytest.fixture
def living() -> str:
    """The id of a session whose leader lives, and that nobody has on record."""
    return wire.format_session_id(ME, id_of(ME).start_ticks, 1, 2)


@pytest.mark.parametrize("marks", ["lineage", "pages"])
def test_who_carries_the_mark_of_a_living_leader_is_its_sessions(marks: str, living: str) -> None:
    proc = ProcFS()
    one = suspect(**{marks: (living,)})
    for claims in (Marks(proc), Claims(sessions(), proc)):
        assert claims.session_of(one) == (living, "")
        assert claims.session_of(suspect(**{marks: (DEAD_LEADERS,)})) == ("", "")
        assert claims.session_of(suspect(**{marks: ("no id",)})) == ("", "")
        assert claims.session_of(suspect()) == ("", "")


def test_a_dead_leaders_session_on_record_keeps_its_own_users_alone() -> None:
    claims = Claims(sessions(session(DEAD_LEADERS)), ProcFS())
    one = suspect(lineage=(DEAD_LEADERS,))
    assert claims.session_of(one) == (DEAD_LEADERS, "")
    assert claims.session_of(one._replace(process=one.process._replace(uid=UID + 1))) == ("", "")


@pytest.mark.parametrize("where", ["seen", "kept"])
def test_a_member_without_any_mark_is_its_sessions(where: str) -> None:
    claims = Claims(sessions(session(DEAD_LEADERS, **{where: frozenset({ProcessId(500, 9)})})), ProcFS())
    assert claims.session_of(suspect()) == (DEAD_LEADERS, "")


def test_what_is_on_record_later_counts_then() -> None:
    on_record: dict[SessionKey, Entry] = {}
    claims = Claims(Sessions(on_record), ProcFS())  # type: ignore[arg-type]
    assert claims.session_of(suspect()) == ("", "")
    one = session(DEAD_LEADERS, seen=frozenset({ProcessId(500, 9)}))
    on_record[one.key] = Entry(one)
    assert claims.session_of(suspect()) == (DEAD_LEADERS, "")
    on_record[one.key] = Entry(session(DEAD_LEADERS))
    assert claims.session_of(suspect()) == ("", "")


def test_who_was_meant_to_outlive_a_session_is_nobodys(living: str) -> None:
    one = suspect(lineage=(living,), spared=frozenset({living}))
    for claims in (Marks(ProcFS()), Claims(sessions(session(living)), ProcFS())):
        assert claims.session_of(one) == ("", living)


def test_a_leader_that_has_ended_meanwhile_claims_nobody() -> None:
    with child() as pid:
        id_ = wire.format_session_id(pid, id_of(pid).start_ticks, 1, 2)
        assert Marks(ProcFS()).session_of(suspect(lineage=(id_,))) == (id_, "")
    assert Marks(ProcFS()).session_of(suspect(lineage=(id_,))) == ("", "")
