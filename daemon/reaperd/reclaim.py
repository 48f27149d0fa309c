"""What is done in a dead session's name: its own user, in a helper, frees what it still holds and writes how it ended."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from reaperd import names
from reaperd.linux import helper, shm
from reaperd.linux.procfs import ProcessGone, ProcFS
from reaperd.model import ProcessId, Session
from reaperd.times import now_utc

_LONGEST_S = 20
_CLOCK_STEP_S = 1.0  # clocks are set now and then, and file systems count in ticks


class LastWord(NamedTuple):
    """What is to stand in the status file of a leader that could not write its end."""

    path: str
    cause: dict[str, Any] | None
    progress: dict[str, Any] | None


class Claim(NamedTuple):
    """What to free: names that carry the leader's pid, and ``mapped`` names in /dev/shm that only members had mapped."""

    session: Session
    mapped: frozenset[str]
    until_epoch_s: float  # when the leader died: what was made later is somebody else's
    last_word: LastWord | None = None
    frees: bool = True


def reclaim_work(claims: list[Claim], proc_root: str) -> Callable[[], int]:
    """Return the work of one helper: it frees all ``claims``, of one uid, and returns how many bytes that were."""
    return lambda: _reclaim_all(claims, ProcFS(proc_root))


def _reclaim_all(claims: list[Claim], proc: ProcFS) -> int:
    for session, last in ((claim.session, claim.last_word) for claim in claims):
        if last is not None:
            work = functools.partial(_write, session, last)
            helper.run_as(session.uid, session.gid, work, longest_s=_LONGEST_S, groups=session.groups)
    found = [(claim, _find(claim, proc)) for claim in claims if claim.frees]
    wanted = [entry for _, entries in found for entry in entries]
    used = _used_names(proc, wanted, claims[0].session.uid) if wanted else frozenset()
    return sum(
        removal.freed_bytes
        for claim, entries in found
        for removal in names.remove_as_owner(
            (entry for entry in entries if entry.name not in used), claim.session.uid, claim.session.gid
        )
    )


def _write(session: Session, last: LastWord) -> None:
    """Write the end of a run, as the leader's user: where that one may not write, nobody does."""
    from agent import status  # in this child alone

    # A FIFO can bear the name.
    descriptor = os.open(last.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        told = status.parse_status(os.read(descriptor, status.MAX_FILE_BYTES + 1))
    finally:
        os.close(descriptor)
    if told.state == status.RUNNING and told.session == session.id:
        status.write_status(
            last.path,
            told._replace(
                state=status.end_of(last.cause),
                ended_at=now_utc(),
                cause=last.cause,
                progress=last.progress or told.progress,
            ),
        )


def _used_names(proc: ProcFS, wanted: list[names.Entry], uid: int) -> frozenset[str]:
    """Return the names of those that are in use; all where a process of ``uid`` does not let itself be read."""
    use = names.find_use(proc, wanted, frozenset((uid,)))
    return frozenset(entry.name for entry in wanted) if uid in use.unread else use.names


def _find(claim: Claim, proc: ProcFS) -> list[names.Entry]:
    """Return what is there and was made while the leader lived."""
    leader = claim.session.leader
    since_epoch_s = shm.started_at_epoch_s(leader.start_ticks)
    found = []
    for directory in dict.fromkeys((shm.SHM, *claim.session.temp_dirs)):
        mapped = claim.mapped if directory == shm.SHM else frozenset()
        with contextlib.suppress(OSError), shm.open_directory(os.path.realpath(directory)) as opened:
            for name in shm.candidates(opened, leader.pid, mapped):
                there = shm.stat_here(opened, name)
                made = there and there.born_epoch_s
                if there and made and since_epoch_s <= made <= claim.until_epoch_s + _CLOCK_STEP_S:
                    place = os.path.realpath(directory)
                    found.append(names.Entry(place, name, shm.device_of(opened), there.inode))
    return [] if _is_reused(leader, proc) else found


def _is_reused(leader: ProcessId, proc: ProcFS) -> bool:
    """Say whether the leader's pid is another process's by now, to whom the names could belong.

    That can have started in the same tick as the leader, so its start time need not tell; that it lives does.
    """
    try:
        stat = proc.stat(leader.pid)
        return stat.id != leader or not stat.dead
    except ProcessGone:
        return False
