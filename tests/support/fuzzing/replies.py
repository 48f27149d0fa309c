"""What reaperctl makes of a daemon's answers: one of another version, or whoever else listens on the socket."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from fuzzing.dice import Dice, noise, sendable
from fuzzing.messages import answering, framed
from fuzzing.records import EVENT
from fuzzing.target import Check, Refused, Target, assert_printable, outcome, stateless

from agent import wire
from reaperd import times
from reaperd.ctl import cleanup, link, render, render_monitor, render_orphans, text, units
from reaperd.ctl.commands import user_of
from reaperd.ctl.main import main

_NOW = datetime(2026, 1, 31, 12, tzinfo=timezone.utc)
_LOOKS = (
    text.Look(),
    text.Look(width=40, unicode=True),
    text.Look(width=80, colour=True),
    text.Look(width=133, colour=True, unicode=True),
)
_COLOUR = re.compile("\033\\[[0-9]+m")


def _rendered(value: Any, look: text.Look) -> Iterator[str]:
    """Yield every line that any command would show of an answer with this value in its field."""
    several = value if isinstance(value, list) else [value]
    yield from render.sessions(several, look, now=_NOW, user_of=user_of)
    yield from render.status(value, "/run/reaper/reaper.sock", look)
    yield from render_orphans.score(value, look)
    yield from render_orphans.explanation(value, look)
    yield from render_orphans.orphans(several, look, everything=True, user_of=user_of)
    yield from render_orphans.orphans(several, look)
    yield from render_orphans.leftovers(several, look, user_of=user_of)
    yield from render_orphans.withheld(several, look)
    figures = render_monitor.figures(several, several, value, _NOW)
    yield from render_monitor.frame(figures, look)
    yield from render_monitor.frame(figures, look, height=9)
    json.dumps(render_monitor.document(figures), allow_nan=False)
    for one in several:
        yield render.event(one, look)
        yield render.what_happened(one)
        yield from render.troubles(one)
        yield from render_orphans.outcome(one, look)
        yield from render_orphans.leftover_outcome(one, look)
        assert all(type(pid) is int for pid in render.remaining(one))
        render_orphans.remains(one)
        yield cleanup.target_of({"orphans": several, "leftovers": several}).in_words()
    yield text.command_line(value)


def check_render(data: bytes) -> None:
    """Whatever an answer holds, lines come of it that no terminal is moved by, and no exception."""
    dice = Dice(data)
    if dice.below(2):
        value = sendable(dice.altered(dice.choose(_VALUES)))
    else:
        try:
            value = wire.decode(b'{"v":1,"x":' + dice.rest() + b"}")["x"]
        except wire.WireError:
            return
    for look in _LOOKS:
        for line in _rendered(value, look):
            assert_printable(_COLOUR.sub("", line) if look.colour else line)
    if isinstance(value, dict):
        assert type(link.next_after(value, 3)) is int


def check_when(data: bytes) -> None:
    """A time that was read is written as every time here, and read again; everything else is refused."""
    words = data.decode("utf-8", "replace")
    found = outcome(units.parse_when, words, _NOW, raises=(ValueError,))
    if not isinstance(found, Refused):
        written = times.rfc3339(found)
        assert_printable(written)
        again = times.moment(written)
        assert again is not None
        assert abs((again - found).total_seconds()) < 0.001
    moment = times.moment(words)
    if moment is not None:
        assert moment.tzinfo is not None
        moment.timestamp()


# -- the whole command ----------------------------------------------------------------------------

_COMMANDS = (
    ["ping"],
    ["status"],
    ["status", "--json"],
    ["status", "--check"],
    ["ps"],
    ["ps", "--json"],
    ["orphans", "--all"],
    ["orphans", "--score"],
    ["orphans", "--score", "--json"],
    ["orphans", "--owner", "0"],
    ["explain", "1"],
    ["explain", "1", "--json"],
    ["events"],
    ["events", "--json", "--session", "grid"],
    ["protect", "1"],
    ["release", "1"],
    ["config", "show", "--json"],
    ["cleanup", "--dry-run"],
    ["cleanup", "--yes", "--wait", "0.01"],
    ["monitor", "--duration", "0.001"],
    ["stop", "grid", "--wait", "0.01"],
)
_CODES = (0, 1, 2, 3, 4)


class _Terminal(io.StringIO):
    """A stream that is none of the kernel's, and shows everything."""

    encoding = "utf-8"


@contextlib.contextmanager
def opened_command() -> Iterator[Check]:
    """``reaperctl`` ends with a documented code and prints nothing that a terminal would obey, whoever answers."""
    with answering() as server:

        def check(data: bytes) -> None:
            dice = Dice(data)
            command = dice.choose(_COMMANDS)
            if dice.below(2):
                server.answer = framed(wire.encode({"ok": True, **_as_object(dice.altered(_ANSWER))}))
            else:
                server.answer = framed(b'{"v":1,' + dice.rest() + b"}")
            out, err = _Terminal(), _Terminal()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(["--socket", server.path, "--timeout", "5", *command])
            assert code in _CODES, f"{command}: {code}"
            for printed in (out, err):
                for line in printed.getvalue().split("\n"):
                    assert_printable(line)
            if "--json" in command and code == 0 and command[0] != "events":
                json.loads(out.getvalue())

        with _own_streams():
            yield check


