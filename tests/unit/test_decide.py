"""Whole sessions driven through ``decide`` and ``apply`` with a clock of our own: who gets which signal, and when."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reaperd import decide, ledger
from reaperd.decide import (
    FREEZE_S,
    FRESH_S,
    KILL_WAIT_S,
    LATE_GRACE_S,
    MAX_RETRY_S,
    Conclude,
    Depth,
    Forget,
    Look,
    Reclaim,
    Send,
)
from reaperd.escalation import Event, Stage
from reaperd.ledger import (
    QUIET_LOOKS,
    Concluded,
    Entry,
    Exited,
    LeaderDied,
    Looked,
    LookFailed,
    Phase,
    Reclaimed,
    ReclaimStarted,
    Signalled,
    SignalsSent,
    StopAsked,
    Unregistered,
    apply,
)
from reaperd.model import (
    SIGKILL,
    SIGSTOP,
    SIGTERM,
    Cause,
    CauseKind,
    Family,
    Freed,
    Member,
    Process,
    ProcessId,
    Role,
    Session,
    Snapshot,
)
from reaperd.policy import Policy

LEADER = ProcessId(100, 1000)
POLICY = Policy(grace_s=5.0, exit_grace_s=10.0, tracker_grace_s=10.0)
MAX_TURNS = 3000  # of a simulation: far more than any of these sessions needs

TERM_ENDS, KILL_ENDS, NOTHING_ENDS = frozenset((SIGTERM, SIGKILL)), frozenset((SIGKILL,)), frozenset[int]()


def signalled(*facts: Any, denied: bool = False) -> SignalsSent:
    return SignalsSent((Signalled(*facts, denied=denied),))


@dataclass
class Fake:
    """A process, as far as a reap can tell: what ends it, and from when on it can be found."""

    pid: int
    ended_by: frozenset[int] = TERM_ENDS
    takes_s: float = 0.001  # to end
    found_from_s: float = 0.0
    found_to_s: float = 1e9
    ppid: int = 1
    ends_itself_at_s: float | None = None
    tracker: bool = False
    denied: bool = False
    dead: bool = False

    @property
    def member(self) -> Member:
        role = Role.TRACKER if self.tracker else Role.WORKER
        return Member(Process(ProcessId(self.pid, 2000), self.ppid, 1000), role, "loky", ("evidence",), True)


def kinds(actions: list[decide.Action]) -> list[type]:
    return [type(action) for action in actions]


def worker(pid: int, **facts: Any) -> Fake:
    return Fake(pid, **facts)


def tracker(pid: int, **facts: Any) -> Fake:
    """Return a resource tracker: it ignores SIGTERM."""
    return Fake(pid, **{"tracker": True, "ended_by": KILL_ENDS, "takes_s": 0.0, **facts})


@dataclass
class Reap:
    """One session from its leader's death at 0 s to its end, as the core would drive it."""

    processes: list[Fake]
    policy: Policy = POLICY
    clean: bool = False
    now_s: float = 0.0
    signals: list[tuple[float, int, int]] = field(default_factory=list)  # second, signal, pid
    looks: list[float] = field(default_factory=list)
    depths: list[Depth] = field(default_factory=list)
    judged_at_s: dict[ProcessId, float] = field(default_factory=dict)
    reclaimed: int = 0
    concluded_at_s: list[float] = field(default_factory=list)
    forgotten: bool = False

    def __post_init__(self) -> None:
        signal_from_s = self.policy.exit_grace_s if self.clean else 0.0
        cause = Cause(CauseKind.EXIT, 0, clean=True) if self.clean else Cause(CauseKind.SIGNAL, 9)
        session = Session("s", "", 1000, 1000, LEADER, "")
        self.entry = apply(Entry(session), LeaderDied(cause, 0.0, signal_from_s))

    def run(self, until_s: float = 1000.0) -> Reap:
        """Do what is due until the session is forgotten, nothing is due any more, or ``until_s``."""
        for _ in range(MAX_TURNS):
            self._note_exits()
            actions = decide.decide(self.entry, self.policy, self.now_s)
            for action in actions:
                self._do(action)
            if self.forgotten:
                return self
            if not actions:
                next_s = self._next_s()
                if next_s is None or next_s > until_s:
                    self.now_s = until_s
                    return self
                assert next_s > self.now_s, "something is due, and nothing is done about it"
                self.now_s = next_s
        raise AssertionError(f"no end after {MAX_TURNS} turns, at {self.now_s:g} s")

    def _next_s(self) -> float | None:
        deadline_s = ledger.deadline(self.entry, self.policy.tracker_grace_s)
        exits = [p.ends_itself_at_s for p in self.processes if not p.dead and p.ends_itself_at_s is not None]
        return min([*exits, *([] if deadline_s is None else [deadline_s])], default=None)

    def _note_exits(self) -> None:
        for one in self.processes:
            if one.ends_itself_at_s is not None and one.ends_itself_at_s <= self.now_s:
                one.dead = True
        gone = {
            one.member.process.id: self.now_s
            for one in self.processes
            if one.dead and self.stage(one.pid) not in (None, Stage.GONE)
        }
        if gone:
            self.entry = apply(self.entry, Exited(gone))

    def _do(self, action: decide.Action) -> None:
        match action:
            case Look():
                self._look(action.depth)
            case Send():
                self._send(action)
            case Reclaim():
                self.reclaimed += 1
                self.entry = apply(apply(self.entry, ReclaimStarted()), Reclaimed(Freed()))
            case Conclude():
                self.concluded_at_s.append(self.now_s)
                self.entry = apply(self.entry, Concluded())
            case Forget():
                self.forgotten = True

    def _look(self, depth: Depth) -> None:
        afresh = depth is not Depth.NEWCOMERS
        self.looks.append(self.now_s)
        self.depths.append(depth)
        found = {
            one.member.process.id: one.member
            for one in self.processes
            if not one.dead and one.found_from_s <= self.now_s <= one.found_to_s
        }
        new = found.keys() - self.entry.targets.keys()
        for id_ in found if afresh else new:
            self.judged_at_s[id_] = self.now_s
        self.entry = apply(self.entry, Looked(Family(found, {}), self.now_s, 0.0, afresh=afresh))

    def _send(self, send: Send) -> None:
        (one,) = (one for one in self.processes if one.member == send.member)
        assert self.now_s - self.judged_at_s[send.member.process.id] <= FRESH_S
        self.signals.append((round(self.now_s, 3), send.signal, one.pid))
        self.entry = apply(
            self.entry,
            signalled(send.member.process.id, send.event, send.signal, send.due_s, denied=one.denied),
        )
        if send.signal in one.ended_by and not one.denied:
            ends_at_s = self.now_s + one.takes_s
            one.ends_itself_at_s = min(ends_at_s, one.ends_itself_at_s or ends_at_s)

    def stage(self, pid: int) -> Stage | None:
        target = self.entry.targets.get(ProcessId(pid, 2000))
        return None if target is None else target.stage

    def sent_to(self, pid: int) -> list[tuple[float, int]]:
        return [(at_s, number) for at_s, number, to in self.signals if to == pid]

    def seconds_of(self, pid: int, number: int) -> list[float]:
        return [at_s for at_s, sent in self.sent_to(pid) if sent == number]


