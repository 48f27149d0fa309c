"""Sessions that no message told of: those on record when the last daemon ended, and those found by their marks."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace

from agent import wire
from reaperd import report
from reaperd.core import Core, now_utc
from reaperd.linux import page, pidfd
from reaperd.linux.procfs import ProcessGone, environment_value
from reaperd.model import ProcessId, Session
from reaperd.observer import FoundPage, Observer, Stray

log = logging.getLogger(__name__)


def describe_leader(session: Session, observer: Observer) -> Session:
    """Return ``session`` with what only its living leader tells; ProcessGone."""
    pid, proc = session.leader.pid, observer.proc
    environ = proc.environ(pid, pid) or b""
    folders = [environment_value(environ, name) for name in ("JOBLIB_TEMP_FOLDER", "TMPDIR")]
    session = replace(session, oom_counter=observer.oom_counter(pid))
    return replace(
        session,
        cgroup=observer.cgroup_path(pid),
        adopters=observer.ancestors(pid),
        namespaces=proc.namespaces(pid),
        oom_kills=observer.oom_kills_in(session),
        temp_dirs=tuple(folder for folder in (*folders, "/tmp") if os.path.isabs(folder)),  # noqa: S108
    )


class Adoption:
    """Takes sessions on for the core."""

    def __init__(self, core: Core, socket_path: str) -> None:
        self._core = core
        self._observer = core.observer
        self._socket_path = socket_path

    def recover(self) -> None:
        """Take on again what was on record when the last daemon ended."""
        for session in self._core.store.sessions():
            if session.cause is not None:
                self._core.take_on(session, None, None)
                continue
            try:
                handle = pidfd.open_pidfd(session.leader, self._observer.proc)
            except ProcessGone:
                log.info("leader died unseen session=%s pid=%d", session.id, session.leader.pid)
                self._core.take_on(session, None, None)
                continue
            self._core.take_on(session, handle, self._open_page(session))

    def _open_page(self, session: Session) -> int | None:
        if session.page_fd < 0:
            return None
        path = self._observer.proc.descriptor_path(session.leader.pid, session.page_fd)
        with contextlib.suppress(OSError, wire.WireError):
            return page.open_page(path, uid=session.uid)
        return None

    def sweep(self, *, all_of_them: bool) -> None:
        """Look for marks of sessions that are not on record; of new processes, or of all of them."""
        for found in self._observer.sweep(all_of_them=all_of_them):
            try:
                if isinstance(found, Stray):
                    self._adopt_by_environment(found)
                elif not self._adopt_by_page(found):
                    os.close(found.descriptor)
            except ProcessGone:
                if isinstance(found, FoundPage):
                    os.close(found.descriptor)

    def _adopt_by_page(self, found: FoundPage) -> bool:
        """Take on the session of a page; True when the page's descriptor went along."""
        told, holder = found.page, found.holder
        if (
            told.id in self._core.entries
            or self._socket_path not in told.sockets
            or told.boot_id != self._observer.boot_id
        ):
            return False
        session = Session(told.id, told.name, found.uid, found.gid, holder.id, now_utc(), told.page_fd)
        if self._observer.namespaced_pid(holder.id.pid) == told.pid and self._observer.same_ticks(
            holder.id, told.start_ticks
        ):
            session = replace(describe_leader(session, self._observer), ending=bool(told.flags & wire.ENDED))
            self._core.take_on(session, pidfd.open_pidfd(holder.id, self._observer.proc), found.descriptor)
            self._note(session, "its leader lives")
            return True
        leader = ProcessId(told.pid, told.start_ticks)
        if self._observer.could_be_orphan(holder.id, leader):
            cgroup = self._observer.cgroup_path(holder.id.pid)
            self._adopt_dead(replace(session, leader=leader), cgroup)
        return False

    def _adopt_by_environment(self, stray: Stray) -> None:
        """Take on a session whose dead leader only the environment of an exec'ed worker names."""
        if stray.session in self._core.entries:
            return
        told = wire.SessionId.parse(stray.session)
        if wire.place_of(self._socket_path, stray.cgroup) != told.place:
            return  # another daemon's, or carried into another cgroup
        leader = ProcessId(told.pid, told.start_ticks)
        if self._observer.could_be_orphan(stray.holder.id, leader):
            session = Session(stray.session, "", stray.uid, stray.gid, leader, now_utc())
            self._adopt_dead(session, stray.cgroup)

    def _adopt_dead(self, session: Session, cgroup: str) -> None:
        known = wire.place_of(self._socket_path, cgroup) == wire.SessionId.parse(session.id).place
        session = replace(
            session,
            cgroup=cgroup if known else None,
            namespaces=self._observer.proc.namespaces(os.getpid()),
            temp_dirs=("/tmp",),  # noqa: S108
        )
        self._core.take_on(session, None, None)
        self._note(session, "its leader died unseen")

    def _note(self, session: Session, how: str) -> None:
        log.info(
            "adopted session=%s name=%r pid=%d uid=%d: %s",
            session.id,
            session.name,
            session.leader.pid,
            session.uid,
            how,
        )
        self._core.record(report.session_event("registered", session, adopted=True))
