"""Snapshots of real processes: who is in them, who is read again and when, and which pidfds were opened."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from specimens import (
    ME,
    NOBODY,
    OTHER_ID,
    SOON_S,
    UID,
    Mine,
    changing,
    child,
    child_of_child,
    count_descriptors,
    cued,
    dead_session,
    die,
    end,
    executed,
    forking,
    found,
    id_of,
    seen,
    session,
)

from agent import wire
from agent.page import SessionPage
from reaperd import observer as observer_module
from reaperd.linux import pidfd
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import ProcessGone, ProcFS, Stat
from reaperd.model import Process, ProcessId, Session, Snapshot
from reaperd.observer import Interrupted, Observer

STAMPED = {wire.LINEAGE_VARIABLE: OTHER_ID}
LONG_AGO_S = 60.0  # old enough to have become what it will be


def look(observer: Observer, one: Session, **facts: Any) -> Snapshot:
    return observer.look([one], **{"hold": False, **facts})


def aged(proc: Mine, **facts: Any) -> Session:
    """Return a session of this process, as old as ``proc`` has it."""
    return session(leader=proc.stat(ME).id, **facts)


def pidfds_of(pid: int) -> int:
    """Return how many pidfds of ``pid`` are open here."""
    found = 0
    for name in os.listdir("/proc/self/fdinfo"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found += f"\nPid:\t{pid}\n" in Path(f"/proc/self/fdinfo/{name}").read_text()
    return found


# -- who is in a snapshot ---------------------------------------------------------------------------


def test_the_living_leader_is_in_its_own_snapshot_and_a_dead_child_is_not(observer: Observer) -> None:
    with child() as pid:
        die(pid)
        snapshot = look(observer, session())
        assert found(snapshot, ME).id == id_of(ME)
        assert seen(snapshot, pid) is None


def test_whoever_dies_between_two_looks_is_no_longer_in_the_snapshot(observer: Observer) -> None:
    with child() as pid, child() as zombie:
        assert {pid, zombie} <= look(observer, session()).processes.keys()
        end(pid)
        die(zombie)
        snapshot = look(observer, session())
        assert seen(snapshot, pid) is None
        assert seen(snapshot, zombie) is None


def test_whoever_dies_while_it_is_looked_at_is_not_in_the_snapshot() -> None:
    class Dying(Mine):
        """A /proc in which everybody but this process is a zombie already, and can still be read."""

        def stat(self, pid: int) -> Stat:
            told = super().stat(pid)
            return told if pid == ME else told._replace(state="Z", threads=1)

    observer = Observer(Dying())
    with child() as pid:
        for hold in (False, True):
            assert seen(look(observer, session(), hold=hold, everyone=True), pid) is None
    observer.release()


def test_whoever_started_before_the_leader_is_not_in_the_snapshot() -> None:
    with child() as pid:
        started = id_of(pid).start_ticks
        assert seen(look(Observer(Mine()), session(leader=ProcessId(ME, started))), pid)
        later = look(Observer(Mine()), session(leader=ProcessId(ME, started + 1)))
        assert seen(later, pid) is None
        assert seen(later, ME) is None


@pytest.mark.needs_root
def test_whoever_is_of_another_or_of_mixed_uid_is_not_in_the_snapshot(observer: Observer) -> None:
    for ids in ((NOBODY, NOBODY, NOBODY), (NOBODY, UID, UID), (UID, NOBODY, UID), (UID, UID, NOBODY)):
        with child(lambda ids=ids: os.setresuid(*ids)) as pid:
            assert seen(look(observer, session()), pid) is None, ids
    with child(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as pid:
        assert found(look(observer, session(uid=NOBODY)), pid).uid == NOBODY


@pytest.mark.needs_root
def test_the_sessions_of_one_user_say_nothing_of_the_age_of_another_users_processes() -> None:
    with child(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as pid:
        ticks = id_of(pid).start_ticks
        theirs = session(uid=NOBODY, leader=ProcessId(pid, ticks + 1))
        snapshot = Observer(Mine()).look([session(), theirs], hold=False)
        assert seen(snapshot, pid) is None
        assert seen(snapshot, ME)


def test_one_look_serves_several_sessions_and_none_costs_nothing(page: SessionPage) -> None:
    with child() as pid:
        later = session(leader=ProcessId(ME, id_of(pid).start_ticks + 10**6))
        both = Observer(Mine()).look([session(page), later], hold=False)
        assert found(both, pid).pages == {session(page).id}
        for sessions in ([later], [], [session(uid=UID + 1)]):
            proc = Mine()
            observer = Observer(proc)
            assert not observer.look(sessions, hold=False).processes
            assert not proc.reads


@pytest.mark.parametrize("everyone", [False, True])
def test_who_was_read_before_a_page_was_known_is_read_again_for_it(
    page: SessionPage, observer: Observer, everyone: bool
) -> None:
    with child() as pid:
        assert not found(look(observer, session()), pid).pages
        theirs = session(page)
        snapshot = look(observer, theirs, hold=True, members=[theirs.leader], everyone=everyone)
        assert found(snapshot, pid).pages == {theirs.id}
    observer.release()


def test_a_session_that_is_over_has_nobody_read_on_its_account(page: SessionPage) -> None:
    proc = Mine()
    observer = Observer(proc)
    with child():
        look(observer, session(page))
        observer.uncover(session(page).key)
        observer.uncover(session(page).key)
        proc.reads.clear()
        with child() as new:
            snapshot = observer.look([], hold=False)
        assert new not in proc.reads
        assert not snapshot.processes
        assert observer.marks.pages.session_of(session(page).page_inode, UID) is None


def test_of_two_sessions_of_a_user_the_one_that_goes_on_is_looked_for_still(page: SessionPage) -> None:
    observer = Observer(Mine())
    with child() as pid:
        one, other = session(page), session()
        observer.look([one, other], hold=False)
        observer.uncover(other.key)
        assert found(look(observer, one), pid).pages == {one.id}


def test_what_stands_below_a_leader_is_found_down_to_the_last(observer: Observer) -> None:
    with child_of_child() as (pid, grandchild):
        snapshot = observer.look_below(session())
        assert {ME, pid, grandchild} <= snapshot.processes.keys()
        assert found(snapshot, grandchild).ppid == pid
        assert set(observer.descendants(id_of(pid))) == {grandchild}
        assert set(observer.look_below(session(leader=id_of(pid))).processes) == {pid, grandchild}
        assert not observer.look_below(session(leader=id_of(grandchild))).processes, "it has started nobody"
        other = session(leader=ProcessId(grandchild, 0), kept=frozenset((id_of(pid),)))
        assert set(observer.look_below(other).processes) == {pid, grandchild}


def test_what_stands_below_a_leader_is_told_with_all_its_marks(observer: Observer, page: SessionPage) -> None:
    with child() as pid, executed(**STAMPED) as program:
        snapshot = observer.look_below(session(page))
        assert found(snapshot, pid).pages == {session(page).id}
        assert found(snapshot, program).lineage == (OTHER_ID,)


def test_children_in_a_circle_end_the_search() -> None:
    class Circle(ProcFS):
        """A /proc that was read while pids were given away: everybody is everybody's child."""

        calls = 0

        def children(self, pid: int) -> list[int]:
            self.calls += 1
            assert self.calls < 100
            return [2, 3, 4]

    assert sorted(Observer(Circle()).descendants(ProcessId(2, 0))) == [3, 4]


