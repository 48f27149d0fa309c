"""Sieges: a daemon with a victim's session, attackers of other users beside it, and the watch over what must not change."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from harness import (
    NEIGHBOUR,
    STRANGER,
    WORKERS_GONE_S,
    ZOO,
    Daemon,
    Descriptor,
    Leader,
    as_user,
    cmdline,
    describe,
    has_ended,
    needed_interpreter,
    read_proc,
    repeat_until,
    test_environment,
)

from agent import client, wire, zmtp
from reaperd import gate_frames

SAYS_WITHIN_S = 120.0
SETTLES_WITHIN_S = 30.0
# How much larger the core may be afterwards: what Python and SQLite keep of what they once needed.
GROWTH_BYTES = 12 * 1024 * 1024
_PIDFD_GETFD = 438

StartLeader = Callable[..., Leader]


class Attacker:
    """One process of ``zoo/attacker.py``, as another user; it ends with ``close()``."""

    def __init__(self, daemon: Daemon, kind: str, *, uid: int | None = STRANGER, **options: Any) -> None:
        self._process = subprocess.Popen(
            as_user(
                uid,
                [
                    needed_interpreter(uid),
                    os.path.join(ZOO, "attacker.py"),
                    kind,
                    json.dumps({"socket": daemon.socket, **options}),
                ],
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=test_environment(daemon.run),
            cwd="/",
            start_new_session=True,
        )
        self._unread = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def read_line(self, within_s: float = SAYS_WITHIN_S) -> dict[str, Any]:
        """Return the next line it says."""
        assert self._process.stdout is not None
        end_s = time.monotonic() + within_s
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._unread:
            assert poll.poll(max(0.0, end_s - time.monotonic()) * 1000), (
                f"the attacker says nothing for {within_s:g} s"
            )
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            assert data, f"the attacker ended with {self._process.wait()}"
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def read_until(self, key: str) -> dict[str, Any]:
        """Return the first line that has ``key``."""
        while key not in (line := self.read_line()):
            pass
        return line

    def tell(self, words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{words}\n".encode())
        self._process.stdin.flush()

    def stop(self) -> dict[str, Any]:
        """Have it stop, and return the last thing it says."""
        self.tell("stop")
        return self.read_line()

    def close(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._process.wait()

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# -- what must not change -------------------------------------------------------------------------


def resident_bytes(pid: int) -> int:
    return _status_bytes(pid, b"VmRSS:")


def peak_bytes(pid: int) -> int:
    """Return the most that ``pid`` has ever had resident."""
    return _status_bytes(pid, b"VmHWM:")


def _status_bytes(pid: int, name: bytes) -> int:
    for line in read_proc(pid, "status").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def descriptors_of(pid: int) -> list[str]:
    """Return what the descriptors of ``pid`` are: no numbers, for the gate's channel is another after each new gate."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}").partition("[")[0].partition(":")[0])
    kinds = ("anon_inode" if name == "pidfd" else name for name in found)  # as older kernels call it
    return sorted(name for name in kinds if not name.startswith("/proc"))  # what it reads at this moment


def answers(daemon: Daemon, within_s: float = SETTLES_WITHIN_S) -> float:
    """Return in how many seconds the daemon answers, asking again while its gate is being replaced."""
    began_s = time.monotonic()

    def asked() -> bool | None:
        try:
            return bool(client.request(daemon.socket, {"op": "ping"}, timeout_s=2)["ok"])
        except client.Unreachable:
            return None

    repeat_until(asked, within_s, "the daemon does not answer a ping")
    return time.monotonic() - began_s


