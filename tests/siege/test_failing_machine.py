"""A machine that runs out of something, or whose disk fails: what needs it waits, nothing is lost, and the core lives on."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Sequence

import pytest
from attackers import answers, gate_of, reap_latency
from harness import (
    STRANGER,
    WORKERS_GONE_S,
    Cgroup,
    Daemon,
    Leader,
    alive,
    broken_promise,
    end_process,
    has_ended,
    read_proc,
    repeat_until,
)
from scarcity import bad_time, faulty, limited, lowest_free_descriptor

from agent import client

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

NOT_WITHIN = WORKERS_GONE_S * 5  # where all of it had failed before


@contextlib.contextmanager
def the_same_core(daemon: Daemon) -> Iterator[None]:
    """Fail where the core ends meanwhile, or tells of something that nobody has foreseen."""
    pidfd = os.pidfd_open(daemon.pid)
    try:
        yield
        answers(daemon)
        assert not has_ended(pidfd), daemon.read_log()[-3000:]
        assert "Traceback" not in daemon.read_log()
    finally:
        os.close(pidfd)


def victims(daemon: Daemon, start_leader: StartLeader, count: int, uid: int | None = None) -> list[Leader]:
    return [start_leader("victim.py", socket=daemon.socket, uid=uid) for _ in range(count)]


def reap(leader: Leader) -> None:
    """Have a leader die; its workers must end as fast as promised."""
    leader.kill9()
    assert broken_promise(leader) == ""


def ends_late(daemon: Daemon, leader: Leader, *, kinds: Sequence[str] = ("reaped",)) -> None:
    """Whom nobody could end at the time must be ended soon now, and on record."""
    assert leader.wait_all_gone(NOT_WITHIN) == []
    assert daemon.wait_end(leader.session)["kind"] in kinds


# -- nothing left to be had -------------------------------------------------------------------------


@pytest.mark.parametrize("free", [0, 3])
def test_without_descriptors_nobody_is_forgotten_and_new_ones_are_found_later(
    free: int, daemon: Daemon, start_leader: StartLeader
) -> None:
    early, stays, dead = victims(daemon, start_leader, 3)
    with the_same_core(daemon):
        with limited(daemon.pid, resource.RLIMIT_NOFILE, lowest_free_descriptor(daemon.pid) + free):
            early.kill9()
            late = start_leader("victim.py", socket=daemon.socket)
            dead.kill9()
            repeat_until(lambda: "cannot" in daemon.read_log() or None, 10, "nothing has failed")
        ends_late(daemon, early)
        ends_late(daemon, dead)
        daemon.wait_listed(late.pid, late.family.workers)
        reap(late)
        assert stays.still_alive([stays.pid, *stays.family.workers]) == [stays.pid, *stays.family.workers]
        reap(stays)


def test_where_few_files_may_be_open_only_so_many_sessions_are_taken_on_as_can_be_ended(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(inside=["sh", "-c", 'ulimit -n 64; exec "$@"', "few"])
    assert "only 64 files may be open" in daemon.read_log()
    leaders = {leader.pid: leader for leader in victims(daemon, start_leader, 9)}
    refused = "".join(leader.read_log() for leader in leaders.values())
    with the_same_core(daemon):
        while leaders:
            watched = repeat_until(
                lambda: (
                    [pid for one in daemon.sessions() if (pid := one["leader"]["pid"]) in leaders] or None
                ),
                60,
                "who was refused is not found by the page though there is room",
            )
            assert len(watched) <= 7
            for pid in watched:
                leaders[pid].signal(signal.SIGKILL)
            for pid in watched:
                assert broken_promise(leaders.pop(pid)) == ""
    assert "the daemon's limit of open files allows no more" in refused


@pytest.fixture
def pids_cgroup(run: str) -> Iterator[Cgroup]:
    root = "/sys/fs/cgroup/pids"
    if not os.access(f"{root}/cgroup.procs", os.W_OK):
        pytest.skip("no cgroup that counts processes (v1) is mounted here")
    group = Cgroup(root, f"{run}-pids")
    yield group
    group.remove()


@pytest.mark.needs_root
def test_where_pids_have_run_out_even_for_root_nobody_is_lost(
    daemon: Daemon, start_leader: StartLeader, pids_cgroup: Cgroup
) -> None:
    early, stays = victims(daemon, start_leader, 2)
    with the_same_core(daemon):
        pids_cgroup.write("cgroup.procs", str(daemon.pid))
        pids_cgroup.write("pids.max", "1")
        for pid in daemon.children():
            end_process(pid)  # its gate, for one
        early.kill9()
        repeat_until(lambda: "cannot start the gate" in daemon.read_log() or None, 10, "it was started")
        pids_cgroup.write("pids.max", "max")
        ends_late(daemon, early)
        reap(stays)


@pytest.mark.parametrize(("kind", "seed", "gap"), [("memory", 1, 1000), ("files", 8, 600)])
def test_whatever_fails_for_want_of_memory_or_files_is_tried_again(
    kind: str, seed: int, gap: int, start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    """One call in a few hundred of the daemon's own fails, wherever that is: ``support/faulty.py``."""
    daemon = start_daemon(inside=faulty(kind, seed, gap))
    leaders = victims(daemon, start_leader, 3)
    with the_same_core(daemon):
        with bad_time(daemon):
            for leader in leaders[:2]:
                reap_latency(leader, 0.5)  # or not: that is no time for promises
        answers(daemon)  # a gate that could not be started again and again is tried again after some seconds
        for leader in leaders[:2]:
            # Who was signalled in the very moment that nothing could be noted may have ended as if by itself.
            ends_late(daemon, leader, kinds=("reaped", "ended"))
        stays = leaders[2]
        assert stays.still_alive(stays.family.workers) == stays.family.workers
        reap(stays)


