"""Rows and a plot: what a scan for orphans that nobody registered costs, as a function of the number of processes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import simulated
from figures import Row, alternate
from harness import Scratch, children_of
from plots import Series, draw
from scene import Bench, Unmeasured, answers, crowd, program

FEW, MANY = 5_000, 20_000
CATS = "nearly all are cats, of each of which the first scan asks whether it is process 1 of a container"
SIMULATED = (
    "files on tmpfs in the place of /proc; 10% are interpreters, of which every tenth is a pool's worker"
)
MOST_DEARER = 1.5  # what one process costs of many, beside one of few: a line through the origin has 1
TMPFS = "/dev/shm"
_TMPFS_BYTES = 256 * 1024**2
_SETTLED_S = 2.5  # after so long a process is no longer young: a scan need not read it again


@dataclass(frozen=True)
class Cost:
    """CPU seconds of the first scan, to which all are new, and of one of the later ones, to which nobody is."""

    processes: int
    orphans: int
    first_s: float
    later_s: float


def measure(bench: Bench) -> Generator[Row]:
    real: dict[int, Cost] = {}
    for total in bench.times([500, 1000, 2000, 3000], [500, 2000]):
        with crowd(bench, total):
            time.sleep(_SETTLED_S)
            (costs,) = alternate(bench.times(3, 2), partial(_cost, bench, "/proc"))
        real[total] = _median(costs)
        yield _row(f"{total} processes", real[total], CATS)
    made_up = _simulated(bench, bench.times([1_000, FEW, 10_000, MANY], [FEW, MANY]))
    for total, cost in made_up.items():
        yield _row(f"{total} simulated processes", cost, SIMULATED)
    few, many = made_up[FEW], made_up[MANY]
    for what, ours_s, theirs_s in (
        ("all new", many.first_s, few.first_s),
        ("nothing new", many.later_s, few.later_s),
    ):
        yield Row(
            f"orphan scan, {what}: one process of {MANY}",
            ours_s / MANY * 1e6,
            "us",
            theirs_s / FEW * 1e6,
            f"one of {FEW}",
            MOST_DEARER,
            note=f"CPU; {SIMULATED}",
        )
    _draw(bench, {"/proc": real, "simulated": made_up})


def _cost(bench: Bench, root: str) -> Cost:
    (processes, orphans), (first_s, *later_s) = answers(
        bench, "scan_orphans.py", root, bench.scratch.directory("o"), "5"
    )
    return Cost(int(processes), int(orphans), first_s, statistics.median(later_s))


def _simulated(bench: Bench, totals: list[int]) -> dict[int, Cost]:
    """Measure trees of so many processes, in turn."""
    there = os.statvfs(TMPFS) if os.path.isdir(TMPFS) else None
    if there is None or there.f_bavail * there.f_frsize < _TMPFS_BYTES:
        raise Unmeasured(f"{TMPFS} has no room for {_TMPFS_BYTES >> 20} MiB")
    workers = max(totals) // 1000 * simulated.POOLED
    scratch = Scratch(TMPFS)
    try:
        with program(bench, "crowd.py", str(workers)) as process:
            trees = simulated.build(scratch.path, totals, children_of(process.pid))
            takes = [partial(_cost, bench, tree) for tree in trees.values()]
            medians = map(_median, alternate(bench.times(5, 2), *takes))
            found = dict(zip(trees, medians, strict=True))
    finally:
        scratch.remove()
    missed = [total for total, cost in found.items() if cost.orphans != total // 1000]
    if missed:
        raise Unmeasured(f"the host is too busy: not all orphans were found among {missed} processes")
    return found


def _median(costs: list[Cost]) -> Cost:
    return Cost(
        costs[-1].processes,
        costs[-1].orphans,
        statistics.median(one.first_s for one in costs),
        statistics.median(one.later_s for one in costs),
    )


def _row(what: str, cost: Cost, of: str) -> Row:
    each, first = (s / cost.processes * 1e6 for s in (cost.later_s, cost.first_s))
    return Row(
        f"orphan scan of {what}",
        cost.later_s * 1e3,
        "ms",
        cost.first_s * 1e3,
        "the first, all new",
        note=f"CPU; {each:.2f} us a process, {first:.1f} us where it is new; {cost.processes} processes,"
        f" {cost.orphans} of them orphans; {of}",
    )


def _draw(bench: Bench, found: Mapping[str, Mapping[int, Cost]]) -> None:
    later, first = (
        [
            Series(name, list(costs), [s * 1e3 for s in map(of, costs.values())])
            for name, costs in found.items()
        ]
        for of in (attrgetter("later_s"), attrgetter("first_s"))
    )
    draw(
        os.path.join(bench.plots, "orphan-scan-by-processes.svg"),
        "processes",
        {
            "CPU of a scan for orphans, ms\n(nothing new)": later,
            "CPU of the first one, ms\n(all are new)": first,
        },
    )
