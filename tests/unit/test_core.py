"""The core on real processes: what one session has it raise costs that session some time, and no other anything."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from specimens import OTHER_ID, Mine, child, executed

from agent import wire
from agent.page import SessionPage
from reaperd import core, decide, ledger, pauses
from reaperd.adoption import Adoption
from reaperd.census import Census, Interrupted
from reaperd.core import Core
from reaperd.linux.alarm import Alarm
from reaperd.linux.page import OpenPage
from reaperd.linux.procfs import ProcFS
from reaperd.model import UNKNOWN_CAUSE, Family, Process, ProcessId, Session, SessionKey, Snapshot
from reaperd.observer import Observer
from reaperd.policy import Policy
from reaperd.poller import Poller
from reaperd.reaper import Reaper
from reaperd.store import Store
from reaperd.sweep import Holder, StampedProcess

SOON_S = 10.0
BAD, GOOD = "bad", "good"


class FaultyCensus(Census):
    """Raises what nobody has foreseen, for one session."""

    fault: type[Exception] | None = None
    vanished: frozenset[int] = frozenset()
    beside: Process | None = None  # is in each snapshot, too
    looks = 0

    def _fail_for(self, sessions: Iterable[Session]) -> None:
        if self.fault is not None and any(session.id == BAD for session in sessions):
            raise self.fault

    def look(self, sessions: Any, **options: Any) -> Snapshot:
        self._fail_for(sessions)
        self.looks += 1
        snapshot = super().look(sessions, **options)
        if self.beside is not None:
            snapshot = Snapshot({**snapshot.processes, self.beside.id.pid: self.beside}, snapshot.adopters)
        snapshot.vanished = self.vanished
        return snapshot

    def cover(self, session: Session) -> None:
        self._fail_for([session])
        super().cover(session)


class World:
    """A core, and two leaders that have nobody."""

    def __init__(self, directory: Path, proc: ProcFS | None = None) -> None:
        proc, alarm = proc or ProcFS(), Alarm()
        self.observer = Observer(proc)
        self.census = self.observer.census = FaultyCensus(proc, self.observer.marks, alarm)
        self.poller = Poller()
        self.store = Store(str(directory), self.observer.boot_id, retry_s=0.0)
        self.core = Core(self.observer, Reaper(proc, frozenset()), self.store, self.poller, Policy(), alarm)
        self._pids: list[int] = []

    def leader(self, name: str) -> Session:
        """Start a process that leads the session ``name``."""
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        self._pids.append(pid)
        id_: ProcessId = self.observer.proc.stat(pid).id
        return self.observer.describe_leader(Session(name, "", os.getuid(), os.getgid(), id_, ""))

    def take_on(self, session: Session) -> None:
        self.core.take_on(session, os.pidfd_open(session.leader.pid), None)

    def end_leaders(self) -> None:
        while self._pids:
            pid = self._pids.pop()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def ended(self) -> set[str]:
        return {event["session"] for event in self.store.events() if event["kind"] == "ended"}

    def run_until_ended(self, names: set[str]) -> None:
        self.run_until(lambda: names <= self.ended())

    def run_until(self, is_so: Callable[[], bool]) -> None:
        end_s = time.monotonic() + SOON_S
        while not is_so():
            assert time.monotonic() < end_s, f"ended are only {self.ended()}"
            deadline_s = self.core.next_deadline()
            self.poller.wait(0.5 if deadline_s is None else min(0.5, deadline_s - time.monotonic()))
            self.core.step()

    def close(self) -> None:
        self.end_leaders()
        self.core.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with contextlib.closing(World(tmp_path)) as one:
        yield one
    del one
    gc.collect()  # what it has open must not be closed in the middle of a test that counts descriptors


def test_a_session_that_cannot_be_looked_at_keeps_nobody_else_from_being_reaped(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pauses, "FIRST_S", 0.3)
    for name in (BAD, GOOD):
        world.take_on(world.leader(name))
    world.census.fault = RecursionError
    world.end_leaders()
    world.run_until_ended({GOOD})
    assert world.ended() == {GOOD}
    assert "RecursionError" in caplog.text
    world.census.fault = None
    world.run_until_ended({BAD, GOOD})


def test_a_session_that_is_set_aside_does_not_keep_the_core_busy(world: World) -> None:
    world.take_on(world.leader(BAD))
    world.census.fault = RecursionError
    world.end_leaders()
    world.poller.wait(SOON_S)
    rounds = 0
    while (world.core.next_deadline() or 0.0) < time.monotonic() + 4:
        rounds += 1
        assert rounds < 10, "it goes round and round"
        world.core.step()
        world.poller.wait(0.005)
    assert world.ended() == set()


def test_living_sessions_are_looked_at_though_one_of_them_cannot_be(world: World) -> None:
    keys = {}
    for name in (BAD, GOOD):
        session = world.leader(name)
        world.take_on(session)
        keys[name] = session.key
    assert set(world.core.living.look()) == set(keys.values())
    world.census.fault = ZeroDivisionError
    assert set(world.core.living.look()) == {keys[GOOD]}
    world.census.fault = None
    assert set(world.core.living.look()) == {keys[GOOD]}, "it is set aside"


@pytest.mark.parametrize("known", [False, True])
def test_the_first_look_waits_only_where_all_that_were_known_before_are_being_ended(
    tmp_path: Path, page: SessionPage, known: bool
) -> None:
    """What another one starts meanwhile may carry no mark, and have no living relative when it is looked at."""
    # Of all that init adopts on this machine, nobody else's processes count: they would have to be looked at, too.
    with contextlib.closing(World(tmp_path, Mine())) as world:
        _the_first_look_waits(world, page, known=known)


def _the_first_look_waits(world: World, page: SessionPage, *, known: bool) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, b"%d\n" % (os.fork() or os.getpid()))
        signal.pause()
    os.close(writer)
    with open(reader, "rb") as file:
        worker = max(int(file.readline()), int(file.readline()))
    id_ = world.observer.proc.stat(pid).id
    session = Session(page._identity[0], "", os.getuid(), os.getgid(), id_, "", page.fd)
    world.core.take_on(world.observer.describe_leader(session), os.pidfd_open(pid), OpenPage(os.dup(page.fd)))
    if known:
        entry, other = world.core.sessions.entries[session.key], world.observer.proc.stat(os.getpid()).id
        world.core.sessions._roster.put(
            entry._replace(session=entry.session._replace(seen=frozenset((other,))))
        )
    assert worker in world.observer.proc.listing()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    world.poller.wait(SOON_S)
    told = world.core._survivors._look_ahead([session.key])
    world.census.handles.release()
    assert {one.pid for one in world.core.sessions.entries[session.key].targets} == {worker}
    assert told == (set() if known else {session.key})
    world.run_until(lambda: bool(world.store.events()))


def test_what_could_not_be_put_on_record_is_put_there_later(world: World, tmp_path: Path) -> None:
    session = world.leader(GOOD)
    with contextlib.closing(sqlite3.connect(tmp_path / "reaper.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        world.take_on(session)
        world.core.sessions.put_on_record(session.key)
        world.core.sessions.save()
        assert world.store.sessions() == []
        other.execute("ROLLBACK")
        world.core.sessions.save()
    assert [one.key for one in world.store.sessions()] == [session.key]


def test_a_dry_run_says_nothing_before_a_look_has_seen_all(world: World) -> None:
    world.core.policy = Policy(dry_run=True)
    session = world.leader(GOOD)
    world.take_on(session)
    world.end_leaders()
    world.poller.wait(SOON_S)
    entry = world.core.sessions.entries[session.key]
    ahead = ledger.apply(entry, ledger.Looked(Family({}, {}), entry.died_at_s or 0.0, 0.0, ahead=True))
    assert decide.decide(ahead, world.core.policy, entry.died_at_s or 0.0) == []


def test_scans_alone_say_that_an_unregistered_session_has_nobody(world: World) -> None:
    """Anybody can have all sessions looked at, twice within a millisecond."""
    session = world.leader(GOOD)
    world.take_on(session)
    world.core.unregister(session.key)
    for _ in range(5):
        world.core.living.look()
        world.core.step()
    assert world.ended() == set()
    for _ in range(2):
        assert session.key in world.core.sessions.entries
        world.core.living.scan(world.observer.proc.listing())
    world.run_until_ended({GOOD})


def test_what_cannot_be_taken_on_is_closed(world: World) -> None:
    session = world.leader(BAD)
    world.census.fault = RecursionError
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(RecursionError):
        world.take_on(session)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_what_cannot_be_watched_is_not_taken_on_and_can_be_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is on the list and not watched would never be found to have died."""
    session = world.leader(GOOD)
    before = set(os.listdir("/proc/self/fd"))

    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory for one more")

    for owner, name in (
        (world.core._alarm, "watch"),
        (world.core.leaders, "hold"),
        (world.core.sessions, "add"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(OSError, match="no memory"):
                world.take_on(session)
        assert set(os.listdir("/proc/self/fd")) <= before
        assert not world.poller._calls, "the next one that gets the number would be taken for it"
        world.core.sessions._roster._entries.clear()
    world.take_on(session)
    world.end_leaders()
    world.run_until_ended({GOOD})


def test_a_death_that_could_not_be_noted_is_told_of_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.take_on(world.leader(GOOD))
    world.end_leaders()

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(world.core, "_leader_is_dead", fail)
        with pytest.raises(MemoryError):
            world.poller.wait(SOON_S)
    world.run_until_ended({GOOD})


def test_mending_watches_who_is_not_watched_and_ends_what_nobody_reclaims(world: World) -> None:
    """As an error between two steps leaves it."""
    for name in (BAD, GOOD):
        world.take_on(world.leader(name))
    entries = world.core.sessions.entries
    keys = {key.id: key for key in entries}
    for key in keys.values():
        handle = world.core.leaders.handle(key)
        assert handle is not None
        world.poller.unwatch(handle)
        world.core._alarm.silence(handle)
    world.core.mend()
    world.end_leaders()
    world.run_until(lambda: all(entry.died_at_s is not None for entry in entries.values()))
    key = keys[GOOD]
    world.run_until(lambda: GOOD in world.ended() or entries[key].phase is ledger.Phase.RECLAIMING)
    world.core.mend()
    world.run_until_ended({BAD, GOOD})


def test_a_session_that_waits_for_a_helper_that_nobody_started_is_let_go(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = world.leader(GOOD)
    world.take_on(session)
    monkeypatch.setattr(world.core._reclaimer, "has_names", lambda _: True)
    with monkeypatch.context() as patch:
        patch.setattr(world.core._reclaimer, "ask", lambda *_, **__: None)  # the request is lost
        world.end_leaders()
        (entry,) = world.core.sessions.entries.values()
        world.run_until(lambda: world.core.sessions.entries[entry.session.key].reclaim_asked)
    assert world.ended() == set()
    world.core.mend()
    world.run_until_ended({GOOD})


def test_while_processes_vanish_before_they_can_be_read_a_session_is_not_over(world: World) -> None:
    world.take_on(world.leader(GOOD))
    world.census.vanished = frozenset((os.getuid(),))
    world.end_leaders()
    world.run_until(lambda: world.census.looks >= 3 * ledger.QUIET_LOOKS)
    assert world.ended() == set()
    assert [entry.restless for entry in world.core.sessions.entries.values()] == [True]
    world.census.vanished = frozenset()
    world.run_until_ended({GOOD})


@pytest.mark.parametrize("settled", [True, False])
def test_while_one_that_carries_the_stamp_changes_its_parent_a_session_is_not_over(
    world: World, settled: bool
) -> None:
    """It forks and is gone, again and again: what a look cut off from its parent is somebody else's at the next one."""
    session = world.leader(GOOD)._replace(cgroup="/")
    with child() as pid:
        stat = world.observer.proc.stat(pid)
        stamped = Process(stat.id, stat.ppid, os.getuid(), "hop", cgroup="/", lineage=frozenset((GOOD,)))
        world.census.beside = stamped if settled else stamped._replace(ppid=0)
        world.take_on(session)
        world.end_leaders()
        if not settled:
            world.run_until(lambda: world.census.looks >= 3 * ledger.QUIET_LOOKS)
            assert world.ended() == set()
            world.census.beside = stamped
        world.run_until_ended({GOOD})
        assert world.store.events()[-1]["left_alone"][0]["pid"] == pid


def pid_told(told: IO[bytes], stack: contextlib.ExitStack) -> int:
    """Return the pid on the next line; whoever has it is ended with ``stack``."""
    pid = int(told.readline())
    handle = os.pidfd_open(pid)

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)

    stack.callback(end)
    return pid


@pytest.mark.parametrize("read", ["before", "after"])
def test_the_new_child_of_one_that_was_read_and_never_judged_is_ended_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    """A leader's death interrupts a scan that has read its worker, and not yet whom that has started, who has no mark."""
    monkeypatch.setattr(ProcFS, "cgroup", lambda *_: "0::/\n")  # which tells nothing: the parent has to
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(contextlib.closing(World(tmp_path, Mine())))
        said, saying = os.pipe()
        cue, cueing = os.pipe()
        stack.callback(os.close, cueing)
        script = "echo $$; read cue; env -i sleep 100 >/dev/null & echo $!; wait"
        environment = {wire.LINEAGE_VARIABLE: OTHER_ID, "PATH": os.environ["PATH"]}
        leader = os.fork()
        if leader == 0:
            os.read(cue, 1)
            to = [(os.POSIX_SPAWN_DUP2, cue, 0), (os.POSIX_SPAWN_DUP2, saying, 1)]
            os.posix_spawn("/bin/sh", ["sh", "-c", script], environment, file_actions=to)
            signal.pause()
        world._pids.append(leader)
        os.close(saying)
        os.close(cue)
        told = stack.enter_context(open(said, "rb"))
        session = Session(OTHER_ID, "", os.getuid(), os.getgid(), world.observer.proc.stat(leader).id, "")
        world.census.cover(session)
        world.take_on(world.observer.describe_leader(session))
        os.write(cueing, b"x")
        worker = pid_told(told, stack)
        if read == "before":
            world.census.read_new(world.observer.proc.listing())
        os.write(cueing, b"x\n")
        child_of_worker = pid_told(told, stack)
        known = world.census.known
        if read == "after":
            listing = world.observer.proc.listing()
            del listing[child_of_worker]
            known.list_all(listing)
            world.end_leaders()
            known.read_each([worker], hold=False)
            known.read_memory(None)
        assert worker in known.processes
        assert child_of_worker not in known.processes
        assert not world.core.sessions.entries[session.key].session.seen
        world.end_leaders()
        world.run_until(lambda: bool(world.store.events()))
        (event,) = world.store.events()
        assert {one["pid"] for one in event["processes"]} == {worker, child_of_worker}


@pytest.mark.parametrize("ending", [False, True])
def test_where_the_kernel_does_not_tell_the_cause_an_end_that_was_announced_is_a_clean_one(
    world: World, monkeypatch: pytest.MonkeyPatch, ending: bool
) -> None:
    monkeypatch.setattr(core, "read_cause", lambda *_: UNKNOWN_CAUSE)
    session = world.leader(GOOD)
    world.take_on(session)
    if ending:
        world.core.unregister(session.key)
    world.end_leaders()
    world.poller.wait(SOON_S)
    entry = world.core.sessions.entries[session.key]
    assert entry.died_at_s is not None
    assert entry.signal_from_s - entry.died_at_s == (Policy().exit_grace_s if ending else 0.0)
    world.run_until_ended({GOOD})


def test_a_session_on_record_that_cannot_be_taken_on_keeps_the_daemon_from_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pauses, "FIRST_S", 0.01)
    sessions = [world.leader(name) for name in (BAD, GOOD)]
    for session in sessions:
        world.store.save(session)
    world.census.fault = ValueError
    adoption = Adoption(world.core, "/nowhere")
    adoption.recover()
    bad, good = (SessionKey(session.uid, session.id) for session in sessions)
    assert set(world.core.sessions.entries) == {good}
    world.census.fault = None
    end_s = time.monotonic() + SOON_S
    while bad not in world.core.sessions.entries:
        assert time.monotonic() < end_s
        with contextlib.suppress(Interrupted):  # the host has many processes
            adoption.sweep(world.observer.proc.listing())
    world.end_leaders()
    world.run_until_ended({BAD, GOOD})


def test_a_session_whose_end_was_told_of_is_taken_on_again_for_those_who_were_stuck_and_not_told_of_again(
    world: World,
) -> None:
    told, untold = (world.leader(name)._replace(cause=UNKNOWN_CAUSE) for name in (BAD, GOOD))
    world.end_leaders()
    for session in (told, untold):
        world.store.save(session)
    world.store.settle(told.key)
    Adoption(world.core, "/nowhere").recover()
    assert world.core.sessions.entries.keys() == {told.key, untold.key}
    world.run_until(lambda: not world.core.sessions.entries)
    assert world.ended() == {GOOD}
    assert world.store.sessions() == []


def test_a_session_that_a_stamp_tells_of_is_taken_on_with_the_page_that_others_hold(world: World) -> None:
    """Else they would never be found: a session that is on record is not adopted once more."""
    proc, socket = world.observer.proc, "/nowhere/reaper.sock"
    leader = os.fork()
    if leader == 0:
        signal.pause()
    ticks = proc.stat(leader).id.start_ticks
    os.kill(leader, signal.SIGKILL)
    os.waitpid(leader, 0)
    cgroup = world.observer.cgroup_path(os.getpid())
    place = wire.place_of(socket, cgroup, os.getuid())
    id_ = wire.format_session_id(leader, ticks, place, 1)
    with contextlib.closing(SessionPage(id_, "grid", ticks, world.observer.boot_id)) as page:
        page.write_record([socket])
        with child(), executed(**{wire.LINEAGE_VARIABLE: id_}) as stamped:
            holder = Holder(proc.stat(stamped), os.getuid(), os.getgid(), ())
            adoption = Adoption(world.core, socket)
            adoption._adopt_by_environment(StampedProcess(id_, holder, cgroup))
            (entry,) = world.core.sessions.entries.values()
            assert entry.session.page_inode == os.fstat(page.fd).st_ino
            assert entry.session.name == "grid"


def test_a_stamp_that_was_carried_out_of_another_realm_names_nobodys_dead_leader(world: World) -> None:
    """There, its pid and its start time were another process's, which may live."""
    proc, socket = world.observer.proc, "/nowhere/reaper.sock"
    cgroup = world.observer.cgroup_path(os.getpid())
    leader, ticks = 2**31 - 1, proc.stat(os.getpid()).id.start_ticks  # nobody has that pid here
    adoption = Adoption(world.core, socket)
    for nonce, realm in enumerate(("4026532999:4026531834", "")):
        place = wire.place_of(socket, cgroup, os.getuid(), realm)
        id_ = wire.format_session_id(leader, ticks, place, nonce)
        with executed(**{wire.LINEAGE_VARIABLE: id_}) as stamped:
            holder = Holder(proc.stat(stamped), os.getuid(), os.getgid(), ())
            adoption._adopt_by_environment(StampedProcess(id_, holder, cgroup))
        assert [key.id for key in world.core.sessions.entries] == (
            [id_] if realm == world.observer.realm else []
        )