class Watch:
    """The core as it was before an attack: the same process, no fatter, with the same descriptors, and one session."""

    def __init__(self, daemon: Daemon, session: str) -> None:
        self._daemon = daemon
        self.may_grow_bytes = GROWTH_BYTES
        self._look_at_it()
        self._held, sessions = self._idle()
        self._sessions = [one for one in sessions if one[0] == session]

    def _look_at_it(self) -> None:
        answers(self._daemon)
        self._pid = self._daemon.pid
        self._pidfd = os.pidfd_open(self._pid)
        self._resident_bytes = resident_bytes(self._pid)

    def renew(self) -> None:
        """Watch another life of the daemon, which must come to hold what the last one held."""
        os.close(self._pidfd)
        self._look_at_it()

    def _idle(self) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Return what the core holds, but for a page and a pidfd of each session, and its sessions.

        That is the least that it is seen to hold: not what it has in the middle of a request.
        """
        sessions = sorted(
            (one["id"], one["name"], one["uid"], one["leader"]["pid"], one["state"])
            for one in self._daemon.sessions()
        )
        seen = []
        for _ in range(5):
            answers(self._daemon)
            select.select([], [], [], 0.02)  # the core lets go of a connection after it has replied
            seen.append(descriptors_of(self._pid))
        held = min(seen, key=len)
        for name in ["/memfd", "anon_inode"] * len(sessions):
            if name in held:
                held.remove(name)
        return held, sessions

    def lives(self) -> str:
        """Return "" while the core is the one it was."""
        return f"the core has ended:\n{self._daemon.read_log()[-2000:]}" if has_ended(self._pidfd) else ""

    @property
    def growth_bytes(self) -> int:
        return resident_bytes(self._pid) - self._resident_bytes

    def changes(self) -> str:
        """Return what is not as it was, once the daemon had time to put everything in order; empty when all is."""
        if ended := self.lives():
            return ended
        answers(self._daemon)
        end_s = time.monotonic() + SETTLES_WITHIN_S
        while (faults := self._faults()) and time.monotonic() < end_s:
            pass
        return "\n".join(faults)

    def _faults(self) -> list[str]:
        faults = []
        held, sessions = self._idle()
        # Less is none: the helper that reads others' memory is ended when nothing was asked of it for a while.
        if Counter(held) - Counter(self._held):
            faults.append(f"beside its sessions' it had the descriptors {self._held}, and has {held}")
        if sessions != self._sessions:
            faults.append(f"its sessions were {self._sessions} and are {sessions}")
        if self.growth_bytes > self.may_grow_bytes:
            faults.append(f"the core grew by {self.growth_bytes / 2**20:.1f} MiB")
        return faults

    def close(self) -> None:
        os.close(self._pidfd)


class Bystanders:
    """Processes that look like a victim's and are none: they must outlive its reap."""

    def __init__(self, run: str, session: str, uid: int) -> None:
        stamp = {wire.LINEAGE_VARIABLE: session}
        spared = {**stamp, wire.SPARED_VARIABLE: session}
        kinds: dict[str, tuple[int, dict[str, str]]] = {
            "of another user, with a copied stamp": (STRANGER if uid != STRANGER else NEIGHBOUR, stamp),
            "of its user, without any mark": (uid, {}),
            "of its user, spared": (uid, spared),
        }
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            # Elsewhere the cgroup makes a member of whoever carries the stamp in it.
            if wire.parse_cgroup(file.read()) == "/":
                kinds["of its user, with a copied stamp, below a process that adopts nobody"] = (uid, stamp)
        self._processes = {
            name: subprocess.Popen(
                as_user(user, ["cat"]),
                env=test_environment(run, **more),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
            for name, (user, more) in kinds.items()
        }

    def ended(self) -> list[str]:
        """Return which of them were ended."""
        return [name for name, process in self._processes.items() if process.poll() is not None]

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def lengthen_history(daemon: Daemon, count: int) -> None:
    """Put events into the record of a daemon that does not run."""
    record = {"at": "2026-01-01T00:00:00Z", "kind": "ended", "session": "1-1-00000000-00000001", "uid": 1}
    row = (time.time(), record["kind"], record["session"], record["uid"], json.dumps(record))
    with contextlib.closing(sqlite3.connect(os.path.join(daemon.state, "reaper.db"))) as database, database:
        database.executemany(
            "INSERT INTO events (at_epoch_s, kind, session, uid, record) VALUES (?, ?, ?, ?, ?)",
            (row for _ in range(count)),
        )


# -- a siege --------------------------------------------------------------------------------------


def reap_latency(leader: Leader, within_s: float) -> float | None:
    """SIGKILL a leader; return how many seconds its workers lasted, None where that was longer than ``within_s``."""
    pidfds = {pid: os.pidfd_open(pid) for pid in leader.family.everyone}
    try:
        leader.signal(signal.SIGKILL)
        began_s = time.monotonic()
        for pidfd in pidfds.values():
            if not has_ended(pidfd, within_s=began_s + within_s - time.monotonic()):
                return None
        return time.monotonic() - began_s
    finally:
        for pidfd in pidfds.values():
            os.close(pidfd)


class Siege:
    """A daemon, victims with a session each that may die at any time, bystanders, and the watch over them.

    One victim lives until ``check()``: what the daemon has then must be what it had with that one alone.
    """

    def __init__(self, daemon: Daemon, start_leader: StartLeader, *, victims: int = 1) -> None:
        self.daemon = daemon
        self._start_leader = start_leader
        self.stays = self.victim()
        self.watch = Watch(daemon, self.stays.session)
        self.victims = [self.victim() for _ in range(victims)]
        self.bystanders = Bystanders(daemon.run, self.stays.session, NEIGHBOUR)
        self.promise_s = WORKERS_GONE_S
        self.latencies_s: list[float] = []
        self.reaped: list[Leader] = []

    def victim(self) -> Leader:
        """Return a leader with two workers, who may last for as long as any attack."""
        return self._start_leader("victim.py", socket=self.daemon.socket, uid=NEIGHBOUR)

    def stranger(self) -> Leader:
        """Return a leader of another user's."""
        return self._start_leader("victim.py", socket=self.daemon.socket, uid=STRANGER)

    def attacker(self, kind: str, **options: Any) -> Attacker:
        return Attacker(self.daemon, kind, **options)

    def reap(self) -> float:
        """Kill a victim's leader, and return how long its workers lasted; AssertionError beyond the promise."""
        leader = self.victims.pop()
        self.reaped.append(leader)
        latency_s = reap_latency(leader, self.promise_s)
        assert not (ended := self.watch.lives()), ended
        assert latency_s is not None, (
            f"workers alive {self.promise_s:g} s after their leader's death:\n"
            f"{describe(leader.still_alive(leader.family.everyone))}"
        )
        self.latencies_s.append(latency_s)
        return latency_s

    def check(self) -> None:
        """Fail where anything was touched that should not be; the victim that stayed then dies, and is reaped."""
        for leader in (self.stays, *self.victims):
            everyone = [leader.pid, *leader.family.everyone]
            assert leader.still_alive(everyone) == everyone, "somebody was ended whose leader lives"
        while self.victims:
            self.reap()
        assert (changes := self.watch.changes()) == "", changes
        self.victims.append(self.stays)
        self.reap()
        self.daemon.wait_end(self.stays.session)
        assert self.bystanders.ended() == []

    def close(self) -> None:
        """End the bystanders; the victims are the fixture's."""
        self.bystanders.close()
        self.watch.close()

    def __enter__(self) -> Siege:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# -- the gate's own descriptors -------------------------------------------------------------------


def gate_of(daemon: Daemon) -> int | None:
    """Return the pid of the daemon's gate, None while there is none."""
    with contextlib.suppress(FileNotFoundError):
        return next((pid for pid in daemon.children() if "reaperd.gate" in cmdline(pid)), None)
    return None


def take_channel(gate: int) -> socket.socket:
    """Return a copy of the gate's end of its channel to the core, as whoever captured it would have it."""
    number = int(cmdline(gate)[-2])
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.closing(Descriptor(os.pidfd_open(gate))) as pidfd:
        copy = libc.syscall(_PIDFD_GETFD, pidfd.number, number, 0)
    assert copy >= 0, os.strerror(ctypes.get_errno())
    return socket.socket(fileno=copy)


def as_captured_gate(channel: socket.socket, work: Callable[[socket.socket], None]) -> None:
    """Run ``work`` with the channel as the user that the gate is, who has no rights at all."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            work(channel)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def routing_id_of_a_reply(daemon: Daemon, gate: int) -> bytes:
    """Return the id that the gate gave to a connection: from a reply that waits in its channel while it is stopped."""
    with take_channel(gate) as channel, contextlib.ExitStack() as stack:
        waiter = stack.enter_context(contextlib.closing(zmtp.Dealer(daemon.socket, 30)))
        waiter._send(zmtp.frame(b'{"v":1,"op":"events","session":"1-1-00000000-00000000","wait_s":1}'))
        answers(daemon)  # the request has reached the core, for this one came later
        os.kill(gate, signal.SIGSTOP)
        try:
            assert select.select([channel], [], [], 20)[0], "no reply came"
            data = channel.recv(gate_frames.MAX_REPLY_BYTES, socket.MSG_PEEK)
        finally:
            os.kill(gate, signal.SIGCONT)
    routing_id, _, _ = gate_frames.parse_reply(data)
    assert len(routing_id) == 5
    return routing_id
