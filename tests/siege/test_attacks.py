"""What other users send to the socket ends at worst the gate, and tells and changes nothing that is not theirs."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from attackers import (
    Siege,
    answers,
    as_captured_gate,
    gate_of,
    lengthen_history,
    peak_bytes,
    resident_bytes,
    routing_id_of_a_reply,
    take_channel,
)
from harness import (
    NEIGHBOUR,
    STRANGER,
    Daemon,
    Leader,
    Scratch,
    broken_promise,
    cmdline,
    has_ended,
    open_pidfd,
    repeat_until,
    test_environment,
)

from agent.page import SessionPage
from reaperd import gate_frames

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

pytestmark = pytest.mark.needs_root

SEED = 20_240_229


@pytest.fixture
def lay_siege(start_leader: StartLeader) -> Iterator[Callable[..., Siege]]:
    with contextlib.ExitStack() as stack:
        yield lambda daemon, **settings: stack.enter_context(Siege(daemon, start_leader, **settings))


@pytest.fixture
def siege(daemon: Daemon, lay_siege: Callable[..., Siege]) -> Siege:
    return lay_siege(daemon)


def wait_for_another_gate(daemon: Daemon, than: int | None, within_s: float = 30.0) -> int:
    """Return the gate that follows ``than``, once it answers."""

    def found() -> int | None:
        answers(daemon)  # waits
        gate = gate_of(daemon)
        return gate if gate is not None and gate != than else None

    return repeat_until(found, within_s, f"the gate {than} was not replaced")


# -- whose session it is --------------------------------------------------------------------------

CLAIMS = {
    "Peer-Address": "localhost:0:0:1",
    "User-Id": "0",
    "Identity": "root",
    "Routing-Id": "root",
    "Resource": "/",
    "X-Uid": "0",
}


@pytest.mark.parametrize("claims", [{}, CLAIMS], ids=["as itself", "as root, by its own word"])
def test_a_stranger_gains_nothing_of_a_session_of_another_user(
    claims: dict[str, str], siege: Siege, scratch: Scratch
) -> None:
    daemon, victim = siege.daemon, siege.stays
    told = {"id": victim.session, "uid": NEIGHBOUR, "name": "victim"}
    with siege.attacker("impostor", victim=told, properties=claims) as attacker:
        kinds = attacker.read_line()["kinds"]
        assert kinds == {
            "stop by id": "not-allowed",
            "stop by name": "ambiguous-session",  # two have it, and neither is the stranger's
            "stop by prefix": "not-allowed",
            "stop as the victim": "not-allowed",
            "unregister": "not-allowed",
            "unregister as the victim": "not-allowed",
            "register its id": "bad-session",
            "register its id as the victim": "bad-session",
            "register its id with a page": "bad-session",
            "its page as mine": "bad-page",
        }
        seen = attacker.read_line()
        assert all(session["leader"]["cmdline"] is None for session in seen["ps"]["sessions"])
        assert not [event for event in seen["events"]["events"] if event.get("uid") == NEIGHBOUR]
        shown = json.dumps(seen)
        assert not [word for word in ("victim.py", "sleep") if word in shown]
    siege.check()
    assert [event["kind"] for event in daemon.events(session=victim.session)] == ["registered", "reaped"]


def test_a_page_that_its_owner_handed_over_registers_nobody_else(siege: Siege, scratch: Scratch) -> None:
    victim = siege.stays
    inlet_path = scratch.file("page")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inlet, contextlib.ExitStack() as stack:
        inlet.bind(inlet_path)
        os.chmod(inlet_path, 0o777)
        inlet.listen(1)
        told = {"id": victim.session, "uid": NEIGHBOUR, "name": "victim"}
        attacker = stack.enter_context(siege.attacker("impostor", victim=told, page=inlet_path))
        connection = stack.enter_context(inlet.accept()[0])
        page = next(
            number
            for number in map(int, os.listdir(f"/proc/{victim.pid}/fd"))
            if f"memfd:reaper:{victim.session}" in os.readlink(f"/proc/{victim.pid}/fd/{number}")
        )
        descriptor = os.open(f"/proc/{victim.pid}/fd/{page}", os.O_RDONLY)
        made = _page_made_for(attacker.pid, siege.daemon.socket)
        socket.send_fds(connection, [b"x"], [descriptor, made])
        os.close(descriptor)
        os.close(made)
        kinds = attacker.read_line()["kinds"]
        assert kinds["the very page as mine"] == kinds["a page made for me"] == "bad-page"
        # It holds the page of a session that is not its own, and is left alone when that session's leader dies.
        attacker.read_line()
        siege.check()
        assert open_pidfd(attacker.pid) is not None
        assert not has_ended(_pidfd(stack, attacker.pid))


def _page_made_for(pid: int, path: str) -> int:
    """Return a page, ours, that names ``pid`` as its leader as ``pid`` itself would."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    page = SessionPage(f"{pid}-{ticks:x}-00000000-00000007", "made", ticks, boot_id)
    page.write_record([path])
    copy = os.dup(page.fd)
    page.close()
    return copy


