"""Who a process has for its parent now, and whether that can be the one that started it. Signals nobody."""

from __future__ import annotations

import os
from typing import NamedTuple

from reaperd.linux.procfs import ProcessGone, ProcFS, Stat, parse_innermost_pid
from reaperd.model import ProcessId
from reaperd.verdicts import Parent

PYTHONS = ("python", "pypy")  # how the name of an interpreter's file begins

# They adopt what others leave, and start no pool of workers: process 1 of a machine, managers of services (they call
# prctl(2), PR_SET_CHILD_SUBREAPER).
ADOPTERS = frozenset(("systemd", "init", "openrc-init", "s6-svscan", "runit", "runit-init", "runsvdir"))
# As process 1 of a container these are, or stand for, an init. Anywhere else they are who has started their child, as conmon
# and a container's shim are: a pool may have each worker started so.
STAND_INS = frozenset(
    {
        *("tini", "tini-static", "dumb-init", "docker-init", "catatonit"),
        *("sh", "bash", "dash", "ash", "zsh", "ksh", "sleep", "tail", "cat", "pause", "busybox"),
    }
)  # fmt: skip


class _Told(NamedTuple):
    """A parent, for all of its children."""

    parent: Parent
    stat: Stat | None = None
    # Process 1 of its machine or container, and no interpreter: whoever comes from another POSIX session was adopted.
    first: bool = False


class Parents:
    """Tells of parents as they are while one look lasts."""

    def __init__(self, proc: ProcFS) -> None:
        self._proc = proc
        self._told: dict[int, _Told] = {}

    def id_of(self, pid: int) -> ProcessId | None:
        """Return who has ``pid``, None where nobody has, or it is outside of our pid namespace."""
        stat = self._tell(pid).stat
        return None if stat is None else stat.id

    def of(self, child: Stat) -> Parent:
        """Return the parent of ``child``; where nothing can be told of it, it may be the pool's."""
        parent, stat, first = self._tell(child.ppid)
        # Who is younger than its child is not its parent, and has not adopted it: somebody else has that pid by now.
        if stat is None or stat.id.start_ticks > child.id.start_ticks:
            return parent._replace(adopts="")
        # Only setsid(2) changes a session, and only to one's own: who is in a third one has had another parent.
        if first and not parent.adopts and child.posix_sid not in (stat.posix_sid, child.id.pid):
            elsewhere = f"which never was in its POSIX session ({child.posix_sid})"
            return parent._replace(adopts=f"process 1 of its machine or container, {elsewhere}")
        return parent

    def _tell(self, pid: int) -> _Told:
        if pid not in self._told:
            self._told[pid] = self._describe(pid)
        return self._told[pid]

    def _describe(self, pid: int) -> _Told:
        if pid <= 0:
            return _Told(Parent(pid, "a process of another pid namespace"))
        try:
            stat = self._proc.stat(pid)
            name = self._program(stat)
            if name.startswith(PYTHONS):
                return _Told(Parent(pid, name), stat)
            first = pid == 1 or parse_innermost_pid(self._proc.status(pid)) == 1
        except ProcessGone:
            return _Told(Parent(pid, "gone"))
        if first and name in ADOPTERS | STAND_INS:
            return _Told(Parent(pid, name, "process 1 of its machine or container"), stat, first)
        if name in ADOPTERS:
            shown = f"{name} --user" if name == "systemd" else name
            return _Told(Parent(pid, shown, "which adopts what others leave behind"), stat, first)
        return _Told(Parent(pid, name), stat, first)

    def _program(self, stat: Stat) -> str:
        """Return the name of the file that ``stat`` runs; the name that it gives itself where we may not ask."""
        try:
            path = os.readlink(f"{self._proc.root}/{stat.id.pid}/exe")
        except OSError:
            return stat.comm
        return path.removesuffix(" (deleted)").rpartition("/")[2] or stat.comm
