"""The facts that everything else is decided on: who a process is, who belongs to what, and why. Pure values only."""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeVar

_Key = TypeVar("_Key", int, str)

# signal(7), the same numbers on x86, ARM, RISC-V and POWER.
SIGKILL, SIGTERM, SIGCONT, SIGSTOP = 9, 15, 18, 19
SIGNAL_NAMES = {SIGKILL: "SIGKILL", SIGTERM: "SIGTERM", SIGCONT: "SIGCONT", SIGSTOP: "SIGSTOP"}


class ProcessId(NamedTuple):
    """A process for as long as the machine runs: a pid alone is given to somebody else one day."""

    pid: int
    start_ticks: int  # field 22 of /proc/PID/stat, clock ticks (10 ms) since boot


class SessionKey(NamedTuple):
    """A session for the daemon: its id is its owner's word, and another user can say the same one."""

    uid: int
    id: str


class Role(enum.Enum):
    """What a member does for its session: a tracker guards shared memory and goes last."""

    WORKER = "worker"
    TRACKER = "tracker"


class Process(NamedTuple):
    """One process as it was found."""

    id: ProcessId
    ppid: int
    uid: int | None  # None where real, effective and saved uid differ, or could not be read
    comm: str = ""
    forked: bool = False  # has not exec'ed since its parent forked it: its command line is the parent's
    dead: bool = False  # a zombie without any other thread
    argv: tuple[str, ...] = ()  # empty for a forked process
    lineage: tuple[str, ...] = ()  # the session ids in REAPER_LINEAGE
    pages: frozenset[str] = frozenset()  # the sessions whose page it holds
    spared: frozenset[str] = frozenset()  # the sessions that it is meant to outlive
    cgroup: str | None = "/"  # None: not read, for a session page tells enough
    rss_bytes: int = 0
    cpu_ticks: int = 0


class Snapshot:
    """The processes that mattered at one instant, by pid; the indices make judging a session cost what the session has."""

    def __init__(
        self,
        processes: Mapping[int, Process],
        adopters: frozenset[ProcessId] = frozenset(),
        *,
        stale: frozenset[int] = frozenset(),
        unread: Mapping[int, int] = MappingProxyType({}),
        vanished: frozenset[int] = frozenset(),
    ) -> None:
        self.processes = processes
        self.adopters = adopters  # those of the sessions' adopters that still live
        self.stale = stale  # pids of those who were read earlier than for this look
        self.unread = unread  # pids of those who let nobody read their marks, and of which uid they are
        self.vanished = vanished  # uids of those who were gone before they could be read

    def without(self, pids: set[int]) -> Snapshot:
        """Return the snapshot as if ``pids`` were not there."""
        processes = {pid: process for pid, process in self.processes.items() if pid not in pids}
        return Snapshot(
            processes, self.adopters, stale=self.stale, unread=self.unread, vanished=self.vanished
        )

    @functools.cached_property
    def children(self) -> Mapping[int, Sequence[Process]]:
        """The processes by their parent's pid."""
        return _index((process.ppid, process) for process in self.processes.values())

    @functools.cached_property
    def marked(self) -> Mapping[str, Sequence[Process]]:
        """The processes by the ids of the sessions whose page or stamp they carry."""
        return _index(
            (mark, process)
            for process in self.processes.values()
            for mark in {*process.pages, *process.lineage}
        )

    @functools.cached_property
    def residents(self) -> Mapping[str, Sequence[Process]]:
        """The processes by the control group that they are in, where that was read."""
        return _index((process.cgroup, process) for process in self.processes.values() if process.cgroup)

    @functools.cached_property
    def spared(self) -> Mapping[str, Sequence[Process]]:
        """The processes by the ids of the sessions that they are meant to outlive."""
        return _index((mark, process) for process in self.processes.values() for mark in process.spared)


def _index(pairs: Iterable[tuple[_Key, Process]]) -> Mapping[_Key, Sequence[Process]]:
    found: dict[_Key, list[Process]] = {}
    for key, process in pairs:
        found.setdefault(key, []).append(process)
    return found


class Namespaces(NamedTuple):
    """Where a leader lives, as the links in /proc/PID/ns read; empty where they could not be read."""

    pid: str = ""
    mnt: str = ""
    time: str = ""
    # The file system on /dev/shm (major:minor), asked only of who has mounts of its own.
    shm: str = ""


class CauseKind(enum.Enum):
    """How a leader ended."""

    EXIT = "exit"
    SIGNAL = "signal"
    OOM = "oom"
    UNKNOWN = "unknown"


