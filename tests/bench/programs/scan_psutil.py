"""Prints wall and CPU seconds of passes of ``psutil.process_iter`` over all processes, after one that fills its cache."""

from __future__ import annotations

import sys
import time

import psutil

ATTRIBUTES = ["pid", "ppid", "name", "cmdline", "status", "create_time", "cpu_times", "memory_info"]


def main() -> None:
    for number in range(int(sys.argv[1]) + 1):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        for process in psutil.process_iter(ATTRIBUTES):
            assert len(process.info) == len(ATTRIBUTES)
        if number:
            print(time.perf_counter() - wall_s, time.process_time() - cpu_s)


if __name__ == "__main__":
    main()
