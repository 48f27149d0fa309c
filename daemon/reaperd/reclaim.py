"""Frees what a dead session still holds by name: run in a helper, as the session's own user.

As root it only learns which names a living process still uses; it removes as the user, so nothing can be
removed that the user could not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from reaperd.linux import helper, shm
from reaperd.linux.procfs import ProcessGone, ProcFS, parse_uid
from reaperd.memory import ALL_FILES, Memory, MemoryReader, Wish
from reaperd.model import ProcessId, Session

_LONGEST_S = 10  # for one claim; a user can have made any number of files
_READING_S = 5.0  # of what processes have mapped
_CLOCK_STEP_S = 1.0  # clocks are set now and then, and file systems count in ticks


class Claim(NamedTuple):
    """What to free: names that carry the leader's pid, and ``mapped`` names in /dev/shm that only members had mapped."""

    session: Session
    mapped: frozenset[str]
    until_epoch_s: float  # when the leader died: what was made later is somebody else's


def reclaim_work(claims: list[Claim], proc_root: str) -> Callable[[], int]:
    """Return the work of one helper: it frees all ``claims``, of one uid, and returns how many bytes that were."""
    return lambda: _reclaim_all(claims, ProcFS(proc_root))


def _reclaim_all(claims: list[Claim], proc: ProcFS) -> int:
    found = [(claim, _find(claim, proc)) for claim in claims]
    names = frozenset(name for _, entries in found for _, name in entries)
    used = _used_names(proc, names, claims[0].session.uid) if names else frozenset()
    return sum(_remove_as_owner(claim, entries, used) for claim, entries in found)


def _find(claim: Claim, proc: ProcFS) -> list[tuple[str, str]]:
    """Return (directory, name) of what is there and was made while the leader lived."""
    leader = claim.session.leader
    since_epoch_s = shm.started_at_epoch_s(leader.start_ticks)
    found = []
    for directory in dict.fromkeys((shm.SHM, *claim.session.temp_dirs)):
        mapped = claim.mapped if directory == shm.SHM else frozenset()
        with contextlib.suppress(OSError), shm.open_directory(os.path.realpath(directory)) as opened:
            for name in shm.candidates(opened, leader.pid, mapped):
                made = shm.made_at_epoch_s(opened, name)
                if made is not None and since_epoch_s <= made <= claim.until_epoch_s + _CLOCK_STEP_S:
                    found.append((os.path.realpath(directory), name))
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


def _used_names(proc: ProcFS, names: frozenset[str], uid: int) -> frozenset[str]:
    """Return those of ``names`` that a living process has mapped or open, at whatever place it sees them.

    All of them where a process of ``uid`` does not let itself be read.
    """
    theirs: dict[int, Wish] = {}
    others: dict[int, Wish] = {}
    used: set[str] = set()
    for pid in proc.listing():
        with contextlib.suppress(ProcessGone, ValueError):
            stat = proc.stat(pid)
            if not stat.dead:
                wish = Wish(stat, proc.living_task(stat), maps=ALL_FILES)
                (theirs if parse_uid(proc.status(pid)) == uid else others)[pid] = wish
                for path in proc.descriptors(pid, wish.task).values():
                    used |= names.intersection(path.split("/"))
    # The user's own first: others' processes that cannot be read in time must not be why these are not.
    memories = _read_all(proc, theirs)
    unread = [wish for pid, wish in theirs.items() if pid not in memories]
    for memory in (*memories.values(), *_read_all(proc, others).values()):
        for one in memory.mapped:
            used |= names.intersection(one.path.split("/"))
    for wish in unread:
        with contextlib.suppress(ProcessGone, ValueError):
            if proc.stat(wish.stat.id.pid).id == wish.stat.id:
                return names
    return frozenset(used)


def _read_all(proc: ProcFS, wishes: dict[int, Wish]) -> dict[int, Memory]:
    """Return what could be read; whoever stalls the reader is not tried again."""
    reader, found, until_s = MemoryReader(proc), dict[int, Memory](), time.monotonic() + _READING_S
    while time.monotonic() < until_s and (
        more := reader.read(wish for pid, wish in wishes.items() if pid not in found)
    ):
        found |= more
    return found


def _remove_as_owner(claim: Claim, entries: list[tuple[str, str]], used: frozenset[str]) -> int:
    """Remove in a child of this helper that is the user, for a user's rights can't be given back."""
    wanted = [(directory, name) for directory, name in entries if name not in used]
    if not wanted:
        return 0
    child = helper.start_helper(lambda: _remove(wanted, claim.session.uid, claim.session.gid))
    os.set_blocking(child.reader, True)
    result = helper.finish_helper(child)
    return result if isinstance(result, int) else 0


def _remove(entries: list[tuple[str, str]], uid: int, gid: int) -> int:
    helper.become(uid, gid)
    signal.alarm(_LONGEST_S + 1)  # should it wait for a dead file system: nobody is left then to end it
    until_s = time.monotonic() + _LONGEST_S
    freed = 0
    for directory, name in entries:
        with contextlib.suppress(OSError), shm.open_directory(directory) as opened:
            freed += shm.remove(opened, name, uid, until_s=until_s)
    return freed
