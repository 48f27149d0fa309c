"""Who lives on when a leader is reaped: what was spared, and all that only looks like family."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable

import pytest
from harness import (
    EXIT_GRACE_S,
    GRACE_S,
    SETTINGS,
    STRANGER,
    TRACKERS_GONE_S,
    Cgroup,
    Daemon,
    Leader,
    alive,
    as_user,
    broken_promise,
    end_process,
    entering,
    parent_of,
    test_environment,
)

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]
StartProcess = Callable[..., "subprocess.Popen[bytes]"]

SLEEPER = ["sleep", "100"]
# Says its pid once it is what it will be, and lets go of stdout.
JOB = ["sh", "-c", "echo $$; exec sleep 100 >/dev/null"]


def reap(daemon: Daemon, leader: Leader) -> None:
    """SIGKILL the leader and return once its session is over."""
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


def reap_and_go_on(daemon: Daemon, leader: Leader, start_leader: StartLeader) -> None:
    """Reap the leader's session, then let the daemon look at every process again, also after a restart."""
    reap(daemon, leader)
    a_scan_later(daemon, start_leader)
    daemon.restart()
    a_scan_later(daemon, start_leader)


def a_scan_later(daemon: Daemon, start_leader: StartLeader) -> None:
    """Return once the daemon has looked at every process again."""
    leader = start_leader("kin.py", "bare-environment", socket=daemon.socket)
    daemon.wait_listed(leader.pid, leader.family.workers)
    reap(daemon, leader)


def stamp_of(leader: Leader) -> dict[str, str]:
    """Return what a process has in its environment that copied it from a worker of ``leader``."""
    assert leader.family.lineage is not None
    return {"REAPER_LINEAGE": leader.family.lineage}


def left_alone(daemon: Daemon, session: str) -> str:
    """Return the event that closed ``session`` as text: it must name those who were left alone."""
    return json.dumps(daemon.wait_end(session))


