"""What processes take of the machine."""

from __future__ import annotations

import time

import pytest
from specimens import ME, UID, id_of

from reaperd.model import Process, ProcessId
from reaperd.usage import UsageMeter


def test_the_usage_of_a_busy_process_is_told_in_percent_of_a_core() -> None:
    meter = UsageMeter()
    one = Process(id_of(ME), 1, UID, cpu_ticks=0, rss_bytes=4096)
    assert meter.of(one).rss_bytes == 4096
    assert meter.of(one).cpu_percent == 0
    age_ticks = time.clock_gettime(time.CLOCK_BOOTTIME) * 100 - one.id.start_ticks
    assert meter.of(one._replace(cpu_ticks=int(age_ticks))).cpu_percent == pytest.approx(100, rel=0.2)


def test_the_usage_since_the_last_scan_counts_no_earlier_work() -> None:
    meter = UsageMeter()
    one = Process(ProcessId(ME, 1), 1, UID, cpu_ticks=100)  # started with the machine
    meter.note([one])
    assert meter._cpu[one.id][1] == 100
    meter.note([one._replace(cpu_ticks=900)])
    assert meter._cpu[one.id][1] == 100, "the last scan is too young to measure by"
    meter.note([])
    assert meter._cpu == {}
