"""What is there: reads /proc into snapshots and takes down who a leader is. Decides nothing, signals nobody.

A look lists all processes and reads those that are new. Of those who were read before, it reads anew whom its depth names
and whoever was young then: a process that has just been forked may still become another user's, or another program.

While a snapshot of a dead leader's survivors is taken, a pidfd is opened for each process before anything of it is
read: whatever the evidence says then holds for exactly the process that a signal would reach.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

from agent import wire
from reaperd.linux import cgroup, page, pidfd
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import (
    PF_KTHREAD,
    TICKS_PER_S,
    ProcessGone,
    ProcFS,
    Stat,
    has_pending_sigkill,
    parse_gid,
    parse_innermost_pid,
    parse_uid,
)
from reaperd.linux.shm import SHM
from reaperd.marks import MarkReader, Marks
from reaperd.memory import Wish
from reaperd.model import Process, ProcessId, Session, SessionKey, Snapshot, Usage

_MAX_ANCESTORS = 200
_USAGE_S = 1.0  # CPU shares are told over no less than that, where there is a choice
_YOUNG_TICKS = 2 * TICKS_PER_S  # old enough then to have become what it will be
# A scan reads some of those again who seemed to be nobody's, for so long: they may have become other programs.
_TURN_S = 0.0003
_AHEAD = 32  # processes that are read before the first of them are signalled; then twice as many, and so on
_RELIST_S, _MOST_RELISTS = (
    0.001,
    3,
)  # a look that took longer lists once more: a worker may have forked meanwhile

_BETWEEN_ALARMS = 16  # processes
_MOST_INTERRUPTIONS = 10  # of looks at everybody, in a row
_MANY = 64  # processes, of those who are new at a scan; after so long with them whoever asks for something is answered
_AT_A_TIME_S = 0.02


class Interrupted(Exception):
    """Something goes first: a leader has died while we looked at something else, or others have waited for long enough."""


class _Known(NamedTuple):
    """What was read of one process."""

    id: ProcessId | None = None  # None: it could not be read, or is a zombie
    uid: int | None = None
    process: Process | None = None  # where it can belong to a covered session: with its marks
    image: int = 0  # 0: not enough was read to tell that the same program runs, or the kernel does not tell
    settled: bool = True  # it was no longer young
    inode: int = 0  # of /proc/PID


class _Unread(NamedTuple):
    """A process whose memory is to be read yet."""

    known: _Known  # once that is done
    marks: Marks
    wish: Wish
    before: _Known | None = None  # what was known of it


class _Missed(NamedTuple):
    """Who could not be read: lets nobody do so, or was gone before."""

    unread: dict[int, int]  # uids by pid
    vanished: set[int]  # uids


class Observer:
    """Reads one /proc."""

    def __init__(self, proc: ProcFS, alarm: Alarm | None = None) -> None:
        """``alarm`` interrupts what nobody waits for: looks at the living, and at everybody."""
        self.proc = proc
        self._alarm = alarm
        self.boot_id = proc.boot_id()
        self.marks = MarkReader(proc)
        self.reads_cgroups = False  # also of those whose page tells whose they are
        self._namespaces = proc.namespaces(os.getpid())
        self._oom_counters = cgroup.Counters()
        self._known: dict[int, _Known] = {}  # by pid, as all that follows
        self._listing: dict[
            int, int
        ] = {}  # the inodes of /proc/PID: a pid with another one is another process
        self._unsettled: set[int] = set()
        self._processes: dict[int, Process] = {}  # of those known
        self._unread: dict[int, _Unread] = {}
        self._turn: list[int] = []
        self._at_a_time_s = _AT_A_TIME_S
        self._interruptions = 0  # in a row, of looks at everybody
        self.changes = 0  # how often anything has changed by which it is told who belongs to a session
        self._covered: dict[SessionKey, Session] = {}
        self._oldest: dict[int, int] = {}  # the start ticks of each uid's first leader
        self._newest_ticks = 0  # nobody has been read who started later
        self._uncovered = False  # some session is over, which may have been the first
        self._lowered = False  # that has become lower: some were passed over who matter now
        self._held: dict[ProcessId, int] = {}
        self._cpu: dict[ProcessId, tuple[float, int]] = {}  # monotonic seconds and CPU ticks at the last scan
        # The reaper opens what is beyond this, and then compares start times.
        self._most_held = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4

    def is_interrupted(self) -> bool:
        """Say whether a leader has died, which goes before whatever nobody waits for."""
        return self._alarm is not None and self._alarm.rings()

    # -- whom to look for --------------------------------------------------------------------

    def cover(self, session: Session) -> None:
        """From now on, read the marks of whoever can belong to ``session``."""
        if session.key in self._covered:
            return
        self._covered[session.key] = session
        ticks = session.leader.start_ticks
        if ticks < self._oldest.get(session.uid, ticks + 1):
            self._oldest[session.uid] = ticks
            self._lowered = True
        if session.page_inode is not None:
            self.marks.pages.add(session.page_inode, session.page_fd, session.key)
        # Who was read before carries marks of it that meant nothing then. A leader is seldom older than the last look.
        for pid, process in list(self._processes.items()) if ticks <= self._newest_ticks else ():
            if process.uid == session.uid and process.id.start_ticks >= ticks:
                self._forget(pid)

    def uncover(self, key: SessionKey) -> None:
        """Read marks no longer on account of this session."""
        session = self._covered.pop(key, None)
        self._uncovered = True
        if session is not None and session.page_inode is not None:
            self.marks.pages.remove(session.page_inode, session.page_fd)

    def _uncover_users(self) -> None:
        """Forget what was read on account of sessions that are over."""
        self._uncovered = False
        oldest: dict[int, int] = {}
        for session in self._covered.values():
            ticks = session.leader.start_ticks
            oldest[session.uid] = min(ticks, oldest.get(session.uid, ticks))
        if oldest != self._oldest:
            self._oldest = oldest
            for pid, process in list(self._processes.items()):
                if not self._can_belong(process.uid, process.id):
                    del self._processes[pid]
                    self.changes += 1
                    self._known[pid] = self._known[pid]._replace(process=None)

    def _can_belong(self, uid: int | None, id_: ProcessId) -> bool:
        """Say whether a process of ``uid`` can belong to some session: by uid and age."""
        oldest = self._oldest.get(uid) if uid is not None else None
        return oldest is not None and oldest <= id_.start_ticks

    # -- snapshots ---------------------------------------------------------------------------

    def look(
        self,
        sessions: Sequence[Session],
        *,
        hold: bool,
        members: Iterable[ProcessId] = (),
        again: Iterable[ProcessId] = (),
        everyone: bool = False,
        hurried: bool = False,
        listing: dict[int, int] | None = None,
    ) -> Snapshot:
        """Return who can belong to one of ``sessions``, whose ``members`` so far are given; ``again`` are read again.

        With ``hold`` a pidfd is held of each that is read. Then, of those that are new, only those are read that can have
        been left by a leader or are a member's: any number of others may be new, and nobody is to wait for them.
        ``hurried`` leaves those to the next look whose pages do not tell, where others' do.
        ``everyone`` reads those as well, and all who seemed to be nobody's. That, and a look without ``hold``, raises
        Interrupted where the alarm rings; what was read until then need not be read by the next one.
        ``listing`` is of all processes, taken just before, where the caller has one.
        """
        for session in sessions:
            self.cover(session)
        adopters = {id_ for session in sessions for id_ in session.adopters}
        self._unread = {}
        new = self._list(listing)
        named = self._pids_of(again, new)
        if hold and not everyone:
            parents = {1, *self._pids_of({*adopters, *members}, new)}
            read, missed = self._look_at_the_left(sessions, new, named, parents, hurried=hurried)
        else:
            read, missed = self._look_at_all(new, named, hold=hold, everyone=everyone)
        self._cut_false_links(read)
        return Snapshot(
            dict(self._processes),
            self._living_of(adopters),
            stale=frozenset(self._processes.keys() - read),
            unread=missed.unread,
            vanished=frozenset(missed.vanished),
        )

    def read_new(self, listing: dict[int, int]) -> None:
        """Read who is new in ``listing``, as a look at the living would; Interrupted where that takes long.

        What was read until then need not be read by the next one.
        """
        until_s = time.monotonic() + self._at_a_time_s
        self._unread = {}
        new = self._list(listing)
        for at in range(0, len(new), _MANY):
            if self.is_interrupted():
                raise Interrupted
            if at > 0 and time.monotonic() >= until_s:
                self._at_a_time_s *= 2  # as many more may be new the next time
                raise Interrupted
            read = self._read_each(new[at : at + _MANY], hold=False)
            self._read_memory(self._alarm)
            self._cut_false_links(read)
        self._at_a_time_s = _AT_A_TIME_S

    def _look_at_the_left(
        self,
        sessions: Sequence[Session],
        new: list[int],
        named: set[int],
        parents: set[int],
        *,
        hurried: bool,
    ) -> tuple[set[int], _Missed]:
        """Read ``named``, and those of ``new`` that are below ``parents``; return who was read, and who could not be."""
        uids = {session.uid for session in sessions}
        began_s = time.monotonic()
        left = set(self._left_to(parents, uids, new))
        read = self._read_each(sorted(left | named, reverse=True), hold=True, afresh=named)
        for _ in range(_MOST_RELISTS):
            if time.monotonic() - began_s <= _RELIST_S:
                break
            # A worker may have forked meanwhile: nobody is to be signalled before its children are known, too.
            began_s = time.monotonic()
            if not (more := self._left_to(parents | read, uids, self._list())):
                break
            left.update(more)
            read |= self._read_each(more, hold=True)
        vanished = uids if not left <= self._known.keys() else set()
        off: set[int] = set()
        if hurried:
            off = self._put_off({session.id for session in sessions}, named)
        missed = self._read_memory(None)
        unread = missed.unread | {pid: uid for uid in uids for pid in off}
        return read - off, _Missed(unread, missed.vanished | vanished)

    def _look_at_all(
        self, new: list[int], named: set[int], *, hold: bool, everyone: bool
    ) -> tuple[set[int], _Missed]:
        """Read all of ``new``, and whoever is due again; return who was read, and who could not be; Interrupted."""
        if self._uncovered:
            self._uncover_users()
        due = named.union(new, self._unsettled, self._passed_over(everyone=everyone))
        # Where leaders die all the time, one look at everybody must come to its end now and then.
        alarm = self._alarm if not everyone or self._interruptions < _MOST_INTERRUPTIONS else None
        # Of the living, only what another program can change is taken as read.
        afresh = named if hold else frozenset[int]()
        read = self._read_each(sorted(due, reverse=True), hold=hold, afresh=afresh, alarm=alarm)
        if not hold:
            self._read_in_turn()
        missed = self._read_memory(alarm)
        if alarm is not None and alarm.rings():
            self._lowered = True
            self._interruptions += everyone
            raise Interrupted
        if everyone:
            self._interruptions = 0
        return read, missed

    def _put_off(self, sessions: set[str], named: set[int]) -> set[int]:
        """Leave to the next look whose memory is unread, where pages have told of others; return who that is.

        Whoever stands below a member is read now: nobody is to be signalled before it is known that they are not spared.
        """
        processes = self._processes
        parents = named | {pid for pid, one in processes.items() if not sessions.isdisjoint(one.pages)}
        if not parents:
            return set()
        off = set()
        for pid in list(self._unread):
            above, seen = pid, set()
            while above in processes and above not in parents and above not in seen:
                seen.add(above)
                above = processes[above].ppid
            if above not in parents:
                off.add(pid)
                self._leave(pid)
        return off

    def _leave(self, pid: int) -> None:
        """Be as if ``pid`` had not been read: the next look does that."""
        self._unread.pop(pid, None)
        known = self._known.get(pid)
        if known is not None:
            self._forget(pid)
            if known.id is not None and (handle := self.claim(known.id)) is not None:
                os.close(handle)

    def look_ahead(self, sessions: Sequence[Session]) -> Iterator[Snapshot]:
        """Yield, some at a time, who can belong to ``sessions`` as known pages alone tell, each held by a pidfd.

        Of each one all is there that stands below it, so who is in one snapshot can be signalled before the next is
        taken: a pool ends while the rest of it is read. Whom nothing tells so quickly is left to ``look()``: then there
        is somebody in ``unread``.
        """
        uids = {session.uid for session in sessions}
        last_pid = self.proc.last_pid()
        new = self._list()
        adopters = {id_ for session in sessions for id_ in session.adopters}
        living = self._living_of(adopters)
        trees: dict[int, list[int]] = {}
        for pid, top in self._left_to({1, *self._pids_of(adopters, new)}, uids, new).items():
            trees.setdefault(top, []).append(pid)
        batch: list[list[int]] = []
        most = _AHEAD
        for tree in trees.values():
            batch.append(tree)
            if sum(map(len, batch)) >= most:
                yield self._read_ahead(batch, uids, last_pid, living)
                batch, most = [], 2 * most
        if batch:
            yield self._read_ahead(batch, uids, last_pid, living)

    def _read_ahead(
        self, trees: list[list[int]], uids: set[int], last_pid: int, adopters: frozenset[ProcessId]
    ) -> Snapshot:
        self._unread = {}
        unread: dict[int, int] = {}
        read = self._read_each((pid for tree in trees for pid in tree), hold=True)
        # Nobody is to be signalled before the children that it has by now are known, too.
        may_have_grown = self.proc.last_pid() != last_pid
        for tree in trees:
            if (may_have_grown and self._has_grown(tree)) or not self._unread.keys().isdisjoint(tree):
                unread.update((pid, uid) for uid in uids for pid in tree)
                for pid in tree:
                    self._leave(pid)
                read.difference_update(tree)
        self._unread = {}
        self._cut_false_links(read)
        told = {pid: self._processes[pid] for pid in read if pid in self._processes}
        return Snapshot(told, adopters, unread=unread)

    def _has_grown(self, tree: list[int]) -> bool:
        known = set(tree)
        return any(not known.issuperset(self._children(pid)) for pid in tree)

    def _left_to(self, parents: set[int], uids: set[int], new: list[int]) -> dict[int, int]:
        """Return those of ``new`` that are of ``uids`` and stand below ``parents``, as quickly as that can be told.

        The values tell who of them is the topmost above each.
        """
        above: dict[int, tuple[int, int | None]] = {}
        gone: set[int] = set()  # who named one of them as its parent has been left by it
        for pid in new:
            try:
                above[pid] = self._parent(pid)
            except ProcessGone:
                gone.add(pid)
            except (PermissionError, ValueError):
                continue
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
        return {pid: top for pid, top in tops.items() if above[pid][1] is None or above[pid][1] in uids}

    def _parent(self, pid: int) -> tuple[int, int | None]:
        """Return the parent of ``pid`` and its uid, None for one that is not told as quickly."""
        handle = pidfd.open_pid(pid)
        try:
            told = pidfd.info(handle)
        finally:
            os.close(handle)
        return (self.proc.stat(pid).ppid, None) if told is None else (told.ppid, told.uid)

    def _pids_of(self, ids: Iterable[ProcessId], new: list[int]) -> set[int]:
        """Return the pids of those of ``ids`` that live, whether they were read before or are among the ``new``."""
        unread = set(new)
        return {id_.pid for id_ in ids if self._is_known(id_) or (id_.pid in unread and self.is_alive(id_))}

    def _passed_over(self, *, everyone: bool) -> set[int]:
        """Return who was read and may be somebody's by now; the age of a process never changes."""
        if not everyone and not self._lowered:
            return set()
        self._lowered = False
        first = min(self._oldest.values(), default=0)
        return {
            pid
            for pid, one in self._known.items()
            if one.id is not None and one.id.start_ticks >= first and (everyone or one.process is None)
        }

    def _list(self, listing: dict[int, int] | None = None) -> list[int]:
        """List all processes, forget who is gone, and return who is new, the newest first: some do not live long."""
        before, self._listing = self._listing, self.proc.listing() if listing is None else listing
        if self._listing != before:
            for pid in [pid for pid, one in self._known.items() if self._listing.get(pid) != one.inode]:
                self._forget(pid)
        return sorted(self._listing.keys() - self._known.keys(), reverse=True)

    def _forget(self, pid: int) -> None:
        del self._known[pid]
        self._unsettled.discard(pid)
        self.changes += self._processes.pop(pid, None) is not None

    def _living_of(self, ids: Iterable[ProcessId]) -> frozenset[ProcessId]:
        return frozenset(id_ for id_ in ids if self._is_known(id_) or self.is_alive(id_))

    def _is_known(self, id_: ProcessId) -> bool:
        known = self._known.get(id_.pid)
        return known is not None and known.id == id_

    def _read_in_turn(self) -> None:
        """Read some of those again who seemed to be nobody's: they may have become other programs."""
        until_s = time.monotonic() + _TURN_S
        if not self._turn:
            self._turn = list(self._known)
        while self._turn and time.monotonic() < until_s:
            pid = self._turn.pop()
            if pid in self._known and pid not in self._unread:
                self._read_each([pid], hold=False)

    # -- one process -------------------------------------------------------------------------

    def _read_each(
        self,
        pids: Iterable[int],
        *,
        hold: bool,
        afresh: Container[int] = frozenset(),
        alarm: Alarm | None = None,
    ) -> set[int]:
        """Read ``pids`` and return the pids of those who can belong to a session; ``afresh`` what the image tells as well."""
        read = set()
        for count, pid in enumerate(pids):
            if alarm is not None and count % _BETWEEN_ALARMS == 0 and alarm.rings():
                break
            try:
                known = self._read_again(pid) if pid not in afresh else None
                # Whom the image alone tells is judged by what it was before: good enough for nobody's signal.
                again = known is not None and hold
                if known is None:
                    known = self._read(pid, hold=hold)
            except ProcessGone:
                continue  # the next listing lacks it
            except (PermissionError, ValueError):
                known, again = _Known(), False
            if pid in self._unread:
                self._unread[pid] = self._unread[pid]._replace(before=self._known.get(pid))
            inode = self._listing.get(pid, 0)
            self._known[pid] = known if known.inode == inode else known._replace(inode=inode)
            if known.settled:
                self._unsettled.discard(pid)
            else:
                self._unsettled.add(pid)
            before = self._processes.pop(pid, None)
            if known.process is None:
                self.changes += before is not None
            else:
                self.changes += not _is_alike(before, known.process)
                self._processes[pid] = known.process
                self._newest_ticks = max(self._newest_ticks, known.process.id.start_ticks)
                if not again:
                    read.add(pid)
        return read

    def _read_again(self, pid: int) -> _Known | None:
        """Return what is known, brought up to date, where the process still runs the program that it ran then."""
        known = self._known.get(pid)
        if known is None or known.id is None or not known.image:
            return None
        process = known.process
        if process is None and self._can_belong(known.uid, known.id):
            return None
        stat = self.proc.stat(pid)
        if stat.dead or (stat.id, stat.image) != (known.id, known.image) or stat.state == "D":
            return None
        if not known.settled:
            handle = pidfd.open_pid(pid)
            try:
                if self._uid(pid, handle) != known.uid:
                    return None
            finally:
                os.close(handle)
        if process is not None:
            now = (stat.ppid, stat.comm, stat.rss_bytes, stat.cpu_ticks)
            if now != (process.ppid, process.comm, process.rss_bytes, process.cpu_ticks):
                ppid, comm, rss_bytes, cpu_ticks = now
                process = process._replace(ppid=ppid, comm=comm, rss_bytes=rss_bytes, cpu_ticks=cpu_ticks)
        settled = known.settled or _is_settled(stat)
        if process is known.process and settled == known.settled:
            return known
        return known._replace(process=process, settled=settled)

    def _read(self, pid: int, *, hold: bool) -> _Known:
        """Return what ``pid`` is now; ProcessGone, or what reading it raises."""
        handle = pidfd.open_pid(pid) if len(self._held) < self._most_held else -1
        try:
            stat = self.proc.stat(pid)
            if stat.dead:
                return _Known()
            known = self._describe(stat, handle, hurried=hold)
            if hold and handle >= 0 and known.process is not None and stat.id not in self._held:
                self._held[stat.id] = handle
                handle = -1
            return known
        finally:
            if handle >= 0:
                os.close(handle)

    def _describe(self, stat: Stat, handle: int, *, hurried: bool) -> _Known:
        id_, pid = stat.id, stat.id.pid
        oldest = min(self._oldest.values(), default=id_.start_ticks + 1)
        if id_.start_ticks < oldest or stat.flags & PF_KTHREAD:
            return _Known(id_)  # that never changes
        uid = self._uid(pid, handle)
        if not self._can_belong(uid, id_):
            return _Known(id_, uid, None, stat.image, _is_settled(stat))
        marks, wish = self.marks.read_descriptors(stat, uid, hurried=hurried)
        process = Process(
            id=id_,
            ppid=stat.ppid,
            uid=uid,
            comm=stat.comm,
            forked=stat.forked,
            pages=marks.pages,
            spared=marks.spared,
            # A session page tells enough.
            cgroup=wire.parse_cgroup(self.proc.cgroup(pid)) if wish or self.reads_cgroups else None,
            rss_bytes=stat.rss_bytes,
            cpu_ticks=stat.cpu_ticks,
        )
        known = _Known(id_, uid, process, 0, settled=False)
        if wish is not None:
            whole = known._replace(image=stat.image, settled=_is_settled(stat))
            self._unread[pid] = _Unread(whole, marks, wish)
        return known

    def _uid(self, pid: int, handle: int) -> int | None:
        told = pidfd.info(handle) if handle >= 0 else None
        return told.uid if told is not None else parse_uid(self.proc.status(pid))

    def _read_memory(self, alarm: Alarm | None) -> _Missed:
        """Put the marks that lie in memory on those who were read, and return whose could not be read.

        Who runs the program that it ran before has the marks that it had; without any, nobody is taken for settled.
        """
        unread, self._unread = self._unread, {}
        memories = self.marks.memory.read([one.wish for one in unread.values()], alarm) if unread else {}
        missed = _Missed({}, set())
        for pid, one in unread.items():
            known, process, now = one.known, one.known.process, self._known.get(pid)
            if now is None or process is None or now.id != known.id:
                continue  # gone meanwhile
            if pid in memories:
                marks = self.marks.with_memory(one.marks, memories[pid], pid, known.uid)
                process = _marked(process, marks)
            elif (before := _same_program(one)) is not None:
                pages, spared = one.marks.pages | before.pages, one.marks.spared | before.spared
                marks = Marks(before.argv, before.lineage, pages, spared)
                process = _marked(process, marks)
            else:
                if known.uid is not None and not process.pages:
                    if self.is_alive(process.id):
                        missed.unread[pid] = known.uid
                    else:
                        missed.vanished.add(known.uid)
                continue
            self._known[pid] = known._replace(process=process, inode=now.inode)
            self._processes[pid] = process
            self.changes += 1
            if known.settled:
                self._unsettled.discard(pid)
        return missed

    def _cut_false_links(self, read: set[int]) -> None:
        """Keep a parent link only where the parent is still who it was when it was read.

        A pid that was given to another process in the middle of the pass would else pass its children off as a
        member's. Only the young can be such children.
        """
        young = _ticks_now() - 10 * TICKS_PER_S
        same: dict[int, bool] = {}
        for pid in read & self._processes.keys():  # some ended before the second listing
            process = self._processes[pid]
            if process.id.start_ticks < young or process.ppid not in self._processes:
                continue
            if process.ppid not in same:
                same[process.ppid] = self._is_unchanged(process.ppid)
            if not same[process.ppid]:
                self._processes[pid] = process._replace(ppid=0)
                self.changes += 1

    def _is_unchanged(self, pid: int) -> bool:
        id_ = self._processes[pid].id
        try:
            stat = self.proc.stat(pid)
        except ProcessGone:
            return True  # it ended after the pass had seen it; nobody has its pid
        # In the same tick somebody else can have got its pid: what a pidfd says goes before what ids say.
        held = self._held.get(id_)
        return stat.id == id_ and (held is None or stat.dead or not pidfd.has_exited(held))

    def _children(self, pid: int) -> list[int]:
        try:
            return self.proc.children(pid)
        except (ProcessGone, PermissionError):
            return []

    # -- handles -----------------------------------------------------------------------------

    def claim(self, process_id: ProcessId) -> int | None:
        """Return the pidfd that was opened before ``process_id`` was read; it is the caller's to close from now on."""
        return self._held.pop(process_id, None)

    def release(self) -> None:
        """Close the pidfds that nobody claimed."""
        while self._held:
            os.close(self._held.popitem()[1])

    # -- who is a leader ---------------------------------------------------------------------

    def ancestors(self, pid: int) -> frozenset[ProcessId]:
        """Return who stands above ``pid`` now, init apart."""
        found: set[ProcessId] = set()
        with contextlib.suppress(ProcessGone):
            _, pid = self.proc.parent(pid)
            while pid > 1 and len(found) < _MAX_ANCESTORS:
                id_, pid = self.proc.parent(pid)
                found.add(id_)
        return frozenset(found)

    def descendants(self, leader: ProcessId) -> Iterator[int]:
        """Yield the pids below ``leader`` as they stand now."""
        pending, seen = self._children(leader.pid), {leader.pid}
        while pending:
            pid = pending.pop()
            if pid not in seen:
                seen.add(pid)
                pending += self._children(pid)
                yield pid

    def look_below(self, session: Session) -> Snapshot:
        """Return the leader and all that stands below it now: what was started before it registered, too."""
        self.cover(session)
        below = {*self.descendants(session.leader), *(id_.pid for id_ in session.kept)}
        if not below:  # as nearly always: who registers has started nobody yet
            return Snapshot({})
        processes = self._read_alone(below)
        processes.update(self._read_alone([session.leader.pid], memory=False))
        adopters = frozenset(id_ for id_ in session.adopters if self.is_alive(id_))
        return Snapshot(processes, adopters)

    def _read_alone(self, pids: Iterable[int], *, memory: bool = True) -> dict[int, Process]:
        """Return what ``pids`` are, of those that can belong to a session; nothing of it is kept."""
        found: dict[int, Process] = {}
        self._unread = {}
        for pid in pids:
            with contextlib.suppress(ProcessGone, PermissionError, ValueError):
                process = self._read(pid, hold=False).process
                if process is not None:
                    found[pid] = process
        unread, self._unread = self._unread, {}
        if memory and unread:
            for pid, told in self.marks.memory.read([one.wish for one in unread.values()]).items():
                one = unread[pid]
                found[pid] = _marked(found[pid], self.marks.with_memory(one.marks, told, pid, one.known.uid))
        return found

    def owner(self, pid: int) -> tuple[int | None, int | None]:
        """Return uid and gid of ``pid``, None where its ids are mixed."""
        status = self.proc.status(pid)
        return parse_uid(status), parse_gid(status)

    def cgroup_path(self, pid: int) -> str:
        """Return the cgroup that tells ``pid``'s session from others; "/" tells nothing."""
        return wire.parse_cgroup(self.proc.cgroup(pid))

    def oom_kills_in(self, session: Session) -> int | None:
        """Return the OOM kills counted in the memory cgroup that ``session``'s leader was in when it registered."""
        return cgroup.oom_kills(session.oom_counter) if session.oom_counter else None

    def oom_counter(self, pid: int) -> str:
        """Return the file that counts OOM kills where ``pid`` runs, "" where none does."""
        return self._oom_counters.find(self.proc.cgroup(pid)).path

    def is_alive(self, process_id: ProcessId) -> bool:
        """Say whether ``process_id`` still runs."""
        try:
            stat = self.proc.stat(process_id.pid)
        except ProcessGone:
            return False
        return stat.id == process_id and not stat.dead

    def is_condemned(self, pid: int) -> bool:
        """Say whether ``pid`` is on its way out: SIGKILL is pending, or it frees its memory already."""
        try:
            return self.proc.stat(pid).exiting or has_pending_sigkill(self.proc.status(pid))
        except ProcessGone:
            return True

    def describe_leader(self, session: Session) -> Session:
        """Return ``session`` with what only its living leader tells; ProcessGone."""
        pid = session.leader.pid
        cgroups, namespaces = self.proc.cgroup(pid), self.proc.namespaces(pid)
        counter = self._oom_counters.find(cgroups)
        return session._replace(
            cgroup=wire.parse_cgroup(cgroups),
            adopters=(adopters := self.ancestors(pid)),
            init=self._init_among(adopters, namespaces.pid),
            namespaces=namespaces,
            oom_counter=counter.path,
            oom_kills=counter.kills,
        )

    def _init_among(self, adopters: frozenset[ProcessId], namespace: str) -> ProcessId | None:
        """Return the init of a pid namespace, None where that is not among ``adopters``."""
        for id_ in adopters if namespace != self._namespaces.pid else ():
            with contextlib.suppress(ProcessGone):
                if self.proc.namespaces(id_.pid).pid == namespace and self.namespaced_pid(id_.pid) == 1:
                    return id_
        return None

    def open_page(self, leader: int, page_fd: int, uid: int) -> int:
        """Return a descriptor of ours for the page that ``leader`` has at ``page_fd``.

        ProcessGone; FileNotFoundError: it has no such descriptor; OSError; WireError: that is no page.
        """
        task = self.proc.living_task(self.proc.stat(leader))
        if self.proc.memfd_inode(leader, task, page_fd) is None:
            raise wire.WireError("bad-page", "the session page is no memfd")
        return page.open_page(self.proc.descriptor_path(leader, task, page_fd), uid=uid)

    def open_mapped_page(self, pid: int, addresses: str, uid: int) -> int:
        """Return a descriptor of ours for the page that ``pid`` has mapped; as ``open_page()``."""
        return page.open_page(self.proc.mapping_path(pid, addresses), uid=uid)

    def leader(self, session: Session) -> Process | None:
        """Return the leader as it is now, None when it is dead, or another user's."""
        self.cover(session)
        process = self._read_alone([session.leader.pid], memory=False).get(session.leader.pid)
        if process is None or (process.id, process.uid) != (session.leader, session.uid):
            return None
        return process

    def cmdlines(self, ids: Iterable[ProcessId]) -> dict[int, list[str]]:
        """Return the command lines of ``ids``, by pid; whoever is gone, or cannot be read in time, has none."""
        memories = self.marks.memory.read(self._wishes(ids, argv=True))
        return {pid: list(memory.argv) for pid, memory in memories.items()}

    def shm_mapped(self, ids: Iterable[ProcessId]) -> list[str]:
        """Return the paths in /dev/shm that ``ids`` have mapped."""
        memories = self.marks.memory.read(self._wishes(ids, maps=(f"{SHM}/",)))
        return [one.path for memory in memories.values() for one in memory.mapped]

    def _wishes(
        self, ids: Iterable[ProcessId], *, argv: bool = False, maps: tuple[str, ...] = ()
    ) -> Iterator[Wish]:
        for id_ in ids:
            with contextlib.suppress(ProcessGone, ValueError):
                stat = self.proc.stat(id_.pid)
                if stat.id == id_:
                    yield Wish(stat, self.proc.living_task(stat), argv=argv, maps=maps)

    def namespaced_pid(self, pid: int) -> int | None:
        """Return the pid that ``pid`` has in its own, innermost pid namespace (the last field of NSpid)."""
        if self.proc.pid_namespace(pid) == self._namespaces.pid != "":
            return pid  # and /proc/PID/status need not be written out
        return parse_innermost_pid(self.proc.status(pid))

    def same_ticks(self, process_id: ProcessId, told_ticks: int) -> bool:
        """Say whether a start time that ``process_id`` told of itself is right; not comparable across time namespaces."""
        if process_id.start_ticks == told_ticks:
            return True
        return self.proc.namespaces(process_id.pid).time != self._namespaces.time

    def could_be_orphan(self, holder: ProcessId, leader: ProcessId) -> bool:
        """Say whether ``holder`` can have been left by a dead ``leader`` that it names.

        Only where pids and times mean here what they mean to ``holder``, and where that leader is really dead.
        """
        theirs, ours = self.proc.namespaces(holder.pid), self._namespaces
        if (theirs.pid, theirs.time) != (ours.pid, ours.time) or holder.start_ticks < leader.start_ticks:
            return False
        try:
            stat = self.proc.stat(leader.pid)
        except ProcessGone:
            return True
        return stat.id != leader or stat.dead

    def shares_our_namespaces(self, session: Session) -> bool:
        """Say whether the pids and paths of ``session`` mean here what they mean there."""
        ours = self._namespaces
        return session.namespaces.pid == ours.pid and session.namespaces.mnt == ours.mnt

    # -- figures for people ------------------------------------------------------------------

    def usage(self, process: Process) -> Usage:
        """Return what ``process`` takes of the machine."""
        now_s = time.monotonic()
        seen_s, seen_ticks = self._cpu.get(process.id, (0.0, 0))
        if not seen_s or now_s - seen_s < 0.05:
            age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - process.id.start_ticks / TICKS_PER_S
            seen_s, seen_ticks = now_s - max(age_s, 1 / TICKS_PER_S), 0
        busy_s = (process.cpu_ticks - seen_ticks) / TICKS_PER_S
        return Usage(100 * max(busy_s, 0.0) / (now_s - seen_s), process.rss_bytes)

    def note_usage_of(self, ids: Iterable[ProcessId]) -> None:
        """Remember the CPU times of ``ids`` as they were when last looked at."""
        processes = (self._processes.get(id_.pid) for id_ in ids)
        self.note_usage(process for process in processes if process is not None)

    def note_usage(self, processes: Iterable[Process]) -> None:
        """Remember CPU times for the next ``usage()``; the one before last is kept while the last is too young."""
        now_s = time.monotonic()
        self._cpu = {
            process.id: self._cpu[process.id]
            if process.id in self._cpu and now_s - self._cpu[process.id][0] < _USAGE_S
            else (now_s, process.cpu_ticks)
            for process in processes
        }


def _same_program(one: _Unread) -> Process | None:
    """Return what was read of a process before, where it runs the same program still."""
    before = one.before
    return before.process if before is not None and one.known.image == before.image != 0 else None


def _is_alike(one: Process | None, other: Process) -> bool:
    """Say whether nothing has changed but what a process takes of the machine."""
    if one is None or one is other:
        return one is other
    return one._replace(rss_bytes=other.rss_bytes, cpu_ticks=other.cpu_ticks) == other


def _marked(process: Process, marks: Marks) -> Process:
    argv, lineage, pages, spared = marks
    return process._replace(argv=argv, lineage=lineage, pages=pages, spared=spared)


def _is_settled(stat: Stat) -> bool:
    return _ticks_now() - stat.id.start_ticks > _YOUNG_TICKS


def _ticks_now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_PER_S
