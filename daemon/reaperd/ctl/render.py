"""What the daemon said, as text for a terminal.

Pure: data in, text out; how wide the terminal is, whether it shows colours and what time it is come as arguments.
Every text that a process or a user may have chosen passes through ``text.plain()`` before it becomes part of a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NamedTuple

from reaperd.ctl.text import LONGEST_TEXT, Look, columns, command_line, cut, field, plain
from reaperd.ctl.units import count_of, list_of, number_of, plain_number, plural, text_of
from reaperd.times import moment
from reaperd.words import duration, size

NO_SESSIONS = "no sessions: a script becomes one with `import agent; agent.register()`"

_NAME_COLUMNS = 40
_FRAMEWORK_COLUMNS = 20
_WORD_COLUMNS = 12  # of a role, a state, a user's name
_ID_COLUMNS = 12  # of a session id at least: pid and some of the start time
_BRANCH_COLUMNS = 3  # of the tree
_LEAST_TEXT = 4  # columns that free text needs to be worth showing
_BAR_COLUMNS = 20
_MAX_REASONS = 10  # that are given for processes left alone, on a line of any length


# -- ps -------------------------------------------------------------------------------------------


class _Limb(NamedTuple):
    """One line below a session: two cells that align over the whole tree, then more cells, then free text."""

    role: str  # "": nothing but the text
    pid: str
    cells: tuple[str, ...] = ()  # framework, CPU, memory
    text: str = ""
    colour: str = ""


class _Widths(NamedTuple):
    role: int
    pid: int
    cells: tuple[int, ...]


def sessions(
    found: list[Any], look: Look, *, now: datetime, user_of: Callable[[int], str] = str
) -> list[str]:
    """Return the sessions as a tree, one line a process; ``user_of`` gives the name of a uid."""
    if not found:
        return [NO_SESSIONS]
    families = [(session, _limbs(session, look)) for session in found]
    widths = _widths([limb for _, limbs in families for limb in limbs])
    branch, last = look.choose("├─ ", "|- "), look.choose("└─ ", "`- ")
    lines = []
    for session, limbs in families:
        lines.append(_session_line(session, look, now, user_of))
        for place, limb in enumerate(limbs, 1):
            tee = look.paint(last if place == len(limbs) else branch, "dim")
            lines.append(tee + _limb_line(limb, widths, look))
    return lines


def _session_line(session: Any, look: Look, now: datetime, user_of: Callable[[int], str]) -> str:
    """Return name, id, user, state and age; where that is too much, the id is cut: its beginning still names it."""
    uid, began = number_of(session, "uid"), moment(text_of(session, "started_at"))
    state = cut(field(session, "state"), _WORD_COLUMNS, look)
    facts = [
        ("" if uid is None else cut(plain(user_of(int(uid))), _WORD_COLUMNS, look), ""),
        (state, {"running": "green", "ending": "yellow"}.get(state, "dim")),
        (duration(max(0.0, (now - began).total_seconds())) if began else "", ""),
        (attempt_in_words(session), ""),
    ]
    name, session_id = cut(field(session, "name"), _NAME_COLUMNS, look), field(session, "id")
    if look.width is not None:
        room = look.width - sum(columns(text) + 2 for text, _ in facts if text)
        name = cut(name, room - 2 - _ID_COLUMNS, look)
        session_id = cut(session_id, room - (columns(name) + 2 if name else 0), look)
    if not name:
        return _joined([(session_id, "bold"), *facts], look)
    return _joined([(name, "bold"), (session_id, "dim"), *facts], look)


def attempt_in_words(of: Any) -> str:
    """Return "attempt 2 of 4" for a session that is started again where it fails, "" for any other."""
    told = of.get("attempt") if isinstance(of, dict) else None
    number, most = number_of(told, "number"), number_of(told, "most")
    return "" if number is None or most is None or most <= 1 else f"attempt {int(number)} of {int(most)}"


def _joined(pieces: Iterable[tuple[str, str]], look: Look) -> str:
    return "  ".join(look.paint(text, colour) for text, colour in pieces if text)


def _limbs(session: Any, look: Look) -> list[_Limb]:
    leader = session.get("leader") if isinstance(session, dict) else None
    limbs = [_Limb("leader", _whole(leader, "pid"), text=_command_of(session), colour="cyan")]
    progress = session.get("progress") if isinstance(session, dict) else None
    if isinstance(progress, dict):
        limbs.append(_Limb("progress", "", text=progress_line(progress, look)))
    limbs += [_worker_limb(worker, look) for worker in list_of(session, "workers")]
    if left_alone := list_of(session, "left_alone"):
        limbs.append(_Limb("", "", text=left_alone_line(left_alone)))
    return limbs


def _worker_limb(worker: Any, look: Look) -> _Limb:
    cpu = number_of(worker, "cpu_percent")
    return _Limb(
        cut(field(worker, "role") or "worker", _WORD_COLUMNS, look),
        _whole(worker, "pid"),
        (
            cut(field(worker, "framework"), _FRAMEWORK_COLUMNS, look) or "-",
            "-" if cpu is None else f"{cpu:.1f} %",
            size(number_of(worker, "rss_bytes")),
        ),
        _evidence(worker),
        "dim" if text_of(worker, "role") == "tracker" else "",
    )


def _widths(limbs: list[_Limb]) -> _Widths:
    cells = [limb.cells for limb in limbs if limb.cells]
    return _Widths(
        max(columns(limb.role) for limb in limbs),
        max(columns(limb.pid) for limb in limbs),
        tuple(max(columns(cell) for cell in column) for column in zip(*cells, strict=True)),
    )


def _limb_line(limb: _Limb, widths: _Widths, look: Look) -> str:
    if not limb.role:
        return limb.text if look.width is None else cut(limb.text, look.width - _BRANCH_COLUMNS, look)
    words = [look.paint(_padded(limb.role, widths.role), limb.colour)]
    used = _BRANCH_COLUMNS + widths.role
    if limb.pid:
        words.append(" " * (widths.pid - columns(limb.pid)) + limb.pid)
        used += 2 + widths.pid
    if limb.cells:
        name, *numbers = zip(limb.cells, widths.cells, strict=True)
        words.append(_padded(*name))
        words += [" " * (width - columns(cell)) + cell for cell, width in numbers]
        used += sum(width + 2 for width in widths.cells)
    if limb.text and (look.width is None or look.width - used - 2 >= _LEAST_TEXT):
        text = limb.text if look.width is None else cut(limb.text, look.width - used - 2, look)
        words.append(look.paint(text, "dim") if limb.cells else text)
    return "  ".join(words)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - columns(text))


def _whole(source: Any, key: str) -> str:
    number = number_of(source, key)
    return "?" if number is None else str(int(number))


def _command_of(session: Any) -> str:
    facts = session if isinstance(session, dict) else {}
    leader = facts.get("leader")
    argv = leader.get("cmdline") if isinstance(leader, dict) else None
    if facts.get("phase") not in ("watched", None):
        return "(has ended)"
    return command_line(argv) or "(command line not shown)"


def _evidence(process: Any) -> str:
    words = [word for word in list_of(process, "evidence") if isinstance(word, str)]
    return ", ".join(plain(word[:LONGEST_TEXT]) for word in words)


def left_alone_line(left_alone: list[Any]) -> str:
    """Return how many look like members and are left alone, and of the first ones who and why."""
    reasons = [
        f"pid {_whole(process, 'pid')} {field(process, 'reason')}".rstrip()
        for process in left_alone[:_MAX_REASONS]
    ]
    more = len(left_alone) - len(reasons)
    return f"{len(left_alone)} left alone: " + "; ".join([*reasons, f"{more} more"] if more else reasons)


def progress_line(progress: Any, look: Look) -> str:
    """Return a bar and per cent where the total is known, the count, and the script's own message."""
    done, total = number_of(progress, "done"), number_of(progress, "total")
    if done is None:
        return field(progress, "message")
    if total is None or total <= 0:
        return _joined([(f"{plain_number(done)} done", ""), (field(progress, "message"), "")], look)
    share = min(max(done / total, 0.0), 1.0)
    bar = f"[{''.join(bar_of(share, _BAR_COLUMNS, look))}] {int(share * 100)} %"
    count = f"{plain_number(done)} of {plain_number(total)}"
    return _joined([(bar, ""), (count, ""), (field(progress, "message"), "")], look)


