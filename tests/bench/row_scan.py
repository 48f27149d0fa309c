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
from scene import Bench, answers, crowd, wait_scanned
from throng import Throng

TOTAL = 3000
INTERVAL_S = 0.5
PS = ["ps", "-eo", "pid,ppid,stat,etimes,time,args"]


@dataclass(frozen=True)
class Pass:
    """What one pass over all processes took."""

    wall_s: float
    cpu_s: float


def measure(bench: Bench) -> Generator[Row]:
    scans, passes = bench.times(30, 12), bench.times(9, 3)
    with bench.daemon(f"[scan]\ninterval = '{INTERVAL_S:g}s'\n") as daemon:
        # The crowd is younger than the sessions and of their uid: what costs the most to tell apart from workers.
        with Throng(daemon, 5, 4), crowd(bench, TOTAL) as processes:
            yield from _rows(bench, daemon, scans, passes, "", processes)
        if bench.quick:
            return
        with crowd(bench, TOTAL) as processes, Throng(daemon, 5, 4):
            cpu_s = daemon_cpu_s(daemon, scans)
            yield Row(
                "scan, where the sessions are the youngest",
                cpu_s * 1e3,
                "ms",
                note=f"CPU of core and gate a scan; {processes} processes, 25 of them in 5 sessions",
            )


def _rows(bench: Bench, daemon: Daemon, scans: int, passes: int, name: str, processes: int) -> Generator[Row]:
    ours, ps, psutil = [], [], []
    for _ in range(3):
        ours.append(daemon_cpu_s(daemon, scans // 3))
        ps += [run_ps() for _ in range(passes // 3)]
        psutil += [Pass(*line) for line in answers(bench, "scan_psutil.py", str(passes // 3))]
    for peer, found, faster in (("ps", ps, 10), ("psutil.process_iter", psutil, 30)):
        wall_s = statistics.median(one.wall_s for one in found)
        yield Row(
            f"scan of {TOTAL} processes, beside {peer}",
            statistics.median(ours) * 1e3,
            "ms",
            statistics.median(one.cpu_s for one in found) * 1e3,
            peer,
            1 / faster,
            note=f"CPU a pass ({peer}: {wall_s * 1e3:.0f} ms of wall time); {processes} processes, all younger"
            " than the sessions",
        )


def daemon_cpu_s(daemon: Daemon, scans: int) -> float:
    """Return the CPU seconds of one scan, of core and gate together, over ``scans`` of them."""
    pids = with_children(daemon.pid)
    for _ in range(2):  # the first look at a process that is new costs more
        wait_scanned(daemon.pid, INTERVAL_S)
    before = spent(pids)
    for _ in range(scans):
        wait_scanned(daemon.pid, INTERVAL_S)
    return spent(pids).since(before).cpu_s / scans


def run_ps() -> Pass:
    began_s = time.perf_counter()
    process = subprocess.Popen(PS, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - began_s
    assert process.returncode == 0, f"ps left with {process.returncode}"
    return Pass(wall_s, usage.ru_utime + usage.ru_stime)
