"""The marks that a process carries, and what else lies in its memory: environment, command line, mappings.

Reading the memory of a process in state D can block for as long as it does, so a helper reads it, and is left behind if
it does not come back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import TypedDict

from agent import wire
from reaperd.linux import helper
from reaperd.linux.procfs import ProcessGone, ProcFS, Stat, environment_value, parse_memfd_link
from reaperd.model import Process, Session

MOST_DESCRIPTORS = 4096  # of one process; what is mapped tells as well
_BLOCKED_READ_S = 0.05

# Names of session pages, by the descriptor number at which their leaders have them.
PagesAt = dict[int, set[str]]


class _Marks(TypedDict):
    argv: list[str]
    lineage: list[str]
    pages: list[str]
    spared: list[str]


class MarkReader:
    """Reads one /proc."""

    def __init__(self, proc: ProcFS) -> None:
        self._proc = proc
        self._blocked: list[Stat] = []
        self._bounded = helper.BoundedReader(_BLOCKED_READ_S)

    def put_on(self, process: Process, stat: Stat, pages_at: PagesAt) -> Process:
        """Return ``process`` with its marks; one in state D gets them from ``read_blocked()``, at the end of the look."""
        if stat.state == "D":
            self._blocked.append(stat)
            return process
        return _with_marks(
            process, self._read_memory(stat, self._proc.living_task(stat), pages_at, process.uid)
        )

    def is_blocked(self, process: Process) -> bool:
        """Say whether the marks of ``process`` are still to be read."""
        return any(stat.id == process.id for stat in self._blocked)

    def read_blocked(self, processes: dict[int, Process], pages_at: PagesAt) -> None:
        """Have a helper read the marks of those in state D, all in one go; it is left behind if it does not come back."""
        blocked, self._blocked = [stat for stat in self._blocked if stat.id.pid in processes], []
        if not blocked:
            return

        def read_all() -> dict[str, _Marks]:
            found = {}
            for stat in blocked:
                with contextlib.suppress(ProcessGone, PermissionError):
                    task, uid = self._proc.living_task(stat), processes[stat.id.pid].uid
                    found[str(stat.id.pid)] = self._read_memory(stat, task, pages_at, uid)
            return found

        for pid, marks in (self._bounded.run(read_all) or {}).items():
            processes[int(pid)] = _with_marks(processes[int(pid)], marks)

    def _read_memory(self, stat: Stat, task: int, pages_at: PagesAt, uid: int | None) -> _Marks:
        pid, forked = stat.id.pid, stat.forked
        names = self._memfd_names(pid, task, pages_at, uid) if forked else set()
        environ = self._proc.environ(pid, task) or b""
        spared = {name[len(wire.SPARED_PREFIX) :] for name in names if name.startswith(wire.SPARED_PREFIX)}
        spared.update(wire.parse_lineage(environment_value(environ, wire.SPARED_VARIABLE)))
        return _Marks(
            argv=[] if forked else list(self._proc.argv(pid, task)),
            lineage=list(wire.parse_lineage(environment_value(environ, wire.LINEAGE_VARIABLE))),
            pages=[name[len(wire.PAGE_PREFIX) :] for name in names if name.startswith(wire.PAGE_PREFIX)],
            spared=list(spared),
        )

    def _memfd_names(self, pid: int, task: int, pages_at: PagesAt, uid: int | None) -> set[str]:
        """Return the names of our marks in a forked process: at the leader's descriptor, among all, else mapped."""
        for number, names in pages_at.items():
            name = parse_memfd_link(self._proc.descriptor(pid, task, number)) if number >= 0 else ""
            # A spared process has no page of the session that spares it; a page handed over by another user is no mark.
            if name in names and self._proc.descriptor_owner(pid, task, number) == uid:
                return {name}
        links = self._proc.descriptors(pid, task, most=MOST_DESCRIPTORS)
        marks = {
            name
            for number, name in ((number, parse_memfd_link(link)) for number, link in links.items())
            if _is_mark(name) and self._proc.descriptor_owner(pid, task, number) == uid
        }
        return marks or {
            name for name in map(parse_memfd_link, self._proc.mapped_paths(pid, task)) if _is_mark(name)
        }

    def mapped_paths(self, pid: int) -> list[str]:
        """Return the paths that ``pid`` has mapped; empty when it is gone, or blocked in the kernel."""
        with contextlib.suppress(ProcessGone, PermissionError):
            stat = self._proc.stat(pid)
            task = self._proc.living_task(stat)
            if stat.state != "D":
                return self._proc.mapped_paths(pid, task)
            return self._bounded.run(lambda: self._proc.mapped_paths(pid, task)) or []
        return []

    def argv(self, process: Process) -> list[str]:
        """Return the command line, a forked process's too; empty when it is gone, or blocked in the kernel."""
        if process.argv:
            return list(process.argv)
        with contextlib.suppress(ProcessGone, PermissionError):
            stat = self._proc.stat(process.id.pid)
            if stat.id == process.id and stat.state != "D":
                return list(self._proc.argv(process.id.pid, self._proc.living_task(stat)))
        return []


def pages_at_of(sessions: Iterable[Session]) -> PagesAt:
    """Return where the pages of ``sessions`` are to be looked for first."""
    found: PagesAt = {}
    for session in sessions:
        found.setdefault(session.page_fd, set()).add(wire.PAGE_PREFIX + session.id)
    return found


def _with_marks(process: Process, marks: _Marks) -> Process:
    return replace(
        process,
        argv=tuple(marks["argv"]),
        lineage=tuple(marks["lineage"]),
        pages=frozenset(marks["pages"]),
        spared=frozenset(marks["spared"]),
    )


def _is_mark(name: str) -> bool:
    return name.startswith((wire.PAGE_PREFIX, wire.SPARED_PREFIX))
