"""Starts throngs of sessions, ends their leaders, and times how long their workers last; reads what a daemon takes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness import FAMILY_MARK, ZOO, Daemon, children_of, read_proc, test_environment

UP_WITHIN_S = 240.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Kin:
    """One session: its leader, its workers, and what registering it took (None: no daemon accepted it in time)."""

    leader: int
    register_s: float | None
    session: str
    workers: tuple[int, ...]


class Throng:
    """``leaders`` sessions of ``workers`` each; they all end with ``close()``, or with this process.

    They register at ``socket``, the daemon's own by default. With ``adopt`` the process that starts the leaders adopts
    their workers and waits for them, else init does.
    """

    def __init__(
        self,
        daemon: Daemon,
        leaders: int,
        workers: int,
        kind: str = "forked",
        *,
        socket: str | None = None,
        adopt: bool = False,
    ) -> None:
        self.daemon = daemon
        began_s = time.monotonic()
        self._process = subprocess.Popen(
            [
                *(sys.executable, os.path.join(ZOO, "throng.py"), str(leaders), str(workers), kind),
                *(["adopt"] if adopt else []),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=test_environment(
                daemon.run, REAPER_SOCKET=socket or daemon.socket, **{FAMILY_MARK: f"{daemon.run}.throng"}
            ),
            start_new_session=True,
        )
        try:
            self.sessions = [_parse(line) for line in self._read_lines(leaders)]
        except BaseException:
            self.close()
            raise
        self.up_s = time.monotonic() - began_s
        self.everyone = [pid for one in self.sessions for pid in (one.leader, *one.workers)]

    def _read_lines(self, count: int) -> list[bytes]:
        assert self._process.stdout is not None
        end_s = time.monotonic() + UP_WITHIN_S
        data = b""
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while data.count(b"\n") < count:
            if not poll.poll(max(0.0, end_s - time.monotonic()) * 1000):
                raise AssertionError(f"{data.count(10)} of {count} sessions are up after {UP_WITHIN_S:g} s")
            more = os.read(self._process.stdout.fileno(), 1 << 20)
            if not more:
                raise AssertionError(f"the throng ended with {self._process.wait()}")
            data += more
        return data.splitlines()

    def close(self) -> None:
        """End all that is left of it, and return when it is gone: everything holds the writing end of its stdout."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        with contextlib.suppress(OSError):
            while self._process.stdout.read(1 << 16):
                pass
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Throng:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _parse(line: bytes) -> Kin:
    leader, took_us, session, *workers = line.split()
    took = int(took_us)
    return Kin(int(leader), took / 1e6 if took >= 0 else None, session.decode(), tuple(map(int, workers)))


@dataclass(frozen=True)
class Reaping:
    """What became of sessions whose leaders were killed: seconds from each SIGKILL to the end of the last worker."""

    latencies_s: tuple[float, ...]
    total_s: float  # from the first SIGKILL to the end of the last worker of all
    alive: tuple[int, ...]  # workers that outlived the deadline
    processes: int

    @property
    def per_process_s(self) -> float:
        return self.total_s / self.processes


def kill_leaders(sessions: Sequence[Kin], *, within_s: float, over_s: float = 0.0) -> Reaping:
    """SIGKILL the leaders, spread evenly ``over_s``, and wait for their workers; no word from the daemon is needed."""
    with contextlib.ExitStack() as stack:
        epoll = stack.enter_context(select.epoll())
        pidfds: dict[int, int] = {}
        for pid in [pid for one in sessions for pid in (one.leader, *one.workers)]:
            pidfds[pid] = os.pidfd_open(pid)
            stack.callback(os.close, pidfds[pid])
        owner = {pidfds[pid]: one.leader for one in sessions for pid in one.workers}
        for descriptor in owner:
            epoll.register(descriptor, select.EPOLLIN)
        killed_s: dict[int, float] = {}
        gone_s: dict[int, float] = {}
        left = set(owner)
        began_s = time.monotonic()

        def attend(timeout_s: float) -> None:
            for descriptor, _ in epoll.poll(max(0.0, timeout_s), len(owner)):
                epoll.unregister(descriptor)
                left.discard(descriptor)
                gone_s[owner[descriptor]] = time.monotonic()

        for number, one in enumerate(sessions):
            due_s = began_s + over_s * number / len(sessions)
            while left and (wait_s := due_s - time.monotonic()) > 0:
                attend(wait_s)
            killed_s[one.leader] = time.monotonic()
            signal.pidfd_send_signal(pidfds[one.leader], signal.SIGKILL)
        end_s = time.monotonic() + within_s
        while left and time.monotonic() < end_s:
            attend(end_s - time.monotonic())
        alive = tuple(pid for one in sessions for pid in one.workers if pidfds[pid] in left)
        latencies = tuple(gone_s[leader] - killed_s[leader] for leader in killed_s if leader in gone_s)
        return Reaping(latencies, max(gone_s.values(), default=began_s) - began_s, alive, len(owner))


def bare_loop(workers: Iterable[int]) -> float:
    """Return the seconds in which a loop that knows ``workers`` already ends them with SIGKILL: what no daemon can beat."""
    pidfds = [os.pidfd_open(pid) for pid in workers]
    try:
        began_s = time.monotonic()
        for pidfd in pidfds:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pidfd in pidfds:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll()
        return time.monotonic() - began_s
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


@dataclass(frozen=True)
class Footprint:
    """What a daemon takes, its gate and helpers together; ``cpu_s`` has those that it has waited for."""

    pss_bytes: int
    descriptors: int
    cpu_s: float


def footprint(daemon: Daemon) -> Footprint:
    pids = [daemon.pid, *children_of(daemon.pid)]
    ticks = 0
    for pid in pids:
        fields = read_proc(pid, "stat").rpartition(b")")[2].split()
        ticks += sum(map(int, fields[11:15])) if fields else 0
    return Footprint(
        sum(map(_pss_bytes, pids)),
        sum(len(_names(f"/proc/{pid}/fd")) for pid in pids),
        ticks / TICKS_PER_S,
    )


def _pss_bytes(pid: int) -> int:
    for line in read_proc(pid, "smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []


def share(values: Iterable[float], part: float) -> float:
    """Return the value that ``part`` of ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")
