"""From "please" to "stuck": the table is total, and it only ever goes forward."""

from __future__ import annotations

import itertools
import signal

import pytest

from reaperd.escalation import NEXT, SIGNAL, Event, Stage

FORWARD = {
    Stage.TRUSTED: 0,
    Stage.FOUND: 1,
    Stage.ASKED: 2,
    Stage.FROZEN: 3,
    Stage.KILLED: 4,
    Stage.STUCK: 5,
    Stage.GONE: 6,
}


def test_the_table_says_what_follows_from_every_stage_and_event() -> None:
    assert set(NEXT) == set(itertools.product(Stage, Event))


@pytest.mark.parametrize("event", Event)
def test_gone_is_gone_for_good(event: Event) -> None:
    assert NEXT[Stage.GONE, event] is Stage.GONE


@pytest.mark.parametrize("stage", Stage)
def test_whoever_exits_is_gone_whatever_was_done_to_it(stage: Stage) -> None:
    assert NEXT[stage, Event.EXITED] is Stage.GONE


def test_only_an_exit_makes_a_process_gone() -> None:
    assert {
        event for (stage, event), after in NEXT.items() if stage is not Stage.GONE and after is Stage.GONE
    } == {Event.EXITED}


def test_nothing_ever_goes_back_to_a_milder_stage() -> None:
    for (stage, _), after in NEXT.items():
        assert FORWARD[after] >= FORWARD[stage]


def test_every_stage_that_is_entered_by_a_signal_has_one() -> None:
    entered = {
        after
        for (stage, event), after in NEXT.items()
        if stage is not Stage.GONE
        and event is not Event.EXITED
        and (event is Event.DUE or after is not stage)
    }
    assert entered == set(SIGNAL)


def test_a_process_is_asked_then_frozen_at_most_then_killed_and_killed_again() -> None:
    assert SIGNAL == {
        Stage.ASKED: signal.SIGTERM,
        Stage.FROZEN: signal.SIGSTOP,
        Stage.KILLED: signal.SIGKILL,
        Stage.STUCK: signal.SIGKILL,
    }


def test_being_asked_comes_before_being_killed() -> None:
    assert NEXT[Stage.FOUND, Event.DUE] is Stage.ASKED
    assert NEXT[Stage.ASKED, Event.DUE] is Stage.KILLED


@pytest.mark.parametrize("stage", [Stage.FOUND, Stage.ASKED])
def test_what_multiplies_is_frozen_before_it_is_killed(stage: Stage) -> None:
    assert NEXT[stage, Event.MULTIPLIED] is Stage.FROZEN
    assert NEXT[Stage.FROZEN, Event.DUE] is Stage.KILLED


def test_a_tracker_is_never_asked_for_it_ignores_sigterm_and_never_frozen() -> None:
    assert NEXT[Stage.TRUSTED, Event.DUE] is Stage.KILLED
    assert NEXT[Stage.TRUSTED, Event.MULTIPLIED] is Stage.TRUSTED


def test_what_outlives_sigkill_is_stuck_and_stays_so_until_it_exits() -> None:
    assert NEXT[Stage.KILLED, Event.DUE] is Stage.STUCK
    assert {NEXT[Stage.STUCK, event] for event in (Event.DUE, Event.MULTIPLIED)} == {Stage.STUCK}