def _pidfd(stack: contextlib.ExitStack, pid: int) -> int:
    pidfd = os.pidfd_open(pid)
    stack.callback(os.close, pidfd)
    return pidfd


def test_a_connection_is_its_maker_s_whoever_speaks_through_it(siege: Siege, scratch: Scratch) -> None:
    """Root itself, on a connection that a stranger made and handed over, has a stranger's rights."""
    path = scratch.file("courier")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inlet, contextlib.ExitStack() as stack:
        inlet.bind(path)
        os.chmod(path, 0o777)
        inlet.listen(1)
        courier = stack.enter_context(siege.attacker("courier", to=path))
        outlet = stack.enter_context(inlet.accept()[0])
        _, (descriptor,), _, _ = socket.recv_fds(outlet, 1, 1)
        handed = stack.enter_context(socket.socket(fileno=descriptor))
        handed.settimeout(20)
        pid = courier.read_line()["pid"]
        for message, kind in (
            ({"op": "stop", "session": siege.stays.session}, "not-allowed"),
            ({"op": "unregister", "session": siege.stays.session}, "not-allowed"),
            (_own_registration(), "bad-session"),
        ):
            handed.sendall(_frame(message))
            answer = json.loads(handed.recv(65536)[2:])
            assert (answer["ok"], answer["kind"]) == (False, kind)
        handed.sendall(_frame({"op": "ps"}))
        assert b'"cmdline":[' not in handed.recv(1 << 20)
        assert pid != os.getpid()
    siege.check()


def _frame(message: dict[str, Any]) -> bytes:
    body = json.dumps({"v": 1, **message}).encode()
    assert len(body) < 256
    return bytes((0, len(body))) + body


def _own_registration() -> dict[str, Any]:
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    session = f"{os.getpid()}-{ticks:x}-00000000-00000000"
    return {"op": "register", "session": session, "start_ticks": ticks}


def test_a_captured_gate_cannot_pose_as_root(siege: Siege) -> None:
    """Whoever holds the gate's channel can pass requests of its own, on connections of its own: to whomever they lead."""
    daemon, stays = siege.daemon, siege.stays
    gate = gate_of(daemon)
    assert gate is not None
    request = json.dumps({"v": 1, "op": "stop", "session": stays.session}).encode()

    def claim(uid: int, gid: int, pid: int) -> bytes:
        return gate_frames.pack_request(gate_frames.Request(uid, gid, pid, b"nobody", request))

    def pose(channel: socket.socket) -> None:
        ours, theirs = socket.socketpair()
        caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        caller.connect(daemon.socket)  # at its other end stands root: the kernel names who listens
        for connection in (ours, theirs, caller):
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, uid, gid = struct.unpack("=iII", credentials)
            for who in ((uid, gid, pid), (0, 0, 1), (0, 0, daemon.pid), (NEIGHBOUR, NEIGHBOUR, stays.pid)):
                socket.send_fds(channel, [claim(*who)], [connection.fileno()])
        channel.send(claim(0, 0, 1))

    with take_channel(gate) as channel:
        as_captured_gate(channel, pose)
    answers(daemon)
    assert "asked to stop" not in daemon.read_log()
    siege.check()


