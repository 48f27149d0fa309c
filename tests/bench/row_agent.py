"""Rows: what the agent costs a training script: its import, ``register()``, ``progress()``."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Generator

from figures import Row, alternate
from scene import Bench, Unmeasured, answers, program, wait_idle

PEER = "pyzmq: connect, round trip, close"

_IMPORTED = """\
import os, sys
before = set(sys.modules)
import agent
new = {name.partition('.')[0] for name in set(sys.modules) - before}
print(' '.join(sorted(new - set(sys.stdlib_module_names) - {'agent'})))
"""

_PROGRESS = """\
import sys, time
import agent
assert agent.register(socket=sys.argv[1]).socket is not None
count = int(sys.argv[2])
for _ in range(5):
    began_s = time.perf_counter()
    for number in range(count):
        agent.progress(number, count, "fold 3")
    print((time.perf_counter() - began_s) / count)
"""


# -- import ---------------------------------------------------------------------------------------


def measure_import(bench: Bench) -> Generator[Row]:
    environment = bench.environment()

    def run_s(code: str) -> float:
        began_s = time.perf_counter()
        process = os.posix_spawn(sys.executable, [sys.executable, "-c", code], environment)
        _, status = os.waitpid(process, 0)
        took_s = time.perf_counter() - began_s
        if status:
            raise Unmeasured(f"python -c {code!r} failed")
        return took_s

    run_s("import agent, zmq")  # compiles what has not been yet
    bare, ours, zmq = alternate(
        bench.times(60, 25),
        lambda: run_s("pass"),
        lambda: run_s("import agent"),
        lambda: run_s("import zmq"),
    )
    start_ms = statistics.median(bare) * 1e3
    yield Row(
        "import agent, over a bare start of Python",
        _difference_ms(ours, bare),
        "ms",
        at_most=3.0,
        note=f"a bare start: {start_ms:.1f} ms; import zmq: {_difference_ms(zmq, bare):.1f} ms over it",
    )
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTED], env=environment, capture_output=True, text=True, check=True
    )
    strangers = done.stdout.split()
    yield Row(
        "third-party modules that import agent loads",
        len(strangers),
        "",
        at_most=0,
        note=" ".join(strangers),
    )


def _difference_ms(these: list[float], those: list[float]) -> float:
    """Return the median of what each of ``these`` took longer than the one beside it."""
    return statistics.median(a - b for a, b in zip(these, those, strict=True)) * 1e3


# -- register -------------------------------------------------------------------------------------


def measure_register(bench: Bench) -> Generator[Row]:
    pairs, repeat = bench.times(25, 9), bench.times(25, 10)
    path = bench.scratch.file("router")
    with bench.daemon("[kill]\nexit_grace = '0s'\n") as daemon, program(bench, "router.py", path):

        def ours_s(*arguments: str) -> list[float]:
            found = _answer(bench, *arguments)
            wait_idle(daemon)  # the end of this session must not be in the way of the next
            return found

        first, loaded, bare = alternate(
            pairs,
            lambda: ours_s("first", daemon.socket)[0],
            lambda: ours_s("loaded", daemon.socket)[0],
            lambda: _answer(bench, "bare", path)[0],
        )
        for ours, where in (
            (
                first,
                "in a fresh process that imported nothing else: what the call needs, the import has loaded",
            ),
            (loaded, "in a fresh process that has imported pyzmq, as its counterpart has"),
        ):
            yield Row(
                f"register(), the first in its process, {'alone' if ours is first else 'beside pyzmq'} (p50)",
                statistics.median(ours) * 1e3,
                "ms",
                statistics.median(bare) * 1e3,
                PEER,
                2.0,
                note=where,
            )
        again, bare_again = [], []
        for _ in range(3):
            again += ours_s("again", daemon.socket, str(repeat))
            bare_again += _answer(bench, "bare", path, str(repeat))
        yield Row(
            "register(), once more in the same process (p50)",
            statistics.median(again) * 1e3,
            "ms",
            statistics.median(bare_again) * 1e3,
            PEER,
            2.0,
            note="after unregister(), which is not counted",
        )


def _answer(bench: Bench, *arguments: str) -> list[float]:
    return [took_s for (took_s,) in answers(bench, "register.py", *arguments)]


# -- progress -------------------------------------------------------------------------------------


def measure_progress(bench: Bench) -> Generator[Row]:
    count = bench.times(100_000, 20_000)
    with bench.daemon() as daemon:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRESS, daemon.socket, str(count)],
            env=bench.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
    yield Row(
        "agent.progress(), one call",
        min(map(float, done.stdout.split())) * 1e6,
        "us",
        at_most=5.0,
        note=f"the best of five loops of {count} calls",
    )