# -- workers ----------------------------------------------------------------------------------------


def test_workers_are_asked_at_once_and_one_that_goes_gets_nothing_more() -> None:
    reap = Reap([worker(201), worker(202)]).run()
    assert reap.signals == [(0.0, SIGTERM, 201), (0.0, SIGTERM, 202)]
    assert reap.forgotten


def test_a_worker_that_does_not_go_is_killed_after_the_grace() -> None:
    assert Reap([worker(201, ended_by=KILL_ENDS)]).run().sent_to(201) == [(0.0, SIGTERM), (5.0, SIGKILL)]


def test_no_grace_at_all_still_asks_first() -> None:
    reap = Reap([worker(201, ended_by=KILL_ENDS)], POLICY._replace(grace_s=0.0)).run()
    assert reap.sent_to(201) == [(0.0, SIGTERM), (LATE_GRACE_S, SIGKILL)]


def test_a_worker_is_gone_a_second_after_the_grace_at_the_latest() -> None:
    reap = Reap(
        [worker(pid, ended_by=KILL_ENDS, found_from_s=0.3 * (pid % 2)) for pid in range(200, 220)]
    ).run()
    assert {pid for _, number, pid in reap.signals if number == SIGKILL} == set(range(200, 220))
    assert max(at_s for at_s, _, _ in reap.signals) <= POLICY.grace_s + 1


def test_a_session_without_any_process_is_looked_at_and_concluded_within_a_moment() -> None:
    reap = Reap([]).run()
    assert reap.forgotten
    assert len(reap.looks) == QUIET_LOOKS
    assert reap.concluded_at_s[0] < 0.15


