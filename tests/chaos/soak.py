"""Sessions that come and go by the thousand: ``soak.py [--sessions N] [--warm-up N]``.

So do orphans that nobody registered, which the scan tells of; settings are read anew, good ones and such as are refused; and
the history is full from the start, so that every event drops one. Prints what core and gate take meanwhile, and how that grows
with each session. The exit code is 1 where descriptors or threads grew, or memory by more than a page of a record would explain.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import uuid

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "support"))

from chaos.flat import TELLING, Measured, come_and_go, fill_history, grew, growth_per_session
from chaos.stage import Stage
from harness import Scratch

TELL_EVERY = 250  # sessions
# A session that is remembered takes kilobytes, an id of it some 100 bytes; the allocator's own unrest is below this.
MAX_BYTES_A_SESSION = 64.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=4000, help="that are measured (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2000, help="before them (default: %(default)s)")
    options = parser.parse_args()
    print(
        f"{options.warm_up} + {options.sessions} sessions, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}"
    )
    # Whoever takes part is ended on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    scratch = Scratch()
    stage = Stage(scratch, uuid.uuid4().hex[:12], TELLING)
    measured: list[Measured] = []
    try:
        print(f"{fill_history(stage)} events on record before the first", flush=True)
        stage.start_daemon()
        for one in come_and_go(stage, options.warm_up + options.sessions):
            if one.sessions % TELL_EVERY == 0:
                print(
                    f"{one.sessions:6} sessions  core {_words(one, 'core')}   gate {_words(one, 'gate')}",
                    flush=True,
                )
            if one.sessions >= options.warm_up:
                measured.append(one)
    finally:
        stage.close()
        scratch.remove()
    for what, number in sorted(stage.counts.items()):
        print(f"  {number:8} {what}")
    faults = judge(measured, MAX_BYTES_A_SESSION)
    for fault in faults:
        print(f"WRONG: {fault}")
    raise SystemExit(1 if faults else 0)


def _words(one: Measured, who: str) -> str:
    footing = getattr(one, who)
    return (
        f"{footing.descriptors:3} descriptors {footing.threads} threads"
        f" PSS {footing.pss_bytes / 2**20:6.2f} RSS {footing.rss_bytes / 2**20:6.2f} MiB"
    )


def judge(measured: list[Measured], most_bytes: float) -> list[str]:
    """Print how core and gate grew from the first of ``measured`` to the last, and return what is too much."""
    faults = []
    for who in ("core", "gate"):
        footings = [(one.sessions, getattr(one, who)) for one in measured]
        slopes = {
            name: growth_per_session(
                [(sessions, getattr(footing, f"{name}_bytes")) for sessions, footing in footings]
            )
            for name in ("pss", "rss")
        }
        print(f"{who}: PSS {slopes['pss']:+.1f}, RSS {slopes['rss']:+.1f} bytes a session")
        if min(slopes.values()) > most_bytes:
            faults.append(
                f"{who}: grows by {min(slopes.values()):.0f} bytes a session, {most_bytes:g} are allowed"
            )
        for name in ("descriptors", "threads"):
            counts = [getattr(footing, name) for _, footing in footings]
            if grew(counts):
                faults.append(f"{who}: {counts[-1]} {name}, {counts[0]} before")
    return faults


if __name__ == "__main__":
    main()
