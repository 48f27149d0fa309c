"""Pools that come and go: they start workers, which fork, exec and exit, and are killed, all at random moments.

``fates.py SEED SECONDS`` lets that go on for so long, and prints a line when it is over: from then on nobody does
anything. Who was born of whom, and who has ended on purpose, is written to the ledger that the environment names:
what has befallen anybody else, somebody else did.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import stage

LEDGER, UNTIL = "REAPER_TEST_LEDGER", "REAPER_TEST_UNTIL"  # in the environment; monotonic seconds
HELD_BYTES = 2 << 20
PACE_S = 0.1
MOST_POOLS, MOST_WORKERS, MOST_FORKS = 5, 3, 2
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
WORKER = (
    "from multiprocessing.spawn import spawn_main; import fates; fates.work(*map(int, fates.sys.argv[2:]))"
)
OTHER = f'echo "{{\\"other\\": $$}}" >>"${LEDGER}"; exec sleep {stage.LIFETIME_S:g}'
FLAVOURS = ("argv", "argv", "spawn", "loky", "fork")


def tell(**facts: Any) -> None:
    """Write a line to the ledger; it is never mixed with another's."""
    descriptor = os.open(os.environ[LEDGER], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, json.dumps(facts).encode() + b"\n")
    os.close(descriptor)


def start_ticks() -> int:
    with open("/proc/self/stat", "rb") as file:
        return int(file.read().rpartition(b") ")[2].split()[19])


def tell_of_birth(starter: int, *, certain: bool, forked: bool = False) -> None:
    tell(born=os.getpid(), ticks=start_ticks(), starter=starter, certain=certain, forked=forked)


def is_over() -> bool:
    return time.monotonic() >= float(os.environ[UNTIL])


def attend_children() -> None:
    """Wait for children that have ended, and tell of those that somebody has ended."""
    try:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if os.WIFSIGNALED(found[1]):
                tell(ended=found[0], told_by=os.getpid())
    except ChildProcessError:
        return


def work(seed: int, starter: int, certain: int = 1, depth: int = 0, stays: int = 0) -> None:
    """The life of a worker: ``stays``: it neither exits nor becomes another program."""
    dice = random.Random(seed)
    tell_of_birth(starter, certain=bool(certain), forked=depth > 0)
    held = b"\1" * HELD_BYTES
    end_s = time.monotonic() + stage.LIFETIME_S
    while time.monotonic() < end_s:
        attend_children()
        fate = 1.0 if is_over() else dice.random()
        if fate < 0.04 and depth < MOST_FORKS:
            me = os.getpid()
            child_seed = dice.getrandbits(32)
            if not os.fork():
                work(child_seed, me, certain, depth + 1)
        elif fate < 0.05 and not stays:
            tell(left=os.getpid())
            os._exit(0)
        elif fate < 0.06 and not stays and os.getppid() == starter:
            os.execv("/bin/sh", ["sh", "-c", OTHER])
        stage.sum_up()
        time.sleep(PACE_S * (0.5 + dice.random()))
    del held
    os._exit(0)


class Pool:
    """A pool's parent. Each method named as a flavour starts one worker."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.me = os.getpid()
        self.kept: list[Any] = []

    def argv(self, seed: int) -> None:
        words = [sys.executable, "-c", WORKER, "--multiprocessing-fork", str(seed), str(self.me)]
        if not os.fork():
            tell_of_birth(self.me, certain=True)
            if self.dice.random() < 0.5:  # it may be seen before it has become what it will be
                time.sleep(PACE_S)
            os.execv(words[0], words)

    def spawn(self, seed: int) -> None:
        process = multiprocessing.get_context("spawn").Process(target=work, args=(seed, self.me))
        process.start()
        self.kept.append(process)

    def loky(self, seed: int) -> None:
        """One at most: an executor ends all of its workers when one has left."""
        from joblib.externals.loky import get_reusable_executor

        if not self.kept:
            executor = get_reusable_executor(1, timeout=300)
            self.kept += [executor, executor.submit(work, seed, self.me, 1, 0, 1)]

    def fork(self, seed: int) -> None:
        if not os.fork():
            work(seed, self.me, certain=0)


def keep_pool(seed: int) -> None:
    dice = random.Random(seed)
    if dice.random() < 0.25:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if dice.random() < 0.25:
        os.setsid()
    pool, flavour = Pool(dice), dice.choice(FLAVOURS)
    tell(pool=os.getpid(), flavour=flavour)
    started = 0
    end_s = time.monotonic() + stage.LIFETIME_S
    while time.monotonic() < end_s:
        attend_children()
        if not is_over() and started < MOST_WORKERS and dice.random() < 0.3:
            getattr(pool, flavour)(dice.getrandbits(32))
            started += 1
        time.sleep(PACE_S * (0.5 + dice.random()))


def kill(one: subprocess.Popen[bytes]) -> None:
    """Kill a pool's parent, and tell of its children: who is not up by then does not tell of itself."""
    one.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, one.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    children = [pid for pid in stage.children(one.pid) if stage.role(pid) != "tracker"]
    tell(left=one.pid, children=children)
    one.send_signal(signal.SIGKILL)
    one.wait()


def direct(seed: int, seconds: float) -> None:
    """Start pools, and kill some of them."""
    dice = random.Random(seed)
    os.environ[UNTIL] = str(time.monotonic() + seconds)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [os.path.dirname(os.path.abspath(__file__)), os.environ["PYTHONPATH"]]
    )
    pools: list[subprocess.Popen[bytes]] = []
    while not is_over():
        if len(pools) < MOST_POOLS:
            command = [sys.executable, __file__, "pool", str(dice.getrandbits(32))]
            pools.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        elif dice.random() < 0.5:
            kill(pools.pop(dice.randrange(len(pools))))
        time.sleep(0.7 * dice.random())
    time.sleep(2 * PACE_S)
    sys.stdout.write("over\n")
    sys.stdout.flush()
    for one in pools:
        one.wait()


if __name__ == "__main__":
    if sys.argv[1] == "pool":
        keep_pool(int(sys.argv[2]))
    else:
        direct(int(sys.argv[1]), float(sys.argv[2]))
