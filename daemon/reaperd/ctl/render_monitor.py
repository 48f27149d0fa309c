"""What ``reaperctl monitor`` shows: the processes by category, their sums, and the busiest of them.

Pure, and safe for a terminal, as ``render`` is.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from reaperd.ctl import render
from reaperd.ctl.render_orphans import cpu, is_orphan
from reaperd.ctl.text import Look, columns, cut, field, wrapped
from reaperd.ctl.units import count_of, list_of, number_of, plural, text_of
from reaperd.times import rfc3339
from reaperd.words import duration, size

CATEGORIES = ("leaders", "workers", "orphans", "trackers")
BUSIEST = 10  # that are shown where there is no height to keep to
_LABEL_COLUMNS = len("trackers")
_CELL_COLUMNS = (7, 9, 10)  # count or pid, CPU, memory
_LEAST_TEXT = 4


class Shown(NamedTuple):
    """One process; what is not known of it is None."""

    pid: int
    category: str
    framework: str = ""
    session: str = ""  # its name, else its id
    cpu_percent: float | None = None
    rss_bytes: float | None = None
    gpu_bytes: float | None = None


class Sum(NamedTuple):
    """What the processes of one category take; None where it is known of none of them."""

    processes: int
    cpu_percent: float | None
    rss_bytes: float | None
    gpu_bytes: float | None


class Figures(NamedTuple):
    """What there was at one moment."""

    at: datetime
    status: Any
    sessions: int | None  # None, and no status: no daemon was asked
    processes: tuple[Shown, ...]

    def sum_of(self, category: str | None = None) -> Sum:
        """Return the sum of a category, or of all."""
        among = [one for one in self.processes if category in (None, one.category)]
        return Sum(
            len(among),
            _sum(one.cpu_percent for one in among),
            _sum(one.rss_bytes for one in among),
            _sum(one.gpu_bytes for one in among),
        )

    def busiest(self) -> list[Shown]:
        """Return the processes that use a CPU or hold memory, those with the most CPU first."""
        used = [one for one in self.processes if one.cpu_percent or one.rss_bytes or one.gpu_bytes]
        return sorted(used, key=lambda one: (-(one.cpu_percent or 0), -(one.rss_bytes or 0), one.pid))


def _sum(values: Iterable[float | None]) -> float | None:
    every = list(values)
    known = [value for value in every if value is not None]
    return round(sum(known), 1) if known or not every else None


def figures(sessions: list[Any] | None, orphans: list[Any], status: Any, at: datetime) -> Figures:
    """Return what the answers to ``ps``, ``orphans`` and ``status`` come to; nobody is counted twice.

    ``sessions`` and ``status`` are None where no daemon was asked.
    """
    found: dict[int, Shown] = {}
    for session in sessions or []:
        lives = text_of(session, "phase") in ("watched", "")
        name = field(session, "name") or field(session, "id")
        leader = session.get("leader") if isinstance(session, dict) else None
        if lives:
            _add(found, leader, "leaders", name)
        for worker in list_of(session, "workers"):
            tracks = text_of(worker, "role") == "tracker"
            _add(found, worker, "trackers" if tracks else "workers" if lives else "orphans", name)
    for record in orphans:
        if text_of(record, "role") == "tracker" and text_of(record, "rule") == "tracker":
            _add(found, record, "trackers")
        elif is_orphan(record):
            _add(found, record, "orphans")
    return Figures(at, status, None if sessions is None else len(sessions), tuple(found.values()))


def _add(found: dict[int, Shown], record: Any, category: str, session: str = "") -> None:
    pid = number_of(record, "pid")
    if pid is None or int(pid) in found:
        return
    found[int(pid)] = Shown(
        int(pid),
        category,
        field(record, "framework"),
        session,
        number_of(record, "cpu_percent"),
        number_of(record, "rss_bytes"),
        number_of(record, "gpu_bytes"),
    )


# -- as a document --------------------------------------------------------------------------------


def document(found: Figures) -> dict[str, Any]:
    """Return the figures of one interval as they stand in a line of JSON."""
    status = found.status
    return {
        "at": rfc3339(found.at),
        "sessions": found.sessions,
        **{category: found.sum_of(category)._asdict() for category in CATEGORIES},
        "total": found.sum_of()._asdict(),
        "busiest": [one._asdict() for one in found.busiest()[:BUSIEST]],
        "stuck": count_of(status, "stuck"),
        "quarantined": count_of(status, "quarantined"),
        "reaped_total": count_of(status, "reaped_total"),
        "freed_bytes_total": count_of(status, "freed_bytes_total"),
        "dry_run": isinstance(status, dict) and status.get("dry_run") is True,
    }


# -- on paper -------------------------------------------------------------------------------------


def frame(found: Figures, look: Look, *, height: int | None = None) -> list[str]:
    """Return the figures in lines, of which there are at most ``height``: the busiest processes give way first."""
    lines = [*_head(found, look), "", *_sums(found, look)]
    busiest = found.busiest()
    room = BUSIEST if height is None else height - len(lines) - 2
    if busiest and room > 0:
        lines += ["", *_processes(busiest[:room], look)]
    return lines if height is None else lines[:height]


def lost(at: datetime, reason: str, look: Look) -> list[str]:
    """Return what stands in the place of the figures while no daemon answers; ``reason`` is a plain text."""
    return [_time(at), "", *(look.paint(line, "red") for line in wrapped(reason, look))]


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S UTC")


def _head(found: Figures, look: Look) -> list[str]:
    status = found.status
    if found.sessions is None:
        return wrapped(f"{_time(found.at)}  without a daemon: nobody knows of sessions", look)
    pid, up_s = number_of(status, "pid"), number_of(status, "uptime_s")
    who = [
        f"reaperd {field(status, 'version') or '?'}",
        "" if pid is None else f"pid {int(pid)}",
        "" if up_s is None else f"up {duration(up_s)}",
    ]
    freed = size(number_of(status, "freed_bytes_total"))
    reaped = plural(count_of(status, "reaped_total"), "process")
    lines = [
        *wrapped(f"{_time(found.at)}  {', '.join(word for word in who if word)}", look),
        *wrapped(f"{plural(found.sessions, 'session')}; {reaped} reaped so far, {freed} freed", look),
    ]
    if isinstance(status, dict) and status.get("dry_run") is True:
        said = wrapped("dry run: nothing is signalled, only reported", look)
        lines += [look.paint(line, "yellow") for line in said]
    for trouble in render.troubles(status):
        lines += [look.paint(line, "red") for line in wrapped(trouble, look)]
    return lines


def _sums(found: Figures, look: Look) -> list[str]:
    total = found.sum_of()
    gpu = bool(total.gpu_bytes)
    lines = [look.paint(_line("", ("COUNT", "CPU", "MEMORY"), "GPU" if gpu else "", look), "bold")]
    for label, one in (*((name, found.sum_of(name)) for name in CATEGORIES), ("total", total)):
        cells = (str(one.processes), cpu(one.cpu_percent), size(one.rss_bytes))
        line = _line(label, cells, size(one.gpu_bytes) if gpu else "", look)
        colour = "yellow" if label == "orphans" and one.processes else "bold" if label == "total" else ""
        lines.append(look.paint(line, colour))
    return lines


def _processes(among: list[Shown], look: Look) -> list[str]:
    lines = [look.paint(_line("BUSIEST", ("PID", "CPU", "MEMORY"), "WHAT", look), "bold")]
    for one in among:
        held = f"{size(one.gpu_bytes)} of GPU memory" if one.gpu_bytes else ""
        text = ", ".join(word for word in (one.framework, one.session, held) if word)
        cells = (str(one.pid), cpu(one.cpu_percent), size(one.rss_bytes))
        line = _line(one.category.removesuffix("s"), cells, text, look)
        lines.append(look.paint(line, "yellow" if one.category == "orphans" else ""))
    return lines


def _line(label: str, cells: tuple[str, ...], text: str, look: Look) -> str:
    """Return one line; all of them align, and only the text at the end gives way to the width."""
    words = [label + " " * (_LABEL_COLUMNS - columns(label))]
    words += [" " * (width - columns(cell)) + cell for cell, width in zip(cells, _CELL_COLUMNS, strict=True)]
    line = " ".join(words)
    if not text:
        return line
    if look.width is None:
        return f"{line}  {text}"
    room = look.width - columns(line) - 2
    return f"{line}  {cut(text, room, look)}" if room >= _LEAST_TEXT else line
