"""The memory cgroup's count of OOM kills, in either version of cgroups (cgroups(7), cgroup-v2.rst, memory.rst)."""

from __future__ import annotations

import os
from typing import NamedTuple

from reaperd.linux.cgroups import parse_memberships, read_hierarchies


def parse_memory_path(text: str) -> tuple[str, str]:
    """Return the v2 path and the v1 memory path in the text of /proc/PID/cgroup; "" where there is none."""
    unified = memory = ""
    for controllers, path in parse_memberships(text):
        if controllers == "":
            unified = path
        elif "memory" in controllers.split(","):
            memory = path
    return unified, memory


def parse_oom_kills(text: str) -> int | None:
    """Return ``oom_kill`` in the text of memory.events or memory.oom_control."""
    for line in text.split("\n"):
        name, _, count = line.partition(" ")
        if name == "oom_kill" and count.isascii() and count.isdigit():
            return int(count)
    return None


class Counter(NamedTuple):
    """A file that counts OOM kills, and how many it has counted; "" and None where there is none."""

    path: str = ""
    kills: int | None = None


class Counters:
    """Finds the counters of one host, and remembers where its cgroups are mounted: each session asks for one."""

    def __init__(self, mounts: str = "/proc/self/mounts") -> None:
        self._mounts = mounts
        self._mounted: dict[str, str] | None = None

    def find(self, cgroup_text: str) -> Counter:
        """Return the counter of the memory cgroup that the text of /proc/PID/cgroup names."""
        if self._mounted is not None:
            found = _first_that_counts(cgroup_text, self._mounted)
            if found.path:
                return found
        # They may be mounted elsewhere by now.
        self._mounted = read_hierarchies(self._mounts)
        return _first_that_counts(cgroup_text, self._mounted)


def counter_file(cgroup_text: str) -> str:
    """Return the file that counts OOM kills in the memory cgroup that /proc/PID/cgroup names, "" where none does."""
    return Counters().find(cgroup_text).path


def _first_that_counts(cgroup_text: str, mounted: dict[str, str]) -> Counter:
    unified, memory = parse_memory_path(cgroup_text)
    candidates = []
    if memory and "memory" in mounted:  # where v1 holds the controller, v2 has no files for it
        candidates.append(f"{mounted['memory']}{memory}/memory.oom_control")
    if unified and "" in mounted:
        folder = f"{mounted['']}{unified}"
        candidates += [f"{folder}/memory.events.local", f"{folder}/memory.events"]
    for path in map(os.path.normpath, candidates):
        if (kills := read_kills(path)) is not None:
            return Counter(path, kills)
    return Counter()


def read_kills(path: str) -> int | None:
    """Return how many processes the OOM killer has ended, None where the file is gone or does not count."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return parse_oom_kills(os.read(descriptor, 4096).decode("ascii", "replace"))
    except OSError:
        return None
    finally:
        os.close(descriptor)
