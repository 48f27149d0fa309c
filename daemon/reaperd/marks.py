"""The marks that a process carries: the session page of a forked one, the environment stamp of one that exec'ed."""

from __future__ import annotations

from typing import NamedTuple

from agent import wire
from reaperd.linux.procfs import ProcFS, Stat, parse_memfd_link
from reaperd.memory import MEMFD_PREFIX, OUR_MEMFDS, Memory, MemoryReader, Wish
from reaperd.model import SessionKey

MAX_DESCRIPTORS = 64  # of one process: its owner may open a million, and what is mapped tells as well
_MAX_PAGE_FDS = 8  # at which a page is looked for first; leaders have it at one of a few low numbers


# Most processes have neither pages nor spared marks, and each empty set made anew would take 216 bytes of its own.
_NONE: frozenset[str] = frozenset()


class Marks(NamedTuple):
    """What tells whose a process is."""

    argv: tuple[str, ...] = ()
    lineage: tuple[str, ...] = ()
    pages: frozenset[str] = _NONE
    spared: frozenset[str] = _NONE


class Pages:
    """The session pages that are known by their inode: to find one takes a single read, and nobody can forge it."""

    def __init__(self) -> None:
        self._sessions: dict[int, SessionKey] = {}
        self._fds: dict[int, int] = {}  # descriptor number: how many pages are there

    def add(self, inode: int, page_fd: int, session: SessionKey) -> None:
        """Look for the page of ``session`` at ``page_fd``, where its leader has it and forks inherit it."""
        if inode not in self._sessions:
            self._sessions[inode] = session
            self._fds[page_fd] = self._fds.get(page_fd, 0) + 1

    def remove(self, inode: int, page_fd: int) -> None:
        """Forget a page."""
        if self._sessions.pop(inode, None) is not None:
            self._fds[page_fd] -= 1
            if not self._fds[page_fd]:
                del self._fds[page_fd]

    def are_known(self, inode: int) -> bool:
        """Say whether the memfd ``inode`` is the page of a session that is looked for."""
        return inode in self._sessions

    def session_of(self, inode: int | None, uid: int | None) -> str | None:
        """Return the session of ``uid`` whose page the memfd ``inode`` is; None: of nobody's, or of another user's."""
        session = self._sessions.get(inode) if inode is not None else None
        return session.id if session is not None and session.uid == uid else None

    def likely_fds(self) -> list[int]:
        """Return the descriptor numbers to look at first."""
        return list(self._fds)[:_MAX_PAGE_FDS]


class MarkReader:
    """Reads one /proc: descriptors at once, what lies in memory for many processes together."""

    def __init__(self, proc: ProcFS) -> None:
        self._proc = proc
        self.memory = MemoryReader(proc)
        self.pages = Pages()

    def read_descriptors(self, stat: Stat, uid: int | None, *, hurried: bool) -> tuple[Marks, Wish | None]:
        """Return what descriptors tell, and what else is to be read, None where that is enough.

        ``hurried``: a known page is; who carries one may carry the stamp of an outer session, too.
        """
        pid, task = stat.id.pid, self._proc.living_task(stat)
        if not stat.forked:
            return Marks(), Wish(stat, task, environ=True, argv=True)
        if hurried and (pages := self._pages_in_place(pid, task, uid)):
            return Marks(pages=pages), None
        marks = self._search_descriptors(pid, task, uid)
        unmarked = not marks.pages and not marks.spared
        return marks, Wish(stat, task, environ=True, maps=OUR_MEMFDS if unmarked else ())

    def _pages_in_place(self, pid: int, task: int, uid: int | None) -> frozenset[str]:
        inodes = (self._proc.memfd_inode(pid, task, number) for number in self.pages.likely_fds())
        sessions = (self.pages.session_of(inode, uid) for inode in inodes)
        return frozenset(session for session in sessions if session is not None)

    def _search_descriptors(self, pid: int, task: int, uid: int | None) -> Marks:
        """Look for our marks under any number."""
        pages, spared = set(), set()
        for number, link in self._proc.descriptors(pid, task, most=MAX_DESCRIPTORS).items():
            name = parse_memfd_link(link)
            if name.startswith((wire.PAGE_PREFIX, wire.SPARED_PREFIX)):
                inode = self._proc.memfd_inode(pid, task, number)
                session = self.pages.session_of(inode, uid)
                if session is not None:
                    pages.add(session)
                elif (
                    inode is not None  # a memfd, so asking for its owner asks no file system of a user's
                    and name.startswith(wire.SPARED_PREFIX)
                    and self._proc.owner_of(self._proc.descriptor_path(pid, task, number)) == uid
                ):
                    spared.add(name[len(wire.SPARED_PREFIX) :])
        return Marks(pages=frozenset(pages), spared=frozenset(spared))

    def with_memory(self, marks: Marks, memory: Memory, pid: int, uid: int | None) -> Marks:
        """Return ``marks`` of ``pid`` with those that lie in its memory."""
        pages, spared = set(marks.pages), set(marks.spared)
        spared.update(wire.parse_lineage(memory.variables.get(wire.SPARED_VARIABLE, "")))
        for one in memory.mapped:
            session, name = self.pages.session_of(one.inode, uid), parse_memfd_link(one.path)
            if session is not None and one.path.startswith(MEMFD_PREFIX):
                pages.add(session)
            # Where we may not ask whose it is, it counts: better to leave one alone than to end one.
            elif name.startswith(wire.SPARED_PREFIX) and self._proc.owner_of(
                self._proc.mapping_path(pid, one.addresses)
            ) in (uid, None):
                spared.add(name[len(wire.SPARED_PREFIX) :])
        lineage = wire.parse_lineage(memory.variables.get(wire.LINEAGE_VARIABLE, ""))
        return Marks(memory.argv, lineage, frozenset(pages) or _NONE, frozenset(spared) or _NONE)
