"""Another user can neither end a session nor read what its processes are called with."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable

import pytest
from harness import NEIGHBOUR, OVERFLOW, STRANGER, Daemon, Leader, broken_promise, end_process

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

pytestmark = pytest.mark.needs_root

ORPHANS = """\
[scan]
interval = "0.2s"
orphan_age_limit = "1s"
memory_threshold = "1MiB"
"""
SECRET = "a-name-that-only-its-owner-may-read"


def test_another_user_cannot_stop_a_session(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    done = daemon.ctl("stop", leader.session, uid=STRANGER)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert leader.still_alive([leader.pid, *leader.family.workers]) == [leader.pid, *leader.family.workers]
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


@pytest.mark.parametrize("how", ["a unique prefix", "its name"])
def test_another_user_s_prefix_or_name_stops_nothing(
    how: str, daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", "subprocess", "--name", "mine", socket=daemon.socket)
    done = daemon.ctl("stop", leader.session[:10] if how == "a unique prefix" else "mine", uid=STRANGER)
    assert done.returncode in (1, 4), done.stderr  # it may not even learn that there is such a session
    assert leader.still_alive([leader.pid]) == [leader.pid]
    leader.kill9()
    daemon.wait_end(leader.session)


def test_another_user_sees_no_command_lines(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("pools.py", "executor", "--idle", "--method", "spawn", socket=daemon.socket)
    mine = next(s for s in daemon.ask("ps") if s["id"] == leader.session)
    assert any("executor" in word for word in mine["leader"]["cmdline"])
    done = daemon.ctl("ps", "--json", uid=STRANGER)
    assert done.returncode == 0, done.stderr
    theirs = [s for s in json.loads(done.stdout) if s["id"] == leader.session]
    assert all(s["leader"]["cmdline"] is None for s in theirs)
    for command in (("ps",), ("ps", "--json"), ("events", "--json"), ("status", "--json")):
        assert "multiprocessing.spawn" not in daemon.ctl(*command, uid=STRANGER).stdout
        assert "--method" not in daemon.ctl(*command, uid=STRANGER).stdout
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)
    assert "multiprocessing.spawn" not in daemon.ctl("events", "--json", uid=STRANGER).stdout


def test_a_user_stops_a_session_of_its_own_and_root_sees_it_all(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket, uid=STRANGER)
    (session,) = daemon.ask("ps")
    assert session["uid"] == STRANGER
    assert session["leader"]["cmdline"]
    (own,) = daemon.ask("ps", uid=STRANGER)
    assert own["leader"]["cmdline"] == session["leader"]["cmdline"]
    done = daemon.ctl("stop", leader.session, uid=STRANGER)
    assert done.returncode == 0, done.stderr
    assert leader.wait_all_gone(0) == []
    leader.wait_dead(0)
    event = daemon.wait_end(leader.session)
    assert (event["cause"]["kind"], event["cause"]["code"]) == ("signal", signal.SIGTERM)


def test_root_stops_the_session_of_a_user(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("kin.py", "stubborn", socket=daemon.socket, uid=STRANGER)
    done = daemon.ctl("stop", leader.session)
    assert done.returncode == 0, done.stderr
    assert leader.wait_all_gone(0) == []
    daemon.wait_end(leader.session)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_session_of_another_user_is_reaped(method: str, daemon: Daemon, start_leader: StartLeader) -> None:
    arguments = ("executor", "--idle", "--method", method)
    leader = start_leader("pools.py", *arguments, socket=daemon.socket, uid=STRANGER)
    leader.kill9()
    assert broken_promise(leader) == ""
    event = daemon.wait_end(leader.session)
    assert event["uid"] == STRANGER


def test_a_user_s_page_cannot_claim_the_processes_of_root(
    daemon: Daemon, start_leader: StartLeader, run: str
) -> None:
    """A user forges a stamp that names root's session: its own process bears it, and is nobody's."""
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    stamp = {"REAPER_LINEAGE": leader.session}
    forger = start_leader("kin.py", "subprocess", socket=daemon.socket, uid=STRANGER, env=stamp)
    everyone = [leader.pid, *leader.family.workers]
    forger.kill9()
    assert broken_promise(forger) == ""
    daemon.wait_end(forger.session)
    assert leader.still_alive(everyone) == everyone
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


def test_the_socket_is_for_everyone_and_the_state_for_root_alone(daemon: Daemon) -> None:
    assert os.stat(daemon.socket).st_mode & 0o777 == 0o666
    assert os.stat(os.path.dirname(daemon.socket)).st_mode & 0o777 == 0o755
    assert os.stat(daemon.state).st_mode & 0o077 == 0
    assert daemon.ctl("ping", uid=STRANGER).returncode == 0


def test_a_user_s_own_daemon_reaps_its_sessions_and_is_its_alone(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(uid=STRANGER)
    assert os.stat(daemon.socket).st_mode & 0o777 == 0o600
    assert daemon.ask("status", uid=STRANGER)["mode"] == "user"
    assert daemon.ctl("ping", uid=NEIGHBOUR).returncode != 0
    leader = start_leader(
        "pools.py", "executor", "--idle", "--method", "forkserver", socket=daemon.socket, uid=STRANGER
    )
    assert [s["id"] for s in daemon.ask("ps", uid=STRANGER)] == [leader.session]
    leader.kill9()
    assert broken_promise(leader) == ""
    assert daemon.wait_end(leader.session)["cause"] == {"kind": "signal", "code": 9}


def test_a_user_s_own_daemon_adopts_its_sessions_after_it_was_killed(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(uid=STRANGER)
    leader = start_leader("kin.py", "everything-left", socket=daemon.socket, uid=STRANGER)
    daemon.kill9()
    leader.kill9()
    daemon.start()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


def test_a_user_s_own_daemon_leaves_the_orphans_of_others_alone(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(config=ORPHANS, uid=NEIGHBOUR)
    light = {"REAPER_DISABLE": "1", "REAPER_TEST_LIGHT": "1"}
    pools = {
        uid: start_leader("pools.py", "executor", "--method", "spawn", uid=uid, parent="waits", env=light)
        for uid in (STRANGER, NEIGHBOUR)
    }
    for pool in pools.values():
        pool.kill9()
    assert pools[NEIGHBOUR].wait_all_gone(30.0) == []
    theirs = pools[STRANGER].family.workers
    for pid in theirs:
        told = daemon.ask("explain", str(pid))
        assert (told["verdict"], told["rule"]) == ("spare", "protected")
        assert f"a daemon of uid {NEIGHBOUR} ends nobody else's" in told["evidence"][-1]
    assert pools[STRANGER].still_alive(theirs) == theirs
    assert "cannot send" not in daemon.read_log()
    for pid in theirs:
        end_process(pid)


def test_the_uid_that_stands_for_everyone_without_one_is_refused(daemon: Daemon) -> None:
    """The kernel shows all uids that have no meaning in this namespace as this one: it is nobody in particular."""
    done = daemon.ctl("ping", uid=OVERFLOW)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr


def test_a_neighbour_is_no_better_than_a_stranger(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket, uid=STRANGER)
    assert daemon.ctl("stop", leader.session, uid=NEIGHBOUR).returncode == 4
    assert leader.still_alive([leader.pid, *leader.family.workers]) == [leader.pid, *leader.family.workers]
    theirs = json.loads(daemon.ctl("ps", "--json", uid=NEIGHBOUR).stdout)
    assert all(s["leader"]["cmdline"] is None for s in theirs)
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)