def test_the_first_look_alone_is_quick() -> None:
    reap = Reap([worker(201)]).run()
    assert reap.looks[0] == 0.0
    assert (reap.depths[0], reap.depths[-1]) == (Depth.MEMBERS, Depth.EVERYONE)
    assert set(reap.depths[1:-1]) == {Depth.NEWCOMERS}
    assert len(reap.looks) > QUIET_LOOKS


def test_after_the_last_worker_several_spaced_looks_must_find_nobody_new() -> None:
    reap = Reap([worker(201)]).run()
    after_exit = [at_s for at_s in reap.looks if at_s > 0.001]
    assert len(after_exit) >= QUIET_LOOKS
    assert all(later > earlier for earlier, later in itertools.pairwise(after_exit))
    assert after_exit[-1] - after_exit[0] > 0.05


def test_a_clean_exit_leaves_its_workers_the_exit_grace_before_anything() -> None:
    reap = Reap([worker(201, ended_by=KILL_ENDS)], clean=True).run()
    assert reap.sent_to(201) == [(10.0, SIGTERM), (15.0, SIGKILL)]


def test_workers_that_end_by_themselves_within_the_exit_grace_are_never_signalled() -> None:
    reap = Reap([worker(201, ends_itself_at_s=3.0), tracker(202, ends_itself_at_s=3.05)], clean=True).run()
    assert reap.signals == []
    assert reap.concluded_at_s[0] < 4.0


def test_a_worker_found_late_is_asked_at_once_and_has_some_time_left() -> None:
    reap = Reap([worker(201, ended_by=KILL_ENDS), worker(202, ended_by=KILL_ENDS, found_from_s=4.6)]).run()
    asked_at_s = reap.seconds_of(202, SIGTERM)[0]
    assert 4.6 <= asked_at_s < 5.2
    assert reap.seconds_of(202, SIGKILL) == [pytest.approx(max(5.0, asked_at_s + LATE_GRACE_S))]


def test_a_worker_found_after_the_grace_is_asked_first_too() -> None:
    late = worker(202, ended_by=KILL_ENDS, found_from_s=5.0)
    reap = Reap([worker(201, ended_by=KILL_ENDS, takes_s=0.5), late]).run()
    (asked_at_s, first), (killed_at_s, second) = reap.sent_to(202)
    assert (first, second) == (SIGTERM, SIGKILL)
    assert killed_at_s - asked_at_s == pytest.approx(LATE_GRACE_S, abs=0.002)


# -- what multiplies --------------------------------------------------------------------------------


def test_what_keeps_coming_after_all_were_asked_to_end_is_frozen_and_then_killed() -> None:
    growing = [worker(200 + n, ended_by=KILL_ENDS, found_from_s=0.02 * n) for n in range(6)]
    reap = Reap(growing).run()
    assert reap.sent_to(200) == [(0.0, SIGTERM), (5.0, SIGKILL)], (
        "who was there from the start keeps its grace"
    )
    for one in growing[1:]:
        frozen_at_s = reap.seconds_of(one.pid, SIGSTOP)
        assert len(frozen_at_s) == 1
        assert reap.seconds_of(one.pid, SIGKILL) == [pytest.approx(frozen_at_s[0] + FREEZE_S, abs=0.002)]
    assert max(at_s for at_s, _, pid in reap.signals if pid > 200) < 1.0


def test_all_that_came_late_to_a_growing_session_is_frozen_in_one_go() -> None:
    growing = [worker(200 + n, ended_by=KILL_ENDS, found_from_s=0.02 * n) for n in range(3)]
    reap = Reap([*growing, tracker(300, ends_itself_at_s=0.5)]).run()
    stops = [(at_s, pid) for at_s, number, pid in reap.signals if number == SIGSTOP]
    assert stops == [(0.04, 201), (0.04, 202)]
    assert reap.sent_to(300) == []


def test_one_worker_found_late_is_no_reason_to_freeze_anybody() -> None:
    reap = Reap([worker(201, ended_by=KILL_ENDS), worker(202, ended_by=KILL_ENDS, found_from_s=1.0)]).run()
    assert SIGSTOP not in {number for _, number, _ in reap.signals}


def test_a_session_that_grows_within_the_exit_grace_is_not_frozen_afterwards() -> None:
    growing = [worker(200 + n, found_from_s=n) for n in range(8)]
    reap = Reap(growing, clean=True).run()
    assert {number for _, number, _ in reap.signals} == {SIGTERM}


