"""A training with a pool of joblib's, which goes on until it is stopped."""

from __future__ import annotations

import sys
import time

from joblib import Parallel, delayed

import agent

LIFETIME_S = 120.0


def fit(number: int) -> int:
    end_s = time.monotonic() + LIFETIME_S
    while time.monotonic() < end_s:
        sum(range(10_000))
        time.sleep(0.02)
    return number


def main() -> None:
    agent.register()
    agent.progress(3, 8, "fold *2*")
    print("the search begins", flush=True)
    Parallel(n_jobs=int(sys.argv[1]))(delayed(fit)(number) for number in range(8))


if __name__ == "__main__":
    main()
