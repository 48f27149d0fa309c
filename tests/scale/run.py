"""Print what size costs, on a real daemon: ``run.py [--seed N] [--quick] [--only families|crowd|hops] ...``.

Families: one session of many workers. Crowd: many sessions, half of which die in one second, and in one instant.
Hops: workers that fork themselves every millisecond. Every figure stands beside the same figure of something small and of a
bare loop, taken in the same run: on a busy machine only ratios mean something.
The exit code is 1 where a worker outlived the promise, or anybody was ended whose leader lives.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "support"))

from harness import Daemon, Leader, Scratch, alive, all_pids, describe
from throng import Footprint, Kin, Reaping, Throng, bare_loop, footprint, kill_leaders, share

from agent import client

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
SMALL = 4  # the workers of a small session
HOPS = ("hops", "hops-politely", "hops-in-new-sessions", "hops-with-closed-descriptors", "hops-in-a-crowd")
# Eight beside eight strangers that do the same: more than a look keeps up with on two CPUs, as docs/how-it-decides.md says.
OUTRUNS = ("hops-in-a-crowd",)
HOPPED_WITHIN_S = 25.0  # they end by themselves after 20 s


@dataclass(frozen=True)
class Cost:
    """What ending so many processes took: by the clock, and of the daemon's CPU (0 where there was none)."""

    processes: int
    wall_s: float
    cpu_s: float = 0.0

    @property
    def wall_ms_each(self) -> float:
        return self.wall_s * 1e3 / self.processes

    @property
    def cpu_ms_each(self) -> float:
        return self.cpu_s * 1e3 / self.processes


