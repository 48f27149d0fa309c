"""Names in /dev/shm and in temporary folders: who uses them still, and removing them as their owner. Run in a helper.

As root it only learns which names a living process uses; it removes as the owner, so nothing can be removed that the owner
could not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from reaperd.linux import helper, shm
from reaperd.linux.exhaustion import tell_exhaustion
from reaperd.linux.procfs import (
    PF_KTHREAD,
    ProcessGone,
    ProcFS,
    Stat,
    parse_pids,
    parse_uids,
    parse_unix_sockets,
)
from reaperd.memory import ALL_FILES, Memory, MemoryReader, Wish

_LONGEST_S = 10  # for removing one user's; a user can have made any number of files
_READING_S = 5.0  # of what processes have mapped
_PYTHONS = ("python", "libpython", "pypy", "libpypy")  # how the files begin that an interpreter is


class Entry(NamedTuple):
    """A name in a directory, for as long as ``inode`` is what bears it."""

    directory: str
    name: str
    device: str  # as /proc/PID/maps has it
    inode: int


class User(NamedTuple):
    """A living process that may use names."""

    stat: Stat
    uids: frozenset[int]
    pids: tuple[int, ...]  # in each pid namespace that knows it, the outermost first
    # For who is of a uid that was asked about.
    argv: tuple[str, ...] = ()
    python: bool = False  # has an interpreter mapped


class Use(NamedTuple):
    """Who lives, and what of certain names is in use."""

    names: frozenset[str]
    users: tuple[User, ...]
    unread: frozenset[int]  # uids of processes that did not let themselves be read in time
    denied: frozenset[int]  # uids of processes that may not be read


class _Look(NamedTuple):
    """What a pass over /proc finds without reading anybody's memory."""

    users: dict[int, User]
    theirs: dict[int, Wish]  # who is of the uids that it is about
    others: dict[int, Wish]
    used: set[str]
    denied: set[int]


def find_use(proc: ProcFS, entries: Collection[Entry], uids: frozenset[int]) -> Use:
    """Return which names of ``entries`` a living process has mapped or open, at whatever place it sees them.

    Processes of ``uids`` are read first: others' that cannot be read in time must not be why these are not.
    """
    names = frozenset(entry.name for entry in entries)
    # Who has made a semaphore has it mapped by another name: sem_open(3) links it to its own once it is ready.
    inodes = {(entry.device, entry.inode): entry.name for entry in entries}
    look = _look(proc, names, uids)
    unread = set(look.theirs)
    for pid, memory in _read_all(proc, look.theirs):
        look.used.update(_used(memory, names, inodes))
        python = any(one.path.rpartition("/")[2].startswith(_PYTHONS) for one in memory.mapped)
        look.users[pid] = look.users[pid]._replace(argv=memory.argv, python=python)
        unread.discard(pid)
        if not memory.mapped:  # what runs has a file mapped at least
            look.denied.add(pid)
    # Of who has ended meanwhile there is nothing left to read.
    unread = {pid for pid in unread if proc.is_alive(look.users[pid].stat.id)}
    denied = {pid for pid in look.denied - unread if _is_running(proc, look.users[pid].stat)}
    for _, memory in _read_all(proc, look.others):
        look.used.update(_used(memory, names, inodes))
    return Use(
        frozenset(look.used),
        tuple(look.users.values()),
        frozenset().union(*(look.users[pid].uids for pid in unread)),
        frozenset().union(*(look.users[pid].uids for pid in denied)),
    )


def _look(proc: ProcFS, names: frozenset[str], uids: frozenset[int]) -> _Look:
    look = _Look({}, {}, {}, set(), set())
    for pid in proc.listing():
        with contextlib.suppress(ProcessGone, ValueError):
            stat = proc.stat(pid)
            if stat.dead or stat.flags & PF_KTHREAD:
                continue
            status = proc.status(pid)
            user = look.users[pid] = User(stat, parse_uids(status), parse_pids(status) or (pid,))
            asked = not user.uids.isdisjoint(uids)
            wish = Wish(stat, proc.living_task(stat), argv=asked, maps=ALL_FILES)
            (look.theirs if asked else look.others)[pid] = wish
            paths = proc.descriptors(pid, wish.task).values()
            for path in paths:
                look.used.update(names.intersection(path.split("/")))
            if asked and not any(paths) and not proc.may_read_descriptors(pid, wish.task):
                look.denied.add(pid)
    return look


def _used(memory: Memory, names: frozenset[str], inodes: Mapping[tuple[str, int], str]) -> Iterator[str]:
    for one in memory.mapped:
        yield from names.intersection(one.path.split("/"))
        if (name := inodes.get((one.device, one.inode))) is not None:
            yield name


def find_bound(proc: ProcFS, names: frozenset[str]) -> frozenset[str]:
    """Return those of ``names`` that a socket is bound in: no descriptor tells its path.

    It looks into every network namespace that a process lives in and that may be asked about.
    """
    seen: set[str] = set()
    used: set[str] = set()
    for pid in proc.listing() if names else ():
        namespace = proc.network_namespace(pid)
        if not namespace or namespace in seen:
            continue
        try:
            text = proc.unix_sockets(pid)
        except ProcessGone:
            continue
        except OSError as error:
            tell_exhaustion(error)
            continue
        if text is None:
            return names
        seen.add(namespace)
        for path in parse_unix_sockets(text):
            used |= names.intersection(path.split("/"))
    return frozenset(used)


def _read_all(proc: ProcFS, wishes: dict[int, Wish]) -> Iterator[tuple[int, Memory]]:
    """Yield what could be read; whoever stalls the reader is not tried again."""
    reader, left, until_s = MemoryReader(proc), dict(wishes), time.monotonic() + _READING_S
    while left and time.monotonic() < until_s and (found := reader.read(left.values())):
        for pid, memory in found.items():
            del left[pid]
            yield pid, memory


def _is_running(proc: ProcFS, stat: Stat) -> bool:
    """Say whether a process runs still and is not on its way out, when it has let go of its memory."""
    with contextlib.suppress(ProcessGone, ValueError):
        now = proc.stat(stat.id.pid)
        return now.id == stat.id and not now.dead and not now.exiting
    return False


# -- removing ---------------------------------------------------------------------------------------


class Removal(NamedTuple):
    """What came of an entry."""

    freed_bytes: int = 0
    gone: bool = False


def remove_as_owner(entries: Iterable[Entry], uid: int, gid: int) -> list[Removal]:
    """Remove in a child of this helper that is the user, for a user's rights can't be given back."""
    wanted = list(entries)
    if not wanted:
        return []
    result = helper.run_as(uid, gid, lambda: _remove(wanted, uid), longest_s=_LONGEST_S + 1)
    return [Removal(*one) for one in result] if isinstance(result, list) else [Removal()] * len(wanted)


def _remove(entries: list[Entry], uid: int) -> list[Removal]:
    until_s = time.monotonic() + _LONGEST_S
    return [_remove_one(entry, uid, until_s) for entry in entries]


def _remove_one(entry: Entry, uid: int, until_s: float) -> Removal:
    with contextlib.suppress(OSError), shm.open_directory(entry.directory) as opened:
        found = shm.stat_here(opened, entry.name)
        if found is not None and found.inode == entry.inode:
            freed_bytes = shm.remove(opened, entry.name, uid, until_s=until_s)
            return Removal(freed_bytes, shm.stat_here(opened, entry.name) is None)
    return Removal()
