"""Leaders and workers in namespaces of their own: containers, as far as one can have them without an image."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable

import pytest
from harness import GRACE_S, ROOT, WORKERS_GONE_S, Daemon, Leader, Scratch, broken_promise, pids_within

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

SIGKILLED = {"kind": "signal", "code": 9}
pytestmark = pytest.mark.needs_root

# A shell is the init of it, which outlives the leader, and gives it our stdin ("&" alone would take that away).
INIT = 'exec 3<&0; "$@" <&3 & wait; exec sleep 100'
PID_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", INIT, "init"]
TIME_NAMESPACE = ["unshare", "--time", "--boottime", "1000000", "--fork"]
BOTH_NAMESPACES = [*TIME_NAMESPACE, *PID_NAMESPACE[1:]]
USER_NAMESPACE = ["unshare", "--user", "--map-root-user"]
# A root of its own at $1, whose /proc, /tmp and /dev/shm show nothing of ours but the directories in $2.
CONTAINER = f"""
root=$1 shown="$2 $REAPER_TEST_DIR"; shift 2
mount -t tmpfs tmpfs "$root"
for path in /*; do case $path in
    /proc|/sys|/tmp|/run) mkdir "$root$path" ;;
    *) if [ -L "$path" ]; then cp -P "$path" "$root$path"
       elif [ -d "$path" ]; then mkdir "$root$path" && mount --rbind "$path" "$root$path"; fi ;;
esac; done
mount -t proc proc "$root/proc" && mount -t tmpfs tmpfs "$root/dev/shm"
for path in $shown; do mkdir -p "$root$path" && mount --bind "$path" "$root$path"; done
exec chroot "$root" sh -c '{INIT}' init "$@"
"""
# The daemon's socket directory at another place, and nothing at its own.
ELSEWHERE = """
socket=$1; shift
mount -t tmpfs tmpfs /mnt && mkdir /mnt/reaper && mount --bind "$socket" /mnt/reaper && mount -t tmpfs tmpfs "$socket"
exec "$@"
"""


def container(daemon: Daemon, scratch: Scratch) -> list[str]:
    """Return a command that runs another one as in a container that was given the daemon's socket directory."""
    shown = f"{os.path.dirname(daemon.socket)} {ROOT}"
    before_the_init = BOTH_NAMESPACES[: BOTH_NAMESPACES.index("sh")]
    return [*before_the_init, "sh", "-c", CONTAINER, "container", scratch.directory("r"), shown]


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


@pytest.mark.parametrize("late", [False, True], ids=["registered", "adopted"])
@pytest.mark.parametrize("kind", ["subprocess", "scrubbed"])
def test_a_leader_in_a_pid_namespace_that_dies_before_the_first_scan_leaves_nothing(
    kind: str, late: bool, start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    """What it leaves is adopted by the init of that namespace, whom no look has seen adopt anybody."""
    daemon = start_daemon(
        started=not late, config=f'[scan]\ninterval = "1h"\n[kill]\ngrace = "{GRACE_S:g}s"\n'
    )
    leader = start_leader("kin.py", kind, socket=daemon.socket, inside=PID_NAMESPACE)
    if late:
        daemon.start()
    leader.kill9()
    assert leader.wait_all_gone(WORKERS_GONE_S, besides=leader.container) == []
    assert daemon.wait_end(leader.session)["cause"] == SIGKILLED


@pytest.mark.parametrize(
    ("place", "daemon_is"),
    [
        *itertools.product(["pid", "time"], ["there", "late"]),
        *itertools.product(["both"], ["restarted", "forgetful"]),
        *itertools.product(["container"], ["there", "restarted", "late", "forgetful"]),
    ],
)
def test_wherever_a_leader_lives_it_is_reaped_whatever_becomes_of_the_daemon(
    place: str, daemon_is: str, start_daemon: StartDaemon, start_leader: StartLeader, scratch: Scratch
) -> None:
    daemon = start_daemon(started=daemon_is != "late")
    places = {"pid": PID_NAMESPACE, "time": TIME_NAMESPACE, "both": BOTH_NAMESPACES}
    inside = places.get(place) or container(daemon, scratch)
    leader = start_leader("kin.py", "everything-left", socket=daemon.socket, inside=inside)
    if daemon_is == "late":
        daemon.start()
    elif daemon_is == "restarted":
        daemon.restart()
    elif daemon_is == "forgetful":
        daemon.kill9()
        shutil.rmtree(daemon.state)
        daemon.start()
    assert len(pids_within(leader.pid)) == (1 if place == "time" else 2)
    daemon.wait_listed(leader.pid, leader.family.workers)
    leader.kill9()
    assert leader.wait_all_gone(WORKERS_GONE_S, besides=leader.container) == []
    event = daemon.wait_end(leader.session)
    assert event["cause"] == SIGKILLED
    assert {one["pid"] for one in event["processes"]} == set(leader.family.workers)


@pytest.mark.parametrize("restart", [False, True], ids=["", "restarted"])
def test_a_leader_that_knows_the_socket_by_another_path_is_reaped(
    restart: bool, daemon: Daemon, start_leader: StartLeader
) -> None:
    inside = ["unshare", "--mount", "sh", "-c", ELSEWHERE, "elsewhere", os.path.dirname(daemon.socket)]
    leader = start_leader("kin.py", "everything-left", socket="/mnt/reaper/reaper.sock", inside=inside)
    if restart:
        daemon.restart()
    daemon.wait_listed(leader.pid, leader.family.workers)
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


def test_a_leader_in_a_user_namespace_is_reaped(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("kin.py", "everything-left", socket=daemon.socket, inside=USER_NAMESPACE)
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)
