"""Rows: what a daemon that watches a hundred sessions takes while nothing happens, beside circusd and supervisord.

All three run at once on the same host, with as many processes to watch: what they have mapped in common is shared
among the same number, and whatever disturbs the host disturbs all of them.
"""

from __future__ import annotations

import time
from collections.abc import Generator

from figures import Row
from processes import memory, spent, with_children
from scene import Bench, circusd, supervisord
from throng import Throng

SESSIONS = 100
PAUSE_S = 10.0
SCAN_S = 30.0  # the built-in interval
MIB = 2**20


def measure(bench: Bench) -> Generator[Row]:
    with (
        circusd(bench, SESSIONS) as circus,
        supervisord(bench, SESSIONS) as supervisor,
        bench.daemon() as daemon,
    ):
        ready_s = time.monotonic()
        with Throng(daemon, SESSIONS, 1):

            def pids() -> dict[str, list[int]]:
                return {"ours": with_children(daemon.pid), "circusd": [circus], "supervisord": [supervisor]}

            # After the scan that saw the sessions first, from the middle between two on: n intervals hold n scans.
            _sleep_until(ready_s + SCAN_S * 1.5)
            before = {name: spent(found) for name, found in pids().items()}
            _sleep_until(ready_s + SCAN_S * 1.5 + PAUSE_S)
            paused = spent(with_children(daemon.pid)).since(before["ours"])
            scans = bench.times(3, 1)
            _sleep_until(ready_s + SCAN_S * 1.5 + scans * SCAN_S)
            taken = {name: spent(found).since(before[name]) for name, found in pids().items()}
            held = {name: memory(found) for name, found in pids().items()}
    ours, what = held["ours"], f"{SESSIONS} sessions of one worker, {SESSIONS} children"
    for name, aim in (("circusd", False), ("supervisord", True)):
        yield Row(
            f"memory (PSS), {SESSIONS} sessions, beside {name}",
            ours.pss_bytes / MIB,
            "MiB",
            held[name].pss_bytes / MIB,
            name,
            1.0,
            aim,
            f"{what}; RSS {ours.rss_bytes / MIB:.1f} and {held[name].rss_bytes / MIB:.1f} MiB,"
            f" private {ours.private_bytes / MIB:.1f} and {held[name].private_bytes / MIB:.1f} MiB",
        )
    ours_percent = 100 * taken["ours"].cpu_s / taken["ours"].at_s
    for name in ("circusd", "supervisord"):
        yield Row(
            f"CPU, {SESSIONS} sessions and nothing happening, beside {name}",
            ours_percent,
            "%",
            100 * taken[name].cpu_s / taken[name].at_s,
            name,
            1.0,
            note=f"of one core, over {taken['ours'].at_s:.0f} s with {scans} scans; {what}",
        )
    for name in ("circusd", "supervisord"):
        yield Row(
            f"idle wake-ups a second, beside {name}",
            taken["ours"].wake_ups / taken["ours"].at_s,
            "/s",
            taken[name].wake_ups / taken[name].at_s,
            name,
            note=f"all threads of core and gate; {taken['ours'].wake_ups / scans:.0f} for each scan, while it is at work",
        )
    yield Row(
        f"wake-ups in {PAUSE_S:g} s between two scans",
        paused.wake_ups,
        "",
        at_most=0,
        note="all threads of core and gate; no service manager asks for its watchdog here",
    )


def _sleep_until(at_s: float) -> None:
    time.sleep(max(0.0, at_s - time.monotonic()))
