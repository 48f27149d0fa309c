"""Finds the marks of sessions on any process: session pages, and environments that name a session."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from agent import wire
from reaperd import pages
from reaperd.aside import Aside
from reaperd.census import Interrupted
from reaperd.linux import page, pidfd
from reaperd.linux.exhaustion import tell_exhaustion
from reaperd.linux.procfs import PF_KTHREAD, ProcessGone, Stat, parse_gid, parse_memfd_link, parse_uid
from reaperd.marks import MAX_DESCRIPTORS
from reaperd.memory import OUR_PAGES, Memory, Wish
from reaperd.model import SessionKey
from reaperd.observer import Observer

# Of the processes that are no longer new, a sweep looks at as many as fit into so long, in turn: nearly every session
# registers by message, or was found when its leader was new.
_TURN_S = 0.001
_MAX_CHANGED = 8  # of them, to be read in full
_BETWEEN_ALARMS = 64  # processes
# For those who are new, of whom there can be thousands: then whoever asks for something is answered.
_AT_A_TIME_S = 0.02


class Holder(NamedTuple):
    """A process that carries marks."""

    stat: Stat
    uid: int
    gid: int
    folders: tuple[str, ...]  # where its environment says that temporary files go


class FoundPage(NamedTuple):
    """A session page, and a process that holds it."""

    page: pages.Page
    holder: Holder
    descriptor: int  # to be closed by whoever asked for it

    @property
    def key(self) -> SessionKey:
        """The session's."""
        return SessionKey(self.holder.uid, self.page.id)


class StampedProcess(NamedTuple):
    """A process whose environment names a session that it is not spared from."""

    session: str
    holder: Holder
    cgroup: str

    @property
    def key(self) -> SessionKey:
        """The session's."""
        return SessionKey(self.holder.uid, self.session)


class _Seen(NamedTuple):
    """A process that was looked at."""

    inode: int  # of /proc/PID
    # As in Stat; None: it could not be read, or has marks of a session that is neither on record nor over.
    image: int | None = None
    has_memory: bool = True  # False: a zombie or a kernel thread