def test_what_an_asked_worker_starts_to_end_well_is_not_asked_itself_and_ends_with_it_at_the_latest() -> None:
    helpers = [worker(300 + n, ended_by=KILL_ENDS, found_from_s=0.01 * n, ppid=201) for n in range(1, 6)]
    reap = Reap([worker(201, ended_by=KILL_ENDS), *helpers]).run()
    for one in helpers:
        assert reap.sent_to(one.pid) == [(5.0, SIGKILL)]


# -- evidence ---------------------------------------------------------------------------------------


def test_nobody_is_signalled_on_evidence_that_is_not_fresh() -> None:
    reap = Reap([worker(201, ended_by=NOTHING_ENDS), tracker(202)]).run(until_s=100.0)
    assert len(reap.signals) > 5
    assert {number for _, number, _ in reap.signals} == {
        SIGTERM,
        SIGKILL,
    }  # the age of each is looked at when it is sent


def test_what_is_due_on_evidence_that_is_not_fresh_is_looked_into_first_and_what_is_not_due_is_not() -> None:
    # The next is due at 21 s.
    found = Looked(Family({ProcessId(201, 2000): worker(201).member}, {}), 1.0, 10.0)
    entry = apply(Reap([]).entry, found)
    (send,) = decide.decide(entry, POLICY, 1.0 + FRESH_S / 2)
    assert isinstance(send, Send)
    assert decide.decide(entry, POLICY, 1.0 + FRESH_S * 1.01) == [Look(Depth.MEMBERS)]
    asked = apply(entry, signalled(ProcessId(201, 2000), Event.DUE, SIGTERM, 6.0))
    assert decide.decide(asked, POLICY, 5.0) == []
    assert decide.decide(asked, POLICY, 6.0) == [Look(Depth.MEMBERS)]
    (send,) = decide.decide(apply(asked, found._replace(at_s=6.0)), POLICY, 6.0)
    assert isinstance(send, Send)
    assert send.signal == SIGKILL


def test_a_crowd_is_frozen_although_all_of_it_has_one_parent_that_was_asked_to_end() -> None:
    crowds = [
        worker(1000 * n + m, ended_by=KILL_ENDS, found_from_s=0.02 * n - 0.001, ppid=201)
        for n in range(1, 4)
        for m in range(ledger.MAX_NEWCOMERS)
    ]
    reap = Reap([worker(201, ended_by=KILL_ENDS), *crowds]).run()
    assert {pid for _, number, pid in reap.signals if number == SIGSTOP} == {one.pid for one in crowds}
    assert reap.sent_to(201) == [(0.0, SIGTERM), (5.0, SIGKILL)]


def test_a_chain_of_processes_that_each_start_the_next_and_end_is_frozen() -> None:
    chain = [
        worker(200 + n, ended_by=KILL_ENDS, found_from_s=0.05 * n, ends_itself_at_s=0.05 * (n + 1))
        for n in range(20)
    ]
    reap = Reap(chain).run(until_s=0.9)
    assert SIGSTOP in {number for _, number, _ in reap.signals}


def test_whoever_does_not_belong_to_the_session_any_more_is_signalled_no_more() -> None:
    reap = Reap([worker(201, ended_by=KILL_ENDS, found_to_s=2.0), worker(202, ended_by=KILL_ENDS)]).run(20.0)
    assert reap.sent_to(201) == [(0.0, SIGTERM)]
    assert reap.sent_to(202) == [(0.0, SIGTERM), (5.0, SIGKILL)]


def test_nobody_is_signalled_and_nothing_is_tried_while_nobody_can_look() -> None:
    entry = Reap([worker(201)]).entry
    entry = apply(entry, Looked(Family({ProcessId(201, 2000): worker(201).member}, {}), 0.0, 0.0))
    entry = apply(entry, LookFailed(0.001))
    assert decide.decide(entry, POLICY, 0.4) == []
    assert decide.decide(entry, POLICY, 0.6) == [Look(Depth.MEMBERS)]


# -- trackers ---------------------------------------------------------------------------------------


def test_a_tracker_that_ends_once_the_workers_are_gone_is_never_touched() -> None:
    reap = Reap([worker(201, ended_by=KILL_ENDS), tracker(202, ends_itself_at_s=5.03)]).run()
    assert reap.sent_to(202) == []
    assert reap.forgotten


def test_a_tracker_is_left_alone_while_a_worker_lives_and_killed_its_grace_after_the_last() -> None:
    reap = Reap([worker(201, ended_by=KILL_ENDS), tracker(202)]).run()
    assert reap.sent_to(201) == [(0.0, SIGTERM), (5.0, SIGKILL)]
    assert reap.sent_to(202) == [(pytest.approx(15.0, abs=0.01), SIGKILL)]


