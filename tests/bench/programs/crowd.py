"""A crowd of bystanders: ``crowd.py N`` starts N small programs that wait for the end of its stdin, and ends with them."""

from __future__ import annotations

import os
import sys


def main() -> None:
    count = int(sys.argv[1])
    # Each waits for the same pipe, so none can outlive whoever holds its other end.
    pids = [os.posix_spawnp("cat", ["cat"], os.environ) for _ in range(count)]
    print("up", flush=True)
    for pid in pids:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
