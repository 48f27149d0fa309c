"""A training under ``training_session()``: says who its workers are, ends as it is told to, and says what is left of it.

session.py POOL WAY STATUS_FILE
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import multiprocessing.pool
import os
import signal
import subprocess
import sys
import threading
import time

import agent

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def spin(seconds: float) -> int:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        pass
    return os.getpid()


def spin_stubbornly(seconds: float) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spin(seconds)


def say(**words: object) -> None:
    print(json.dumps(words), flush=True)


def start_pool(kind: str) -> object:
    """Start two workers that are busy for minutes, and return what must not be collected."""
    context = multiprocessing.get_context("spawn" if kind.endswith("spawn") else "fork")
    if kind == "loky":
        from joblib.externals.loky import get_reusable_executor

        executor = get_reusable_executor(max_workers=2)
        return executor, [executor.submit(spin, 300) for _ in range(3)]
    if kind.startswith("executor"):
        executor = concurrent.futures.ProcessPoolExecutor(2, mp_context=context)
        return executor, [executor.submit(spin, 300) for _ in range(3)]
    if kind.startswith("pool"):
        pool = context.Pool(2)
        return pool, pool.map_async(spin, [300] * 3)
    if kind == "processes":
        found = [context.Process(target=spin_stubbornly, args=(300,), daemon=True) for _ in range(2)]
        for one in found:
            one.start()
        return found
    if kind == "commands":
        # The second one's parent is gone at once: below process 1, only the mark tells whose it is.
        background = f"{sys.executable} -c 'import time; time.sleep(300)' & echo"
        subprocess.run(["sh", "-c", background], stdout=subprocess.DEVNULL, check=True)
        return [subprocess.Popen(["sleep", "300"]) for _ in range(1)]
    raise ValueError(kind)


def wait_for_two(session: agent.ProcessManager) -> list[int]:
    end_s = time.monotonic() + 30
    while len(found := session.workers()) < 2:
        if time.monotonic() > end_s:
            raise TimeoutError(f"only {found} have been started")
        time.sleep(0.01)
    return [one.pid for one in found]


def lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in b"ZX"
    except FileNotFoundError:
        return False


def traces() -> dict[str, object]:
    return {
        "handlers": [str(signal.getsignal(number)) for number in SIGNALS],
        "environment": sorted(name for name in os.environ if name.startswith("REAPER")),
        "threads": sorted(
            thread.name for thread in threading.enumerate() if thread.name.startswith("reaper")
        ),
    }


def main() -> None:
    kind, way, status_file = sys.argv[1:4]
    outside = subprocess.Popen(["sleep", "300"])
    before = traces()
    session = agent.training_session(kind, status_file=status_file, grace=1.0)
    try:
        with session:
            pool = start_pool(kind)
            agent.progress(2, 10, "fits")
            workers = wait_for_two(session)
            try:
                say(workers=workers, outside=outside.pid, pid=os.getpid())
                while way in ("wait", "deaf"):
                    time.sleep(1)
            finally:
                if way == "deaf":  # what unwinds is held up for ever
                    say(unwinding=True)
                while way == "deaf":
                    time.sleep(1)
            if way == "exception":
                raise RuntimeError("the data are gone")
            if way == "exit":
                sys.exit(3)
    finally:
        say(left=[pid for pid in workers if lives(pid)], same=traces() == before, after=traces())
        del pool
        outside.kill()
        outside.wait()


if __name__ == "__main__":
    main()