def test_a_tracker_is_left_alone_for_as_long_as_a_worker_has_to_end() -> None:
    reap = Reap([worker(201, ended_by=KILL_ENDS), tracker(202)], POLICY._replace(grace_s=60.0)).run()
    assert reap.sent_to(201) == [(0.0, SIGTERM), (60.0, SIGKILL)]
    assert reap.sent_to(202) == [(pytest.approx(70.0, abs=0.01), SIGKILL)]


def test_a_tracker_without_any_worker_gets_its_grace_from_the_leaders_death() -> None:
    assert Reap([tracker(202)]).run().sent_to(202) == [(10.0, SIGKILL)]


def test_a_tracker_after_a_clean_exit_gets_the_exit_grace_as_well() -> None:
    assert Reap([tracker(202)], clean=True).run().sent_to(202) == [(20.0, SIGKILL)]


def test_a_tracker_is_killed_although_a_worker_is_stuck() -> None:
    reap = Reap([worker(201, ended_by=NOTHING_ENDS), tracker(202)]).run(until_s=30.0)
    (killed_at_s,) = reap.seconds_of(202, SIGKILL)
    assert 5.0 + KILL_WAIT_S <= killed_at_s <= 5.0 + KILL_WAIT_S + POLICY.tracker_grace_s


# -- stuck ------------------------------------------------------------------------------------------


def test_what_outlives_sigkill_is_killed_again_after_1_2_4_and_at_most_32_seconds() -> None:
    reap = Reap([worker(201, ended_by=NOTHING_ENDS)]).run(until_s=180.0)
    kills = reap.seconds_of(201, SIGKILL)
    assert kills[0] == 5.0
    pauses = [later - earlier for earlier, later in itertools.pairwise(kills)]
    assert pauses == pytest.approx([KILL_WAIT_S, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 32.0, 32.0, 32.0])
    assert max(pauses) == MAX_RETRY_S


def test_a_session_with_a_stuck_process_is_concluded_once_and_stays_on_record() -> None:
    reap = Reap([worker(201, ended_by=NOTHING_ENDS)]).run(until_s=500.0)
    assert len(reap.concluded_at_s) == 1
    assert reap.concluded_at_s[0] < 5.0 + KILL_WAIT_S + 1.0
    assert not reap.forgotten
    assert reap.entry.phase is Phase.FINISHED


def test_a_session_whose_stuck_process_ends_at_last_is_forgotten_without_a_second_event() -> None:
    reap = Reap([worker(201, ended_by=NOTHING_ENDS, ends_itself_at_s=60.0)]).run()
    assert reap.forgotten
    assert len(reap.concluded_at_s) == 1
    assert reap.reclaimed == 1
    assert 60.0 < reap.now_s < 61.0


def test_a_process_that_may_not_be_signalled_ends_as_stuck_and_holds_nothing_up() -> None:
    reap = Reap([worker(201, denied=True), worker(202)]).run(until_s=20.0)
    assert reap.stage(201) is Stage.STUCK
    assert reap.concluded_at_s
    assert reap.entry.targets[ProcessId(201, 2000)].signals == ()


# -- the end ----------------------------------------------------------------------------------------


def test_a_session_is_reclaimed_then_concluded_then_forgotten_each_once() -> None:
    reap = Reap([worker(201), tracker(202, ends_itself_at_s=0.02)]).run()
    assert reap.reclaimed == 1
    assert len(reap.concluded_at_s) == 1
    assert reap.forgotten


def test_nothing_is_reclaimed_while_a_process_of_the_session_may_still_use_it() -> None:
    for processes in ([worker(201, ended_by=KILL_ENDS)], [worker(201), tracker(202)]):
        reap = Reap(processes).run(until_s=4.9)
        assert reap.reclaimed == 0
        assert not reap.concluded_at_s


def test_a_session_is_not_concluded_before_what_it_held_is_reclaimed() -> None:
    entry = Reap([]).entry
    for number in range(QUIET_LOOKS):
        entry = apply(entry, Looked(Family({}, {}), number, 0.0))
    assert kinds(decide.decide(entry, POLICY, 10.0)) == [Reclaim]
    entry = apply(entry, ReclaimStarted())
    assert decide.decide(entry, POLICY, 10.0) == []
    # Together: a daemon that is killed between the two would have the next one tell of the same end again.
    assert kinds(decide.decide(apply(entry, Reclaimed(Freed())), POLICY, 10.0)) == [Conclude, Forget]


