"""A leader is SIGKILLed, and nothing it started outlives it: one case for every way to start a worker.

Without Reaper all of these survive, save the idle workers of a multiprocessing pool.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from harness import (
    WORKERS_GONE_S,
    Daemon,
    Leader,
    alive,
    broken_promise,
    list_shm,
    parent_of,
    test_environment,
)

SIGKILLED = {"kind": "signal", "code": 9}


@dataclass(frozen=True)
class Case:
    """One training script, and how many workers and trackers it must at least have reported."""

    name: str
    command: tuple[str, ...]
    workers: int = 2
    trackers: int = 0


def pools(name: str, *arguments: str, workers: int = 2, trackers: int = 0) -> Case:
    return Case(name, ("pools.py", *arguments), workers, trackers)


def kin(kind: str, workers: int) -> Case:
    return Case(kind, ("kin.py", kind), workers)


METHODS = ("fork", "spawn", "forkserver")
CASES = [
    *(pools(f"joblib-loky-{load}", "joblib-loky", f"--{load}", trackers=2) for load in ("busy", "idle")),
    pools("joblib-loky-memmap", "memmap", "--busy", trackers=2),
    Case("sklearn-gridsearch", ("gridsearch.py",), trackers=2),
    *(pools(f"joblib-multiprocessing-{load}", "joblib-mp", f"--{load}") for load in ("busy", "idle")),
    *(
        pools(
            f"{kind}-{method}-{load}",
            kind,
            "--method",
            method,
            f"--{load}",
            workers={"fork": 2, "spawn": 2, "forkserver": 3}[method],
            trackers=0 if method == "fork" else 1,
        )
        for kind in ("pool", "executor")
        for method in METHODS
        for load in ("busy", "idle")
    ),
    pools("daemonic-process-fork", "process", "--busy"),
    pools("daemonic-process-spawn", "process", "--busy", "--method", "spawn", trackers=1),
    pools("shared-memory", "shared-memory", trackers=1),
    pools("pool-before-register", "pool", "--busy", "--late"),
    pools("executor-before-register", "executor", "--idle", "--late"),
    pools("loky-before-register", "loky", "--idle", "--late", trackers=2),
    kin("subprocess", 2),
    kin("setsid", 3),
    kin("double-fork", 1),
    kin("scrubbed", 2),
    kin("deep", 5),
    kin("stubborn", 3),
    kin("forks-on-term", 1),
    kin("keeps-forking", 4),
    kin("nested", 4),
    kin("stopped", 2),
    kin("hostile-names", 2),
    kin("headless", 1),
]


def assert_reaped(daemon: Daemon, leader: Leader) -> None:
    """Nothing lives on, nothing is left in /dev/shm, and the event says why."""
    assert broken_promise(leader) == ""
    event = daemon.wait_end(leader.session)
    assert event["cause"] == SIGKILLED
    assert [path for path in leader.family.shm if os.path.exists(path)] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_that_a_leader_started_outlives_its_sigkill(
    case: Case, daemon: Daemon, start_leader: Callable[..., Leader]
) -> None:
    leader = start_leader(*case.command, socket=daemon.socket)
    assert len(leader.family.workers) >= case.workers
    assert len(leader.family.trackers) >= case.trackers
    assert leader.living(), "the script must have processes that can outlive it"
    leader.kill9()
    assert_reaped(daemon, leader)


@pytest.mark.parametrize("parent", ["waits", "leaves", "subreaper"])
@pytest.mark.parametrize("kind", ["setsid", "scrubbed", "deep"])
def test_whoever_the_leader_s_parent_is_its_orphans_are_found(
    kind: str, parent: str, daemon: Daemon, start_leader: Callable[..., Leader]
) -> None:
    leader = start_leader("kin.py", kind, socket=daemon.socket, parent=parent)
    if parent == "subreaper":  # only who was seen as a member before proves that it adopts
        adopted = parent_of(leader.pid)
        daemon.wait_listed(leader.pid, [pid for pid in leader.family.workers if parent_of(pid) != adopted])
    leader.kill9()
    assert_reaped(daemon, leader)


def test_leaders_that_end_together_are_all_reaped_in_time(
    daemon: Daemon, start_leader: Callable[..., Leader]
) -> None:
    leaders = [start_leader("kin.py", "subprocess", socket=daemon.socket) for _ in range(8)]
    for leader in leaders:
        leader.signal(signal.SIGKILL)
    for leader in leaders:
        leader.wait_dead()
        assert_reaped(daemon, leader)


def test_a_memory_mapped_array_is_really_in_shared_memory_and_is_freed(
    daemon: Daemon, start_leader: Callable[..., Leader]
) -> None:
    leader = start_leader("pools.py", "memmap", "--busy", socket=daemon.socket)
    held = sum(entry.stat().st_size for folder in leader.family.shm for entry in os.scandir(folder))
    assert held >= 20 << 20
    leader.kill9()
    assert broken_promise(leader) == ""
    event = daemon.wait_end(leader.session)
    assert event["freed"]["shm_bytes"] >= 20 << 20
    assert not [entry for entry in list_shm() if f"_{leader.pid}_" in entry or f"-{leader.pid}-" in entry]


def test_a_child_that_was_given_an_environment_without_the_stamp_is_known_from_a_scan(
    daemon: Daemon, start_leader: Callable[..., Leader]
) -> None:
    leader = start_leader("kin.py", "bare-environment", socket=daemon.socket)
    daemon.wait_listed(leader.pid, leader.family.workers)
    leader.kill9()
    assert_reaped(daemon, leader)


def test_what_a_forkserver_from_before_register_forks_afterwards_is_known_from_a_scan(
    daemon: Daemon, start_leader: Callable[..., Leader]
) -> None:
    leader = start_leader("pools.py", "forkserver", "--late", socket=daemon.socket)
    later = leader.ask("fork")["pids"]
    assert len(later) == 2
    daemon.wait_listed(leader.pid, later)
    leader.kill9()
    assert_reaped(daemon, leader)
    assert leader.still_alive(later) == []


def test_a_process_that_is_never_long_the_same_is_caught(
    daemon: Daemon, start_leader: Callable[..., Leader]
) -> None:
    """It forks and exits every 5 ms, for 20 s, if nobody stops it."""
    leader = start_leader("kin.py", "hops", socket=daemon.socket)
    leader.kill9()
    assert leader.wait_released(WORKERS_GONE_S), "the process hops on"
    daemon.wait_end(leader.session)


def test_the_sigkill_of_an_inner_leader_ends_its_workers_and_nobody_else(
    daemon: Daemon, start_leader: Callable[..., Leader]
) -> None:
    outer = start_leader("kin.py", "nested", socket=daemon.socket)
    inner = outer.family.facts["inner"]
    session = inner["lineage"].rpartition(":")[2]
    theirs = inner["pids"]["worker"]
    ours = [pid for pid in outer.family.workers if pid not in (*theirs, inner["leader"])]
    assert len(theirs) == 2
    assert len(ours) == 1
    os.kill(inner["leader"], 9)
    event = daemon.wait_end(session)
    assert event["cause"] == SIGKILLED
    assert outer.still_alive(theirs) == []
    assert outer.still_alive([outer.pid, *ours]) == [outer.pid, *ours]
    outer.kill9()
    assert_reaped(daemon, outer)


def test_the_sigkill_of_an_outer_leader_ends_the_inner_leader_and_its_workers(
    daemon: Daemon, start_leader: Callable[..., Leader]
) -> None:
    outer = start_leader("kin.py", "nested", socket=daemon.socket)
    inner = outer.family.facts["inner"]
    outer.kill9()
    assert_reaped(daemon, outer)
    assert outer.still_alive([inner["leader"], *inner["pids"]["worker"]]) == []
    daemon.wait_end(inner["lineage"].rpartition(":")[2])


def assert_watched_until_it_is_killed(daemon: Daemon, leader: Leader) -> None:
    """Assert that the leader counts as alive, for a daemon that comes later too, and that its end is noticed."""
    daemon.wait_listed(leader.pid, leader.family.workers)
    daemon.restart()
    daemon.wait_listed(leader.pid, leader.family.workers)
    assert leader.still_alive([leader.pid, *leader.family.workers]) == [leader.pid, *leader.family.workers]
    leader.kill9()
    assert_reaped(daemon, leader)


def test_a_leader_whose_main_thread_has_ended_lives_as_long_as_another_thread_does(
    daemon: Daemon, start_leader: Callable[..., Leader]
) -> None:
    leader = start_leader("kin.py", "subprocess", "--headless", socket=daemon.socket)
    assert_watched_until_it_is_killed(daemon, leader)


def test_a_stopped_leader_is_alive(daemon: Daemon, start_leader: Callable[..., Leader]) -> None:
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    leader.signal(signal.SIGSTOP)
    assert_watched_until_it_is_killed(daemon, leader)


def test_a_leader_that_execs_itself_and_registers_again_leaves_nothing_of_either_life(
    daemon: Daemon, start_leader: Callable[..., Leader]
) -> None:
    leader = start_leader("kin.py", "execs-itself", socket=daemon.socket, up=False)
    first = leader.read_line()
    leader.up()
    for pid in first["pids"]:
        leader.hold(pid)
    leader.kill9()
    assert leader.wait_all_gone(WORKERS_GONE_S) == []
    assert leader.still_alive(first["pids"]) == []
    daemon.wait_end(leader.session)
    daemon.wait_end(first["before_exec"])


def test_while_the_leader_lives_nobody_is_touched(
    daemon: Daemon, start_leader: Callable[..., Leader]
) -> None:
    leader = start_leader("pools.py", "executor", "--idle", "--method", "forkserver", socket=daemon.socket)
    daemon.wait_listed(leader.pid, leader.family.workers)  # so it has been scanned
    assert all(map(alive, [leader.pid, *leader.family.everyone]))
    leader.ask("ping")
    leader.kill9()
    assert_reaped(daemon, leader)


def test_ps_shows_leader_name_and_every_worker_with_its_evidence(
    daemon: Daemon, start_leader: Callable[..., Leader]
) -> None:
    leader = start_leader("pools.py", "joblib-loky", "--idle", socket=daemon.socket)
    daemon.wait_listed(leader.pid, leader.family.everyone)
    session = daemon.session_of(leader.pid)
    assert session is not None
    assert session["id"] == leader.session
    assert session["name"] == "joblib-loky"
    assert session["state"] == "running"
    roles = {
        role: {w["pid"] for w in session["workers"] if w["role"] == role} for role in ("worker", "tracker")
    }
    assert roles == {"worker": set(leader.family.workers), "tracker": set(leader.family.trackers)}
    assert all(worker["evidence"] for worker in session["workers"])
    assert {w["framework"] for w in session["workers"] if w["role"] == "worker"} == {"loky"}
    leader.kill9()
    assert_reaped(daemon, leader)


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "ends by itself"])
def test_names_in_shared_memory_of_a_leader_that_left_nobody_go_only_where_it_ended_badly(
    killed: bool, run: str, daemon: Daemon
) -> None:
    """Its tracker may have been ended with it, as where a terminal is closed."""
    script = (
        "import agent, os, signal; agent.register('alone'); "
        "path = f'/dev/shm/joblib_memmapping_folder_{os.getpid()}_x'; os.mkdir(path); print(path, flush=True); "
        + ("os.kill(os.getpid(), 9)" if killed else "")
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=test_environment(run, REAPER_SOCKET=daemon.socket),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    path = done.stdout.strip()
    try:
        event = daemon.wait_event(kind="ended", name="alone")
        assert event["processes"] == []
        assert os.path.exists(path) != killed
    finally:
        if os.path.exists(path):
            os.rmdir(path)
