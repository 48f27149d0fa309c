"""Row: one pass of the running daemon over a crowded host, in CPU time, beside ps(1) and psutil."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Generator
from dataclasses import dataclass

from figures import Row
from harness import Daemon
from processes import spent, with_children
from scene import Bench, Unmeasured, answers, crowd, wait_scanned
from throng import Throng

TOTAL = 3000
# Short, for many scans in little time; on a host so busy that a scan takes longer than that, the other.
INTERVALS_S = (2.0, 10.0)
WINDOWS = 3
PS = ["ps", "-eo", "pid,ppid,stat,etimes,time,args"]


@dataclass(frozen=True)
class Pass:
    """What one pass over all processes took."""

    wall_s: float
    cpu_s: float


def measure(bench: Bench) -> Generator[Row]:
    for interval_s in INTERVALS_S:
        try:
            rows = _rows(bench, interval_s)
        except Unmeasured:
            if interval_s == INTERVALS_S[-1]:
                raise
        else:
            yield from rows
            return


def _rows(bench: Bench, interval_s: float) -> list[Row]:
    scans = bench.times(4, 2) if interval_s == INTERVALS_S[0] else 1
    with bench.daemon(f"[scan]\ninterval = '{interval_s:g}s'\n") as daemon:
        # The crowd is younger than the sessions and of their uid: what costs the most to tell apart from workers.
        with Throng(daemon, 5, 4), crowd(bench, TOTAL) as processes:
            rows = _beside_others(bench, daemon, scans, interval_s, processes)
        if bench.quick:
            return rows
        with crowd(bench, TOTAL) as processes, Throng(daemon, 5, 4):
            cpu_s = daemon_cpu_s(daemon, scans, interval_s)
    rows.append(
        Row(
            "scan, where the sessions are the youngest",
            cpu_s * 1e3,
            "ms",
            note=f"CPU of core and gate a scan; {processes} processes, 25 of them in 5 sessions",
        )
    )
    return rows


def _beside_others(bench: Bench, daemon: Daemon, scans: int, interval_s: float, processes: int) -> list[Row]:
    ours, ps, psutil = [], [], []
    passes = bench.times(3, 1)
    for _ in range(WINDOWS):
        ours.append(daemon_cpu_s(daemon, scans, interval_s))
        ps += [run_ps() for _ in range(passes)]
        psutil += [Pass(*line) for line in answers(bench, "scan_psutil.py", str(passes))]
    return [
        Row(
            f"scan of {TOTAL} processes, beside {peer}",
            statistics.median(ours) * 1e3,
            "ms",
            statistics.median(one.cpu_s for one in found) * 1e3,
            peer,
            1 / faster,
            note=f"CPU a pass, {WINDOWS * scans} scans ({peer}: {WINDOWS * passes} passes, of"
            f" {statistics.median(one.wall_s for one in found) * 1e3:.0f} ms of wall time); {processes} processes,"
            " all younger than the sessions",
        )
        for peer, found, faster in (("ps", ps, 10), ("psutil.process_iter", psutil, 30))
    ]


def daemon_cpu_s(daemon: Daemon, scans: int, interval_s: float) -> float:
    """Return the CPU seconds of one scan, of core and gate together, over ``scans`` of them."""
    for _ in range(2):  # the first look at a process that is new costs more; the second ends in a pause
        wait_scanned(daemon.pid, interval_s)
    before = spent(with_children(daemon.pid))
    for _ in range(scans):
        wait_scanned(daemon.pid, interval_s)
    return spent(with_children(daemon.pid)).since(before).cpu_s / scans


def run_ps() -> Pass:
    began_s = time.perf_counter()
    process = subprocess.Popen(PS, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - began_s
    assert process.returncode == 0, f"ps left with {process.returncode}"
    return Pass(wall_s, usage.ru_utime + usage.ru_stime)
