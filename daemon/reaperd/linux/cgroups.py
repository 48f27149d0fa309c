"""The unified hierarchy of control groups: who is in one, its limits, and what is done to all who are in it (cgroup-v2.rst).

Paths of groups are as /proc/PID/cgroup has them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time

from reaperd.linux.mounts import parse_mount_table

_MOST_BYTES = 4 * 1024 * 1024
# What says that nothing is limited, by the file of either version; pids.max can be had anew.
_UNLIMITED = {
    "memory.max": "max",
    "memory.high": "max",
    "memory.swap.max": "max",
    "cpu.max": "max",
    "cpuset.cpus": "",
    "cpuset.mems": "",
    "io.max": "",
    "cpu.cfs_quota_us": "-1",
    "memory.limit_in_bytes": str(2**63 - 4096),
    "memory.memsw.limit_in_bytes": str(2**63 - 4096),
}


class CGroups:
    """The control groups of this host, as far as they are mounted here."""

    def __init__(self, mounts: str = "/proc/self/mounts") -> None:
        self._mounts = mounts
        self._mounted: dict[str, str] | None = None

    def _hierarchies(self) -> dict[str, str]:
        """Return the mount points by controller, "" for the unified hierarchy."""
        if self._mounted is None or "" not in self._mounted:  # it may be mounted by now
            self._mounted = read_hierarchies(self._mounts)
        return self._mounted

    def directory(self, cgroup: str) -> str:
        """Return the directory of a group of the unified hierarchy; FileNotFoundError where that is not mounted."""
        where = self._hierarchies().get("")
        if where is None or ".." in cgroup.split("/"):  # seen from a namespace that it is not in
            raise FileNotFoundError(f"no unified hierarchy has {cgroup}")
        return os.path.normpath(where + cgroup)

    def residents(self, cgroup: str) -> set[int]:
        """Return the pids of all in a group and below it; none where it is gone, or cannot be read.

        0 stands for whoever is in another pid namespace, and is nobody's pid here.
        """
        with contextlib.suppress(OSError):
            return set().union(*(_members(folder) for folder, _, _ in os.walk(self.directory(cgroup))))
        return set()

    def residents_of_one(self, cgroup: str) -> set[int]:
        """Return the pids of all in a group itself, 0 as ``residents()`` has it; OSError."""
        return _members(self.directory(cgroup))

    def limits_left(self, cgroups_text: str, above: str) -> str:
        """Return the first limit that a process would leave which is moved to just below ``above``, "" where there is none.

        ``cgroups_text`` is that of its /proc/PID/cgroup.
        """
        mounted = self._hierarchies()
        for controllers, path in parse_memberships(cgroups_text):
            where = next((mounted[one] for one in controllers.split(",") if one in mounted), None)
            at = path.rstrip("/")
            while where is not None and at and at != above and not above.startswith(f"{at}/"):
                for name, unlimited in _UNLIMITED.items():
                    with contextlib.suppress(OSError):
                        told = _read(f"{where}{at}/{name}").strip()
                        if told.partition(" ")[0] != unlimited:
                            return f"{name} of {at} is {told!r:.80}"
                at = at.rpartition("/")[0]
        return ""

    def most_tasks(self, cgroups_text: str, above: str) -> int | None:
        """Return the most processes and threads that a process may have below ``above``, None for any number."""
        mounted = self._hierarchies()
        found = []
        for controllers, path in parse_memberships(cgroups_text):
            where = next((mounted[one] for one in controllers.split(",") if one in mounted), None)
            at = path.rstrip("/")
            while where is not None and at and at != above and not above.startswith(f"{at}/"):
                with contextlib.suppress(OSError, ValueError):
                    found.append(int(_read(f"{where}{at}/pids.max")))
                at = at.rpartition("/")[0]
        return min(found, default=None)

    # -- doing something to all of them ------------------------------------------------------

    def freeze(self, cgroup: str) -> None:
        """Have all in a group hold still, as soon as each of them can; OSError where that cannot be asked for."""
        _write(f"{self.directory(cgroup)}/cgroup.freeze", b"1")

    def wait_frozen(self, cgroup: str, until_s: float) -> bool:
        """Say whether all in a group hold still by ``until_s``, a monotonic time; who does not is in state D. OSError."""
        events = os.open(f"{self.directory(cgroup)}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        try:
            poller = select.poll()
            poller.register(events, select.POLLPRI)
            while b"frozen 1" not in os.pread(events, 4096, 0):
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    return False
                poller.poll(left_s * 1000)
        finally:
            os.close(events)
        return True

    def thaw(self, cgroup: str) -> None:
        """Let all in a group go on; OSError."""
        _write(f"{self.directory(cgroup)}/cgroup.freeze", b"0")

    def kill(self, cgroup: str) -> None:
        """Send SIGKILL to all in a group and below it, to those who are forked meanwhile as well (Linux 5.14); OSError."""
        _write(f"{self.directory(cgroup)}/cgroup.kill", b"1")

    def make(self, cgroup: str, pid: int) -> None:
        """Make a group and put a process into it; OSError."""
        folder = self.directory(cgroup)
        os.mkdir(folder, 0o755)
        try:
            _write(f"{folder}/cgroup.procs", str(pid).encode())
        except OSError:
            os.rmdir(folder)
            raise

    def owner(self, cgroup: str) -> int | None:
        """Return the uid to which a group belongs, None where it cannot be told."""
        try:
            return os.stat(self.directory(cgroup)).st_uid
        except OSError:
            return None

    def remove(self, cgroup: str) -> None:
        """Remove an empty group, and the empty ones below; OSError where somebody is in it still."""
        for folder, _, _ in os.walk(self.directory(cgroup), topdown=False):
            os.rmdir(folder)


def read_hierarchies(mounts: str) -> dict[str, str]:
    """Return what ``parse_hierarchies()`` finds in a file like /proc/self/mounts."""
    with open(mounts, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return parse_hierarchies(file.read())


def parse_hierarchies(text: str) -> dict[str, str]:
    """Return the mount points in a mount table by controller, "" for the unified hierarchy; the first of each."""
    found: dict[str, str] = {}
    for mount in parse_mount_table(text):
        if mount.kind == "cgroup2":
            found.setdefault("", mount.point)
        elif mount.kind == "cgroup":
            for option in mount.options:
                found.setdefault(option, mount.point)
    return found


def parse_memberships(text: str) -> list[tuple[str, str]]:
    """Return controllers ("" for the unified hierarchy) and path of each line of /proc/PID/cgroup."""
    found = []
    for line in text.split("\n"):  # splitlines() would split at a form feed in a name
        _, colon, rest = line.partition(":")
        controllers, second, path = rest.partition(":")
        if colon and second:
            found.append((controllers, path))
    return found


def is_gone(error: OSError) -> bool:
    """Say whether a group is gone: before its file was opened, or before that was read or written."""
    return error.errno in (errno.ENOENT, errno.ENODEV)


def _members(folder: str) -> set[int]:
    try:
        return {int(pid) for pid in _read(f"{folder}/cgroup.procs").split()}
    except OSError as error:
        if not is_gone(error):
            raise
        return set()


def _read(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        while len(data) < _MOST_BYTES and (chunk := os.read(descriptor, 65536)):
            data += chunk
    finally:
        os.close(descriptor)
    return data.decode("utf-8", "surrogateescape")


def _write(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)
