"""Many events become few messages, each is counted once, and what fails is tried again until it is given up."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from reaperd.alert_groups import (
    FEW,
    FIRST_RETRY_S,
    GIVE_UP_AFTER_S,
    LONGEST_RETRY_S,
    LONGEST_WINDOW_S,
    SETTLE_S,
    Group,
    Message,
    Outbox,
    Outcome,
    count_in,
)

WINDOW_S = 60.0


def one(kind: str = "reaped", line: str = "x", events: int = 1) -> Group:
    return Group(kind, events, "first", "last", (line,))


class Clock:
    """Lets time pass for an outbox, and sends what is due; ``fails_until_s``: nobody takes anything before."""

    def __init__(self, window_s: float = WINDOW_S, fails_until_s: float = 0.0) -> None:
        self.outbox = Outbox(window_s)
        self.fails_until_s = fails_until_s
        self.now_s = 0.0
        self.sent: list[tuple[float, Message]] = []
        self.attempts: list[float] = []
        self.given_up = 0

    def until(self, end_s: float) -> None:
        while (due_s := self.outbox.next_deadline()) is not None and due_s <= end_s:
            self.now_s = max(self.now_s, due_s)
            message = self.outbox.take(self.now_s)
            assert message
            assert self.outbox.next_deadline() is None, "one at a time"
            self.attempts.append(self.now_s)
            taken = self.now_s >= self.fails_until_s
            self.given_up += self.outbox.done(Outcome.SENT if taken else Outcome.FAILED, self.now_s)
            if taken:
                self.sent.append((self.now_s, message))
        self.now_s = end_s

    def note(self, group: Group) -> None:
        self.outbox.note(group, self.now_s)


def test_the_first_event_is_told_of_after_a_second_with_those_that_joined_it() -> None:
    clock = Clock()
    clock.note(one(line="a"))
    clock.until(0.5)
    assert clock.sent == []
    clock.note(one(line="b"))
    clock.until(30)
    assert clock.sent == [(SETTLE_S, (Group("reaped", 2, "first", "last", ("a", "b")),))]


def test_nothing_is_due_while_nothing_waits() -> None:
    outbox = Outbox(WINDOW_S)
    assert outbox.next_deadline() is None
    assert outbox.take(1e9) == ()


def test_what_is_not_due_is_taken_only_at_once() -> None:
    outbox = Outbox(WINDOW_S)
    outbox.note(one(), 0.0)
    assert outbox.take(0.5) == ()
    assert outbox.take(0.5, at_once=True) == (one(),)


def test_a_burst_of_a_thousand_is_one_message_that_counts_them_and_has_the_first_few() -> None:
    clock = Clock()
    for number in range(1000):
        clock.note(one(line=str(number)))
    clock.until(3600)
    ((_, (group,)),) = clock.sent
    assert (group.events, group.lines) == (1000, ("0", "1", "2", "3", "4"))


def test_events_that_go_on_make_messages_that_grow_rare_until_a_quiet_time() -> None:
    clock = Clock()
    for second in range(20_000):
        clock.until(float(second))
        clock.note(one())
    clock.until(100_000)
    times = [at_s for at_s, _ in clock.sent]
    gaps = [round(later - sooner) for sooner, later in itertools.pairwise(times)]
    assert gaps[:6] == [60, 120, 240, 480, 960, 1920]
    assert max(gaps) == LONGEST_WINDOW_S
    assert sum(count_in(message) for _, message in clock.sent) == 20_000
    clock.note(one())
    clock.until(100_030)
    clock.note(one())
    clock.until(200_000)
    times = [at_s for at_s, _ in clock.sent][-2:]
    assert times == [100_000 + SETTLE_S, 100_000 + SETTLE_S + WINDOW_S], "short again"


def test_another_kind_does_not_wait_for_the_window_of_the_first_and_takes_along_what_does() -> None:
    clock = Clock()
    clock.note(one())
    clock.until(10)
    clock.note(one())
    clock.note(one("stuck"))
    clock.until(3600)
    assert [at_s for at_s, _ in clock.sent] == [SETTLE_S, 10 + SETTLE_S]
    assert [group.kind for group in clock.sent[1][1]] == ["reaped", "stuck"]


def test_what_fails_is_tried_again_with_what_came_since_ever_more_rarely() -> None:
    clock = Clock(fails_until_s=1000)
    clock.note(one(line="a"))
    clock.until(3.5)
    clock.note(one(line="b"))
    clock.until(3000)
    ((_, (group,)),) = clock.sent
    assert (group.events, group.lines) == (2, ("a", "b")), "in the order in which they came"
    gaps = [later - sooner for sooner, later in itertools.pairwise(clock.attempts)]
    assert gaps[:4] == [FIRST_RETRY_S, 4, 8, 16]
    assert max(gaps) <= LONGEST_RETRY_S
    assert clock.given_up == 0


def test_what_comes_while_a_message_that_fails_is_on_its_way_is_told_after_it() -> None:
    outbox = Outbox(WINDOW_S)
    outbox.note(one(line="a"), 0.0)
    outbox.take(SETTLE_S)
    outbox.note(one(line="b"), SETTLE_S)
    outbox.note(one("stuck"), SETTLE_S)
    assert outbox.done(Outcome.FAILED, 2.0) == 0
    both = Group("reaped", 2, "first", "last", ("a", "b"))
    assert set(outbox.take(10.0)) == {both, one("stuck")}


def test_what_fails_for_an_hour_is_given_up_and_what_comes_then_is_tried_anew() -> None:
    clock = Clock(fails_until_s=2 * GIVE_UP_AFTER_S)
    clock.note(one(events=7))
    clock.until(1.5 * GIVE_UP_AFTER_S)
    assert (clock.given_up, clock.outbox.count(), clock.sent) == (7, 0, [])
    assert len(clock.attempts) < 30
    clock.until(2 * GIVE_UP_AFTER_S)
    clock.note(one())
    clock.until(3 * GIVE_UP_AFTER_S)
    assert [at_s for at_s, _ in clock.sent] == [2 * GIVE_UP_AFTER_S + SETTLE_S]


def test_what_is_hopeless_is_given_up_at_once() -> None:
    outbox = Outbox(WINDOW_S)
    outbox.note(one(), 0.0)
    outbox.take(SETTLE_S)
    outbox.note(one("stuck"), SETTLE_S)
    assert outbox.done(Outcome.HOPELESS, 2.0) == 2
    assert (outbox.count(), outbox.failing_since_s) == (0, None)


STEPS = st.lists(
    st.tuples(st.sampled_from(["reaped", "stuck", "killed"]), st.integers(1, 50), st.floats(0, 400)),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(STEPS, st.floats(1, 7200), st.floats(0, 9000))
def test_every_event_is_told_once_or_given_up_whatever_comes(
    steps: list[tuple[str, int, float]], window_s: float, fails_until_s: float
) -> None:
    clock = Clock(window_s, fails_until_s)
    for kind, events, later_s in steps:
        clock.note(one(kind, events=events))
        clock.until(clock.now_s + later_s)
        told = sum(count_in(message) for _, message in clock.sent) + clock.given_up
        noted = sum(events for _, events, _ in steps[: steps.index((kind, events, later_s)) + 1])
        assert told + clock.outbox.count() >= noted
    clock.until(1e6)
    told = sum(count_in(message) for _, message in clock.sent) + clock.given_up
    assert told == sum(events for _, events, _ in steps)
    assert clock.outbox.count() == 0
    for _, message in clock.sent:
        assert len({group.kind for group in message}) == len(message)
        assert all(len(group.lines) <= FEW for group in message)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 200), max_size=60), st.floats(1, 100))
def test_two_messages_about_one_kind_are_never_closer_than_the_window(
    pauses: list[float], window_s: float
) -> None:
    clock = Clock(window_s)
    for pause_s in pauses:
        clock.note(one())
        clock.until(clock.now_s + pause_s)
    clock.until(1e6)
    times = [at_s for at_s, _ in clock.sent]
    assert all(later - sooner >= window_s * 0.999 for sooner, later in itertools.pairwise(times))
