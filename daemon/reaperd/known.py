"""All processes that there are, and what was read of each: who is new, who is gone, who has changed."""

from __future__ import annotations

from collections.abc import Container, Iterable, KeysView
from typing import NamedTuple

from reaperd.coverage import Coverage
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import TICKS_PER_S, ProcessGone, ProcessHidden, ProcFS
from reaperd.marks import MarkReader, Marks
from reaperd.model import Process, ProcessId
from reaperd.reading import Handles, Known, ProcessReader, Unread, marked, ticks_now

_BETWEEN_ALARMS = 16  # processes
_MOST_STARTED = 256  # ids; to list all costs no more than to try as many


class Missed(NamedTuple):
    """Who could not be read: lets nobody do so, or was gone before."""

    unread: dict[int, int]  # uids by pid
    vanished: set[int]  # uids


class KnownProcesses:
    """What was read, by pid."""

    def __init__(
        self, proc: ProcFS, marks: MarkReader, coverage: Coverage, reader: ProcessReader, handles: Handles
    ) -> None:
        self._proc = proc
        self._marks = marks
        self._coverage = coverage
        self._reader = reader
        self._handles = handles
        self._known: dict[int, Known] = {}
        # The inodes of /proc/PID: a pid with another one is another process.
        self._listing: dict[int, int] = {}
        self._last_pid = 0  # that had been given away when all were listed
        self._newest_ticks = 0  # nobody has been read who started later
        self.processes: dict[int, Process] = {}  # of those known
        self.unsettled: set[int] = set()
        self.unread: dict[int, Unread] = {}  # by this look: each begins with none
        self.changes = 0  # how often anything has changed by which it is told who belongs to a session

    def pids(self) -> KeysView[int]:
        """Return who was read, or tried to."""
        return self._known.keys()

    def could_read(self, pid: int) -> bool:
        """Say whether ``pid`` was there, and no zombie, when it was read."""
        known = self._known.get(pid)
        return known is not None and known.id is not None

    def list_all(self, listing: dict[int, int] | None = None) -> list[int]:
        """List all processes, forget who is gone, and return who is new, the newest first: some do not live long."""
        self._last_pid = self._proc.last_pid() if listing is None else 0
        before, self._listing = self._listing, self._proc.listing() if listing is None else listing
        if self._listing != before:
            for pid in [pid for pid, one in self._known.items() if self._listing.get(pid) != one.inode]:
                self.forget(pid)
        return sorted(self._listing.keys() - self._known.keys(), reverse=True)

    def list_started(self) -> list[int]:
        """Return who may have started since all were listed, the newest first: the ids given away since, threads' too."""
        before, last = self._last_pid, self._proc.last_pid()
        self._last_pid = last
        if not before <= last <= before + _MOST_STARTED:  # too many to be tried, or they began anew
            return self.list_all()
        return [pid for pid in range(last, before, -1) if pid not in self._known]

    def forget(self, pid: int) -> None:
        """Be as if ``pid`` had not been read."""
        del self._known[pid]
        self.unsettled.discard(pid)
        self.changes += self.processes.pop(pid, None) is not None

    def forget_newer(self, uid: int, ticks: int) -> None:
        """Forget those of ``uid`` that started at ``ticks`` or later."""
        for pid, process in list(self.processes.items()) if ticks <= self._newest_ticks else ():
            if process.uid == uid and process.id.start_ticks >= ticks:
                self.forget(pid)

    def forget_uncovered(self) -> None:
        """Forget the marks of those that can no longer belong to a session."""
        for pid, process in list(self.processes.items()):
            if not self._coverage.can_belong(process.uid, process.id):
                del self.processes[pid]
                self.changes += 1
                self._known[pid] = self._known[pid]._replace(process=None)

    def leave(self, pid: int) -> None:
        """Be as if ``pid`` had not been read by this look: the next one does that."""
        self.unread.pop(pid, None)
        known = self._known.get(pid)
        if known is not None:
            self.forget(pid)
            if known.id is not None:
                self._handles.close(known.id)

    def pids_of(self, ids: Iterable[ProcessId], new: list[int]) -> set[int]:
        """Return the pids of those of ``ids`` that live, whether they were read before or are among the ``new``."""
        unread = set(new)
        return {
            id_.pid for id_ in ids if self._is_known(id_) or (id_.pid in unread and self._proc.is_alive(id_))
        }

    def living_of(self, ids: Iterable[ProcessId]) -> frozenset[ProcessId]:
        """Return those of ``ids`` that live."""
        return frozenset(id_ for id_ in ids if self._is_known(id_) or self._proc.is_alive(id_))

    def _is_known(self, id_: ProcessId) -> bool:
        known = self._known.get(id_.pid)
        return known is not None and known.id == id_

    def passed_over(self, *, everyone: bool) -> set[int]:
        """Return who was read and may be somebody's by now; the age of a process never changes."""
        first = self._coverage.first_ticks or 0
        return {
            pid
            for pid, one in self._known.items()
            if one.id is not None and one.id.start_ticks >= first and (everyone or one.process is None)
        }

    # -- reading -----------------------------------------------------------------------------

    def read_each(
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
                unread = None
                known = self._reader.read_again(pid, self._known.get(pid)) if pid not in afresh else None
                # Whom the image alone tells is judged by what it was before: good enough for nobody's signal.
                again = known is not None and hold
                if known is None:
                    known, unread = self._reader.read(pid, hold=hold)
            except (ProcessHidden, PermissionError, ValueError):
                known, again = Known(), False
            except ProcessGone:
                continue  # the next listing lacks it
            if unread is not None:
                self.unread[pid] = unread._replace(before=self._known.get(pid))
            inode = self._listing.get(pid, 0)
            self._known[pid] = known if known.inode == inode else known._replace(inode=inode)
            if known.settled:
                self.unsettled.discard(pid)
            else:
                self.unsettled.add(pid)
            before = self.processes.pop(pid, None)
            if known.process is None:
                self.changes += before is not None
            else:
                self.changes += not _is_alike(before, known.process)
                self.processes[pid] = known.process
                self._newest_ticks = max(self._newest_ticks, known.process.id.start_ticks)
                if not again:
                    read.add(pid)
        return read

    def read_memory(self, alarm: Alarm | None) -> Missed:
        """Put the marks that lie in memory on those who were read, and return whose could not be read.

        Who runs the program that it ran before has the marks that it had; without any, nobody is taken for settled.
        """
        unread, self.unread = self.unread, {}
        memories = self._marks.memory.read([one.wish for one in unread.values()], alarm) if unread else {}
        interrupted = alarm is not None and alarm.rings()
        missed = Missed({}, set())
        for pid, one in unread.items():
            known, process, now = one.known, one.known.process, self._known.get(pid)
            if now is None or process is None or now.id != known.id:
                continue  # gone meanwhile
            if interrupted and pid not in memories:
                self.leave(pid)  # for what goes first it is to be new, not one who bears no mark
                continue
            if pid in memories:
                process = self._reader.with_memory(one, process, memories[pid])
            elif (before := _same_program(one)) is not None:
                pages, spared = one.marks.pages | before.pages, one.marks.spared | before.spared
                marks = Marks(before.argv, before.lineage, pages, spared)
                process = marked(process, marks)
            else:
                if known.uid is not None and not process.pages:
                    if self._proc.is_alive(process.id):
                        missed.unread[pid] = known.uid
                    else:
                        missed.vanished.add(known.uid)
                continue
            self._known[pid] = known._replace(process=process, inode=now.inode)
            self.processes[pid] = process
            self.changes += 1
            if known.settled:
                self.unsettled.discard(pid)
        return missed

    def cut_false_links(self, read: set[int]) -> None:
        """Keep a parent link only where the parent is still who it was when it was read.

        A pid that was given to another process in the middle of the pass would else pass its children off as a
        member's. Only the young can be such children.
        """
        young = ticks_now() - 10 * TICKS_PER_S
        same: dict[int, bool] = {}
        for pid in read & self.processes.keys():  # some ended before the second listing
            process = self.processes[pid]
            if process.id.start_ticks < young or process.ppid not in self.processes:
                continue
            if process.ppid not in same:
                same[process.ppid] = self._is_unchanged(process.ppid)
            if not same[process.ppid]:
                self.processes[pid] = process._replace(ppid=0)
                self.changes += 1

    def _is_unchanged(self, pid: int) -> bool:
        id_ = self.processes[pid].id
        try:
            stat = self._proc.stat(pid)
        except ProcessGone:
            return True  # it ended after the pass had seen it; nobody has its pid
        # In the same tick somebody else can have got its pid: what a pidfd says goes before what ids say.
        return stat.id == id_ and (stat.dead or not self._handles.has_exited(id_))


def _same_program(one: Unread) -> Process | None:
    """Return what was read of a process before, where it runs the same program still."""
    before = one.before
    return before.process if before is not None and one.known.image == before.image != 0 else None


def _is_alike(one: Process | None, other: Process) -> bool:
    """Say whether nothing has changed but what a process takes of the machine."""
    if one is None or one is other:
        return one is other
    return one._replace(rss_bytes=other.rss_bytes, cpu_ticks=other.cpu_ticks) == other
