"""Gives up all rights, for good: what each process beside the core does before it does anything else."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Sequence

from reaperd.linux import prctl

GATE_USERS = ("reaper-gate", "nobody")

_DESCRIPTORS = 4096
_MEMORY_BYTES = 256 * 1024 * 1024  # beyond what is mapped at the start


class CannotBeNobody(Exception):
    """The process cannot give up its privileges; the text says why."""


def find_user(names: Sequence[str], who: str, accounts: str = "/etc/passwd") -> tuple[int, int]:
    """Return uid and gid of the first of ``names`` that is an account of this host, for ``who`` to run as.

    Raises CannotBeNobody where none is.

    The file goes first: it has them almost everywhere, and for a name that it has not, getpwnam(3) would load every name
    service of the host into this process: libraries, sockets, half a MiB.
    """
    with contextlib.suppress(OSError), open(accounts, encoding="utf-8", errors="replace") as file:
        listed = {fields[0]: fields for fields in (line.split(":") for line in file) if len(fields) == 7}
        for name in names:
            if name in listed:
                return int(listed[name][2]), int(listed[name][3])
    import pwd

    for name in names:
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return user.pw_uid, user.pw_gid
    raise CannotBeNobody(
        f"there is none of the users {', '.join(names)} for {who} to run as: make one of them"
    )


def give_up_privileges(who: str, *, memory_bytes: int = _MEMORY_BYTES, tasks: int | None = 0) -> None:
    """Become nobody, for good: own uid, no groups, no capabilities, no new ones, few descriptors, little memory, no children.

    ``memory_bytes`` are what may be mapped beyond what is; ``tasks`` is RLIMIT_NPROC, which counts all threads of the uid;
    None sets none.
    CannotBeNobody, with a text about ``who``, where the container or user namespace does not let us.
    """
    be_expendable()
    if os.geteuid() == 0:
        uid, gid = find_user(GATE_USERS, who)
        try:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        except OSError as error:
            raise CannotBeNobody(
                f"{who} cannot become uid {uid}, gid {gid}: {error.strerror}; grant CAP_SETUID and CAP_SETGID"
                " (docker run --cap-add SETUID --cap-add SETGID), or, in a user namespace, map that uid and gid into it"
            ) from None
    prctl.forbid_new_privileges()
    prctl.forbid_tracing()
    descriptors = min(_DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    limit_memory(memory_bytes)
    # Its threads are there by now; whoever takes it over starts nothing.
    if tasks is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (tasks, tasks))


def limit_memory(memory_bytes: int) -> None:
    """Map no more than so much beyond what is mapped, for good."""
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped_bytes = int(file.read().split()[0]) * resource.getpagesize()
    before_bytes = resource.getrlimit(resource.RLIMIT_AS)[1]
    most_bytes = mapped_bytes + memory_bytes
    if before_bytes == resource.RLIM_INFINITY or most_bytes < before_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))


def be_expendable(score: str = "/proc/self/oom_score_adj") -> None:
    """Undo what protects the core when memory runs out: of the two, a stranger can bloat this one, and it is replaced."""
    with open(score, encoding="ascii") as file:
        is_protected = int(file.read()) < 0
    if is_protected:
        # Where /proc may not be written to, it stays as it is.
        with contextlib.suppress(OSError), open(score, "w", encoding="ascii") as file:
            file.write("0")