class Cause(NamedTuple):
    """Why a leader is dead; ``code`` is its exit code or the signal's number, None where unknown."""

    kind: CauseKind
    code: int | None = None
    core_dumped: bool = False
    clean: bool = False  # its interpreter ended in good order, so what it left gets exit_grace

    @classmethod
    def of_status(cls, status: int) -> Cause:
        """Return the cause that a wait status tells (wait(2))."""
        if number := status & 0x7F:
            return cls(CauseKind.SIGNAL, number, core_dumped=bool(status & 0x80))
        return cls(CauseKind.EXIT, status >> 8 & 0xFF)


TEMP_DIRS = ("/tmp",)  # noqa: S108 - where temporary files go where nobody says otherwise

UNKNOWN_CAUSE = Cause(CauseKind.UNKNOWN)


class Session(NamedTuple):
    """What one leader started, as it was found at registration or adoption."""

    id: str
    name: str
    uid: int
    gid: int
    leader: ProcessId
    started_at_utc: str
    # The page's descriptor number in the leader; -1: it has none.
    page_fd: int = -1
    # Of the page, on the kernel's own mount for shared memory; None: we hold none.
    page_inode: int | None = None
    # None: never learned, so no environment stamp counts.
    cgroup: str | None = "/"
    # A control group of its own, into which the leader was moved then: whoever is in it was started by a member.
    scope: str | None = None
    # The leader's ancestors: one that is a subreaper inherits what it leaves.
    adopters: frozenset[ProcessId] = frozenset()
    # Those of them that are known to be ones: they were seen to have adopted a member.
    subreapers: frozenset[ProcessId] = frozenset()
    # The one of them that is the init of the leader's pid namespace: it adopts what nobody else does.
    init: ProcessId | None = None
    namespaces: Namespaces = Namespaces()
    # The file that counts OOM kills in the leader's memory cgroup, and what it said when last looked at.
    oom_counter: str = ""
    oom_kills: int | None = None
    # Members that are known to be ones whatever their marks and parents say by now.
    kept: frozenset[ProcessId] = frozenset()
    # All members when last looked at while the leader lived. Whoever adopts one of them is a subreaper.
    seen: frozenset[ProcessId] = frozenset()
    # The leader's supplementary groups: its status file may be theirs.
    groups: tuple[int, ...] = ()
    # Where joblib may have put memmapped arrays, /dev/shm apart.
    temp_dirs: tuple[str, ...] = TEMP_DIRS
    # The leader has unregistered: what it starts from now on is not the session's.
    ending: bool = False
    # Started under spared(), as the page says: their environment may not say so.
    spared: frozenset[ProcessId] = frozenset()
    # Under `reaperctl run`, which is the leader's parent and adopts what it leaves: which attempt, and the most there can be.
    attempt: tuple[int, int] | None = None
    # Set once the leader is dead.
    cause: Cause | None = None

    @property
    def key(self) -> SessionKey:
        """What the daemon knows it by."""
        return SessionKey(self.uid, self.id)

    @property
    def telling_scope(self) -> str | None:
        """Its own control group where that makes members: a leader that has unregistered may start anything there."""
        return None if self.ending else self.scope

    def keeping(self, members: frozenset[ProcessId]) -> Session:
        """Return the session with ``members`` as those that only descent tells."""
        return self if members == self.kept else self._replace(kept=members)

    def adopted_by(self, subreapers: frozenset[ProcessId]) -> Session:
        """Return the session with ``subreapers`` among those that are known to adopt what its leader leaves."""
        return (
            self if subreapers <= self.subreapers else self._replace(subreapers=self.subreapers | subreapers)
        )


class Member(NamedTuple):
    """A process of a session, and how that is known, in words that a person can check."""

    process: Process
    role: Role
    framework: str
    evidence: tuple[str, ...]
    marked: bool  # carries a mark of its own; else only descent tells


class Family(NamedTuple):
    """Who belongs to a session at one instant, and who looks like it but is left alone, with the reason."""

    members: Mapping[ProcessId, Member]
    left_alone: Mapping[ProcessId, str]
    # Which of the leader's ancestors were seen to have adopted a member.
    subreapers: frozenset[ProcessId] = frozenset()
    strays: tuple[Process, ...] = ()  # are left alone for their parent's sake, though they carry the stamp


class Usage(NamedTuple):
    """What a process takes of the machine."""

    cpu_percent: float  # of one core, since the last scan; since its start where it is new
    rss_bytes: int


class Freed(NamedTuple):
    """Memory given back to the machine, in bytes."""

    rss_bytes: int = 0
    shm_bytes: int = 0
    gpu_bytes: int = 0