@pytest.mark.needs_root
def test_where_memory_runs_out_the_gate_goes_before_the_core(start_daemon: StartDaemon) -> None:
    """As its unit has the core: where it may not be lowered, neither is protected."""
    protected = ["sh", "-c", 'echo -900 >/proc/self/oom_score_adj 2>/dev/null; exec "$@"', "protected"]
    daemon = start_daemon(inside=protected)
    answers(daemon)
    gate = gate_of(daemon)
    assert gate is not None
    assert read_proc(gate, "oom_score_adj") == b"0\n"
    assert int(read_proc(daemon.pid, "oom_score_adj")) <= 0


@pytest.mark.needs_root
def test_whomever_the_oom_killer_takes_of_the_daemon_no_session_is_lost(
    start_daemon: StartDaemon, start_leader: StartLeader, memory_cgroup: Callable[[str], Cgroup]
) -> None:
    """The gate, a helper or the core itself, which a service manager starts again."""
    group = memory_cgroup("daemon")
    enter = f'echo $$ > "{group.path}/cgroup.procs"; exec "$@"'
    daemon = start_daemon(inside=["sh", "-c", enter, "enter"])
    early, stays = victims(daemon, start_leader, 2)
    in_use = next(
        name for name in ("memory.usage_in_bytes", "memory.current") if os.path.exists(f"{group.path}/{name}")
    )
    limit = in_use.replace("usage", "limit").replace("current", "max")
    kills = "memory.oom_control" if in_use == "memory.usage_in_bytes" else "memory.events"
    group.write(limit, str(int(group.read(in_use)) + 65536))
    early.kill9()

    def somebody_went() -> bool | None:
        with contextlib.suppress(client.Unreachable):
            client.request(daemon.socket, {"op": "ps"}, timeout_s=0.2)
        return True if int(group.read(kills).split("oom_kill ")[1].split()[0]) else None

    repeat_until(somebody_went, 20, "nobody was ended by the OOM killer")
    group.write(limit, "-1" if in_use == "memory.usage_in_bytes" else "max")

    def is_back() -> bool | None:
        if daemon.process.poll() is not None:
            daemon.start()
        with contextlib.suppress(client.Unreachable):
            return client.request(daemon.socket, {"op": "ping"}, timeout_s=0.5)["ok"]
        return None

    repeat_until(is_back, 20, "the daemon does not come back")
    assert early.wait_all_gone(NOT_WITHIN) == []
    daemon.wait_end(early.session)  # all may have ended before the core was ended itself
    reap(stays)


