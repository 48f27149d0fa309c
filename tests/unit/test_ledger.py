"""What each happening changes on record, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from reaperd import ledger
from reaperd.escalation import Event, Stage
from reaperd.ledger import (
    CLOSE_S,
    MAX_NEWCOMERS,
    QUIET_AFTER_GROWTH_S,
    QUIET_LOOKS,
    QUIET_LOOKS_AFTER_GROWTH,
    SPACING_S,
    CauseTold,
    Concluded,
    Entry,
    Exited,
    LeaderDied,
    Looked,
    LookFailed,
    MembersLost,
    OomCounted,
    Phase,
    Reclaimed,
    ReclaimStarted,
    ShmMeasured,
    Signalled,
    SignalsSent,
    Spared,
    StopAsked,
    Target,
    Unregistered,
    apply,
    deadline,
)
from reaperd.model import Cause, CauseKind, Family, Freed, Member, Process, ProcessId, Role, Session

LEADER = ProcessId(100, 1000)
KILLED = Cause(CauseKind.SIGNAL, 9)
TRACKER_GRACE_S = 10.0


def member(pid: int, ppid: int = 1, *, tracker: bool = False, marked: bool = True) -> Member:
    role = Role.TRACKER if tracker else Role.WORKER
    return Member(Process(ProcessId(pid, 2000), ppid, 1000), role, "loky", ("evidence",), marked)


def looked(at_s: float, *members: Member, took_s: float = 0.0, left_alone: str = "") -> Looked:
    found = {one.process.id: one for one in members}
    return Looked(Family(found, {ProcessId(900, 2000): left_alone} if left_alone else {}), at_s, took_s)


def exited(at_s: float, *pids: int) -> Exited:
    return Exited({ProcessId(pid, 2000): at_s for pid in pids})


def sent(pid: int, event: Event = Event.DUE, *, due_s: float = 99.0, **facts: Any) -> SignalsSent:
    return SignalsSent((Signalled(ProcessId(pid, 2000), event, facts.pop("signal", 15), due_s, **facts),))


def living(**facts: Any) -> Entry:
    return Entry(Session("s", "", 1000, 1000, LEADER, "", **facts))


def dead(*happenings: ledger.Happening, at_s: float = 10.0, signal_from_s: float = 10.0) -> Entry:
    return after(apply(living(), LeaderDied(KILLED, at_s, signal_from_s)), *happenings)


def after(entry: Entry, *happenings: ledger.Happening) -> Entry:
    for happening in happenings:
        entry = apply(entry, happening)
    return entry


def target(entry: Entry, pid: int) -> Target:
    return entry.targets[ProcessId(pid, 2000)]


def stages(entry: Entry) -> dict[int, Stage]:
    return {id_.pid: one.stage for id_, one in entry.targets.items()}


# -- while the leader lives -------------------------------------------------------------------------


def test_a_look_at_a_living_session_makes_nobody_a_target() -> None:
    entry = after(living(), looked(1.0, member(201), member(202, tracker=True)))
    assert entry.phase is Phase.WATCHED
    assert not entry.targets
    assert deadline(entry, TRACKER_GRACE_S) is None


def test_a_look_at_a_living_session_counts_its_workers_but_not_its_trackers() -> None:
    assert after(living(), looked(1.0, member(201), member(202), member(203, tracker=True))).workers == 2


def test_a_look_at_a_living_session_keeps_exactly_those_whom_only_descent_tells() -> None:
    entry = after(living(), looked(1.0, member(201), member(202, marked=False), left_alone="spared"))
    assert entry.session.kept == {ProcessId(202, 2000)}
    assert list(entry.left_alone.values()) == ["spared"]
    assert entry.session.keeping(entry.session.kept) is entry.session
    entry = after(entry, looked(2.0, member(203, marked=False)))
    assert entry.session.kept == {ProcessId(203, 2000)}
    assert not entry.left_alone


def test_unregistering_marks_the_session_as_ending_and_kills_nobody() -> None:
    entry = after(living(), looked(1.0, member(201)), Unregistered())
    assert entry.session.ending
    assert entry.phase is Phase.WATCHED


def test_a_look_at_a_living_session_remembers_all_its_members_and_one_at_a_dead_session_does_not() -> None:
    entry = after(living(), looked(1.0, member(201), member(202, marked=False), member(203, tracker=True)))
    assert {id_.pid for id_ in entry.session.seen} == {201, 202, 203}
    entry = after(entry, looked(2.0, member(203, tracker=True), member(204)))
    assert {id_.pid for id_ in entry.session.seen} == {203, 204}
    entry = after(entry, LeaderDied(KILLED, 10.0, 10.0), looked(10.0, member(205)))
    assert {id_.pid for id_ in entry.session.seen} == {203, 204}


def test_processes_that_the_leader_named_as_spared_stay_spared_for_good() -> None:
    first, second = ProcessId(201, 2000), ProcessId(202, 2000)
    entry = after(living(), Spared(frozenset((first,))), Spared(frozenset((second,))), Spared(frozenset()))
    assert entry.session.spared == {first, second}


def test_members_that_have_ended_are_kept_in_mind_no_longer() -> None:
    entry = after(living(), looked(1.0, member(201, marked=False), member(202, marked=False)))
    entry = after(entry, MembersLost(frozenset((ProcessId(201, 2000), ProcessId(777, 1)))))
    assert entry.session.kept == {ProcessId(202, 2000)}


def test_the_count_of_oom_kills_is_the_last_one_told() -> None:
    assert after(living(oom_kills=1), OomCounted(3)).session.oom_kills == 3
    assert after(living(oom_kills=1), OomCounted(None)).session.oom_kills is None


# -- the leader dies --------------------------------------------------------------------------------


def test_the_death_of_a_leader_is_looked_into_at_once() -> None:
    entry = dead(at_s=10.0)
    assert entry.phase is Phase.REAPING
    assert entry.session.cause == KILLED
    assert deadline(entry, TRACKER_GRACE_S) == 10.0


def test_a_leader_dies_once() -> None:
    entry = dead(at_s=10.0)
    assert apply(entry, LeaderDied(Cause(CauseKind.EXIT, 0), 20.0, 30.0)) is entry


def test_a_cause_may_be_told_later() -> None:
    assert dead(CauseTold(Cause(CauseKind.EXIT, 3))).session.cause == Cause(CauseKind.EXIT, 3)


def test_who_wanted_the_leader_stopped_has_what_it_wants_when_it_dies() -> None:
    entry = after(living(), StopAsked(member(100), 1.0))
    assert entry.leader_target is not None
    assert apply(entry, LeaderDied(KILLED, 10.0, 10.0)).leader_target is None


# -- looking ----------------------------------------------------------------------------------------


def test_what_a_look_finds_becomes_a_target_workers_found_and_trackers_trusted() -> None:
    entry = dead(looked(10.0, member(201), member(202, tracker=True)))
    assert stages(entry) == {201: Stage.FOUND, 202: Stage.TRUSTED}
    assert entry.looks == 1


def test_nobody_is_due_before_signals_are_allowed() -> None:
    entry = dead(looked(10.0, member(201)), signal_from_s=20.0)
    assert target(entry, 201).due_s == 20.0
    assert target(dead(looked(12.0, member(201))), 201).due_s == 12.0


def test_finding_a_target_again_changes_nothing_about_it() -> None:
    entry = dead(looked(10.0, member(201)), sent(201, due_s=15.0))
    assert target(after(entry, looked(10.1, member(201))), 201) == target(entry, 201)


def test_whoever_is_not_found_again_stays_a_target() -> None:
    assert stages(dead(looked(10.0, member(201)), looked(10.1))) == {201: Stage.FOUND}


def test_members_that_only_descent_told_of_are_kept_in_mind_for_good_once_the_leader_is_dead() -> None:
    entry = dead(looked(10.0, member(201, marked=False)), looked(10.1, member(202, marked=False)))
    assert entry.session.kept == {ProcessId(201, 2000), ProcessId(202, 2000)}


def test_who_was_left_alone_is_remembered_over_all_looks() -> None:
    entry = dead(looked(10.0, left_alone="spared"), looked(10.1))
    assert list(entry.left_alone.values()) == ["spared"]


def test_the_pause_between_looks_grows_while_nothing_new_is_found() -> None:
    entry, pauses = dead(looked(10.0, member(201))), []
    for number in range(len(SPACING_S) + 1):
        assert entry.look_due_s is not None
        pauses.append(entry.look_due_s - (10.0 + number))
        entry = after(entry, looked(11.0 + number, member(201)))
    assert pauses == pytest.approx([*SPACING_S, SPACING_S[-1]])


def test_where_somebody_re_forked_many_close_looks_must_find_nobody() -> None:
    entry = dead(looked(10.0), looked(10.1, member(202)), exited(10.2, 202))
    assert entry.growth == 1
    for number in range(QUIET_LOOKS_AFTER_GROWTH):
        assert not entry.workers_done
        assert entry.look_due_s is not None
        close = number < QUIET_LOOKS_AFTER_GROWTH - QUIET_LOOKS
        pause_s = entry.look_due_s - (entry.looked_at_s if number else 10.2)
        assert pause_s <= CLOSE_S + 1e-9 or not close
        entry = after(entry, looked(10.3 + number * 0.01))
    assert entry.workers_done


@pytest.mark.parametrize("entry", [living(), dead()], ids=["living", "dead"])
def test_who_was_seen_to_adopt_members_is_remembered(entry: Entry) -> None:
    one, other = ProcessId(50, 10), ProcessId(51, 11)
    for subreapers in ({one}, set(), {other}):
        found = looked(11.0)
        entry = after(entry, found._replace(family=found.family._replace(subreapers=frozenset(subreapers))))
    assert entry.session.subreapers == {one, other}


def test_who_was_nobody_s_is_looked_at_once_more_before_all_are_done() -> None:
    entry = dead(*(looked(10.0 + number)._replace(everyone=False) for number in range(QUIET_LOOKS)))
    assert not entry.workers_done
    assert entry.look_due_s is not None
    assert after(entry, looked(11.0)).workers_done


def test_where_somebody_re_forked_long_ago_a_few_looks_are_enough() -> None:
    entry = dead(looked(10.0), looked(10.1, member(202)), exited(10.2, 202))
    late_s = 10.2 + QUIET_AFTER_GROWTH_S
    for number in range(QUIET_LOOKS - 1):
        entry = after(entry, looked(late_s - 0.001 if number == QUIET_LOOKS - 2 else 10.3))
        assert not entry.workers_done
    assert not after(entry, looked(late_s - 0.001)).workers_done
    assert after(entry, looked(late_s + 0.001)).workers_done


def test_a_slow_look_is_followed_by_a_long_pause_and_a_shorter_one_where_somebody_re_forks() -> None:
    assert dead(looked(10.0, member(201), took_s=0.3)).look_due_s == pytest.approx(11.5)
    growing = dead(looked(10.0), looked(10.1, member(202), took_s=0.3))
    assert growing.look_due_s == pytest.approx(10.7)


@pytest.mark.parametrize("scope", [None, "/s.scope"])
def test_a_slow_look_that_some_slipped_away_from_is_soon_repeated_and_at_once_where_all_can_be_held(
    scope: str | None,
) -> None:
    watched = Entry(Session("s", "", 1000, 1000, LEADER, "", scope=scope))
    entry = after(watched, LeaderDied(KILLED, 10.0, 10.0), looked(10.0, took_s=0.3)._replace(calm=False))
    assert entry.look_due_s == pytest.approx(10.0 if scope else 10.6)
    again = after(entry, looked(10.4, took_s=0.3)._replace(calm=False))
    assert again.look_due_s == pytest.approx(11.0)  # it must not become all that we do
    assert after(again, looked(11.0, took_s=0.3)).look_due_s == pytest.approx(12.5)


def test_where_somebody_re_forks_a_quick_look_that_has_found_one_is_repeated_at_once() -> None:
    found = dead(looked(10.0), looked(10.1, member(202), took_s=0.01))
    assert found.look_due_s == pytest.approx(10.1)
    assert after(found, looked(10.2, took_s=0.01)).look_due_s == pytest.approx(10.22)


def test_a_new_worker_begins_the_looking_anew_and_a_new_tracker_does_not() -> None:
    entry = dead(looked(10.0, member(201)), looked(10.1, member(201)), looked(10.2, member(201)))
    assert entry.quiet_looks == 2
    assert after(entry, looked(10.3, member(202))).quiet_looks == 0
    assert after(entry, looked(10.3, member(202, tracker=True))).quiet_looks == 3


def test_looking_ends_only_after_enough_quiet_looks_with_every_worker_gone() -> None:
    entry = dead(looked(10.0, member(201)), exited(10.1, 201))
    for number in range(1, QUIET_LOOKS + 1):
        assert entry.look_due_s is not None
        assert entry.phase is Phase.REAPING
        entry = after(entry, looked(10.1 + number))
    assert entry.look_due_s is None
    assert entry.phase is Phase.RECLAIMING


def test_looking_goes_on_for_as_long_as_a_worker_lives() -> None:
    entry = dead(*(looked(10.0 + number, member(201)) for number in range(20)))
    assert entry.phase is Phase.REAPING
    assert entry.look_due_s == pytest.approx(29.0 + SPACING_S[-1])


def test_a_session_grows_when_others_are_found_although_all_known_were_asked_to_end() -> None:
    one, two, three = member(201), member(202), member(203)
    asked = dead(looked(10.0, one), sent(201))
    assert asked.growth == 0
    entry = after(asked, looked(10.1, one, two))
    assert (entry.growth, target(entry, 202).late, target(entry, 201).late) == (1, True, False)
    assert after(entry, looked(10.2, one, two, three)).growth == 2
    assert after(entry, looked(10.2, one, two)).growth == 1


def test_a_session_does_not_grow_by_trackers_nor_before_signals_are_allowed() -> None:
    one, two = member(201), member(202)
    assert dead(looked(10.0, one), sent(201), looked(10.1, one, member(202, tracker=True))).growth == 0
    assert dead(looked(10.0, one), sent(201), looked(10.1, one, two), signal_from_s=20.0).growth == 0


def test_nobody_comes_late_to_the_first_look_however_long_it_took() -> None:
    entry = dead(looked(10.3, member(201), took_s=0.3))
    assert not target(entry, 201).late
    assert entry.growth == 0


def test_a_child_of_one_that_was_asked_to_end_has_as_long_as_its_parent_and_is_no_growth() -> None:
    one, child = member(201), member(202, 201)
    entry = dead(looked(10.0, one), sent(201, due_s=15.0), looked(10.1, one, child))
    assert entry.growth == 0
    assert (target(entry, 202).stage, target(entry, 202).due_s) == (Stage.ASKED, 15.0)
    assert target(entry, 202).signals == ()


def test_a_crowd_of_children_of_one_that_was_asked_to_end_is_growth() -> None:
    one = member(201)
    crowd = [member(300 + n, 201) for n in range(MAX_NEWCOMERS)]
    entry = dead(looked(10.0, one), sent(201), looked(10.1, one, *crowd))
    assert entry.growth == 1
    assert {target(entry, m.process.id.pid).stage for m in crowd} == {Stage.FOUND}
    few = dead(looked(10.0, one), sent(201), looked(10.1, one, *crowd[1:]))
    assert few.growth == 0


@pytest.mark.parametrize("happenings", [(), (sent(201), sent(201)), (sent(201), sent(201, Event.MULTIPLIED))])
def test_a_child_of_one_that_was_not_asked_or_that_more_was_done_to_comes_late(
    happenings: tuple[SignalsSent, ...],
) -> None:
    one, child = member(201), member(202, 201)
    entry = dead(looked(10.0, one), *happenings, looked(10.1, one, child))
    assert target(entry, 202).late
    assert target(entry, 202).stage is Stage.FOUND
    assert target(entry, 202).due_s == 10.1


def test_an_orphan_of_one_that_was_asked_and_is_gone_comes_late() -> None:
    one, two = member(201), member(203)
    asked = (looked(10.0, one, two), sent(201), sent(203), exited(10.05, 201))
    for ppid in (1, 201):
        entry = dead(*asked, looked(10.1, two, member(202, ppid)))
        assert (target(entry, 202).late, entry.growth) == (True, 1)


def test_a_child_of_a_tracker_comes_late() -> None:
    guard, child = member(201, tracker=True), member(202, 201)
    assert target(dead(looked(10.0, guard), looked(10.1, guard, child)), 202).late


def test_what_a_helper_of_one_that_was_asked_to_end_has_started_by_then_has_as_long_too() -> None:
    one, shell, gzip = member(201), member(202, 201), member(203, 202)
    for family in ((one, shell, gzip), (gzip, shell, one)):
        entry = dead(looked(10.0, one), sent(201, due_s=15.0), looked(10.1, *family))
        assert (target(entry, 203).stage, target(entry, 203).due_s) == (Stage.ASKED, 15.0)
        assert entry.growth == 0


# -- judging again ----------------------------------------------------------------------------------


def test_whoever_does_not_belong_to_the_session_any_more_is_excused_until_it_does_again() -> None:
    one = member(201)
    entry = dead(looked(10.0, one), looked(10.1))
    assert target(entry, 201).excused
    assert target(entry, 201).done
    assert not target(after(entry, looked(10.2, one)), 201).excused


def test_who_lets_nobody_read_what_it_is_now_is_not_excused() -> None:
    one, two = member(201), member(202)
    entry = dead(looked(10.0, one, two), looked(10.1, one)._replace(complete=False, unread=frozenset((202,))))
    assert not target(entry, 202).excused


def test_who_belongs_no_more_is_excused_though_somebody_else_could_not_be_read() -> None:
    one, two = member(201), member(202)
    for missed in ({}, {"unread": frozenset((201,))}):
        entry = dead(looked(10.0, one, two), looked(10.1, one)._replace(complete=False, **missed))
        assert target(entry, 202).excused
        assert 202 in {id_.pid for id_ in entry.left_alone}


def test_the_excused_stay_so_when_they_cannot_be_read_and_not_when_they_belong_again() -> None:
    one, two = member(201), member(202)
    excused = dead(looked(10.0, one, two), looked(10.1, one))
    assert target(after(excused, looked(10.2, one)._replace(unread=frozenset((202,)))), 202).excused
    assert not target(after(excused, looked(10.2, one, two)._replace(complete=False)), 202).excused


def test_an_excused_tracker_is_not_awaited() -> None:
    guard = member(202, tracker=True)
    waiting = dead(*(looked(10.0 + n, guard) for n in range(QUIET_LOOKS)))
    assert waiting.phase is Phase.TRACKERS
    assert after(waiting, looked(14.0)).phase is Phase.RECLAIMING
    assert after(waiting, looked(14.0), looked(15.0, guard)).phase is Phase.TRACKERS


def test_an_excused_worker_is_not_awaited() -> None:
    entry = dead(looked(10.0, member(201)), *(looked(11.0 + n) for n in range(QUIET_LOOKS)))
    assert entry.phase is Phase.RECLAIMING
    assert entry.look_due_s is None


def test_why_an_excused_process_is_left_alone_is_told_in_the_words_of_the_look_where_it_has_any() -> None:
    id_ = ProcessId(201, 2000)
    entry = dead(looked(10.0, member(201)), looked(10.1))
    assert "any more" in entry.left_alone[id_]
    spared = Looked(Family({}, {id_: "was started under spared()"}), 10.2, 0.0)
    assert after(entry, spared).left_alone == {id_: "was started under spared()"}
    assert after(entry, exited(10.2, 201)).left_alone == {}, "it was on its way out"


def test_nothing_is_due_of_the_excused() -> None:
    entry = dead(looked(10.0, member(201)), sent(201, due_s=10.101), looked(10.1))
    assert entry.look_due_s is not None
    assert deadline(entry, TRACKER_GRACE_S) == entry.look_due_s


def test_a_look_that_could_not_see_all_is_never_quiet() -> None:
    entry = dead(looked(10.0), looked(10.1), looked(10.2)._replace(complete=False))
    assert entry.quiet_looks == 0
    assert entry.look_due_s is not None
    assert dead(*(looked(10.0 + number) for number in range(QUIET_LOOKS))).look_due_s is None


def test_a_look_that_failed_is_tried_again_and_counts_for_nothing() -> None:
    entry = dead(looked(10.0), looked(10.1), LookFailed(10.2))
    assert (entry.looks, entry.quiet_looks) == (2, 0)
    assert entry.look_due_s == pytest.approx(10.2 + SPACING_S[-1])


def test_nothing_is_due_while_nobody_can_look() -> None:
    entry = dead(looked(10.0, member(201)), sent(201, due_s=10.3), LookFailed(10.2))
    assert deadline(entry, TRACKER_GRACE_S) == pytest.approx(10.2 + SPACING_S[-1])


# -- exits ------------------------------------------------------------------------------------------


def test_an_exit_is_noted_with_its_time_which_stays_the_first() -> None:
    entry = dead(looked(10.0, member(201)), exited(10.5, 201))
    assert target(entry, 201).stage is Stage.GONE
    assert target(after(entry, exited(11.0, 201)), 201).gone_at_s == 10.5


def test_the_exit_of_somebody_elses_process_changes_nothing() -> None:
    entry = dead(looked(10.0, member(201)))
    assert apply(entry, exited(10.5, 777)) is entry
    assert apply(entry, Exited({ProcessId(201, 1999): 10.5})) is entry


def test_after_the_exit_of_a_worker_somebody_looks_again_soon() -> None:
    entry = dead(*(looked(10.0 + number, member(201)) for number in range(9)))
    entry = after(entry, exited(18.1, 201))
    assert entry.quiet_looks == 0
    assert entry.look_due_s == pytest.approx(18.1 + SPACING_S[0])
    assert entry.changed_at_s == 18.1


def test_an_exit_never_puts_a_look_off() -> None:
    entry = dead(looked(10.0, member(201)))
    assert entry.look_due_s is not None
    assert after(entry, exited(99.0, 201)).look_due_s == entry.look_due_s


def test_the_exit_of_a_tracker_is_no_reason_to_look_again() -> None:
    entry = dead(*(looked(10.0 + n, member(202, tracker=True)) for n in range(QUIET_LOOKS)))
    assert entry.phase is Phase.TRACKERS
    entry = after(entry, exited(13.0, 202))
    assert entry.look_due_s is None
    assert entry.phase is Phase.RECLAIMING
    assert entry.changed_at_s == 10.0


def test_a_stuck_worker_that_ends_after_all_is_looked_into_again() -> None:
    entry = dead(
        looked(10.0, member(201)),
        *[sent(201)] * 3,
        *(looked(11.0 + n, member(201)) for n in range(QUIET_LOOKS)),
    )
    assert entry.look_due_s is None
    entry = after(entry, exited(60.0, 201))
    assert entry.phase is Phase.REAPING
    assert entry.look_due_s == pytest.approx(60.0 + SPACING_S[0])


# -- signals ----------------------------------------------------------------------------------------


def test_a_signal_takes_its_target_a_stage_further_and_is_put_down() -> None:
    entry = dead(looked(10.0, member(201)), sent(201, signal=15, due_s=15.0))
    before = target(dead(looked(10.0, member(201))), 201)
    assert target(entry, 201) == before._replace(stage=Stage.ASKED, due_s=15.0, signals=(15,))
    assert target(after(entry, sent(201, signal=9)), 201).signals == (15, 9)


def test_many_signals_at_once_are_put_down_each_for_its_own_target() -> None:
    entry = dead(looked(10.0, member(201), member(202), member(203)))
    many = SignalsSent((*sent(201, signal=15).signals, *sent(202, signal=9, denied=True).signals))
    entry = after(entry, many)
    assert stages(entry) == {201: Stage.ASKED, 202: Stage.ASKED, 203: Stage.FOUND}
    assert [target(entry, pid).signals for pid in (201, 202, 203)] == [(15,), (), ()]


def test_a_signal_that_was_refused_is_not_put_down_as_sent() -> None:
    entry = dead(looked(10.0, member(201)), sent(201, denied=True))
    assert target(entry, 201).denied
    assert target(entry, 201).signals == ()
    assert not target(after(entry, sent(201)), 201).denied


def test_every_signal_to_a_stuck_process_counts_as_a_retry() -> None:
    entry = dead(looked(10.0, member(201)), sent(201), sent(201))
    assert (target(entry, 201).stage, target(entry, 201).retries) == (Stage.KILLED, 0)
    entry = after(entry, sent(201))
    assert (target(entry, 201).stage, target(entry, 201).retries) == (Stage.STUCK, 1)
    assert target(after(entry, sent(201), sent(201)), 201).retries == 3
    assert [one.member.process.id.pid for one in entry.stuck()] == [201]


def test_a_signal_to_the_gone_or_the_unknown_changes_nothing() -> None:
    entry = dead(looked(10.0, member(201)), exited(10.5, 201))
    assert apply(entry, sent(201)) == entry
    assert apply(entry, sent(777)) == entry


def test_a_leader_that_is_to_be_stopped_goes_through_the_same_stages() -> None:
    entry = after(living(), StopAsked(member(100), 5.0))
    assert deadline(entry, TRACKER_GRACE_S) == 5.0
    entry = after(entry, SignalsSent((Signalled(LEADER, Event.DUE, 15, 10.0),)))
    assert entry.leader_target is not None
    assert (entry.leader_target.stage, entry.leader_target.due_s) == (Stage.ASKED, 10.0)
    assert entry.phase is Phase.WATCHED


# -- the end ----------------------------------------------------------------------------------------


def test_what_was_reclaimed_measured_and_concluded_is_on_record() -> None:
    entry = dead(ShmMeasured(4096), ReclaimStarted(), Reclaimed(Freed(shm_bytes=7)), Concluded())
    assert entry.shm_held_bytes == 4096
    assert after(entry, ShmMeasured(1)).shm_held_bytes == 4096, "a later look finds less, for some is gone"
    assert after(entry, ShmMeasured(8192)).shm_held_bytes == 8192
    assert entry.reclaim_asked
    assert entry.reclaimed == Freed(shm_bytes=7)
    assert entry.concluded


def quiet(*happenings: ledger.Happening) -> Entry:
    """Return a dead session after enough looks that found all who are not gone, and nobody new."""
    entry = dead(*happenings)
    found = [one.member for one in entry.targets.values() if one.stage is not Stage.GONE]
    return after(entry, *(looked(20.0 + number, *found) for number in range(QUIET_LOOKS)))


def test_the_phase_follows_from_what_is_known_of_the_processes() -> None:
    worker, tracker = looked(10.0, member(201)), looked(10.0, member(201), member(202, tracker=True))
    stuck = [sent(201)] * 3
    assert dead().phase is Phase.REAPING
    assert quiet(worker).phase is Phase.REAPING
    assert quiet(worker, *stuck).phase is Phase.RECLAIMING
    assert quiet(tracker).phase is Phase.REAPING
    assert quiet(tracker, exited(10.5, 201)).phase is Phase.TRACKERS
    assert quiet(tracker, *stuck).phase is Phase.TRACKERS
    assert quiet(tracker, exited(10.5, 201, 202)).phase is Phase.RECLAIMING
    assert quiet(worker, exited(10.5, 201), Reclaimed(Freed())).phase is Phase.FINISHED
    assert quiet().phase is Phase.RECLAIMING


def test_trackers_are_due_their_grace_after_the_last_worker_or_after_signals_were_allowed() -> None:
    entry = quiet(looked(10.0, member(201), member(202, tracker=True)), exited(12.0, 201))
    assert ledger.tracker_due_s(entry, TRACKER_GRACE_S) == 22.0
    assert deadline(entry, TRACKER_GRACE_S) == 22.0
    late = dead(looked(10.0, member(202, tracker=True)), signal_from_s=40.0)
    assert ledger.tracker_due_s(late, TRACKER_GRACE_S) == 50.0


def test_nothing_is_due_of_a_session_whose_processes_are_all_gone() -> None:
    entry = quiet(looked(10.0, member(201), member(202, tracker=True)), exited(10.5, 201, 202))
    assert deadline(entry, TRACKER_GRACE_S) is None
    assert deadline(after(entry, Reclaimed(Freed()), Concluded()), TRACKER_GRACE_S) is None


def test_a_stuck_process_of_a_concluded_session_is_still_due() -> None:
    entry = quiet(looked(10.0, member(201)), sent(201), sent(201), sent(201, due_s=77.0))
    assert deadline(after(entry, Reclaimed(Freed()), Concluded()), TRACKER_GRACE_S) == 77.0


def test_who_is_put_into_a_group_of_its_own_is_counted_there_when_it_runs_out_of_memory() -> None:
    before = living(oom_counter="/old", oom_kills=3)
    moved = apply(before, ledger.Isolated("/s.scope", "/s.scope/memory.events", 0)).session
    assert (moved.scope, moved.oom_counter, moved.oom_kills) == ("/s.scope", "/s.scope/memory.events", 0)
    assert moved._replace(scope=None, oom_counter="/old", oom_kills=3) == before.session