# -- who is read again ------------------------------------------------------------------------------


def test_a_settled_process_is_not_read_again_until_another_program_runs_in_it() -> None:
    proc = Mine(older_s=LONG_AGO_S)
    observer, one = Observer(proc), aged(proc)
    with changing(**STAMPED) as (pid, execute):
        look(observer, one)
        proc.reads.clear()
        for facts in ({}, {"again": [proc.stat(pid).id]}, {"hold": True, "everyone": True}):
            assert found(look(observer, one, **facts), pid).lineage == ()
        assert proc.reads[pid] == 0
        execute()
        snapshot = look(observer, one, hold=True, everyone=True)
        assert proc.reads[pid] == 1
        assert (found(snapshot, pid).lineage, found(snapshot, pid).comm) == ((OTHER_ID,), "cat")
        look(observer, one, hold=True, everyone=True)
        assert proc.reads[pid] == 1
    observer.release()


def test_what_changes_of_a_settled_process_without_another_program_is_told_of_it() -> None:
    proc = Mine(older_s=LONG_AGO_S)
    observer, one = Observer(proc), aged(proc)
    with child_of_child() as (pid, grandchild):
        assert found(look(observer, one), grandchild).ppid == pid
        proc.reads.clear()
        end(pid)
        snapshot = look(observer, one, again=[proc.stat(grandchild).id])
        assert found(snapshot, grandchild).ppid == ProcFS().stat(grandchild).ppid != pid
        assert proc.reads[grandchild] == 0


def test_a_look_reads_nobody_twice() -> None:
    proc = Mine()
    with child() as pid:
        look(Observer(proc), session())
        assert proc.reads[pid] == 1


def test_who_became_another_program_unseen_is_found_in_turn() -> None:
    proc = Mine(older_s=LONG_AGO_S)
    observer, one = Observer(proc), aged(proc)
    with changing(**STAMPED) as (pid, execute):
        look(observer, one)
        execute()
        deadline_s = time.monotonic() + SOON_S
        while found(look(observer, one), pid).lineage != (OTHER_ID,):
            assert time.monotonic() < deadline_s


def test_a_young_process_is_read_again_at_the_next_look_for_it_may_become_another_program() -> None:
    proc = Mine(slow_s=0.003)
    observer, one = Observer(proc), session()
    with changing(**STAMPED) as (pid, execute):
        look(observer, one)
        execute()
        assert found(look(observer, one), pid).lineage == (OTHER_ID,)


def test_a_young_process_that_is_still_the_same_program_is_looked_at_and_not_read_in_full() -> None:
    proc = Mine()
    observer = Observer(proc)
    with child() as pid:
        look(observer, session())
        proc.stats.clear()
        proc.reads.clear()
        look(observer, session())
        assert proc.stats[pid] > 0
        assert proc.reads[pid] == 0


