"""Rows: how long a daemon takes to say READY, on an empty host and where a thousand sessions began without it."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Generator

from figures import Row, alternate
from harness import Daemon
from scene import Bench, ask, wait_until
from throng import Throng

PAGES = 1000
READY_WITHIN_S = 120.0


def measure(bench: Bench) -> Generator[Row]:
    def ready_s() -> float:
        with bench.daemon(started=False) as daemon:
            return launch_s(daemon)

    def python_s() -> float:
        began_s = time.perf_counter()
        child = os.posix_spawn(sys.executable, [sys.executable, "-c", "import zmq"], bench.environment())
        os.waitpid(child, 0)
        return time.perf_counter() - began_s

    ours, bare = alternate(bench.times(9, 3), ready_s, python_s)
    yield Row(
        "start of the daemon, to READY",
        statistics.median(ours) * 1e3,
        "ms",
        statistics.median(bare) * 1e3,
        "python -c 'import zmq'",
        note="the core and its gate are two starts of Python, one after the other",
    )
    with (
        bench.daemon(f"[sessions]\nmax_per_uid = {PAGES}\n", started=False) as daemon,
        Throng(daemon, PAGES, 0),
    ):
        began_s = time.monotonic()
        took_s = launch_s(daemon)
        wait_until(
            lambda: ask(daemon, "status")["status"]["sessions"] == PAGES,
            f"not all of {PAGES} pages were adopted",
        )
        listed_s = time.monotonic() - began_s
    yield Row(
        f"start of the daemon with {PAGES} sessions to adopt, to READY",
        took_s * 1e3,
        "ms",
        note=f"status lists all {PAGES} after {listed_s * 1e3:.0f} ms",
    )


def launch_s(daemon: Daemon) -> float:
    """Start ``daemon`` and return the seconds until it says READY."""
    began_s = time.monotonic()
    daemon.launch()
    daemon.wait_notified("READY=1", READY_WITHIN_S)
    return time.monotonic() - began_s