def test_spared_processes_and_what_they_start_outlive_the_leader(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", "spared", socket=daemon.socket)
    spared = leader.spared
    assert len(spared) == 5
    assert len(leader.family.workers) == 2
    session = daemon.session_of(leader.pid)
    assert session is not None
    assert not {worker["pid"] for worker in session["workers"]} & set(spared)
    reap_and_go_on(daemon, leader, start_leader)
    assert leader.still_alive(spared) == spared
    leader.end_spared()


@pytest.mark.parametrize("parent", ["waits", "leaves", "subreaper"])
def test_spared_processes_outlive_the_leader_whoever_adopts_them(
    parent: str, daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", "spared", socket=daemon.socket, parent=parent)
    if parent == "subreaper":  # only who was seen as a member before proves that it adopts
        adopted = parent_of(leader.pid)
        daemon.wait_listed(leader.pid, [pid for pid in leader.family.workers if parent_of(pid) != adopted])
    reap(daemon, leader)
    assert leader.still_alive(leader.spared) == leader.spared
    leader.end_spared()


def test_unrelated_processes_live_on(
    daemon: Daemon, start_leader: StartLeader, start_process: StartProcess
) -> None:
    before = start_process(SLEEPER)
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    after = start_process([sys.executable, "-c", "import time; time.sleep(100)"])
    reap_and_go_on(daemon, leader, start_leader)
    assert alive(before.pid)
    assert alive(after.pid)


def test_another_session_lives_on(daemon: Daemon, start_leader: StartLeader) -> None:
    one = start_leader("pools.py", "executor", "--idle", "--method", "spawn", socket=daemon.socket)
    other = start_leader("pools.py", "executor", "--idle", "--method", "spawn", socket=daemon.socket)
    reap(daemon, one)
    everyone = [other.pid, *other.family.everyone]
    assert other.still_alive(everyone) == everyone
    reap(daemon, other)


def queued_job(leader: Leader, start_process: StartProcess) -> tuple[subprocess.Popen[bytes], int]:
    """Return a queue system's daemon, and the pid of the job that it started with the leader's stamp copied."""
    script = f'env REAPER_LINEAGE="$STAMP" {shlex.join(JOB)} & wait'
    queue = start_process(["sh", "-c", script], STAMP=stamp_of(leader)["REAPER_LINEAGE"])
    assert queue.stdout is not None
    job = int(queue.stdout.readline())
    return queue, job


def test_a_process_with_the_stamp_whose_parent_is_not_of_the_family_lives_on(
    daemon: Daemon, start_leader: StartLeader, start_process: StartProcess
) -> None:
    """A queue system's own daemon starts jobs with the environment that the submitter had."""
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    queue, job = queued_job(leader, start_process)
    assert parent_of(job) == queue.pid
    reap_and_go_on(daemon, leader, start_leader)
    assert alive(queue.pid)
    assert alive(job)
    assert str(job) in left_alone(daemon, leader.session)
    end_process(job)


def orphan(run: str, command: list[str], **more: str) -> int:
    """Start ``command``, which ends in JOB, as a child of init, and return its pid."""
    done = subprocess.run(
        ["sh", "-c", '"$@" &', "orphan", *command],
        env=test_environment(run, **more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.needs_root
def test_a_process_of_another_user_with_a_copied_stamp_lives_on(
    daemon: Daemon, start_leader: StartLeader, run: str
) -> None:
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    other = orphan(run, as_user(STRANGER, JOB), **stamp_of(leader))
    reap_and_go_on(daemon, leader, start_leader)
    assert alive(other)
    end_process(other)


@pytest.mark.needs_root
def test_children_that_became_another_user_live_on(daemon: Daemon, start_leader: StartLeader) -> None:
    """Marks count for processes of the leader's own uid alone."""
    env = {"REAPER_TEST_UID": str(STRANGER)}
    leader = start_leader("kin.py", "becomes-another-user", socket=daemon.socket, env=env)
    assert len(leader.spared) == 2
    reap_and_go_on(daemon, leader, start_leader)
    assert leader.still_alive(leader.spared) == leader.spared
    leader.end_spared()


@pytest.mark.needs_root
@pytest.mark.parametrize("where", ["its own cgroup", "the root cgroup"])
def test_a_queued_job_in_another_cgroup_lives_on(
    where: str,
    daemon: Daemon,
    start_leader: StartLeader,
    run: str,
    unified_cgroup: Callable[[str], Cgroup],
) -> None:
    """The job is a child of init and bears the leader's whole environment: only the cgroup tells it apart."""
    groups = [unified_cgroup("leader")] if where == "its own cgroup" else []
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket, groups=groups)
    job = orphan(run, entering([unified_cgroup("job")], JOB), **stamp_of(leader))
    assert parent_of(job) == 1
    reap_and_go_on(daemon, leader, start_leader)
    assert alive(job)
    assert str(job) in left_alone(daemon, leader.session)


@pytest.mark.needs_root
def test_workers_in_a_cgroup_below_the_leader_s_are_reaped(
    daemon: Daemon, start_leader: StartLeader, run: str, unified_cgroup: Callable[[str], Cgroup]
) -> None:
    group = unified_cgroup("leader")
    below = group.below("worker")
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket, groups=[group])
    for pid in leader.family.workers:
        below.write("cgroup.procs", str(pid))
    assert below.pids() == sorted(leader.family.workers)
    reap(daemon, leader)


def test_what_was_left_alone_when_a_session_ended_is_not_ended_later(
    daemon: Daemon, start_leader: StartLeader, start_process: StartProcess
) -> None:
    """Its parent dies after the session is over, and init adopts it."""
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    queue, job = queued_job(leader, start_process)
    reap(daemon, leader)
    queue.kill()
    queue.wait()
    assert parent_of(job) == 1
    a_scan_later(daemon, start_leader)
    assert alive(job)
    end_process(job)


def test_a_session_that_is_over_is_not_taken_on_again_for_what_was_spared(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", "spared", socket=daemon.socket)
    reap_and_go_on(daemon, leader, start_leader)
    assert leader.still_alive(leader.spared) == leader.spared
    assert [event["kind"] for event in daemon.events(session=leader.session)] == ["registered", "reaped"]
    leader.end_spared()


def test_unregister_lets_everything_live_while_the_leader_does(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    everyone = [leader.pid, *leader.family.workers]
    assert leader.ask("unregister")["lineage"] is None
    session = daemon.session_of(leader.pid)
    assert session is not None
    assert session["state"] == "ending"
    other = start_leader("kin.py", "subprocess", socket=daemon.socket)
    reap(daemon, other)  # so the daemon was busy in the meantime
    assert leader.still_alive(everyone) == everyone
    leader.tell("end")
    leader.wait_dead()
    assert leader.wait_all_gone(EXIT_GRACE_S + GRACE_S) == []
    daemon.wait_end(leader.session)


def test_what_scripts_leave_that_unregister_and_end_at_once_is_ended(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    """Nobody has looked at their workers before, and some leaders are dead before somebody does."""
    daemon = start_daemon(config=SETTINGS.replace("200ms", "1h"))
    leaders = [
        start_leader("kin.py", kind, socket=daemon.socket) for kind in ("subprocess", "double-fork") * 4
    ]
    for leader in leaders:
        leader.tell("unregister\nend")
    for leader in leaders:
        leader.wait_dead()
        assert leader.wait_all_gone(EXIT_GRACE_S + GRACE_S) == []
        assert daemon.wait_end(leader.session)["kind"] == "reaped"


@pytest.mark.parametrize(
    ("kind", "is_a_zombie"), [("double-fork", False), ("subprocess", True), ("double-fork", True)]
)
def test_a_daemon_that_comes_back_ends_what_an_unregistered_leader_leaves_wherever_that_stands(
    kind: str, is_a_zombie: bool, daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", kind, socket=daemon.socket)
    leader.ask("unregister")
    daemon.kill9()
    if is_a_zombie:
        leader.kill9()
    daemon.start()
    if not is_a_zombie:
        a_scan_later(daemon, start_leader)
        leader.kill9()
    assert leader.wait_all_gone(TRACKERS_GONE_S) == []
    daemon.wait_end(leader.session)


def test_an_unregistered_leader_s_trackers_and_forkserver_are_left_to_it(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("pools.py", "executor", "--idle", "--method", "forkserver", socket=daemon.socket)
    everyone = [leader.pid, *leader.family.everyone]
    leader.ask("unregister")
    later = leader.ask("fork")["pids"]
    daemon.wait_listed(leader.pid, leader.family.workers)
    assert leader.still_alive([*everyone, *later]) == [*everyone, *later]
    leader.kill9()
    assert leader.wait_all_gone(TRACKERS_GONE_S) == []
    daemon.wait_end(leader.session)