# -- the disk ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk(daemon: Daemon, size: str = "512k") -> Iterator[None]:
    """Mount a small disk where the daemon keeps its state; the daemon, which must not run yet, ends with the block."""
    os.makedirs(daemon.state, mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=700,size={size}", "disk", daemon.state], check=True)
    try:
        yield
        daemon.stop()
    finally:
        daemon.kill9()
        subprocess.run(["umount", "--lazy", daemon.state], check=True)


def fill(directory: str) -> str:
    """Fill the disk that ``directory`` is on; return the file that does."""
    path = os.path.join(directory, "filler")
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    return path


@pytest.mark.needs_root
def test_on_a_full_disk_sessions_come_and_go_and_the_history_is_written_when_there_is_room(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(started=False)
    with disk(daemon):
        daemon.start()
        filler = fill(daemon.state)
        one, two, three = victims(daemon, start_leader, 3)
        reap(one)
        done = daemon.ctl("stop", three.session)  # which waits to be told of its end
        assert done.returncode == 0, done.stderr
        assert daemon.read_log().count("cannot use the state database") == 1
        os.unlink(filler)
        for leader in (one, three):
            assert [e["kind"] for e in daemon_events(daemon, leader)] == ["registered", "reaped"]
        fill(daemon.state)
        daemon.kill9()
        daemon.start()
        assert daemon.session_of(two.pid) is not None
        reap(two)


def daemon_events(daemon: Daemon, leader: Leader) -> list[dict[str, object]]:
    """Return what is on record of a session, once its end is."""
    daemon.wait_end(leader.session)
    return daemon.events(session=leader.session)


@pytest.mark.needs_root
def test_whoever_is_protected_stays_so_on_a_full_disk_and_over_a_reload(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(started=False)
    with disk(daemon):
        daemon.start()
        (leader,) = victims(daemon, start_leader, 1)
        daemon.wait_listed(leader.pid, leader.family.workers)
        filler = fill(daemon.state)
        kept = leader.family.workers[0]
        assert daemon.ctl("protect", str(kept)).returncode == 0
        daemon.reload()
        repeat_until(lambda: "reloaded" in daemon.read_log() or None, 10, "it was not reloaded")
        leader.kill9()
        assert leader.wait_all_gone(WORKERS_GONE_S, besides=[kept]) == []
        os.unlink(filler)
        daemon.wait_end(leader.session)
        assert alive(kept)
        leader.end_family()


@pytest.mark.needs_root
def test_a_state_directory_that_cannot_be_written_to_keeps_the_daemon_from_nothing(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(started=False)
    with disk(daemon, "4m"):
        daemon.start()
        (one,) = victims(daemon, start_leader, 1)
        daemon.kill9()
        remounted = [
            "mount",
            "-o",
            "remount,ro",
            "disk",
            daemon.state,
        ]  # busy until its helpers have ended, too
        repeat_until(lambda: subprocess.run(remounted, check=False).returncode == 0 or None, 10, "it is busy")
        daemon.start()
        assert daemon.session_of(one.pid) is not None
        reap(one)
        (two,) = victims(daemon, start_leader, 1)
        reap(two)
        assert daemon.read_log().count("attempt to write a readonly database") == 1


def test_a_disk_that_fails_under_the_daemon_delays_nobody(daemon: Daemon, start_leader: StartLeader) -> None:
    one, two = victims(daemon, start_leader, 2)
    with the_same_core(daemon):
        with limited(daemon.pid, resource.RLIMIT_FSIZE, 0):  # no write goes through; the log's neither
            reap(one)
            late = start_leader("victim.py", socket=daemon.socket)
            reap(late)
        reap(two)
        for leader in (one, late, two):
            assert [e["kind"] for e in daemon_events(daemon, leader)] == ["registered", "reaped"]


def test_a_state_file_that_somebody_keeps_locked_delays_nobody_and_loses_nothing(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    leaders = victims(daemon, start_leader, 3)
    with the_same_core(daemon):
        path = os.path.join(daemon.state, "reaper.db")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            late = start_leader("victim.py", socket=daemon.socket)
            for leader in (*leaders, late):
                leader.signal(signal.SIGKILL)
            for leader in (*leaders, late):
                assert broken_promise(leader) == ""
            assert answers(daemon) < 1.0
            other.execute("ROLLBACK")
        for leader in (*leaders, late):
            assert [e["kind"] for e in daemon_events(daemon, leader)] == ["registered", "reaped"]


def _truncate_log(state: str) -> None:
    os.truncate(f"{state}/reaper.db-wal", 0)


def _remove_log(state: str) -> None:
    os.unlink(f"{state}/reaper.db-wal")


def _garble(state: str) -> None:
    for name in ("reaper.db", "reaper.db-wal"):
        with open(f"{state}/{name}", "r+b") as file:
            file.write(os.urandom(os.path.getsize(file.name)))


def _remove_all(state: str) -> None:
    for name in os.listdir(state):
        os.unlink(f"{state}/{name}")


@pytest.mark.parametrize("damage", [_truncate_log, _remove_log, _garble, _remove_all])
def test_damage_to_the_files_of_a_daemon_that_runs_costs_history_alone(
    damage: Callable[[str], None], daemon: Daemon, start_leader: StartLeader
) -> None:
    one, two, three = victims(daemon, start_leader, 3)
    with the_same_core(daemon):
        damage(daemon.state)
        reap(one)
        late = start_leader("victim.py", socket=daemon.socket)
        reap(late)
    daemon.kill9()
    two.kill9()
    daemon.start()
    assert two.wait_all_gone(NOT_WITHIN) == []
    daemon.wait_listed(three.pid, three.family.workers)
    reap(three)


# -- who reads the log ------------------------------------------------------------------------------


def test_a_log_that_nobody_reads_delays_no_reap(start_daemon: StartDaemon, start_leader: StartLeader) -> None:
    reader, writer = os.pipe()
    try:
        daemon = start_daemon(started=False)
        kept, daemon.log = daemon.log, f"/proc/self/fd/{writer}"
        daemon.start()
        daemon.log = kept
        one, two = victims(daemon, start_leader, 2)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(writer, b"x" * 4096):
                pass
        reap(one)
        reap(two)
        answers(daemon)
        select.select([reader], [], [])
        while len(os.read(reader, 1 << 20)) == 1 << 20:
            pass
        late = start_leader("victim.py", socket=daemon.socket)
        assert b"records of this log were lost" in os.read(reader, 1 << 20)
        reap(late)
        daemon.stop()
    finally:
        os.close(reader)
        os.close(writer)


# -- signals ----------------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_only_its_own_user_can_signal_the_daemon_and_a_storm_of_reloads_delays_no_reap(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    one, two = victims(daemon, start_leader, 2)
    with the_same_core(daemon):
        tried = subprocess.run(
            ["setpriv", f"--reuid={STRANGER}", "--clear-groups", "sh", "-c", f"kill -9 {daemon.pid}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert tried.returncode != 0
        storm = subprocess.Popen(
            ["sh", "-c", f"while kill -HUP {daemon.pid}; do :; done"], stderr=subprocess.DEVNULL
        )
        try:
            repeat_until(lambda: daemon.read_log().count("reloaded") > 5 or None, 10, "it is reloaded")
            reap(one)
            reap(two)
        finally:
            storm.kill()
            storm.wait()
