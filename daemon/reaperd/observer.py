"""What is there: reads /proc into snapshots and takes down who a leader is. Decides nothing, signals nobody.

While a snapshot of a dead leader's survivors is taken, a pidfd is opened for each process before anything of it is
read: whatever the evidence says then holds for exactly the process that a signal would reach.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from agent import wire
from reaperd.linux import cgroup, page, pidfd
from reaperd.linux.procfs import (
    TICKS_PER_S,
    ProcessGone,
    ProcFS,
    Stat,
    environment_value,
    has_pending_sigkill,
    parse_gid,
    parse_innermost_pid,
    parse_uid,
)
from reaperd.marks import MarkReader, PagesAt, pages_at_of
from reaperd.model import Process, ProcessId, Session, Snapshot, Usage

_MAX_ANCESTORS = 200
_USAGE_S = 1.0  # CPU shares are told over no less than that, where there is a choice


class Observer:
    """Reads one /proc."""

    def __init__(self, proc: ProcFS) -> None:
        self.proc = proc
        self.boot_id = proc.boot_id()
        self._held: dict[ProcessId, int] = {}
        self._cpu: dict[ProcessId, tuple[float, int]] = {}  # monotonic seconds and CPU ticks at the last scan
        # The reaper opens what is beyond this, and then compares start times.
        self._most_held = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        self.marks = MarkReader(proc)

    # -- snapshots ---------------------------------------------------------------------------

    def look_quick(self, session: Session) -> Snapshot:
        """Return the processes that can be what a leader just left, found through those who adopted them.

        That is a fraction of the work of reading everything, and complete for all that has a parent among them.
        """
        processes: dict[int, Process] = {}
        living = self._living(session.adopters)
        adopters = {1, *(id_.pid for id_ in living)}
        pending = [id_.pid for id_ in session.kept]
        for adopter in adopters:
            pending += self._children(adopter)
        while pending:
            pid = pending.pop()
            if pid in processes:
                continue
            process = self._read(pid, session, hold=True)
            if process is None:
                continue
            processes[pid] = process
            # Whoever carries no mark is followed too: its children may be a worker's that lost its environment.
            if process.ppid not in adopters or _marked(process, session) or self.marks.is_blocked(process):
                pending += self._children(pid)
        return self._whole(processes, pages_at_of([session]), living)

    def look(self, *sessions: Session) -> Snapshot:
        """Return every process that can belong to one of ``sessions``, each held by a pidfd."""
        return self._look_at(sessions, hold=True)

    def _living(self, adopters: frozenset[ProcessId]) -> frozenset[ProcessId]:
        """Return those of ``adopters`` that are still who they were."""
        living = set()
        for id_ in adopters:
            with contextlib.suppress(ProcessGone, PermissionError):
                if self.proc.stat(id_.pid).id == id_:
                    living.add(id_)
        return frozenset(living)

    def look_at_all(self, sessions: list[Session]) -> Snapshot:
        """Return every process that can belong to one of ``sessions``, whose leaders live."""
        return self._look_at(sessions, hold=False)

    def _look_at(self, sessions: Sequence[Session], *, hold: bool) -> Snapshot:
        oldest: dict[int, int] = {}
        for session in sessions:
            ticks = session.leader.start_ticks
            oldest[session.uid] = min(ticks, oldest.get(session.uid, ticks))
        pages_at = pages_at_of(sessions)
        processes: dict[int, Process] = {}
        for pid, _ in (
            reversed(self.proc.listing()) if oldest else ()
        ):  # the newest first: some do not live long
            process = self._read_candidate(pid, oldest, pages_at, hold=hold)
            if process is not None:
                processes[pid] = process
        adopters = frozenset(id_ for session in sessions for id_ in session.adopters)
        return self._whole(processes, pages_at, self._living(adopters))

    def _read(self, pid: int, session: Session, *, hold: bool = False) -> Process | None:
        oldest = {session.uid: session.leader.start_ticks}
        return self._read_candidate(pid, oldest, pages_at_of([session]), hold=hold)

    def _read_candidate(
        self, pid: int, oldest: dict[int, int], pages_at: PagesAt, *, hold: bool
    ) -> Process | None:
        """Return what ``pid`` is, None when it is gone, dead, or of no uid in ``oldest``, or started earlier than that."""
        handle = self._open_handle(pid) if hold and len(self._held) < self._most_held else -1
        try:
            stat = self.proc.stat(pid)
            if stat.dead or stat.id.start_ticks < min(oldest.values()):
                return None
            uid = parse_uid(self.proc.status(pid))
            if uid is None or stat.id.start_ticks < oldest.get(uid, stat.id.start_ticks + 1):
                return None
            process = self._describe(stat, uid, pages_at)
        except (ProcessGone, PermissionError, ValueError):
            return None
        else:
            if handle >= 0:
                if process.id in self._held:
                    os.close(handle)
                else:
                    self._held[process.id] = handle
                handle = -1
            return process
        finally:
            if handle >= 0:
                os.close(handle)

    def _describe(self, stat: Stat, uid: int, pages_at: PagesAt) -> Process:
        process = Process(
            id=stat.id,
            ppid=stat.ppid,
            uid=uid,
            comm=stat.comm,
            forked=stat.forked,
            cgroup=wire.parse_cgroup(self.proc.cgroup(stat.id.pid)),
            rss_bytes=stat.rss_bytes,
            cpu_ticks=stat.cpu_ticks,
        )
        return self.marks.put_on(process, stat, pages_at)

    def _whole(
        self, processes: dict[int, Process], pages_at: PagesAt, adopters: frozenset[ProcessId]
    ) -> Snapshot:
        """Return the snapshot, with a parent link only where the parent is still who it was when it was read.

        A pid that was given to another process in the middle of the pass would else pass its children off as a
        member's. Only the young can be such children.
        """
        self.marks.read_blocked(processes, pages_at)
        young = time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_PER_S - 10 * TICKS_PER_S
        for pid, process in processes.items():
            if process.id.start_ticks < young or process.ppid not in processes:
                continue
            try:
                same = self.proc.stat(process.ppid).id == processes[process.ppid].id
            except ProcessGone:
                same = True  # it ended after the pass had seen it; nobody has its pid
            if not same:
                processes[pid] = replace(process, ppid=0)
        return Snapshot(processes, adopters)

    def _children(self, pid: int) -> list[int]:
        try:
            return self.proc.children(pid)
        except (ProcessGone, PermissionError):
            return []

    # -- handles -----------------------------------------------------------------------------

    def _open_handle(self, pid: int) -> int:
        try:
            return pidfd.open_pid(pid)
        except ProcessGone:
            return -1

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
            pid = self.proc.stat(pid).ppid
            while pid > 1 and len(found) < _MAX_ANCESTORS:
                stat = self.proc.stat(pid)
                found.add(stat.id)
                pid = stat.ppid
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
        processes: dict[int, Process] = {}
        for pid in (
            session.leader.pid,
            *self.descendants(session.leader),
            *(id_.pid for id_ in session.kept),
        ):
            process = self._read(pid, session)
            if process is not None:
                processes[pid] = process
        return self._whole(processes, pages_at_of([session]), self._living(session.adopters))

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
        return cgroup.counter_file(self.proc.cgroup(pid))

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
        stat = self.proc.stat(pid)
        task = self.proc.living_task(stat)
        folders: list[str] = self._read_folders(pid, task) if stat.state != "D" else []
        session = replace(session, oom_counter=self.oom_counter(pid))
        return replace(
            session,
            cgroup=self.cgroup_path(pid),
            adopters=self.ancestors(pid),
            namespaces=self.proc.namespaces(pid),
            oom_kills=self.oom_kills_in(session),
            temp_dirs=tuple(folder for folder in (*folders, "/tmp") if os.path.isabs(folder)),  # noqa: S108
        )

    def _read_folders(self, pid: int, task: int) -> list[str]:
        environ = self.proc.environ(pid, task) or b""
        return [environment_value(environ, name) for name in ("JOBLIB_TEMP_FOLDER", "TMPDIR")]

    def open_page(self, leader: int, page_fd: int, uid: int) -> int:
        """Return a descriptor of ours for the page that ``leader`` has at ``page_fd``; OSError, or WireError."""
        return page.open_page(self.proc.descriptor_path(leader, page_fd), uid=uid)

    def leader(self, session: Session) -> Process | None:
        """Return the leader as it is now, None when it is dead."""
        process = self._read(session.leader.pid, session)
        return process if process is not None and process.id == session.leader else None

    def namespaced_pid(self, pid: int) -> int | None:
        """Return the pid that ``pid`` has in its own, innermost pid namespace (the last field of NSpid)."""
        return parse_innermost_pid(self.proc.status(pid))

    def same_ticks(self, process_id: ProcessId, told_ticks: int) -> bool:
        """Say whether a start time that ``process_id`` told of itself is right; not comparable across time namespaces."""
        if self.proc.namespaces(process_id.pid).time != self.proc.namespaces(os.getpid()).time:
            return True
        return process_id.start_ticks == told_ticks

    def could_be_orphan(self, holder: ProcessId, leader: ProcessId) -> bool:
        """Say whether ``holder`` can have been left by a dead ``leader`` that it names.

        Only where pids and times mean here what they mean to ``holder``, and where that leader is really dead.
        """
        theirs, ours = self.proc.namespaces(holder.pid), self.proc.namespaces(os.getpid())
        if (theirs.pid, theirs.time) != (ours.pid, ours.time) or holder.start_ticks < leader.start_ticks:
            return False
        try:
            stat = self.proc.stat(leader.pid)
        except ProcessGone:
            return True
        return stat.id != leader or stat.dead

    def shares_our_namespaces(self, session: Session) -> bool:
        """Say whether the pids and paths of ``session`` mean here what they mean there."""
        ours = self.proc.namespaces(os.getpid())
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

    def note_usage(self, snapshot: Snapshot) -> None:
        """Remember CPU times for the next ``usage()``; the one before last is kept while the last is too young."""
        now_s = time.monotonic()
        self._cpu = {
            process.id: self._cpu[process.id]
            if process.id in self._cpu and now_s - self._cpu[process.id][0] < _USAGE_S
            else (now_s, process.cpu_ticks)
            for process in snapshot.processes.values()
        }


def _marked(process: Process, session: Session) -> bool:
    return session.id in process.lineage or session.id in process.pages or process.id in session.kept
