"""No session is lost because a daemon was late, was killed, or lost what it remembered."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest
from harness import Daemon, Leader, broken_promise, wait_gone

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

EXECUTOR = ("pools.py", "executor", "--idle", "--method", "spawn")
FORKED = ("pools.py", "executor", "--idle", "--method", "fork")
KIN = ("kin.py", "everything-left")


@pytest.mark.parametrize("command", [EXECUTOR, FORKED, KIN], ids=lambda command: "-".join(command[1:]))
def test_a_daemon_that_starts_late_adopts_the_session(
    command: tuple[str, ...], start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(started=False)
    leader = start_leader(*command, socket=daemon.socket)
    assert "RuntimeWarning" in leader.read_log()
    daemon.start()
    session = daemon.session_of(leader.pid)
    assert session is not None, "READY must come after the first sweep for pages"
    assert session["id"] == leader.session
    leader.kill9()
    assert broken_promise(leader) == ""
    assert daemon.wait_end(leader.session)["cause"] == {"kind": "signal", "code": 9}


def test_a_daemon_with_another_socket_adopts_nothing(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    theirs, other = start_daemon(), start_daemon()
    leader = start_leader(*EXECUTOR, socket=theirs.socket)
    other.kill9()
    other.start()
    assert other.session_of(leader.pid) is None
    assert theirs.session_of(leader.pid) is not None
    leader.kill9()
    assert broken_promise(leader) == ""
    theirs.wait_end(leader.session)
    assert other.events(session=leader.session) == []


@pytest.mark.parametrize("command", [EXECUTOR, FORKED, KIN], ids=lambda command: "-".join(command[1:]))
def test_a_leader_that_died_while_the_killed_daemon_was_away_is_reaped_at_its_return(
    command: tuple[str, ...], daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader(*command, socket=daemon.socket)
    daemon.kill9()
    leader.kill9()
    daemon.start()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


def test_a_leader_that_lives_through_a_kill_of_the_daemon_is_watched_again(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader(*EXECUTOR, socket=daemon.socket)
    daemon.kill9()
    daemon.start()
    assert daemon.session_of(leader.pid) is not None
    leader.kill9()
    assert broken_promise(leader) == ""
    assert daemon.wait_end(leader.session)["cause"] == {"kind": "signal", "code": 9}


def test_a_restart_in_good_order_ends_no_session(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader(*EXECUTOR, socket=daemon.socket)
    assert daemon.stop() == 0
    everyone = [leader.pid, *leader.family.everyone]
    assert leader.still_alive(everyone) == everyone
    daemon.start()
    assert leader.still_alive(everyone) == everyone
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


def test_the_daemon_is_killed_in_the_middle_of_a_reap_and_ends_it_at_its_return(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", "stubborn", socket=daemon.socket)  # they last until grace is over
    leader.kill9()
    daemon.kill9()
    assert leader.living(), "the workers must outlive the daemon, or this proves nothing"
    daemon.start()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


@pytest.mark.parametrize("leader_dies", ["while the daemon is away", "afterwards"])
def test_the_state_directory_is_deleted_and_no_session_is_lost(
    leader_dies: str, daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader(*KIN, socket=daemon.socket)
    daemon.kill9()
    shutil.rmtree(daemon.state)
    if leader_dies == "while the daemon is away":
        leader.kill9()
        daemon.start()
    else:
        daemon.start()
        assert daemon.session_of(leader.pid) is not None
        leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


@pytest.mark.parametrize("leader_dies", ["while the daemon is away", "afterwards"])
def test_a_database_of_garbage_is_moved_aside_and_no_session_is_lost(
    leader_dies: str, daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader(*KIN, socket=daemon.socket)
    daemon.kill9()
    database = os.path.join(daemon.state, "reaper.db")
    for name in os.listdir(daemon.state):
        if name.startswith("reaper.db-"):
            os.unlink(os.path.join(daemon.state, name))
    garbage = b"this is no database " * 500
    with open(database, "wb") as file:
        file.write(garbage)
    if leader_dies == "while the daemon is away":
        leader.kill9()
    daemon.start()
    if leader_dies == "afterwards":
        assert daemon.session_of(leader.pid) is not None
        leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)
    aside = [name for name in os.listdir(daemon.state) if name.startswith("reaper.db.")]
    kept = [name for name in aside if _read(os.path.join(daemon.state, name)) == garbage]
    assert len(kept) == 1, f"the bad database must be kept: {os.listdir(daemon.state)}"
    assert kept[0] in daemon.read_log(), "the log must say where the bad database went"


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def test_the_history_outlives_a_restart(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    leader.kill9()
    event = daemon.wait_end(leader.session)
    daemon.restart()
    assert event in daemon.events(session=leader.session)


def test_a_second_daemon_on_the_same_socket_refuses_to_start(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    second = daemon.beside("--state-dir", f"{daemon.state}-2")
    assert second.returncode == 1
    last = second.stderr.strip().splitlines()[-1]
    assert daemon.socket in last
    assert "Traceback" not in second.stderr
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)  # the first one has kept its endpoint
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


def test_when_the_daemon_is_killed_its_gate_goes_too(daemon: Daemon) -> None:
    gates = daemon.children()
    assert gates, "the daemon must have a gate"
    daemon.kill9()
    assert wait_gone(gates, 2) == []


def test_a_killed_gate_is_replaced_and_no_request_is_lost(daemon: Daemon, start_leader: StartLeader) -> None:
    for gate in daemon.children():
        os.kill(gate, 9)
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    assert daemon.ctl("ping").returncode == 0
    assert daemon.session_of(leader.pid) is not None
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


def test_no_daemon_is_a_sentence_and_exit_code_3(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(started=False)
    done = daemon.ctl("ps", "--json")
    assert done.returncode == 3
    assert daemon.socket in done.stderr
    assert "Traceback" not in done.stderr


def test_a_daemon_that_is_told_to_stop_says_so_and_leaves_with_0(daemon: Daemon) -> None:
    assert daemon.stop() == 0
    assert "STOPPING=1" in daemon.drain_notifications()
    assert daemon.ctl("ping").returncode == 3
