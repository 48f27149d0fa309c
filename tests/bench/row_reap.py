"""Row: from the SIGKILL of a leader to the end of its last worker, beside a loop that knew everybody beforehand."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Generator
from functools import partial

from figures import Row, alternate, spread
from scene import Bench, crowd, reap_with_bare_loop, reap_with_daemon

FACTOR = 1.5
FEW = 100


def measure(bench: Bench) -> Generator[Row]:
    with bench.daemon() as daemon:
        for total in (FEW, 3000):
            with crowd(bench, total) as processes:
                for workers, pairs in (
                    (4, bench.times(25, 7)),
                    (64, bench.times(15, 3)),
                    (256, bench.times(9, 3)),
                ):
                    ours, bare, listing = alternate(
                        pairs,
                        partial(reap_with_daemon, daemon, workers),
                        partial(reap_with_bare_loop, bench, daemon, workers),
                        listing_s,
                    )
                    floor_s = statistics.median(bare)
                    listing_ms = statistics.median(listing) * 1e3
                    note = f"{processes} processes on the host, {len(ours)} pairs"
                    peer = "bare loop"
                    if total > FEW:
                        floor_s += listing_ms / 1e3
                        peer += " + one listing of /proc"
                        note += (
                            f"; bare loop {statistics.median(bare) * 1e3:.2f} ms, listing {listing_ms:.2f} ms"
                        )
                    yield Row(
                        f"leader killed, {workers} workers gone, {total} processes",
                        statistics.median(ours) * 1e3,
                        "ms",
                        floor_s * 1e3,
                        peer,
                        FACTOR,
                        note=f"{note}; middle half of ours within {spread(ours):.0%}, of theirs {spread(bare):.0%}",
                    )


def listing_s() -> float:
    """Return the seconds of one listing of /proc with inodes."""
    began_s = time.perf_counter()
    with os.scandir("/proc") as entries:
        for entry in entries:
            entry.inode()
    return time.perf_counter() - began_s