def bar_of(share: float, width: int, look: Look) -> tuple[str, str]:
    """Return the filled and the empty part of a bar; ``share`` is from 0 to 1."""
    filled = int(share * width)
    return look.choose("█", "#") * filled, look.choose("░", "-") * (width - filled)


# -- events ---------------------------------------------------------------------------------------

_KIND_COLOURS = {
    "reaped": "yellow",
    "killed": "yellow",
    "quarantined": "yellow",
    "breach": "yellow",
    "orphan": "yellow",
    "stuck": "red",
    "registered": "green",
    "started": "green",
}
_KIND_COLUMNS = 11  # "quarantined"
_OF_ONE_ORPHAN = ("orphan", "quarantined", "released")  # the kinds of event that name it already
_MAX_PIDS = 8  # of orphans that were ended together


def which_events(
    *, of_session: bool = False, of_kind: bool = False, of_owner: bool = False, since: bool = False
) -> str:
    """Return of which events there are none, as the end of a sentence."""
    said = {
        " of that session": of_session,
        " of that kind": of_kind,
        " of that user that you may see": of_owner,
        " in that time": since,
    }
    return "".join(words for words, applies in said.items() if applies)


def cause_in_words(cause: Any) -> str:
    """Return how a process came to its end; "" where an event has no cause."""
    if not isinstance(cause, dict):
        return ""
    kind, code = text_of(cause, "kind"), number_of(cause, "code")
    if kind == "exit":
        return f"exited with code {int(code)}" if code else "ended by itself"
    if kind == "signal":
        dumped = " (core dumped)" if cause.get("core_dumped") is True else ""
        return f"killed by {signal_name(code)}{dumped}"
    return "out of memory" if kind == "oom" else "cause unknown"


