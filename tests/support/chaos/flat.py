"""What core and gate take of the machine while sessions come and go: it must not grow with their number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import harness
from chaos.stage import Stage

BATCH = 50
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
    for first in range(0, sessions, BATCH):
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
        stage.be_calm()
        (gate,) = stage.watched.gates()
        yield Measured(first + len(batch), read_footing(stage.daemon.pid), read_footing(gate))


def grew(counts: list[int]) -> bool:
    """Say whether the later half is above the earlier: a connection that was just closed may count in one of them."""
    half = len(counts) // 2
    return min(counts[half:]) > max(counts[:half])


def growth_per_session(points: list[tuple[int, int]]) -> float:
    """Return the slope of the line that fits (sessions, bytes) best."""
    count = len(points)
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
