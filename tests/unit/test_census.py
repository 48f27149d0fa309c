"""Snapshots of real processes: who is in them, who is read again and when, and which pidfds were opened."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
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
from reaperd import census as census_module
from reaperd import kinship, known
from reaperd.census import _MAX_RELISTS, Census, Interrupted
from reaperd.linux import pidfd
from reaperd.linux.alarm import Alarm
from reaperd.linux.cgroups import CGroups
from reaperd.linux.procfs import ProcessGone, ProcFS, Stat
from reaperd.model import ProcessId, Session, Snapshot
from reaperd.observer import Observer

STAMPED = {wire.LINEAGE_VARIABLE: OTHER_ID}
LONG_AGO_S = 60.0  # old enough to have become what it will be


def look(census: Census, one: Session, **facts: Any) -> Snapshot:
    return census.look([one], **{"hold": False, **facts})


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


@contextlib.contextmanager
def parent_of_stamped() -> Iterator[tuple[int, int]]:
    """Start a fork of this process that has started a stamped program; yield the pids of both."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with executed(**STAMPED) as started:
            os.write(writer, b"%d\n" % started)
            signal.pause()
        os._exit(1)
    os.close(writer)
    with open(reader, "rb") as file:
        program = int(file.readline())
    try:
        yield pid, program
    finally:
        os.kill(program, signal.SIGKILL)
        end(pid)


def test_the_living_leader_is_in_its_own_snapshot_and_a_dead_child_is_not(census: Census) -> None:
    with child() as pid:
        die(pid)
        snapshot = look(census, session())
        assert found(snapshot, ME).id == id_of(ME)
        assert seen(snapshot, pid) is None


def test_whoever_dies_between_two_looks_is_no_longer_in_the_snapshot(census: Census) -> None:
    with child() as pid, child() as zombie:
        assert {pid, zombie} <= look(census, session()).processes.keys()
        end(pid)
        die(zombie)
        snapshot = look(census, session())
        assert seen(snapshot, pid) is None
        assert seen(snapshot, zombie) is None


def test_whoever_dies_while_it_is_looked_at_is_not_in_the_snapshot() -> None:
    class Dying(Mine):
        """A /proc in which everybody but this process is a zombie already, and can still be read."""

        def stat(self, pid: int) -> Stat:
            told = super().stat(pid)
            return told if pid == ME else told._replace(state="Z", threads=1)

    census = Observer(Dying()).census
    with child() as pid:
        for hold in (False, True):
            assert seen(look(census, session(), hold=hold, everyone=True), pid) is None
    census.handles.release()


def test_whoever_started_before_the_leader_is_not_in_the_snapshot() -> None:
    with child() as pid:
        started = id_of(pid).start_ticks
        assert seen(look(Observer(Mine()).census, session(leader=ProcessId(ME, started))), pid)
        later = look(Observer(Mine()).census, session(leader=ProcessId(ME, started + 1)))
        assert seen(later, pid) is None
        assert seen(later, ME) is None


