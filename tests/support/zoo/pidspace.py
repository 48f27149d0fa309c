"""Sessions of forks in a pid namespace, and innocents that are given the pids of their dead.

``ns_last_pid`` decides which pid the next fork in a namespace gets, and nobody else forks in one of our own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import harness
from harness import RUN_MARK, Daemon, alive, wait_gone

import agent
from agent import client

LIFETIME_S = 90
REUSED_WITHIN_S = 10.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")  # in which some cases have a pid change hands
HEARD_WITHIN_S = 30.0
FAR = itertools.count(1000, 100)  # pids that nobody had yet
SLEEPER = ["sleep", str(LIFETIME_S)]


# -- processes ------------------------------------------------------------------------------------


def fork(body: Callable[[], object]) -> int:
    """Run ``body`` in a forked child that never returns, and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.alarm(LIFETIME_S)
        body()
    except BaseException:  # noqa: BLE001 - a fork must never return into the code of its parent
        traceback.print_exc()
    finally:
        os._exit(0)


def hold() -> None:
    while True:
        signal.pause()


def start_ticks(pid: int) -> int:
    fields = harness.read_proc(pid, "stat").rpartition(b")")[2].split()
    return int(fields[19]) if fields else 0


def end(pid: int, *, child: bool = True) -> None:
    """SIGKILL ``pid`` and return when its number is free: when we, or whoever its parent is, have waited for it."""
    os.kill(pid, signal.SIGKILL)
    if child:
        os.waitpid(pid, 0)
    wait_free(pid)


def wait_free(pid: int) -> None:
    began_s = time.monotonic()
    while os.path.exists(f"/proc/{pid}"):  # nothing tells when somebody else has waited for a zombie
        os.sched_yield()  # it may need this very CPU to end, and in some cases nobody takes that from us
        _let_others_in(began_s)
        assert time.monotonic() < began_s + REUSED_WITHIN_S, (
            f"{pid} lives: {harness.read_proc(pid, 'status')!r}"
        )


def _let_others_in(began_s: float) -> None:
    """Sleep for a moment if what began then was not done within a tick."""
    if time.monotonic() - began_s > TICK_S:
        # To yield lets nobody in who is not of our scheduling class, nor on another CPU that one like us keeps.
        select.select([], [], [], TICK_S / 10)


def set_last_pid(pid: int) -> None:
    with open("/proc/sys/kernel/ns_last_pid", "w", encoding="ascii") as file:
        file.write(str(pid))


def take_pid(pid: int, body: Callable[[], object]) -> int:
    """Run ``body`` in a child that has ``pid``, a free one."""
    began_s = time.monotonic()

    def elsewhere_then_body() -> None:
        if os.getpid() == pid:
            set_last_pid(next(FAR))  # or its children would get the pids of the next to be reused
            body()

    while time.monotonic() < began_s + REUSED_WITHIN_S:
        set_last_pid(pid - 1)
        child = fork(elsewhere_then_body)
        if child == pid:
            return child
        with contextlib.suppress(ChildProcessError):  # who ignores SIGCHLD need not wait
            os.waitpid(child, 0)
        _let_others_in(began_s)  # such as a process of the daemon that has that pid and is not yet begun
    raise AssertionError(f"no child got {pid}")


@dataclass
class Channel:
    """Numbers that forks report, for as long as whoever made this keeps it."""

    ends: tuple[int, int] = field(default_factory=os.pipe)

    def __del__(self) -> None:
        for descriptor in self.ends:
            os.close(descriptor)

    def say(self, *numbers: int) -> None:
        os.write(self.ends[1], "".join(f"{number} " for number in numbers).encode())

    def hear(self, count: int) -> list[int]:
        data = b""
        while data.count(b" ") < count:
            ready, _, _ = select.select([self.ends[0]], [], [], HEARD_WITHIN_S)
            assert ready, f"of {count} numbers only {data!r} came within {HEARD_WITHIN_S:g} s"
            data += os.read(self.ends[0], 4096)
        return [int(word) for word in data.split()]


# -- the daemon -----------------------------------------------------------------------------------


def ask(daemon: Daemon, op: str, **more: Any) -> dict[str, Any]:
    """Return what the daemon answers; faster than a reaperctl of its own."""
    return client.request(daemon.socket, {"op": op, **more}, timeout_s=harness.REPLY_WITHIN_S)


def session_of(daemon: Daemon, leader: int) -> dict[str, Any] | None:
    sessions: list[dict[str, Any]] = ask(daemon, "ps")["sessions"]
    return next((one for one in sessions if one["leader"]["pid"] == leader), None)


