"""What core and gate take of the machine while sessions come and go: it must not grow with their number."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import harness
from chaos.stage import Stage
from chaos.watched import SETTINGS

from reaperd import report
from reaperd.linux.procfs import ProcFS
from reaperd.store import MAX_OF_ONE_UID, Store

BATCH = 50
# Every orphan of the machine's is told of after a moment, and none is touched: they are others', too.
TELLING = SETTINGS.replace(
    "[scan]\n",
    '[scan]\naction = "report"\norphan_age_limit = "100ms"\nmemory_threshold = "1KiB"\ncpu_window = "400ms"\n',
)
ORPHANS = 3  # that nobody registered, in each batch
_SPAWNED = "from multiprocessing.spawn import spawn_main; import time; time.sleep(100)"
_TOLD_WITHIN_S = 60.0  # one that cannot be read in time is left alone for 5 s, then 10, then 20
# In turn; each with one worker, so that most of them leave something to be reaped.
MANNERS = ("kill", "unregister", "clean", "kill", "at-once")
_REGISTERED_WITHIN_S = 60.0


class Footing(NamedTuple):
    """What one process takes."""

    descriptors: int
    threads: int
    pss_bytes: int
    rss_bytes: int


class Measured(NamedTuple):
    """What core and gate take after so many sessions, with none of them left."""

    sessions: int
    core: Footing
    gate: Footing


def read_footing(pid: int) -> Footing:
    """Return what ``pid`` takes now."""
    sizes = {}
    for line in harness.read_proc(pid, "smaps_rollup").splitlines():
        name, _, value = line.partition(b":")
        if name in (b"Rss", b"Pss"):
            sizes[name] = int(value.split()[0]) * 1024
    threads = len(os.listdir(f"/proc/{pid}/task"))
    return Footing(len(os.listdir(f"/proc/{pid}/fd")), threads, sizes[b"Pss"], sizes[b"Rss"])


def come_and_go(stage: Stage, sessions: int) -> Iterator[Measured]:
    """Have ``sessions`` sessions begin and end, and yield after each batch of them what is left of it."""
    orphans = _Orphans(stage)
    for first in range(0, sessions, BATCH):
        orphans.start(ORPHANS)
        batch = [
            stage.start_leader(
                f"S{number}",
                workers=[(f"S{number}.w", ("forked", "execed")[number % 2])],
                uid=0,
                timeout=10.0,
            )
            for number in range(first, min(first + BATCH, sessions))
        ]
        for session in batch:
            stage.wait_until(
                lambda session=session: session.accepted is not None and bool(session.started),  # type: ignore[misc]
                _REGISTERED_WITHIN_S,
                "a leader does not register",
            )
            assert session.accepted, f"no daemon accepted {session.token}"
        for number, session in enumerate(batch):
            stage.end_leader(session, MANNERS[(first + number) % len(MANNERS)])
        orphans.end()
        # Good settings and such as are refused: reading either must leave nothing.
        stage.watched.reload(good=(first // BATCH) % 2 == 0)
        stage.count("reloads")
        stage.be_calm()
        (gate,) = stage.watched.gates()
        yield Measured(first + len(batch), read_footing(stage.daemon.pid), read_footing(gate))


class _Orphans:
    """What only a pool starts, without a parent: the daemon is to tell of each."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._living: list[tuple[int, int]] = []  # pid and pidfd

    def start(self, count: int) -> None:
        """Start some: interpreters that run what multiprocessing has a worker run."""
        for _ in range(count):
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                with contextlib.suppress(BaseException):
                    # Else whoever is process 1 and no init, in whose POSIX session we are, may have started them itself.
                    os.setsid()
                    environment = harness.test_environment(self._stage.run)
                    pid = os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", _SPAWNED], environment)
                    os.write(writer, str(pid).encode())
                os._exit(0)
            os.close(writer)
            with open(reader, "rb") as told:
                pid = int(told.read())
            os.waitpid(child, 0)
            self._living.append((pid, os.pidfd_open(pid)))

    def end(self) -> None:
        """End them once the daemon has told of each."""
        waited_for = {pid for pid, _ in self._living}
        self._stage.wait_until(
            lambda: waited_for <= self._stage.record.orphans, _TOLD_WITHIN_S, "an orphan is not told of"
        )
        self._stage.record.orphans.clear()
        for pid, handle in self._living:
            harness.end_process(pid)
            os.close(handle)
            self._stage.count("orphans told of")
        self._living.clear()


def fill_history(stage: Stage) -> int:
    """Fill the history as far as one user may, so that each new event drops an old one; the daemon is not there yet."""
    os.makedirs(stage.daemon.state, mode=0o700, exist_ok=True)
    with contextlib.closing(Store(stage.daemon.state, ProcFS().boot_id())) as store:
        for _ in range(MAX_OF_ONE_UID.events):
            store.add_event(
                report.event("orphan", at="2026-01-31T12:00:00.000Z", uid=os.geteuid()), time.time()
            )
        store.commit()
        last = store.last_event()
    stage.record.skip_to(last)
    return last


def grew(counts: list[int]) -> bool:
    """Say whether the later half is above the earlier by more than one that was just closed, or is used from now on."""
    half = len(counts) // 2
    return statistics.mean(counts[half:]) - statistics.mean(counts[:half]) > 1


def growth_per_session(points: list[tuple[int, int]]) -> float:
    """Return the slope of the line that fits (sessions, bytes) best."""
    count = len(points)
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
