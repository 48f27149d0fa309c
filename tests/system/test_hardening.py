"""What one user does, or what stands on record of one session, neither ends the daemon nor keeps it from others."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import (
    NEIGHBOUR,
    STRANGER,
    Daemon,
    Leader,
    as_user,
    broken_promise,
    has_ended,
    needed_interpreter,
    repeat_until,
)

from agent import client, wire, zmtp

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]


def ask(daemon: Daemon, timeout_s: float = 20.0, **message: Any) -> dict[str, Any]:
    return client.request(daemon.socket, message, timeout_s=timeout_s)


# -- what lies in /dev/shm --------------------------------------------------------------------------

MAKE_FOLDER = """
import os, sys
os.chdir("/dev/shm"); os.mkdir(sys.argv[1]); os.chdir(sys.argv[1])
for number in range(int(sys.argv[3])):
    os.close(os.open(str(number), os.O_CREAT | os.O_WRONLY))
for _ in range(int(sys.argv[2])):
    os.mkdir("d"); os.chdir("d")
"""


@contextlib.contextmanager
def folder_of(leader: Leader, depth: int, width: int) -> Iterator[str]:
    """Make a folder that is the leader's by its name."""
    name = f"joblib_memmapping_folder_{leader.pid}_x"
    command = [needed_interpreter(STRANGER), "-c", MAKE_FOLDER, name, str(depth), str(width)]
    try:
        subprocess.run(as_user(STRANGER, command), check=True)
        yield f"/dev/shm/{name}"
    finally:
        subprocess.run(["rm", "-rf", f"/dev/shm/{name}"], check=True)


@pytest.mark.needs_root
@pytest.mark.parametrize(("depth", "width"), [(3000, 0), (2, 50_000)], ids=["deep", "wide"])
def test_a_folder_of_one_user_costs_neither_the_daemon_nor_another_user_anything(
    depth: int, width: int, daemon: Daemon, start_leader: StartLeader
) -> None:
    victim = start_leader("kin.py", "subprocess", socket=daemon.socket, uid=NEIGHBOUR)
    hostile = start_leader("kin.py", "subprocess", socket=daemon.socket, uid=STRANGER)
    with folder_of(hostile, depth, width) as path, contextlib.ExitStack() as stack:
        pidfd = os.pidfd_open(daemon.pid)
        stack.callback(os.close, pidfd)
        hostile.kill9()
        victim.kill9()
        assert broken_promise(victim) == ""
        assert broken_promise(hostile) == ""
        daemon.wait_end(victim.session)
        event = daemon.wait_end(hostile.session)
        assert event["kind"] == "reaped"
        assert not has_ended(pidfd)
        assert "Traceback" not in daemon.read_log()
        assert os.path.exists(path) == bool(depth > 100), "what is only wide is removed"


# -- what is on record ------------------------------------------------------------------------------


