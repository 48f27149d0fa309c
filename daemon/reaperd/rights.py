"""Which capabilities a daemon for everybody needs, and what it does not do without each. Pure."""

from __future__ import annotations

from typing import NamedTuple


class Right(NamedTuple):
    """One capability. Without a ``vital`` one no daemon starts: strangers would be read by a process with root's rights."""

    name: str
    without: str
    vital: bool = False


_ALL = (
    Right("CAP_KILL", "other users' processes cannot be signalled, so nothing of theirs is ended"),
    Right(
        "CAP_SYS_PTRACE",
        "other users' environments, maps and descriptors cannot be read, so their workers are not recognised",
    ),
    Right(
        "CAP_DAC_READ_SEARCH",
        "other users' /proc/PID/fd cannot be listed, so their forked workers and those who come late are not recognised",
    ),
    Right(
        "CAP_SETUID",
        "the gate cannot give up root's uid, and nothing can be removed or written as a session's user",
        vital=True,
    ),
    Right(
        "CAP_SETGID",
        "the gate cannot give up root's groups, and nothing can be removed or written as a session's user",
        vital=True,
    ),
)
RIGHTS = {right.name: right for right in _ALL}
