"""Leave a busy worker of a dead pool parent behind and print its pid: a real orphan, and quick to be had."""

from __future__ import annotations

import multiprocessing
import os
import sys

import stage


def main() -> None:
    multiprocessing.get_context("spawn").Process(target=sing, args=(os.getpid(),)).start()
    os.wait()  # there is no end to wait for: whoever started us, or our worker, sees to ours


def sing(parent: int) -> None:
    os.kill(parent, 9)
    while os.getppid() == parent:
        os.sched_yield()
    sys.stdout.write(f"{os.getpid()}\n")
    sys.stdout.flush()
    os.close(1)
    stage.breathe()


if __name__ == "__main__":
    main()
