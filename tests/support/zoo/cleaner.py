"""Have a pool of one's own, clean up after others, and say in one line of JSON what came of it."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import sys

import agent


def main() -> None:
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()
        own = living()
        try:
            report = agent.emergency_cleanup()
        except agent.CleanupError as error:
            print(json.dumps({"refused": str(error)}), flush=True)
            return
        told = {
            **{key: [one.pid for one in getattr(report, key)] for key in ("killed", "denied")},
            **{key: [list(one) for one in getattr(report, key)] for key in ("reclaimed", "remaining")},
            "evidence": [one.evidence for one in report.killed],
            "loaded": sorted(name for name in sys.modules if name.partition(".")[0] in ("reaperd", "zmq")),
            "own": own,
            "own_after": living(),
        }
        print(json.dumps(told), flush=True)


def living() -> list[int]:
    return sorted(child.pid or 0 for child in multiprocessing.active_children())


if __name__ == "__main__":
    main()
