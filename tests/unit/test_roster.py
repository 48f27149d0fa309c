"""All sessions on record: whatever is due is picked out, in order, and at the cost of what is due alone."""

from __future__ import annotations

from collections import Counter

import pytest

from reaperd.ledger import Entry
from reaperd.model import ProcessId, Session, SessionKey
from reaperd.roster import Roster


def entry(name: str = "s", *, uid: int = 1000, pid: int = 7, **facts: object) -> Entry:
    return Entry(Session(name, "", uid, 100, ProcessId(pid, 70), ""), **facts)  # type: ignore[arg-type]


class Deadlines:
    """When something is due for which session; who asks for whose is counted."""

    def __init__(self) -> None:
        self.by_id: dict[str, float | None] = {}
        self.asked: Counter[str] = Counter()

    def __call__(self, one: Entry) -> float | None:
        self.asked[one.session.id] += 1
        return self.by_id.get(one.session.id)


@pytest.fixture
def deadlines() -> Deadlines:
    return Deadlines()


@pytest.fixture
def roster(deadlines: Deadlines) -> Roster:
    return Roster(deadlines)


def due(roster: Roster, now_s: float) -> list[str]:
    return [one.session.id for one in roster.take_due(now_s)]


# -- who is on record -------------------------------------------------------------------------------


def test_sessions_are_found_by_key_the_oldest_first(roster: Roster) -> None:
    for name in "cab":
        roster.put(entry(name))
    roster.put(entry("c", looks=3))
    assert [key.id for key in roster.entries] == ["c", "a", "b"]
    assert roster.entries[SessionKey(1000, "c")].looks == 3
    removed = roster.remove(SessionKey(1000, "a"))
    assert removed == entry("a")
    assert [key.id for key in roster.entries] == ["c", "b"]
    with pytest.raises(KeyError):
        roster.remove(SessionKey(1000, "a"))


def test_the_same_id_of_two_users_is_two_sessions(roster: Roster) -> None:
    roster.put(entry("s", uid=1))
    roster.put(entry("s", uid=2, pid=8))
    assert len(roster.entries) == 2
    assert (roster.count_of(1), roster.count_of(2), roster.count_of(3)) == (1, 1, 0)
    roster.remove(SessionKey(1, "s"))
    assert [one.session.uid for one in roster.take_due(0.0)] == [2]
    assert (roster.count_of(1), roster.count_of(2)) == (0, 1)


def test_the_sessions_of_a_user_are_counted_however_often_they_change(roster: Roster) -> None:
    for _ in range(3):
        for name in "ab":
            roster.put(entry(name))
    assert roster.count_of(1000) == 2
    roster.remove(SessionKey(1000, "a"))
    roster.put(entry("a"))
    assert roster.count_of(1000) == 2


def test_sessions_are_found_by_their_leader_which_may_have_several(roster: Roster) -> None:
    roster.put(entry("a"))
    roster.put(entry("b"))
    roster.put(entry("b", looks=3))
    roster.put(entry("c", pid=8))
    led = roster.led_by(ProcessId(7, 70))
    assert sorted((one.session.id, one.looks) for one in led) == [("a", 0), ("b", 3)]
    assert roster.led_by(ProcessId(7, 71)) == []
    roster.remove(SessionKey(1000, "a"))
    assert [one.session.id for one in roster.led_by(ProcessId(7, 70))] == ["b"]
    roster.remove(SessionKey(1000, "b"))
    assert roster.led_by(ProcessId(7, 70)) == []
    roster.remove(SessionKey(1000, "c"))
    assert not roster._by_leader, "leaders come and go for years"
    assert not roster._by_uid


# -- what is due ------------------------------------------------------------------------------------


def test_whoever_has_changed_is_due_once_the_oldest_change_first(roster: Roster) -> None:
    assert roster.next_deadline() is None
    for name in "bcab":
        roster.put(entry(name))
    assert roster.next_deadline() == 0.0
    assert due(roster, 5.0) == ["b", "c", "a"]
    assert due(roster, 5.0) == []
    assert roster.next_deadline() is None
    roster.put(entry("c"))
    roster.put(entry("b"))
    assert due(roster, 5.0) == ["c", "b"]


def test_who_is_due_is_told_as_it_is_by_then(roster: Roster) -> None:
    roster.put(entry("a"))
    roster.put(entry("a", looks=7))
    (one,) = roster.take_due(0.0)
    assert one.looks == 7


def test_a_session_is_due_when_its_time_has_come_and_not_before(roster: Roster, deadlines: Deadlines) -> None:
    deadlines.by_id = {"a": 10.0, "b": 20.0, "c": None}
    for name in "abc":
        roster.put(entry(name))
    due(roster, 5.0)
    assert roster.next_deadline() == 10.0
    assert due(roster, 9.999) == []
    deadlines.by_id["a"] = None
    assert due(roster, 10.0) == ["a"]
    assert roster.next_deadline() == 20.0
    deadlines.by_id["b"] = None
    assert due(roster, 1e9) == ["b"]
    assert roster.next_deadline() is None