def test_garbage_from_a_captured_gate_costs_only_the_gate(siege: Siege) -> None:
    daemon = siege.daemon
    for nonsense in (b"x", b"\xff" * 1000, b"\0" * 13, b"\0" * 16_000):
        gate = gate_of(daemon)
        assert gate is not None
        with take_channel(gate) as channel:
            as_captured_gate(channel, lambda channel, data=nonsense: _send_all_ways(channel, data))  # type: ignore[misc]
        answers(daemon)
    siege.check()


def _send_all_ways(channel: socket.socket, data: bytes) -> None:
    channel.send(data)
    readers = [descriptor for _ in range(8) for descriptor in os.pipe()]
    pair = [end.detach() for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)]
    network = socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()
    for descriptors in ([network], readers[:1], readers[:4], readers, pair, [channel.fileno()]):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(channel, [data], descriptors)


# -- what the gate may die of ---------------------------------------------------------------------


def test_no_opening_is_strange_enough_to_stop_anything(siege: Siege) -> None:
    gate = gate_of(siege.daemon)
    with siege.attacker("openings") as attacker:
        siege.reap()
        attacker.read_until("done")
        answers(siege.daemon)
    assert gate_of(siege.daemon) == gate, "the gate died of one of them"
    siege.check()


def test_garbage_changes_nothing(siege: Siege) -> None:
    gate = gate_of(siege.daemon)
    sessions = [siege.stays.session, siege.victims[0].session]
    with contextlib.ExitStack() as stack:
        attackers = [
            stack.enter_context(
                siege.attacker(
                    "garbage", uid=STRANGER + 10 + number, seed=SEED + number, count=1500, sessions=sessions
                )
            )
            for number in range(2)
        ]
        for attacker in attackers:
            attacker.read_until("ready")
        siege.reap()
        told = [attacker.read_until("sent") for attacker in attackers]
    assert sum(one["sent"] for one in told) == 3000
    kinds = {kind for one in told for kind in one["kinds"]}
    assert {"bad-request", "unknown-op", "bad-session", "not-allowed", "ok"} <= kinds
    assert "internal" not in kinds, siege.daemon.read_log()[-3000:]
    assert gate_of(siege.daemon) == gate, "the gate died of one of them"
    siege.check()


def test_bare_connections_up_to_the_gate_s_limit_cost_at_most_the_gate(siege: Siege) -> None:
    daemon = siege.daemon
    with siege.attacker("connects") as attacker:
        attacker.read_line()
        siege.reap()
        # Either the gate is at its limit, or it died of that and another one meets the same.
        gate = gate_of(daemon)
        repeat_until(lambda: _at_its_limit(daemon, gate), 60, "the gate never came to its limit")
        told = attacker.stop()
    assert told["connects"] > 3000
    answers(daemon)
    siege.check()


def _at_its_limit(daemon: Daemon, gate: int | None) -> bool | None:
    if gate is None or gate_of(daemon) != gate:
        return True
    select.select([], [], [], 0.05)
    with contextlib.suppress(OSError):
        return True if len(os.listdir(f"/proc/{gate}/fd")) > 4000 else None
    return True


