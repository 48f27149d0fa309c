"""What the figures are taken on: a daemon of Reaper's, its peers, throngs of sessions, and crowds of bystanders."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from harness import Daemon, Scratch, children_of, test_environment
from processes import count_processes, cpu_clock_s
from throng import Kin, Throng

from agent import client

T = TypeVar("T")

PROGRAMS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "programs")
SETTLED_WITHIN_S = 120.0
_PAUSE_S = 0.02
_LEAST_SCAN_S = 0.002  # of CPU: the listing of a crowded /proc alone takes longer
_SET_PDEATHSIG = 1  # PR_SET_PDEATHSIG, linux/prctl.h


class Unmeasured(Exception):
    """A row cannot be measured here; the text says why, and what would help."""


@dataclass(frozen=True)
class Bench:
    """What every row is given."""

    scratch: Scratch
    run: str
    quick: bool
    plots: str  # a directory

    @classmethod
    def begin(cls, scratch: Scratch, *, quick: bool, plots: str) -> Bench:
        return cls(scratch, uuid.uuid4().hex[:12], quick, plots)

    def times(self, full: T, quick: T) -> T:
        return quick if self.quick else full

    @contextlib.contextmanager
    def daemon(
        self, config: str = "", *, started: bool = True, inside: Sequence[str] = ()
    ) -> Iterator[Daemon]:
        """A daemon with the built-in settings, save for what ``config`` says; ready, unless ``started`` is False."""
        daemon = Daemon(self.scratch, self.run, config=config, inside=inside)
        try:
            yield daemon.start() if started else daemon
        finally:
            daemon.close()

    def environment(self, **more: str) -> dict[str, str]:
        return test_environment(self.run, **more)


# -- processes that end with us -------------------------------------------------------------------


@contextlib.contextmanager
def program(bench: Bench, name: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of ``programs``, from when it says "up" until the block ends, which closes its stdin."""
    process = subprocess.Popen(
        [sys.executable, os.path.join(PROGRAMS, name), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=bench.environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"up\n":
            raise Unmeasured(
                f"{name} {' '.join(arguments)[:40]} did not come up, it left with {process.wait()}"
            )
        yield process
    finally:
        process.stdin.close()
        while process.stdout.read(1 << 16):  # at its end, all who inherited it are gone
            pass
        process.stdout.close()
        process.wait()


def answers(bench: Bench, name: str, *arguments: str) -> list[list[float]]:
    """Run one of ``programs`` to its end and return the numbers it prints, line by line."""
    done = subprocess.run(
        [sys.executable, os.path.join(PROGRAMS, name), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=bench.environment(),
    )
    if done.returncode:
        raise Unmeasured(f"{name} {' '.join(arguments)} failed: {done.stderr.strip()[-500:]}")
    return [[float(word) for word in line.split()] for line in done.stdout.splitlines()]


@contextlib.contextmanager
def crowd(bench: Bench, total: int) -> Iterator[int]:
    """Fill the host up to ``total`` processes and yield how many there are."""
    missing = total - count_processes() - 1
    if missing <= 0:
        yield count_processes()
        return
    with program(bench, "crowd.py", str(missing)):
        yield count_processes()


# -- sessions -------------------------------------------------------------------------------------


def ask(daemon: Daemon, operation: str, **more: Any) -> dict[str, Any]:
    """Return the daemon's reply, without a process of ``reaperctl`` in between."""
    return client.request(daemon.socket, {"op": operation, **more}, timeout_s=60.0)


def wait_until(there: Callable[[], bool], what: str, within_s: float = SETTLED_WITHIN_S) -> None:
    """Look again every 20 ms, which disturbs nobody, until ``there``."""
    end_s = time.monotonic() + within_s
    while not there():
        if time.monotonic() > end_s:
            raise AssertionError(f"{what}: not within {within_s:g} s")
        time.sleep(_PAUSE_S)


def wait_idle(daemon: Daemon) -> None:
    """Return when the daemon has put every session on record and has nothing left to do."""
    wait_until(lambda: ask(daemon, "status")["status"]["sessions"] == 0, "a session is still listed")


def wait_concluded(daemon: Daemon, session: str) -> None:
    """Return when the end of ``session`` is on record; the daemon tells, and is not kept busy with questions."""
    after = 0
    end_s = time.monotonic() + SETTLED_WITHIN_S
    while time.monotonic() < end_s:
        reply = ask(daemon, "events", session=session, after=after, wait_s=30)
        if any(event["kind"] in ("reaped", "ended") for event in reply["events"]):
            return
        after = reply["last"]
    raise AssertionError(f"the end of session {session} is not on record after {SETTLED_WITHIN_S:g} s")


def wait_scanned(pid: int, interval_s: float) -> None:
    """Return in the pause after the next scan: the CPU clock of an idle daemon moves by so much for nothing else."""
    asked_s = moved_s = time.monotonic()
    began_s, cpu_s = 0.0, cpu_clock_s(pid)
    least_cpu_s = cpu_s + _LEAST_SCAN_S
    while cpu_s < least_cpu_s or time.monotonic() < moved_s + interval_s / 5:
        time.sleep(_PAUSE_S / 2)
        now_s, now_cpu_s = time.monotonic(), cpu_clock_s(pid)
        if now_cpu_s != cpu_s:
            moved_s, cpu_s = now_s, now_cpu_s
            began_s = began_s or (now_s if cpu_s >= least_cpu_s else 0.0)
        if not began_s and now_s > asked_s + 20 * interval_s:
            raise AssertionError(f"the daemon has not scanned for {20 * interval_s:g} s")
        if began_s and now_s > began_s + interval_s:
            raise Unmeasured(f"the host is too busy: a scan takes more than the {interval_s:g} s between two")


def nobody_at(daemon: Daemon) -> str:
    """Return a socket that nobody serves: a session that was registered there is none of ``daemon``'s."""
    return f"{daemon.socket}.nobody"


def last_one_gone(one: Kin, within_s: float = 60.0) -> float:
    """SIGKILL the leader and return the seconds until its last worker has ended, by the kernel's word."""
    leader = os.pidfd_open(one.leader)
    workers = [os.pidfd_open(pid) for pid in one.workers]
    polls = []
    for worker in workers:
        polls.append(select.poll())
        polls[-1].register(worker, select.POLLIN)
    gc.collect()
    gc.disable()
    try:
        began_s = time.monotonic()
        signal.pidfd_send_signal(leader, signal.SIGKILL)
        for poll in polls:
            if not poll.poll(within_s * 1000):
                raise AssertionError(f"a worker outlives its leader by {within_s:g} s")
        return time.monotonic() - began_s
    finally:
        gc.enable()
        for descriptor in (leader, *workers):
            os.close(descriptor)


def reap_with_daemon(daemon: Daemon, workers: int, kind: str = "forked") -> float:
    """Return the seconds that a session of ``workers`` outlives its leader where ``daemon`` watches it."""
    with Throng(daemon, 1, workers, kind, adopt=True) as throng:
        assert throng.sessions[0].register_s is not None, "the daemon did not accept the session"
        took_s = last_one_gone(throng.sessions[0])
        wait_concluded(daemon, throng.sessions[0].session)
    wait_idle(daemon)
    return took_s


def reap_with_bare_loop(bench: Bench, daemon: Daemon, workers: int, kind: str = "forked") -> float:
    """Return the same where a bare loop watches a session of the same kind; ``daemon`` stands by, idle."""
    with Throng(daemon, 1, workers, kind, socket=nobody_at(daemon), adopt=True) as throng:
        one = throng.sessions[0]
        with program(bench, "bare_loop.py", str(one.leader), *map(str, one.workers)):
            return last_one_gone(one)


# -- peers ----------------------------------------------------------------------------------------

_CIRCUS = """\
[circus]
endpoint = ipc://{directory}/endpoint
pubsub_endpoint = ipc://{directory}/pubsub
logoutput = {directory}/log
[watcher:bench]
cmd = sleep
args = 1200
numprocesses = {children}
"""

_SUPERVISOR = """\
[supervisord]
nodaemon = true
logfile = {directory}/log
pidfile = {directory}/pid
childlogdir = {directory}
[unix_http_server]
file = {directory}/socket
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[program:bench]
command = sleep 1200
numprocs = {children}
process_name = %(program_name)s_%(process_num)03d
"""


@contextlib.contextmanager
def circusd(bench: Bench, children: int) -> Iterator[int]:
    """Yield the pid of a circusd that watches ``children`` processes."""
    with _peer(bench, _CIRCUS, ["circus.circusd"], children) as pid:
        yield pid


@contextlib.contextmanager
def supervisord(bench: Bench, children: int) -> Iterator[int]:
    """Yield the pid of a supervisord that watches ``children`` processes."""
    with _peer(bench, _SUPERVISOR, ["supervisor.supervisord", "-c"], children) as pid:
        yield pid


@contextlib.contextmanager
def _peer(bench: Bench, config: str, module: Sequence[str], children: int) -> Iterator[int]:
    directory = bench.scratch.directory("p")
    path = os.path.join(directory, "config")
    with open(path, "w", encoding="utf-8") as file:
        file.write(config.format(directory=directory, children=children))
    libc = ctypes.CDLL(None)
    with open(os.path.join(directory, "output"), "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *module, path],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=bench.environment(),
            # Should we be killed: they end their children on SIGTERM.
            preexec_fn=lambda: libc.prctl(_SET_PDEATHSIG, signal.SIGTERM),
        )
    try:
        wait_until(
            lambda: process.poll() is not None or len(children_of(process.pid)) == children,
            f"{module[0]} has not started its children",
        )
        if process.poll() is not None:
            with open(output.name, encoding="utf-8", errors="replace") as file:
                raise Unmeasured(f"{module[0]} left with {process.returncode}: {file.read()[-500:]}")
        yield process.pid
    finally:
        process.terminate()
        process.wait(60)
