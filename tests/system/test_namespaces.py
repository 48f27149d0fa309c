"""Leaders and workers in namespaces of their own: containers, as far as one can have them without an image."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from harness import WORKERS_GONE_S, Daemon, Leader, broken_promise, pids_within

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

pytestmark = pytest.mark.needs_root

# A shell is the init of it, which outlives the leader, and gives it our stdin ("&" alone would take that away).
INIT = 'exec 3<&0; "$@" <&3 & wait; exec sleep 100'
PID_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", INIT, "init"]
TIME_NAMESPACE = ["unshare", "--time", "--boottime", "1000000", "--fork"]
USER_NAMESPACE = ["unshare", "--user", "--map-root-user"]


@pytest.fixture(autouse=True)
def namespaces_can_be_made() -> None:
    for command in (PID_NAMESPACE[:4], TIME_NAMESPACE, USER_NAMESPACE):
        done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")


def test_a_worker_in_a_pid_namespace_of_its_own_is_reaped(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("kin.py", "own-pid-namespace", socket=daemon.socket)
    assert [pids_within(pid)[-1] for pid in leader.family.workers if len(pids_within(pid)) > 1] == [1]
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


@pytest.mark.parametrize("kind", ["everything-left", "scrubbed"])
@pytest.mark.parametrize("late", [False, True], ids=["registered", "adopted"])
def test_a_leader_in_a_pid_namespace_is_reaped_from_outside(
    kind: str, late: bool, start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(started=not late)
    leader = start_leader("kin.py", kind, socket=daemon.socket, inside=PID_NAMESPACE)
    assert len(pids_within(leader.pid)) == 2
    if late:
        daemon.start()
    session = daemon.session_of(leader.pid)
    assert session is not None
    assert session["id"] == leader.session
    leader.kill9()
    assert leader.wait_all_gone(WORKERS_GONE_S, besides=leader.container) == []
    assert daemon.wait_end(leader.session)["cause"] == {"kind": "signal", "code": 9}


@pytest.mark.parametrize("late", [False, True], ids=["registered", "adopted"])
def test_a_leader_whose_clock_is_another_is_reaped(
    late: bool, start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    """In a time namespace the start times in /proc are others."""
    daemon = start_daemon(started=not late)
    leader = start_leader("kin.py", "everything-left", socket=daemon.socket, inside=TIME_NAMESPACE)
    if late:
        daemon.start()
    session = daemon.session_of(leader.pid)
    assert session is not None
    leader.kill9()
    assert leader.wait_all_gone(WORKERS_GONE_S, besides=leader.container) == []
    assert daemon.wait_end(leader.session)["cause"] == {"kind": "signal", "code": 9}


def test_a_leader_in_a_user_namespace_is_reaped(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("kin.py", "everything-left", socket=daemon.socket, inside=USER_NAMESPACE)
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)
