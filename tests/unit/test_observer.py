"""What is told of a leader, of a holder and of a member, of real processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from specimens import ME, UID, child, die, executed, id_of, session

from agent import wire
from reaperd import kinship
from reaperd.linux.procfs import ProcessGone, ProcFS
from reaperd.model import ProcessId
from reaperd.observer import Observer


def test_what_is_asked_of_a_leader_is_true_of_this_process(observer: Observer) -> None:
    assert observer.owner(ME) == (UID, os.getgid())
    assert observer.namespaced_pid(ME) == ME
    assert observer.cgroup_path(ME) == wire.parse_cgroup(Path("/proc/self/cgroup").read_text())
    counter = observer.oom_counter(ME).path
    assert (observer.oom_kills_in(session(oom_counter=counter)) is None) == (counter == "")
    assert observer.oom_kills_in(session()) is None


def test_a_leader_is_taken_down_with_all_that_only_a_living_one_tells(observer: Observer) -> None:
    with child() as pid:
        told = observer.describe_leader(session(leader=id_of(pid)))
        assert told.cgroup == observer.cgroup_path(pid)
        assert told.adopters == kinship.ancestors(observer.proc, pid)
        assert told.namespaces == ProcFS().namespaces(pid)
        assert told.oom_counter == observer.oom_counter(pid).path
        assert sorted(told.groups) == sorted(os.getgroups())
        assert told.subreapers == frozenset()
        supervised = observer.describe_leader(session(leader=id_of(pid))._replace(attempt=(1, 1)))
        assert supervised.subreapers == {id_of(ME)}
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
        assert observer.proc.is_alive(one)
        assert not observer.proc.is_alive(ProcessId(pid, one.start_ticks + 1))
        assert not observer.is_condemned(pid)
        die(pid)
        assert not observer.proc.is_alive(one)
        assert observer.is_condemned(pid)
    assert not observer.proc.is_alive(one)
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


def test_a_session_with_mounts_of_its_own_shares_our_shm_only_where_it_is_the_very_same(
    observer: Observer,
) -> None:
    ours = observer._namespaces._replace(shm="0:23")
    observer._namespaces = ours
    theirs = ours._replace(mnt="mnt:[1]")
    assert observer.shares_our_shm(session(namespaces=ours._replace(shm="")))
    assert observer.shares_our_shm(session(namespaces=theirs))
    assert not observer.shares_our_shm(session(namespaces=theirs._replace(shm="0:24")))
    assert not observer.shares_our_shm(session(namespaces=theirs._replace(shm="")))
    assert not observer.shares_our_shm(session(namespaces=theirs._replace(pid="pid:[1]")))
    observer._namespaces = ours._replace(shm="")
    assert not observer.shares_our_shm(session(namespaces=theirs._replace(shm="")))


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
