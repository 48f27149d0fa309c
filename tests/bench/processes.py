"""What the kernel has on record of a process: CPU time, wake-ups, memory. Reads only."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from harness import children_of, read_proc

_SCHEDULER_CLOCK = 2  # CPUCLOCK_SCHED, include/linux/posix-timers.h
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Spent:
    """What processes have taken so far, or between two looks."""

    at_s: float
    cpu_s: float
    woken: Mapping[int, int]  # by pid

    @property
    def wake_ups(self) -> int:
        return sum(self.woken.values())

    def since(self, before: Spent) -> Spent:
        """Return what was taken since ``before``; who came or went meanwhile has no wake-ups, but CPU time it has."""
        woken = {pid: count - before.woken[pid] for pid, count in self.woken.items() if pid in before.woken}
        return Spent(self.at_s - before.at_s, self.cpu_s - before.cpu_s, woken)


@dataclass(frozen=True, slots=True)
class Memory:
    """What processes hold. ``pss_bytes`` shares what several have mapped among all of them."""

    pss_bytes: int
    rss_bytes: int
    private_bytes: int


def spent(pids: Iterable[int]) -> Spent:
    """Return what ``pids`` have taken, with the children they have waited for; a helper may end meanwhile."""
    cpu_s = 0.0
    woken = {}
    for pid in pids:
        with contextlib.suppress(OSError):  # ESRCH, ENOENT; EINVAL: a clock of nobody
            cpu_s += _cpu_s(pid)
            woken[pid] = _wake_ups(pid)
    return Spent(time.monotonic(), cpu_s, woken)


def cpu_clock_s(pid: int) -> float:
    """Return the CPU seconds of all threads that ``pid`` has and had, to the nanosecond: clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | _SCHEDULER_CLOCK)


def _cpu_s(pid: int) -> float:
    """Return the same with its dead children, which are counted in ticks."""
    fields = read_proc(pid, "stat").rpartition(b")")[2].split()
    return cpu_clock_s(pid) + (int(fields[13]) + int(fields[14])) / _TICKS_PER_S


def _wake_ups(pid: int) -> int:
    """Return how often the threads of ``pid`` have gone to sleep of their own accord: each had to be woken."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        for line in read_proc(pid, f"task/{task}/status").splitlines():
            if line.startswith(b"voluntary_ctxt_switches:"):
                total += int(line.split()[1])
    return total


def memory(pids: Iterable[int]) -> Memory:
    totals = {b"Pss:": 0, b"Rss:": 0, b"Private_Clean:": 0, b"Private_Dirty:": 0}
    for pid in pids:
        for line in read_proc(pid, "smaps_rollup").splitlines():
            name, *rest = line.split()
            if name in totals:
                totals[name] += int(rest[0]) * 1024
    return Memory(totals[b"Pss:"], totals[b"Rss:"], totals[b"Private_Clean:"] + totals[b"Private_Dirty:"])


def with_children(pid: int) -> list[int]:
    """Return ``pid`` and its children as they stand: the core of a daemon, its gate, its helpers."""
    return [pid, *children_of(pid)]


def count_processes() -> int:
    return sum(name.isdigit() for name in os.listdir("/proc"))