class Sweep:
    """Remembers whom it has seen."""

    def __init__(self, observer: Observer, is_known: Callable[[SessionKey], bool] = lambda _: False) -> None:
        """``is_known`` says whether a session is on record, or over: its marks tell nothing new."""
        self._observer = observer
        self._is_known = is_known
        self._proc = observer.proc
        self._aside = Aside()
        self._known: dict[int, _Seen] = {}  # by pid
        self._turn: list[int] = []
        self._at_a_time_s = _AT_A_TIME_S

    def run(self, listing: dict[int, int] | None = None) -> Iterator[FoundPage | StampedProcess]:
        """Yield what marks all processes carry; with a ``listing``, those who are new in it, and a part of the others in turn.

        Raises Interrupted in the second case, where a leader dies meanwhile or many are left that have not been read; the next
        sweep goes on from there.
        """
        everyone = listing is None
        listing = self._proc.listing() if listing is None else listing
        for pid in [pid for pid, seen in self._known.items() if listing.get(pid) != seen.inode]:
            del self._known[pid]
        due = sorted(listing if everyone else listing.keys() - self._known.keys())
        # A page tells more than a stamp, and a session is taken on but once.
        stamped: list[StampedProcess] = []
        interrupted = False
        until_s = time.monotonic() + self._at_a_time_s
        for at in range(0, len(due), _BETWEEN_ALARMS):
            is_late = at > 0 and time.monotonic() >= until_s
            interrupted = not everyone and (is_late or self._observer.census.is_interrupted())
            if interrupted:
                # As many more may be new the next time.
                self._at_a_time_s *= 2 if is_late else 1
                break
            some = due[at : at + _BETWEEN_ALARMS]
            yield from self._pages_of(some, listing, stamped)
        else:
            self._at_a_time_s = _AT_A_TIME_S
        if not everyone and not interrupted:
            yield from self._pages_of(self._changed_in_turn(), listing, stamped)
        yield from stamped
        if interrupted:
            raise Interrupted

    def pages_of(self, uid: int, since_ticks: int) -> Iterator[FoundPage]:
        """Yield the pages of all processes of ``uid`` that started at ``since_ticks`` or later."""
        listing = self._proc.listing()
        pids = [pid for pid in listing if self._is_of(pid, uid, since_ticks)]
        yield from self._pages_of(pids, listing, [])

    def _is_of(self, pid: int, uid: int, since_ticks: int) -> bool:
        with contextlib.suppress(ProcessGone, PermissionError, ValueError):
            found = pidfd.uid_of(pid, self._proc)
            return found == uid and self._proc.stat(pid).id.start_ticks >= since_ticks
        return False

    def _changed_in_turn(self) -> list[int]:
        """Return who of those that had their turn runs another program by now, or has a page that nobody knows."""
        until_s = time.monotonic() + _TURN_S
        if not self._turn:
            self._turn = list(self._known)
        changed: list[int] = []
        while self._turn and len(changed) < _MAX_CHANGED and time.monotonic() < until_s:
            pid = self._turn.pop()
            seen = self._known.get(pid)
            if seen is not None and seen.has_memory:
                with contextlib.suppress(ProcessGone, ValueError):
                    stat = self._proc.stat(pid)
                    if stat.image != seen.image or self._has_unknown_page(pid, self._proc.living_task(stat)):
                        changed.append(pid)
        return changed

    def _has_unknown_page(self, pid: int, task: int) -> bool:
        pages = self._observer.marks.pages
        return any(
            (inode := self._proc.memfd_inode(pid, task, number)) is not None and not pages.are_known(inode)
            for number in self._page_numbers(pid, task)
        )

    def _page_numbers(self, pid: int, task: int) -> list[int]:
        """Return at which descriptors ``pid`` has what is called like a session page."""
        links = self._proc.descriptors(pid, task, most=MAX_DESCRIPTORS)
        return [n for n, link in links.items() if parse_memfd_link(link).startswith(wire.PAGE_PREFIX)]

    def _pages_of(
        self, pids: list[int], listing: dict[int, int], stamped: list[StampedProcess]
    ) -> Iterator[FoundPage]:
        """Yield the pages that ``pids`` have, and put those with stamps aside."""
        wishes: dict[int, Wish] = {}
        for pid in pids:
            try:
                stat = self._proc.stat(pid)
                if stat.dead or stat.flags & PF_KTHREAD:
                    self._known[pid] = _Seen(listing[pid], has_memory=False)
                else:
                    task = self._proc.living_task(stat)
                    wishes[pid] = Wish(stat, task, environ=True, maps=OUR_PAGES)
            except (ProcessGone, ValueError):
                self._known[pid] = _Seen(listing[pid])
        memories = self._observer.marks.memory.read(wishes.values()) if wishes else {}
        for pid, wish in wishes.items():
            who, image = wish.stat.id, None
            if self._aside.until_s(who) is None:
                with (
                    self._aside.trying(who, "read the marks", tell_exhaustion=True),
                    contextlib.suppress(ProcessGone, PermissionError, ValueError),
                ):
                    image = wish.stat.image if pid in memories else None
                    for found in self._found_on(wish, memories.get(pid, Memory())):
                        if isinstance(found, FoundPage):
                            yield found
                        else:
                            stamped.append(found)
                        if not self._is_known(found.key):
                            image = None
            self._known[pid] = _Seen(listing[pid], image)

    def _found_on(self, wish: Wish, memory: Memory) -> Iterator[FoundPage | StampedProcess]:
        pid = wish.stat.id.pid
        numbers = self._page_numbers(pid, wish.task)
        # Who closed all descriptors, as daemons do, has the page mapped still.
        mapped = [one.addresses for one in memory.mapped] if not numbers else []
        stamps = wire.parse_lineage(memory.variables.get(wire.LINEAGE_VARIABLE, ""))
        if not numbers and not mapped and not stamps:
            return
        status = self._proc.status(pid)
        uid, gid = parse_uid(status), parse_gid(status)
        if uid is None or gid is None:
            return
        folders = (memory.variables.get(name, "") for name in wire.TEMP_VARIABLES)
        holder = Holder(wish.stat, uid, gid, tuple(filter(os.path.isabs, folders)))
        spared = wire.parse_lineage(memory.variables.get(wire.SPARED_VARIABLE, ""))
        for session_id in stamps:
            if session_id not in spared and not self._is_known(SessionKey(uid, session_id)):
                yield StampedProcess(session_id, holder, self._observer.cgroup_path(pid))
        for number in numbers:
            yield from self._open(holder, partial(self._observer.open_page, pid, number, uid))
        for place in mapped:
            yield from self._open(holder, partial(self._observer.open_mapped_page, pid, place, uid))

    def _open(self, holder: Holder, open_page: Callable[[], int]) -> Iterator[FoundPage]:
        try:
            descriptor = open_page()
        except wire.WireError:
            return
        except OSError as error:
            tell_exhaustion(error)
            return
        try:
            found = FoundPage(page.read_page(descriptor), holder, descriptor)
        except wire.WireError:
            os.close(descriptor)
            return
        yield found
