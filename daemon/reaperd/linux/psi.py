"""Pressure stall information (Documentation/accounting/psi.rst): how long tasks have waited for CPU, memory or I/O."""

from __future__ import annotations

import contextlib

RESOURCES = ("cpu", "memory", "io")
PRESSURE = "/proc/pressure"


def parse_stalls(text: str) -> dict[str, int]:
    """Return the microseconds that ``some`` and ``full`` have lasted; what is of another form is left out."""
    found = {}
    for line in text.splitlines():
        kind, *fields = line.split()[:8] or [""]
        for field in fields:
            name, _, value = field.partition("=")
            if name == "total" and value.isascii() and value.isdigit() and kind in ("some", "full"):
                found[kind] = int(value)
    return found


def read_stalls(directory: str = PRESSURE) -> dict[str, dict[str, int]]:
    """Return for each resource how long tasks have waited for it, in microseconds since boot.

    A resource that the kernel tells nothing of is missing: it was built without, or it is switched off (``psi=0``).
    """
    found = {}
    for resource in RESOURCES:
        with contextlib.suppress(OSError), open(f"{directory}/{resource}", encoding="ascii") as file:
            if stalls := parse_stalls(file.read(4096)):
                found[resource] = stalls
    return found