def test_a_message_without_end_costs_at_most_the_gate(siege: Siege) -> None:
    daemon = siege.daemon
    before, gate = resident_bytes(daemon.pid), gate_of(daemon)
    with siege.attacker("endless", messages=1, megabytes=700) as attacker:
        attacker.read_line()
        siege.reap()
        told = attacker.read_line()
    assert told["sent_bytes"] > 100_000_000
    if gate is not None and gate_of(daemon) == gate:
        assert peak_bytes(gate) < 400 * 1024 * 1024
    answers(daemon)
    assert resident_bytes(daemon.pid) < before + 16 * 1024 * 1024
    siege.check()


def test_planted_routing_ids_cost_at_most_the_gate(siege: Siege) -> None:
    """The ids that the gate gives are counted up, from a start that can be guessed; a test may simply look."""
    daemon = siege.daemon
    gate = gate_of(daemon)
    assert gate is not None
    last = int.from_bytes(routing_id_of_a_reply(daemon, gate)[1:], "big")
    following = [(b"\0" + struct.pack(">I", (last + n) & 0xFFFFFFFF)).hex() for n in range(2, 60)]
    with siege.attacker("planted", identities=following) as attacker:
        attacker.read_until("planted")
        siege.reap()
        answers(daemon)
    siege.check()


@pytest.mark.parametrize("connections", [1, 20])
def test_who_never_reads_its_replies_blocks_nobody(connections: int, siege: Siege) -> None:
    daemon = siege.daemon
    with siege.attacker("deaf", message={"op": "ps"}, connections=connections) as attacker:
        attacker.read_line()
        for _ in range(3):
            assert answers(daemon) < 5
        siege.reap()
        assert siege.watch.growth_bytes < 40 * 1024 * 1024
        assert attacker.stop()["asked"] > 100
    siege.check()


def test_dear_requests_of_one_user_delay_no_reap_and_no_request_of_another(
    start_daemon: StartDaemon, start_leader: StartLeader, lay_siege: Callable[..., Siege]
) -> None:
    """A user has many sessions of its own, and asks for all of them thousands of times."""
    daemon = start_daemon()
    siege = lay_siege(daemon, victims=2)
    with siege.attacker("many", sessions=120) as owner, contextlib.ExitStack() as stack:
        assert owner.read_line()["registered"] == 120
        for _ in range(4):
            stack.enter_context(siege.attacker("deaf", message={"op": "ps"}, connections=2)).read_line()
        siege.reap()
        assert answers(daemon) < 5
        siege.reap()
        assert siege.watch.growth_bytes < 60 * 1024 * 1024
    siege.check()


def test_waiters_for_events_in_a_long_history_delay_no_reap(
    start_daemon: StartDaemon, lay_siege: Callable[..., Siege]
) -> None:
    daemon = start_daemon()
    daemon.stop()
    lengthen_history(daemon, 200_000)
    daemon.start()
    siege = lay_siege(daemon, victims=3)
    with contextlib.ExitStack() as stack:
        for number in range(2):
            attacker = stack.enter_context(
                siege.attacker("waiters", uid=STRANGER + 20 + number, connections=90)
            )
            attacker.read_line()
        while siege.victims:  # each end is an event that wakes all who wait
            siege.reap()
        assert answers(daemon) < 2
    siege.check()


def test_one_process_that_registers_for_ever_delays_nobody(
    start_daemon: StartDaemon, lay_siege: Callable[..., Siege]
) -> None:
    siege = lay_siege(start_daemon(), victims=2)
    with siege.attacker("registrar") as attacker:
        attacker.read_line()
        siege.reap()
        assert answers(siege.daemon) < 2
        siege.reap()
        assert attacker.stop()["registered"] > 0
    siege.check()


