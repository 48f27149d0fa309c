"""What dead training scripts left in /dev/shm and in temporary folders, whether or not they ever registered. Run in a helper.

A name tells a framework, and some tell the pid of their maker. An entry is a leftover where its maker is gone, nobody has
it mapped or open, and nobody lives who would remove it or could come back to it. In doubt it is none:

- a pid counts in every pid namespace below ours, for a container can share /dev/shm or /tmp, and its names bear pids of its
  own. Who lives outside of our namespace can't be seen: where ours is not the machine's, nothing is a leftover unless the
  caller knows that nobody shares its folders;
- on a file system of other machines, pids are of other machines too: it is left alone;
- start times and file times are told by a clock that is set now and then: they alone never take a name from an interpreter
  of its owner's that has the pid in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

from reaperd.linux import shm
from reaperd.linux.procfs import MACHINES_PID_NAMESPACE, ProcFS
from reaperd.model import TEMP_DIRS, Process, Role
from reaperd.names import Entry, Removal, Use, User, find_bound, find_use, remove_as_owner
from reaperd.signatures import FORKED, OTHER, recognise
from reaperd.times import rfc3339

# Between being made and its first use, and between two uses, a segment without a pid is nobody's to see: a name goes
# through a queue, and who gets it may first have to import its framework, from a cold disk on a crowded machine.
UNUSED_S = 600.0
_TRACKER_LATE_S = 60.0  # a tracker is started for the first name that it guards: after that was made
_CLOCK_STEP_S = 2.0  # clocks are set now and then, and file systems count in ticks
_MAX_NAMES = 100_000  # in one folder
_MAX_LEFTOVERS = 1000
_MAX_ANSWER_BYTES = 48 * 1024  # a pipe that nobody reads yet holds 64 KiB
_NOGROUP = 65534  # whose rights nobody has: an owner needs none of a group to remove what is its own
_LOCAL = frozenset(
    ("tmpfs", "ramfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "overlay")
)


class Kind(NamedTuple):
    """One kind of name; the first group of ``pattern`` is its maker's pid, in the maker's own namespace."""

    name: str
    pattern: re.Pattern[str]
    folder: bool  # else a plain file; what is neither is no framework's
    in_shm: bool = False
    in_temp: bool = False
    # Its maker keeps the name in mind alone, with nothing mapped or open, and so does who is forked or spawned by it.
    remembered: bool = False


KINDS = (
    # joblib/_memmapping_reducer.py, TemporaryResourcesManager.register_new_context
    Kind(
        "joblib memmaps",
        re.compile(r"joblib_memmapping_folder_([0-9]{1,10})_[0-9a-zA-Z_-]+"),
        True,
        True,
        True,
    ),
    # loky/backend/synchronize.py, SemLock._make_name; sem_open(3) puts "sem." before it
    Kind("loky semaphore", re.compile(r"sem\.loky-([0-9]{1,10})-[0-9a-z_]+"), False, True),
    # torch/csrc/StorageSharing.cpp, aten/src/ATen/MapAllocator.cpp: NewProcessWideShmHandle
    Kind("torch segment", re.compile(r"torch_([0-9]{1,10})_[0-9]+(?:_[0-9]+)?"), False, True),
    # multiprocessing/shared_memory.py, _make_filename; a name of the user's own choice is kept on purpose
    Kind("shared memory", re.compile(r"psm_[0-9a-f]{8}"), False, True),
    # multiprocessing/synchronize.py, SemLock._make_name
    Kind("semaphore", re.compile(r"sem\.mp-[a-z0-9_]{8}"), False, True),
    # multiprocessing/util.py, get_temp_dir
    Kind("multiprocessing folder", re.compile(r"pymp-[a-z0-9_]{8}"), True, False, True, remembered=True),
    # torch/lib/libshm/manager.cpp: the manager's socket is bound in it for as long as that lives
    Kind("torch folder", re.compile(r"torch-shm-dir-[A-Za-z0-9]{6}"), True, False, True),
)
_TORCH_TRACKER = "torch_shm_manag"  # torch_shm_manager, cut at 15 characters (TASK_COMM_LEN)


class Leftover(NamedTuple):
    """An entry that nobody alive has any use for, and why, in words that a person can check."""

    path: str
    kind: str
    uid: int
    owner_pid: int | None  # as its name has it; None where it has none
    size_bytes: int  # of very much, only a part is counted
    evidence: tuple[str, ...]
    entry: Entry  # what was found there


class _Found(NamedTuple):
    """An entry whose name a framework could have given it."""

    entry: Entry
    kind: Kind
    owner_pid: int | None
    there: shm.Found

    @property
    def made_epoch_s(self) -> float:
        """When it was made; where the file system can't tell, some time after that."""
        return self.there.changed_epoch_s if self.there.born_epoch_s is None else self.there.born_epoch_s


