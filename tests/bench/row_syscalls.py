"""Row: what one scan asks of the kernel, counted by strace(1)."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Generator

from figures import Row
from processes import with_children
from scene import Bench, Unmeasured, crowd, wait_scanned, wait_until
from throng import Throng

TOTAL = 3000
INTERVAL_S = 4.0  # strace makes every call many times slower
_SUMMED = re.compile(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) (?: *\d+)? *(\w+)$", re.MULTILINE)


def measure(bench: Bench) -> Generator[Row]:
    if shutil.which("strace") is None:
        raise Unmeasured("there is no strace here (Debian and Ubuntu: the package strace)")
    scans = bench.times(5, 2)
    with (
        bench.daemon(f"[scan]\ninterval = '{INTERVAL_S:g}s'\n") as daemon,
        Throng(daemon, 5, 4),
        crowd(bench, TOTAL) as processes,
    ):
        for _ in range(2):
            wait_scanned(daemon.pid, INTERVAL_S)
        path = os.path.join(bench.scratch.directory("s"), "summary")
        pids = [word for pid in with_children(daemon.pid) for word in ("-p", str(pid))]
        strace = subprocess.Popen(["strace", "-f", "-c", "-o", path, *pids], stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: strace.poll() is not None or _is_traced(daemon.pid), "strace does not attach")
            if strace.poll() is not None:
                raise Unmeasured("strace may not attach to the daemon here (no right to ptrace)")
            for _ in range(scans):
                wait_scanned(daemon.pid, INTERVAL_S)
        finally:
            if strace.poll() is None:
                strace.send_signal(signal.SIGINT)
            strace.wait()
    with open(path, encoding="ascii", errors="replace") as file:
        counts = {name: int(calls) for calls, name in _SUMMED.findall(file.read()) if name != "total"}
    if not counts:
        raise Unmeasured("strace printed no summary")
    most = sorted(counts, key=lambda name: -counts[name])[:5]
    yield Row(
        f"system calls of one scan, {TOTAL} processes",
        sum(counts.values()) / scans,
        "",
        note=f"over {scans} scans of {processes} processes, 25 of them in 5 sessions; most of all: "
        + ", ".join(f"{name} {counts[name] / scans:.0f}" for name in most),
    )


def _is_traced(pid: int) -> bool:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return "\nTracerPid:\t0\n" not in file.read()
