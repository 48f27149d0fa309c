"""Snapshots of real processes: what each carries, who stands above and below it, and which pidfds were opened."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import wire
from agent.page import SessionPage, SparedMark
from reaperd.linux.procfs import ProcessGone, ProcFS, Stat
from reaperd.model import Cause, CauseKind, Process, ProcessId, Session, Snapshot
from reaperd.observer import Observer
from reaperd.sweep import FoundPage, StampedProcess, Sweep

ME, UID = os.getpid(), os.getuid()
NOBODY = 65534
SOON_S = 10.0  # a deadline, not a wait
KILLED = Cause(CauseKind.SIGNAL, 9)
OTHER_ID = "7-7-00000007-00000007"


@contextlib.contextmanager
def child(work: Callable[[], object] = lambda: None) -> Iterator[int]:
    """Run ``work`` in a forked child, which then waits to be killed; the block begins when the work is done."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.close(reader)
            work()
            os.write(writer, b"x")
            signal.pause()
        os._exit(1)
    os.close(writer)
    try:
        assert select.select([reader], [], [], SOON_S)[0]
        assert os.read(reader, 1) == b"x", "the child failed"
        yield pid
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


@contextlib.contextmanager
def child_of_child() -> Iterator[tuple[int, int]]:
    """Run a child that has a child."""
    reader, writer = os.pipe()

    def have_a_child() -> None:
        if pid := os.fork():
            os.write(writer, b"%d\n" % pid)
        else:
            os.close(writer)
            signal.pause()

    with child(have_a_child) as pid, open(reader, "rb") as file:
        os.close(writer)
        grandchild = int(file.readline())
        try:
            yield pid, grandchild
        finally:
            os.kill(grandchild, signal.SIGKILL)