def leftovers_work(
    proc_root: str,
    *,
    uid: int | None,
    folders: Sequence[str] = TEMP_DIRS,
    remove: Collection[str] | None = None,
    ours: Collection[int] = (),
    alone: bool = False,
) -> Callable[[], dict[str, Any]]:
    """Return the work of one helper: {"leftovers": records, "left_out": how many more there are, "withheld": sentences}.

    The biggest come first. ``withheld`` says what may be a leftover, and why that cannot be told.

    With ``remove``, only what has one of these paths: it is removed, and its record says whether it is. A path that is
    missing then is no leftover (any more). ``ours`` are Reaper's own processes beside the caller.
    """
    own = frozenset((*ours, os.getpid()))

    def work() -> dict[str, Any]:
        proc = ProcFS(proc_root)
        found, withheld = survey(proc, uid=uid, folders=folders, ours=own, alone=alone)
        if remove is None:
            return _answer([_record(one, None) for one in found], withheld)
        wanted = [one for one in found if one.path in remove]
        results = {True: "removed", False: "kept"}
        return _answer([_record(one, results[gone]) for one, gone in _remove(wanted)], withheld)

    return work


class Survey(NamedTuple):
    """The leftovers that there are, the biggest first, and in sentences what may be more."""

    leftovers: list[Leftover]
    withheld: list[str]


def survey(
    proc: ProcFS,
    *,
    uid: int | None,
    folders: Sequence[str] = TEMP_DIRS,
    ours: Collection[int] = (),
    alone: bool = False,
) -> Survey:
    """Look for the leftovers of ``uid``, or of everybody for None, in /dev/shm and ``folders``.

    ``ours`` are processes of Reaper's own, which make no such names. ``alone``: nobody outside of our pid namespace
    shares these folders. It may wait for a file system of a user's.
    """
    directories = dict.fromkeys(os.path.realpath(folder) for folder in (shm.SHM, *folders))
    found = [one for directory in directories for one in _named(proc, directory, uid)]
    if not found:
        return Survey([], [])
    if not alone and proc.own_pid_namespace() != MACHINES_PID_NAMESPACE:
        return Survey(
            [], [f"{_count(found)} left alone: this is a container, and who outside uses them cannot be seen"]
        )
    use = find_use(proc, [one.entry for one in found], frozenset(one.there.uid for one in found))
    bound = find_bound(proc, frozenset(one.entry.name for one in found if one.kind.folder))
    judge = _Judge(use, use.names | bound, frozenset((*ours, os.getpid())), alone=alone)
    judged = [(one, judge.evidence(one)) for one in found]
    leftovers = [_leftover(one, evidence) for one, evidence in judged if evidence is not None]
    return Survey(
        sorted(leftovers, key=lambda one: (-one.size_bytes, one.path))[:_MAX_LEFTOVERS],
        [
            f"{_count(blind)} of uid {uid} left alone: a process of theirs cannot be read, and may use them"
            for uid in sorted({one.there.uid for one in found})
            if (blind := [one for one in found if one.there.uid == uid and judge.is_blind(one)])
        ],
    )


def _count(found: list[_Found]) -> str:
    return f"{len(found)} name{'s' * (len(found) != 1)}"


