"""Train without a word to any daemon, in one of the ways in which people have their training survive them.

Each process uses some hundredths of a core and holds some memory. Once all are up, the trainer says so in one
line of JSON on the named pipe that the environment gives: who it is, and its workers.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import spawn
from typing import Any

import stage

NAME, UP = "REAPER_TEST_ANIMAL", "REAPER_TEST_UP"  # in the environment
HERE = os.path.abspath(__file__)
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
HELD_BYTES = 4 << 20


def attend(pipe: str, memory: bytes = b"") -> None:
    """The life of a worker."""
    del memory
    held = b"\1" * HELD_BYTES
    stage.report(pipe)
    stage.breathe()
    del held


def attend_with_own_pool(pipe: str) -> None:
    """The life of a worker that has workers."""
    context = multiprocessing.get_context("spawn")
    own = [context.Process(target=attend, args=(pipe,), daemon=True) for _ in range(2)]
    for process in own:
        process.start()
    attend(pipe)


class Trainer:
    """One method a kind: it starts the workers, and returns how many will report."""

    def __init__(self, pipe: str) -> None:
        self.pipe = pipe
        self.kept: list[Any] = []

    def alone(self) -> int:
        return 0

    def _executor(self, method: str) -> int:
        context = multiprocessing.get_context(method)
        executor = concurrent.futures.ProcessPoolExecutor(2, mp_context=context)
        self.kept += [executor, [executor.submit(attend, self.pipe) for _ in range(2)]]
        return 2

    def fork(self) -> int:
        return self._executor("fork")

    def spawn(self) -> int:
        return self._executor("spawn")

    def forkserver(self) -> int:
        return self._executor("forkserver")

    def loky(self) -> int:
        from joblib.externals.loky import get_reusable_executor

        executor = get_reusable_executor(2, timeout=300)
        self.kept += [executor, [executor.submit(attend, self.pipe) for _ in range(2)]]
        return 2

    def nested(self) -> int:
        """A worker with two workers of its own."""
        process = multiprocessing.get_context("spawn").Process(target=attend_with_own_pool, args=(self.pipe,))
        process.start()
        self.kept.append(process)
        return 3

    def wrapped(self) -> int:
        """Workers that a wrapper starts, which stays as their parent: the interpreter is what the environment names."""
        spawn.set_executable(os.environ["REAPER_TEST_WRAPPER"])
        return self.spawn()

    def preforks(self) -> int:
        """A server that has forked its workers, each of which has a joblib pool: as celery and gunicorn do."""
        for _ in range(2):
            if not os.fork():
                self.loky()
                stage.report(self.pipe)
                stage.breathe()
                os._exit(0)
        return 6

    def leaves_a_fork(self) -> int:
        """A forked child is all that stays."""
        if os.fork():
            os._exit(0)
        return 0

    def adopts(self) -> int:
        """A subreaper with workers of its own, and with a trainer whom it has adopted."""
        if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise SystemExit("prctl(PR_SET_CHILD_SUBREAPER) failed")
        environment = {**os.environ, UP: self.pipe}
        command = ["sh", "-c", '"$@" &', "sh", sys.executable, HERE, "spawn", "--within"]
        subprocess.run(command, env=environment, check=True)
        return self.spawn() + 3


KINDS = (
    "alone",
    "fork",
    "spawn",
    "forkserver",
    "loky",
    "nested",
    "wrapped",
    "preforks",
    "leaves-a-fork",
    "adopts",
)


def double_fork() -> None:
    """Become a daemon in the classical way."""
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)


def python_daemon() -> None:
    import daemon

    context = daemon.DaemonContext(working_directory=os.getcwd(), detach_process=True)
    context.open()


def train_within(kind: str, above: int = 0) -> None:
    """Start workers in a process that runs somebody else's program, and count it as a worker of ``above`` where that is given."""
    muster = stage.Muster()
    trainer = Trainer(muster.pipe)
    _KEPT.extend([muster, trainer])
    pids = muster.wait(getattr(trainer, kind)())
    say([os.getpid(), *pids] if above else pids, above or os.getpid())


_KEPT: list[Any] = []


def say(workers: list[int], pid: int) -> None:
    line = json.dumps({"animal": os.environ[NAME], "pid": pid, "workers": workers}) + "\n"
    descriptor = os.open(os.environ[UP], os.O_WRONLY)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def shout() -> None:
    """Print as much as fits into a breath, for whom that keeps busy."""
    sys.stdout.write("epoch 1\n" * 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--become", choices=("double-fork", "python-daemon", "stopped", "headless"))
    parser.add_argument("--loud", action="store_true")
    parser.add_argument("--within", action="store_true", help="report as a worker of another trainer")
    parser.add_argument("rest", nargs="*", help="whatever: no heed is paid to it")
    options = parser.parse_args()
    before: dict[str, Callable[[], None]] = {"double-fork": double_fork, "python-daemon": python_daemon}
    before.get(options.become, lambda: None)()
    held = b"\1" * HELD_BYTES
    muster = stage.Muster()
    trainer = Trainer(muster.pipe)
    count = getattr(trainer, options.kind.replace("-", "_"))()
    pids = muster.wait(count)
    if options.within:
        for pid in pids:
            stage.report_as(os.environ[UP], pid)
        stage.report(os.environ[UP])
    else:
        say(pids, os.getpid())
    if options.become == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif options.become == "headless":
        threading.Thread(target=stage.breathe).start()
        stage.end_this_thread()
    stage.breathe(shout if options.loud else stage.sum_up)
    del held


if __name__ == "__main__":
    main()