@pytest.mark.needs_root
def test_a_young_process_that_becomes_another_users_is_nobodys_of_ours() -> None:
    proc = Mine(slow_s=0.003)
    observer = Observer(proc)
    with cued(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as (pid, change):
        assert found(look(observer, session()), pid).uid == UID
        change()
        assert seen(look(observer, session()), pid) is None


@pytest.mark.needs_root
def test_a_young_process_that_becomes_a_covered_users_is_found() -> None:
    proc = Mine(slow_s=0.003)
    observer = Observer(proc)
    with cued(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as (pid, change):
        theirs = session(uid=NOBODY, leader=ProcessId(1, 0))
        assert seen(look(observer, theirs), pid) is None
        change()
        assert found(look(observer, theirs), pid).uid == NOBODY


@pytest.mark.needs_root
def test_a_settled_member_that_became_another_users_is_no_member_where_it_is_to_be_signalled() -> None:
    proc = Mine(older_s=LONG_AGO_S)
    observer, one = Observer(proc), aged(proc)
    with cued(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as (pid, change):
        look(observer, one)
        change()
        snapshot = look(observer, one, hold=True, again=[proc.stat(pid).id])
        assert seen(snapshot, pid) is None
        assert observer.claim(proc.stat(pid).id) is None
    observer.release()


def test_a_member_that_is_to_be_signalled_is_read_again_though_it_is_the_same_program(
    page: SessionPage,
) -> None:
    proc = Mine(older_s=LONG_AGO_S)
    observer, one = Observer(proc), aged(proc)
    one = session(page)._replace(leader=one.leader)
    with cued(page.close) as (pid, close):
        member = proc.stat(pid).id
        assert found(look(observer, one), pid).pages == {one.id}
        close()
        taken_as_read = look(observer, one, hold=True)
        assert found(taken_as_read, pid).pages == {one.id}
        assert pid in taken_as_read.stale
        read = look(observer, one, hold=True, again=[member])
        assert found(read, pid).pages == frozenset()
        assert pid not in read.stale
        assert pidfds_of(pid) == 1
    observer.release()


def test_a_member_that_is_told_with_another_start_time_is_somebody_else_and_not_read() -> None:
    proc = Mine(older_s=LONG_AGO_S)
    observer, one = Observer(proc), aged(proc)
    with child() as pid:
        look(observer, one)
        proc.reads.clear()
        id_ = proc.stat(pid).id
        snapshot = look(observer, one, hold=True, again=[ProcessId(pid, id_.start_ticks + 1)])
        assert proc.reads[pid] == 0
        assert pid in snapshot.stale


def test_who_is_gone_is_forgotten(observer: Observer) -> None:
    with child() as pid:
        look(observer, session())
        assert pid in observer._known
    look(observer, session())
    for remembered in (observer._known, observer._unsettled, observer._processes):
        assert pid not in remembered


def test_a_pid_with_another_inode_is_another_process() -> None:
    proc = Mine(older_s=LONG_AGO_S)
    observer, one = Observer(proc), aged(proc)
    with child() as pid:
        look(observer, one)
        proc.reads.clear()
        proc.inodes[pid] = 1
        snapshot = look(observer, one)
        assert proc.reads[pid] > 0
        assert pid not in snapshot.stale


def test_stale_are_those_who_were_not_read_for_this_look() -> None:
    proc = Mine(older_s=LONG_AGO_S, slow_s=0.003)
    observer, one = Observer(proc), aged(proc)
    with child() as pid, child() as other:
        first = look(observer, one)
        assert first.stale == frozenset()
        with child() as new:
            second = look(observer, one, again=[proc.stat(other).id])
            assert pid in second.stale
            assert second.stale.isdisjoint((other, new))
            assert second.stale <= second.processes.keys()


def test_whom_the_image_alone_tells_is_stale_where_somebody_is_to_be_signalled() -> None:
    proc = Mine()
    observer = Observer(proc)
    with child() as pid:
        look(observer, session())
        snapshot = look(observer, session(), hold=True, everyone=True)
        assert pid in snapshot.stale
        assert pidfds_of(pid) == 0
        again = look(observer, session(), hold=True, everyone=True, again=[id_of(pid)])
        assert pid not in again.stale
        assert pidfds_of(pid) == 1
    observer.release()


def test_where_a_process_does_not_tell_which_program_it_runs_it_is_read_anew() -> None:
    class Reserved(Mine):
        """A /proc that does not say where code and stack of a process are."""

        def stat(self, pid: int) -> Stat:
            return super().stat(pid)._replace(image=0)

    proc = Reserved(older_s=LONG_AGO_S)
    observer, one = Observer(proc), aged(proc)
    with child() as pid:
        look(observer, one)
        look(observer, one, hold=True, everyone=True)
        assert proc.reads[pid] >= 2
    observer.release()


def test_who_was_passed_over_is_read_when_an_older_session_comes() -> None:
    proc = Mine(older_s=LONG_AGO_S, slow_s=0.003)
    observer = Observer(proc)
    with executed(**STAMPED) as pid:
        young = proc.stat(pid).id.start_ticks + 1
        assert seen(look(observer, session(id="late", leader=ProcessId(ME, young))), pid) is None
        assert pid not in proc.reads
        assert found(look(observer, aged(proc)), pid).lineage == (OTHER_ID,)


class Vanishing(Mine):
    """A /proc in which one process is gone when it is to be read, or when its memory is."""

    at = 0
    late = False

    def living_task(self, stat: Stat) -> int:
        if stat.id.pid == self.at and not self.late:
            raise ProcessGone
        return super().living_task(stat)

    def environ(self, pid: int, task: int) -> bytes | None:
        if pid == self.at:
            raise ProcessGone
        return super().environ(pid, task)

    def stat(self, pid: int) -> Stat:
        told = super().stat(pid)
        return told._replace(state="Z") if pid == self.at and self.reads[pid] else told


@pytest.mark.parametrize("late", [False, True], ids=["before", "meanwhile"])
def test_who_was_gone_before_it_could_be_read_is_no_reason_to_think_that_nobody_was_there(late: bool) -> None:
    proc = Vanishing()
    observer = Observer(proc)
    one = dead_session(adopters=frozenset((id_of(ME),)))
    look(observer, session())
    with child() as pid:
        proc.at, proc.late = pid, late
        assert look(observer, one, hold=True, members=[]).vanished == {UID}
    with child():
        assert not look(observer, one, hold=True).vanished
    observer.release()


def test_who_was_left_by_a_parent_that_ended_while_all_were_asked_for_theirs_is_read(
    observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_pid = pidfd.open_pid

    def open_living(pid: int) -> int:
        if pid == gone:
            raise ProcessGone
        return open_pid(pid)

    one = dead_session()
    look(observer, session())
    with child_of_child() as (gone, grandchild):
        assert seen(look(observer, one, hold=True), grandchild) is None
        monkeypatch.setattr(pidfd, "open_pid", open_living)
        assert seen(look(observer, one, hold=True), grandchild)
        monkeypatch.undo()
    observer.release()


class Moody(Mine):
    """A /proc in which some let nobody read their memory."""

    def __init__(self, **facts: float) -> None:
        super().__init__(**facts)
        self.refusing: set[int] = set()

    def environ(self, pid: int, task: int) -> bytes | None:
        if pid in self.refusing:
            raise ProcessGone
        return super().environ(pid, task)


def test_whose_memory_could_not_be_read_in_time_is_read_at_a_later_look() -> None:
    proc = Moody(older_s=LONG_AGO_S, slow_s=0.003)
    observer, one = Observer(proc), aged(proc)
    with executed(**STAMPED) as pid:
        proc.refusing = {pid}
        first = look(observer, one)
        assert found(first, pid).lineage == (), "it is there all the same"
        assert set(first.unread.values()) == {UID}
        proc.refusing = set()
        second = look(observer, one)
        assert found(second, pid).lineage == (OTHER_ID,)
        assert not second.unread


def test_who_lets_nobody_read_any_more_has_the_marks_that_the_same_program_had() -> None:
    proc = Moody(older_s=LONG_AGO_S)
    observer, one = Observer(proc), aged(proc)
    with executed(**STAMPED) as pid, executed(**STAMPED) as other:
        look(observer, one)
        proc.refusing = {pid}
        for _ in range(2):
            snapshot = look(observer, one, hold=True, again=[proc.stat(pid).id, proc.stat(other).id])
            assert found(snapshot, pid).lineage == (OTHER_ID,)
            assert found(snapshot, pid).argv == ("cat",)
            assert not snapshot.unread
            assert pid not in snapshot.stale
    observer.release()


def test_who_lets_nobody_read_any_more_has_no_marks_of_the_program_that_it_was() -> None:
    proc = Moody(older_s=LONG_AGO_S)
    observer, one = Observer(proc), aged(proc)
    with executed(**STAMPED) as stamped, changing(**STAMPED) as (pid, execute):
        look(observer, one)
        before = found(look(observer, one), stamped)
        execute()
        proc.refusing = {pid}
        snapshot = look(observer, one, hold=True, again=[proc.stat(pid).id])
        assert (found(snapshot, pid).lineage, found(snapshot, pid).forked) == ((), False)
        assert set(snapshot.unread.values()) == {UID}
        assert before.lineage == (OTHER_ID,)
    observer.release()


def test_a_spared_process_that_lets_nobody_read_any_more_is_spared_still(page: SessionPage) -> None:
    proc = Moody(older_s=LONG_AGO_S)
    observer, one = Observer(proc), aged(proc)
    with executed(**{wire.SPARED_VARIABLE: OTHER_ID}) as pid:
        look(observer, one)
        proc.refusing = {pid}
        snapshot = look(observer, one, hold=True, again=[proc.stat(pid).id])
        assert found(snapshot, pid).spared == {OTHER_ID}
    observer.release()


def test_a_look_that_ran_out_of_descriptors_leaves_nothing_that_trips_the_next_one(page: SessionPage) -> None:
    class Scarce(Mine):
        """A /proc in which descriptors run out at one process."""

        at = 0

        def cgroup(self, pid: int) -> str:
            if pid == self.at:
                raise OSError(24, "Too many open files")
            return super().cgroup(pid)

    proc = Scarce()
    observer = Observer(proc)
    with child(), child_of_child() as (pid, grandchild), child():
        proc.at = pid
        with pytest.raises(OSError, match="Too many"):
            look(observer, session(page))
        proc.at = 0
        assert set(observer.look_below(session(page, leader=id_of(pid))).processes) == {pid, grandchild}
        assert found(look(observer, session(page)), pid).pages == {session(page).id}


# -- a look that nobody is to wait for --------------------------------------------------------------


def test_a_look_with_pidfds_reads_who_was_left_to_those_who_adopt_and_leaves_others_for_later(
    observer: Observer, page: SessionPage
) -> None:
    mine = frozenset((id_of(ME),))
    look(observer, session(page))
    with child() as pid:
        snapshot = look(observer, dead_session(page), hold=True)
        assert seen(snapshot, pid) is None
        assert pidfds_of(pid) == 0
        snapshot = look(observer, dead_session(page, adopters=mine), hold=True)
        assert found(snapshot, pid).pages == {session(page).id}
        assert snapshot.adopters == mine
        handle = observer.claim(id_of(pid))
        assert handle is not None
        os.close(handle)
    with child() as pid:
        for later in ({"hold": True, "everyone": True}, {"hold": False}):
            assert found(look(observer, dead_session(page), **later), pid).pages == {session(page).id}


def test_a_look_with_pidfds_reads_the_new_children_of_members(observer: Observer) -> None:
    with forking() as (pid, fork):
        look(observer, session())
        grandchild = fork()
        assert seen(look(observer, dead_session(), hold=True), grandchild) is None
        snapshot = look(observer, dead_session(), hold=True, members=[id_of(pid)])
        assert found(snapshot, grandchild).ppid == pid
        assert grandchild not in snapshot.stale


def test_a_look_with_pidfds_follows_those_who_are_new_down_to_the_last(observer: Observer) -> None:
    look(observer, session())
    with child_of_child() as (pid, grandchild):
        snapshot = look(observer, dead_session(adopters=frozenset((id_of(ME),))), hold=True)
        assert {pid, grandchild} <= snapshot.processes.keys()


@pytest.mark.parametrize(
    "facts",
    [{"hold": True}, {"hold": True, "everyone": True}, {"hold": False}],
    ids=["quick", "all", "living"],
)
def test_who_adopts_counts_though_it_was_never_looked_at_before(
    observer: Observer, facts: dict[str, bool]
) -> None:
    look(observer, session())
    with child_of_child() as (pid, grandchild):
        adopters = frozenset((id_of(pid),))
        snapshot = look(observer, dead_session(adopters=adopters), **facts)
        assert snapshot.adopters == adopters
        assert seen(snapshot, grandchild)


@pytest.mark.needs_root
def test_one_of_another_user_adopts_too(observer: Observer) -> None:
    theirs = session(uid=NOBODY, leader=ProcessId(1, 0))
    look(observer, theirs)
    with child() as pid:
        adopters = frozenset((id_of(pid),))
        assert look(observer, theirs._replace(adopters=adopters), hold=True).adopters == adopters


def test_a_member_counts_though_it_was_never_looked_at_before(observer: Observer) -> None:
    look(observer, session())
    with child_of_child() as (pid, grandchild):
        members = [id_of(pid)]
        snapshot = look(observer, dead_session(), hold=True, members=members, again=members)
        assert {pid, grandchild} <= snapshot.processes.keys()


@pytest.mark.needs_root
def test_a_look_with_pidfds_reads_nobody_of_another_user(page: SessionPage) -> None:
    proc = Mine()
    observer = Observer(proc)
    look(observer, session(page))
    observer.cover(session(uid=NOBODY, leader=ProcessId(1, 0)))
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    with child(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as pid, child() as mine:
        snapshot = look(observer, one, hold=True)
        assert proc.reads[pid] == 0
        assert seen(snapshot, mine)
    observer.release()


def test_an_adopter_whose_pid_is_another_process_now_is_none(observer: Observer, page: SessionPage) -> None:
    with child() as pid:
        other = frozenset((ProcessId(ME, id_of(ME).start_ticks + 1),))
        look(observer, session())
        proc = observer.proc
        assert isinstance(proc, Mine)
        for facts in ({"hold": True}, {"hold": True, "everyone": True}, {"hold": False}):
            assert look(observer, dead_session(page, adopters=other), **facts).adopters == frozenset()
    with child() as pid:
        assert seen(look(observer, dead_session(page, adopters=other), hold=True), pid) is None


def test_an_adopter_that_has_died_is_none(observer: Observer) -> None:
    with child() as pid:
        adopters = frozenset((id_of(pid),))
        look(observer, session())
        assert look(observer, session(adopters=adopters)).adopters == adopters
        end(pid)
        assert look(observer, session(adopters=adopters)).adopters == frozenset()


def test_who_was_forked_during_a_long_look_is_read_before_anybody_is_signalled() -> None:
    class Forking(Mine):
        """A /proc in which a member forks while it is read, which takes its time."""

        def __init__(self) -> None:
            super().__init__(slow_s=0.002)
            self.at = self.grandchild = 0
            self.fork: Callable[[], int] = lambda: 0

        def cgroup(self, pid: int) -> str:
            if pid == self.at and not self.grandchild:
                self.grandchild = self.fork()
            return super().cgroup(pid)

    proc = Forking()
    observer = Observer(proc)
    with forking() as (pid, fork):
        look(observer, session())
        proc.fork, proc.at = fork, pid
        members = [id_of(pid)]
        snapshot = look(observer, dead_session(), hold=True, members=members, again=members)
        assert seen(snapshot, proc.grandchild)
        assert pidfds_of(proc.grandchild) == 1
    observer.release()


def test_a_look_ends_though_somebody_forks_without_end() -> None:
    class Breeding(Mine):
        """A /proc in which somebody has forked whenever it is listed, which takes its time."""

        breeding = False
        listings = 0

        def listing(self) -> dict[int, int]:
            if self.breeding:
                self.listings += 1
                assert self.listings < 60, "it looks for ever"
                stack.enter_context(child())
                select_nothing(0.0015)
            return super().listing()

    proc = Breeding(slow_s=0.002)
    observer = Observer(proc)
    with contextlib.ExitStack() as stack:
        look(observer, session())
        proc.breeding = True
        snapshot = look(observer, dead_session(adopters=frozenset((id_of(ME),))), hold=True)
        assert len(snapshot.processes) > 1
        observer.release()


def select_nothing(seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        pass


# -- the first look at what a leader left -----------------------------------------------------------


def test_a_hurried_look_leaves_those_to_the_next_whose_pages_do_not_tell_where_others_do(
    observer: Observer, page: SessionPage
) -> None:
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(observer, session(page))
    with child() as forked, executed(**STAMPED) as program:
        first = look(observer, one, hold=True, hurried=True)
        assert found(first, forked).pages == {one.id}
        assert seen(first, program) is None
        assert pidfds_of(program) == 0
        assert set(first.unread.values()) == {UID}, "they are to be looked at yet"
        second = look(observer, one, hold=True)
        assert found(second, program).lineage == (OTHER_ID,)
        assert pidfds_of(program) == 1
        assert not second.unread


def test_a_hurried_look_reads_whoever_stands_below_one_that_is_to_be_signalled(page: SessionPage) -> None:
    reader, writer = os.pipe()

    def start() -> None:
        with executed(**STAMPED) as program:
            os.write(writer, b"%d\n" % program)
            signal.pause()

    observer = Observer(Mine())
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(observer, session(page))
    with contextlib.ExitStack() as stack:
        pid = os.fork()
        if pid == 0:
            start()
            os._exit(1)
        stack.callback(end, pid)
        os.close(writer)
        with open(reader, "rb") as file:
            program = int(file.readline())
        stack.callback(os.kill, program, signal.SIGKILL)
        snapshot = look(observer, one, hold=True, hurried=True)
        assert found(snapshot, pid).pages == {one.id}
        assert (found(snapshot, program).ppid, found(snapshot, program).lineage) == (pid, (OTHER_ID,))
        assert not snapshot.unread
        observer.release()


def test_a_hurried_look_reads_all_where_no_page_tells_of_anybody(observer: Observer) -> None:
    look(observer, session())
    with executed(**STAMPED) as program:
        snapshot = look(observer, dead_session(adopters=frozenset((id_of(ME),))), hold=True, hurried=True)
        assert found(snapshot, program).lineage == (OTHER_ID,)


def test_a_hurried_look_reads_the_members_that_it_was_told_of(observer: Observer, page: SessionPage) -> None:
    look(observer, session(page))
    with child() as forked, executed(**STAMPED) as program:
        members = [id_of(program)]
        one = dead_session(page, adopters=frozenset((id_of(ME),)))
        snapshot = look(observer, one, hold=True, hurried=True, members=members, again=members)
        assert found(snapshot, forked).pages == {one.id}
        assert found(snapshot, program).lineage == (OTHER_ID,)


def test_whoever_dies_in_the_middle_of_a_hurried_look_is_no_trouble(page: SessionPage) -> None:
    class Dying(Mine):
        """A /proc in which a process ends once all have been read, before they are listed again."""

        armed = 0

        def listing(self) -> dict[int, int]:
            if self.armed == 1:
                end(self.pid)
            self.armed -= 1
            return super().listing()

        pid = 0

    proc = Dying(slow_s=0.002)
    observer = Observer(proc)
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(observer, session(page))
    with child() as forked, changing(**STAMPED) as (pid, execute):
        execute()
        proc.pid, proc.armed = pid, 2
        snapshot = look(observer, one, hold=True, hurried=True)
        assert proc.armed < 1
        assert found(snapshot, forked).pages == {one.id}
        assert seen(snapshot, pid) is None
    observer.release()


# -- ahead of that look -----------------------------------------------------------------------------


def ahead(observer: Observer, one: Session) -> list[Snapshot]:
    return list(observer.look_ahead([one]))


def test_whom_a_page_tells_is_told_ahead_and_held_and_everybody_else_is_left_to_the_look(
    observer: Observer, page: SessionPage
) -> None:
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(observer, session(page))
    with child() as forked, executed(**STAMPED) as program:
        (snapshot,) = ahead(observer, one)
        assert snapshot.processes.keys() == {forked}
        assert found(snapshot, forked).pages == {one.id}
        assert (pidfds_of(forked), pidfds_of(program)) == (1, 0)
        handle = observer.claim(id_of(forked))
        assert handle is not None
        os.close(handle)
        then = look(observer, one, hold=True, members=[id_of(forked)], again=[id_of(forked)])
        assert found(then, program).lineage == (OTHER_ID,)
        assert (pidfds_of(forked), pidfds_of(program)) == (1, 1)


def test_of_many_some_are_told_at_a_time_and_each_once(observer: Observer, page: SessionPage) -> None:
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(observer, session(page))
    with contextlib.ExitStack() as stack:
        pids = {stack.enter_context(child()) for _ in range(80)}
        snapshots = ahead(observer, one)
        assert {snapshot.adopters for snapshot in snapshots} == {one.adopters}
        told = [snapshot.processes.keys() for snapshot in snapshots]
        assert len(told) >= 2
        assert sum(map(len, told)) == len(pids)
        assert set().union(*told) == pids
        observer.release()


def test_nobody_is_told_ahead_of_whom_not_all_is_told_that_stands_below(
    observer: Observer, page: SessionPage
) -> None:
    reader, writer = os.pipe()

    def start() -> None:
        with executed(**STAMPED) as program:
            os.write(writer, b"%d\n" % program)
            signal.pause()

    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(observer, session(page))
    with contextlib.ExitStack() as stack:
        pid = os.fork()
        if pid == 0:
            start()
            os._exit(1)
        stack.callback(end, pid)
        os.close(writer)
        with open(reader, "rb") as file:
            program = int(file.readline())
        stack.callback(os.kill, program, signal.SIGKILL)
        alone = stack.enter_context(child())
        (snapshot,) = ahead(observer, one)
        assert snapshot.processes.keys() == {alone}
        assert (pidfds_of(pid), pidfds_of(program)) == (0, 0)
        then = look(observer, one, hold=True)
        assert {pid, program} <= then.processes.keys() - then.stale
        observer.release()


def test_who_has_forked_since_all_were_listed_is_not_told_without_its_child(page: SessionPage) -> None:
    class Forking(Mine):
        """A /proc in which a process forks right before it is read."""

        at = grandchild = 0
        fork: Callable[[], int] = os.getpid

        def living_task(self, stat: Stat) -> int:
            if stat.id.pid == self.at:
                self.at, self.grandchild = 0, self.fork()
            return super().living_task(stat)

    proc = Forking()
    observer = Observer(proc)
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(observer, session(page))
    with forking() as (pid, fork):
        proc.fork, proc.at = fork, pid
        told = set().union(*(snapshot.processes.keys() for snapshot in ahead(observer, one)))
        assert proc.grandchild
        assert pid not in told or proc.grandchild in told
    observer.release()


@pytest.mark.needs_root
def test_nobody_of_another_user_is_told_ahead(observer: Observer, page: SessionPage) -> None:
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(observer, session(page))
    observer.cover(session(uid=NOBODY, leader=ProcessId(1, 0)))
    with child(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as pid, child() as mine:
        (snapshot,) = ahead(observer, one)
        assert snapshot.processes.keys() == {mine}
        assert pid not in snapshot.processes


# -- the alarm --------------------------------------------------------------------------------------


class Alarming(Mine):
    """A /proc in which a leader dies when so many processes have been looked at."""

    def __init__(self, alarm: Alarm, after: int) -> None:
        super().__init__()
        self.alarm, self.after = alarm, after
        self.reader, self.writer = os.pipe()
        alarm.watch(self.reader)

    def stat(self, pid: int) -> Stat:
        self.after -= 1
        if self.after == 0:
            os.write(self.writer, b"x")
        return super().stat(pid)

    def silence(self) -> None:
        os.read(self.reader, 1)

    def close(self) -> None:
        self.alarm.silence(self.reader)
        os.close(self.reader)
        os.close(self.writer)


@pytest.mark.parametrize("facts", [{"hold": False}, {"hold": True, "everyone": True}], ids=["living", "all"])
def test_a_leaders_death_interrupts_a_wide_look_and_what_was_read_is_not_read_again(
    facts: dict[str, bool],
) -> None:
    alarm = Alarm()
    proc = Alarming(alarm, 10)
    observer = Observer(proc, alarm)
    nobody = session(leader=ProcessId(ME, 10**12))
    with contextlib.ExitStack() as stack:
        pids = {stack.enter_context(child()) for _ in range(40)}
        assert not observer.is_interrupted()
        with pytest.raises(Interrupted):
            look(observer, nobody, **facts)
        assert observer.is_interrupted()
        read = {pid for pid in pids if proc.stats[pid]}
        assert 10 <= len(read) <= 20
        proc.silence()
        look(observer, nobody, hold=True, everyone=True)
        assert all(proc.stats[pid] for pid in pids)
        if facts["hold"]:  # else some are read in turn besides
            assert {proc.stats[pid] for pid in pids} == {1}
    proc.close()
    alarm._epoll.close()


def test_a_look_that_was_interrupted_has_put_no_half_read_process_on_record(page: SessionPage) -> None:
    alarm = Alarm()
    proc = Alarming(alarm, 3)
    observer = Observer(proc, alarm)
    with child() as pid, executed(**STAMPED) as program:
        with pytest.raises(Interrupted):
            look(observer, session(page))
        proc.silence()
        snapshot = look(observer, session(page))
        assert found(snapshot, pid).pages == {session(page).id}
        assert found(snapshot, program).lineage == (OTHER_ID,)
    proc.close()
    alarm._epoll.close()


def test_who_is_new_is_read_some_at_a_time_and_what_was_read_is_not_read_again(
    page: SessionPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer_module, "_AT_A_TIME_S", 0.0)
    monkeypatch.setattr(observer_module, "_MANY", 4)
    proc = Mine()
    observer = Observer(proc)
    observer.cover(session(page))
    with contextlib.ExitStack() as stack:
        pids = {stack.enter_context(child()) for _ in range(10)} | {stack.enter_context(executed(**STAMPED))}
        listing = proc.listing()
        assert pids <= listing.keys()
        for read in range(4, len(listing), 4):
            with pytest.raises(Interrupted):
                observer.read_new(listing)
            assert read - 2 <= sum(bool(proc.stats[pid]) for pid in pids) <= read
        observer.read_new(listing)
        before = {pid: proc.stats[pid] for pid in pids}
        assert all(before.values())
        observer.read_new(listing)
        assert {pid: proc.stats[pid] for pid in pids} == before
        ours, theirs = (look(one, session(page)).processes for one in (observer, Observer(proc)))
        assert {pid: ours[pid] for pid in pids} == {pid: theirs[pid] for pid in pids}


def test_a_leaders_death_interrupts_the_reading_of_who_is_new(page: SessionPage) -> None:
    alarm = Alarm()
    proc = Alarming(alarm, 10**9)
    observer = Observer(proc, alarm)
    os.write(proc.writer, b"x")
    with child() as pid:
        with pytest.raises(Interrupted):
            observer.read_new(proc.listing())
        assert not proc.stats[pid]
    proc.close()
    alarm._epoll.close()


def test_a_look_at_everybody_is_interrupted_so_often_and_then_comes_to_its_end(page: SessionPage) -> None:
    alarm = Alarm()
    proc = Alarming(alarm, 10**9)
    observer, one = Observer(proc, alarm), dead_session(page)
    os.write(proc.writer, b"x")
    with child() as pid:
        for _ in range(2):
            for _ in range(10):
                with pytest.raises(Interrupted):
                    look(observer, one, hold=True, everyone=True)
                observer.release()
            assert found(look(observer, one, hold=True, everyone=True), pid).pages == {session(page).id}
            observer.release()
    proc.close()
    alarm._epoll.close()


def test_nothing_interrupts_a_look_at_what_a_dead_leader_left(page: SessionPage) -> None:
    alarm = Alarm()
    proc = Alarming(alarm, 10**9)
    observer = Observer(proc, alarm)
    look_at = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(observer, session(page))
    os.write(proc.writer, b"x")
    with child() as pid, executed(**STAMPED) as program:
        assert observer.is_interrupted()
        snapshot = look(observer, look_at, hold=True)
        assert found(snapshot, pid).pages == {session(page).id}
        assert found(snapshot, program).lineage == (OTHER_ID,)
    observer.release()
    proc.close()
    alarm._epoll.close()


def test_an_observer_without_an_alarm_is_never_interrupted(observer: Observer) -> None:
    assert not observer.is_interrupted()


# -- parents that are somebody else -----------------------------------------------------------------


class Changing(Mine):
    """A /proc in which one pid is given to another process, or to none, after it was read once."""

    def __init__(self, pid: int, then: Callable[[Stat], Stat]) -> None:
        super().__init__()
        self.pid = pid
        self.then = then

    def stat(self, pid: int) -> Stat:
        told = super().stat(pid)
        return self.then(told) if pid == self.pid and self.stats[pid] > 1 else told


def test_a_child_of_a_pid_that_was_given_away_in_the_middle_of_a_look_has_no_parent() -> None:
    def given_away(told: Stat) -> Stat:
        return told._replace(id=ProcessId(told.id.pid, told.id.start_ticks + 1))

    def gone(told: Stat) -> Stat:
        raise ProcessGone

    with child() as pid:
        for then, ppid in ((given_away, 0), (gone, ME), (lambda told: told, ME)):
            observer = Observer(Changing(ME, then))
            snapshot = look(observer, dead_session(), hold=True, everyone=True)
            assert found(snapshot, pid).ppid == ppid
            observer.release()


def test_a_child_of_a_pid_that_was_given_away_within_a_tick_has_no_parent() -> None:
    class Reused(Mine):
        """A /proc in which one process ends after it was read once, and another gets its pid in the same tick."""

        told: Stat | None = None
        pid = 0

        def stat(self, pid: int) -> Stat:
            if pid != self.pid:
                return super().stat(pid)
            if self.told is None:
                self.told = super().stat(pid)
            else:
                end(pid)
            return self.told

    proc = Reused()
    observer = Observer(proc)
    with child_of_child() as (pid, grandchild):
        proc.pid = pid
        snapshot = look(observer, dead_session(), hold=True, everyone=True)
        assert found(snapshot, grandchild).ppid == 0
    observer.release()


# -- pidfds -----------------------------------------------------------------------------------------


def test_a_look_at_a_dead_leaders_survivors_holds_a_pidfd_of_each_until_it_is_claimed_or_released(
    observer: Observer,
) -> None:
    with child() as pid:
        before = count_descriptors()
        snapshot = look(observer, dead_session(), hold=True, everyone=True)
        assert count_descriptors() == before + len(snapshot.processes)
        handle = observer.claim(id_of(pid))
        assert handle is not None
        assert observer.claim(id_of(pid)) is None
        observer.release()
        assert count_descriptors() == before + 1
        assert observer.claim(id_of(ME)) is None
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(handle)


def test_looking_twice_holds_no_more_pidfds_than_looking_once(observer: Observer) -> None:
    with child() as pid:
        member = [id_of(pid)]
        look(observer, dead_session(), hold=True, members=member, again=member, everyone=True)
        assert pidfds_of(pid) == 1
        look(observer, dead_session(), hold=True, members=member, again=member)
        look(observer, dead_session(), hold=True, members=member, again=member, everyone=True)
        assert pidfds_of(pid) == 1


def test_no_more_pidfds_are_held_than_a_quarter_of_what_is_allowed() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    allowed = lowest_free + 4
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, limits[1]))
    try:
        observer = Observer(Mine())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with contextlib.ExitStack() as stack:
        children = {stack.enter_context(child()) for _ in range(allowed // 4 + 2)}
        before = count_descriptors()
        assert children <= look(observer, dead_session(), hold=True, everyone=True).processes.keys()
        assert count_descriptors() == before + allowed // 4
        observer.release()


def test_a_look_at_the_living_holds_no_pidfd(observer: Observer) -> None:
    before = count_descriptors()
    observer.look([session()], hold=False, again=[id_of(ME)])
    observer.look_below(session())
    assert count_descriptors() == before
    assert observer.claim(id_of(ME)) is None


def test_whoever_is_passed_over_leaves_no_pidfd() -> None:
    before = count_descriptors()
    for nobody in (dead_session(leader=ProcessId(ME, 10**12)), dead_session(uid=2**32 - 5)):
        assert not look(Observer(Mine()), nobody, hold=True, everyone=True).processes
    assert count_descriptors() == before


# -- who a leader is --------------------------------------------------------------------------------


def test_ancestors_are_all_who_stand_above_but_init(observer: Observer) -> None:
    with child() as pid:
        above = observer.ancestors(pid)
        assert id_of(ME) in above
        assert {one.pid for one in above} - {ME} == {one.pid for one in observer.ancestors(ME)}
        assert not {one.pid for one in above} & {0, 1, pid}
    assert observer.ancestors(pid) == frozenset()
    assert observer.ancestors(1) == frozenset()


def test_a_leader_is_told_only_while_it_is_who_it_was(observer: Observer) -> None:
    with child() as pid:
        one = session(leader=id_of(pid))
        leader = observer.leader(one)
        assert leader is not None
        assert leader.id == id_of(pid)
        assert observer.leader(session(id="other", leader=ProcessId(pid, id_of(pid).start_ticks - 1))) is None
        die(pid)
        assert observer.leader(one) is None
    assert observer.leader(one) is None


@pytest.mark.needs_root
def test_a_leader_that_became_another_user_is_none_though_that_user_has_sessions_too(
    observer: Observer,
) -> None:
    observer.cover(session(uid=NOBODY, leader=ProcessId(1, 0)))
    with cued(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as (pid, change):
        one = session(leader=id_of(pid))
        assert observer.leader(one)
        change()
        assert observer.leader(one) is None


def test_what_is_asked_of_a_leader_is_true_of_this_process(observer: Observer) -> None:
    assert observer.owner(ME) == (UID, os.getgid())
    assert observer.namespaced_pid(ME) == ME
    assert observer.cgroup_path(ME) == wire.parse_cgroup(Path("/proc/self/cgroup").read_text())
    counter = observer.oom_counter(ME)
    assert (observer.oom_kills_in(session(oom_counter=counter)) is None) == (counter == "")
    assert observer.oom_kills_in(session()) is None


def test_a_leader_is_taken_down_with_all_that_only_a_living_one_tells(observer: Observer) -> None:
    with child() as pid:
        told = observer.describe_leader(session(leader=id_of(pid)))
        assert told.cgroup == observer.cgroup_path(pid)
        assert told.adopters == observer.ancestors(pid)
        assert told.namespaces == ProcFS().namespaces(pid)
        assert told.oom_counter == observer.oom_counter(pid)
    with pytest.raises(ProcessGone):
        observer.describe_leader(session(leader=ProcessId(pid, 1)))


def test_the_command_line_of_a_process_is_told_while_it_is_who_it_was(observer: Observer) -> None:
    with child() as pid, executed() as program:
        ids = [id_of(pid), id_of(program), ProcessId(ME, 1)]
        assert observer.cmdlines(ids) == {pid: list(ProcFS().argv(ME, ME)), program: ["cat"]}
    assert observer.cmdlines(ids) == {}


def test_what_processes_have_mapped_of_shared_memory_is_told_of_the_living(observer: Observer) -> None:
    path = Path(f"/dev/shm/reaper-test-{ME}")

    def map_it() -> None:
        with open(path, "r+b") as file:
            map_it.held = mmap_of(file.fileno())  # type: ignore[attr-defined]

    path.write_bytes(b"x" * 4096)
    try:
        with child(map_it) as pid, child() as other:
            ids = [id_of(pid), id_of(other)]
            assert observer.shm_mapped(ids) == [str(path)]
            assert observer.shm_mapped([ProcessId(pid, 1)]) == []
        assert observer.shm_mapped(ids) == []
    finally:
        path.unlink()


def mmap_of(descriptor: int) -> object:
    import mmap

    return mmap.mmap(descriptor, 4096)


def test_a_process_is_alive_while_it_is_who_it_was_and_condemned_once_it_is_on_its_way_out(
    observer: Observer,
) -> None:
    with child() as pid:
        one = id_of(pid)
        assert observer.is_alive(one)
        assert not observer.is_alive(ProcessId(pid, one.start_ticks + 1))
        assert not observer.is_condemned(pid)
        die(pid)
        assert not observer.is_alive(one)
        assert observer.is_condemned(pid)
    assert not observer.is_alive(one)
    assert observer.is_condemned(pid)


def test_start_times_are_compared_within_a_time_namespace(observer: Observer) -> None:
    me = id_of(ME)
    assert observer.same_ticks(me, me.start_ticks)
    assert not observer.same_ticks(me, me.start_ticks + 1)


def test_a_session_shares_our_namespaces_only_where_both_are_the_same(observer: Observer) -> None:
    ours = ProcFS().namespaces(ME)
    assert observer.shares_our_namespaces(session(namespaces=ours))
    assert not observer.shares_our_namespaces(session(namespaces=ours._replace(mnt="mnt:[1]")))
    assert not observer.shares_our_namespaces(session(namespaces=ours._replace(pid="pid:[1]")))
    assert not observer.shares_our_namespaces(session())


def test_a_holder_is_an_orphan_only_of_a_leader_that_is_dead_and_was_there_before_it(
    observer: Observer,
) -> None:
    with child() as pid, child() as other:
        holder, leader = id_of(other), id_of(pid)
        assert not observer.could_be_orphan(holder, leader)
        assert observer.could_be_orphan(holder, ProcessId(pid, leader.start_ticks - 1))
        assert not observer.could_be_orphan(holder, ProcessId(pid, holder.start_ticks + 1))
        die(pid)
        assert observer.could_be_orphan(holder, leader)
        os.waitpid(pid, 0)
        assert observer.could_be_orphan(holder, leader)


# -- figures ----------------------------------------------------------------------------------------


def test_the_usage_of_a_busy_process_is_told_in_percent_of_a_core(observer: Observer) -> None:
    one = Process(id_of(ME), 1, UID, cpu_ticks=0, rss_bytes=4096)
    assert observer.usage(one).rss_bytes == 4096
    assert observer.usage(one).cpu_percent == 0
    age_ticks = time.clock_gettime(time.CLOCK_BOOTTIME) * 100 - one.id.start_ticks
    assert observer.usage(one._replace(cpu_ticks=int(age_ticks))).cpu_percent == pytest.approx(100, rel=0.2)


def test_the_usage_since_the_last_scan_counts_no_earlier_work(observer: Observer) -> None:
    one = Process(ProcessId(ME, 1), 1, UID, cpu_ticks=100)  # started with the machine
    observer.note_usage([one])
    assert observer._cpu[one.id][1] == 100
    observer.note_usage([one._replace(cpu_ticks=900)])
    assert observer._cpu[one.id][1] == 100, "the last scan is too young to measure by"
    observer.note_usage([])
    assert observer._cpu == {}