def test_a_reap_takes_few_turns_however_long_it_lasts() -> None:
    reap = Reap([worker(201, ended_by=KILL_ENDS)], POLICY._replace(grace_s=600.0)).run()
    assert len(reap.looks) < 600.0 / 0.5 + 20
    assert reap.now_s >= 600.0


def test_a_signal_on_fresh_evidence_goes_out_before_a_look_that_is_due_again() -> None:
    one = worker(201)
    entry = apply(Reap([one]).entry, Looked(Family({one.member.process.id: one.member}, {}), 10.0, 0.0))
    late_s = 10.0 + FRESH_S / 2  # many other sessions were looked at meanwhile
    assert entry.look_due_s is not None
    assert entry.look_due_s < late_s
    (send,) = decide.decide(entry, POLICY, late_s)
    assert isinstance(send, Send)


# -- dry run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [False, True])
def test_a_dry_run_tells_once_and_signals_and_reclaims_nothing(clean: bool) -> None:
    processes = [worker(201, ended_by=KILL_ENDS), worker(202, found_from_s=0.001), tracker(203)]
    reap = Reap(processes, POLICY._replace(dry_run=True), clean=clean).run()
    assert reap.signals == []
    assert reap.reclaimed == 0
    assert reap.concluded_at_s == [POLICY.exit_grace_s if clean else 0.0], "it tells when it would have begun"
    assert len(reap.concluded_at_s) == 1
    assert reap.forgotten
    assert reap.stage(201) is Stage.FOUND


def test_the_end_that_a_dry_run_tells_of_goes_on_record_with_the_session_s_leaving_it() -> None:
    entry = Reap([]).entry
    for number in range(QUIET_LOOKS):
        entry = apply(entry, Looked(Family({}, {}), number, 0.0))
    assert kinds(decide.decide(entry, POLICY._replace(dry_run=True), 20.0)) == [Conclude, Forget]


def test_dry_run_switched_on_in_the_middle_of_a_reap_ends_it_without_another_signal() -> None:
    reap = Reap([worker(201, ended_by=KILL_ENDS), tracker(202)]).run(until_s=1.0)
    before = list(reap.signals)
    reap.policy = POLICY._replace(dry_run=True)
    reap.run()
    assert reap.signals == before
    assert reap.forgotten


def test_a_dry_run_after_a_clean_exit_tells_what_ended_by_itself_as_soon_as_it_has() -> None:
    reap = Reap([worker(201, ends_itself_at_s=3.0)], POLICY._replace(dry_run=True), clean=True).run()
    assert reap.stage(201) is Stage.GONE
    assert 3.0 <= reap.concluded_at_s[0] < 4.0
    assert reap.forgotten


# -- a session that its leader has ended ------------------------------------------------------------


def unregistered() -> Entry:
    return apply(Entry(Session("s", "", 1000, 1000, LEADER, "")), Unregistered())


def seen(at_s: float, *processes: Fake) -> Looked:
    return Looked(Family({one.member.process.id: one.member for one in processes}, {}), at_s, 0.0)


def test_a_session_that_its_leader_ended_is_concluded_once_it_has_no_worker_left() -> None:
    busy = apply(unregistered(), seen(1.0, worker(201)))
    assert decide.decide(busy, POLICY, 1e9) == []
    idle = apply(apply(busy, seen(2.0, tracker(202))), seen(3.0, tracker(202)))
    assert kinds(decide.decide(idle, POLICY, 3.0)) == [Conclude, Forget]
    assert kinds(decide.decide(apply(idle, Concluded()), POLICY, 3.0)) == [Forget]


@pytest.mark.parametrize(
    "looks",
    [
        pytest.param([], id="nobody has looked"),
        pytest.param([{}], id="one look, which can miss a worker between two programs"),
        pytest.param([{}, {"complete": False}], id="somebody could not be looked at"),
        pytest.param([{}, {"complete": False}, {}], id="nor in a row"),
    ],
)
def test_a_session_that_its_leader_ended_is_not_concluded_before_whole_looks_found_no_worker(
    looks: list[dict[str, bool]],
) -> None:
    entry = apply(Entry(Session("s", "", 1000, 1000, LEADER, "")), seen(1.0))
    entry = apply(apply(entry, seen(2.0)), Unregistered())
    for at_s, facts in enumerate(looks, 3):
        entry = apply(entry, seen(at_s)._replace(**facts))
    assert decide.decide(entry, POLICY, 1e9) == []


