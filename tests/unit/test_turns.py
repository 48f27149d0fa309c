"""Whose request is next: nobody's can keep the core from another's."""

from __future__ import annotations

from reaperd.turns import GENEROUS, ORDINARY, Turns

ROOT, ONE, TWO = 0, 1000, 1001
MOST = 256


def turns_of(*requests: tuple[int, str]) -> Turns[str]:
    made: Turns[str] = Turns(frozenset((ROOT,)), MOST)
    for uid, request in requests:
        assert made.add(uid, request)
    return made


def test_requests_of_one_user_are_answered_in_their_order() -> None:
    made = turns_of((ONE, "a"), (ONE, "b"), (ONE, "c"))
    assert [made.take(0.0) for _ in range(4)] == ["a", "b", "c", None]


def test_users_take_turns_however_many_requests_one_has() -> None:
    made = turns_of((ONE, "a"), (ONE, "b"), (ONE, "c"), (TWO, "x"), (ROOT, "y"))
    assert [made.take(0.0) for _ in range(5)] == ["a", "x", "y", "b", "c"]


def test_who_has_used_up_its_share_waits_and_the_others_do_not() -> None:
    made = turns_of((ONE, "a"), (ONE, "b"), (TWO, "x"))
    assert made.take(0.0) == "a"
    made.charge(ONE, ORDINARY.saved_s + 0.1, 0.0)
    assert made.take(0.0) == "x"
    assert made.take(0.0) is None
    again_s = made.next_at_s(0.0)
    assert again_s is not None
    assert 0.1 / ORDINARY.per_s < again_s < 0.11 / ORDINARY.per_s
    assert made.take(again_s - 0.01) is None
    assert made.take(again_s) == "b"


def test_over_a_long_time_a_user_gets_its_share_and_no_more() -> None:
    made, now_s, answered = turns_of(), 0.0, 0
    while now_s < 100:
        while made.add(ONE, "dear"):
            pass
        if made.take(now_s) is None:
            now_s += 0.01
            continue
        answered += 1
        now_s += 0.05
        made.charge(ONE, 0.05, now_s)
    assert 100 * ORDINARY.per_s < answered * 0.05 < 102 * ORDINARY.per_s + ORDINARY.saved_s


def test_root_may_take_more_and_not_all() -> None:
    made = turns_of((ROOT, "a"), (ONE, "b"))
    made.charge(ROOT, ORDINARY.saved_s + 0.1, 0.0)
    assert made.take(0.0) == "a"
    made.add(ROOT, "again")
    made.charge(ROOT, GENEROUS.saved_s, 0.0)
    assert made.take(0.0) == "b"
    assert made.take(0.0) is None


def test_nobody_saves_up_for_ever() -> None:
    made = turns_of((ONE, "a"))
    made.charge(ONE, 0.01, 0.0)
    made.charge(ONE, ORDINARY.saved_s, 1_000_000.0)
    assert made.take(1_000_000.0) is None


def test_there_is_nothing_to_wait_for_where_nobody_waits() -> None:
    made = turns_of()
    assert made.next_at_s(5.0) is None
    made.add(ONE, "a")
    assert made.next_at_s(5.0) == 5.0
    made.take(5.0)
    assert made.next_at_s(5.0) is None


def test_only_so_many_requests_wait_and_everybody_may_have_one() -> None:
    made = turns_of()
    users = 50
    for uid in range(users):
        while made.add(uid, "x"):
            pass
    assert made.add(users, "first")
    assert not made.add(users, "second")
    waiting = list(made.drain())
    assert waiting.count("x") <= MOST + users
    assert made.take(0.0) is None
    while made.add(ONE, "x"):
        pass
    assert len(list(made.drain())) == MOST // 4
    for uid in range(10 * MOST):
        made.add(uid, "x")
    assert len(list(made.drain())) == 2 * MOST, "each keeps a descriptor"


def test_accounts_of_users_who_are_long_gone_are_closed() -> None:
    made = turns_of()
    for uid in range(5000):
        made.charge(uid, 0.1, float(uid))
    assert len(made._accounts) < 2000
    made.charge(ONE, 10.0, 5000.0)
    for uid in range(10_000, 12_000):
        made.charge(uid, 0.1, 5001.0)
    made.add(ONE, "a")
    assert made.take(5002.0) is None, "but never one that owes"