def remove_leftovers(
    proc: ProcFS, leftovers: Iterable[Leftover], *, ours: Collection[int] = (), alone: bool = False
) -> list[tuple[Leftover, bool]]:
    """Remove those that are leftovers still, each as its owner; return which are gone by that."""
    asked = list(leftovers)
    folders = [os.path.dirname(one.path) for one in asked]
    uids = {one.uid for one in asked}
    uid = uids.pop() if len(uids) == 1 else None
    there = survey(proc, uid=uid, folders=folders, ours=ours, alone=alone).leftovers
    still = {one.entry for one in there}
    gone = {one for one, is_gone in _remove([one for one in asked if one.entry in still]) if is_gone}
    return [(one, one in gone) for one in asked]


def _remove(leftovers: list[Leftover]) -> list[tuple[Leftover, bool]]:
    results: list[tuple[Leftover, Removal]] = []
    for uid in dict.fromkeys(one.uid for one in leftovers):
        theirs = [one for one in leftovers if one.uid == uid]
        results += zip(theirs, remove_as_owner((one.entry for one in theirs), uid, _NOGROUP), strict=True)
    return [(one, removal.gone) for one, removal in results]


# -- what there is ----------------------------------------------------------------------------------


def _named(proc: ProcFS, directory: str, uid: int | None) -> list[_Found]:
    """Return what bears a framework's name in ``directory`` and is of the shape that the framework makes."""
    is_shm = directory == os.path.realpath(shm.SHM)
    kinds = [kind for kind in KINDS if (kind.in_shm if is_shm else kind.in_temp)]
    found = []
    with contextlib.suppress(OSError), shm.open_directory(directory) as opened:
        if proc.file_system(opened) not in _LOCAL:
            return []
        for name in shm.names_in(opened, _MAX_NAMES)[0]:
            for kind in kinds:
                if (match := kind.pattern.fullmatch(name)) is None:
                    continue
                there = shm.stat_here(opened, name)
                if there is None or uid not in (None, there.uid):
                    continue
                if stat.S_ISDIR(there.mode) if kind.folder else stat.S_ISREG(there.mode):
                    owner_pid = int(match[1]) if kind.pattern.groups else None
                    entry = Entry(directory, name, shm.device_of(opened), there.inode)
                    found.append(_Found(entry, kind, owner_pid, there))
    return found


def _leftover(one: _Found, evidence: tuple[str, ...]) -> Leftover:
    size_bytes = 0
    with contextlib.suppress(OSError), shm.open_directory(one.entry.directory) as opened:
        size_bytes = shm.bytes_of(opened, [one.entry.name], one.there.uid)
    path = os.path.join(one.entry.directory, one.entry.name)
    return Leftover(path, one.kind.name, one.there.uid, one.owner_pid, size_bytes, evidence, one.entry)


# -- whose it is ------------------------------------------------------------------------------------