def test_a_session_without_a_worker_goes_on_while_its_leader_has_not_ended_it() -> None:
    entry = apply(Entry(Session("s", "", 1000, 1000, LEADER, "")), Looked(Family({}, {}), 1.0, 0.0))
    assert decide.decide(entry, POLICY, 1e9) == []


# -- stopping a leader ------------------------------------------------------------------------------


def stopped(at_s: float, **facts: Any) -> Entry:
    leader = Member(Process(LEADER, 1, 1000), Role.WORKER, "leader", ("asked for",), True)
    return apply(Entry(Session("s", "", 1000, 1000, LEADER, "", **facts)), StopAsked(leader, at_s))


def test_a_living_session_is_left_alone_until_somebody_wants_it_stopped() -> None:
    entry = apply(
        Entry(Session("s", "", 1000, 1000, LEADER, "")),
        Looked(Family({ProcessId(201, 2000): worker(201).member}, {}), 0.0, 0.0),
    )
    assert decide.decide(entry, POLICY, 1e9) == []


def test_a_leader_that_is_to_be_stopped_is_asked_then_killed_after_the_grace() -> None:
    entry, sent = stopped(3.0), []
    for _ in range(3):
        deadline_s = ledger.deadline(entry, POLICY.tracker_grace_s)
        assert deadline_s is not None
        assert decide.decide(entry, POLICY, deadline_s - 0.001) == []
        (action,) = decide.decide(entry, POLICY, deadline_s)
        assert isinstance(action, Send)
        sent.append((deadline_s, action.signal, action.member.process.id))
        entry = apply(entry, signalled(LEADER, action.event, action.signal, action.due_s))
    assert sent == [(3.0, SIGTERM, LEADER), (8.0, SIGKILL, LEADER), (9.0, SIGKILL, LEADER)]


def test_the_workers_of_a_stopped_leader_are_not_signalled_before_it_is_dead() -> None:
    entry = apply(stopped(3.0), Looked(Family({ProcessId(201, 2000): worker(201).member}, {}), 3.0, 0.0))
    for at_s in (3.0, 10.0, 100.0):
        actions = decide.decide(entry, POLICY, at_s)
        assert [action.member.process.id for action in actions if isinstance(action, Send)] == [LEADER]


# -- judging ----------------------------------------------------------------------------------------


def test_judging_asks_the_policy_who_is_protected() -> None:
    one = Process(ProcessId(201, 2000), 1, 1000, comm="keeper", pages=frozenset(("s",)), forked=True)
    session, snapshot = Session("s", "", 1000, 1000, LEADER, ""), Snapshot({201: one})
    assert decide.judge(session, snapshot, POLICY).members
    family = decide.judge(session, snapshot, POLICY._replace(protected_names=frozenset(("keeper",))))
    assert not family.members


# -- any order of happenings ------------------------------------------------------------------------

_POOL = [Fake(pid, tracker=pid >= 300).member for pid in (201, 202, 203, 300, 301)]
_SETS = st.sets(st.sampled_from(_POOL), max_size=4)
_HAPPENINGS = st.one_of(
    st.tuples(st.just("wait"), st.sampled_from([0.0, 0.002, 0.05, 0.5, 1.0, 5.0, 12.0, 40.0])),
    st.tuples(st.just("look"), st.sets(st.sampled_from(range(5)), max_size=4)),
    st.tuples(st.just("exit"), st.sets(st.sampled_from(range(5)), max_size=4)),
    st.tuples(st.just("obey"), st.booleans()),
    st.tuples(st.just("obey"), st.booleans()),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(_HAPPENINGS, min_size=5, max_size=40), st.sampled_from([0.0, 3.0]), st.booleans())
def test_in_any_order_no_tracker_is_signalled_before_the_workers_are_done_and_nobody_gone_ever(
    happenings: list[tuple[str, Any]], exit_grace_s: float, dry_run: bool
) -> None:
    policy = POLICY._replace(dry_run=dry_run)
    entry = Entry(Session("s", "", 1000, 1000, LEADER, ""))
    entry = apply(entry, LeaderDied(Cause(CauseKind.SIGNAL, 9), 0.0, exit_grace_s))
    now_s, concluded = 0.0, 0
    for kind, what in happenings:
        if kind == "wait":
            now_s += what
        elif kind == "look":
            found = {_POOL[index].process.id: _POOL[index] for index in what}
            entry = apply(entry, Looked(Family(found, {}), now_s, 0.0))
        elif kind == "exit":
            entry = apply(entry, Exited({_POOL[index].process.id: now_s for index in what}))
        for action in decide.decide(entry, policy, now_s) if kind == "obey" else ():
            if isinstance(action, Send):
                assert not dry_run
                _check_send(entry, action, now_s)
                id_ = action.member.process.id
                entry = apply(entry, signalled(id_, action.event, action.signal, action.due_s, denied=what))
            elif isinstance(action, Conclude):
                concluded += 1
                entry = apply(entry, Concluded())
            elif isinstance(action, Reclaim):
                entry = apply(apply(entry, ReclaimStarted()), Reclaimed(Freed()))
    assert concluded <= 1


