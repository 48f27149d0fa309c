"""Looks for those who bear a framework's signature, and for what their pools have left. Decides nothing, signals nobody.

Incremental: a listing of /proc tells who is new; of those the interpreters' processes are read once, and from then on only who
bears a signature, and whom an adopter has got. All that lies in others' memory is read by a helper (memory.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from agent import wire
from reaperd import signatures
from reaperd.census import Interrupted
from reaperd.linux import pidfd
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import (
    PF_KTHREAD,
    ProcessGone,
    ProcessHidden,
    ProcFS,
    Stat,
    parse_innermost_pid,
)
from reaperd.marks import MarkReader, Marks
from reaperd.memory import Memory, Wish
from reaperd.model import Process, ProcessId
from reaperd.parents import ADOPTERS, PYTHONS, STAND_INS, Parents
from reaperd.reading import is_settled, marked
from reaperd.signatures import Signature
from reaperd.verdicts import Suspect

_ADOPTING_COMMS = frozenset(name[: signatures.COMM_CHARS] for name in ADOPTERS)
_TITLES = tuple(
    name for row in signatures.SIGNATURES if (name := row.title[: signatures.COMM_CHARS] or row.comm)
)
_TURN_S = 0.0003  # for reading those again who were nobody's: they may have become other programs
_BETWEEN_ALARMS = 16  # processes


class _Seen(NamedTuple):
    """What a process was when it was last read."""

    inode: int  # of /proc/PID
    image: int
    interpreted: bool  # by Python: an adopter may have got it from a pool
    settled: bool


class _Bearer(NamedTuple):
    """Who bears a signature."""

    id: ProcessId
    image: int
    signature: Signature
    parent: ProcessId | None
    lost_parent: ProcessId | None = None
    was_below: bool = False  # an orphan that was none of a fork's


class _Face(NamedTuple):
    """What changes where a process becomes another program, or gives itself a title."""

    id: ProcessId
    image: int
    comm: str


class Scan:
    """Scans of one /proc."""

    def __init__(
        self,
        proc: ProcFS,
        marks: MarkReader,
        alarm: Alarm | None = None,
        uid_of: Callable[[int, ProcFS], int | None] = pidfd.uid_of,
    ) -> None:
        self._proc = proc
        self._marks = marks
        self._alarm = alarm
        self._uid_of = uid_of  # the kernel is asked for it, whatever /proc says
        self._seen: dict[int, _Seen] = {}
        self._bearers: dict[int, _Bearer] = {}
        self._forked: dict[int, ProcessId] = {}  # without a signature, with an adopter
        self._plain: dict[int, _Face] = {}  # the same, but exec'ed: nothing about them is to be read again
        self._adopters: set[int] = {1}
        self._turn: list[int] = []
        self._extra: tuple[Signature, ...] = ()

    def heed(self, extra: tuple[Signature, ...]) -> None:
        """Look for these signatures, too."""
        if extra != self._extra:
            self._extra = extra
            self._seen.clear()
            self._bearers.clear()
            self._forked.clear()
            self._plain.clear()

    # -- looking -----------------------------------------------------------------------------

    def look(self, listing: dict[int, int] | None = None) -> list[Suspect]:
        """Return who bears a signature, and what an adopter has got of forked interpreters; Interrupted.

        What was read until then need not be read again.
        """
        listing = self._proc.listing() if listing is None else listing
        for pid in [pid for pid, seen in self._seen.items() if listing.get(pid) != seen.inode]:
            self._forget(pid)
        due = listing.keys() - self._seen.keys()
        due |= {pid for pid, seen in self._seen.items() if not seen.settled}
        self._read(due, listing)
        self._read_in_turn(listing)
        self._read_adopted(listing)
        return self._suspects([*self._bearers, *self._forked])

    def examine(self, pids: Iterable[int]) -> dict[ProcessId, Suspect]:
        """Return what ``pids`` are now, whoever they are, and who stands between them and an orphan that they are below.

        Who is gone, or cannot be read, is missing.
        """
        wanted = dict.fromkeys(pids)
        self._read(wanted, {pid: seen.inode for pid, seen in self._seen.items()}, whole=True)
        suspects = self._suspects([*wanted, *(pid for pid in self._bearers if pid not in wanted)])
        found = {one.id.pid: one for one in suspects if one.id.pid in self._seen}
        asked: dict[ProcessId, Suspect] = {}
        for pid in wanted:
            one = found.get(pid)
            while one is not None and one.id not in asked:
                asked[one.id] = one
                one = found.get(one.process.ppid) if one.below else None
        return asked

    def _forget(self, pid: int) -> None:
        self._seen.pop(pid, None)
        self._bearers.pop(pid, None)
        self._forked.pop(pid, None)
        self._plain.pop(pid, None)
        if pid != 1:
            self._adopters.discard(pid)

    # -- reading -----------------------------------------------------------------------------

    def _read(self, pids: Iterable[int], listing: dict[int, int], *, whole: bool = False) -> None:
        """See what ``pids`` are; ``whole``: read the command lines of those, too, that run no interpreter."""
        wishes: dict[int, Wish] = {}
        stats: dict[int, Stat] = {}
        for count, pid in enumerate(sorted(pids)):
            if self._alarm is not None and count % _BETWEEN_ALARMS == 0 and self._alarm.rings():
                break
            try:
                stat = self._proc.stat(pid)
            except (ProcessHidden, PermissionError, ValueError):
                self._seen[pid] = _Seen(listing.get(pid, 0), 0, False, True)
                continue
            except ProcessGone:
                continue
            before = self._seen.get(pid)
            interpreted = stat.comm.startswith(PYTHONS) or self._may_bear(stat.comm)
            settled = bool(stat.flags & PF_KTHREAD) or is_settled(stat)
            if stat.dead or stat.flags & PF_KTHREAD:
                interpreted = False
            elif whole or (
                interpreted
                and (stat.forked or before is None or before.image != stat.image or not stat.image)
            ):
                stats[pid] = stat
                if not stat.forked or whole:
                    wishes[pid] = Wish(stat, self._proc.living_task(stat), environ=whole, argv=True)
            self._seen[pid] = _Seen(listing.get(pid, 0), stat.image, interpreted, settled)
            self._note_adopter(stat)
        memories = self._marks.memory.read(wishes.values(), self._alarm) if wishes else {}
        for pid, stat in stats.items():
            if pid not in wishes:
                self._note(stat, self._find(stat, Memory()))
            elif pid in memories:
                self._note(stat, self._find(stat, memories[pid]))
            else:
                del self._seen[pid]  # it could not be read: the next look tries again
        if self._alarm is not None and self._alarm.rings():
            raise Interrupted

    def _may_bear(self, comm: str) -> bool:
        """Say whether a process of that name may bear a signature although it is no interpreter's."""
        return comm.startswith(_TITLES) or bool(self._extra)

    def _find(self, stat: Stat, memory: Memory) -> Signature | None:
        if stat.forked:  # its command line is its parent's
            found = signatures.find(stat.comm, (), tuple(memory.variables), self._extra)
            return found or self._inherited(stat)
        return signatures.find(stat.comm, memory.argv, tuple(memory.variables), self._extra)

    def _inherited(self, stat: Stat) -> Signature | None:
        before, parent = self._bearers.get(stat.id.pid), self._bearers.get(stat.ppid)
        if before is not None and before.was_below and (before.id, before.image) == (stat.id, stat.image):
            return before.signature
        if parent is None or parent.signature.comm or parent.id.start_ticks > stat.id.start_ticks:
            return None
        # Another image: since it was read, the parent has become the program that has forked this one.
        return parent.signature if parent.image == stat.image else None

    def _note(self, stat: Stat, found: Signature | None) -> None:
        pid = stat.id.pid
        before = self._bearers.pop(pid, None)
        self._forked.pop(pid, None)
        if found is None:
            return
        if before is not None and before.id == stat.id:
            self._bearers[pid] = before._replace(image=stat.image, signature=found)
            return
        parent = None
        with contextlib.suppress(ProcessGone):
            parent = self._proc.stat(stat.ppid).id if stat.ppid > 0 else None
        self._bearers[pid] = _Bearer(stat.id, stat.image, found, parent)

    def _note_adopter(self, stat: Stat) -> None:
        pid, comm = stat.id.pid, stat.comm
        if comm in STAND_INS:  # is it process 1 of a container?
            with contextlib.suppress(ProcessGone):
                if parse_innermost_pid(self._proc.status(pid)) == 1:
                    self._adopters.add(pid)
        elif comm in _ADOPTING_COMMS:
            self._adopters.add(pid)

    def _read_in_turn(self, listing: dict[int, int]) -> None:
        """Read some of those again who bear no signature: they may have become other programs."""
        until_s = time.monotonic() + _TURN_S
        if not self._turn:
            self._turn = list(self._seen)
        while self._turn and time.monotonic() < until_s:
            pid = self._turn.pop()
            if pid in self._seen and pid not in self._bearers:
                self._read([pid], listing)

    def _read_adopted(self, listing: dict[int, int]) -> None:
        """See whom adopters have got: interpreters that were forked, or whose variables tell."""
        adopted = set()
        for adopter in self._adopters & listing.keys() | {1}:
            with contextlib.suppress(ProcessGone, PermissionError):
                adopted.update(self._proc.children(adopter))
        self._forked = {pid: one for pid, one in self._forked.items() if pid in adopted}
        self._plain = {pid: one for pid, one in self._plain.items() if pid in adopted}
        due = [
            pid
            for pid in adopted
            if pid in self._seen
            and self._seen[pid].interpreted
            and pid not in self._bearers
            and pid not in self._forked
        ]
        self._read_variables(due)

    def _read_variables(self, pids: Sequence[int]) -> None:
        wishes = {}
        for pid in pids:
            with contextlib.suppress(ProcessGone, PermissionError, ValueError):
                stat = self._proc.stat(pid)
                if not stat.dead and self._plain.get(pid) != _face(stat):
                    wishes[pid] = Wish(stat, self._proc.living_task(stat), environ=True, argv=True)
        memories = self._marks.memory.read(wishes.values(), self._alarm) if wishes else {}
        for pid, memory in memories.items():
            stat = wishes[pid].stat
            found = self._find(stat, memory)
            self._note(stat, found)
            if found is None and stat.forked:
                self._forked[pid] = stat.id
            elif found is None and stat.image:
                self._plain[pid] = _face(stat)

    # -- suspects ----------------------------------------------------------------------------

    def _suspects(self, pids: Sequence[int]) -> list[Suspect]:
        parents = Parents(self._proc)
        found: dict[int, Suspect] = {}
        stats: dict[int, Stat] = {}
        for pid in pids:
            with contextlib.suppress(ProcessGone):
                stat = self._proc.stat(pid)
                bearer = self._bearers.get(pid)
                if bearer is not None and (bearer.id, bearer.image) != (stat.id, stat.image):
                    # Another program by now, or another process: what it bears is not known before the next look.
                    self._forget(pid)
                elif not stat.dead:
                    found[pid], stats[pid] = self._suspect(stat, bearer, parents), stat
        for pid in found:
            self._find_above(pid, found)
        lost = {pid: (found.pop(pid), stats[pid]) for pid, one in list(found.items()) if one.is_lost}
        return [*found.values(), *self._with_marks(lost).values()]

    def _suspect(self, stat: Stat, bearer: _Bearer | None, parents: Parents) -> Suspect:
        lost = self._lost_parent(bearer, stat, parents) if bearer else None
        uid = self._uid_of(stat.id.pid, self._proc)
        process = Process(
            stat.id, stat.ppid, uid, stat.comm, stat.forked,
            cgroup=None, rss_bytes=stat.rss_bytes, cpu_ticks=stat.cpu_ticks,
        )  # fmt: skip
        group = (-1 if uid is None else uid, *(lost or (stat.ppid, stat.posix_sid, stat.posix_pgid)))
        row = bearer.signature if bearer else None
        if bearer is not None and stat.forked and not bearer.signature.comm and not bearer.was_below:
            # Its command line is its parent's. A forkserver may have died alone, and its workers still be of use to its pool;
            # and what a worker puts into the background is meant to live on.
            row = bearer.signature._replace(certain=False)
        return Suspect(process, row, parents.of(stat), lost, group=group)

    def _lost_parent(self, bearer: _Bearer, stat: Stat, parents: Parents) -> ProcessId | None:
        """Return the parent that a process had before, where it has another one by now because that one has ended."""
        now = parents.id_of(stat.ppid) if stat.ppid > 0 else None
        if bearer.parent is not None and now is not None and now != bearer.parent:
            # One in the middle of its end has no children any more, and does not show yet that it is dead.
            if not self._proc.is_alive(bearer.parent):
                bearer = bearer._replace(parent=now, lost_parent=bearer.lost_parent or bearer.parent)
        elif bearer.parent is None:
            bearer = bearer._replace(parent=now)
        self._bearers[bearer.id.pid] = bearer
        return bearer.lost_parent

    def _with_marks(self, those: dict[int, tuple[Suspect, Stat]]) -> dict[int, Suspect]:
        """Return suspects with what tells whose they are: command line, cgroup, marks of sessions."""
        found: dict[int, tuple[Suspect, Marks, Wish | None]] = {}
        for pid, (one, stat) in those.items():
            with contextlib.suppress(ProcessGone, PermissionError):
                marks, wish = self._marks.read_descriptors(stat, one.process.uid, hurried=False)
                wish = wish._replace(argv=True) if wish is not None else None
                process = one.process._replace(cgroup=wire.parse_cgroup(self._proc.cgroup(pid)))
                found[pid] = one._replace(process=process, unread=True), marks, wish
        memories = self._marks.memory.read([wish for _, _, wish in found.values() if wish is not None])
        told = {}
        for pid, (one, marks, _) in found.items():
            if pid in memories:
                read = self._marks.with_memory(marks, memories[pid], pid, one.process.uid)
                told[pid] = one._replace(process=marked(one.process, read), unread=False)
            else:
                told[pid] = one
        return told

    def _find_above(self, pid: int, found: dict[int, Suspect]) -> None:
        """Note of ``pid`` that an orphan above it has started it, where one has."""
        one, bearer = found[pid], self._bearers.get(pid)
        if bearer is None or one.is_lost or not bearer.signature.certain:
            return
        above, seen = found.get(one.process.ppid), {pid}
        while above is not None and above.id.pid not in seen and not above.is_lost:
            seen.add(above.id.pid)
            above = found.get(above.process.ppid)
        if above is not None and above.is_lost and above.signature is not None and above.signature.certain:
            self._bearers[pid] = bearer._replace(was_below=True)
            found[pid] = one._replace(
                signature=bearer.signature, below=above.below or above.id, group=above.group
            )


def _face(stat: Stat) -> _Face:
    return _Face(stat.id, stat.image, stat.comm)