@contextlib.contextmanager
def _own_streams() -> Iterator[None]:
    before = {name: os.environ.pop(name, None) for name in ("COLUMNS", "REAPER_SOCKET")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


# -- seeds ----------------------------------------------------------------------------------------

_PROCESS = {
    "pid": 2868, "start_ticks": 7, "uid": 0, "role": "worker", "framework": "loky", "cpu_percent": 99.2, "gpu_bytes": 1,
    "rss_bytes": 188 * 2**20, "evidence": ["carries REAPER_LINEAGE"], "cmdline": ["/usr/bin/python", "-m", "x y"],
    "verdict": "kill", "rule": "age", "orphaned_s": 512.5, "result": None, "signals": ["SIGTERM"], "quarantined_s": 3,
}  # fmt: skip
_SESSION = {
    "id": "2859-2f1c4-eb9f3362-3e9773f4", "name": "grid-search", "uid": 0, "state": "running", "phase": "watched",
    "started_at": "2026-01-31T11:00:00.000Z", "leader": {"pid": 2859, "start_ticks": 1, "cmdline": ["python", "t.py"]},
    "progress": {"done": 12, "total": 64, "message": "fold 3"}, "workers": [_PROCESS, {**_PROCESS, "role": "tracker"}],
    "left_alone": [{"pid": 7, "reason": "was started under spared()"}], "attempt": {"number": 2, "most": 4},
}  # fmt: skip
_STATUS = {
    "version": "0.1.0", "pid": 812, "uptime_s": 3.5, "mode": "system", "config": "/etc/reaper/reaper.toml", "sessions": 1,
    "workers": 2, "orphans": 0, "stuck": 1, "quarantined": 1, "reaped_total": 5, "freed_bytes_total": 7, "dry_run": True,
}  # fmt: skip
_SCORE = {
    "since": "2026-01-31T11:00:00Z", "condemned": 5, "exited": 2, "exited_after_s": {"median": 3.5, "max": 9},
    "claimed": 1, "still_there": 1, "killed": 1,
}  # fmt: skip
_EXPLAINED = {
    **_PROCESS,
    "alive": True,
    "session": None,
    "ends_by_itself": "never",
    "events": [{**EVENT, "seq": 1}],
}
_LEFTOVER = {
    "path": "/dev/shm/psm_x",
    "kind": "psm",
    "bytes": 5,
    "uid": 0,
    "owner_pid": 7,
    "evidence": [],
    "result": None,
}
_VALUES: tuple[Any, ...] = (
    [_SESSION],
    [_PROCESS, {**_PROCESS, "verdict": "spare", "gpu_bytes": None}],
    [{**EVENT, "seq": 1}, {"kind": "orphan", "would": "kill", "rule": "age", "processes": [_PROCESS], "uid": 0}],
    [{"kind": "reload", "faults": ["x"]}, {"kind": "started", "version": "0.1.0"}, {"kind": "killed", "outcome": "exited"}],
    _STATUS, _SCORE, _EXPLAINED, [_LEFTOVER],
)  # fmt: skip


_ANSWER = {
    **_STATUS, "status": _STATUS, "sessions": [_SESSION], "orphans": [_PROCESS], "leftovers": [_LEFTOVER],
    "explain": _EXPLAINED, "score": _SCORE, "events": [], "last": 5, "after": 5, "toml": "[kill]\ngrace = 1\n",
    "start_ticks": 7, "name": "x", "session": "x",
}  # fmt: skip


def _as_object(value: Any) -> dict[str, Any]:
    found = sendable(value)
    return found if isinstance(found, dict) else {"status": found}


def _written(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _command_seeds() -> list[bytes]:
    answers = (
        {"ok": True, **_ANSWER},
        {"ok": False, "kind": "not-allowed", "message": "that is another user's"},
    )
    whole = [bytes((at, 0)) + _written(one)[1:-1] for at in range(len(_COMMANDS)) for one in answers]
    return [
        *whole,
        *noise(40, 300),
        *(bytes((at, 1, 2)) + bytes(range(at, at + 40)) for at in range(len(_COMMANDS))),
    ]


_WORDS = (
    *(
        b"\\u001b[2J",
        b"\xe2\x80\xae",
        b"\\ud83d\\ude00",
        b"\\n",
        b"1e308",
        b"-1",
        b"9223372036854775807",
        b"[]",
        b"{}",
        b"null",
    ),
    *(
        b'"pid":',
        b'"uid":',
        b'"processes":[',
        b'"evidence":[',
        b'"cause":{',
        b'"verdict":"',
        b'"kind":"',
        b'"events":[',
    ),
    *(
        b'"result":"stuck"',
        b'"signals":[',
        b'"cmdline":[',
        b'"attempt":{"number":',
        b'"quarantined_s":',
        b'"exited_after_s":',
    ),
)
TARGETS = (
    Target("render", stateless(check_render), lambda: [
        *(b"\0" + _written(one) for one in _VALUES), *(bytes((1, at, 3)) + bytes(range(at, 60)) for at in range(len(_VALUES))),
    ], _WORDS, 3000, cost=10),
    Target("when", stateless(check_when), lambda: [
        b"2026-01-31T12:00:00Z", b"2026-01-31", b"10min", b"2 h ago", b"0001-01-01T00:00:00+14:00", b"9999-12-31T23:59:59-14:00",
    ], (b"T", b"Z", b"+23:59", b".123456789", b"0001", b"9999", b" ago", b"w"), 64),
    Target("reaperctl", opened_command, _command_seeds, _WORDS, 4000, cost=20),
)  # fmt: skip