def wait_listed(daemon: Daemon, leader: int, pids: Sequence[int]) -> None:
    """Return when ``ps`` lists ``pids`` below ``leader``: what is known by descent alone must have been seen by a look."""

    def listed() -> bool | None:
        session = session_of(daemon, leader)
        return True if session and {worker["pid"] for worker in session["workers"]} >= set(pids) else None

    harness.repeat_until(listed, 10.0, f"{pids} are not listed below {leader}")


def wait_over(daemon: Daemon, leader: int, sessions: int = 1) -> None:
    """Return when so many sessions whose id names ``leader`` are over."""

    def over() -> bool | None:
        events = ask(daemon, "events")["events"]
        ended = {
            event["session"]
            for event in events
            if event["kind"] in ("reaped", "ended") and (event.get("session") or "").startswith(f"{leader}-")
        }
        return True if len(ended) >= sessions else None

    harness.repeat_until(over, 20.0, f"the session of {leader} is not over")


# -- sessions -------------------------------------------------------------------------------------


@dataclass
class Session:
    """A leader that is a fork of ours, and its workers."""

    leader: int
    workers: list[int]

    def kill_leader(self) -> None:
        end(self.leader)


def start_session(daemon: Daemon, *kinds: str, deaf: bool = False) -> Session:
    """Start a leader with one worker of each kind in ``WORKERS``; a ``parent`` starts one more, which is reported first."""
    channel = Channel()

    def lead() -> None:
        if deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever ends is waited for, so its pid is free
        agent.register("reuse", socket=daemon.socket, timeout=10.0, required=True)
        for kind in kinds:
            channel.say(parent(channel) if kind == "parent" else WORKERS[kind]())
        hold()

    leader = fork(lead)
    found = channel.hear(len(kinds) + kinds.count("parent"))
    wait_listed(daemon, leader, found)
    return Session(leader, found)


def stubborn() -> int:
    """Start a worker that lasts until it is killed, and so keeps the reap of its session going."""

    def ignore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        hold()

    return fork(ignore)


def bare() -> int:
    """Start a worker that no mark tells: it lost the page when it exec'ed, and was given an empty environment."""
    mark = {RUN_MARK: os.environ[RUN_MARK]}
    return subprocess.Popen(SLEEPER, env={"PATH": os.environ["PATH"], **mark}).pid


def parent(channel: Channel) -> int:
    """Start a worker that starts one itself."""

    def start_and_hold() -> None:
        channel.say(bare())
        hold()

    return fork(start_and_hold)


WORKERS: dict[str, Callable[[], int]] = {
    "forked": lambda: fork(hold),
    "stubborn": stubborn,
    "execed": lambda: subprocess.Popen(SLEEPER).pid,
    "bare": bare,
}


# -- innocents ------------------------------------------------------------------------------------


@dataclass
class Innocent:
    """A process that got the pid of a dead one, and its children. They have our uid and none of the marks.

    Its folder bears the pid, as those that joblib makes.
    """

    pids: list[int]
    folder: str

    def check(self) -> None:
        assert os.path.isdir(self.folder), f"{self.folder} was taken from its living owner"
        dead = [pid for pid in self.pids if not alive(pid)]
        assert not dead, f"of the innocents {self.pids} these were ended: {dead}"

    def end(self) -> None:
        self.check()
        os.rmdir(self.folder)
        for pid in self.pids[1:]:
            os.kill(pid, signal.SIGKILL)
        end(self.pids[0])


def reuse(
    pid: int, kinds: Sequence[str] = ("forked", "bare"), *, lead: Callable[[], object] | None = None
) -> Innocent:
    """Give ``pid`` to an innocent that makes a folder, calls ``lead``, starts children of ``kinds``, and lives on."""
    channel = Channel()
    folder = f"/dev/shm/joblib_memmapping_folder_{pid}_theirs"

    def live() -> None:
        os.mkdir(folder)
        if lead is not None:
            lead()
        channel.say(pid, *(WORKERS[kind]() for kind in kinds))
        hold()

    take_pid(pid, live)
    return Innocent(channel.hear(1 + len(kinds)), folder)


def assert_reaped(workers: Sequence[int], innocents: Sequence[Innocent], within_s: float) -> None:
    """Assert that ``workers`` are gone in time, and that ``innocents``, who may have their pids, are not."""
    theirs = {pid for innocent in innocents for pid in innocent.pids}
    left = wait_gone([pid for pid in workers if pid not in theirs], within_s)
    for innocent in innocents:
        innocent.check()
    assert not left, f"workers live on:\n{harness.describe(left)}"