def test_of_several_whose_time_has_come_all_are_due(roster: Roster, deadlines: Deadlines) -> None:
    deadlines.by_id = {"a": 12.0, "b": 11.0, "c": 12.0, "d": 13.0}
    for name in "abcd":
        roster.put(entry(name))
    due(roster, 0.0)
    deadlines.by_id = {"d": 13.0}
    assert sorted(due(roster, 12.0)) == ["a", "b", "c"]
    assert roster.next_deadline() == 13.0


def test_a_deadline_that_has_passed_is_due_at_once_and_as_long_as_it_stays(
    roster: Roster, deadlines: Deadlines
) -> None:
    deadlines.by_id = {"a": 3.0}
    roster.put(entry("a"))
    for _ in range(5):
        assert due(roster, 5.0) == ["a"]
        assert roster.next_deadline() == 3.0
    deadlines.by_id = {"a": 8.0}
    assert due(roster, 5.0) == ["a"]
    assert due(roster, 5.0) == []
    assert roster.next_deadline() == 8.0


def test_a_deadline_that_was_moved_is_not_due_at_its_old_time(roster: Roster, deadlines: Deadlines) -> None:
    deadlines.by_id = {"a": 10.0}
    roster.put(entry("a"))
    due(roster, 0.0)
    for later in (20.0, 30.0):
        deadlines.by_id = {"a": later}
        roster.put(entry("a"))
        due(roster, 1.0)
        assert roster.next_deadline() == later
    assert due(roster, 10.0) == []
    assert due(roster, 20.0) == []
    assert roster.next_deadline() == 30.0
    deadlines.by_id = {"a": 25.0}
    roster.put(entry("a"))
    due(roster, 21.0)
    deadlines.by_id = {}
    assert due(roster, 25.0) == ["a"], "to an earlier one, too"
    assert due(roster, 30.0) == []


def test_a_deadline_that_was_moved_and_moved_back_holds(roster: Roster, deadlines: Deadlines) -> None:
    for at in (10.0, 20.0, 10.0):
        deadlines.by_id = {"a": at}
        roster.put(entry("a"))
        due(roster, 0.0)
    assert roster.next_deadline() == 10.0
    deadlines.by_id = {}
    assert due(roster, 10.0) == ["a"], "once, however often it was noted"
    assert due(roster, 20.0) == []


def test_a_deadline_that_was_dropped_is_no_longer_due(roster: Roster, deadlines: Deadlines) -> None:
    deadlines.by_id = {"a": 10.0}
    roster.put(entry("a"))
    due(roster, 0.0)
    deadlines.by_id = {}
    roster.put(entry("a"))
    due(roster, 0.0)
    assert roster.next_deadline() is None
    assert due(roster, 10.0) == []


def test_who_was_taken_off_the_record_is_never_due_again(roster: Roster, deadlines: Deadlines) -> None:
    deadlines.by_id = {"a": 10.0, "b": 20.0}
    for name in "ab":
        roster.put(entry(name))
    due(roster, 0.0)
    roster.put(entry("a"))
    roster.remove(SessionKey(1000, "a"))
    assert roster.next_deadline() == 20.0
    assert due(roster, 10.0) == []
    roster.put(entry("a"))
    deadlines.by_id["a"] = 30.0
    assert due(roster, 10.0) == ["a"]
    assert due(roster, 11.0) == [], "what it was due at in its former life is over"


def test_when_the_rules_have_changed_all_are_looked_through(roster: Roster, deadlines: Deadlines) -> None:
    deadlines.by_id = {"a": 100.0, "b": None}
    for name in "ab":
        roster.put(entry(name))
    due(roster, 0.0)
    deadlines.by_id = {"a": 5.0}
    roster.touch()
    assert roster.next_deadline() == 0.0
    assert due(roster, 1.0) == ["a", "b"]
    assert roster.next_deadline() == 5.0


def test_what_happens_to_one_of_very_many_sessions_costs_what_one_costs(
    roster: Roster, deadlines: Deadlines
) -> None:
    for number in range(2000):
        deadlines.by_id[str(number)] = 1000.0 + number
        roster.put(entry(str(number), pid=number + 1))
    due(roster, 0.0)
    deadlines.asked.clear()
    roster.put(entry("7", pid=8))
    assert due(roster, 1.0) == ["7"]
    assert due(roster, 1000.0) == ["0"]
    assert deadlines.asked.keys() == {"7", "0"}
    assert roster.next_deadline() == 1000.0
    deadlines.by_id["0"] = None
    due(roster, 1000.0)
    assert roster.next_deadline() == 1001.0


def test_a_deadline_that_does_not_move_is_noted_once_however_often_its_session_changes(
    roster: Roster, deadlines: Deadlines
) -> None:
    deadlines.by_id = {"a": 1000.0}
    for looks in range(500):
        roster.put(entry("a", looks=looks))
        due(roster, 1.0)
    assert len(roster._queue) == 1
