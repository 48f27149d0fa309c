"""Row: how long workers outlive their leader while about a thousand events a second are told to people, and while they are not."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Generator, Iterator
from functools import partial

from figures import Row, alternate, spread
from harness import Daemon
from processes import cpu_clock_s
from scene import PROGRAMS, Bench, Unmeasured, ask, last_one_gone, program, wait_concluded, wait_until
from throng import Throng

FACTOR = 1.2
WORKERS = 4
_AT_ONCE = 4  # leaders that are killed, one after another
_STORMY = (sys.executable, os.path.join(PROGRAMS, "stormy.py"))
_ALERTS = """\
[alerts]
on = ["killed", "reaped"]
group_within = "1s"
urls = ["json://127.0.0.1:{}/", "json://127.0.0.1:{}/"]
"""


def measure(bench: Bench) -> Generator[Row]:
    if importlib.util.find_spec("apprise") is None:
        raise Unmeasured("Apprise is not installed: pip install 'reaperd[alerts]'")
    answers, hangs = free_port(), free_port()
    with (
        program(bench, "sink.py", str(answers), "answers"),
        program(bench, "sink.py", str(hangs), "hangs"),
        bench.daemon(_ALERTS.format(answers, hangs), inside=_STORMY) as told,
        bench.daemon(inside=_STORMY) as untold,
        bench.daemon() as calm,
    ):
        rates: list[float] = []
        ours, theirs, floor = alternate(
            bench.times(30, 12),
            partial(reap_in_storm, told, rates),
            partial(reap_in_storm, untold, []),
            partial(reap, calm),
        )
        told_us, untold_us = cpu_of_an_event_us(told), cpu_of_an_event_us(untold)
        wait_until(lambda: has_alerted(told), "who hangs is told of")
    with_ms, without_ms, calm_ms = (
        [took_s * 1e3 for one in found for took_s in one] for found in (ours, theirs, floor)
    )
    yield Row(
        f"leader killed among 1000 events a second, {WORKERS} workers gone, alerts on",
        statistics.median(with_ms),
        "ms",
        statistics.median(without_ms),
        "as many events, alerts off",
        FACTOR,
        note=(
            f"{statistics.median(rates):.0f} events a second, of which each takes the core {told_us:.0f} us, without alerts"
            f" {untold_us:.0f}; {len(with_ms)} reaps each, the longest {max(with_ms):.1f} and {max(without_ms):.1f} ms;"
            f" without events {statistics.median(calm_ms):.2f}, the longest {max(calm_ms):.1f} ms; middle half of ours within {spread(with_ms):.0%}, of theirs {spread(without_ms):.0%}"
        ),
    )


def reap(daemon: Daemon) -> list[float]:
    """Return the seconds that the workers of each of some sessions outlive their leaders, one after another."""
    with Throng(daemon, _AT_ONCE, WORKERS, adopt=True) as throng:
        return kill_each(throng, daemon)


def reap_in_storm(daemon: Daemon, rates: list[float]) -> list[float]:
    """Return the same while a thousand events a second happen; ``rates`` is given how many there were."""
    with Throng(daemon, _AT_ONCE, WORKERS, adopt=True) as throng, storm(daemon):
        before, began_s = last_event(daemon), time.monotonic()
        took = kill_each(throng, daemon)
        rates.append((last_event(daemon) - before) / (time.monotonic() - began_s))
        return took


def kill_each(throng: Throng, daemon: Daemon) -> list[float]:
    took = [last_one_gone(one) for one in throng.sessions]
    for one in throng.sessions:
        wait_concluded(daemon, one.session)
    return took


@contextlib.contextmanager
def storm(daemon: Daemon) -> Iterator[None]:
    before = last_event(daemon)
    os.kill(daemon.pid, signal.SIGUSR1)
    try:
        wait_until(lambda: last_event(daemon) >= before + 300, "the storm")
        yield
    finally:
        os.kill(daemon.pid, signal.SIGUSR2)


def cpu_of_an_event_us(daemon: Daemon) -> float:
    """Return the CPU time of the core for one event, the record of it included."""
    with storm(daemon):
        before, cpu_s = last_event(daemon), cpu_clock_s(daemon.pid)
        wait_until(lambda: last_event(daemon) >= before + 3000, "three thousand events")
        return (cpu_clock_s(daemon.pid) - cpu_s) / (last_event(daemon) - before) * 1e6


def last_event(daemon: Daemon) -> int:
    last: int = ask(daemon, "events", after=1 << 60)["last"]
    return last


def has_alerted(daemon: Daemon) -> bool:
    """Say whether the one that hangs was told of in the log: then both have been sent to."""
    return "it did not answer" in daemon.read_log()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
