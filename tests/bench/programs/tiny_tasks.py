"""Prints the seconds that 10,000 calls of ``abs()`` take on two workers that are up: ``tiny_tasks.py loky | reaper``.

joblib learns from each call how many tasks to send at once, so the first ones differ: the median of many counts.
"""

from __future__ import annotations

import statistics
import sys
import time

import joblib

import agent
import agent.joblib

TASKS, ROUNDS = 10_000, 40


def main() -> None:
    agent.joblib.register()
    with agent.training_session(max_workers=2), joblib.parallel_config(backend=sys.argv[1], n_jobs=2):
        taken = []
        for _ in range(ROUNDS):
            began_s = time.perf_counter()
            found = joblib.Parallel()(joblib.delayed(abs)(-number) for number in range(TASKS))
            taken.append(time.perf_counter() - began_s)
            assert found == list(range(TASKS))
        print(statistics.median(taken))


if __name__ == "__main__":
    main()
