"""Stops a training that another process leads: by the daemon, or where none answers by signals of this process's own.

A training that runs within this process, or above it, is not stopped: this process would end with it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from typing import NamedTuple

from agent import client, family, session, sockets, status, wire
from agent.family import Id, Process
from agent.status import Status

GRACE_S = 10.0  # without a daemon: from SIGTERM to SIGKILL
_WITHIN_S = 60.0  # as `reaperctl stop` has it
_NOT_KNOWN = ("unknown-session", "ended")  # kinds of refusal: it is no session of that daemon's
_OWN = (
    "this training runs inside of this very server, which would end with it: start it with "
    "agent.streamlit.start_training(), and it can be stopped"
)


class StopError(RuntimeError):
    """The training was not stopped; the text says why."""


class Stopped(NamedTuple):
    """What became of a training that was to be stopped."""

    ended: int  # how many processes are gone, the leader among them
    left: tuple[int, ...]  # pids of those that are still there
    without_daemon: str  # why no daemon did it; "" where one did


def stop(
    told: Status,
    supervisor: Id | None = None,
    *,
    owner: int | None = None,
    socket: str | None = None,
    grace_s: float = GRACE_S,
) -> Stopped:
    """End the training of which a status file has ``told`` that it runs, and wait for all that belongs to it.

    That takes a minute at most, after 5 s for each daemon that does not answer, and ``grace_s`` where none did.
    ``supervisor`` is the `reaperctl run` that started it, None for none. ``owner`` is the uid whose file has told so, None where
    it is known to be true. StopError: it may not, or cannot, be stopped.
    """
    if told.state != status.RUNNING:
        raise StopError(f"the training does not run: it is {told.state}")
    _refuse_own(told)
    if told.session and not told.session.startswith(f"{told.pid}-{told.start_ticks:x}-"):
        raise StopError("its status file names a session that is not that process's: it is not believed")
    leader = told.pid, told.start_ticks
    members = family.of_session(told.session, leader)
    with contextlib.ExitStack() as stack:
        handles = {one.pid: _open(one.id, stack) for one in members}
        handle = handles.get(told.pid, -1)
        if handle < 0:
            raise StopError("the training has just ended by itself")
        if owner not in (None, 0, _uid_of(told.pid)):  # else any user could have us end what is ours
            raise StopError(
                f"its status file is uid {owner}'s, who does not run that process: it is not believed"
            )
        is_above = supervisor is not None and supervisor[0] in _above(told.pid)
        above = _open(supervisor, stack) if supervisor is not None and is_above else -1
        why = _ask_daemon(told, socket) if told.session else "it is no session of Reaper's"
        if why:
            _end_here(handle, above, grace_s)
        until_s = time.monotonic() + _WITHIN_S
        if not _ended(handle, until_s):
            raise StopError(f"the training was told to stop and has not ended within {_WITHIN_S:g} s")
        # The supervisor as well: it writes how the training has ended.
        for one in (*handles.values(), above):
            _ended(one, until_s)
        left = tuple(pid for pid, one in handles.items() if not _ended(one, 0.0))
    return Stopped(len(members) - len(left), left, why)


def stop_supervisor(told: Status, supervisor: Id, status_file: str) -> Stopped:
    """End a `reaperctl run` between two attempts, or after the last, and wait for it and what the last has left, a minute at most.

    ``told`` is what the status file at ``status_file`` says of that attempt. StopError: it may not, or cannot, be stopped.
    """
    with contextlib.ExitStack() as stack:
        above = _open(supervisor, stack)
        if above < 0:
            raise StopError("the training has just ended by itself")
        if supervisor[0] == os.getpid() or supervisor[0] in _above(os.getpid()):
            raise StopError(_OWN)
        # Else whoever can write beside the status file could have us end what is ours.
        if not _supervises(supervisor[0], status_file):
            raise StopError(
                f"pid {supervisor[0]} is no `reaperctl run` with that status file: it is not believed"
            )
        members = family.of_session(told.session, None) if told.session else []
        handles = {one.pid: _open(one.id, stack) for one in members}
        _send(above, signal.SIGTERM)
        until_s = time.monotonic() + _WITHIN_S
        if not _ended(above, until_s):
            raise StopError(f"`reaperctl run` was told to stop and has not ended within {_WITHIN_S:g} s")
        left = tuple(pid for pid, one in handles.items() if not _ended(one, until_s))
    return Stopped(1 + len(members) - len(left), left, "")


def _supervises(pid: int, status_file: str) -> bool:
    """Say whether a process is a `reaperctl run`, as ``start_training()`` starts it, that writes ``status_file``."""
    try:
        words = status.read_text(f"/proc/{pid}/cmdline").split("\0")
    except OSError:
        return False
    ours = words[: words.index("--")] if "--" in words else []
    return "reaperd.ctl.main" in ours and f"--status-file={status_file}" in ours


def _refuse_own(told: Status) -> None:
    """Refuse to end what this process is, or is a part of."""
    own = wire.parse_lineage(os.environ.get(wire.LINEAGE_VARIABLE, ""))
    if told.pid == os.getpid() or (told.session and told.session in own) or told.pid in _above(os.getpid()):
        raise StopError(_OWN)


def _above(pid: int) -> set[int]:
    """Return who is above a process: its parent, and so on."""
    found: set[int] = set()
    while True:
        try:
            pid = int(status.read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return found
        if pid <= 1 or pid in found:
            return found
        found.add(pid)


def _uid_of(pid: int) -> int | None:
    """Return whose process it is; None where it has ended."""
    try:
        lines = status.read_text(f"/proc/{pid}/status").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Uid:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _ask_daemon(told: Status, socket: str | None) -> str:
    """Have a daemon stop the session; return "" where one does, else why none did. StopError: it may not."""
    reasons = []
    for path in sockets.candidate_sockets(socket):
        try:
            client.request(path, {"op": "stop", "session": told.session}, timeout_s=5.0)
        except client.Unreachable as error:
            reasons.append(str(error))
        except wire.WireError as error:
            if error.kind not in _NOT_KNOWN:
                raise StopError(f"the daemon refused: {error}") from None
            reasons.append(f"{path}: {error}")
        else:
            return ""
    return "; ".join(reasons)


def _end_here(leader: int, above: int, grace_s: float) -> None:
    """Ask the training to end, by its supervisor ``above`` it where it has one, which ends what is left; then make it."""
    _send(above if above >= 0 else leader, signal.SIGTERM)
    if not _ended(leader, time.monotonic() + grace_s):
        _send(leader, signal.SIGKILL)


def _send(handle: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        pass  # it has ended by itself
    except PermissionError:
        raise StopError("the training is another user's") from None


def _open(one: Id, stack: contextlib.ExitStack) -> int:
    """Return a pidfd of exactly ``one``; -1 where it has ended."""
    try:
        handle = os.pidfd_open(one[0])
    except OSError:
        return -1
    stack.callback(os.close, handle)
    try:
        # Opened first, then compared: who bears the pid after that and began then has borne it all along.
        return handle if session.read_start_ticks(one[0]) == one[1] else -1
    except (OSError, ValueError, IndexError):
        return -1


def _ended(handle: int, until_s: float) -> bool:
    """Say whether the process has ended, by the monotonic ``until_s`` at the latest."""
    if handle < 0:
        return True
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(max(0.0, until_s - time.monotonic()) * 1000))


def living(told: Status) -> list[Process]:
    """Return who belongs to a training and lives: its leader, its workers and their trackers."""
    return family.of_session(told.session, (told.pid, told.start_ticks))
