"""What the buttons of the page do, each in a thread of its own: it returns what came of it in a sentence."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from agent.isolated import run_module
from reaperd.ctl import CommandError, cleanup, events, render
from reaperd.ctl.link import follow
from reaperd.ctl.orphans import ask_about
from reaperd.ctl.text import field, plain
from reaperd.ctl.ui import shaping
from reaperd.ctl.ui.recorder import Recorder

_WAIT_S = 60.0
_CHECK_WITHIN_S = 120.0


class Outcome(NamedTuple):
    """What came of a deed."""

    good: bool
    text: str


def stop_session(recorder: Recorder, session: str) -> Outcome:
    """End a session, and wait until the daemon says what became of it. CommandError."""
    _, one = events.stop_session(recorder.link, session, wait_s=_WAIT_S, on_lost=lambda _: None)
    if one is None:
        return Outcome(False, f"{plain(session)} was told to stop, and was not gone after {_WAIT_S:g} s.")
    name = field(one, "name") or plain(session)
    left = render.remaining(one)
    how = render.what_happened(one) or "it had no workers"
    if left:
        return Outcome(False, f"{name}: {how}; still there: {', '.join(map(str, left))}.")
    return Outcome(True, f"{name} was stopped: {how}.")


def end(recorder: Recorder, target: cleanup.Target) -> Outcome:
    """End exactly these orphans, and remove these leftovers. CommandError."""
    until_s = time.monotonic() + _WAIT_S

    def news(after: int) -> Iterable[dict[str, Any]]:
        return follow(recorder.link, after=after, on_lost=lambda _: None, until=until_s)

    done = cleanup.carry_out(target, recorder.ask_to_end, news)
    return Outcome(*shaping.outcome(list(done.processes.values()), list(done.leftovers.values())))


def spare(recorder: Recorder, pid: int, start_ticks: int) -> Outcome:
    """Have exactly this process left alone. CommandError."""
    ask_about(recorder.link, "protect", pid, start_ticks)
    return Outcome(True, f"Pid {pid} is left alone from now on.")


def let_go(recorder: Recorder, pid: int, start_ticks: int) -> Outcome:
    """Let exactly this process go on, which was stopped. CommandError."""
    ask_about(recorder.link, "release", pid, start_ticks)
    return Outcome(True, f"Pid {pid} goes on, and is left alone from now on.")


def examine(socket: str) -> list[shaping.Check]:
    """Return what ``reaperctl doctor`` finds, in a process of its own: it forks. CommandError."""
    options = [f"--socket={socket}"] if socket else []
    try:
        done = subprocess.run(
            run_module("reaperd.ctl.main", "doctor", "--json", *options),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_CHECK_WITHIN_S,
        )
        return shaping.checks(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        raise CommandError(f"the checks were not done within {_CHECK_WITHIN_S:g} s") from None
    except ValueError:
        raise CommandError(f"the checks ended with {done.returncode}") from None
