"""Who stands above and below whom, as the kernel has it at this moment. Keeps nothing, and knows of no session."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from reaperd.linux import pidfd
from reaperd.linux.procfs import ProcessGone, ProcessHidden, ProcFS
from reaperd.model import ProcessId

_MAX_ANCESTORS = 200


class Left(NamedTuple):
    """Who has been left, or stands below somebody who has."""

    tops: dict[int, int]  # who is the topmost of those that were asked for, above each
    vanished: bool  # some of those that were asked for were gone before they could be asked


def ancestors(proc: ProcFS, pid: int) -> frozenset[ProcessId]:
    """Return who stands above ``pid`` now, init apart."""
    found: set[ProcessId] = set()
    with contextlib.suppress(ProcessGone):
        _, pid = proc.parent(pid)
        while pid > 1 and len(found) < _MAX_ANCESTORS:
            id_, pid = proc.parent(pid)
            found.add(id_)
    return frozenset(found)


def descendants(proc: ProcFS, leader: ProcessId) -> Iterator[int]:
    """Yield the pids below ``leader`` as they stand now."""
    pending, seen = _children(proc, leader.pid), {leader.pid}
    while pending:
        pid = pending.pop()
        if pid not in seen:
            seen.add(pid)
            pending += _children(proc, pid)
            yield pid


def have_grown(proc: ProcFS, tree: list[int]) -> bool:
    """Say whether somebody of ``tree`` has a child that is none of them."""
    known = set(tree)
    return any(not known.issuperset(_children(proc, pid)) for pid in tree)


def _children(proc: ProcFS, pid: int) -> list[int]:
    try:
        return proc.children(pid)
    except (ProcessGone, PermissionError):
        return []


def left_to(proc: ProcFS, parents: set[int], uids: set[int], new: list[int]) -> Left:
    """Return those of ``new`` that are of ``uids`` and stand below ``parents``, as quickly as that can be told.

    So does whose chain of parents leads to somebody who ended while all were asked: it has been left by that one. Whose
    uid cannot be told as quickly counts, too (Linux before 6.13).
    """
    above: dict[int, tuple[int, int | None]] = {}  # parent and uid
    gone: set[int] = set()
    for pid in new:
        try:
            above[pid] = _parent(proc, pid)
        except (ProcessHidden, PermissionError, ValueError):
            continue
        except ProcessGone:
            gone.add(pid)
    parents = parents | gone
    tops: dict[int, int] = {}
    for pid in above:
        chain, at = [], pid
        while at in above and at not in tops and at not in parents and at not in chain:
            chain.append(at)
            at = above[at][0]
        top = tops.get(at) if at not in parents else (chain[-1] if chain else pid)
        if top is not None:
            tops.update(dict.fromkeys(chain or [pid], top))
    tops = {pid: top for pid, top in tops.items() if above[pid][1] is None or above[pid][1] in uids}
    return Left(tops, bool(gone))


def _parent(proc: ProcFS, pid: int) -> tuple[int, int | None]:
    """Return the parent of ``pid`` and its uid, None for one that is not told as quickly."""
    told = pidfd.info_of(pid)
    return (proc.stat(pid).ppid, None) if told is None else (told.ppid, told.uid)
