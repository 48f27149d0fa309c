"""Finds the marks of sessions on any process: session pages, and environments that name a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from agent import wire
from reaperd.linux import page
from reaperd.linux.procfs import ProcessGone, Stat, environment_value, parse_gid, parse_memfd_link, parse_uid
from reaperd.marks import MOST_DESCRIPTORS
from reaperd.observer import Observer

# Processes that are no longer new are looked at in one of so many sweeps: nearly every session registers by message.
_TURNS = 16


class FoundPage(NamedTuple):
    """A session page, and a process that holds it."""

    page: wire.Page
    holder: Stat
    uid: int
    gid: int
    descriptor: int  # ours, to be closed by whoever takes the page on


class StampedProcess(NamedTuple):
    """A process whose environment names a session that it is not spared from."""

    session: str
    holder: Stat
    uid: int
    gid: int
    cgroup: str


class Sweep:
    """Remembers whom it has seen."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._proc = observer.proc
        self._known: set[tuple[int, int]] = set()
        self._turn = 0

    def run(self, *, all_of_them: bool) -> Iterator[FoundPage | StampedProcess]:
        """Yield what marks new processes carry, and a part of the others in turn (all of them, when asked to)."""
        listing = self._proc.listing()
        self._turn = (self._turn + 1) % _TURNS
        for key in listing:
            if all_of_them or key not in self._known or key[0] % _TURNS == self._turn:
                yield from self._marks_of(key[0])
        self._known = set(listing)

    def _marks_of(self, pid: int) -> Iterator[FoundPage | StampedProcess]:
        try:
            stat = self._proc.stat(pid)
            # One in state D can block whoever reads its memory: it comes to its turn again.
            if stat.dead or stat.state == "D":
                return
            task = self._proc.living_task(stat)
            status = self._proc.status(pid)
            uid, gid = parse_uid(status), parse_gid(status)
            if uid is None or gid is None:
                return
            environ = self._proc.environ(pid, task) or b""
            spared = wire.parse_lineage(environment_value(environ, wire.SPARED_VARIABLE))
            for session_id in wire.parse_lineage(environment_value(environ, wire.LINEAGE_VARIABLE)):
                if session_id not in spared:
                    yield StampedProcess(session_id, stat, uid, gid, self._observer.cgroup_path(pid))
            for number, link in self._proc.descriptors(pid, task, most=MOST_DESCRIPTORS).items():
                if parse_memfd_link(link).startswith(wire.PAGE_PREFIX):
                    found = self._open_page(stat, number, uid, gid)
                    if found is not None:
                        yield found
        except (ProcessGone, PermissionError, ValueError):
            return

    def _open_page(self, stat: Stat, number: int, uid: int, gid: int) -> FoundPage | None:
        try:
            descriptor = self._observer.open_page(stat.id.pid, number, uid)
        except (OSError, wire.WireError):
            return None
        try:
            return FoundPage(page.read_page(descriptor), stat, uid, gid, descriptor)
        except wire.WireError:
            os.close(descriptor)
            return None