def test_more_unmarked_children_than_descriptors_end_nothing(
    start_daemon: StartDaemon, lay_siege: Callable[..., Siege]
) -> None:
    daemon = start_daemon(started=False)
    daemon.launch()
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (256, 256))  # long before Python is up and asks
    daemon.wait_ready()
    siege = lay_siege(daemon)
    with siege.attacker("greedy", children=400) as attacker:
        told = attacker.read_line()
        # The next scan finds them all; two of them, for the first may have begun before.
        scans = len(daemon.sessions()), len(daemon.sessions())
        assert scans
        siege.reap()
        with contextlib.ExitStack() as stack:
            pidfds = [_pidfd(stack, pid) for pid in told["children"]]
            assert not any(map(has_ended, pidfds)), "their leader lives"
    siege.check()


# -- a gate that is not there ---------------------------------------------------------------------


def test_a_gate_that_is_killed_again_and_again_loses_no_session_and_delays_no_reap(
    daemon: Daemon, lay_siege: Callable[..., Siege], start_leader: StartLeader
) -> None:
    siege = lay_siege(daemon, victims=2)
    late: list[Leader] = []
    for _ in range(2):
        gate = wait_for_another_gate(daemon, None)
        os.kill(gate, signal.SIGKILL)
        # It registers into the gap, or not at all: its page tells.
        late.append(start_leader("kin.py", "subprocess", socket=daemon.socket, uid=NEIGHBOUR))
        siege.reap()
    answers(daemon)
    for leader in late:
        daemon.wait_listed(leader.pid, leader.family.workers)
        leader.kill9()
        assert broken_promise(leader) == ""
        daemon.wait_end(leader.session)
    siege.check()


def test_a_gate_that_stands_still_delays_no_reap_and_its_requests_are_answered_when_it_goes_on(
    siege: Siege, start_leader: StartLeader
) -> None:
    daemon = siege.daemon
    gate = gate_of(daemon)
    assert gate is not None
    os.kill(gate, signal.SIGSTOP)
    try:
        late = start_leader("kin.py", "subprocess", socket=daemon.socket, uid=NEIGHBOUR)
        assert "RuntimeWarning" in late.read_log()
        siege.reap()
    finally:
        os.kill(gate, signal.SIGCONT)
    answers(daemon)
    daemon.wait_listed(late.pid, late.family.workers)
    late.kill9()
    assert broken_promise(late) == ""
    daemon.wait_end(late.session)
    assert gate_of(daemon) == gate, cmdline(gate)
    siege.check()


# Waits for a word, then registers in vain, and goes on.
LATE = """
import sys, warnings
import agent
sys.stdin.readline()
warnings.simplefilter("ignore")
print(agent.register("late", timeout=0.1).id, flush=True)
sys.stdin.readline()
"""
# So many that they are not looked at again within some scans.
CROWDED = """
for number in $(seq 400); do sleep 100 & pids="$pids $!"; done
trap 'kill $pids; wait; exit' TERM
echo up
wait
"""


def test_who_registers_in_vain_is_known_at_the_next_scan_however_long_it_has_been_there(
    daemon: Daemon,
    start_leader: StartLeader,
    start_process: Callable[..., subprocess.Popen[bytes]],
    run: str,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LATE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=test_environment(run, REAPER_SOCKET=daemon.socket),
        text=True,
    ) as late:
        assert late.stdin is not None
        assert late.stdout is not None
        crowd = start_process(["sh", "-c", CROWDED])
        assert crowd.stdout is not None
        crowd.stdout.readline()
        leader = start_leader("kin.py", "bare-environment", socket=daemon.socket)
        daemon.wait_listed(
            leader.pid, leader.family.workers
        )  # as it is by a scan, which has seen all of them
        gate = gate_of(daemon)
        assert gate is not None
        os.kill(gate, signal.SIGSTOP)
        try:
            late.stdin.write("\n")
            late.stdin.flush()
            session = late.stdout.readline().strip()
            taken_on = f"adopted session={session}"
            repeat_until(lambda: taken_on in daemon.read_log() or None, 2.0, "it is not taken on")
        finally:
            os.kill(gate, signal.SIGCONT)
            crowd.terminate()
            crowd.wait()