def _stopped_by(fields: Any) -> list[str]:
    """Return who asked for the end, where somebody did."""
    uid = number_of(fields, "stopped_by_uid")
    return [] if uid is None else [f"stopped by uid {int(uid)}"]


def signal_name(number: float | str | None) -> str:
    """Return SIGKILL for 9, and for what has no name the number."""
    if isinstance(number, str):
        return plain(number[:_NAME_COLUMNS])
    if number is None:
        return "a signal"
    import signal  # its enums cost a millisecond that most commands need not spend

    try:
        return signal.Signals(int(number)).name
    except ValueError:
        return f"signal {int(number)}"


def event(one: Any, look: Look) -> str:
    """Return one event as one line: time, kind, session, then what happened."""
    return _joined(event_pieces(one, look), look).rstrip()


def event_pieces(one: Any, look: Look) -> list[tuple[str, str]]:
    """Return the same in pieces, each with its colour."""
    kind = field(one, "kind") or "?"
    who = cut(field(one, "name") or field(one, "session"), _NAME_COLUMNS, look)
    when = moment(text_of(one, "at"))
    return [
        (when.strftime("%Y-%m-%dT%H:%M:%SZ") if when else field(one, "at") or "-", "dim"),
        (_padded(kind, _KIND_COLUMNS), _KIND_COLOURS.get(kind, "")),
        (who, "bold"),
        (what_happened(one), ""),
    ]


def what_happened(one: Any) -> str:
    """Return cause, processes, signals, time and memory of an event, as far as it has any."""
    fields = one if isinstance(one, dict) else {}
    facts = [
        attempt_in_words(fields),
        cause_in_words(fields.get("cause")),
        *_stopped_by(fields),
        *_of_kind(fields),
        _processes(one),
        freed(one),
    ]
    left_alone, stuck = list_of(one, "left_alone"), remaining(one)
    if left_alone:
        facts.append(f"{len(left_alone)} left alone")
    if stuck:
        facts.append(f"{len(stuck)} still there")
    return ", ".join(fact for fact in (*facts, field(one, "message")) if fact)


def _of_kind(fields: dict[str, Any]) -> list[str]:
    """Return what only one kind of event has to say."""
    kind = text_of(fields, "kind")
    if "rule" in fields or "outcome" in fields:
        return _of_orphans(fields)
    if kind == "registered":
        adopted = "adopted" if fields.get("adopted") is True else ""
        return [f"leader {_whole(fields.get('leader'), 'pid')}", adopted]
    if kind == "reload":
        faults = "; ".join(plain(fault) for fault in list_of(fields, "faults") if isinstance(fault, str))
        return [f"kept the old settings: {faults}" if faults else "settings reloaded"]
    return [f"reaperd {field(fields, 'version')}"] if kind == "started" else []


def _of_orphans(fields: dict[str, Any]) -> list[str]:
    """Return who an event about orphans that nobody registered is about, and what only such an event has to say."""
    uid, asked, after_s = (number_of(fields, key) for key in ("uid", "asked_by_uid", "after_s"))
    facts = [_pids_of(fields), "" if uid is None else f"uid {int(uid)}"]
    would, outcome, kind = (text_of(fields, key) for key in ("would", "outcome", "kind"))
    if outcome == "claimed":
        facts.append("belongs to a session after all")
    elif outcome:
        facts.append("ended by itself" + ("" if after_s is None else f" {duration(after_s)} later"))
    elif kind == "orphan":
        done = {"kill": "would have been ended", "quarantine": "would have been stopped"}
        facts.append(done.get(would, "told of, and left alone"))
    else:
        facts.append({"quarantined": "stopped", "released": "goes on"}.get(kind, ""))
    rule = field(fields, "rule")
    facts.append(f"rule {rule}" if rule else "")
    return [*facts, "" if asked is None else f"asked for by uid {int(asked)}"]


