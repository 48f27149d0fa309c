"""Looks for orphans in ``PROC`` as the daemon does, once and ``MORE`` times again, and signals nobody.

``scan_orphans.py PROC DIRECTORY MORE`` prints how many processes and how many orphans there were, and then the CPU seconds of
the first look, to which all processes are new, and of each later one. ``DIRECTORY`` is for what has to be remembered.
"""

from __future__ import annotations

import resource
import sys
import time

from reaperd.claims import Marks
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import ProcFS
from reaperd.marks import MarkReader
from reaperd.orphans import Orphans
from reaperd.poller import Poller
from reaperd.reaper import Reaper
from reaperd.scan import Scan
from reaperd.store import Store


def main() -> None:
    root, directory, more = sys.argv[1:]
    proc = ProcFS(root)
    marks = MarkReader(proc)
    marks.memory.keeps_helper = True
    orphans = Orphans(
        proc,
        Scan(proc, marks, Alarm()),
        Reaper(proc, frozenset()),
        Poller(),
        Store(directory, ProcFS().boot_id()),
        Marks(proc),
        lambda _: None,
    )
    took_s = []
    for _ in range(1 + int(more)):
        before_s = cpu_s()
        orphans.see(proc.listing())  # look() would act upon what it finds
        marks.memory.close()  # two scans of the daemon are further apart than its helper lasts
        took_s.append(cpu_s() - before_s)
    print(len(proc.listing()), len(orphans.listing()))
    print(*took_s)


def cpu_s() -> float:
    """Return what this process and the helpers that it has ended have taken."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    main()
