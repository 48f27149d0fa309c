"""What a history of events comes to: sessions, processes, memory and times, in all and by group. Pure.

Every event belongs to exactly one group of each grouping, so the rows of a table add up to its total.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from reaperd.ctl.units import list_of, number_of, text_of

GROUPINGS = ("framework", "user", "cause")
# Of a session that is told to be stuck, its end is told as well, with all of its processes.
KINDS = ("ended", "reaped", "killed", "stuck")
MEMORY = ("rss_bytes", "shm_bytes", "gpu_bytes")
NONE = "none"  # no framework: the session left nothing
UNKNOWN = "unknown"


class Tally:
    """Sums of some events."""

    def __init__(self) -> None:
        self.sessions_ended = 0  # where nobody had to be ended
        self.sessions_reaped = 0
        self.sessions_spared = 0  # by a dry run, that would have reaped them
        self.orphan_groups = 0
        self.signals: Counter[str] = Counter()  # of those that ended, the last that each got
        self.remaining = 0  # outlived SIGKILL, or could not be signalled
        self.freed = dict.fromkeys(MEMORY, 0)
        self.latencies_s: list[float] = []

    @property
    def is_empty(self) -> bool:
        """Whether there was nothing to count."""
        return not (self.sessions_ended or self.sessions_reaped or self.sessions_spared or self.orphan_groups)

    @property
    def killed(self) -> int:
        """How many processes ended after a signal."""
        return self.signals.total()

    def add(self, event: dict[str, Any]) -> None:
        """Count one event of ``KINDS``."""
        kind = text_of(event, "kind")
        if kind == "ended":
            self.sessions_ended += 1
        elif kind == "reaped" and event.get("dry_run") is True:
            self.sessions_spared += 1
            return
        elif kind == "reaped":
            self.sessions_reaped += 1
        else:
            self.orphan_groups += 1
        for process in list_of(event, "processes"):
            if is_killed(process):
                self.signals[text_of(process, "signal") or UNKNOWN] += 1
            self.remaining += text_of(process, "result") in ("stuck", "denied")
        for key in MEMORY:
            self.freed[key] += int(number_of(event.get("freed"), key) or 0)
        latency_s = number_of(event, "latency_s")
        # Who ended by itself was not reaped, however long that took.
        if kind != "ended" and latency_s is not None:
            self.latencies_s.append(latency_s)

    def median_s(self) -> float | None:
        """Return the median of what reaping took, None where nothing was reaped."""
        found = sorted(self.latencies_s)
        if not found:
            return None
        middle = len(found) // 2
        return found[middle] if len(found) % 2 else (found[middle - 1] + found[middle]) / 2

    def worst_s(self) -> float | None:
        """Return the most that reaping took."""
        return max(self.latencies_s, default=None)

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        median_s = self.median_s()
        return {
            "sessions_ended": self.sessions_ended,
            "sessions_reaped": self.sessions_reaped,
            "sessions_spared": self.sessions_spared,
            "orphan_groups": self.orphan_groups,
            "killed": self.killed,
            "signals": dict(sorted(self.signals.items())),
            "remaining": self.remaining,
            "freed": dict(self.freed),
            "latency_s": {
                "median": None if median_s is None else round(median_s, 6),
                "worst": self.worst_s(),
                "count": len(self.latencies_s),
            },
        }


class History:
    """What some events come to, in all and by each of ``by``."""

    def __init__(self, by: tuple[str, ...] = GROUPINGS) -> None:
        self.total = Tally()
        self.groups: dict[str, dict[Any, Tally]] = {grouping: {} for grouping in by}

    def add(self, event: dict[str, Any]) -> bool:
        """Count an event, if it is one that counts; say whether it is."""
        if not counts(event):
            return False
        self.total.add(event)
        for grouping, found in self.groups.items():
            found.setdefault(group_of(event, grouping), Tally()).add(event)
        return True

    def rows(self, grouping: str) -> list[tuple[Any, Tally]]:
        """Return the groups, where most was killed and most sessions ended first."""

        def order(row: tuple[Any, Tally]) -> tuple[float, float, str]:
            one = row[1]
            return -one.killed, -(one.sessions_reaped + one.sessions_ended + one.orphan_groups), str(row[0])

        return sorted(self.groups[grouping].items(), key=order)


def fold(events: Iterable[dict[str, Any]], by: tuple[str, ...] = GROUPINGS) -> History:
    """Return what ``events`` come to."""
    found = History(by)
    for event in events:
        found.add(event)
    return found


def counts(event: Any) -> bool:
    """Say whether an event tells of an end: that of a session, or of orphans."""
    kind = text_of(event, "kind")
    return kind in KINDS and (kind != "stuck" or not text_of(event, "session"))


def is_killed(process: Any) -> bool:
    """Say whether a process of an event ended after a signal of ours."""
    return text_of(process, "result") == "killed"


def group_of(event: dict[str, Any], grouping: str) -> Any:
    """Return the one group of ``grouping`` that an event belongs to: a uid, or a text."""
    if grouping == "user":
        uid = number_of(event, "uid")
        return None if uid is None else int(uid)
    return _framework_of(event) if grouping == "framework" else _cause_of(event)


def _framework_of(event: dict[str, Any]) -> str:
    """Return the frameworks of those that were ended, else of all, joined where there are several; trackers only where there is nothing else."""
    processes = list_of(event, "processes")
    found = [one for one in processes if is_killed(one)] or processes
    found = [one for one in found if text_of(one, "role") != "tracker"] or found
    return ", ".join(sorted({text_of(one, "framework") or UNKNOWN for one in found})) or NONE


def _cause_of(event: dict[str, Any]) -> str:
    """Return how the leader ended: exit:CODE, signal:NUMBER, oom or unknown; for orphans rule:NAME, or cleanup where somebody asked for it."""
    cause = event.get("cause")
    if text_of(event, "kind") in ("killed", "stuck"):
        return "cleanup" if number_of(event, "asked_by_uid") is not None else f"rule:{text_of(event, 'rule')}"
    kind, code = text_of(cause, "kind"), number_of(cause, "code")
    if kind in ("exit", "signal") and code is not None and math.isfinite(code):
        return f"{kind}:{int(code)}"
    return kind or UNKNOWN