@contextlib.contextmanager
def executed(**environment: str) -> Iterator[int]:
    """Run a program with exactly this environment."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x\n")  # what it says back, it says after execve(2) has set the environment
        process.stdin.flush()
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


@pytest.fixture
def observer() -> Iterator[Observer]:
    """Return an observer, and fail a test that leaves one of its descriptors open."""
    before = len(os.listdir("/proc/self/fd"))
    one = Observer(ProcFS())
    yield one
    one.release()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def page() -> Iterator[SessionPage]:
    ticks = ProcFS().stat(ME).id.start_ticks
    one = SessionPage(wire.format_session_id(ME, ticks, 11, 12), "grid", ticks, ProcFS().boot_id())
    one.write_record(["/run/reaper/reaper.sock"])
    yield one
    one.close()


def pidfds_of(pid: int) -> int:
    """Return how many pidfds of ``pid`` are open here."""
    found = 0
    for name in os.listdir("/proc/self/fdinfo"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found += f"\nPid:\t{pid}\n" in Path(f"/proc/self/fdinfo/{name}").read_text()
    return found


def id_of(pid: int) -> ProcessId:
    return ProcFS().stat(pid).id


def session(page: SessionPage | None = None, **facts: Any) -> Session:
    """Return a session that this process leads."""
    name = page._identity[0] if page is not None else "none"
    return replace(
        Session(name, "", UID, os.getgid(), id_of(ME), "", page_fd=page.fd if page is not None else -1),
        **facts,
    )


def dead_session(page: SessionPage | None = None, **facts: Any) -> Session:
    return session(page, cause=KILLED, **facts)


def seen(snapshot: Snapshot, pid: int) -> Process | None:
    return snapshot.processes.get(pid)


def found(snapshot: Snapshot, pid: int) -> Process:
    return snapshot.processes[pid]


# -- what a process carries -------------------------------------------------------------------------


def test_a_forked_child_is_seen_with_the_page_it_holds(observer: Observer, page: SessionPage) -> None:
    with child() as pid:
        one = found(observer.look(session(page)), pid)
        assert one.id == id_of(pid)
        assert (one.ppid, one.uid, one.forked, one.dead) == (ME, UID, True, False)
        assert one.pages == {session(page).id}
        assert one.argv == ()
        assert one.cgroup == wire.parse_cgroup(Path("/proc/self/cgroup").read_text())
        assert one.rss_bytes > 0
        assert one.comm == ProcFS().stat(ME).comm


def test_a_child_that_closed_all_its_descriptors_still_has_the_page_mapped(
    observer: Observer, page: SessionPage
) -> None:
    def close_all() -> None:
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if wire.PAGE_PREFIX in os.readlink(f"/proc/self/fd/{name}"):
                    os.close(int(name))  # mmap has a duplicate of its own

    with child(close_all) as pid:
        assert wire.PAGE_PREFIX not in "".join(ProcFS().descriptors(pid, pid).values())
        assert found(observer.look(session(page)), pid).pages == {session(page).id}


def test_a_child_that_holds_the_page_under_another_number_is_found(
    observer: Observer, page: SessionPage
) -> None:
    def move() -> None:
        os.dup(page.fd)
        os.close(page.fd)

    with child(move) as pid:
        assert found(observer.look(session(page)), pid).pages == {session(page).id}
        assert found(observer.look(replace(session(page), page_fd=-1)), pid).pages == {session(page).id}


def test_another_file_under_the_number_of_the_page_hides_nothing(
    observer: Observer, page: SessionPage
) -> None:
    def replace_page() -> None:
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, page.fd)

    with child(replace_page) as pid:
        assert found(observer.look(session(page)), pid).pages == {session(page).id}


def test_the_page_of_another_session_under_the_number_of_the_page_hides_nothing(
    observer: Observer, page: SessionPage
) -> None:
    def put_another() -> None:
        os.dup(page.fd)
        os.dup2(os.memfd_create(wire.PAGE_PREFIX + OTHER_ID), page.fd)

    with child(put_another) as pid:
        assert found(observer.look(session(page)), pid).pages == {session(page).id, OTHER_ID}


@pytest.mark.needs_root
def test_a_page_that_another_user_made_is_no_mark(observer: Observer) -> None:
    os.seteuid(NOBODY)
    try:
        handed_over = os.memfd_create(wire.PAGE_PREFIX + session().id)
    finally:
        os.seteuid(0)
    try:
        with child() as pid:
            for number in (handed_over, -1):
                assert found(observer.look(session(page_fd=number)), pid).pages == frozenset()
    finally:
        os.close(handed_over)


def test_an_executed_child_is_seen_with_the_stamps_in_its_environment(observer: Observer, run: str) -> None:
    environment = {
        wire.LINEAGE_VARIABLE: f"{OTHER_ID}:junk:{session().id}",
        wire.SPARED_VARIABLE: OTHER_ID,
        "REAPER_TEST_RUN": run,
    }
    with executed(**environment) as pid:
        one = found(observer.look(session()), pid)
        assert (one.forked, one.comm, one.argv) == (False, "cat", ("cat",))
        assert one.lineage == (OTHER_ID,)
        assert one.spared == {OTHER_ID}
        assert one.pages == frozenset()


def test_a_forked_child_that_was_spared_is_seen_with_that_mark(observer: Observer, page: SessionPage) -> None:
    def be_spared() -> None:
        be_spared.mark = SparedMark(OTHER_ID)  # type: ignore[attr-defined]
        page.close()

    with child(be_spared) as pid:
        one = found(observer.look(session(page)), pid)
        assert one.spared == {OTHER_ID}
        assert one.pages == frozenset()


def test_a_process_in_uninterruptible_sleep_is_read_too(
    observer: Observer, page: SessionPage, tmp_path: Path
) -> None:
    # vfork(2) keeps the parent in state D until its child, which waits to open a FIFO, has executed something.
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pid = os.fork()
    if pid == 0:
        opening = [(os.POSIX_SPAWN_OPEN, 9, str(fifo), os.O_RDONLY, 0)]
        with contextlib.suppress(BaseException):
            os.waitpid(os.posix_spawn("/bin/true", ["true"], {}, file_actions=opening), 0)
        os._exit(0)
    try:
        deadline_s = time.monotonic() + SOON_S
        while ProcFS().stat(pid).state != "D":
            assert time.monotonic() < deadline_s, "posix_spawn(3) does not use vfork(2) here"
            os.sched_yield()
        assert found(observer.look(session(page)), pid).pages == {session(page).id}
    finally:
        os.close(os.open(fifo, os.O_WRONLY))
        os.waitpid(pid, 0)


class Blocking(ProcFS):
    """A /proc in which everybody is in state D and nothing that lies in memory can be read in time."""

    def stat(self, pid: int) -> Stat:
        return super().stat(pid)._replace(state="D")

    def environ(self, pid: int, task: int) -> bytes | None:
        never, _ = os.pipe()
        assert not select.select([never], [], [], SOON_S)[0]
        raise AssertionError("the loop itself has read what blocks")


def test_a_process_whose_memory_cannot_be_read_holds_nobody_up(page: SessionPage) -> None:
    observer = Observer(Blocking())
    with child() as pid:
        begin_s = time.monotonic()
        one = observer.leader(replace(session(page), leader=id_of(pid)))
        assert time.monotonic() - begin_s < SOON_S / 2
        assert one is not None
        assert (one.pages, one.lineage, one.spared) == (frozenset(), (), frozenset())
    for helper_pid in ProcFS().children(ME):  # what was left behind, and is dead
        os.waitpid(helper_pid, 0)


# -- who is in a snapshot ---------------------------------------------------------------------------


def test_the_living_leader_is_in_its_own_snapshot_and_a_dead_child_is_not(observer: Observer) -> None:
    with child() as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        snapshot = observer.look(session())
        assert found(snapshot, ME).id == id_of(ME)
        assert seen(snapshot, pid) is None


def test_whoever_dies_while_it_is_looked_at_is_not_in_the_snapshot(page: SessionPage) -> None:
    class Dying(ProcFS):
        """A /proc in which everybody but this process is a zombie already, and can still be read."""

        def stat(self, pid: int) -> Stat:
            told = super().stat(pid)
            return told if pid == ME else told._replace(state="Z", threads=1)

    observer = Observer(Dying())
    with child() as pid:
        assert seen(observer.look(dead_session()), pid) is None
        assert [one for one in swept(Sweep(observer), all_of_them=True) if one.holder.id.pid == pid] == []
    observer.release()


def test_whoever_started_before_the_leader_is_not_in_the_snapshot(observer: Observer) -> None:
    with child() as pid:
        started = id_of(pid).start_ticks
        assert seen(observer.look(session(leader=ProcessId(ME, started))), pid)
        later = observer.look(session(leader=ProcessId(ME, started + 1)))
        assert seen(later, pid) is None
        assert seen(later, ME) is None


@pytest.mark.needs_root
def test_whoever_is_of_another_or_of_mixed_uid_is_not_in_the_snapshot(observer: Observer) -> None:
    for ids in ((NOBODY, NOBODY, NOBODY), (NOBODY, UID, UID), (UID, NOBODY, UID), (UID, UID, NOBODY)):
        with child(lambda ids=ids: os.setresuid(*ids)) as pid:
            assert seen(observer.look(session()), pid) is None, ids
    with child(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as pid:
        assert found(observer.look(session(uid=NOBODY)), pid).uid == NOBODY


def test_one_look_serves_several_sessions_and_none_costs_nothing(
    observer: Observer, page: SessionPage
) -> None:
    with child() as pid:
        now = id_of(pid).start_ticks
        later = session(leader=ProcessId(ME, now + 10**6))
        both = observer.look_at_all([session(page), later])
        assert found(both, pid).pages == {session(page).id}
        assert seen(observer.look_at_all([later]), pid) is None
        assert not observer.look_at_all([]).processes
        assert seen(observer.look_at_all([session(uid=UID + 1)]), pid) is None


def test_what_stands_below_a_leader_is_found_down_to_the_last(observer: Observer) -> None:
    with child_of_child() as (pid, grandchild):
        snapshot = observer.look_below(session())
        assert {ME, pid, grandchild} <= snapshot.processes.keys()
        assert found(snapshot, grandchild).ppid == pid
        assert set(observer.descendants(id_of(pid))) == {grandchild}
        assert set(observer.look_below(session(leader=id_of(pid))).processes) == {pid, grandchild}
        other = session(leader=ProcessId(grandchild, 0), kept=frozenset((id_of(pid),)))
        kept = observer.look_below(other)
        assert set(kept.processes) == {pid, grandchild}


def test_a_quick_look_goes_through_those_who_adopt_and_those_who_are_known(
    observer: Observer, page: SessionPage
) -> None:
    with child() as pid:
        mine = frozenset((id_of(ME),))
        snapshot = observer.look_quick(dead_session(page, adopters=mine))
        assert found(snapshot, pid).pages == {session(page).id}
        assert snapshot.adopters == mine
        handle = observer.claim(id_of(pid))
        assert handle is not None
        os.close(handle)
        known = observer.look_quick(dead_session(page, kept=frozenset((id_of(pid),))))
        assert seen(known, pid)
        assert seen(observer.look_quick(dead_session(page)), pid) is None


def test_a_quick_look_follows_the_children_of_whoever_carries_a_mark(
    observer: Observer, page: SessionPage
) -> None:
    with child_of_child() as (pid, grandchild):
        snapshot = observer.look_quick(dead_session(page, adopters=frozenset((id_of(ME),))))
        assert found(snapshot, grandchild).ppid == pid
        kept = frozenset((id_of(pid),))
        assert seen(
            observer.look_quick(dead_session(kept=kept, adopters=frozenset((id_of(ME),)))), grandchild
        )


def test_a_quick_look_follows_the_children_of_whoever_cannot_be_read_yet() -> None:
    class Blocked(ProcFS):
        """A /proc in which everybody is in state D."""

        def stat(self, pid: int) -> Stat:
            return super().stat(pid)._replace(state="D")

    observer = Observer(Blocked())
    with child_of_child() as (_, grandchild):
        snapshot = observer.look_quick(dead_session(adopters=frozenset((id_of(ME),))))
        observer.release()
        assert seen(snapshot, grandchild)
    for helper_pid in ProcFS().children(ME):  # one that did not come back in time
        os.waitpid(helper_pid, 0)


def test_children_in_a_circle_end_the_search() -> None:
    class Circle(ProcFS):
        """A /proc that was read while pids were given away: everybody is everybody's child."""

        calls = 0

        def children(self, pid: int) -> list[int]:
            self.calls += 1
            assert self.calls < 100
            return [2, 3, 4]

    assert sorted(Observer(Circle()).descendants(ProcessId(2, 0))) == [3, 4]


