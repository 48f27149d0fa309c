"""Orphans, leftovers, and why a process is judged as it is, as text for a terminal.

Pure, and safe for a terminal, as ``render`` is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from reaperd.ctl import render
from reaperd.ctl.text import LONGEST_TEXT, Look, columns, command_line, cut, field, plain, wrapped
from reaperd.ctl.units import count_of, list_of, number_of, plural, text_of
from reaperd.times import moment
from reaperd.words import duration, size

NO_ORPHANS = "no orphans: every worker that was found has its parent, or belongs to a session"
NO_LEFTOVERS = "no leftovers: shared memory and temporary folders of the known frameworks are in use, or gone"

_VERDICT_COLOURS = {"kill": "red", "quarantine": "yellow", "report": "cyan", "spare": "dim"}
_GONE = ("killed", "exited")
_NAME_COLUMNS = 12  # of a user
_FRAMEWORK_COLUMNS = 26
_LEAST_COLUMNS = 8  # of a framework's name
_MARGIN = "    "
_MAX_FACTS = 50


def is_orphan(record: Any) -> bool:
    """Say whether a record is of an orphan, and not of what merely resembles one, or is seen to by others."""
    return text_of(record, "verdict") != "spare"


# -- the table ------------------------------------------------------------------------------------


class _Column(NamedTuple):
    title: str
    cells: list[str]
    right: bool = False  # aligned
    worth: int = 9  # the least goes first where there is too little room


def orphans(
    found: Sequence[Any], look: Look, *, everything: bool = False, user_of: Callable[[int], str] = str
) -> list[str]:
    """Return the orphans as a table with the evidence below each; what is no orphan is counted unless asked for."""
    shown = [record for record in found if everything or is_orphan(record)]
    more = len(found) - len(shown)
    lines = table(shown, look, user_of=user_of) if shown else wrapped(NO_ORPHANS, look)
    if more:
        are = "is" if more == 1 else "are"
        others = (
            f"{more} more {are}" if shown else f"{plural(more, 'process')} that might have been one {are}"
        )
        lines += ["", *wrapped(f"{others} spared: --all shows {'it' if more == 1 else 'them'}", look)]
    return lines


def table(found: Sequence[Any], look: Look, *, user_of: Callable[[int], str] = str) -> list[str]:
    """Return one line a process, and below each its command line and the evidence."""
    shown = _that_fit(_columns_of(found, look, user_of), look)
    head = look.paint(_row([column.title for column in shown], shown), "bold")
    lines = [head]
    for place, record in enumerate(found):
        lines.append(
            _row(
                [column.cells[place] for column in shown],
                shown,
                colour=("VERDICT", _VERDICT_COLOURS.get(text_of(record, "verdict"), "")),
                look=look,
            )
        )
        lines += _below(record, look)
    return lines


def _columns_of(found: Sequence[Any], look: Look, user_of: Callable[[int], str]) -> list[_Column]:
    gpu = [number_of(record, "gpu_bytes") for record in found]
    columns_ = [
        _Column("PID", [_pid(record) for record in found], right=True),
        _Column("USER", [_user(record, look, user_of) for record in found], worth=1),
        _Column("VERDICT", [_outcome(record, look) for record in found]),
        _Column("FRAMEWORK", [_framework(record, look) for record in found], worth=3),
        _Column("ORPHANED", [_age(record) for record in found], right=True, worth=5),
        _Column("CPU", [cpu(number_of(record, "cpu_percent")) for record in found], right=True, worth=4),
        _Column("MEMORY", [size(number_of(record, "rss_bytes")) for record in found], right=True),
    ]
    if any(gpu):
        columns_.append(_Column("GPU", [size(held) if held else "-" for held in gpu], right=True, worth=2))
    return columns_


def _that_fit(found: list[_Column], look: Look) -> list[_Column]:
    """Return the columns that have room side by side; the name of the framework is cut before any is left out."""
    if look.width is None:
        return found
    over = sum(_width(column) + 2 for column in found) - 2 - look.width
    if over > 0:
        place = next(at for at, column in enumerate(found) if column.title == "FRAMEWORK")
        room = max(_width(found[place]) - over, _LEAST_COLUMNS)
        cells = [cut(cell, room, look) for cell in found[place].cells]
        found[place] = found[place]._replace(title=cut("FRAMEWORK", room, look), cells=cells)
    while len(found) > 1 and sum(_width(column) + 2 for column in found) - 2 > look.width:
        found.remove(min(found, key=lambda column: column.worth))
    return found


def _width(column: _Column) -> int:
    return max(columns(cell) for cell in (column.title, *column.cells))


def _row(
    cells: Iterable[str],
    among: list[_Column],
    *,
    colour: tuple[str, str] = ("", ""),
    look: Look | None = None,
) -> str:
    words = []
    for cell, column in zip(cells, among, strict=True):
        blanks = " " * (_width(column) - columns(cell))
        shown = look.paint(cell, colour[1]) if look and column.title == colour[0] else cell
        words.append(blanks + shown if column.right else shown + blanks)
    return "  ".join(words).rstrip()


def _below(record: Any, look: Look) -> list[str]:
    lines = []
    command = command_line(record.get("cmdline") if isinstance(record, dict) else None)
    if command:
        if look.width is not None:
            command = cut(command, look.width - len(_MARGIN), look)
        lines.append(_MARGIN + look.paint(command, "dim"))
    facts = "; ".join(evidence(record))
    if facts:
        lines += wrapped(facts, look, _MARGIN, _MARGIN)
    if number_of(record, "quarantined_s") is not None:
        lines += wrapped(f"to let it go on: reaperctl release {_pid(record)}", look, _MARGIN, _MARGIN)
    return lines


def evidence(record: Any) -> list[str]:
    """Return the facts that led to a verdict."""
    facts = [fact for fact in list_of(record, "evidence") if isinstance(fact, str) and fact]
    return [plain(fact[:LONGEST_TEXT]) for fact in facts[:_MAX_FACTS]]


def _pid(record: Any) -> str:
    pid = number_of(record, "pid")
    return "?" if pid is None else str(int(pid))


def _user(record: Any, look: Look, user_of: Callable[[int], str]) -> str:
    uid = number_of(record, "uid")
    return "-" if uid is None else cut(plain(user_of(int(uid))), _NAME_COLUMNS, look)


def _outcome(record: Any, look: Look) -> str:
    return cut(field(record, "result") or field(record, "verdict") or "-", _NAME_COLUMNS, look)


def _framework(record: Any, look: Look) -> str:
    name = field(record, "framework") or "-"
    return cut(f"{name} tracker" if text_of(record, "role") == "tracker" else name, _FRAMEWORK_COLUMNS, look)


def _age(record: Any) -> str:
    age_s = number_of(record, "orphaned_s")
    if age_s is None:
        return "-"
    if age_s < 1:
        return "now"
    return duration(round(age_s / 60) * 60 if age_s >= 60 else round(age_s))


def cpu(percent: float | None) -> str:
    """Return "99.8 %"; "-" for what is not known."""
    return "-" if percent is None else f"{percent:.1f} %"


# -- leftovers ------------------------------------------------------------------------------------


def leftovers(found: Sequence[Any], look: Look, *, user_of: Callable[[int], str] = str) -> list[str]:
    """Return the files that dead workers left in memory and in temporary folders, with the evidence below each."""
    if not found:
        return wrapped(NO_LEFTOVERS, look)
    lines = []
    for one in found:
        owner = number_of(one, "owner_pid")
        words = [
            size(number_of(one, "bytes")),
            cut(field(one, "kind"), _FRAMEWORK_COLUMNS, look),
            _user(one, look, user_of),
            "" if owner is None else f"of pid {int(owner)}",
            field(one, "result"),
        ]
        lines += wrapped(field(one, "path") or "?", look, "", _MARGIN)
        facts = [", ".join(word for word in words if word not in ("", "-")), *evidence(one)]
        lines += wrapped("; ".join(fact for fact in facts if fact), look, _MARGIN, _MARGIN)
    total_bytes = sum(number_of(one, "bytes") or 0 for one in found)
    return [*lines, "", f"{plural(len(found), 'leftover')}, {size(total_bytes)}"]


def withheld(sentences: Sequence[Any], look: Look) -> list[str]:
    """Return what may be leftovers, and why that cannot be told."""
    known = [plain(one) for one in sentences if isinstance(one, str)]
    return [line for one in known for line in wrapped(one, look)]


# -- the score ------------------------------------------------------------------------------------


def score(found: Any, look: Look) -> list[str]:
    """Return in words what became of the orphans that a rule would have had ended: whether it judges well."""
    began = moment(text_of(found, "since"))
    since = f" since {began.strftime('%Y-%m-%d %H:%M')} UTC" if began else ""
    condemned = count_of(found, "condemned")
    if not condemned:
        return wrapped(
            f"no orphan would have been ended{since}: there is nothing to judge the rules by yet", look
        )
    after = found.get("exited_after_s") if isinstance(found, dict) else None
    exited, claimed = count_of(found, "exited"), count_of(found, "claimed")
    there, killed = count_of(found, "still_there"), count_of(found, "killed")
    became = [
        f"{exited} ended by {_themselves(exited)} later{_how_late(after)}" if exited else "",
        f"{claimed} turned out to belong to a session" if claimed else "",
        f"{there} {'is' if there == 1 else 'are'} still there" if there else "",
        f"{killed} {'was' if killed == 1 else 'were'} ended by Reaper" if killed else "",
    ]
    sums = f"{plural(condemned, 'orphan')} would have been ended{since}"
    told = ", ".join(part for part in became if part)
    lines = wrapped(f"{sums}: {told}." if told else f"{sums}.", look)
    if not killed:
        advice = (
            'Arm it with [scan] action = "kill" when none that is still there is one you would keep, '
            "and none belonged to a session."
        )
        lines += wrapped(advice, look)
    return lines


def _themselves(count: int) -> str:
    return "itself" if count == 1 else "themselves"


def _how_late(after: Any) -> str:
    median_s, most_s = number_of(after, "median"), number_of(after, "max")
    if median_s is None or most_s is None:
        return ""
    return f" (median {duration(median_s)}, at most {duration(most_s)})"


# -- one process ----------------------------------------------------------------------------------


def explanation(found: Any, look: Look) -> list[str]:
    """Return why a process is judged as it is: first the verdict, then what a person can check by hand."""
    lines = [look.paint(line, "bold") for line in wrapped(_sentence(found), look)]
    command = command_line(found.get("cmdline") if isinstance(found, dict) else None)
    if command:
        lines += wrapped(command, look, "  ", "  ")
    facts = evidence(found)
    if facts:
        lines += _heading("why:", look)
        for fact in facts:
            lines += wrapped(fact, look, "  - ", "    ")
    alone = field(found, "ends_by_itself")
    if alone:
        lines += _heading("what such a process does once its parent is gone:", look)
        lines += wrapped(alone, look, "  - ", "    ")
    happened = list_of(found, "events")
    if happened:
        lines += _heading("what happened:", look)
        for one in happened:
            lines += _event_of(one, found, look)
    return lines


def _heading(text: str, look: Look) -> list[str]:
    return ["", *(look.paint(line, "bold") for line in wrapped(text, look))]


def _sentence(found: Any) -> str:
    alive = not (isinstance(found, dict) and found.get("alive") is False)
    who = f"pid {_pid(found)}{_kind_in_words(found)}"
    session, rule = field(found, "session"), field(found, "rule")
    by = f" (rule: {rule})" if rule else ""
    if not alive:
        return f"{who} is gone" + (f"; it belonged to session {session}" if session else "")
    if session:
        return f"{who} belongs to session {session}, and goes with that{by}"
    verdict = text_of(found, "verdict")
    said = {
        "kill": "is an orphan, and is to be ended",
        "quarantine": "is an orphan, and is stopped or to be stopped until somebody decides",
        "report": "is told of, and otherwise left alone",
        "wait": "is an orphan that no rule would have ended yet",
        "spare": "is left alone",
    }
    return f"{who} {said.get(verdict) or 'has no verdict: ' + (field(found, 'verdict') or 'it was not judged')}{by}"


def _kind_in_words(found: Any) -> str:
    framework = field(found, "framework")
    if not framework:
        return ""
    return f" ({framework} {cut(field(found, 'role') or 'worker', _NAME_COLUMNS, Look())})"


def _event_of(one: Any, found: Any, look: Look) -> list[str]:
    """Return an event as far as it is about the process that is explained."""
    pid = number_of(found, "pid")
    lines = wrapped(render.event(one, look._replace(colour=False)), look, "  - ", "    ")
    for process in list_of(one, "processes"):
        if pid is None or number_of(process, "pid") != pid:
            continue
        kept = text_of(process, "result") == "kept"  # and the evidence ends with why
        done = "left alone" if kept else _result_in_words(process)
        for fact in [*([done] if done else []), *evidence(process)]:
            lines += wrapped(fact, look, "    - ", "      ")
    return lines


# -- protect, release -----------------------------------------------------------------------------


def protected(reply: Any, *, undo: bool) -> str:
    """Return what the daemon has promised of one process."""
    name = field(reply, "name")
    who = f"pid {_pid(reply)}" + (f" ({name})" if name else "")
    if undo:
        return f"{who} is judged as any other again"
    return f"{who} is left alone from now on; what it starts is judged as ever"


def released(reply: Any) -> str:
    """Return what became of one process that was stopped."""
    return f"pid {_pid(reply)} goes on, and is left alone from now on"


# -- cleanup --------------------------------------------------------------------------------------


# Of any number of processes: what became of who was to be ended.
RESULTS = {
    "killed": "ended",
    "exited": "had ended by then",
    "stopped": "stopped",
    "stuck": "outlived SIGKILL, inside the kernel (state D)",
    "denied": "may not be signalled",
    "kept": "left alone",
}


def outcome(record: Any, look: Look) -> list[str]:
    """Return what became of one process that was to be ended."""
    framework = field(record, "framework")
    who = f"pid {_pid(record)}" + (f" ({framework})" if framework else "")
    return wrapped(f"{who}: {_result_in_words(record) or 'nothing was told of it'}", look, "", _MARGIN)


def _result_in_words(record: Any) -> str:
    result = text_of(record, "result")
    if result == "killed":
        sent = [render.signal_name(name) for name in list_of(record, "signals") if isinstance(name, str)]
        return RESULTS[result] + (f" by {', then '.join(sent)}" if sent else "")
    facts = evidence(record)
    why = f": {facts[-1]}" if result == "kept" and facts else ""
    return RESULTS.get(result, field(record, "result")) + why


def leftover_outcome(record: Any, look: Look) -> list[str]:
    """Return what became of one file that was to be removed."""
    done = "removed" if text_of(record, "result") == "removed" else "kept: it is in use again, or has changed"
    return wrapped(f"{field(record, 'path') or '?'}: {done}", look, "", _MARGIN)


def remains(record: Any) -> bool:
    """Say whether a process that was to be ended is still there."""
    return text_of(record, "result") not in _GONE
