"""What the history comes to, as tables for a terminal. Pure, as ``render`` is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reaperd.ctl.render import cause_in_words
from reaperd.ctl.tally import History, Tally
from reaperd.ctl.text import Look, columns, cut, plain, wrapped
from reaperd.ctl.units import plural
from reaperd.words import duration, size

_HEADS = ("ENDED", "REAPED", "ORPHANS", "TERM", "KILL", "MEM", "SHM", "GPU", "MEDIAN", "WORST")
_LEAST_NAME = 8  # columns
_UNITS = ("K", "M", "G", "T", "P")


def report(found: History, look: Look, *, within: str = "", user_of: Callable[[int], str] = str) -> list[str]:
    """Return the sums in words, then a table for each grouping; ``within`` tells of which events ("of that user")."""
    total = found.total
    if total.is_empty:
        return [f"nothing to report: no session ended and no orphan was killed{within}"]
    lines = [look.paint(line, "bold") for line in wrapped(_ended(total), look, rest="  ")]
    for words in (_killed(total), _freed(total), *_took(total)):
        lines += wrapped(words, look, rest="  ")
    for grouping in found.groups:
        rows = [(_name(key, grouping, user_of), tally) for key, tally in found.rows(grouping)]
        lines += ["", *_table(grouping.upper(), [*rows, ("total", total)], look)]
    return lines


def _ended(total: Tally) -> str:
    over = total.sessions_ended + total.sessions_reaped + total.sessions_spared
    facts = [
        f"{plural(over, 'session')} over: {total.sessions_reaped} reaped, "
        f"{total.sessions_ended} with nothing left to end"
    ]
    if total.sessions_spared:
        facts.append(f"{total.sessions_spared} would have been but for dry_run")
    if total.orphan_groups:
        facts.append(f"{plural(total.orphan_groups, 'group')} of orphans ended")
    return "; ".join(facts)


def _killed(total: Tally) -> str:
    signals = ", ".join(f"{count} by {plain(name)}" for name, count in sorted(total.signals.items()))
    return (
        f"killed {plural(total.killed, 'process')}"
        + (f": {signals}" if signals else "")
        + (f"; {total.remaining} could not be ended" if total.remaining else "")
    )


def _freed(total: Tally) -> str:
    rss, shm, gpu = (size(total.freed[key]) for key in ("rss_bytes", "shm_bytes", "gpu_bytes"))
    return f"freed {rss} of memory, {shm} of shared memory, {gpu} of GPU memory"


def _took(total: Tally) -> list[str]:
    if not total.latencies_s:
        return []
    return [f"gone in {duration(total.median_s())} (median), {duration(total.worst_s())} at worst"]


def _name(key: Any, grouping: str, user_of: Callable[[int], str]) -> str:
    if grouping == "user":
        return "nobody's" if key is None else plain(user_of(key))
    if grouping == "framework":
        return plain(key)
    kind, _, detail = key.partition(":")
    if kind == "rule":
        return plain(f"rule {detail or '?'}")
    if kind == "cleanup":
        return "a cleanup"
    return cause_in_words({"kind": kind, "code": int(detail) if detail.lstrip("-").isdigit() else None})


def _table(head: str, rows: list[tuple[str, Tally]], look: Look) -> list[str]:
    """Return a table with a last line that is the sum of the others; names are cut where it would be too wide."""
    cells = [_HEADS, *(_cells(tally) for _, tally in rows)]
    widths = [max(columns(cell) for cell in column) for column in zip(*cells, strict=True)]
    names = [head, *(name for name, _ in rows)]
    longest, gap = max(map(columns, names)), "  "
    if look.width is not None:
        gap = "  " if sum(widths) + 2 * len(widths) + longest <= look.width else " "
        room = look.width - sum(widths) - len(gap) * len(widths)
        longest = min(longest, max(room, _LEAST_NAME))
    lines = []
    for name, row in zip(names, cells, strict=True):
        shown = cut(name, longest, look)
        numbers = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(gap.join([shown + " " * (longest - columns(shown)), *numbers]))
    return [look.paint(lines[0], "dim"), *lines[1:-1], look.paint(lines[-1], "bold")]


def _cells(tally: Tally) -> tuple[str, ...]:
    term, kill = tally.signals["SIGTERM"], tally.signals["SIGKILL"]
    counts = (tally.sessions_ended, tally.sessions_reaped, tally.orphan_groups, term, kill)
    memory = (tally.freed[key] for key in ("rss_bytes", "shm_bytes", "gpu_bytes"))
    return (
        *(str(count) if count else "-" for count in counts),
        *(_short(amount) if amount else "-" for amount in memory),
        *(_brief(took_s) for took_s in (tally.median_s(), tally.worst_s())),
    )


def _short(amount_bytes: int) -> str:
    """Return "188M": at most five columns of any amount that a machine has."""
    value, unit = float(amount_bytes), "B"
    for larger in _UNITS:
        if value < 999.5:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}{unit}" if value < 9.95 and unit != "B" else f"{value:.0f}{unit}"


def _brief(took_s: float | None) -> str:
    """Return "16ms", "4.3s" or "2min": at most six columns."""
    if took_s is None:
        return "-"
    if took_s < 60:
        return duration(took_s).replace(" ", "")
    return f"{took_s / 60:.0f}min" if took_s < 5970 else f"{took_s / 3600:.0f}h"
