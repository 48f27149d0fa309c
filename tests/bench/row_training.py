"""Row: a grid search with the agent, beside the same one without."""

from __future__ import annotations

import statistics
from collections.abc import Generator

from figures import Row, alternate, spread
from scene import Bench, answers

MAX_NOISE = 0.1  # on a busier machine than that the row tells nothing, and must not look reached


def measure(bench: Bench) -> Generator[Row]:
    pairs = bench.times(7, 3)
    with bench.daemon() as daemon:

        def search_s(*arguments: str) -> float:
            [[took_s]] = answers(bench, "gridsearch.py", *arguments)
            return took_s

        search_s("without")  # reads what is not in the page cache yet
        ours, bare = alternate(pairs, lambda: search_s("with", daemon.socket), lambda: search_s("without"))
    noise = spread(bare)
    yield Row(
        "GridSearchCV of 64 fits, n_jobs=2, with the agent",
        statistics.median(ours),
        "s",
        statistics.median(bare),
        "without it",
        1 + min(max(noise, 0.005), MAX_NOISE),
        note=f"{len(bare)} pairs; noise: the middle half of the runs without it lies within {noise:.1%} of their median"
        f" (with it: {spread(ours):.1%})",
    )
