"""The mount table of a process (proc_pid_mounts(5)): what is mounted where, and how."""

from __future__ import annotations

import re
from typing import NamedTuple


class Mount(NamedTuple):
    """One line of /proc/PID/mounts; ``options`` are those of the mount and of its file system together."""

    point: str
    kind: str
    options: tuple[str, ...]


def parse_mount_table(text: str) -> list[Mount]:
    """Return the mounts, the latest last; lines of another shape are left out."""
    found = []
    for line in text.split("\n"):  # of all that splitlines() breaks at, the kernel escapes this one alone
        fields = line.split(" ")
        if len(fields) >= 4:
            _, point, kind, options = fields[:4]
            found.append(Mount(_unescaped(point), kind, tuple(options.split(","))))
    return found


def _unescaped(path: str) -> str:
    """Return a path as it is: blanks, line ends, backslashes and "#" stand there in octal (fs/proc_namespace.c)."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)
