"""Print what size costs, on a real daemon: ``run.py [--seed N] [--quick] [--only families|crowd]``.

Families: one session of many workers. Crowd: many sessions, half of which die at once. Every figure stands beside the
same figure of something small on the same idle daemon, or of a bare loop: on a busy machine only ratios mean something.
The exit code is 1 where a worker outlived the promise, or anybody was ended whose leader lives.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import sys
import time
import uuid

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "support"))

from harness import Daemon, Scratch, alive, describe
from throng import Footprint, Kin, Reaping, Throng, bare_loop, footprint, kill_leaders, share

GRACE_S = 5.0
PROMISE_S = GRACE_S + 1.0
CONFIG = f"""\
[kill]
grace = "{GRACE_S:g}s"
[sessions]
max_per_uid = 10000
"""
GONE_WITHIN_S = 120.0  # how long the figures wait for what should be gone by PROMISE_S
RECORDED_WITHIN_S = 120.0


class Figures:
    """Prints figures as they come, and remembers whether anything was wrong."""

    def __init__(self, seed: int, kind: str) -> None:
        self.random = random.Random(seed)
        self.kind = kind
        self.faults: list[str] = []

    def fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"  WRONG: {text}", flush=True)

    def check(self, reaping: Reaping) -> None:
        if reaping.alive:
            shown = describe(reaping.alive[:5])
            self.fault(f"{len(reaping.alive)} workers alive {GONE_WITHIN_S:g} s later, such as\n{shown}")
        late = [s for s in reaping.latencies_s if s > PROMISE_S]
        if late:
            self.fault(f"{len(late)} sessions took longer than {PROMISE_S:g} s, the worst {max(late):.3f} s")

    # -- one session of many workers

    def families(self, daemon: Daemon, sizes: list[int], repeat: int) -> None:
        print(f"\none session of N {self.kind} workers: from the leader's SIGKILL to the end of the last one")
        print(
            f"{'N':>6} {'all, ms':>9} {'ms each':>8} {'bare loop':>10} {'ratio':>6} {'CPU, s':>7} {'up, s':>6}"
        )
        for size in sizes:
            times, bare, cpu_s, up_s = [], [], 0.0, 0.0
            for _ in range(repeat if size <= 100 else 1):
                with Throng(daemon, 1, size, self.kind) as throng:
                    up_s = throng.up_s
                    before = footprint(daemon)
                    reaping = kill_leaders(throng.sessions, within_s=GONE_WITHIN_S)
                    self.check(reaping)
                    times.append(reaping.total_s)
                wait_recorded(daemon, throng.sessions)
                cpu_s = footprint(daemon).cpu_s - before.cpu_s
                with Throng(daemon, 1, size, self.kind) as throng:
                    bare.append(bare_loop(throng.sessions[0].workers))
                wait_recorded(daemon, throng.sessions)
            mid, floor = statistics.median(times), statistics.median(bare)
            print(
                f"{size:6} {mid * 1e3:9.2f} {mid * 1e3 / size:8.3f} {floor * 1e3:9.2f}m {mid / floor:6.2f}"
                f" {cpu_s:7.2f} {up_s:6.2f}",
                flush=True,
            )
        tell(footprint(daemon), "afterwards")

    # -- many sessions

    def crowd(self, daemon: Daemon, sessions: int, workers: int, over_s: float) -> None:
        print(
            f"\n{sessions} sessions of {workers} {self.kind} workers, of which half die within {over_s:g} s"
        )
        alone = self.alone(daemon, workers)
        before = tell(footprint(daemon), "before")
        with Throng(daemon, sessions, workers, self.kind) as throng:
            self.tell_registered(throng)
            tell(footprint(daemon), "registered")
            dying = self.random.sample(throng.sessions, sessions // 2)
            chosen = {one.leader for one in dying}
            living = [one for one in throng.sessions if one.leader not in chosen]
            reaping = kill_leaders(dying, within_s=GONE_WITHIN_S, over_s=over_s)
            self.check(reaping)
            self.tell_latencies(reaping, alone)
            took_s = wait_recorded(daemon, dying)
            print(f"  every end on record {took_s:.2f} s later")
            after = tell(footprint(daemon), "half of them gone", before)
            self.check_untouched(daemon, living)
            print(f"  CPU of all that: {after.cpu_s - before.cpu_s:.2f} s")
        wait_recorded(daemon, throng.sessions)
        tell(footprint(daemon), "all gone", before)

    def alone(self, daemon: Daemon, workers: int) -> float:
        """Return the seconds that the workers of one session last, when it is the only one: the median of some."""
        times = []
        for _ in range(9):
            with Throng(daemon, 1, workers, self.kind) as throng:
                times.append(kill_leaders(throng.sessions, within_s=GONE_WITHIN_S).total_s)
            wait_recorded(daemon, throng.sessions)
        mid = statistics.median(times)
        print(f"  one such session alone: {mid * 1e3:.2f} ms, {mid * 1e3 / workers:.2f} ms a process")
        return mid

    def tell_registered(self, throng: Throng) -> None:
        accepted = [one.register_s for one in throng.sessions if one.register_s is not None]
        print(
            f"  up in {throng.up_s:.2f} s; register(): median {statistics.median(accepted) * 1e3:.1f} ms,"
            f" p95 {share(accepted, 0.95) * 1e3:.1f} ms, max {max(accepted) * 1e3:.1f} ms"
        )
        if len(accepted) < len(throng.sessions):
            self.fault(f"{len(throng.sessions) - len(accepted)} leaders were not accepted")

    def tell_latencies(self, reaping: Reaping, alone_s: float) -> None:
        times = reaping.latencies_s
        per_alone_s = alone_s * len(times) / reaping.processes
        print(
            f"  a session is gone after: median {statistics.median(times) * 1e3:.1f} ms,"
            f" p95 {share(times, 0.95) * 1e3:.1f} ms, max {max(times) * 1e3:.1f} ms"
        )
        print(
            f"  {reaping.processes} processes in {reaping.total_s * 1e3:.1f} ms:"
            f" {reaping.per_process_s * 1e3:.3f} ms a process,"
            f" {reaping.per_process_s / per_alone_s:.2f} of what one costs alone"
        )

    def check_untouched(self, daemon: Daemon, living: list[Kin]) -> None:
        pids = [pid for one in living for pid in (one.leader, *one.workers)]
        gone = [pid for pid in pids if not alive(pid)]
        print(f"  untouched: {len(pids) - len(gone)} of {len(pids)} processes whose leaders live")
        if gone:
            self.fault(f"{len(gone)} processes ended although their leader lives: {gone[:10]}")
        listed = {session["id"] for session in daemon.sessions()}
        if missing := [one.session for one in living if one.session not in listed]:
            self.fault(f"{len(missing)} living sessions are not listed: {missing[:5]}")


def tell(now: Footprint, when: str, before: Footprint | None = None) -> Footprint:
    more = "" if before is None else f" ({(now.pss_bytes - before.pss_bytes) / 2**20:+.1f} MiB)"
    print(f"  {when}: {now.pss_bytes / 2**20:.1f} MiB PSS{more}, {now.descriptors} descriptors", flush=True)
    return now


def wait_recorded(daemon: Daemon, sessions: list[Kin]) -> float:
    """Return, once none of ``sessions`` is listed any longer, the seconds that took."""
    began_s = time.monotonic()
    wanted = {one.session for one in sessions}
    while left := wanted & {session["id"] for session in daemon.sessions()}:
        if time.monotonic() > began_s + RECORDED_WITHIN_S:
            raise AssertionError(f"{len(left)} sessions are listed {RECORDED_WITHIN_S:g} s after their end")
    return time.monotonic() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="chooses who dies (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the size")
    parser.add_argument("--only", choices=["families", "crowd"])
    parser.add_argument("--kind", choices=["forked", "execed"], default="forked")
    parser.add_argument(
        "--sessions", type=int, default=0, help="how many in the crowd (default: 2000, quick: 200)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="of each session in the crowd (default: %(default)s)"
    )
    parser.add_argument(
        "--over", type=float, default=0.0, help="seconds over which they die (default: at once)"
    )
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    figures = Figures(options.seed, options.kind)
    print(f"seed {options.seed}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}")
    scratch = Scratch()
    daemon = Daemon(scratch, uuid.uuid4().hex[:12], config=CONFIG)
    try:
        daemon.start()
        if options.only != "crowd":
            figures.families(daemon, [1, 64, 500] if options.quick else [1, 64, 1000, 5000], 5)
        if options.only != "families":
            sessions = options.sessions or (200 if options.quick else 2000)
            figures.crowd(daemon, sessions, options.workers, options.over)
    finally:
        daemon.close()
        scratch.remove()
    print(f"\n{len(figures.faults)} faults")
    raise SystemExit(1 if figures.faults else 0)


if __name__ == "__main__":
    main()