def _check_send(entry: Entry, send: Send, now_s: float) -> None:
    target = entry.targets[send.member.process.id]
    assert target.stage is not Stage.GONE
    assert now_s >= entry.signal_from_s
    assert send.due_s > now_s
    if target.tracker:
        assert send.signal == SIGKILL
        assert all(t.stage in ledger.DONE for t in entry.targets.values() if not t.tracker) or (
            target.stage is not Stage.TRUSTED
        )
        if target.stage is Stage.TRUSTED:
            assert entry.phase is Phase.TRACKERS
            assert now_s >= entry.changed_at_s + POLICY.tracker_grace_s
    if send.signal == SIGKILL and target.stage is Stage.ASKED:
        assert send.event is Event.DUE
        assert now_s >= target.due_s


# -- a control group of the session's own -----------------------------------------------------------


class Isolated(Reap):
    """One whose session has a control group of its own: a look at which somebody is to be killed is one at who holds still."""

    still_at_s: list[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.still_at_s = []
        self.entry = apply(self.entry, ledger.Isolated("/s.scope"))

    def _look(self, depth: Depth) -> None:
        still = decide.must_hold_still(self.entry, self.policy, self.now_s)
        super()._look(depth)
        if still:
            self.still_at_s.append(self.now_s)
            for action in decide.decide(self.entry, self.policy, self.now_s, still=True):
                if isinstance(action, Send):
                    self._send(action)


def test_in_a_group_of_their_own_workers_are_asked_at_once_and_killed_while_all_hold_still() -> None:
    reap = Isolated([worker(201, ended_by=KILL_ENDS), worker(202)]).run()
    assert reap.sent_to(201) == [(0.0, SIGTERM), (5.0, SIGKILL)]
    assert reap.sent_to(202) == [(0.0, SIGTERM)]
    assert reap.still_at_s == [5.0]
    assert reap.forgotten


def test_what_multiplies_in_a_group_of_its_own_is_killed_while_all_hold_still() -> None:
    hopping = [worker(300 + n, found_from_s=0.02 * n, ended_by=KILL_ENDS) for n in range(1, 6)]
    reap = Isolated([worker(201), *hopping]).run()
    held_still = {round(at_s, 3) for at_s in reap.still_at_s}
    for wanted in (SIGKILL, SIGSTOP):
        found = {at_s for at_s, number, _ in reap.signals if number == wanted}
        assert found
        assert found <= held_still


def test_nobody_is_made_to_hold_still_while_nobody_is_to_be_killed() -> None:
    assert not Isolated([worker(201), tracker(202, ends_itself_at_s=0.1)]).run().still_at_s
    assert not Reap([worker(201, ended_by=KILL_ENDS)]).entry.session.scope
    living = Entry(Session("s", "", 1000, 1000, LEADER, "", scope="/s.scope"))
    assert not decide.must_hold_still(living, POLICY, 0.0)
    dry = Isolated([worker(201, ended_by=KILL_ENDS)], POLICY._replace(dry_run=True)).run()
    assert not dry.still_at_s
    assert not dry.signals


def test_all_in_a_group_of_their_own_hold_still_for_the_look_after_one_that_some_slipped_away_from() -> None:
    entry = Isolated([]).entry
    assert not decide.must_hold_still(entry, POLICY, 0.0)
    nobody = Looked(Family({}, {}), 0.0, 0.0)
    slipped = apply(entry, nobody._replace(calm=False))
    assert decide.must_hold_still(slipped, POLICY, 0.1)
    assert not decide.must_hold_still(apply(slipped, nobody), POLICY, 0.2)
    assert not decide.must_hold_still(apply(Reap([]).entry, nobody._replace(calm=False)), POLICY, 0.1)


def test_a_tracker_that_does_not_go_is_killed_while_all_hold_still() -> None:
    reap = Isolated([worker(201), tracker(202)]).run()
    (at_s,) = reap.seconds_of(202, SIGKILL)
    assert at_s in {round(one, 3) for one in reap.still_at_s}
