"""What ``reaperctl top`` shows, as rows: sessions and their processes, and orphans, sorted, filtered and folded.

Pure: the daemon's answers in, rows out. All texts in a row are plain ones, safe for a terminal.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from reaperd.ctl import render, render_orphans
from reaperd.ctl.text import command_line, field
from reaperd.ctl.units import list_of, number_of, plural, text_of
from reaperd.times import moment
from reaperd.words import plain

if TYPE_CHECKING:  # it can ask a daemon, which must not happen here
    from reaperd.ctl.answers import Answers

Key = tuple[Any, ...]  # who a row is about, the same in every answer
ORPHANS: Key = ("orphans",)


class Kind(enum.Enum):
    """What a row is about."""

    SESSION = "session"
    LEADER = "leader"
    WORKER = "worker"
    TRACKER = "tracker"
    NOTE = "note"  # who is left alone
    ORPHANS = "orphans"  # the head of them all
    ORPHAN = "orphan"


class Sort(enum.Enum):
    """What the sessions, and the processes of each, are ordered by."""

    CPU = "cpu"
    MEMORY = "memory"
    AGE = "age"
    NAME = "name"

    def next(self) -> Sort:
        """Return the one after this."""
        every = list(Sort)
        return every[(every.index(self) + 1) % len(every)]


class Row(NamedTuple):
    """One line; of figures, None is what is not known."""

    key: Key
    kind: Kind
    name: str
    state: str = ""
    uid: int | None = None
    pid: int | None = None
    start_ticks: int | None = None
    session: str = ""  # the id of the one that it belongs to
    age_s: float | None = None
    ends_in_s: float | None = None  # until an orphan is ended
    cpu_percent: float | None = None
    rss_bytes: float | None = None
    gpu_bytes: float | None = None
    progress: Any = None
    about: str = ""  # a command line, the evidence, a cause

    def mentions(self, text: str) -> bool:
        """Say whether the row has ``text`` (in lower case) in what is shown of it."""
        return text in f"{self.name} {self.state} {self.session} {self.about}".lower()


class Family:
    """A row, and those below it; once they have been put into an order, that is kept."""

    __slots__ = ("_lines", "below", "head")

    def __init__(self, head: Row, below: tuple[Row, ...]) -> None:
        self.head = head
        self.below = below
        self._lines: dict[str, list[Line]] = {}

    def aged(self, age_s: float | None) -> Family:
        """Return the same at another time; of what is below nothing has changed."""
        later = Family(self.head._replace(age_s=age_s), self.below)
        later._lines = self._lines
        return later

    def lines(self, sort: Sort) -> list[Line]:
        """Return those below, in order."""
        if sort.value not in self._lines:
            self._lines[sort.value] = _hung(self.below, sort)
        return self._lines[sort.value]


class Sums(NamedTuple):
    """What all processes come to; None where it is known of none."""

    sessions: int
    workers: int
    orphans: int
    cpu_percent: float | None
    rss_bytes: float | None
    gpu_bytes: float | None


class Picture(NamedTuple):
    """What there was at one moment."""

    at: datetime
    status: Any
    sums: Sums
    sessions: tuple[Family, ...]
    orphans: Family | None


class View(NamedTuple):
    """What of a picture somebody wants to see."""

    sort: Sort = Sort.CPU
    text: str = ""
    only_uid: int | None = None
    folded: frozenset[Key] = frozenset()  # with ``fold_all``: those that are open
    fold_all: bool = False

    def is_folded(self, key: Key) -> bool:
        """Say whether the rows below ``key`` are hidden."""
        return (key in self.folded) != self.fold_all


# -- a picture ------------------------------------------------------------------------------------


class Families:
    """Makes rows of sessions; where a session is told of as it was the last time, which most are, it takes over those."""

    def __init__(self) -> None:
        self._gpu: Mapping[int, int] = {}
        # By id: what was told, and since when it runs.
        self._last: dict[str, tuple[Any, datetime | None, Family]] = {}

    def of(
        self, told: list[Any], now: datetime, user_of: Callable[[int], str], gpu: Mapping[int, int]
    ) -> tuple[Family, ...]:
        """Return the sessions that there are ``now``; ``user_of`` must not change its mind."""
        last = self._last if gpu == self._gpu else {}
        self._gpu, self._last = gpu, {}
        found = []
        for one in told:
            id_ = text_of(one, "id")
            known = last.get(id_)
            if known is None or known[0] != one:
                began = moment(text_of(one, "started_at"))
                family = _session(one, user_of, gpu)
            else:
                _, began, family = known
            family = family.aged(max(0.0, (now - began).total_seconds()) if began else None)
            self._last[id_] = (one, began, family)
            found.append(family)
        return tuple(found)


def picture(
    found: Answers,
    *,
    user_of: Callable[[int], str] = str,
    gpu: Mapping[int, int] | None = None,
    families: Families | None = None,
) -> Picture:
    """Return what the daemon's answers show.

    ``gpu`` has the bytes that processes hold on GPUs, by pid, where that is known; ``families`` the rows of the last picture.
    """
    held = gpu or {}
    sessions = (families or Families()).of(found.sessions, found.at, user_of, held)
    claimed = {row.pid for family in sessions for row in family.below}
    orphans = _orphans([one for one in found.orphans if number_of(one, "pid") not in claimed], user_of, held)
    heads = [family.head for family in (*sessions, *([orphans] if orphans else []))]
    ending = sum(_count(family, Kind.WORKER) for family in sessions if not _lives(family.head))
    sums = Sums(
        len(sessions),
        sum(_count(family, Kind.WORKER) for family in sessions if _lives(family.head)),
        ending + (len(orphans.below) if orphans else 0),
        _sum([row.cpu_percent for row in heads]),
        _sum([row.rss_bytes for row in heads]),
        _sum([row.gpu_bytes for row in heads]),
    )
    return Picture(found.at, found.status, sums, sessions, orphans)


def _count(family: Family, kind: Kind) -> int:
    return sum(row.kind is kind for row in family.below)


def _lives(head: Row) -> bool:
    return head.state == "running"


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _session(one: Any, user_of: Callable[[int], str], gpu: Mapping[int, int]) -> Family:
    id_, uid = field(one, "id"), number_of(one, "uid")
    whose = None if uid is None else int(uid)
    below = [
        _leader(one, whose, id_, gpu),
        *(_worker(worker, whose, id_, gpu) for worker in list_of(one, "workers")),
    ]
    left_alone = list_of(one, "left_alone")
    if left_alone:
        note = render.left_alone_line(left_alone)
        below.append(Row((id_, whose, "note"), Kind.NOTE, "", uid=whose, session=id_, about=note))
    told = one if isinstance(one, dict) else {}
    about = [
        "" if whose is None else f"of {plain(user_of(whose))}",
        render.attempt_in_words(one),
        render.cause_in_words(told.get("cause")),
        _command(one),
    ]
    head = Row(
        ("session", whose, id_),
        Kind.SESSION,
        field(one, "name") or id_ or "?",
        field(one, "state"),
        whose,
        below[0].pid,
        below[0].start_ticks,
        id_,
        cpu_percent=_sum([row.cpu_percent for row in below]),
        rss_bytes=_sum([row.rss_bytes for row in below]),
        gpu_bytes=_sum([row.gpu_bytes for row in below]),
        progress=told.get("progress") if isinstance(told.get("progress"), dict) else None,
        about=", ".join(fact for fact in about if fact),
    )
    return Family(head, tuple(below))


def _command(session: Any) -> str:
    leader = session.get("leader") if isinstance(session, dict) else None
    return command_line(leader.get("cmdline") if isinstance(leader, dict) else None)


def _leader(session: Any, uid: int | None, id_: str, gpu: Mapping[int, int]) -> Row:
    told = session.get("leader") if isinstance(session, dict) else None
    ended = text_of(session, "phase") not in ("watched", "")
    about = "has ended" if ended else _command(session) or "(command line not shown)"
    # A dead leader's pid may be somebody else's by now.
    return _process(told, Kind.LEADER, "leader", uid, id_, {} if ended else gpu, about)


def _worker(worker: Any, uid: int | None, id_: str, gpu: Mapping[int, int]) -> Row:
    role = field(worker, "role") or "worker"
    kind = Kind.TRACKER if role == "tracker" else Kind.WORKER
    framework = field(worker, "framework")
    about = ", ".join(word for word in (framework, *render_orphans.evidence(worker)) if word)
    return _process(worker, kind, role, uid, id_, gpu, about)


def _process(
    told: Any, kind: Kind, name: str, uid: int | None, id_: str, gpu: Mapping[int, int], about: str
) -> Row:
    pid, ticks = _whole(told, "pid"), _whole(told, "start_ticks")
    return Row(
        (pid, ticks, kind.value),
        kind,
        name,
        uid=uid,
        pid=pid,
        start_ticks=ticks,
        session=id_,
        cpu_percent=number_of(told, "cpu_percent"),
        rss_bytes=number_of(told, "rss_bytes"),
        gpu_bytes=_held(told, pid, gpu),
        about=about,
    )


def _whole(told: Any, key: str) -> int | None:
    number = number_of(told, key)
    return None if number is None else int(number)


def _held(told: Any, pid: int | None, gpu: Mapping[int, int]) -> float | None:
    """Return what a process holds of GPU memory; the daemon does not ask as long as that changes nothing."""
    return gpu.get(pid or 0) or number_of(told, "gpu_bytes") or None


# -- orphans --------------------------------------------------------------------------------------


def _orphans(records: list[Any], user_of: Callable[[int], str], gpu: Mapping[int, int]) -> Family | None:
    rows = tuple(_orphan(one, user_of, gpu) for one in records if render_orphans.is_orphan(one))
    if not rows:
        return None
    head = Row(
        ORPHANS,
        Kind.ORPHANS,
        "ORPHANS",
        cpu_percent=_sum([row.cpu_percent for row in rows]),
        rss_bytes=_sum([row.rss_bytes for row in rows]),
        gpu_bytes=_sum([row.gpu_bytes for row in rows]),
        about=f"{plural(len(rows), 'worker')} that outlived their pool",
    )
    return Family(head, rows)


def _orphan(record: Any, user_of: Callable[[int], str], gpu: Mapping[int, int]) -> Row:
    pid, ticks, uid = (_whole(record, key) for key in ("pid", "start_ticks", "uid"))
    recognised, *facts = render_orphans.evidence(record) or [""]
    return Row(
        (pid, ticks, "orphan"),
        Kind.ORPHAN,
        field(record, "framework") or "?",
        field(record, "result") or field(record, "verdict"),
        uid,
        pid,
        ticks,
        age_s=number_of(record, "orphaned_s"),
        ends_in_s=number_of(record, "ends_in_s"),
        cpu_percent=number_of(record, "cpu_percent"),
        rss_bytes=number_of(record, "rss_bytes"),
        gpu_bytes=_held(record, pid, gpu),
        about="; ".join(facts or [recognised]) + ("" if uid is None else f"; of {plain(user_of(uid))}"),
    )


# -- a view of it ---------------------------------------------------------------------------------


class Line(NamedTuple):
    """A row where it stands: how it hangs on its head, and whether there is something below that is hidden."""

    row: Row
    last: bool = False  # of those below the same head
    folded: bool | None = None  # None: nothing is below it


def lines(found: Picture, view: View) -> list[Line]:
    """Return what is to be seen, from top to bottom: the orphans first, for they are what somebody should look at."""
    shown: list[Line] = []
    text = view.text.lower()
    families = _sorted(list(found.sessions), view.sort, lambda family: family.head)
    for family in (*([found.orphans] if found.orphans else []), *families):
        below = family.below
        if view.only_uid is not None:
            below = tuple(row for row in below if row.uid == view.only_uid)
            if family.head.kind is Kind.SESSION and family.head.uid != view.only_uid:
                continue
        if text and not (family.head.kind is Kind.SESSION and family.head.mentions(text)):
            below = tuple(row for row in below if _is_found(row, text))
        if not below:
            continue
        folded = view.is_folded(family.head.key)
        shown.append(Line(family.head, folded=folded))
        if not folded:
            shown += family.lines(view.sort) if below is family.below else _hung(below, view.sort)
    return shown


def _is_found(row: Row, text: str) -> bool:
    return row.mentions(text) or str(row.pid) == text


_RANKS = {"leader": 0, "tracker": 2, "note": 3}  # the workers between them


def _hung(rows: tuple[Row, ...], sort: Sort) -> list[Line]:
    """Return the rows below a head, in order."""
    ordered = _sorted(list(rows), sort, lambda row: row)
    ordered.sort(key=lambda row: _RANKS.get(row.kind.value, 1))
    return [Line(row, last=row is ordered[-1]) for row in ordered]


def _sorted(among: list[Any], sort: Sort, row_of: Callable[[Any], Row]) -> list[Any]:
    """Return ``among`` in order, the most first; who is equal stays in an order that does not change by itself."""
    figure = _FIGURES[sort]

    def rank(one: Any) -> tuple[Any, ...]:
        row = row_of(one)
        name = (row.name.lower(), row.pid or 0, row.session)
        return name if figure is None else (-(getattr(row, figure) or 0.0), *name)

    return sorted(among, key=rank)


_FIGURES = {Sort.CPU: "cpu_percent", Sort.MEMORY: "rss_bytes", Sort.AGE: "age_s", Sort.NAME: None}
