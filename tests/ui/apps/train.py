"""A training with a pool of joblib's, which goes on until it is stopped, or a file says that it is done."""

from __future__ import annotations

import os
import sys
import time

from joblib import Parallel, delayed

import agent

LIFETIME_S = 120.0


def fit(number: int) -> int:
    end_s = time.monotonic() + LIFETIME_S
    while time.monotonic() < end_s and not os.path.exists(f"{os.environ['UI_STATUS_FILE']}.done"):
        sum(range(10_000))
        time.sleep(0.02)
    return number


def main() -> None:
    agent.register()
    agent.progress(3, 8, "fold *2*")
    print("the search begins", flush=True)
    Parallel(n_jobs=int(sys.argv[1]))(delayed(fit)(number) for number in range(8))
    agent.progress(8, 8, "done")


if __name__ == "__main__":
    main()