class _Judge:
    """Says of each entry whether somebody lives who has a use for it."""

    def __init__(self, use: Use, used: frozenset[str], ours: frozenset[int], *, alone: bool) -> None:
        self._use, self._used, self._ours, self._alone = use, used, ours, alone
        self._now_epoch_s = time.time()
        self._by_pid = {user.stat.id.pid: user for user in use.users}
        self._trackers = [user for user in use.users if _role(user) is Role.TRACKER]

    def evidence(self, one: _Found) -> tuple[str, ...] | None:
        """Return why ``one`` is a leftover, None where it is none."""
        uid = one.there.uid
        if one.entry.name in self._used or self.is_blind(one):
            return None
        maker = self._without_maker(one) if one.owner_pid is None else self._with_maker(one, one.owner_pid)
        if maker is None:
            return None
        made = rfc3339(datetime.fromtimestamp(one.made_epoch_s, timezone.utc))
        return (
            maker,
            f"made by uid {uid} at {made}",
            f"not mapped or open in any of {len(self._use.users)} processes",
            *(("seen from a pid namespace of its own, which shares no folders",) if self._alone else ()),
        )

    def is_blind(self, one: _Found) -> bool:
        """Say whether nobody is seen to use it, but not all who may were seen."""
        return one.entry.name not in self._used and one.there.uid in self._use.unread | self._use.denied

    def _with_maker(self, one: _Found, pid: int) -> str | None:
        # Its own tracker removes it as soon as the last worker has ended; what serves a living parent is not its own.
        for tracker in self._trackers:
            if one.there.uid in tracker.uids and not self._has_parent(tracker):
                return None
        holders = [user for user in self._use.users if pid in user.pids]
        for user in holders:
            if _started_epoch_s(user) <= one.made_epoch_s + _CLOCK_STEP_S:
                return None
            if one.there.uid in user.uids and user.python:
                return None
        if not holders:
            return f"named after pid {pid}, which no process has"
        started = rfc3339(datetime.fromtimestamp(min(map(_started_epoch_s, holders)), timezone.utc))
        return f"named after pid {pid}, which is that of a process started later, at {started}"

    def _without_maker(self, one: _Found) -> str | None:
        # Not when it was made alone: its owner may have had it in use, and have changed it, since.
        unused_s = self._now_epoch_s - max(one.made_epoch_s, one.there.changed_epoch_s)
        if unused_s < UNUSED_S:
            return None
        for user in self._use.users:
            if one.there.uid in user.uids and self._may_come_back(user, one):
                return None
        return f"changed for the last time {unused_s:.0f} s ago, and no living tracker is as old as that"

    def _may_come_back(self, user: User, one: _Found) -> bool:
        """Say whether ``user`` may know the name of ``one``, and have a use for it."""
        role = _role(user)
        if role is Role.TRACKER:
            return _started_epoch_s(user) <= one.made_epoch_s + _TRACKER_LATE_S
        if not one.kind.remembered or not user.python or self._is_ours(user):
            return False
        # Started later, it knows the name only from the process that forked or spawned it.
        return role is Role.WORKER or _started_epoch_s(user) <= one.made_epoch_s + _CLOCK_STEP_S

    def _is_ours(self, user: User) -> bool:
        """Say whether it is Reaper's: one of those that we were told of, or a helper that one of them has forked."""
        return user.stat.id.pid in self._ours or (user.stat.forked and user.stat.ppid in self._ours)

    def _has_parent(self, tracker: User) -> bool:
        """Say whether the process that started a tracker lives: an interpreter of the same user's, nothing else is one."""
        parent = self._by_pid.get(tracker.stat.ppid)
        return parent is not None and parent.python and not parent.uids.isdisjoint(tracker.uids)


def _role(user: User) -> Role | None:
    """Return what a process is for those who share memory, None for what is started by itself."""
    if user.stat.comm.startswith(_TORCH_TRACKER):
        return Role.TRACKER
    framework, role = recognise(
        Process(user.stat.id, user.stat.ppid, None, user.stat.comm, user.stat.forked, argv=user.argv)
    )
    return None if framework == OTHER else role if framework != FORKED else Role.WORKER


def _started_epoch_s(user: User) -> float:
    return shm.started_at_epoch_s(user.stat.id.start_ticks)


# -- as JSON ----------------------------------------------------------------------------------------


def _record(one: Leftover, result: str | None) -> dict[str, Any]:
    return {
        "path": one.path,
        "kind": one.kind,
        "uid": one.uid,
        "owner_pid": one.owner_pid,
        "bytes": one.size_bytes,
        "evidence": list(one.evidence),
        "result": result,
    }


def _answer(records: list[dict[str, Any]], withheld: list[str]) -> dict[str, Any]:
    """Return as many of ``records`` as fit into one answer of a helper."""
    left_bytes = _MAX_ANSWER_BYTES - len(json.dumps(withheld))
    fit = 0
    for record in records:
        left_bytes -= len(json.dumps(record)) + 2
        if left_bytes < 0:
            break
        fit += 1
    return {"leftovers": records[:fit], "left_out": len(records) - fit, "withheld": withheld}
