"""Rows and plots: what it costs to kill a session, as a function of its size and of the number of processes on the host."""

from __future__ import annotations

import os
import statistics
from collections.abc import Generator
from dataclasses import dataclass

from figures import Line, Row, alternate
from plots import Series, draw
from processes import spent, with_children
from scene import Bench, crowd, reap_with_bare_loop, reap_with_daemon, wait_idle

FEW_PROCESSES = 100
SESSION = 64


@dataclass(frozen=True)
class Cost:
    """Of killing one session: the leader's SIGKILL to the last worker's end, and all that the daemon did about it."""

    took_s: float
    cpu_s: float


def measure(bench: Bench) -> Generator[Row]:
    sizes = bench.times([1, 32, 64, 128, 256, 512, 768, 1024], [1, 64, 256, 1024])
    with bench.daemon() as daemon:

        def cost(workers: int) -> Cost:
            wait_idle(daemon)
            before = spent(with_children(daemon.pid))
            took_s = reap_with_daemon(daemon, workers)
            return Cost(took_s, spent(with_children(daemon.pid)).since(before).cpu_s)

        def bare(workers: int) -> Cost:
            return Cost(reap_with_bare_loop(bench, daemon, workers), 0.0)

        def medians(workers: int) -> list[Cost]:
            return [
                Cost(statistics.median(c.took_s for c in costs), statistics.median(c.cpu_s for c in costs))
                for costs in alternate(bench.times(3, 1), lambda: cost(workers), lambda: bare(workers))
            ]

        with crowd(bench, FEW_PROCESSES):
            by_size = [medians(size) for size in sizes]
        totals, by_total = [], []
        for total in bench.times([100, 500, 1000, 1500, 2000, 2500, 3000], [100, 1000, 3000]):
            with crowd(bench, total) as processes:
                totals.append(processes)
                by_total.append(medians(SESSION))
    yield from _report(bench, "size", "workers of the session", sizes, by_size, "one more worker", 1)
    yield from _report(
        bench, "processes", "processes on the host", totals, by_total, "1000 more processes on the host", 1000
    )


def _report(
    bench: Bench, stem: str, label: str, xs: list[int], costs: list[list[Cost]], more: str, step: int
) -> Generator[Row]:
    """Fit straight lines through what was measured at ``xs``, draw them, and tell their slopes per ``step``."""
    ours = Series("Reaper", xs, [one.took_s * 1e3 for one, _ in costs])
    bare = Series("bare loop", xs, [one.took_s * 1e3 for _, one in costs])
    cpu = Series("Reaper", xs, [one.cpu_s * 1e3 for one, _ in costs])
    where = f"{FEW_PROCESSES} processes on the host" if stem == "size" else f"a session of {SESSION} workers"
    draw(
        os.path.join(bench.plots, f"reap-by-{stem}.svg"),
        label,
        {
            f"from the leader's SIGKILL to the last worker's end, ms\n({where})": [ours, bare],
            f"CPU of the daemon for the whole reap, ms\n({where})": [cpu],
        },
    )
    line, floor, work = ours.line, bare.line, cpu.line
    yield Row(
        f"reap: {more} costs",
        line.slope * step,
        "ms",
        floor.slope * step,
        "bare loop",
        note=f"{_words(line)}; bare loop {_words(floor)}; {where}, {label} from {xs[0]} to {xs[-1]}",
    )
    yield Row(f"CPU of a reap: {more} costs", work.slope * step, "ms", note=f"{_words(work)}")


def _words(line: Line) -> str:
    return f"{line.intercept:.3g} ms {'-' if line.slope < 0 else '+'} {abs(line.slope):.3g} ms each, R² {line.r_squared:.3f}"