def test_an_adopter_whose_pid_is_another_process_now_is_none(observer: Observer, page: SessionPage) -> None:
    with child() as pid:
        other = frozenset((ProcessId(ME, id_of(ME).start_ticks + 1),))
        for look in (observer.look, observer.look_quick):
            assert look(dead_session(page, adopters=other)).adopters == frozenset()
        assert observer.look_at_all([session(page, adopters=other)]).adopters == frozenset()
        assert seen(observer.look_quick(dead_session(page, adopters=other)), pid) is None


class Changing(ProcFS):
    """A /proc in which one pid is given to another process, or to none, after it was read once."""

    def __init__(self, pid: int, then: Callable[[Stat], Stat]) -> None:
        super().__init__()
        self.pid = pid
        self.then = then
        self.reads = 0

    def stat(self, pid: int) -> Stat:
        told = super().stat(pid)
        if pid == self.pid:
            self.reads += 1
            if self.reads > 1:
                return self.then(told)
        return told


def test_a_child_of_a_pid_that_was_given_away_in_the_middle_of_a_look_has_no_parent() -> None:
    def given_away(told: Stat) -> Stat:
        return told._replace(id=ProcessId(told.id.pid, told.id.start_ticks + 1))

    def gone(told: Stat) -> Stat:
        raise ProcessGone

    with child() as pid:
        for then, ppid in ((given_away, 0), (gone, ME), (lambda told: told, ME)):
            observer = Observer(Changing(ME, then))
            leader = session()
            observer.proc.reads = 0  # type: ignore[attr-defined]
            assert found(observer.look(leader), pid).ppid == ppid


