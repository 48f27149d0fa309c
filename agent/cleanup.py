"""``emergency_cleanup()``: the caller's own orphans are ended now, by ``reaperctl`` in a process of its own.

That is the same engine whether a daemon answers or not, and the caller's process loads nothing of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

from agent.isolated import run_module

_COMMAND = ("cleanup", "--yes", "--json", "--leftovers")
# What reaperctl exits with.
_DONE, _REMAINS, _NO_DAEMON = 0, 1, 3
_INTERPRETERS = ("python", "pypy")  # how the names of their files begin
_WITHIN_S = 180.0  # it waits a minute itself, for what it has ended


class CleanupError(RuntimeError):
    """Nobody could be asked to clean up; the text says why. Nothing, or not all, was ended."""

    def __init__(self, reason: str) -> None:
        """Say that it failed, and why."""
        super().__init__(f"the orphans could not be cleaned up: {reason}")


class CleanedProcess(NamedTuple):
    """An orphan, and what became of it."""

    pid: int
    start_ticks: int  # as in /proc/PID/stat: with the pid, it names one process of this boot
    framework: str
    role: str  # "worker" or "tracker"
    rss_bytes: int  # that it held
    evidence: tuple[str, ...]  # why it is an orphan, in sentences
    result: str  # "killed", "denied", "stuck", or "" where nothing was told in time


class CleanedFile(NamedTuple):
    """What dead workers left in shared memory or in a temporary folder, and whether it was removed."""

    path: str
    kind: str
    size_bytes: int
    evidence: tuple[str, ...]  # why nobody uses it, in sentences
    result: str  # "removed" or "kept"


class CleanupReport(NamedTuple):
    """What ``emergency_cleanup()`` has done; true where there was anything to do."""

    killed: tuple[CleanedProcess, ...]
    reclaimed: tuple[CleanedFile, ...]
    denied: tuple[CleanedProcess, ...]  # the kernel does not let whoever sent the signal end them
    # What had not ended within a minute, or could not be removed.
    remaining: tuple[CleanedProcess | CleanedFile, ...]

    def __bool__(self) -> bool:
        """Say whether there was anything to clean up."""
        return any(self[:])


def emergency_cleanup(socket: str | None) -> CleanupReport:
    """End the caller's own orphans; see ``agent.emergency_cleanup``."""
    which = [f"--owner={os.geteuid()}", *([f"--socket={socket}"] if socket is not None else [])]
    done = _run(which)
    # Where SIGCHLD is ignored, nobody learns an exit code: 0 stands for any.
    if not done.stdout and done.returncode in (_DONE, _NO_DAEMON):
        done = _run([*which, "--local"])
    if done.returncode in (_DONE, _REMAINS):
        try:
            return _report(json.loads(done.stdout))
        except (ValueError, TypeError, KeyError):
            pass  # it has failed before there was anything to tell
    raise CleanupError(_reason(done))


def _run(options: list[str]) -> subprocess.CompletedProcess[str]:
    executable = sys.executable or ""
    if getattr(sys, "frozen", False) or not os.path.basename(executable).startswith(_INTERPRETERS):
        # A program that embeds Python, or was frozen: run with these options, it would be started once more.
        no_python = f"{executable or 'sys.executable'} is no Python interpreter"
        raise CleanupError(f"{no_python}; run `reaperctl cleanup` instead")
    try:
        return subprocess.run(
            run_module("reaperd.ctl.main", *_COMMAND, *options, python=executable),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_WITHIN_S,
        )
    except subprocess.TimeoutExpired:
        raise CleanupError(f"reaperctl was not done within {_WITHIN_S:g} s") from None
    except (OSError, ValueError) as error:  # ValueError: a socket's path with a NUL
        reason = getattr(error, "strerror", None) or error
        raise CleanupError(f"{executable}: {reason}") from None


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"reaperctl exited with {done.returncode}"


def _report(told: Any) -> CleanupReport:
    processes = [
        CleanedProcess(
            one["pid"],
            one["start_ticks"],
            one["framework"],
            one["role"],
            one["rss_bytes"],
            tuple(one["evidence"]),
            one["result"] or "",
        )
        for one in told["orphans"]
        # The others are spared, had ended by themselves, or turned out to be none.
        if one["result"] in ("killed", "denied", "stuck")
        or (one["result"] is None and one["verdict"] == "kill")
    ]
    files = [
        CleanedFile(one["path"], one["kind"], one["bytes"], tuple(one["evidence"]), one["result"] or "kept")
        for one in told["leftovers"]
    ]
    return CleanupReport(
        killed=tuple(one for one in processes if one.result == "killed"),
        reclaimed=tuple(one for one in files if one.result == "removed"),
        denied=tuple(one for one in processes if one.result == "denied"),
        remaining=(
            *(one for one in processes if one.result in ("stuck", "")),
            *(one for one in files if one.result != "removed"),
        ),
    )
