"""What of the machine can be seen and done from where this process runs: in a container, all of that is a matter of its options.

Tells, and decides nothing. What cannot be told is left out: nothing is known to be missing then.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from reaperd.linux import pidfd
from reaperd.linux.capability import parse_missing
from reaperd.linux.mounts import Mount, parse_mount_table
from reaperd.linux.procfs import (
    MACHINES_PID_NAMESPACE,
    MACHINES_USER_NAMESPACE,
    ProcessGone,
    ProcFS,
)
from reaperd.linux.shm import SHM
from reaperd.rights import RIGHTS, Right

_WHOLE_MACHINE = "for the whole machine, start it with the machine's pid namespace (docker run --pid=host)"


class Lack(NamedTuple):
    """Something that is missing here, and what would help."""

    fact: str
    advice: str


def why_unusable(proc: ProcFS) -> str | None:
    """Return why no process can be looked at or signalled safely from here; None where that can be done."""
    if not proc.is_of_our_pid_namespace():
        return (
            f"{proc.root} shows another pid namespace than this process's own: a pid there is another process's here."
            " Mount this one's own (unshare --mount-proc; no -v /proc:/proc without --pid=host)"
        )
    try:
        proc.boot_id()
    except (ProcessGone, OSError):
        return f"{proc.root} has no sys/kernel/random/boot_id: mount it without subset=pid"
    try:
        pidfd.try_on_ourselves()
    except (OSError, AttributeError) as error:  # AttributeError: a Python that was built without
        return (
            f"processes cannot be held by a pidfd: {getattr(error, 'strerror', None) or error}."
            " Linux 5.3 has them; a container's seccomp profile must allow pidfd_open and pidfd_send_signal"
        )
    return None


def lacks(proc: ProcFS) -> list[Lack]:
    """Return what a daemon that runs here, as this user, has to do without."""
    found = _lacks_of_proc(proc)
    if os.geteuid() == 0:
        found += [*map(_lack_of, missing_rights(proc)), *_foreign_folders(proc)]
    return found


def missing_rights(proc: ProcFS) -> list[Right]:
    """Return which of the capabilities that a daemon for everybody needs this process has not."""
    return [RIGHTS[name] for name in parse_missing(proc.status(os.getpid()), RIGHTS)]


def _lack_of(right: Right) -> Lack:
    return Lack(
        f"without {right.name} {right.without}",
        f"grant it (docker run --cap-add {right.name.removeprefix('CAP_')}, CapabilityBoundingSet= in a unit)",
    )


def _lacks_of_proc(proc: ProcFS) -> list[Lack]:
    found = []
    if proc.own_pid_namespace() != MACHINES_PID_NAMESPACE:
        found.append(
            Lack("only the processes of this pid namespace are seen, and none outside of it", _WHOLE_MACHINE)
        )
    if os.geteuid() == 0 and proc.user_namespace() not in ("", MACHINES_USER_NAMESPACE):
        found.append(
            Lack(
                "root's capabilities reach no process outside of this user namespace",
                "for the whole machine, start it without one (no userns-remap, not rootless)",
            )
        )
    hiding = hiding_options(_mounts(proc))
    sees_through = not parse_missing(proc.status(os.getpid()), ("CAP_SYS_PTRACE",))
    if hiding and not sees_through and os.geteuid() == 0:
        found.append(
            Lack(
                f"/proc is mounted with {hiding[0]}: other users' processes are not seen",
                "grant CAP_SYS_PTRACE",
            )
        )
    return found


def hiding_options(mounts: list[Mount]) -> list[str]:
    """Return the options of /proc by which processes are hidden (proc(5))."""
    options = next(
        (one.options for one in reversed(mounts) if one.point == "/proc" and one.kind == "proc"), ()
    )
    hiding = [word for word in options if word.startswith(("hidepid=", "subset="))]
    return [word for word in hiding if word not in ("hidepid=0", "hidepid=off")]


def _mounts(proc: ProcFS) -> list[Mount]:
    try:
        return parse_mount_table(proc.own_mounts())
    except (ProcessGone, OSError):
        return []


def _foreign_folders(proc: ProcFS) -> list[Lack]:
    """Return which folders are not those of the machine: only where its init can be seen, and asked."""
    if proc.own_pid_namespace() != MACHINES_PID_NAMESPACE:
        return []
    found = []
    ours, theirs = proc.namespaces(os.getpid()).mnt, proc.namespaces(1).mnt
    if theirs and ours != theirs:
        found.append(
            Lack(
                "temporary folders are not those of the sessions outside: what they left there is not freed",
                "nothing, for most: their own resource trackers free it, unless these were killed, too",
            )
        )
    own_shm, machines_shm = proc.mounted_at(os.getpid(), SHM), proc.mounted_at(1, SHM)
    if machines_shm and own_shm != machines_shm:
        found.append(
            Lack(
                f"{SHM} is not the machine's: what dead sessions left in it is not freed",
                f"mount it in (docker run -v {SHM}:{SHM})",
            )
        )
    return found
