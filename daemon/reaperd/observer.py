"""What is true of a leader, a holder or a member at this moment, and the census of all. Decides nothing, signals nobody."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

from agent import wire
from reaperd import kinship
from reaperd.census import Census
from reaperd.linux import oom, page, pidfd
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import (
    ProcessGone,
    ProcFS,
    has_pending_sigkill,
    parse_gid,
    parse_groups,
    parse_innermost_pid,
    parse_uid,
)
from reaperd.linux.shm import SHM
from reaperd.marks import MarkReader
from reaperd.memory import Wish
from reaperd.model import Namespaces, ProcessId, Session, Usage
from reaperd.usage import UsageMeter


class Observer:
    """Reads one /proc."""

    def __init__(self, proc: ProcFS, alarm: Alarm | None = None) -> None:
        """``alarm`` interrupts what nobody waits for: looks at the living, and at everybody."""
        self.proc = proc
        self.boot_id = proc.boot_id()
        self.marks = MarkReader(proc)
        self.census = Census(proc, self.marks, alarm)
        self.usage = UsageMeter()
        self._namespaces = proc.namespaces(os.getpid())._replace(shm=proc.mounted_at(os.getpid(), SHM))
        self.realm = realm_of(self._namespaces)
        # What is on record means the same in here alone: elsewhere the pids and start times are other processes'.
        self.era = f"{self.boot_id} {self.realm} {proc.clock_offsets()}" if self.realm else self.boot_id
        self._oom_counters = oom.Counters()

    def owner(self, pid: int) -> tuple[int | None, int | None]:
        """Return uid and gid of ``pid``, None where its ids are mixed."""
        status = self.proc.status(pid)
        return parse_uid(status), parse_gid(status)

    def cgroup_path(self, pid: int) -> str:
        """Return the cgroup that tells ``pid``'s session from others; "/" tells nothing."""
        return wire.parse_cgroup(self.proc.cgroup(pid))

    def oom_kills_in(self, session: Session) -> int | None:
        """Return the OOM kills counted in the memory cgroup that ``session``'s leader was in when it registered."""
        return oom.read_kills(session.oom_counter) if session.oom_counter else None

    def oom_counter(self, pid: int) -> oom.Counter:
        """Return what counts OOM kills where ``pid`` runs, and how many it has counted; ProcessGone."""
        return self._oom_counters.find(self.proc.cgroup(pid))

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
        if namespaces.mnt != self._namespaces.mnt:
            namespaces = namespaces._replace(shm=self.proc.mounted_at(pid, SHM))
        counter = self._oom_counters.find(cgroups)
        ancestors = kinship.ancestors(self.proc, pid)
        init = self._init_of(namespaces.pid, ancestors)
        return session._replace(
            cgroup=wire.parse_cgroup(cgroups),
            adopters=ancestors if init is None else ancestors | {init},
            subreapers=self._supervisor_of(session, ancestors),
            init=init,
            namespaces=namespaces,
            groups=parse_groups(self.proc.status(pid)),
            oom_counter=counter.path,
            oom_kills=counter.kills,
        )

    def _supervisor_of(self, session: Session, adopters: frozenset[ProcessId]) -> frozenset[ProcessId]:
        """Return the leader's parent under `reaperctl run`, which adopts what it leaves.

        /proc does not say who is a subreaper, and a command may die before anybody was seen to be adopted.
        """
        if session.attempt is None:
            return frozenset()
        _, parent = self.proc.parent(session.leader.pid)
        return frozenset(one for one in adopters if one.pid == parent)

    def _init_of(self, namespace: str, ancestors: frozenset[ProcessId]) -> ProcessId | None:
        """Return the init of another pid namespace than ours, None where it is not seen.

        It is an ancestor of whoever was not put there from outside (nsenter(1), ``docker exec``).
        """
        if namespace in ("", self._namespaces.pid):
            return None
        for pid in (*(id_.pid for id_ in ancestors), *self.proc.listing()):
            with contextlib.suppress(ProcessGone, ValueError):
                if self.proc.pid_namespace(pid) == namespace and self.namespaced_pid(pid) == 1:
                    return self.proc.stat(pid).id
        return None

    def open_page(self, leader: int, page_fd: int, uid: int) -> int:
        """Return a descriptor of ours for the page that ``leader`` has at ``page_fd``.

        ProcessGone; FileNotFoundError: it has no such descriptor; OSError; WireError: that is no page.
        """
        task = self.proc.living_task(self.proc.stat(leader))
        if self.proc.memfd_inode(leader, task, page_fd) is None:
            if not self.proc.may_follow_descriptor(leader, task, page_fd):
                raise wire.WireError(
                    "bad-page",
                    "the daemon may not look at your descriptors: it lacks CAP_SYS_PTRACE, or you are in another user namespace",
                )
            raise wire.WireError("bad-page", "the session page is no memfd")
        return page.open_page(self.proc.descriptor_path(leader, task, page_fd), uid=uid)

    def open_mapped_page(self, pid: int, addresses: str, uid: int) -> int:
        """Return a descriptor of ours for the page that ``pid`` has mapped; as ``open_page()``."""
        return page.open_page(self.proc.mapping_path(pid, addresses), uid=uid)

    def usage_of(self, id_: ProcessId) -> Usage | None:
        """Return what a process took of the machine when it was last read, None where it has not been."""
        process = self.census.known.processes.get(id_.pid)
        return self.usage.of(process) if process is not None and process.id == id_ else None

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

    def container_of(self, pid: int, handle: int) -> str:
        """Return the pid namespace that the process of a pidfd lives in where that is not ours, "" where it is.

        The pidfd tells how many pids it has from ours down, whatever /proc hides; what is nobody's stands for what is not told.
        """
        pids = pidfd.pids_of(handle, self.proc)
        if len(pids) <= 1:
            return "" if pids != (-1,) else "gone"
        return self.proc.pid_namespace(pid) or "unknown"

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
            return not pidfd.is_hidden(leader.pid, self.proc)
        return stat.id != leader or stat.dead

    def is_beside_us(self, pid: int) -> bool:
        """Say whether pids and control groups mean to ``pid`` what they mean here."""
        ours = self.proc.cgroup_namespace(os.getpid())
        return self.proc.pid_namespace(pid) == self._namespaces.pid != "" and (
            self.proc.cgroup_namespace(pid) == ours != ""
        )

    def named_by(self, session: Session, told: Iterable[tuple[int, int]]) -> frozenset[ProcessId]:
        """Return whom the living or just dead leader of ``session`` means by pids and start times of its own namespaces."""
        theirs, ours = session.namespaces, self._namespaces
        if (theirs.pid, theirs.time) == (ours.pid, ours.time):
            return frozenset(ProcessId(*pair) for pair in told)
        # Its own start time is known from here and from there.
        ahead_ticks = wire.SessionId.parse(session.id).start_ticks - session.leader.start_ticks
        wanted = {pid: ticks - ahead_ticks for pid, ticks in told}
        found = set()
        for pid in self.proc.listing() if wanted else ():
            with contextlib.suppress(ProcessGone, PermissionError, ValueError):
                if (
                    self.proc.pid_namespace(pid) == theirs.pid
                    and (name := self.namespaced_pid(pid)) in wanted
                ):
                    id_ = self.proc.stat(pid).id
                    if abs(id_.start_ticks - wanted[name]) <= 1:  # both were rounded
                        found.add(id_)
        return frozenset(found)

    def shares_our_namespaces(self, session: Session) -> bool:
        """Say whether the pids and paths of ``session`` mean here what they mean there."""
        ours = self._namespaces
        return session.namespaces.pid == ours.pid and session.namespaces.mnt == ours.mnt

    def shares_our_shm(self, session: Session) -> bool:
        """Say whether the pids of ``session``, and the names in /dev/shm, mean here what they mean there."""
        theirs, ours = session.namespaces, self._namespaces
        return theirs.pid == ours.pid and (theirs.mnt == ours.mnt or theirs.shm == ours.shm != "")


def realm_of(namespaces: Namespaces) -> str:
    """Return ``wire.realm_of()`` a process that lives there; of one that does not let that be read, what is nobody's."""

    def inode(link: str) -> int:
        number = link.partition("[")[2].removesuffix("]")
        return int(number) if number.isdigit() else 0

    return wire.realm_of(inode(namespaces.pid), inode(namespaces.time))
