"""What a page shows of one training, gathered from its status file, a daemon where one answers, and /proc.

Draws nothing, so that it serves any front end; ``agent.streamlit`` draws it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from datetime import datetime
from typing import Any, NamedTuple

from agent import client, family, sockets, status, stopping, wire
from agent.launch import Training
from agent.status import Status, StatusError

# Beside the states of a status file, which knows of one attempt alone.
NONE, STARTING, RESTARTING, FINISHING = "none", "starting", "restarting", "finishing"
ACTIVE = (STARTING, status.RUNNING, RESTARTING, FINISHING)
STUCK_AFTER_S = 300.0
_BUSY_PERCENT = 1.0  # of a core: less is no work
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_ASK_WITHIN_S = 1.0
_ABSURD = 10**100
# Of these, escaped or not, Streamlit makes arrows and dashes where they stand alone, links, and in older versions emojis: a mark that
# nobody sees, behind them, keeps it from that.
_REPLACED = re.compile(
    r"(?<!\S)(?:<->|->|<-|--|>=|<=|~=)(?!\S)|https?://|www(?=\.)|@|:(?=[\w+-]+:)", re.IGNORECASE
)


class View(NamedTuple):
    """One training at one moment; None where something is not known."""

    # As in a status file; "starting"; "restarting", "finishing" while its supervisor is at it between two attempts or after the
    # last; "none" where no training was started yet.
    state: str
    name: str = ""
    pid: int | None = None
    session: str = ""
    progress: dict[str, Any] | None = None  # {done, total, message}
    elapsed_s: float | None = None
    workers: int | None = None
    cpu_percent: float | None = None  # of one core, all its processes together
    rss_bytes: int | None = None  # likewise; pages that they share count for each
    orphans: int | None = None  # of this user's, on this machine; None without a daemon
    error: str = ""  # what a failed training ended with, or why its status cannot be told
    no_daemon: str = ""  # why no daemon answers; "" where one does
    idle_s: float = 0.0  # for how long it has used no CPU and told no progress
    told: Status | None = None
    owner: int | None = None  # the uid whose file has told so

    @property
    def active(self) -> bool:
        """Whether there is something to stop."""
        return self.state in ACTIVE

    @property
    def stuck(self) -> bool:
        """Whether it looks stuck: it runs, and nothing has moved for ``STUCK_AFTER_S``."""
        return self.state == status.RUNNING and self.idle_s >= STUCK_AFTER_S


class Watch:
    """Remembers from look to look what CPU the processes of a training had used, and when something moved last."""

    def __init__(self) -> None:
        self._before: dict[family.Id, int] = {}
        self._at_s = 0.0
        self._moved_at_s = time.monotonic()
        self._progress: object = None

    def cpu_percent(self, members: list[family.Process]) -> float | None:
        """Return what they have used of one core since the last look; at the first, since each has started."""
        now_s = time.monotonic()
        passed_s, known = now_s - self._at_s, bool(self._before)
        since_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        share = 0.0
        for one in members:
            age_s = max(since_boot_s - one.start_ticks / _TICKS_PER_S, 0.1)
            used, over_s = one.cpu_ticks, age_s
            if one.id in self._before:
                used, over_s = max(0, one.cpu_ticks - self._before[one.id]), max(passed_s, 0.1)
            elif known:  # it has come since
                over_s = max(min(age_s, passed_s), 0.1)
            share += used / _TICKS_PER_S / over_s
        self._before, self._at_s = {one.id: one.cpu_ticks for one in members}, now_s
        return round(100 * share, 1) if members else None

    def idle_s(self, cpu_percent: float | None, progress: object) -> float:
        """Return for how long nothing has moved."""
        now_s = time.monotonic()
        if progress != self._progress or cpu_percent is None or cpu_percent >= _BUSY_PERCENT:
            self._moved_at_s, self._progress = now_s, progress
        return now_s - self._moved_at_s


def look(training: Training | None, status_file: str | None, socket: str | None, watch: Watch) -> View:
    """Return how the training is; one that has ended never reads as running, with a daemon or without."""
    asked = _Asked(socket or (training.socket if training else None))
    path = training.status_file if training is not None else status_file
    view = View(NONE, orphans=asked.orphans, no_daemon=asked.no_daemon)
    if path is None:
        return view
    view = view._replace(name=training.name if training else "")
    try:
        told, owner = status.read_owned_status(path)
    except FileNotFoundError:
        return view if training is None else _begun(training, view)
    except (OSError, StatusError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return view._replace(state=status.UNKNOWN, error=f"{path}: {reason}")
    view = view._replace(
        state=told.state,
        name=_cut(told.name or view.name, wire.MAX_NAME_CHARS),
        session=told.session,
        progress=told.progress,
        told=told,
        owner=owner,
    )
    if told.state != status.RUNNING:
        return view._replace(
            state=_after_attempt(training, told),
            error=_cut(told.error or "", status.MAX_ERROR_CHARS),
            elapsed_s=_between(told.started_at, told.ended_at),
        )
    return _running(view, told, asked, watch)


def _begun(training: Training, view: View) -> View:
    """Return how a training is that has not written its status file."""
    if training.supervised:
        return view._replace(state=STARTING)
    return view._replace(state=status.FAILED, error="it ended before it had begun; its log says why")


def _after_attempt(training: Training | None, told: Status) -> str:
    """Return the state of a training whose process has ended: it is over once its supervisor is gone."""
    if training is None or told.state == status.UNKNOWN or not training.supervised:
        return told.state
    # Where it was the last attempt, that is known to the supervisor alone.
    fails = told.state in (status.FAILED, status.KILLED)
    return RESTARTING if fails and training.restarts else FINISHING


def _running(view: View, told: Status, asked: _Asked, watch: Watch) -> View:
    members = stopping.living(told)
    cpu = watch.cpu_percent(members)
    found = asked.session(told.session)
    progress = found.get("progress") if isinstance(found.get("progress"), dict) else told.progress
    workers = sum(one.pid != told.pid and not family.is_tracker(one) for one in members)
    since_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    return view._replace(
        pid=told.pid,
        progress=progress,
        elapsed_s=max(0.0, since_boot_s - told.start_ticks / _TICKS_PER_S),
        workers=workers,
        cpu_percent=cpu,
        rss_bytes=sum(_rss_bytes(one.pid) for one in members),
        idle_s=watch.idle_s(cpu, progress),
    )


class _Asked:
    """What the daemon says; nothing where none answers."""

    def __init__(self, socket: str | None) -> None:
        self.no_daemon = ""
        self.orphans: int | None = None
        self._sessions: list[Any] = []
        reasons = []
        for path in sockets.candidate_sockets(socket):
            try:
                self._ask(path)
            except (client.Unreachable, wire.WireError) as error:
                reasons.append(str(error))
            else:
                return
        self.no_daemon = "; ".join(reasons)

    def _ask(self, path: str) -> None:
        found = client.request(path, {"op": "ps"}, timeout_s=_ASK_WITHIN_S).get("sessions")
        self._sessions = found if isinstance(found, list) else []
        # It may be busy with a leader that dies: then their number is not known this time.
        with contextlib.suppress(client.Unreachable, wire.WireError):
            listed = client.request(path, {"op": "orphans"}, timeout_s=_ASK_WITHIN_S).get("orphans")
            self.orphans = count_orphans(listed, os.geteuid())

    def session(self, session_id: str) -> dict[str, Any]:
        """Return what is said of one session, an empty record where nothing is."""
        for one in self._sessions:
            if isinstance(one, dict) and session_id and one.get("id") == session_id:
                return one
        return {}


def count_orphans(listed: Any, uid: int) -> int | None:
    """Return how many of the processes that a daemon lists are orphans of ``uid`` that no rule spares."""
    if not isinstance(listed, list):
        return None
    mine = [one for one in listed if isinstance(one, dict) and one.get("uid") == uid]
    return sum(one.get("verdict") not in ("spare", "report") for one in mine)


def _rss_bytes(pid: int) -> int:
    try:
        return int(status.read_text(f"/proc/{pid}/statm").split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return 0


def _between(began: str, ended: str | None) -> float | None:
    """Return the seconds from one time to the other; None where either is not told."""
    try:
        first, last = (datetime.fromisoformat((one or "").replace("Z", "+00:00")) for one in (began, ended))
        return max(0.0, (last - first).total_seconds())
    except (ValueError, TypeError):
        return None


# -- in words -------------------------------------------------------------------------------------


def share_of(progress: dict[str, Any] | None) -> float | None:
    """Return how much of it is done, from 0 to 1; None where the whole is not known."""
    done, total = (_number(progress, key) for key in ("done", "total"))
    return None if done is None or total is None or total <= 0 else min(max(done / total, 0.0), 1.0)


def progress_in_words(progress: dict[str, Any] | None) -> str:
    """Return "3 of 8, fold 2"; "" where nothing is told."""
    done, total = (_number(progress, key) for key in ("done", "total"))
    message = (progress or {}).get("message")
    message = _cut(message, wire.MAX_MESSAGE_BYTES) if isinstance(message, str) else ""
    words = "" if done is None else f"{done:.10g}"
    if words and total is not None and total > 0:
        words += f" of {total:.10g}"
    return ", ".join(word for word in (words, message) if word)


def killed_in_words(told: Status | None) -> str:
    """Return how a training was killed, in a sentence; as far as somebody has seen it."""
    cause = (told.cause if told is not None else None) or {}
    code = _number(cause, "code")
    if cause.get("kind") == "oom":
        return "The machine, or its limit, ran out of memory: the kernel has killed it."
    if cause.get("kind") == "signal" and code is not None:
        return f"It was killed by {_signal_in_words(int(code))}."
    return "Its process has ended without a word: killed, out of memory, or crashed."


def _signal_in_words(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"


def _number(source: dict[str, Any] | None, key: str) -> float | None:
    value = (source or {}).get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return value if abs(value) < _ABSURD else None  # more than a float holds cannot be shown


def _cut(text: str, most: int) -> str:
    """Return a text from a file of whoever's as far as it may be long."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def span(seconds: float | None) -> str:
    """Return "4.2 s", "3 min 20 s" or "2 h 5 min"; "-" where it is not known."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: float | None) -> str:
    """Return "1.2 GiB"; "-" where it is not known."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def printable(text: str) -> str:
    """Return a text that a process has chosen, on one line and without what would turn it around."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_markdown(text: str) -> str:
    """Return Markdown that shows exactly ``text``: no picture is fetched, and no link made, for what a process calls itself."""
    shown = _REPLACED.sub("\\g<0>\u2060", printable(text))
    return "".join(f"\\{c}" if c.isascii() and not c.isalnum() and c != " " else c for c in shown)


def bold(text: str) -> str:
    """Return Markdown that shows exactly ``text``, in bold: blanks at its ends would leave the asterisks."""
    return f"**{as_markdown(text.strip())}**" if text.strip() else ""
