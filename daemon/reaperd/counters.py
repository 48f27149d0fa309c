"""Counts what has happened, as Prometheus wants it: sums that only grow, by labels of which there are few. Pure.

Never a label that users can make more of: no pid, no session, no uid, and no framework but those that the rules name.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from reaperd import signatures
from reaperd.config import EventKind

SCAN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
CAUSES = ("exit", "signal", "oom", "unknown")
# Why somebody was ended who belongs to no session: the scan found it, or a person asked for it.
ORPHAN, CLEANUP = "orphan", "cleanup"
OUTCOMES = REAPED, NOTHING_LEFT, DRY_RUN = "reaped", "nothing-left", "dry-run"  # of a session's end
SIGNALS = ("SIGTERM", "SIGKILL")
MEMORY = ("rss", "shm", "gpu")
OTHER = "other"
_MOST_FRAMEWORKS = 100


class Histogram:
    """How many were at most so long, in seconds."""

    __slots__ = ("bounds_s", "counts", "sum_s")

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self.bounds_s = tuple(bounds_s)
        self.counts = [0] * (len(bounds_s) + 1)
        self.sum_s = 0.0

    def add(self, value_s: float) -> None:
        """Count one."""
        self.counts[bisect.bisect_left(self.bounds_s, value_s)] += 1
        self.sum_s += value_s

    def record(self) -> dict[str, Any]:
        """Return it as it goes to the exporter: the counts are of each bucket alone, the last without a bound."""
        return {"bounds": list(self.bounds_s), "counts": list(self.counts), "sum": self.sum_s}


class Counters:
    """All that has been counted since it was made."""

    def __init__(self) -> None:
        self.scans, self.latencies = Histogram(SCAN_BUCKETS_S), Histogram(LATENCY_BUCKETS_S)
        self.reload_was_good = True
        # What has not happened yet is told of, too: from nothing to one, Prometheus sees no rise.
        self._events: Counter[str] = Counter(dict.fromkeys(get_args(EventKind), 0))
        self._ended: Counter[tuple[str, str]] = Counter(dict.fromkeys(itertools.product(CAUSES, OUTCOMES), 0))
        self._killed: Counter[tuple[str, str, str]] = Counter()
        self._freed_bytes = dict.fromkeys(MEMORY, 0)
        self._frameworks = _known(())

    def heed(self, extra: Iterable[str]) -> None:
        """Count the frameworks of ``[scan] extra_signatures`` by their names, too; what was counted stays as it is."""
        self._frameworks = _known(extra)

    def note(self, event: Mapping[str, Any]) -> None:
        """Count an event of the history."""
        kind = event["kind"]
        self._events[kind] += 1
        if kind == "reload":
            self.reload_was_good = not event.get("faults")
        cause = _cause_of(event)
        for process in event["processes"]:
            if process.get("result") == "killed":
                self._killed[cause, self._framework(process), _signal(process)] += 1
        for memory in MEMORY:
            self._freed_bytes[memory] += event["freed"][f"{memory}_bytes"]
        if kind in ("ended", "reaped"):
            outcome = NOTHING_LEFT if kind == "ended" else DRY_RUN if event.get("dry_run") else REAPED
            self._ended[cause, outcome] += 1
            if outcome == REAPED and event["latency_s"] is not None:
                self.latencies.add(event["latency_s"])

    def _framework(self, process: Mapping[str, Any]) -> str:
        name = process.get("framework")
        return name if name in self._frameworks else OTHER

    def record(self) -> dict[str, Any]:
        """Return all of it as it goes to the exporter."""
        return {
            "events": dict(self._events),
            "killed": [[*labels, count] for labels, count in self._killed.items()],
            "ended": [[*labels, count] for labels, count in self._ended.items()],
            "freed_bytes": dict(self._freed_bytes),
            "reload_was_good": self.reload_was_good,
            "scans": self.scans.record(),
            "latencies": self.latencies.record(),
        }


def _known(extra: Iterable[str]) -> frozenset[str]:
    built_in = {row.framework for row in signatures.SIGNATURES} | {signatures.FORKED}
    return frozenset((*built_in, *sorted(extra)[:_MOST_FRAMEWORKS]))


def _cause_of(event: Mapping[str, Any]) -> str:
    if event["session"] is None:
        return ORPHAN if event.get("asked_by_uid") is None else CLEANUP
    kind = (event["cause"] or {}).get("kind")
    return kind if kind in CAUSES else "unknown"


def _signal(process: Mapping[str, Any]) -> str:
    """Return the last signal that it was sent; nobody is ended by another than these."""
    return process["signal"] if process.get("signal") in SIGNALS else OTHER