class Record:
    """Reads from the daemon's history which sessions are over."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._after = 0
        self._over: set[str] = set()

    def wait_over(self, sessions: list[Kin]) -> float:
        """Return, once all of ``sessions`` are over and on record, the seconds that took."""
        began_s = time.monotonic()
        wanted = {one.session for one in sessions}
        while not wanted <= self._over:
            left_s = began_s + RECORDED_WITHIN_S - time.monotonic()
            if left_s <= 0:
                raise AssertionError(
                    f"{len(wanted - self._over)} sessions are not over {RECORDED_WITHIN_S:g} s later"
                )
            self._read(left_s)
        return time.monotonic() - began_s

    def _read(self, within_s: float) -> None:
        question = {"op": "events", "after": self._after, "wait_s": 1}
        reply = client.request(self._daemon.socket, question, timeout_s=within_s + 1)
        for event in reply["events"]:
            self._after = event["seq"]
            if event["kind"] in ("reaped", "ended"):
                self._over.add(event["session"])


class Figures:
    """Prints figures as they come, and remembers whether anything was wrong."""

    def __init__(self, daemon: Daemon, seed: int, kind: str) -> None:
        self.daemon = daemon
        self.random = random.Random(seed)
        self.kind = kind
        self.record = Record(daemon)
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

    @contextlib.contextmanager
    def throng(self, leaders: int, workers: int) -> Iterator[Throng]:
        """Have so many sessions, and return when the last of them is on record as over."""
        # Whoever starts them adopts them as well: how fast init waits for its zombies is none of our figures.
        with Throng(self.daemon, leaders, workers, self.kind, adopt=True) as throng:
            yield throng
        self.record.wait_over([one for one in throng.sessions if one.register_s is not None])

    # -- what it is measured by

    def reap_one(self, workers: int) -> Cost:
        """Reap one session, the only one there is."""
        with self.throng(1, workers) as throng:
            before = footprint(self.daemon)
            reaping = kill_leaders(throng.sessions, within_s=GONE_WITHIN_S)
            self.record.wait_over(throng.sessions)
            cpu_s = footprint(self.daemon).cpu_s - before.cpu_s
            self.check(reaping)
        return Cost(workers, reaping.total_s, cpu_s)

    def end_by_hand(self, leaders: int, workers: int) -> Cost:
        """End the workers of so many sessions by a loop that knows them, with no daemon's help."""
        with self.throng(leaders, workers) as throng:
            pids = [pid for one in throng.sessions for pid in one.workers]
            return Cost(len(pids), bare_loop(pids))

    # -- one session of many workers

    def families(self, sizes: list[int], repeat: int) -> None:
        print(f"\none session of N {self.kind} workers: from the leader's SIGKILL to the end of the last one")
        print(
            f"{'':>6} {'reaped':>10} {'by a bare loop':>15}        {'daemon CPU':>10}   against {SMALL} workers"
        )
        print(
            f"{'N':>6} {'ms':>10} {'ms each':>8} {'ms each':>8} {'ratio':>6} {'ms each':>10} {'by clock':>9} {'by CPU':>7}"
        )
        small: Cost | None = None
        for size in [SMALL, *sizes]:
            rounds = range(repeat if size <= 100 else 1)
            bare = typical([self.end_by_hand(1, size) for _ in rounds])
            ours = typical([self.reap_one(size) for _ in rounds])
            small = small or ours
            print(
                f"{size:6} {ours.wall_s * 1e3:10.2f} {ours.wall_ms_each:8.3f} {bare.wall_ms_each:8.3f}"
                f" {ours.wall_s / bare.wall_s:6.2f} {ours.cpu_ms_each:10.3f}"
                f" {ours.wall_ms_each / small.wall_ms_each:9.2f} {ours.cpu_ms_each / max(small.cpu_ms_each, 0.001):7.2f}",
                flush=True,
            )
        tell(footprint(self.daemon), "afterwards")

    # -- many sessions

    def crowd(self, sessions: int, workers: int, over_s: float) -> None:
        moment = f"within {over_s:g} s" if over_s else "in one instant"
        print(f"\n{sessions} sessions of {workers} {self.kind} workers each, of which half die {moment}")
        bare = self.end_by_hand(sessions // 2, workers)
        alone = typical([self.reap_one(workers) for _ in range(9)])
        before = footprint(self.daemon)
        with self.throng(sessions, workers) as throng:
            self.tell_registered(throng)
            registered = tell(footprint(self.daemon), "registered", before)
            dying = self.random.sample(throng.sessions, sessions // 2)
            chosen = {one.leader for one in dying}
            living = [one for one in throng.sessions if one.leader not in chosen]
            reaping = kill_leaders(dying, within_s=GONE_WITHIN_S, over_s=over_s)
            self.check(reaping)
            took_s = self.record.wait_over(dying)
            after = tell(footprint(self.daemon), "half of them gone", before)
            self.tell_reaping(reaping, after.cpu_s - registered.cpu_s, alone, bare, spread=over_s > 0)
            print(f"  every end on record {took_s:.2f} s later")
            self.check_untouched(living)
        tell(footprint(self.daemon), "all gone", before)

    def tell_registered(self, throng: Throng) -> None:
        accepted = [one.register_s for one in throng.sessions if one.register_s is not None]
        print(
            f"  up in {throng.up_s:.2f} s; register(): median {statistics.median(accepted) * 1e3:.1f} ms,"
            f" p95 {share(accepted, 0.95) * 1e3:.1f} ms, max {max(accepted) * 1e3:.1f} ms"
        )
        if len(accepted) < len(throng.sessions):
            self.fault(f"{len(throng.sessions) - len(accepted)} leaders were not accepted")

    def tell_reaping(self, reaping: Reaping, cpu_s: float, alone: Cost, bare: Cost, *, spread: bool) -> None:
        times = reaping.latencies_s
        ours = Cost(reaping.processes, reaping.total_s, cpu_s)
        print(
            f"  a session is gone after: median {statistics.median(times) * 1e3:.1f} ms,"
            f" p95 {share(times, 0.95) * 1e3:.1f} ms, max {max(times) * 1e3:.1f} ms;"
            f" one alone {alone.wall_s * 1e3:.1f} ms, ratio of the medians {statistics.median(times) / alone.wall_s:.2f}"
        )
        if not spread:  # else the time from the first to the last is that in which they were killed
            print(
                f"  {ours.processes} processes in {ours.wall_s * 1e3:.1f} ms: {ours.wall_ms_each:.3f} ms each"
                f" (one session alone {alone.wall_ms_each:.3f}, ratio {ours.wall_ms_each / alone.wall_ms_each:.2f};"
                f" bare loop {bare.wall_ms_each:.3f}, ratio {ours.wall_ms_each / bare.wall_ms_each:.2f})"
            )
        print(
            f"  CPU of the daemon until all is on record: {ours.cpu_s:.2f} s, {ours.cpu_ms_each:.2f} ms a process"
            f" (one session alone {alone.cpu_ms_each:.2f}, ratio {ours.cpu_ms_each / max(alone.cpu_ms_each, 0.001):.2f})"
        )

    def check_untouched(self, living: list[Kin]) -> None:
        pids = [pid for one in living for pid in (one.leader, *one.workers)]
        gone = [pid for pid in pids if not alive(pid)]
        print(f"  untouched: {len(pids) - len(gone)} of {len(pids)} processes whose leaders live")
        if gone:
            self.fault(f"{len(gone)} processes ended although their leader lives: {gone[:10]}")
        sessions = client.request(self.daemon.socket, {"op": "ps"}, timeout_s=RECORDED_WITHIN_S)["sessions"]
        listed = {session["id"] for session in sessions}
        if missing := [one.session for one in living if one.session not in listed]:
            self.fault(f"{len(missing)} living sessions are not listed: {missing[:5]}")

    # -- never long the same

    def hops(self, scratch: Scratch, repeat: int) -> None:
        print(
            "\nworkers that fork themselves every millisecond: from the leader's SIGKILL until the last one is gone"
        )
        for kind in HOPS:
            times = []
            with self.stranger(scratch, kind) as stranger:
                for _ in range(repeat):
                    with contextlib.closing(self.start_hopper(scratch, kind)) as leader:
                        before = footprint(self.daemon)
                        leader.kill9()
                        began_s = time.monotonic()
                        if leader.wait_released(HOPPED_WITHIN_S):
                            times.append(time.monotonic() - began_s)
                        cpu_s = footprint(self.daemon).cpu_s - before.cpu_s
                untouched = not stranger.wait_released(0)
            caught = [s for s in times if s <= PROMISE_S]
            print(
                f"  {kind:29} gone after: median {share(times, 0.5) * 1e3:8.1f} ms, max {max(times, default=0) * 1e3:8.1f} ms;"
                f" daemon CPU of the last {cpu_s:.2f} s",
                flush=True,
            )
            late = f"{repeat - len(caught)} of {repeat} were not gone within {PROMISE_S:g} s"
            if len(caught) < repeat and kind in OUTRUNS:
                print(f"    {late}, which is not promised of it")
            elif len(caught) < repeat:
                self.fault(f"{kind}: {late}")
            if not untouched:
                self.fault(f"{kind}: a stranger that does the same was ended")

    @contextlib.contextmanager
    def stranger(self, scratch: Scratch, kind: str) -> Iterator[Leader]:
        """Have something hop that is nobody's worker, as long as the block lasts."""
        stranger = self.start_hopper(scratch, kind, REAPER_DISABLE="1", REAPER_TEST_HOPS_S="600")
        with contextlib.closing(stranger):
            stranger.kill9()
            try:
                yield stranger
            finally:
                shutil.rmtree(os.path.dirname(stranger.log))  # at which it ends
                stranger.wait_released(HOPPED_WITHIN_S)

    def start_hopper(self, scratch: Scratch, kind: str, **env: str) -> Leader:
        return Leader(scratch, self.daemon.run, "odd.py", kind, socket=self.daemon.socket, env=env).up()


def typical(costs: list[Cost]) -> Cost:
    """Return the median, by the clock, with the median CPU."""
    return Cost(
        costs[0].processes,
        statistics.median(cost.wall_s for cost in costs),
        statistics.median(cost.cpu_s for cost in costs),
    )


def tell(now: Footprint, when: str, before: Footprint | None = None) -> Footprint:
    more = "" if before is None else f" ({(now.pss_bytes - before.pss_bytes) / 2**20:+.1f} MiB)"
    print(f"  {when}: {now.pss_bytes / 2**20:.1f} MiB PSS{more}, {now.descriptors} descriptors", flush=True)
    return now


def tell_complaints(daemon: Daemon) -> None:
    """Print what the daemon's log has beyond the usual."""
    lines = daemon.read_log().splitlines()
    found = [
        line
        for line in lines
        if not line.startswith("---") and " INFO " not in line and " DEBUG " not in line
    ]
    if found:
        print(
            f"\nthe daemon's log has {len(found)} lines that are no news of sessions, of which the last are:"
        )
        print("\n".join(f"  {line[:200]}" for line in found[-20:]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="chooses who dies (default: another each time)"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the size")
    parser.add_argument("--only", choices=["families", "crowd", "hops"])
    parser.add_argument("--kind", choices=["forked", "execed"], default="forked")
    parser.add_argument(
        "--family", type=int, help="workers of the largest family (default: 5000, quick: 500)"
    )
    parser.add_argument("--sessions", type=int, help="how many in the crowd (default: 2000, quick: 200)")
    parser.add_argument(
        "--workers", type=int, default=1, help="of each session in the crowd (default: %(default)s)"
    )
    options = parser.parse_args()
    options.seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    options.family = options.family or (500 if options.quick else 5000)
    options.sessions = options.sessions or (200 if options.quick else 2000)
    return options


def main() -> None:
    options = parse_arguments()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    others = len(all_pids())
    print(f"seed {options.seed}, {os.cpu_count()} CPUs, {others} processes, load {os.getloadavg()[0]:.2f}")
    # And everything is taken down again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    scratch = Scratch()
    daemon = Daemon(scratch, uuid.uuid4().hex[:12], config=CONFIG)
    try:
        daemon.start()
        figures = Figures(daemon, options.seed, options.kind)
        if options.only in (None, "families"):
            figures.families([64, *([] if options.quick else [1000]), options.family], 5)
        if options.only in (None, "crowd"):
            for over_s in (1.0, 0.0):
                figures.crowd(options.sessions, options.workers, over_s)
        if options.only in (None, "hops"):
            figures.hops(scratch, 1 if options.quick else 3)
    finally:
        tell_complaints(daemon)
        daemon.close()
        scratch.remove()
    print(f"\n{len(figures.faults)} faults (seed {options.seed}, load {os.getloadavg()[0]:.2f})")
    raise SystemExit(1 if figures.faults else 0)


if __name__ == "__main__":
    main()
