"""What the page shows, as rows, sentences and series. Pure: what was said goes in, what is drawn comes out.

Every text that a process or a user may have chosen passes through ``text.plain()`` here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from agent.panel import as_markdown, progress_in_words, share_of
from reaperd.ctl import render, render_monitor, render_orphans
from reaperd.ctl.text import command_line, field
from reaperd.ctl.units import count_of, list_of, number_of, plural, text_of
from reaperd.times import moment
from reaperd.words import duration, plain, size

MiB = 1 << 20
_LONGEST = 300  # characters of a command line
REAPED_HOURS = 24


def mine(records: Iterable[Any], owner: int | None) -> list[Any]:
    """Return the records that are ``owner``'s; all of them for None."""
    return [one for one in records if owner is None or number_of(one, "uid") == owner]


# -- the course of things -------------------------------------------------------------------------


class Point(NamedTuple):
    """What there was at one moment; None where no daemon answered."""

    at: datetime
    processes: dict[str, int] | None = None  # by category, as in ``reaperctl monitor``
    cpu_percent: float | None = None
    rss_bytes: float | None = None


def point(at: datetime, status: Any, sessions: Sequence[Any], orphans: Sequence[Any]) -> Point:
    """Return one moment as a point of the charts."""
    if status is None:
        return Point(at)
    found = render_monitor.figures(list(sessions), list(orphans), status, at)
    counts = {name: found.sum_of(name).processes for name in render_monitor.CATEGORIES}
    total = found.sum_of()
    return Point(at, counts, total.cpu_percent, total.rss_bytes)


def series(points: Sequence[Point]) -> dict[str, dict[str, list[Any]]]:
    """Return the columns of each chart, by the chart's name; a moment without a daemon is a gap."""
    at = [one.at for one in points]
    processes = {
        name: [None if one.processes is None else one.processes[name] for one in points]
        for name in ("leaders", "workers", "trackers", "orphans")
    }
    return {
        "processes": {"at": at, **processes},
        "cpu": {"at": at, "CPU %": [one.cpu_percent for one in points]},
        "memory": {"at": at, "MiB": [_mebibytes(one.rss_bytes) for one in points]},
    }


def _mebibytes(count: float | None) -> float | None:
    return None if count is None else round(count / MiB, 1)


def reaped_by_hour(events: Iterable[Any], now: datetime) -> dict[str, list[Any]]:
    """Return how many processes were ended in each of the last hours, the current one last."""
    hour = now.replace(minute=0, second=0, microsecond=0)
    hours = [hour - timedelta(hours=back) for back in range(REAPED_HOURS - 1, -1, -1)]
    counts = dict.fromkeys(hours, 0)
    for one in events:
        at = moment(text_of(one, "at"))
        if at is not None and (began := at.replace(minute=0, second=0, microsecond=0)) in counts:
            counts[began] += sum(text_of(each, "result") == "killed" for each in list_of(one, "processes"))
    return {"at": hours, "processes": list(counts.values())}


class Tile(NamedTuple):
    """One figure of the overview."""

    label: str
    value: str
    note: str = ""


def tiles(status: Any, sessions: Sequence[Any], orphans: Sequence[Any]) -> list[Tile]:
    """Return the figures that are looked at first."""
    found = render_monitor.figures(list(sessions), list(orphans), status, datetime.min)
    total = found.sum_of()
    freed = size(number_of(status, "freed_bytes_total"))
    return [
        Tile("Sessions", str(len(sessions))),
        Tile("Workers", str(found.sum_of("workers").processes)),
        Tile("Orphans", str(found.sum_of("orphans").processes), "workers whose parent is gone"),
        Tile("CPU", "-" if total.cpu_percent is None else f"{total.cpu_percent:.0f} %", "100 % is one core"),
        Tile("Memory", size(total.rss_bytes), "pages that processes share count for each"),
        Tile(
            "Reaped",
            str(count_of(status, "reaped_total")),
            f"processes that the daemon has ended so far, of all users; {freed} given back",
        ),
    ]