def test_a_session_on_record_that_makes_no_sense_costs_only_itself(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon()
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    daemon.kill9()
    with contextlib.closing(sqlite3.connect(os.path.join(daemon.state, "reaper.db"))) as database, database:
        ((uid, boot_id, text),) = database.execute("SELECT uid, boot_id, record FROM sessions").fetchall()
        for number, nonsense in enumerate(({"leader": ["x", 1]}, {"leader": [2**70, 1]}, {"uid": "root"})):
            record = {**json.loads(text), "id": f"bad-{number}", **nonsense}
            database.execute(
                "INSERT INTO sessions VALUES (?, ?, ?, ?)", (uid, record["id"], boot_id, json.dumps(record))
            )
    daemon.start()
    assert daemon.session_of(leader.pid) is not None
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


# -- what is asked ----------------------------------------------------------------------------------


class Flood:
    """A user's connections, each with as many requests on its way as it takes; replies are not read."""

    def __init__(self, daemon: Daemon, connections: int, **message: Any) -> None:
        script = FLOOD.format(socket=daemon.socket, connections=connections, message={"v": 1, **message})
        self._process = subprocess.Popen(
            as_user(STRANGER, [needed_interpreter(STRANGER), "-c", script]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"flooding\n"

    def __enter__(self) -> Flood:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()


ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PATHS = [ROOT, os.path.join(ROOT, "daemon")]
FLOOD = """
import json, select, sys
from agent import zmtp
data = zmtp.frame(json.dumps({message!r}).encode()) * 20
peers = [zmtp.Dealer({socket!r}, 60) for _ in range({connections})]
sent = 0
while True:
    for peer in peers:
        peer._socket.setblocking(False)
        try:
            while peer._socket.send(data) == len(data):
                pass
            peers.remove(peer)
            peers.append(zmtp.Dealer({socket!r}, 60))
        except BlockingIOError:
            pass
        except OSError:
            peers.remove(peer)
            peers.append(zmtp.Dealer({socket!r}, 60))
    if not sent:
        print("flooding", flush=True)
    sent += 1
    if select.select([0], [], [], 0.01)[0]:
        break
"""


@pytest.mark.needs_root
@pytest.mark.parametrize(
    "message",
    [{"op": "ps"}, {"op": "status"}, {"op": "events"}, {"op": "events", "session": "nope"}],
    ids=["ps", "status", "events", "nothing"],
)
def test_a_flood_of_one_user_keeps_nobody_else_waiting(
    message: dict[str, Any], daemon: Daemon, start_leader: StartLeader
) -> None:
    victims = [start_leader("kin.py", "subprocess", socket=daemon.socket, uid=NEIGHBOUR) for _ in range(2)]
    with Flood(daemon, 4, **message):
        for victim in victims:
            assert ask(daemon, op="ping")["ok"]
            assert ask(daemon, op="ps")["ok"]
            victim.kill9()
            assert broken_promise(victim) == ""
        daemon.wait_end(victims[0].session)


@pytest.mark.needs_root
def test_who_asks_too_much_waits_and_is_answered_in_the_end(daemon: Daemon) -> None:
    with Flood(daemon, 2, op="ps"):
        repeat_until(lambda: _is_busy(daemon), 20, "nobody was told to come again")
    assert repeat_until(lambda: _ping(daemon), 30, "the user is never answered again")


def _is_busy(daemon: Daemon) -> bool | None:
    done = daemon.ctl("ping", uid=STRANGER)
    return True if done.returncode == 1 and "try again" in done.stderr else None


def _ping(daemon: Daemon) -> bool | None:
    return True if daemon.ctl("ping", uid=STRANGER).returncode == 0 else None


# -- events -----------------------------------------------------------------------------------------


def test_many_who_wait_for_events_are_each_told_of_theirs(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    last = ask(daemon, op="events", after=2**40)["last"]
    with contextlib.ExitStack() as stack:

        def wait(**more: Any) -> zmtp.Dealer:
            peer = zmtp.Dealer(daemon.socket, 60)
            stack.callback(peer.close)
            peer._send(zmtp.frame(wire.encode({"op": "events", "after": last, "wait_s": 25, **more})))
            return peer

        anything = [wait() for _ in range(20)]
        of_session = [wait(session=leader.session) for _ in range(20)]
        never = [wait(session="nope") for _ in range(20)]
        repeat_until(lambda: _waiting(daemon), 20, "not all of them wait")
        leader.kill9()
        for peer in (*anything, *of_session):
            (event,) = wire.decode(peer._read_frame()[1])["events"]
            assert (event["kind"], event["session"]) == ("reaped", leader.session)
        for peer in never:
            peer._socket.setblocking(False)
            with pytest.raises(BlockingIOError):
                peer._socket.recv(1)


def _waiting(daemon: Daemon) -> bool | None:
    """Return when the daemon has taken all that was sent before: requests of one user are answered in their order."""
    return True if ask(daemon, op="ping")["ok"] else None


def test_a_session_that_ends_while_the_daemon_is_told_to_stop_is_reaped(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon()
    leader = start_leader("pools.py", "executor", socket=daemon.socket)
    daemon.wait_listed(leader.pid, leader.family.workers)
    leader.kill9()
    daemon.stop()
    assert leader.wait_all_gone(2.0) == []
