"""Has a real daemon run out of something: lowers its limits while it runs, or starts it as ``faulty.py`` does."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import sys
from collections.abc import Iterator

from harness import ROOT, Daemon

FAULTY = os.path.join(ROOT, "tests", "support", "faulty.py")


@contextlib.contextmanager
def limited(pid: int, which: int, most: int) -> Iterator[None]:
    """Lower a limit of a process that runs, for as long as the block lasts."""
    before = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, which, before)


def lowest_free_descriptor(pid: int) -> int:
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in itertools.count() if number not in taken)


def faulty(kind: str, seed: int, gap: int) -> list[str]:
    """Return the command that a ``Daemon`` is to be run ``inside``, for bad times of that kind."""
    return [sys.executable, FAULTY, kind, str(seed), str(gap)]


@contextlib.contextmanager
def bad_time(daemon: Daemon) -> Iterator[None]:
    """Have a daemon that runs inside ``faulty()`` fail now and then, for as long as the block lasts."""
    os.kill(daemon.pid, signal.SIGUSR1)
    try:
        yield
    finally:
        os.kill(daemon.pid, signal.SIGUSR2)