# -- pidfds -----------------------------------------------------------------------------------------


def test_a_look_at_a_dead_leaders_survivors_holds_a_pidfd_of_each_until_it_is_claimed_or_released(
    observer: Observer,
) -> None:
    with child() as pid:
        before = len(os.listdir("/proc/self/fd"))
        snapshot = observer.look(dead_session())
        assert len(os.listdir("/proc/self/fd")) == before + len(snapshot.processes)
        handle = observer.claim(id_of(pid))
        assert handle is not None
        assert observer.claim(id_of(pid)) is None
        observer.release()
        assert len(os.listdir("/proc/self/fd")) == before + 1
        assert observer.claim(id_of(ME)) is None
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(handle)


def test_looking_twice_holds_no_more_pidfds_than_looking_once(observer: Observer) -> None:
    with child() as pid:
        kept = frozenset((id_of(pid),))
        observer.look(dead_session(kept=kept))
        assert pidfds_of(pid) == 1
        observer.look(dead_session())
        observer.look_quick(dead_session(kept=kept))
        assert pidfds_of(pid) == 1


def test_no_more_pidfds_are_held_than_a_quarter_of_what_is_allowed() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    allowed = lowest_free + 4
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, limits[1]))
    try:
        observer = Observer(ProcFS())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with contextlib.ExitStack() as stack:
        children = {stack.enter_context(child()) for _ in range(allowed // 4 + 2)}
        before = len(os.listdir("/proc/self/fd"))
        assert children <= observer.look(dead_session()).processes.keys()
        assert len(os.listdir("/proc/self/fd")) == before + allowed // 4
        observer.release()


def test_a_look_at_the_living_holds_no_pidfd(observer: Observer) -> None:
    before = len(os.listdir("/proc/self/fd"))
    observer.look_at_all([session()])
    observer.look_below(session())
    assert len(os.listdir("/proc/self/fd")) == before
    assert observer.claim(id_of(ME)) is None


def test_whoever_is_passed_over_leaves_no_pidfd(observer: Observer) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert not observer.look(dead_session(leader=ProcessId(ME, 10**12))).processes
    assert not observer.look(dead_session(uid=2**32 - 5)).processes
    assert len(os.listdir("/proc/self/fd")) == before


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
        leader = observer.leader(session(leader=id_of(pid)))
        assert leader is not None
        assert leader.id == id_of(pid)
        assert observer.leader(session(leader=ProcessId(pid, id_of(pid).start_ticks - 1))) is None
    assert observer.leader(session(leader=ProcessId(pid, 1))) is None


def test_what_is_asked_of_a_leader_is_true_of_this_process(observer: Observer) -> None:
    assert observer.owner(ME) == (UID, os.getgid())
    assert observer.namespaced_pid(ME) == ME
    assert observer.cgroup_path(ME) == wire.parse_cgroup(Path("/proc/self/cgroup").read_text())
    counter = observer.oom_counter(ME)
    assert (observer.oom_kills_in(session(oom_counter=counter)) is None) == (counter == "")
    assert observer.oom_kills_in(session()) is None


def test_a_leader_is_taken_down_with_all_that_only_a_living_one_tells(observer: Observer, run: str) -> None:
    folders = {"TMPDIR": "relative/tmp", "JOBLIB_TEMP_FOLDER": "/scratch/joblib", "REAPER_TEST_RUN": run}
    with executed(**folders) as pid:
        told = observer.describe_leader(session(leader=id_of(pid)))
        assert told.temp_dirs == ("/scratch/joblib", "/tmp")
        assert told.cgroup == observer.cgroup_path(pid)
        assert told.adopters == observer.ancestors(pid)
        assert told.namespaces == ProcFS().namespaces(pid)
        assert told.oom_counter == observer.oom_counter(pid)
    with pytest.raises(ProcessGone):
        observer.describe_leader(session(leader=ProcessId(pid, 1)))


def test_the_command_line_of_a_forked_process_is_told_while_it_is_who_it_was(observer: Observer) -> None:
    with child() as pid:
        one = found(observer.look(session()), pid)
        assert observer.marks.argv(one) == list(ProcFS().argv(ME, ME))
        assert observer.marks.argv(replace(one, argv=("known",))) == ["known"]
        assert observer.marks.argv(replace(one, id=ProcessId(pid, one.id.start_ticks + 1))) == []
    assert observer.marks.argv(one) == []


def test_mappings_are_told_of_the_living_and_read_by_a_helper_where_that_may_block(
    observer: Observer, page: SessionPage, run: str
) -> None:
    class Slow(ProcFS):
        """A /proc in which everybody is in state D and says who reads its mappings."""

        def stat(self, pid: int) -> Stat:
            return super().stat(pid)._replace(state="D")

        def mapped_paths(self, pid: int, task: int) -> list[str]:
            return [str(os.getpid())]

    with child() as pid:
        assert [path for path in observer.marks.mapped_paths(pid) if wire.PAGE_PREFIX in path]
        (reader,) = Observer(Slow()).marks.mapped_paths(pid)
        assert int(reader) != ME
        assert Observer(Slow()).marks.argv(Process(id_of(pid), 1, UID)) == []
    with executed(TMPDIR="/scratch", REAPER_TEST_RUN=run) as pid:
        assert observer.describe_leader(session(leader=id_of(pid))).temp_dirs == ("/scratch", "/tmp")
        assert Observer(Slow()).describe_leader(session(leader=id_of(pid))).temp_dirs == ("/tmp",)
    assert observer.marks.mapped_paths(pid) == []


def test_a_process_is_alive_while_it_is_who_it_was_and_condemned_once_it_is_on_its_way_out(
    observer: Observer,
) -> None:
    with child() as pid:
        one = id_of(pid)
        assert observer.is_alive(one)
        assert not observer.is_alive(ProcessId(pid, one.start_ticks + 1))
        assert not observer.is_condemned(pid)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
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
    assert not observer.shares_our_namespaces(session(namespaces=replace(ours, mnt="mnt:[1]")))
    assert not observer.shares_our_namespaces(session(namespaces=replace(ours, pid="pid:[1]")))
    assert not observer.shares_our_namespaces(session())


def test_a_holder_is_an_orphan_only_of_a_leader_that_is_dead_and_was_there_before_it(
    observer: Observer,
) -> None:
    with child() as pid, child() as other:
        holder, leader = id_of(other), id_of(pid)
        assert not observer.could_be_orphan(holder, leader)
        assert observer.could_be_orphan(holder, ProcessId(pid, leader.start_ticks - 1))
        assert not observer.could_be_orphan(holder, ProcessId(pid, holder.start_ticks + 1))
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert observer.could_be_orphan(holder, leader)
        os.waitpid(pid, 0)
        assert observer.could_be_orphan(holder, leader)


# -- sweeping ---------------------------------------------------------------------------------------


def swept(sweep: Sweep, *, all_of_them: bool) -> list[FoundPage | StampedProcess]:
    """Return what a sweep finds at this process and its children, with every descriptor closed."""
    mine = {ME, *ProcFS().children(ME)}
    found = []
    for one in sweep.run(all_of_them=all_of_them):
        if isinstance(one, FoundPage):
            os.close(one.descriptor)
        if one.holder.id.pid in mine:
            found.append(one)
    return found


def test_a_sweep_finds_the_page_of_a_leader_and_of_its_worker(observer: Observer, page: SessionPage) -> None:
    with child() as pid:
        found = [one for one in swept(Sweep(observer), all_of_them=True) if isinstance(one, FoundPage)]
        assert {one.holder.id.pid for one in found} == {ME, pid}
        assert {(one.page.id, one.uid, one.gid) for one in found} == {(session(page).id, UID, os.getgid())}


def test_a_sweep_looks_at_new_processes_and_at_a_part_of_the_others_in_turn(
    observer: Observer, page: SessionPage
) -> None:
    sweep = Sweep(observer)
    with child() as one, child() as two, child() as three:
        seen_at_once = {found.holder.id.pid for found in swept(sweep, all_of_them=False)}
        assert seen_at_once == {ME, one, two, three}
    turns = [bool(swept(sweep, all_of_them=False)) for _ in range(16)]
    assert turns.count(True) == 1
    assert swept(sweep, all_of_them=True)


def test_a_sweep_names_who_carries_a_session_in_its_environment(observer: Observer, run: str) -> None:
    stamps = {wire.LINEAGE_VARIABLE: f"{OTHER_ID}:{OTHER_ID}:x", "REAPER_TEST_RUN": run}
    with executed(**stamps) as pid:
        found = [one for one in swept(Sweep(observer), all_of_them=True) if isinstance(one, StampedProcess)]
        assert {(one.session, one.holder.id, one.uid) for one in found} == {(OTHER_ID, id_of(pid), UID)}
        assert {one.cgroup for one in found} == {observer.cgroup_path(pid)}


def test_a_sweep_passes_over_a_page_under_another_name(observer: Observer, page: SessionPage) -> None:
    other = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(other, page._memory[:])
        fcntl.fcntl(other, 1033, 0x1 | 0x2 | 0x4 | 0x10)
        page.close()
        assert swept(Sweep(observer), all_of_them=True) == []
    finally:
        os.close(other)


def test_a_sweep_passes_over_what_only_looks_like_a_page(observer: Observer) -> None:
    broken = os.memfd_create(wire.PAGE_PREFIX + OTHER_ID, os.MFD_CLOEXEC)
    try:
        assert swept(Sweep(observer), all_of_them=True) == []
    finally:
        os.close(broken)


def test_a_sweep_keeps_nothing_open_of_a_page_that_is_broken(observer: Observer, page: SessionPage) -> None:
    page._memory[wire.RECORD_AT : wire.RECORD_AT + 4] = b"junk"
    assert swept(Sweep(observer), all_of_them=True) == []


def test_a_sweep_passes_over_the_sessions_that_a_process_is_spared_from(observer: Observer, run: str) -> None:
    other = "8-8-00000008-00000008"
    stamps = {wire.LINEAGE_VARIABLE: f"{OTHER_ID}:{other}", wire.SPARED_VARIABLE: OTHER_ID}
    with executed(REAPER_TEST_RUN=run, **stamps):
        found = swept(Sweep(observer), all_of_them=True)
        assert [one.session for one in found if isinstance(one, StampedProcess)] == [other]


def test_a_sweep_never_reads_the_memory_of_who_may_block_it(page: SessionPage) -> None:
    observer = Observer(Blocking())
    assert swept(Sweep(observer), all_of_them=True) == []


def test_a_sweep_goes_on_where_somebody_vanishes_or_may_not_be_read(page: SessionPage) -> None:
    class Shy(ProcFS):
        """A /proc in which one process is gone by now, one may not be read and one says nonsense."""

        faults = {1: ProcessGone, 2: PermissionError, 3: ValueError}

        def listing(self) -> list[tuple[int, int]]:
            return [(1, 1), (2, 2), (3, 3), (ME, 4)]

        def environ(self, pid: int, task: int) -> bytes | None:
            if pid in self.faults:
                raise self.faults[pid]
            return super().environ(pid, task)

        def stat(self, pid: int) -> Stat:
            return super().stat(ME)._replace(id=ProcessId(pid, 1))

        def status(self, pid: int) -> bytes:
            return super().status(ME)

    found = swept(Sweep(Observer(Shy())), all_of_them=True)
    assert {one.holder.id.pid for one in found} == {ME}


def test_a_sweep_passes_over_the_dead(observer: Observer, page: SessionPage) -> None:
    with child() as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert {one.holder.id.pid for one in swept(Sweep(observer), all_of_them=True)} == {ME}


# -- figures ----------------------------------------------------------------------------------------


def test_the_usage_of_a_busy_process_is_told_in_percent_of_a_core(observer: Observer) -> None:
    one = Process(id_of(ME), 1, UID, cpu_ticks=0, rss_bytes=4096)
    assert observer.usage(one).rss_bytes == 4096
    assert observer.usage(one).cpu_percent == 0
    age_ticks = time.clock_gettime(time.CLOCK_BOOTTIME) * 100 - one.id.start_ticks
    assert observer.usage(replace(one, cpu_ticks=int(age_ticks))).cpu_percent == pytest.approx(100, rel=0.2)


def test_the_usage_since_the_last_scan_counts_no_earlier_work(observer: Observer) -> None:
    one = Process(ProcessId(ME, 1), 1, UID, cpu_ticks=100)  # started with the machine
    observer.note_usage(Snapshot({ME: one}))
    assert observer._cpu[one.id][1] == 100
    observer.note_usage(Snapshot({ME: replace(one, cpu_ticks=900)}))
    assert observer._cpu[one.id][1] == 100, "the last scan is too young to measure by"
    observer.note_usage(Snapshot({}))
    assert observer._cpu == {}
