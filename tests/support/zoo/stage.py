"""What the training scripts of this directory share: knowing that every process is up, saying so, and living on.

A script prints one line of JSON once everything it starts is running, then obeys the words on its
stdin. Each worker says that it is up through a named pipe, for that works with every start method.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import select
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

UP_WITHIN_S = 60.0
LIGHT = "REAPER_TEST_LIGHT"  # in the environment
IGNORE = "REAPER_TEST_IGNORE"  # in the environment: a signal's name
BREATH_S, PAUSE_S = 0.002, 0.08
# No process of these scripts works for longer, should nobody end it.
LIFETIME_S = float(os.environ.get("REAPER_TEST_LIFETIME_S", "150"))

Command = Callable[[list[str]], None]


# -- what a worker does ---------------------------------------------------------------------------


def report(pipe: str) -> None:
    """Say that this process is up; a write of less than PIPE_BUF bytes is never mixed with another's."""
    report_as(pipe, os.getpid())


def report_as(pipe: str, pid: int) -> None:
    descriptor = os.open(pipe, os.O_WRONLY)
    try:
        os.write(descriptor, f"{pid}\n".encode())
    finally:
        os.close(descriptor)


def spin() -> None:
    """Burn a core, in steps short enough for a signal handler to run; a small part of it where LIGHT is set."""
    if os.environ.get(LIGHT):
        breathe()
    end_s = time.monotonic() + LIFETIME_S
    while time.monotonic() < end_s:
        sum_up()


def sum_up() -> None:
    sum(range(10_000))


def breathe(breath: Callable[[], object] = sum_up) -> None:
    """Use some hundredths of a core for the rest of this life, so that a herd can be busy on a small machine."""
    end_s = time.monotonic() + LIFETIME_S
    while time.monotonic() < end_s:
        until_s = time.monotonic() + BREATH_S
        while time.monotonic() < until_s:
            breath()
        time.sleep(PAUSE_S)


def hold() -> None:
    """Do nothing, at 0 % CPU, whatever signals with handlers arrive."""
    end_s = time.monotonic() + LIFETIME_S
    while (left_s := end_s - time.monotonic()) > 0:
        time.sleep(left_s)


def end_this_thread() -> None:
    """End the calling thread alone, without a word to Python."""
    libc = ctypes.CDLL(None)
    libc.syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)  # SYS_exit


def work(pipe: str, release: str, busy: bool) -> None:
    """The task of every pool here: say that a worker is up, then spin, or return once all of them are up.

    A worker that returned at once could take the next task as well, and one of the pool would never start.
    """
    if name := os.environ.get(IGNORE):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    report(pipe)
    if busy:
        spin()
        return
    descriptor = os.open(release, os.O_RDONLY)
    try:
        os.read(descriptor, 1)
    finally:
        os.close(descriptor)


# -- what a leader does ---------------------------------------------------------------------------


class Muster:
    """Two named pipes: on one the workers report, on the other the idle ones wait to be let go."""

    def __init__(self) -> None:
        base = os.environ.get("REAPER_TEST_DIR")
        self.directory = tempfile.mkdtemp(prefix="muster-", dir=base)
        self.pipe = os.path.join(self.directory, "up")
        self.release_pipe = os.path.join(self.directory, "go")
        self._descriptors = []
        for path in (self.pipe, self.release_pipe):
            os.mkfifo(path)
            # Read and write: neither end of file nor a blocking open, whoever comes first.
            self._descriptors.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        os.chmod(self.directory, 0o755)
        os.chmod(self.pipe, stat.S_IRUSR | stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
        self._unread = b""

    def wait(self, count: int) -> list[int]:
        """Return the first ``count`` distinct pids that report; raise TimeoutError when they do not all come."""
        pids: set[int] = set()
        end_s = time.monotonic() + UP_WITHIN_S
        while len(pids) < count:
            ready, _, _ = select.select([self._descriptors[0]], [], [], max(0.0, end_s - time.monotonic()))
            if not ready:
                raise TimeoutError(f"only {len(pids)} of {count} processes came up within {UP_WITHIN_S:g} s")
            *lines, self._unread = (self._unread + os.read(self._descriptors[0], 4096)).split(b"\n")
            pids.update(int(line) for line in lines)
        return sorted(pids)

    def release(self, count: int) -> None:
        """Let ``count`` idle workers return from their task."""
        os.write(self._descriptors[1], b"." * count)


def children(pid: int) -> list[int]:
    """Return the children of ``pid``, of all its threads; none when it has gone."""
    found: list[int] = []
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
            found.extend(map(int, file.read().split()))
    return found


def descendants(pid: int) -> list[int]:
    """Return the living children of ``pid`` and theirs."""
    found = children(pid)
    for child in found:
        found.extend(children(child))  # the list grows while it is walked
    return found


def role(pid: int) -> str:
    """Return ``tracker``, ``forkserver`` or ``worker``, by the command line."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = file.read()
    except OSError:
        return "worker"
    if b"resource_tracker" in arguments:
        return "tracker"
    # Its forked workers share its command line; only the leader's own child is the server.
    if b"multiprocessing.forkserver" in arguments and pid in children(os.getpid()):
        return "forkserver"
    return "worker"


def lineup(more: Iterable[int] = ()) -> dict[str, list[int]]:
    """Return every descendant of this process by its role, and ``more`` that are no descendants any longer."""
    roles: dict[str, list[int]] = {}
    for pid in dict.fromkeys([*descendants(os.getpid()), *more]):
        roles.setdefault(role(pid), []).append(pid)
    return roles


def announce(more: Iterable[int] = (), **facts: Any) -> None:
    """Print the line that says: all are up, and these are their pids."""
    line = {
        "leader": os.getpid(),
        "pids": lineup(more),
        "lineage": os.environ.get("REAPER_LINEAGE"),
        **facts,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def live(commands: Mapping[str, Command] | None = None) -> None:
    """Obey the words on stdin, one line each, until ``end`` (the script ends in good order).

    ``raise`` is an unhandled exception, ``exit N`` is os._exit(N), ``signal N`` sends itself that signal,
    ``eat BYTES`` holds that much memory, ``ping`` prints a line. At the end of stdin whoever wanted this
    leader has gone, so it goes too.
    """
    for line in iter(sys.stdin.readline, ""):
        word, *rest = line.split()
        if word == "end":
            return
        _obey(word, rest, commands or {})
    os._exit(70)


def _obey(word: str, rest: Sequence[str], commands: Mapping[str, Command]) -> None:
    if word in commands:
        commands[word](list(rest))
    elif word == "raise":
        raise ArithmeticError("the training diverged")
    elif word == "exit":
        os._exit(int(rest[0]))
    elif word == "signal":
        os.kill(os.getpid(), int(rest[0]))
        signal.pause()
    elif word == "eat":
        _HELD.append(bytearray(b"\1") * int(rest[0]))
        answer(eaten=int(rest[0]))
    elif word == "ping":
        answer(pong=True)
    else:
        raise SystemExit(f"{sys.argv[0]}: unknown command {word!r}")


_HELD: list[bytearray] = []


def answer(**facts: Any) -> None:
    """Print one more line of JSON, in answer to a command."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def serve_beside(announce_all: Callable[[], None], commands: Mapping[str, Command] | None = None) -> None:
    """Announce and obey in a thread, for a script whose main thread is busy in a library."""
    import threading

    def serve() -> None:
        announce_all()
        live(commands)
        os._exit(0)

    threading.Thread(target=serve, daemon=True).start()
