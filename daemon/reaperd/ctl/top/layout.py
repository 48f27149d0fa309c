"""How rows, events and figures lie on the screen: lines made of pieces, each of which has a style.

Pure. A line is exactly as wide as it is asked to be; a piece's text is plain, and no markup is ever read in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from reaperd.ctl import render
from reaperd.ctl.render_orphans import cpu
from reaperd.ctl.text import Look, columns, cut, field, wrapped
from reaperd.ctl.top.model import Kind, Line, Picture, Row, Sort, View
from reaperd.ctl.units import count_of, number_of, plural
from reaperd.words import duration, size

Piece = tuple[str, str]  # a text, and the words of its style: "bold red"
Pieces = list[Piece]

LEAST_WIDTH, LEAST_HEIGHT = 80, 24
CAPTION = "bold reverse"  # of the titles of the columns

_STATE, _AGE, _CPU, _MEMORY, _GPU = 16, 5, 9, 10, 10  # columns
_LEAST_NAME, _MOST_NAME = 21, 44
_BAR_MOST = 24
_STATES = {
    "running": "green",
    "ending": "yellow",
    "ended": "dim",
    "kill": "bold red",
    "quarantine": "yellow",
    "report": "cyan",
    "wait": "yellow",
    "stuck": "bold red",
    "denied": "bold red",
}
_NAMES = {
    Kind.SESSION: "bold",
    Kind.ORPHANS: "bold yellow",
    Kind.ORPHAN: "yellow",
    Kind.LEADER: "cyan",
    Kind.TRACKER: "dim",
    Kind.NOTE: "dim",
}
_TIME_COLUMNS = len("2026-01-31T12:00:00Z")
_HOUR = slice(11, 19)


class Layout(NamedTuple):
    """How wide the columns are."""

    width: int
    name: int
    gpu: bool  # whether there is a column for it
    look: Look

    @property
    def rest(self) -> int:
        """The columns that are left for progress and reasons."""
        return self.width - self.name - _STATE - _AGE - _CPU - _MEMORY - (_GPU if self.gpu else 0) - 4


def layout(width: int, *, gpu: bool, unicode: bool = True) -> Layout:
    """Return the columns of a screen that is ``width`` wide: what is left over is shared by names and reasons."""
    least = Layout(width, _LEAST_NAME, gpu, Look(width, unicode=unicode))
    more = max(0, least.rest - 16) // 3
    return least._replace(name=min(_LEAST_NAME + more, _MOST_NAME))


def fitted(pieces: Iterable[Piece], width: int, look: Look) -> Pieces:
    """Return ``pieces`` cut or filled up to ``width`` columns."""
    found: Pieces = []
    left = width
    for text, style in pieces:
        if left <= 0:
            break
        shown = cut(text, left, look)
        left -= columns(shown)
        found.append((shown, style))
    return [*found, (" " * left, "")] if left > 0 else found


# -- the table ------------------------------------------------------------------------------------


def titles(at: Layout, sort: Sort) -> Pieces:
    """Return the head of the table; the column that it is sorted by is marked."""
    mark = at.look.choose("▾", "v")

    def title(text: str, by: Sort) -> str:
        return f"{text}{mark}" if sort is by else text

    words = [
        _left("  " + title("SESSION / PID", Sort.NAME), at.name, at.look),
        " " + _left("STATE", _STATE, at.look),
        _right(title("AGE", Sort.AGE), _AGE),
        _right(title("CPU", Sort.CPU), _CPU),
        _right(title("MEMORY", Sort.MEMORY), _MEMORY),
        _right("GPU", _GPU) if at.gpu else "",
        "  PROGRESS / WHY",
    ]
    return [(_left("".join(words), at.width, at.look), CAPTION)]


def row(line: Line, at: Layout) -> Pieces:
    """Return a row of the table."""
    one, look = line.row, at.look
    style = _NAMES.get(one.kind, "")
    if one.kind is Kind.NOTE:
        about = one.about
        return _beside_the_bar([(_branch(line, look), "dim"), (f" {about}", "dim")], at)
    branch = _branch(line, look)
    name = _name(one)
    cells = [
        _right(_age(one.age_s), _AGE),
        _right(cpu(one.cpu_percent), _CPU),
        _right(size(one.rss_bytes), _MEMORY),
        _right(size(one.gpu_bytes) if one.gpu_bytes else "-", _GPU) if at.gpu else "",
    ]
    figures = "" if one.kind not in (Kind.SESSION, Kind.ORPHANS) else "bold"
    return _beside_the_bar(
        [
            (branch, "dim" if line.folded is None else style),
            (_left(name, at.name - columns(branch), look), style),
            (" " + _left(_state(one), _STATE + 1, look)[:-1], _STATES.get(one.state, "")),
            ("".join(cells), "dim" if one.kind is Kind.TRACKER else figures),
            ("  ", ""),
            *_rest(one, at),
        ],
        at,
    )


def _beside_the_bar(pieces: Pieces, at: Layout) -> Pieces:
    """Return a row that leaves the last column to the scroll bar."""
    return [*fitted(pieces, at.width - 1, at.look), (" ", "")]


def _name(one: Row) -> str:
    pid = "?" if one.pid is None else str(one.pid)
    if one.kind in (Kind.SESSION, Kind.ORPHANS):
        return one.name
    return f"{pid:>7} {one.name}"


def _branch(line: Line, look: Look) -> str:
    if line.folded is None:
        return look.choose(" └─" if line.last else " ├─", " `-" if line.last else " |-")
    return look.choose("▸ ", "+ ") if line.folded else look.choose("▾ ", "- ")


def _state(one: Row) -> str:
    """Return the state, and of an orphan the verdict, with how long it has still to live."""
    return one.state if one.ends_in_s is None else f"{one.state} {countdown(one.ends_in_s)}"


def _rest(one: Row, at: Layout) -> Pieces:
    if one.progress is None:
        return [(one.about, "" if one.kind is Kind.ORPHAN else "dim")]
    done, total = number_of(one.progress, "done"), number_of(one.progress, "total")
    if done is None or not total or total < 0:
        return [(render.progress_line(one.progress, at.look), "")]
    share = min(max(done / total, 0.0), 1.0)
    width = min(_BAR_MOST, at.rest - len(" 100 %"))
    filled, empty = render.bar_of(share, max(4, width), at.look)
    words = [f"{done:g}/{total:g}", field(one.progress, "message"), one.about]
    told = "  ".join(word for word in words if word)
    return [(filled, "green"), (empty, "dim"), (f" {int(share * 100):3} %", ""), (f"  {told}", "dim")]


def countdown(left_s: float) -> str:
    """Return "4:05" or "1:02:03": minutes and seconds, and hours where there are any."""
    minutes, seconds = divmod(max(0, round(left_s)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _age(value_s: float | None) -> str:
    """Return "45 s", "12 min" without the blank: one unit is enough in a column."""
    if value_s is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if value_s >= length:
            return f"{int(value_s // length)}{unit}"
    return f"{int(value_s)}s"


def _left(text: str, width: int, look: Look) -> str:
    shown = cut(text, width - 1, look)
    return shown + " " * (width - columns(shown))


def _right(text: str, width: int) -> str:
    return " " * (width - columns(text)) + text


# -- above and below the table --------------------------------------------------------------------


def head(found: Picture, view: View, at: Layout) -> list[Pieces]:
    """Return what stands above the table: the daemon, the sums, what is chosen, and what needs attention."""
    status, sums = found.status, found.sums
    up_s = number_of(status, "uptime_s")
    counts = f"  {plural(sums.sessions, 'session')}, {plural(sums.workers, 'worker')}, "
    taken = [f"CPU {cpu(sums.cpu_percent or 0.0)}", f"memory {size(sums.rss_bytes or 0)}"]
    if sums.gpu_bytes:
        taken.append(f"GPU {size(sums.gpu_bytes)}")
    reaped = plural(count_of(status, "reaped_total"), "process")
    taken.append(f"{reaped} reaped, {size(number_of(status, 'freed_bytes_total'))} freed")
    if up_s is not None:
        taken.append(f"up {duration(up_s if up_s < 60 else up_s // 60 * 60)}")
    # What changes every second comes first: a terminal is sent a line up to where it has changed.
    first: Pieces = [
        (f" {found.at:%H:%M:%S} UTC ", "dim"),
        (f" reaperd {field(status, 'version') or '?'} ", "bold reverse"),
        (counts, ""),
        (plural(sums.orphans, "orphan"), "bold yellow" if sums.orphans else ""),
    ]
    lines = [
        fitted(first, at.width, at.look),
        fitted([(f" {'  '.join(taken)}", "")], at.width, at.look),
    ]
    if isinstance(status, dict) and status.get("dry_run") is True:
        lines.append(fitted([(" dry run: nothing is signalled, only reported", "yellow")], at.width, at.look))
    for trouble in render.troubles(status):
        lines.append(fitted([(f" {trouble}", "bold red")], at.width, at.look))
    if view.text or view.only_uid is not None:
        chosen = [
            f"filter: {view.text}" if view.text else "",
            "your own alone" if view.only_uid is not None else "",
        ]
        text = f" {', '.join(word for word in chosen if word)}"
        lines.append(fitted([(text, "cyan")], at.width, at.look))
    return lines


def event(one: Any, at: Layout) -> Pieces:
    """Return an event in a line: when, what, who, and how; today's date is known."""
    (when, style), *rest = render.event_pieces(one, at.look)
    pieces: Pieces = [(f" {when[_HOUR] if len(when) == _TIME_COLUMNS else when}", style)]
    for text, colour in rest:
        pieces += [("  ", ""), (text, colour)] if text else []
    return fitted(pieces, at.width, at.look)


