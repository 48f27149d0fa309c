"""What no daemon can beat: ``bare_loop.py LEADER WORKER...`` knows whom to end before the leader dies, and does nothing else."""

from __future__ import annotations

import os
import resource
import select
import signal
import sys


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    leader, *workers = [os.pidfd_open(int(word)) for word in sys.argv[1:]]
    poll = select.poll()
    poll.register(leader, select.POLLIN)
    print("up", flush=True)
    poll.poll()
    for worker in workers:
        signal.pidfd_send_signal(worker, signal.SIGKILL)


if __name__ == "__main__":
    main()