@pytest.mark.needs_root
def test_whoever_is_of_another_or_of_mixed_uid_is_not_in_the_snapshot(census: Census) -> None:
    for ids in ((NOBODY, NOBODY, NOBODY), (NOBODY, UID, UID), (UID, NOBODY, UID), (UID, UID, NOBODY)):
        with child(lambda ids=ids: os.setresuid(*ids)) as pid:
            assert seen(look(census, session()), pid) is None, ids
    with child(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as pid:
        assert found(look(census, session(uid=NOBODY)), pid).uid == NOBODY


@pytest.mark.needs_root
def test_the_sessions_of_one_user_say_nothing_of_the_age_of_another_users_processes() -> None:
    with child(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as pid:
        ticks = id_of(pid).start_ticks
        theirs = session(uid=NOBODY, leader=ProcessId(pid, ticks + 1))
        snapshot = Observer(Mine()).census.look([session(), theirs], hold=False)
        assert seen(snapshot, pid) is None
        assert seen(snapshot, ME)


def test_one_look_serves_several_sessions_and_none_costs_nothing(page: SessionPage) -> None:
    with child() as pid:
        later = session(leader=ProcessId(ME, id_of(pid).start_ticks + 10**6))
        both = Observer(Mine()).census.look([session(page), later], hold=False)
        assert found(both, pid).pages == {session(page).id}
        for sessions in ([later], [], [session(uid=UID + 1)]):
            proc = Mine()
            census = Observer(proc).census
            assert not census.look(sessions, hold=False).processes
            assert not proc.reads


@pytest.mark.parametrize("everyone", [False, True])
def test_who_was_read_before_a_page_was_known_is_read_again_for_it(
    page: SessionPage, census: Census, everyone: bool
) -> None:
    with child() as pid:
        assert not found(look(census, session()), pid).pages
        theirs = session(page)
        snapshot = look(census, theirs, hold=True, members=[theirs.leader], everyone=everyone)
        assert found(snapshot, pid).pages == {theirs.id}
    census.handles.release()


def test_a_session_that_is_over_has_nobody_read_on_its_account(page: SessionPage) -> None:
    proc = Mine()
    observer = Observer(proc)
    census = observer.census
    with child():
        look(census, session(page))
        census.uncover(session(page).key)
        census.uncover(session(page).key)
        proc.reads.clear()
        with child() as new:
            snapshot = census.look([], hold=False)
        assert new not in proc.reads
        assert not snapshot.processes
        assert observer.marks.pages.session_of(session(page).page_inode, UID) is None


def test_of_two_sessions_of_a_user_the_one_that_goes_on_is_looked_for_still(page: SessionPage) -> None:
    census = Observer(Mine()).census
    with child() as pid:
        one, other = session(page), session()
        census.look([one, other], hold=False)
        census.uncover(other.key)
        assert found(look(census, one), pid).pages == {one.id}


def test_what_stands_below_a_leader_is_found_down_to_the_last(census: Census) -> None:
    with child_of_child() as (pid, grandchild):
        snapshot = census.look_below(session())
        assert {ME, pid, grandchild} <= snapshot.processes.keys()
        assert found(snapshot, grandchild).ppid == pid
        assert set(kinship.descendants(ProcFS(), id_of(pid))) == {grandchild}
        assert set(census.look_below(session(leader=id_of(pid))).processes) == {pid, grandchild}
        assert not census.look_below(session(leader=id_of(grandchild))).processes, "it has started nobody"
        other = session(leader=ProcessId(grandchild, 0), kept=frozenset((id_of(pid),)))
        assert set(census.look_below(other).processes) == {pid, grandchild}


def test_what_stands_below_a_leader_is_told_with_all_its_marks(census: Census, page: SessionPage) -> None:
    with child() as pid, executed(**STAMPED) as program:
        snapshot = census.look_below(session(page))
        assert found(snapshot, pid).pages == {session(page).id}
        assert found(snapshot, program).lineage == (OTHER_ID,)


# -- who is read again ------------------------------------------------------------------------------


def test_a_settled_process_is_not_read_again_until_another_program_runs_in_it() -> None:
    proc = Mine(older_s=LONG_AGO_S)
    census, one = Observer(proc).census, aged(proc)
    with changing(**STAMPED) as (pid, execute):
        look(census, one)
        proc.reads.clear()
        for facts in ({}, {"again": [proc.stat(pid).id]}, {"hold": True, "everyone": True}):
            assert found(look(census, one, **facts), pid).lineage == ()
        assert proc.reads[pid] == 0
        execute()
        snapshot = look(census, one, hold=True, everyone=True)
        assert proc.reads[pid] == 1
        assert (found(snapshot, pid).lineage, found(snapshot, pid).comm) == ((OTHER_ID,), "cat")
        look(census, one, hold=True, everyone=True)
        assert proc.reads[pid] == 1
    census.handles.release()


def test_what_changes_of_a_settled_process_without_another_program_is_told_of_it() -> None:
    proc = Mine(older_s=LONG_AGO_S)
    census, one = Observer(proc).census, aged(proc)
    with child_of_child() as (pid, grandchild):
        assert found(look(census, one), grandchild).ppid == pid
        proc.reads.clear()
        end(pid)
        snapshot = look(census, one, again=[proc.stat(grandchild).id])
        assert found(snapshot, grandchild).ppid == ProcFS().stat(grandchild).ppid != pid
        assert proc.reads[grandchild] == 0


def test_a_look_reads_nobody_twice() -> None:
    proc = Mine()
    with child() as pid:
        look(Observer(proc).census, session())
        assert proc.reads[pid] == 1


def test_who_became_another_program_unseen_is_found_in_turn() -> None:
    proc = Mine(older_s=LONG_AGO_S)
    census, one = Observer(proc).census, aged(proc)
    with changing(**STAMPED) as (pid, execute):
        look(census, one)
        execute()
        deadline_s = time.monotonic() + SOON_S
        while found(look(census, one), pid).lineage != (OTHER_ID,):
            assert time.monotonic() < deadline_s


def test_a_young_process_is_read_again_at_the_next_look_for_it_may_become_another_program() -> None:
    proc = Mine(slow_s=0.003)
    census, one = Observer(proc).census, session()
    with changing(**STAMPED) as (pid, execute):
        look(census, one)
        execute()
        assert found(look(census, one), pid).lineage == (OTHER_ID,)


def test_a_young_process_that_is_still_the_same_program_is_looked_at_and_not_read_in_full() -> None:
    proc = Mine()
    census = Observer(proc).census
    with child() as pid:
        look(census, session())
        proc.stats.clear()
        proc.reads.clear()
        look(census, session())
        assert proc.stats[pid] > 0
        assert proc.reads[pid] == 0


@pytest.mark.needs_root
def test_a_young_process_that_becomes_another_users_is_nobodys_of_ours() -> None:
    proc = Mine(slow_s=0.003)
    census = Observer(proc).census
    with cued(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as (pid, change):
        assert found(look(census, session()), pid).uid == UID
        change()
        assert seen(look(census, session()), pid) is None


@pytest.mark.needs_root
def test_a_young_process_that_becomes_a_covered_users_is_found() -> None:
    proc = Mine(slow_s=0.003)
    census = Observer(proc).census
    with cued(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as (pid, change):
        theirs = session(uid=NOBODY, leader=ProcessId(1, 0))
        assert seen(look(census, theirs), pid) is None
        change()
        assert found(look(census, theirs), pid).uid == NOBODY


@pytest.mark.needs_root
def test_a_settled_member_that_became_another_users_is_no_member_where_it_is_to_be_signalled() -> None:
    proc = Mine(older_s=LONG_AGO_S)
    census, one = Observer(proc).census, aged(proc)
    with cued(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as (pid, change):
        look(census, one)
        change()
        snapshot = look(census, one, hold=True, again=[proc.stat(pid).id])
        assert seen(snapshot, pid) is None
        assert census.handles.claim(proc.stat(pid).id) is None
    census.handles.release()


def test_a_member_that_is_to_be_signalled_is_read_again_though_it_is_the_same_program(
    page: SessionPage,
) -> None:
    proc = Mine(older_s=LONG_AGO_S)
    census, one = Observer(proc).census, aged(proc)
    one = session(page)._replace(leader=one.leader)
    with cued(page.close) as (pid, close):
        member = proc.stat(pid).id
        assert found(look(census, one), pid).pages == {one.id}
        close()
        taken_as_read = look(census, one, hold=True)
        assert found(taken_as_read, pid).pages == {one.id}
        assert pid in taken_as_read.stale
        read = look(census, one, hold=True, again=[member])
        assert found(read, pid).pages == frozenset()
        assert pid not in read.stale
        assert pidfds_of(pid) == 1
    census.handles.release()


def test_a_member_that_is_told_with_another_start_time_is_somebody_else_and_not_read() -> None:
    proc = Mine(older_s=LONG_AGO_S)
    census, one = Observer(proc).census, aged(proc)
    with child() as pid:
        look(census, one)
        proc.reads.clear()
        id_ = proc.stat(pid).id
        snapshot = look(census, one, hold=True, again=[ProcessId(pid, id_.start_ticks + 1)])
        assert proc.reads[pid] == 0
        assert pid in snapshot.stale


def test_who_is_gone_is_forgotten(census: Census) -> None:
    with child() as pid:
        look(census, session())
        assert pid in census.known.pids()
    look(census, session())
    for remembered in (census.known.pids(), census.known.unsettled, census.known.processes):
        assert pid not in remembered


def test_a_pid_with_another_inode_is_another_process() -> None:
    proc = Mine(older_s=LONG_AGO_S)
    census, one = Observer(proc).census, aged(proc)
    with child() as pid:
        look(census, one)
        proc.reads.clear()
        proc.inodes[pid] = 1
        snapshot = look(census, one)
        assert proc.reads[pid] > 0
        assert pid not in snapshot.stale


def test_stale_are_those_who_were_not_read_for_this_look() -> None:
    proc = Mine(older_s=LONG_AGO_S, slow_s=0.003)
    census, one = Observer(proc).census, aged(proc)
    with child() as pid, child() as other:
        first = look(census, one)
        assert first.stale == frozenset()
        with child() as new:
            second = look(census, one, again=[proc.stat(other).id])
            assert pid in second.stale
            assert second.stale.isdisjoint((other, new))
            assert second.stale <= second.processes.keys()


def test_whom_the_image_alone_tells_is_stale_where_somebody_is_to_be_signalled() -> None:
    proc = Mine()
    census = Observer(proc).census
    with child() as pid:
        look(census, session())
        snapshot = look(census, session(), hold=True, everyone=True)
        assert pid in snapshot.stale
        assert pidfds_of(pid) == 0
        again = look(census, session(), hold=True, everyone=True, again=[id_of(pid)])
        assert pid not in again.stale
        assert pidfds_of(pid) == 1
    census.handles.release()


def test_where_a_process_does_not_tell_which_program_it_runs_it_is_read_anew() -> None:
    class Reserved(Mine):
        """A /proc that does not say where code and stack of a process are."""

        def stat(self, pid: int) -> Stat:
            return super().stat(pid)._replace(image=0)

    proc = Reserved(older_s=LONG_AGO_S)
    census, one = Observer(proc).census, aged(proc)
    with child() as pid:
        look(census, one)
        look(census, one, hold=True, everyone=True)
        assert proc.reads[pid] >= 2
    census.handles.release()


def test_who_was_passed_over_is_read_when_an_older_session_comes() -> None:
    proc = Mine(older_s=LONG_AGO_S, slow_s=0.003)
    census = Observer(proc).census
    with executed(**STAMPED) as pid:
        young = proc.stat(pid).id.start_ticks + 1
        assert seen(look(census, session(id="late", leader=ProcessId(ME, young))), pid) is None
        assert pid not in proc.reads
        assert found(look(census, aged(proc)), pid).lineage == (OTHER_ID,)


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
    census = Observer(proc).census
    one = dead_session(adopters=frozenset((id_of(ME),)))
    look(census, session())
    with child() as pid:
        proc.at, proc.late = pid, late
        assert look(census, one, hold=True, members=[]).vanished == {UID}
    with child():
        assert not look(census, one, hold=True).vanished
    census.handles.release()


def test_who_was_left_by_a_parent_that_ended_while_all_were_asked_for_theirs_is_read(
    census: Census, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_pid = pidfd.open_pid

    def open_living(pid: int) -> int:
        if pid == gone:
            raise ProcessGone
        return open_pid(pid)

    one = dead_session()
    look(census, session())
    with child_of_child() as (gone, grandchild):
        assert seen(look(census, one, hold=True), grandchild) is None
        monkeypatch.setattr(pidfd, "open_pid", open_living)
        assert seen(look(census, one, hold=True), grandchild)
        monkeypatch.undo()
    census.handles.release()


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
    census, one = Observer(proc).census, aged(proc)
    with executed(**STAMPED) as pid:
        proc.refusing = {pid}
        first = look(census, one)
        assert found(first, pid).lineage == (), "it is there all the same"
        assert set(first.unread.values()) == {UID}
        proc.refusing = set()
        second = look(census, one)
        assert found(second, pid).lineage == (OTHER_ID,)
        assert not second.unread


def test_who_lets_nobody_read_any_more_has_the_marks_that_the_same_program_had() -> None:
    proc = Moody(older_s=LONG_AGO_S)
    census, one = Observer(proc).census, aged(proc)
    with executed(**STAMPED) as pid, executed(**STAMPED) as other:
        look(census, one)
        proc.refusing = {pid}
        for _ in range(2):
            snapshot = look(census, one, hold=True, again=[proc.stat(pid).id, proc.stat(other).id])
            assert found(snapshot, pid).lineage == (OTHER_ID,)
            assert found(snapshot, pid).argv == ("cat",)
            assert not snapshot.unread
            assert pid not in snapshot.stale
    census.handles.release()


def test_who_lets_nobody_read_any_more_has_no_marks_of_the_program_that_it_was() -> None:
    proc = Moody(older_s=LONG_AGO_S)
    census, one = Observer(proc).census, aged(proc)
    with executed(**STAMPED) as stamped, changing(**STAMPED) as (pid, execute):
        look(census, one)
        before = found(look(census, one), stamped)
        execute()
        proc.refusing = {pid}
        snapshot = look(census, one, hold=True, again=[proc.stat(pid).id])
        assert (found(snapshot, pid).lineage, found(snapshot, pid).forked) == ((), False)
        assert set(snapshot.unread.values()) == {UID}
        assert before.lineage == (OTHER_ID,)
    census.handles.release()


def test_a_spared_process_that_lets_nobody_read_any_more_is_spared_still(page: SessionPage) -> None:
    proc = Moody(older_s=LONG_AGO_S)
    census, one = Observer(proc).census, aged(proc)
    with executed(**{wire.SPARED_VARIABLE: OTHER_ID}) as pid:
        look(census, one)
        proc.refusing = {pid}
        snapshot = look(census, one, hold=True, again=[proc.stat(pid).id])
        assert found(snapshot, pid).spared == {OTHER_ID}
    census.handles.release()


def test_a_look_that_ran_out_of_descriptors_leaves_nothing_that_trips_the_next_one(page: SessionPage) -> None:
    class Scarce(Mine):
        """A /proc in which descriptors run out at one process."""

        at = 0

        def cgroup(self, pid: int) -> str:
            if pid == self.at:
                raise OSError(24, "Too many open files")
            return super().cgroup(pid)

    proc = Scarce()
    census = Observer(proc).census
    with child(), child_of_child() as (pid, grandchild), child():
        proc.at = pid
        with pytest.raises(OSError, match="Too many"):
            look(census, session(page))
        proc.at = 0
        assert set(census.look_below(session(page, leader=id_of(pid))).processes) == {pid, grandchild}
        assert found(look(census, session(page)), pid).pages == {session(page).id}


# -- a look that nobody is to wait for --------------------------------------------------------------


def test_a_look_with_pidfds_reads_who_was_left_to_those_who_adopt_and_leaves_others_for_later(
    census: Census, page: SessionPage
) -> None:
    mine = frozenset((id_of(ME),))
    look(census, session(page))
    with child() as pid:
        snapshot = look(census, dead_session(page), hold=True)
        assert seen(snapshot, pid) is None
        assert pidfds_of(pid) == 0
        snapshot = look(census, dead_session(page, adopters=mine), hold=True)
        assert found(snapshot, pid).pages == {session(page).id}
        assert snapshot.adopters == mine
        handle = census.handles.claim(id_of(pid))
        assert handle is not None
        os.close(handle)
    with child() as pid:
        for later in ({"hold": True, "everyone": True}, {"hold": False}):
            assert found(look(census, dead_session(page), **later), pid).pages == {session(page).id}


def test_a_look_with_pidfds_reads_the_new_children_of_members(census: Census) -> None:
    with forking() as (pid, fork):
        look(census, session())
        grandchild = fork()
        assert seen(look(census, dead_session(), hold=True), grandchild) is None
        snapshot = look(census, dead_session(), hold=True, members=[id_of(pid)])
        assert found(snapshot, grandchild).ppid == pid
        assert grandchild not in snapshot.stale


def test_a_look_with_pidfds_reads_the_new_children_of_whoever_is_read_again(census: Census) -> None:
    with forking() as (parent, fork_now):
        look(census, session())
        grandchild = fork_now()
        assert seen(look(census, dead_session(), hold=True), grandchild) is None
        snapshot = look(census, dead_session(), hold=True, again=[id_of(parent)])
        assert found(snapshot, grandchild).ppid == parent


def test_a_look_with_pidfds_follows_those_who_are_new_down_to_the_last(census: Census) -> None:
    look(census, session())
    with child_of_child() as (pid, grandchild):
        snapshot = look(census, dead_session(adopters=frozenset((id_of(ME),))), hold=True)
        assert {pid, grandchild} <= snapshot.processes.keys()


@pytest.mark.parametrize(
    "facts",
    [{"hold": True}, {"hold": True, "everyone": True}, {"hold": False}],
    ids=["quick", "all", "living"],
)
def test_who_adopts_counts_though_it_was_never_looked_at_before(
    census: Census, facts: dict[str, bool]
) -> None:
    look(census, session())
    with child_of_child() as (pid, grandchild):
        adopters = frozenset((id_of(pid),))
        snapshot = look(census, dead_session(adopters=adopters), **facts)
        assert snapshot.adopters == adopters
        assert seen(snapshot, grandchild)


@pytest.mark.needs_root
def test_one_of_another_user_adopts_too(census: Census) -> None:
    theirs = session(uid=NOBODY, leader=ProcessId(1, 0))
    look(census, theirs)
    with child() as pid:
        adopters = frozenset((id_of(pid),))
        assert look(census, theirs._replace(adopters=adopters), hold=True).adopters == adopters


def test_a_member_counts_though_it_was_never_looked_at_before(census: Census) -> None:
    look(census, session())
    with child_of_child() as (pid, grandchild):
        members = [id_of(pid)]
        snapshot = look(census, dead_session(), hold=True, members=members, again=members)
        assert {pid, grandchild} <= snapshot.processes.keys()


@pytest.mark.needs_root
def test_a_look_with_pidfds_reads_nobody_of_another_user(page: SessionPage) -> None:
    proc = Mine()
    census = Observer(proc).census
    look(census, session(page))
    census.cover(session(uid=NOBODY, leader=ProcessId(1, 0)))
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    with child(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as pid, child() as mine:
        snapshot = look(census, one, hold=True)
        assert proc.reads[pid] == 0
        assert seen(snapshot, mine)
    census.handles.release()


def test_an_adopter_whose_pid_is_another_process_now_is_none(census: Census, page: SessionPage) -> None:
    with child() as pid:
        other = frozenset((ProcessId(ME, id_of(ME).start_ticks + 1),))
        look(census, session())
        for facts in ({"hold": True}, {"hold": True, "everyone": True}, {"hold": False}):
            assert look(census, dead_session(page, adopters=other), **facts).adopters == frozenset()
    with child() as pid:
        assert seen(look(census, dead_session(page, adopters=other), hold=True), pid) is None


def test_an_adopter_that_has_died_is_none(census: Census) -> None:
    with child() as pid:
        adopters = frozenset((id_of(pid),))
        look(census, session())
        assert look(census, session(adopters=adopters)).adopters == adopters
        end(pid)
        assert look(census, session(adopters=adopters)).adopters == frozenset()


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
    census = Observer(proc).census
    with forking() as (pid, fork):
        look(census, session())
        proc.fork, proc.at = fork, pid
        members = [id_of(pid)]
        snapshot = look(census, dead_session(), hold=True, members=members, again=members)
        assert seen(snapshot, proc.grandchild)
        assert pidfds_of(proc.grandchild) == 1
    census.handles.release()


def test_a_look_ends_though_somebody_forks_without_end() -> None:
    class Breeding(Mine):
        """A /proc in which somebody has forked whenever it is asked who has."""

        breeding = False
        asked = 0

        def last_pid(self) -> int:
            if self.breeding:
                self.asked += 1
                assert self.asked < 60, "it looks for ever"
                stack.enter_context(child())
            return super().last_pid()

    proc = Breeding(slow_s=0.002)
    census = Observer(proc).census
    with contextlib.ExitStack() as stack:
        look(census, session())
        proc.breeding = True
        snapshot = look(census, dead_session(adopters=frozenset((id_of(ME),))), hold=True)
        assert len(snapshot.processes) > 1
        assert proc.asked > 1
        census.handles.release()


@pytest.mark.parametrize(("most", "listings"), [(known._MOST_STARTED, 1), (-1, 1 + _MAX_RELISTS)])
def test_who_has_started_meanwhile_is_told_by_the_ids_given_away_since_unless_those_are_too_many(
    monkeypatch: pytest.MonkeyPatch, most: int, listings: int
) -> None:
    """To list thousands of processes takes longer than some of them live."""
    monkeypatch.setattr(known, "_MOST_STARTED", most)

    class Counting(Mine):
        listings = 0
        looking = False

        def listing(self) -> dict[int, int]:
            self.listings += 1
            return super().listing()

        def cgroup(self, pid: int) -> str:
            if self.looking:
                born.append(stack.enter_context(child()))
            return super().cgroup(pid)

    proc = Counting(slow_s=0.002)
    census = Observer(proc).census
    born: list[int] = []
    with contextlib.ExitStack() as stack:
        look(census, session())
        stack.enter_context(child())
        proc.listings, proc.looking = 0, True
        snapshot = look(census, dead_session(adopters=frozenset((id_of(ME),))), hold=True)
        assert {born[0], born[1]} <= snapshot.processes.keys()
        assert proc.listings == listings
        census.handles.release()


@pytest.mark.parametrize("zombie", [False, True])
def test_who_started_and_ended_between_two_looks_leaves_open_whether_somebody_is_there(zombie: bool) -> None:
    """It may have handed on to a child that the listing came too early for."""

    class Gone(Mine):
        pid = 0

        def listing(self) -> dict[int, int]:
            return {**({self.pid: 1} if self.pid else {}), **super().listing()}

    proc = Gone()
    census = Observer(proc).census
    one = dead_session(adopters=frozenset((id_of(ME),)))
    look(census, session())
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | (os.WNOWAIT if zombie else 0))
    proc.pid = pid
    assert look(census, one, hold=True, members=[]).vanished == {UID}
    proc.pid = 0
    assert not look(census, one, hold=True, members=[]).vanished
    if zombie:
        os.waitpid(pid, 0)
    census.handles.release()


# -- the first look at what a leader left -----------------------------------------------------------


def test_a_hurried_look_leaves_those_to_the_next_whose_pages_do_not_tell_where_others_do(
    census: Census, page: SessionPage
) -> None:
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(census, session(page))
    with child() as forked, executed(**STAMPED) as program:
        first = look(census, one, hold=True, hurried=True)
        assert found(first, forked).pages == {one.id}
        assert seen(first, program) is None
        assert pidfds_of(program) == 0
        assert set(first.unread.values()) == {UID}, "they are to be looked at yet"
        second = look(census, one, hold=True)
        assert found(second, program).lineage == (OTHER_ID,)
        assert pidfds_of(program) == 1
        assert not second.unread


def test_a_hurried_look_reads_whoever_stands_below_one_that_is_to_be_signalled(page: SessionPage) -> None:
    census = Observer(Mine()).census
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(census, session(page))
    with contextlib.ExitStack() as stack:
        pid, program = stack.enter_context(parent_of_stamped())
        snapshot = look(census, one, hold=True, hurried=True)
        assert found(snapshot, pid).pages == {one.id}
        assert (found(snapshot, program).ppid, found(snapshot, program).lineage) == (pid, (OTHER_ID,))
        assert not snapshot.unread
        census.handles.release()


def test_a_hurried_look_reads_all_where_no_page_tells_of_anybody(census: Census) -> None:
    look(census, session())
    with executed(**STAMPED) as program:
        snapshot = look(census, dead_session(adopters=frozenset((id_of(ME),))), hold=True, hurried=True)
        assert found(snapshot, program).lineage == (OTHER_ID,)


def test_a_hurried_look_reads_the_members_that_it_was_told_of(census: Census, page: SessionPage) -> None:
    look(census, session(page))
    with child() as forked, executed(**STAMPED) as program:
        members = [id_of(program)]
        one = dead_session(page, adopters=frozenset((id_of(ME),)))
        snapshot = look(census, one, hold=True, hurried=True, members=members, again=members)
        assert found(snapshot, forked).pages == {one.id}
        assert found(snapshot, program).lineage == (OTHER_ID,)


def test_whoever_dies_in_the_middle_of_a_hurried_look_is_no_trouble(page: SessionPage) -> None:
    class Dying(Mine):
        """A /proc in which a process ends once all have been read, before it is asked who has started since."""

        armed = 0

        def last_pid(self) -> int:
            if self.armed == 1:
                end(self.pid)
            self.armed -= 1
            return super().last_pid()

        pid = 0

    proc = Dying(slow_s=0.002)
    census = Observer(proc).census
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(census, session(page))
    with child() as forked, changing(**STAMPED) as (pid, execute):
        execute()
        proc.pid, proc.armed = pid, 2
        snapshot = look(census, one, hold=True, hurried=True)
        assert proc.armed < 1
        assert found(snapshot, forked).pages == {one.id}
        assert pid not in {process.id.pid for process in snapshot.marked.get(OTHER_ID, ())}
    census.handles.release()


# -- ahead of that look -----------------------------------------------------------------------------


def ahead(census: Census, one: Session) -> list[Snapshot]:
    return list(census.look_ahead([one]))


def test_whom_a_page_tells_is_told_ahead_and_held_and_everybody_else_is_left_to_the_look(
    census: Census, page: SessionPage
) -> None:
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(census, session(page))
    with child() as forked, executed(**STAMPED) as program:
        (snapshot,) = ahead(census, one)
        assert snapshot.processes.keys() == {forked}
        assert found(snapshot, forked).pages == {one.id}
        assert (pidfds_of(forked), pidfds_of(program)) == (1, 0)
        handle = census.handles.claim(id_of(forked))
        assert handle is not None
        os.close(handle)
        then = look(census, one, hold=True, members=[id_of(forked)], again=[id_of(forked)])
        assert found(then, program).lineage == (OTHER_ID,)
        assert (pidfds_of(forked), pidfds_of(program)) == (1, 1)


def test_of_many_some_are_told_at_a_time_and_each_once(census: Census, page: SessionPage) -> None:
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(census, session(page))
    with contextlib.ExitStack() as stack:
        pids = {stack.enter_context(child()) for _ in range(80)}
        snapshots = ahead(census, one)
        assert {snapshot.adopters for snapshot in snapshots} == {one.adopters}
        told = [snapshot.processes.keys() for snapshot in snapshots]
        assert len(told) >= 2
        assert sum(map(len, told)) == len(pids)
        assert set().union(*told) == pids
        census.handles.release()


def test_nobody_is_told_ahead_of_whom_not_all_is_told_that_stands_below(
    census: Census, page: SessionPage
) -> None:
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(census, session(page))
    with contextlib.ExitStack() as stack:
        pid, program = stack.enter_context(parent_of_stamped())
        alone = stack.enter_context(child())
        (snapshot,) = ahead(census, one)
        assert snapshot.processes.keys() == {alone}
        assert (pidfds_of(pid), pidfds_of(program)) == (0, 0)
        then = look(census, one, hold=True)
        assert {pid, program} <= then.processes.keys() - then.stale
        census.handles.release()


def test_nobody_is_told_ahead_of_whom_a_child_was_read_before(census: Census, page: SessionPage) -> None:
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(census, session(page))
    with parent_of_stamped() as (pid, program), child() as alone:
        # As a scan that was interrupted before it came to the parent.
        census.known.list_all()
        census.known.read_each([program], hold=False)
        census.known.read_memory(None)
        (snapshot,) = ahead(census, one)
        assert snapshot.processes.keys() == {alone}
        assert pid in snapshot.unread
        then = look(census, one, hold=True)
        assert {pid, program} <= then.processes.keys()
        census.handles.release()


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
    census = Observer(proc).census
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(census, session(page))
    with forking() as (pid, fork):
        proc.fork, proc.at = fork, pid
        told = set().union(*(snapshot.processes.keys() for snapshot in ahead(census, one)))
        assert proc.grandchild
        assert pid not in told or proc.grandchild in told
    census.handles.release()


@pytest.mark.needs_root
def test_nobody_of_another_user_is_told_ahead(census: Census, page: SessionPage) -> None:
    one = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(census, session(page))
    census.cover(session(uid=NOBODY, leader=ProcessId(1, 0)))
    with child(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as pid, child() as mine:
        (snapshot,) = ahead(census, one)
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
    census = Observer(proc, alarm).census
    nobody = session(leader=ProcessId(ME, 10**12))
    with contextlib.ExitStack() as stack:
        pids = {stack.enter_context(child()) for _ in range(40)}
        assert not census.is_interrupted()
        with pytest.raises(Interrupted):
            look(census, nobody, **facts)
        assert census.is_interrupted()
        read = {pid for pid in pids if proc.stats[pid]}
        assert 10 <= len(read) <= 20
        proc.silence()
        look(census, nobody, hold=True, everyone=True)
        assert all(proc.stats[pid] for pid in pids)
        if facts["hold"]:  # else some are read in turn besides
            assert {proc.stats[pid] for pid in pids} == {1}
    proc.close()
    alarm._epoll.close()


@pytest.mark.parametrize("hold", [False, True])
def test_a_look_that_was_interrupted_has_put_no_half_read_process_on_record(
    page: SessionPage, hold: bool
) -> None:
    alarm = Alarm()
    proc = Alarming(alarm, 3)
    census = Observer(proc, alarm).census
    with child() as pid, executed(**STAMPED) as program:
        with pytest.raises(Interrupted):
            look(census, session(page))
        proc.silence()
        # What interrupted it reads whoever is new below members, and nobody else.
        snapshot = look(census, session(page), hold=hold, members=[id_of(ME)])
        census.handles.release()
        assert found(snapshot, pid).pages == {session(page).id}
        assert found(snapshot, program).lineage == (OTHER_ID,)
    proc.close()
    alarm._epoll.close()


def test_who_is_new_is_read_some_at_a_time_and_what_was_read_is_not_read_again(
    page: SessionPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census_module, "_AT_A_TIME_S", 0.0)
    monkeypatch.setattr(census_module, "_MANY", 4)
    proc = Mine()
    census = Observer(proc).census
    census.cover(session(page))
    with contextlib.ExitStack() as stack:
        pids = {stack.enter_context(child()) for _ in range(10)} | {stack.enter_context(executed(**STAMPED))}
        listing = proc.listing()
        assert pids <= listing.keys()
        for read in range(4, len(listing), 4):
            with pytest.raises(Interrupted):
                census.read_new(listing)
            assert read - 2 <= sum(bool(proc.stats[pid]) for pid in pids) <= read
        census.read_new(listing)
        before = {pid: proc.stats[pid] for pid in pids}
        assert all(before.values())
        census.read_new(listing)
        assert {pid: proc.stats[pid] for pid in pids} == before
        ours, theirs = (look(one, session(page)).processes for one in (census, Observer(proc).census))
        assert {pid: ours[pid] for pid in pids} == {pid: theirs[pid] for pid in pids}


def test_who_is_new_is_read_to_the_last_though_all_are_new_at_each_attempt(
    page: SessionPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census_module, "_AT_A_TIME_S", 1e-5)
    monkeypatch.setattr(census_module, "_MANY", 4)
    proc = Mine()
    census = Observer(proc).census
    census.cover(session(page))
    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(child()) for _ in range(12)]
        for attempt in range(40):
            proc.inodes = dict.fromkeys((*pids, ME, 1), attempt)
            try:
                census.read_new(proc.listing())
                break
            except Interrupted:
                continue
        assert 0 < attempt < 39


def test_a_leaders_death_interrupts_the_reading_of_who_is_new(page: SessionPage) -> None:
    alarm = Alarm()
    proc = Alarming(alarm, 10**9)
    census = Observer(proc, alarm).census
    os.write(proc.writer, b"x")
    with child() as pid:
        with pytest.raises(Interrupted):
            census.read_new(proc.listing())
        assert not proc.stats[pid]
    proc.close()
    alarm._epoll.close()


def test_a_look_at_everybody_is_interrupted_so_often_and_then_comes_to_its_end(page: SessionPage) -> None:
    alarm = Alarm()
    proc = Alarming(alarm, 10**9)
    census, one = Observer(proc, alarm).census, dead_session(page)
    os.write(proc.writer, b"x")
    with child() as pid:
        for _ in range(2):
            for _ in range(10):
                with pytest.raises(Interrupted):
                    look(census, one, hold=True, everyone=True)
                census.handles.release()
            assert found(look(census, one, hold=True, everyone=True), pid).pages == {session(page).id}
            census.handles.release()
    proc.close()
    alarm._epoll.close()


def test_nothing_interrupts_a_look_at_what_a_dead_leader_left(page: SessionPage) -> None:
    alarm = Alarm()
    proc = Alarming(alarm, 10**9)
    census = Observer(proc, alarm).census
    look_at = dead_session(page, adopters=frozenset((id_of(ME),)))
    look(census, session(page))
    os.write(proc.writer, b"x")
    with child() as pid, executed(**STAMPED) as program:
        assert census.is_interrupted()
        snapshot = look(census, look_at, hold=True)
        assert found(snapshot, pid).pages == {session(page).id}
        assert found(snapshot, program).lineage == (OTHER_ID,)
    census.handles.release()
    proc.close()
    alarm._epoll.close()


def test_a_census_without_an_alarm_is_never_interrupted(census: Census) -> None:
    assert not census.is_interrupted()


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
            census = Observer(Changing(ME, then)).census
            snapshot = look(census, dead_session(), hold=True, everyone=True)
            assert found(snapshot, pid).ppid == ppid
            census.handles.release()


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
    census = Observer(proc).census
    with child_of_child() as (pid, grandchild):
        proc.pid = pid
        snapshot = look(census, dead_session(), hold=True, everyone=True)
        assert found(snapshot, grandchild).ppid == 0
    census.handles.release()


# -- pidfds -----------------------------------------------------------------------------------------


def test_a_look_at_a_dead_leaders_survivors_holds_a_pidfd_of_each_until_it_is_claimed_or_released(
    census: Census,
) -> None:
    with child() as pid:
        before = count_descriptors()
        snapshot = look(census, dead_session(), hold=True, everyone=True)
        assert count_descriptors() == before + len(snapshot.processes)
        handle = census.handles.claim(id_of(pid))
        assert handle is not None
        assert census.handles.claim(id_of(pid)) is None
        census.handles.release()
        assert count_descriptors() == before + 1
        assert census.handles.claim(id_of(ME)) is None
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(handle)


def test_looking_twice_holds_no_more_pidfds_than_looking_once(census: Census) -> None:
    with child() as pid:
        member = [id_of(pid)]
        look(census, dead_session(), hold=True, members=member, again=member, everyone=True)
        assert pidfds_of(pid) == 1
        look(census, dead_session(), hold=True, members=member, again=member)
        look(census, dead_session(), hold=True, members=member, again=member, everyone=True)
        assert pidfds_of(pid) == 1


def test_no_more_pidfds_are_held_than_a_quarter_of_what_is_allowed() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    allowed = lowest_free + 4
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, limits[1]))
    try:
        census = Observer(Mine()).census
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with contextlib.ExitStack() as stack:
        children = {stack.enter_context(child()) for _ in range(allowed // 4 + 2)}
        before = count_descriptors()
        assert children <= look(census, dead_session(), hold=True, everyone=True).processes.keys()
        assert count_descriptors() == before + allowed // 4
        census.handles.release()


def test_a_look_at_the_living_holds_no_pidfd(census: Census) -> None:
    before = count_descriptors()
    census.look([session()], hold=False, again=[id_of(ME)])
    census.look_below(session())
    assert count_descriptors() == before
    assert census.handles.claim(id_of(ME)) is None


def test_whoever_is_passed_over_leaves_no_pidfd() -> None:
    before = count_descriptors()
    for nobody in (dead_session(leader=ProcessId(ME, 10**12)), dead_session(uid=2**32 - 5)):
        assert not look(Observer(Mine()).census, nobody, hold=True, everyone=True).processes
    assert count_descriptors() == before


# -- a leader --------------------------------------------------------------------------------------


def test_a_leader_is_told_only_while_it_is_who_it_was(census: Census) -> None:
    with child() as pid:
        one = session(leader=id_of(pid))
        leader = census.leader(one)
        assert leader is not None
        assert leader.id == id_of(pid)
        assert census.leader(session(id="other", leader=ProcessId(pid, id_of(pid).start_ticks - 1))) is None
        die(pid)
        assert census.leader(one) is None
    assert census.leader(one) is None


@pytest.mark.needs_root
def test_a_leader_that_became_another_user_is_none_though_that_user_has_sessions_too(
    census: Census,
) -> None:
    census.cover(session(uid=NOBODY, leader=ProcessId(1, 0)))
    with cued(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as (pid, change):
        one = session(leader=id_of(pid))
        assert census.leader(one)
        change()
        assert census.leader(one) is None


# -- a control group of the session's own -----------------------------------------------------------


class Groups(CGroups):
    """Control groups whose residents are told by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, set[int]] = {}
        self.asked: list[str] = []

    def residents(self, cgroup: str) -> set[int]:
        self.asked.append(cgroup)
        return self.told.get(cgroup, set())


def test_who_is_in_the_session_s_own_group_is_read_whoever_its_parent_is() -> None:
    proc, groups = ProcFS(), Groups()
    observer = Observer(proc)
    census = Census(proc, observer.marks, cgroups=groups)
    look(census, session())
    with executed() as pid:
        one = dead_session(scope="/s.scope")
        assert seen(look(census, one, hold=True), pid) is None, (
            "its parent is neither a member nor an adopter"
        )
        groups.told["/s.scope"] = {pid}
        snapshot = look(census, one, hold=True)
        assert found(snapshot, pid).id == id_of(pid)
        assert pid not in snapshot.stale
        assert census.handles.claim(id_of(pid)) is not None
        groups.asked.clear()
        look(census, one._replace(ending=True), hold=True)
        look(census, one._replace(scope=None), hold=True)
        assert groups.asked == []
        census.handles.release()