def event_title(at: Layout, *, chosen: bool) -> Pieces:
    """Return the head of the events; ``chosen``: the keys that move go there."""
    keys = "   Up, Down, PgUp and PgDn scroll, Tab goes back to the sessions" if chosen else ""
    return [(_left(f" EVENTS{keys}", at.width, at.look), CAPTION)]


def lost(reason: str, at_utc: datetime | None, at: Layout) -> list[Pieces]:
    """Return what is said while no daemon answers; ``at_utc`` is of when the rows are."""
    text = f"{reason}; trying again"
    if at_utc is not None:
        text += f". The rows are of {at_utc:%H:%M:%S} UTC"
    look = at.look._replace(width=at.width - 2)
    return [fitted([(f" {line}", "bold red")], at.width, look) for line in wrapped(text, look)]


def nothing(at: Layout) -> Pieces:
    """Return what is said where there is nobody."""
    return fitted([(f" {render.NO_SESSIONS}", "dim")], at.width, at.look)


def nothing_found(at: Layout) -> Pieces:
    """Return what is said where there is nobody whom the filter shows."""
    return fitted([(" nothing here is like that; Esc shows everything again", "dim")], at.width, at.look)


def too_small(width: int, height: int, at: Layout) -> list[Pieces]:
    """Return what is said instead of all the rest where there is no room for it."""
    text = (
        f"reaperctl top needs {LEAST_WIDTH} columns and {LEAST_HEIGHT} lines; this terminal has {width} and {height}. "
        "Make it larger, or press q to leave."
    )
    look = at.look._replace(width=max(1, width))
    return [fitted([(line, "")], width, look) for line in wrapped(text, look)]
