"""Prints the seconds that 10,000 calls of ``abs()`` take on two workers that are up: ``tiny_tasks.py loky | reaper``."""

from __future__ import annotations

import sys
import time

import joblib

import agent
import agent.joblib

TASKS = 10_000


def main() -> None:
    agent.joblib.register()
    with agent.training_session(max_workers=2), joblib.parallel_config(backend=sys.argv[1], n_jobs=2):
        joblib.Parallel()(joblib.delayed(abs)(-number) for number in range(100))
        began_s = time.perf_counter()
        found = joblib.Parallel()(joblib.delayed(abs)(-number) for number in range(TASKS))
        print(time.perf_counter() - began_s)
    assert found == list(range(TASKS))


if __name__ == "__main__":
    main()
