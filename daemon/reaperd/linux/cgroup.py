"""The memory cgroup's count of OOM kills, in either version of cgroups (cgroups(7), cgroup-v2.rst, memory.rst)."""

from __future__ import annotations

import os

from reaperd.linux.mounts import parse_mount_table


def parse_mounts(text: str) -> tuple[str, str]:
    """Return the mount points of cgroup v2 and of v1's memory controller in /proc/self/mounts; "" where there is none."""
    unified = memory = ""
    for mount in parse_mount_table(text):
        if mount.kind == "cgroup2":
            unified = unified or mount.point
        elif mount.kind == "cgroup" and "memory" in mount.options:
            memory = memory or mount.point
    return unified, memory


def parse_memory_path(text: str) -> tuple[str, str]:
    """Return the v2 path and the v1 memory path in the text of /proc/PID/cgroup; "" where there is none."""
    unified = memory = ""
    for line in text.split("\n"):
        _, colon, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if colon and controllers == "":
            unified = path
        elif "memory" in controllers.split(","):
            memory = path
    return unified, memory


def parse_oom_kills(text: str) -> int | None:
    """Return ``oom_kill`` in the text of memory.events or memory.oom_control."""
    for line in text.split("\n"):
        name, _, count = line.partition(" ")
        if name == "oom_kill" and count.isdigit():
            return int(count)
    return None


def counter_file(cgroup_text: str, mounts: str = "/proc/self/mounts") -> str:
    """Return the file that counts OOM kills in the memory cgroup that /proc/PID/cgroup names, "" where none does."""
    with open(mounts, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        unified_mount, memory_mount = parse_mounts(file.read())
    unified, memory = parse_memory_path(cgroup_text)
    candidates = []
    if memory and memory_mount:  # where v1 holds the controller, v2 has no files for it
        candidates.append(f"{memory_mount}{memory}/memory.oom_control")
    if unified and unified_mount:
        candidates += [
            f"{unified_mount}{unified}/memory.events.local",
            f"{unified_mount}{unified}/memory.events",
        ]
    return next((path for path in map(os.path.normpath, candidates) if oom_kills(path) is not None), "")


def oom_kills(path: str) -> int | None:
    """Return how many processes the OOM killer has ended, None where the file is gone or does not count."""
    try:
        with open(path, encoding="ascii") as file:
            return parse_oom_kills(file.read())
    except OSError:
        return None