def troubles(status: Any) -> list[str]:
    """Return what needs attention, a sentence each."""
    said = [f"{one[:1].upper()}{one[1:]}." for one in map(plain, render.troubles(status))]
    if isinstance(status, dict) and status.get("dry_run") is True:
        said.append("Dry run: nothing is signalled, only reported.")
    limits = [one for one in list_of(status, "limits") if text_of(one, "fact")]
    return said + [f"{field(one, 'fact')}: {field(one, 'advice')}" for one in limits]


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return rows of the same keys as a table in Markdown; each cell shows exactly its text."""
    if not rows:
        return ""
    lines = [[as_markdown(name) for name in rows[0]], ["---"] * len(rows[0])]
    lines += [[as_markdown(text) for text in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# -- sessions -------------------------------------------------------------------------------------


class SessionCard(NamedTuple):
    """One session."""

    id: str
    name: str
    state: str
    facts: str  # user, age, attempt, pid
    command: str
    share: float | None  # of the work that is done
    progress: str
    workers: list[dict[str, str]]
    left_alone: str
    can_stop: bool


def session_cards(
    sessions: Iterable[Any], now: datetime, user_of: Callable[[int], str] = str
) -> list[SessionCard]:
    """Return the sessions, the newest first."""
    ordered = sorted(sessions, key=lambda one: text_of(one, "started_at"), reverse=True)
    return [_session_card(one, now, user_of) for one in ordered if field(one, "id")]


def _session_card(one: Any, now: datetime, user_of: Callable[[int], str]) -> SessionCard:
    uid, began = number_of(one, "uid"), moment(text_of(one, "started_at"))
    leader = one.get("leader")
    pid = number_of(leader, "pid")
    lives = text_of(one, "phase") in ("watched", "")
    argv = leader.get("cmdline") if isinstance(leader, dict) else None
    progress = one.get("progress") if isinstance(one.get("progress"), dict) else None
    held = render_monitor.figures([one], [], None, now).sum_of()
    facts = [
        "" if uid is None else plain(user_of(int(uid))),
        "" if began is None else f"for {duration(max(0.0, (now - began).total_seconds()))}",
        "" if pid is None else f"pid {int(pid)}",
        render.attempt_in_words(one),
        "isolated" if one.get("isolated") is True else "",
        "" if held.cpu_percent is None else f"{held.cpu_percent:.0f} % CPU",
        "" if held.rss_bytes is None else size(held.rss_bytes),
    ]
    left_alone = list_of(one, "left_alone")
    return SessionCard(
        text_of(one, "id"),
        field(one, "name") or field(one, "id"),
        field(one, "state"),
        ", ".join(fact for fact in facts if fact),
        command_line(argv)[:_LONGEST] if lives else "its script has ended",
        share_of(progress),
        plain(progress_in_words(progress)),
        [_worker_row(worker) for worker in list_of(one, "workers")],
        render.left_alone_line(left_alone) if left_alone else "",
        lives,
    )


def _worker_row(worker: Any) -> dict[str, str]:
    return {
        "PID": _pid(worker),
        "What": " ".join(word for word in (field(worker, "framework"), field(worker, "role")) if word),
        "CPU": render_orphans.cpu(number_of(worker, "cpu_percent")),
        "Memory": size(number_of(worker, "rss_bytes")),
    }


def _pid(record: Any) -> str:
    pid = number_of(record, "pid")
    return "?" if pid is None else str(int(pid))


# -- orphans --------------------------------------------------------------------------------------


class OrphanCard(NamedTuple):
    """One process that may be an orphan."""

    pid: int
    start_ticks: int
    title: str
    facts: str
    verdict: str
    command: str
    evidence: list[str]
    can_end: bool
    stopped: bool  # it is quarantined, and can be let go
    record: Any


_VERDICTS = {
    "kill": "will be ended",
    "quarantine": "will be stopped",
    "report": "only told of",
    "wait": "waits: too young, or too small",
    "spare": "left alone",
}


def orphan_cards(
    orphans: Iterable[Any], endable: frozenset[tuple[int, int]], user_of: Callable[[int], str] = str
) -> list[OrphanCard]:
    """Return who may be an orphan; first those that a clean-up would end, which are ``endable``, then by memory."""
    found = [card for one in orphans if (card := _orphan_card(one, endable, user_of)) is not None]
    return sorted(
        found,
        key=lambda card: (not card.can_end, -(number_of(card.record, "rss_bytes") or 0), card.pid),
    )


def _orphan_card(
    one: Any, endable: frozenset[tuple[int, int]], user_of: Callable[[int], str]
) -> OrphanCard | None:
    pid, ticks, uid = (number_of(one, key) for key in ("pid", "start_ticks", "uid"))
    if pid is None or ticks is None:
        return None
    age, cpu, rss = (number_of(one, key) for key in ("orphaned_s", "cpu_percent", "rss_bytes"))
    gpu = number_of(one, "gpu_bytes")
    stopped_s = number_of(one, "quarantined_s")
    facts = [
        "" if uid is None else plain(user_of(int(uid))),
        "" if age is None else f"orphaned for {duration(age)}",
        "" if cpu is None else f"{cpu:.1f} % CPU",
        "" if rss is None else size(rss),
        f"{size(gpu)} of GPU memory" if gpu else "",
        "" if stopped_s is None else f"stopped for {duration(stopped_s)}",
    ]
    role = " tracker" if text_of(one, "role") == "tracker" else ""
    return OrphanCard(
        int(pid),
        int(ticks),
        f"{field(one, 'framework') or 'process'}{role}, pid {int(pid)}",
        ", ".join(fact for fact in facts if fact),
        _VERDICTS.get(text_of(one, "verdict"), field(one, "verdict")),
        command_line(one.get("cmdline"))[:_LONGEST],
        render_orphans.evidence(one),
        (int(pid), int(ticks)) in endable,
        stopped_s is not None,
        one,
    )


def leftover_rows(leftovers: Iterable[Any]) -> list[dict[str, str]]:
    """Return what dead workers left in memory and in temporary folders."""
    return [
        {"Path": field(one, "path"), "What": field(one, "kind"), "Size": size(number_of(one, "bytes"))}
        for one in leftovers
    ]


def outcome(processes: Sequence[Any], leftovers: Sequence[Any]) -> tuple[bool, str]:
    """Return whether nothing is left of what was to be cleaned up, and what became of it in a sentence."""
    counts: dict[str, int] = {}
    for one in processes:
        result = text_of(one, "result") or "unknown"
        counts[result] = counts.get(result, 0) + 1
    words = {
        **render_orphans.RESULTS,
        "kept": "left alone: judged otherwise by now",
        "unknown": "had not ended in time",
    }
    parts = [
        f"{plural(count, 'process')} {words.get(result, plain(result))}" for result, count in counts.items()
    ]
    removed = sum(text_of(one, "result") == "removed" for one in leftovers)
    if removed:
        parts.append(f"{plural(removed, 'leftover')} removed")
    if kept := len(leftovers) - removed:
        parts.append(f"{plural(kept, 'leftover')} kept")
    held = sum(number_of(one, "rss_bytes") or 0 for one in processes if text_of(one, "result") == "killed")
    held += sum(number_of(one, "bytes") or 0 for one in leftovers if text_of(one, "result") == "removed")
    good = not kept and not set(counts) & {"stuck", "denied", "unknown"}
    text = "; ".join(parts) or "there was nothing to clean up"
    return good, f"{text[:1].upper()}{text[1:]}" + (f"; {size(held)} given back." if held else ".")


# -- history, health ------------------------------------------------------------------------------


def event_rows(
    events: Sequence[Any], *, only: str = "", about: str = "", most: int = 200
) -> list[dict[str, str]]:
    """Return what happened, the newest first: of one kind, of sessions whose name or id has ``about`` in it."""
    rows = []
    for one in reversed(events):
        who = field(one, "name") or field(one, "session")
        if (
            only and text_of(one, "kind") != only
        ) or about.lower() not in f"{who} {text_of(one, 'session')}".lower():
            continue
        when = moment(text_of(one, "at"))
        rows.append(
            {
                "When (UTC)": when.strftime("%Y-%m-%d %H:%M:%S") if when else field(one, "at"),
                "What": field(one, "kind"),
                "Session": who,
                "How": render.what_happened(one),
            }
        )
        if len(rows) == most:
            break
    return rows


def kinds_of(events: Iterable[Any]) -> list[str]:
    """Return the kinds of event there are."""
    return sorted({kind for one in events if (kind := field(one, "kind"))})


class Check(NamedTuple):
    """One finding of ``reaperctl doctor``."""

    level: str  # ok, limit or problem
    subject: str
    fact: str
    advice: str


def checks(told: Any) -> list[Check]:
    """Return the findings, problems first."""
    order = {"problem": 0, "limit": 1}
    found = [
        Check(text_of(one, "level"), field(one, "check"), field(one, "fact"), field(one, "advice"))
        for one in list_of(told, "checks")
    ]
    return sorted(found, key=lambda one: order.get(one.level, 2))
