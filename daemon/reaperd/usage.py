"""What processes take of the machine, in figures for people."""

from __future__ import annotations

import time
from collections.abc import Iterable

from reaperd.linux.procfs import TICKS_PER_S
from reaperd.model import Process, ProcessId, Usage

_USAGE_S = 1.0  # CPU shares are told over no less than that, where there is a choice


class UsageMeter:
    """Tells CPU shares since the last scan."""

    def __init__(self) -> None:
        self._cpu: dict[ProcessId, tuple[float, int]] = {}  # monotonic seconds and CPU ticks at the last scan

    def of(self, process: Process) -> Usage:
        """Return what ``process`` takes of the machine."""
        now_s = time.monotonic()
        seen_s, seen_ticks = self._cpu.get(process.id, (0.0, 0))
        if not seen_s or now_s - seen_s < 0.05:
            age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - process.id.start_ticks / TICKS_PER_S
            seen_s, seen_ticks = now_s - max(age_s, 1 / TICKS_PER_S), 0
        busy_s = (process.cpu_ticks - seen_ticks) / TICKS_PER_S
        return Usage(100 * max(busy_s, 0.0) / (now_s - seen_s), process.rss_bytes)

    def note(self, processes: Iterable[Process]) -> None:
        """Remember CPU times for the next ``of()``; the one before last is kept while the last is too young."""
        now_s = time.monotonic()
        self._cpu = {
            process.id: self._cpu[process.id]
            if process.id in self._cpu and now_s - self._cpu[process.id][0] < _USAGE_S
            else (now_s, process.cpu_ticks)
            for process in processes
        }
