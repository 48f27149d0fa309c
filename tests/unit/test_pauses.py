from __future__ import annotations

from reaperd import pauses
from reaperd.pauses import Pauses


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_pauses_double_up_to_the_longest_and_end() -> None:
    clock = Clock()
    of = Pauses(clock)
    assert "one" not in of
    for length_s in (5, 10, 20, 40, 80, 160, 300, 300):
        assert of.begin("one") == length_s
        assert of.until_s("one") == clock.now_s + length_s
        assert of.until_s("other") is None
        clock.now_s += length_s
        assert of.until_s("one") is None
        assert "one" in of


def test_who_is_forgotten_begins_anew() -> None:
    of = Pauses(Clock())
    of.begin("one")
    of.forget("one")
    of.forget("other")
    assert "one" not in of
    assert of.begin("one") == pauses.FIRST_S


def test_who_failed_long_ago_is_forgotten_where_there_are_many() -> None:
    clock = Clock()
    of = Pauses(clock)
    for number in range(3000):
        of.begin(number)
    assert all(number in of for number in range(3000))
    clock.now_s += pauses.FIRST_S + pauses.LONGEST_S + 1
    of.begin("one")
    assert "one" in of
    assert not any(number in of for number in range(3000))
