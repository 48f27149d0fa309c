"""Who waits for events is told of those that it may see and has asked for, once."""

from __future__ import annotations

from typing import Any

from reaperd import waiters
from reaperd.questions import Question
from reaperd.waiters import News, Waiter, Waiters

ALICE, BOB = 1000, 1001


def news(
    seq: int, session: str | None = "s", uid: int | None = ALICE, at_s: float = 100.0, kind: str = "ended"
) -> News:
    return News(seq, at_s, {"kind": kind, "session": session, "uid": uid})


def ask(
    of: Waiters[str],
    to: str,
    *,
    uid: int = ALICE,
    session: str | None = None,
    until_s: float = 25.0,
    **more: Any,
) -> None:
    facts = {"after": 0, "since_epoch_s": 0.0, "uid": uid, **more}
    of.add(Waiter(to, uid, Question(session=session, **facts), until_s))


def told(of: Waiters[str], now_s: float = 0.0) -> dict[str, list[int]]:
    return {to: [one.seq for one in news] for to, news in of.take(now_s)}


def test_who_waits_is_told_what_happens_next_and_then_waits_no_more() -> None:
    of: Waiters[str] = Waiters()
    ask(of, "a")
    assert not of.has_news()
    of.note(news(7))
    of.note(news(8))
    assert of.has_news()
    assert told(of) == {"a": [7, 8]}
    of.note(news(9))
    assert told(of) == {}


def test_everybody_is_told_of_its_own_and_the_daemons_events_alone() -> None:
    of: Waiters[str] = Waiters()
    for one in (news(1), news(2, uid=BOB), news(3, None, None)):
        ask(of, "alice")
        ask(of, "bob", uid=BOB)
        ask(of, "root", uid=None)  # type: ignore[arg-type]
        of.note(one)
        expected = {1: {"alice", "root"}, 2: {"bob", "root"}, 3: {"alice", "bob", "root"}}[one.seq]
        assert told(of) == {key: [one.seq] for key in expected}
        told(of, 25.0)


def test_who_asks_for_an_owner_or_for_kinds_is_told_of_those_alone() -> None:
    of: Waiters[str] = Waiters()
    ask(of, "alice's", uid=None, owner=ALICE)  # type: ignore[arg-type]
    ask(of, "the reaped", uid=None, kinds=("reaped", "killed"))  # type: ignore[arg-type]
    ask(of, "both", uid=None, owner=ALICE, kinds=("reaped",))  # type: ignore[arg-type]
    ask(of, "what bob may see of alice's", uid=BOB, owner=ALICE)
    of.note(news(1, None, None, kind="started"))
    of.note(news(2, uid=BOB, kind="reaped"))
    of.note(news(3, kind="ended"))
    assert told(of) == {"alice's": [3], "the reaped": [2]}
    of.note(news(4, kind="reaped"))
    assert told(of) == {"both": [4]}
    assert told(of, 25.0) == {"what bob may see of alice's": []}


def test_a_question_about_one_session_is_answered_with_its_events_alone() -> None:
    of: Waiters[str] = Waiters()
    ask(of, "s", session="s")
    ask(of, "t", session="t")
    ask(of, "all of s", session="s", uid=None)  # type: ignore[arg-type]
    of.note(news(1, "u"))
    of.note(news(2, None, None))
    of.note(news(3, "s", BOB))
    assert told(of) == {"all of s": [3]}, "an id is its owner's word: another user can say the same one"
    of.note(news(4, "t"))
    assert told(of) == {"t": [4]}


def test_what_was_seen_already_or_is_too_old_is_no_news() -> None:
    of: Waiters[str] = Waiters()
    ask(of, "after", after=5)
    ask(of, "since", since_epoch_s=200.0)
    of.note(news(5))
    assert told(of) == {}
    of.note(news(6, at_s=199.0))
    assert told(of) == {"after": [6]}
    of.note(news(7, at_s=200.0))
    assert told(of) == {"since": [7]}


def test_who_has_waited_long_enough_is_told_that_there_is_nothing() -> None:
    of: Waiters[str] = Waiters()
    assert of.next_deadline() is None
    ask(of, "late", until_s=20.0)
    ask(of, "soon", until_s=10.0)
    assert of.next_deadline() == 10.0
    assert told(of, 9.9) == {}
    assert told(of, 10.0) == {"soon": []}
    assert of.next_deadline() == 20.0
    assert told(of, 30.0) == {"late": []}
    assert of.next_deadline() is None


def test_there_is_room_for_so_many_of_one_user_and_in_all() -> None:
    of: Waiters[str] = Waiters()
    for number in range(waiters.MAX_OF_ONE):
        assert of.may_wait(ALICE)
        ask(of, str(number))
    assert not of.may_wait(ALICE)
    assert of.may_wait(BOB)
    of.note(news(1))
    assert len(told(of)) == waiters.MAX_OF_ONE
    assert of.may_wait(ALICE)
    for number in range(waiters.MAX_OF_ALL):
        ask(of, str(number), uid=number)
    assert not of.may_wait(ALICE)
    told(of, 25.0)
    assert of.may_wait(ALICE)


def test_where_nobody_waits_nothing_is_remembered() -> None:
    of: Waiters[str] = Waiters()
    of.note(news(1))
    ask(of, "a")
    assert told(of) == {}
