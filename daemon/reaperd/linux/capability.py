"""capabilities(7): which of them a process has in effect, and how they are called."""

from __future__ import annotations

from collections.abc import Iterable

_NUMBERS = {  # include/uapi/linux/capability.h
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SYS_PTRACE": 19,
}


def parse_missing(status: bytes, wanted: Iterable[str]) -> list[str]:
    """Return those of ``wanted`` that are not in effect, by the text of /proc/PID/status; none where it does not tell."""
    at = status.find(b"\nCapEff:")
    if at < 0:
        return []
    effective = int(status[at + 8 :].split(b"\n", 1)[0], 16)
    return [name for name in wanted if not effective >> _NUMBERS[name] & 1]
