"""Looks at who is there: at all processes, at those who can have been left by a leader, or at those below one.

A look lists all processes and reads those that are new. Of those who were read before, it reads anew whom its depth names
and whoever was young then: a process that has just been forked may still become another user's, or another program.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from reaperd import kinship
from reaperd.coverage import Coverage
from reaperd.isolation import is_within
from reaperd.known import KnownProcesses, Missed
from reaperd.linux.alarm import Alarm
from reaperd.linux.cgroups import CGroups
from reaperd.linux.procfs import ProcFS
from reaperd.marks import MarkReader
from reaperd.model import Process, ProcessId, Session, SessionKey, Snapshot
from reaperd.reading import Handles, ProcessReader

# A scan reads some of those again who seemed to be nobody's, for so long: they may have become other programs.
_TURN_S = 0.0003
_AHEAD = 32  # processes that are read before the first of them are signalled; then twice as many, and so on
# A look that took longer asks once more who is there: a worker may have forked meanwhile.
_RELIST_S, _MAX_RELISTS = 0.001, 3

_MAX_INTERRUPTIONS = 10  # of looks at everybody, in a row
_MANY = 64  # processes, of those who are new at a scan; after so long with them whoever asks for something is answered
_AT_A_TIME_S = 0.02


class Interrupted(Exception):
    """Something goes first: a leader has died while we looked at something else, or others have waited for long enough."""


class Census:
    """Snapshots of one /proc."""

    def __init__(
        self,
        proc: ProcFS,
        marks: MarkReader,
        alarm: Alarm | None = None,
        *,
        cgroups: CGroups | None = None,
    ) -> None:
        """``alarm`` interrupts what nobody waits for: looks at the living, and at everybody."""
        self._proc = proc
        self._alarm = alarm
        self._cgroups = cgroups or CGroups()
        self._coverage = Coverage(marks.pages)
        self.handles = Handles()
        self.reader = ProcessReader(proc, marks, self._coverage, self.handles)
        self.known = KnownProcesses(proc, marks, self._coverage, self.reader, self.handles)
        self._turn: list[int] = []
        self._at_a_time_s = _AT_A_TIME_S
        self._interruptions = 0  # in a row, of looks at everybody
        self._uncovered = False  # some session is over, which may have been the first
        self._lowered = False  # older processes matter than did: some were passed over who matter now

    def is_interrupted(self) -> bool:
        """Say whether a leader has died, which goes before whatever nobody waits for."""
        return self._alarm is not None and self._alarm.rings()

    def cover(self, session: Session) -> None:
        """From now on, read the marks of whoever can belong to ``session``."""
        if session.key not in self._coverage:
            self._lowered |= self._coverage.add(session)
            # Who was read before carries marks of it that meant nothing then. A leader is seldom older than the last look.
            self.known.forget_newer(session.uid, session.leader.start_ticks)

    def uncover(self, key: SessionKey) -> None:
        """Read marks no longer on account of this session."""
        self._coverage.remove(key)
        self._uncovered = True

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
        self.known.unread.clear()
        new = self.known.list_all(listing)
        named = self.known.pids_of(again, new)
        if hold and not everyone:
            # Who is read again is there for some reason, and may have started one by now whom no mark tells.
            named |= self._residents(sessions)
            parents = {1, *named, *self.known.pids_of({*adopters, *members}, new)}
            read, missed = self._look_at_the_left(sessions, new, named, parents, hurried=hurried)
        else:
            read, missed = self._look_at_all(new, named, hold=hold, everyone=everyone)
        self.known.cut_false_links(read)
        return Snapshot(
            dict(self.known.processes),
            self.known.living_of(adopters),
            stale=frozenset(self.known.processes.keys() - read),
            unread=missed.unread,
            vanished=frozenset(missed.vanished),
        )

    def _residents(self, sessions: Sequence[Session]) -> set[int]:
        """Return who is in a control group of a session's own and was not read there yet: whatever else tells of him."""
        found = set()
        for scope in {scope for session in sessions if (scope := session.telling_scope)}:
            for pid in self._cgroups.residents(scope) - {0}:
                known = self.known.processes.get(pid)
                if known is None or not (known.pages or is_within(known.cgroup, scope)):
                    found.add(pid)
        return found

    def read_new(self, listing: dict[int, int]) -> None:
        """Read who is new in ``listing``, as a look at the living would; Interrupted where that takes long.

        What was read until then need not be read by the next one.
        """
        until_s = time.monotonic() + self._at_a_time_s
        self.known.unread.clear()
        new = self.known.list_all(listing)
        for at in range(0, len(new), _MANY):
            if self.is_interrupted():
                raise Interrupted
            if at > 0 and time.monotonic() >= until_s:
                self._at_a_time_s *= 2  # as many more may be new the next time
                raise Interrupted
            read = self.known.read_each(new[at : at + _MANY], hold=False)
            self.known.read_memory(self._alarm)
            self.known.cut_false_links(read)
        self._at_a_time_s = _AT_A_TIME_S

    def _look_at_the_left(
        self,
        sessions: Sequence[Session],
        new: list[int],
        named: set[int],
        parents: set[int],
        *,
        hurried: bool,
    ) -> tuple[set[int], Missed]:
        """Read ``named``, and those of ``new`` that are below ``parents``; return who was read, and who could not be."""
        uids = {session.uid for session in sessions}
        began_s = time.monotonic()
        tops, vanished = kinship.left_to(self._proc, parents, uids, new)
        left = set(tops)
        read = self.known.read_each(sorted(left | named, reverse=True), hold=True, afresh=named)
        for _ in range(_MAX_RELISTS):
            if time.monotonic() - began_s <= _RELIST_S:
                break
            # A worker may have forked meanwhile: nobody is to be signalled before its children are known, too.
            started = self.known.list_started()
            began_s = time.monotonic()
            more = kinship.left_to(self._proc, parents | read, uids, started)
            if not more.tops:
                break
            left.update(more.tops)
            read |= self.known.read_each(more.tops, hold=True)
        vanished |= not all(map(self.known.could_read, left))
        off: set[int] = set()
        if hurried:
            off = self._put_off({session.id for session in sessions}, named)
        missed = self.known.read_memory(None)
        unread = missed.unread | {pid: uid for uid in uids for pid in off}
        return read - off, Missed(unread, missed.vanished | (uids if vanished else set()))

    def _look_at_all(
        self, new: list[int], named: set[int], *, hold: bool, everyone: bool
    ) -> tuple[set[int], Missed]:
        """Read all of ``new``, and whoever is due again; return who was read, and who could not be; Interrupted."""
        if self._uncovered:
            self._uncovered = False
            if self._coverage.narrow():
                self.known.forget_uncovered()
        due = named.union(new, self.known.unsettled)
        if everyone or self._lowered:
            self._lowered = False
            due |= self.known.passed_over(everyone=everyone)
        # Where leaders die all the time, one look at everybody must come to its end now and then.
        alarm = self._alarm if not everyone or self._interruptions < _MAX_INTERRUPTIONS else None
        # Of the living, only what another program can change is taken as read.
        afresh = named if hold else frozenset[int]()
        read = self.known.read_each(sorted(due, reverse=True), hold=hold, afresh=afresh, alarm=alarm)
        if not hold:
            self._read_in_turn()
        missed = self.known.read_memory(alarm)
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
        processes = self.known.processes
        parents = named | {pid for pid, one in processes.items() if not sessions.isdisjoint(one.pages)}
        if not parents:
            return set()
        off = set()
        for pid in list(self.known.unread):
            above, seen = pid, set()
            while above in processes and above not in parents and above not in seen:
                seen.add(above)
                above = processes[above].ppid
            if above not in parents:
                off.add(pid)
                self.known.leave(pid)
        return off

    def look_ahead(self, sessions: Sequence[Session]) -> Iterator[Snapshot]:
        """Yield, some at a time, who can belong to ``sessions`` as known pages alone tell, each held by a pidfd.

        Of each one all is there that stands below it, so who is in one snapshot can be signalled before the next is
        taken: a pool ends while the rest of it is read. Whom nothing tells so quickly is left to ``look()``: then there
        is somebody in ``unread``.
        """
        uids = {session.uid for session in sessions}
        last_pid = self._proc.last_pid()
        new = self.known.list_all()
        adopters = {id_ for session in sessions for id_ in session.adopters}
        living = self.known.living_of(adopters)
        # Whoever has a child that was read before is left to the look, too: the child is in no tree of those who are new.
        have_known = {process.ppid for process in self.known.processes.values()}
        trees: dict[int, list[int]] = {}
        parents = {1, *self.known.pids_of(adopters, new)}
        for pid, top in kinship.left_to(self._proc, parents, uids, new).tops.items():
            trees.setdefault(top, []).append(pid)
        batch: list[list[int]] = []
        most = _AHEAD
        for tree in trees.values():
            batch.append(tree)
            if sum(map(len, batch)) >= most:
                yield self._read_ahead(batch, uids, last_pid, have_known, living)
                batch, most = [], 2 * most
        if batch:
            yield self._read_ahead(batch, uids, last_pid, have_known, living)

    def _read_ahead(
        self,
        trees: list[list[int]],
        uids: set[int],
        last_pid: int,
        have_known: set[int],
        adopters: frozenset[ProcessId],
    ) -> Snapshot:
        self.known.unread.clear()
        unread: dict[int, int] = {}
        read = self.known.read_each((pid for tree in trees for pid in tree), hold=True)
        # Nobody is to be signalled before the children that it has by now are known, too.
        may_have_grown = self._proc.last_pid() != last_pid
        for tree in trees:
            has_grown = may_have_grown and kinship.have_grown(self._proc, tree)
            has_others = has_grown or not have_known.isdisjoint(tree)
            if has_others or not self.known.unread.keys().isdisjoint(tree):
                unread.update((pid, uid) for uid in uids for pid in tree)
                for pid in tree:
                    self.known.leave(pid)
                read.difference_update(tree)
        self.known.unread.clear()
        self.known.cut_false_links(read)
        told = {pid: self.known.processes[pid] for pid in read if pid in self.known.processes}
        return Snapshot(told, adopters, unread=unread)

    def _read_in_turn(self) -> None:
        """Read some of those again who seemed to be nobody's: they may have become other programs."""
        until_s = time.monotonic() + _TURN_S
        if not self._turn:
            self._turn = list(self.known.pids())
        while self._turn and time.monotonic() < until_s:
            pid = self._turn.pop()
            if pid in self.known.pids() and pid not in self.known.unread:
                self.known.read_each([pid], hold=False)

    # -- below a leader ----------------------------------------------------------------------

    def look_below(self, session: Session) -> Snapshot:
        """Return the leader and all that stands below it now: what was started before it registered, too."""
        self.cover(session)
        below = {*kinship.descendants(self._proc, session.leader), *(id_.pid for id_ in session.kept)}
        if not below:  # as nearly always: who registers has started nobody yet
            return Snapshot({})
        processes = self.reader.read_alone(below)
        processes.update(self.reader.read_alone([session.leader.pid], memory=False))
        adopters = frozenset(id_ for id_ in session.adopters if self._proc.is_alive(id_))
        return Snapshot(processes, adopters)

    def leader(self, session: Session) -> Process | None:
        """Return the leader as it is now, None when it is dead, or another user's."""
        self.cover(session)
        process = self.reader.read_alone([session.leader.pid], memory=False).get(session.leader.pid)
        if process is None or (process.id, process.uid) != (session.leader, session.uid):
            return None
        return process
