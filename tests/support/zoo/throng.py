"""Many small leaders: ``throng.py LEADERS WORKERS {forked,execed} [adopt]`` forks them from one process that never registers.

Each registers itself, starts its workers, and says ``leader register_us session worker...`` on stdout, one line each.
All of them end when stdin does, so nothing outlives whoever started this. With ``adopt`` that one process is a subreaper:
the dead are waited for at once, however slow the host's init is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import warnings

import agent

LIFETIME_S = 900  # should stdin never end
ABREAST = 8  # so many leaders register at the same time
SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, linux/prctl.h


def wait_for_the_end() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        while os.read(0, 1):
            pass


def start_worker(kind: str) -> int:
    """Return the pid of a worker that does nothing, as a fork of the leader or as another program."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(LIFETIME_S)  # outlives an exec
    if kind == "execed":
        with contextlib.suppress(OSError):
            os.execvp("cat", ["cat"])
    else:
        wait_for_the_end()
    os._exit(0)


def lead(workers: int, kind: str, outlet: int) -> None:
    """Register, start ``workers``, say so, and live on; what ends a leader that is not killed ends its workers too."""
    signal.alarm(LIFETIME_S)
    with warnings.catch_warnings():
        # No daemon answered in time: told by the session that ps does not list.
        warnings.simplefilter("ignore")
        began_s = time.perf_counter()
        session = agent.register("throng", timeout=20.0)
        took_us = round((time.perf_counter() - began_s) * 1e6)
    pids = [start_worker(kind) for _ in range(workers)]
    line = " ".join(map(str, [os.getpid(), took_us if session.socket else -1, session.id, *pids])) + "\n"
    left = line.encode()
    while left:  # a pipe takes no more than its size at once; only a throng of one writes so much
        left = left[os.write(outlet, left) :]
    os.close(outlet)
    wait_for_the_end()


def main() -> None:
    leaders, workers, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead leaders are waited for at once, as a shell would
    if "adopt" in sys.argv[4:]:
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1)
    reader, writer = os.pipe()
    registering = 0
    for _ in range(leaders):
        if not os.fork():
            os.close(reader)
            try:
                lead(workers, kind, writer)
            finally:
                os._exit(0)
        registering += 1
        if registering == ABREAST:
            registering -= relay(reader, 1)
    os.close(writer)
    relay(reader, registering)
    wait_for_the_end()


def relay(reader: int, count: int) -> int:
    """Copy ``count`` lines or more to stdout, and return how many."""
    lines = 0
    data = b""
    while lines < count and (data := os.read(reader, 65536)):
        lines += data.count(b"\n")
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    return lines


if __name__ == "__main__":
    main()