def _pids_of(fields: dict[str, Any]) -> str:
    """Return "pids 12, 13 (loky)", the first few."""
    processes = list_of(fields, "processes")
    pids = [_whole(one, "pid") for one in processes]
    if not pids:
        return ""
    more = [f"{len(pids) - _MAX_PIDS} more"] if len(pids) > _MAX_PIDS else []
    framework = field(processes[0], "framework")
    named = f"pid{'' if len(pids) == 1 else 's'} {', '.join([*pids[:_MAX_PIDS], *more])}"
    return named + (f" ({framework})" if framework else "")


def _processes(one: Any) -> str:
    processes, latency = list_of(one, "processes"), number_of(one, "latency_s")
    if not processes or text_of(one, "kind") in _OF_ONE_ORPHAN:
        return ""
    count = plural(len(processes), "process")
    if isinstance(one, dict) and one.get("dry_run") is True:
        return f"dry run: would have ended {count}"
    signals = _signals(processes)
    return (
        count + (f" ({signals})" if signals else "") + (f", gone in {duration(latency)}" if latency else "")
    )


def _signals(processes: list[Any]) -> str:
    """Return how many got which signal as their last."""
    counts: dict[str, int] = {}
    for process in processes:
        sent = process.get("signal") if isinstance(process, dict) else None
        if isinstance(sent, (int, str)) and not isinstance(sent, bool) and sent:
            counts[signal_name(sent)] = counts.get(signal_name(sent), 0) + 1
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def freed(one: Any) -> str:
    """Return "freed 1.2 GiB of memory, ..." of an event; "" when it freed nothing."""
    source = one.get("freed") if isinstance(one, dict) else None
    kinds = (("rss_bytes", "memory"), ("shm_bytes", "shared memory"), ("gpu_bytes", "GPU memory"))
    parts = [
        f"{size(found)} of {name}" for key, name in kinds if (found := number_of(source, key)) and found > 0
    ]
    return "freed " + " and ".join(parts) if parts else ""


# -- status ---------------------------------------------------------------------------------------


def status(found: Any, socket: str, look: Look) -> list[str]:
    """Return the daemon's state as a short block, what needs attention last."""
    head = f"reaperd {field(found, 'version') or '?'}, pid {_whole(found, 'pid')}"
    mode, up = field(found, "mode"), number_of(found, "uptime_s")
    heading = ", ".join(part for part in (head, f"{mode} mode" if mode else "", f"up {duration(up)}") if part)
    workers = plural(count_of(found, "workers"), "worker")
    rows = [
        ("socket", plain(socket)),
        ("config", _config_of(found)),
        ("sessions", f"{count_of(found, 'sessions')} with {workers}"),
        ("orphans", str(count_of(found, "orphans"))),
        (
            "reaped",
            f"{plural(count_of(found, 'reaped_total'), 'process')} so far, {size(number_of(found, 'freed_bytes_total'))} freed",
        ),
    ]
    lines = [look.paint(heading, "bold"), *(f"  {name:<9} {text}" for name, text in rows)]
    if isinstance(found, dict) and found.get("dry_run") is True:
        lines.append(look.paint("  dry run: nothing is signalled, only reported", "yellow"))
    lines += [look.paint(f"  {trouble}", "red") for trouble in troubles(found)]
    return lines


def troubles(found: Any) -> list[str]:
    """Return what ``status --check`` fails on, a sentence each."""
    said = {
        "stuck": "survived SIGKILL and holds on inside the kernel (state D): see `reaperctl events`",
        "quarantined": "stopped and waiting for a decision",
    }
    return [
        f"{plural(count, 'process')} {text}" for key, text in said.items() if (count := count_of(found, key))
    ]


def _config_of(found: Any) -> str:
    files = [plain(name) for name in list_of(found, "config") if isinstance(name, str)]
    return ", ".join(files) or field(found, "config") or "built-in defaults"


def stopped(one: Any, session: str) -> str:
    """Return what became of a session that was to stop."""
    name = field(one, "name")
    who = f"{name} ({plain(session)})" if name else plain(session)
    return f"stopped {who}: {what_happened(one) or 'it had no workers'}"


def not_stopped(session: str, wait_s: float) -> str:
    """Return what is said where a session takes its time."""
    return f"session {plain(session)} was told to stop, but was not gone after {wait_s:g} s"


def remaining(one: Any) -> list[int]:
    """Return the processes of an event that could not be ended: they are in state D, or belong to somebody else."""
    left = [
        process for process in list_of(one, "processes") if text_of(process, "result") in ("stuck", "denied")
    ]
    return [int(pid) for process in left if (pid := number_of(process, "pid")) is not None]
