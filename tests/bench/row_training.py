"""Rows: a grid search with the agent, and with all that a training can use, beside the same one without; tiny tasks."""

from __future__ import annotations

import os
import statistics
from collections.abc import Generator

from figures import Row, alternate, spread
from scene import Bench, answers

_SEARCHES_S, _TASKS_S = 150.0, 100.0  # each varies by as much as is to be told apart
MAX_NOISE = 0.1  # on a busier machine than that the row tells nothing, and must not look reached


def measure(bench: Bench) -> Generator[Row]:
    yield from _searches(bench)
    yield _tiny_tasks(bench)


def _searches(bench: Bench) -> Generator[Row]:
    with bench.daemon() as daemon:
        status_file = os.path.join(bench.scratch.directory("search"), "run.json")

        def search_s(*arguments: str) -> float:
            [[took_s]] = answers(bench, "gridsearch.py", *arguments)
            return took_s

        search_s("without")  # reads what is not in the page cache yet
        ours, everything, bare = alternate(
            bench.times(9, 3),
            lambda: search_s("with", daemon.socket),
            lambda: search_s("all", daemon.socket, status_file),
            lambda: search_s("without"),
            enough_s=_SEARCHES_S,
        )
    for taken, what in ((ours, "the agent"), (everything, "session, backend, progress and status file")):
        yield Row(
            f"GridSearchCV of 64 fits, n_jobs=2, with {what}",
            statistics.median(taken),
            "s",
            statistics.median(bare),
            "without it",
            1 + _noise(bare),
            note=f"{_spread_of(bare)} without it (with it: {spread(taken):.1%})",
        )


def _tiny_tasks(bench: Bench) -> Row:
    def tasks_s(backend: str) -> float:
        [[took_s]] = answers(bench, "tiny_tasks.py", backend)
        return took_s

    tasks_s("loky")
    ours, stock = alternate(
        bench.times(13, 3), lambda: tasks_s("reaper"), lambda: tasks_s("loky"), enough_s=_TASKS_S
    )
    return Row(
        "10,000 calls of abs() by joblib, backend reaper",
        statistics.median(ours),
        "s",
        statistics.median(stock),
        "backend loky",
        1.05,
        note=f"{_spread_of(stock)} with loky (with ours: {spread(ours):.1%})",
    )


def _noise(taken: list[float]) -> float:
    return min(max(spread(taken), 0.005), MAX_NOISE)


def _spread_of(taken: list[float]) -> str:
    return f"{len(taken)} in turn; noise: the middle half lies within {spread(taken):.1%} of the median"
