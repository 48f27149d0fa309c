"""Sessions that no message told of: those on record when the last daemon ended, and those found by their marks."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace

from agent import wire
from reaperd import report
from reaperd.core import Core
from reaperd.linux import pidfd
from reaperd.linux.procfs import ProcessGone
from reaperd.model import UNKNOWN_CAUSE, ProcessId, Session
from reaperd.sweep import FoundPage, StampedProcess, Sweep
from reaperd.times import now_utc

log = logging.getLogger(__name__)


class Adoption:
    """Takes sessions on for the core."""

    def __init__(self, core: Core, socket_path: str) -> None:
        self._core = core
        self._observer = core.observer
        self._sweep = Sweep(core.observer)
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
            page_fd = self._open_page(session)
            # A page that the leader no longer has: it has unregistered while no daemon was there, or exec'ed.
            gone = page_fd is None and session.page_fd >= 0 and not pidfd.has_exited(handle)
            self._core.take_on(replace(session, ending=session.ending or gone), handle, page_fd)

    def _open_page(self, session: Session) -> int | None:
        with contextlib.suppress(OSError, wire.WireError):
            return self._observer.open_page(session.leader.pid, session.page_fd, session.uid)
        return None

    def sweep(self, *, all_of_them: bool) -> None:
        """Look for marks of sessions that are not on record; of new processes, or of all of them."""
        for found in self._sweep.run(all_of_them=all_of_them):
            with contextlib.ExitStack() as ours:
                if isinstance(found, FoundPage):
                    ours.callback(os.close, found.descriptor)
                session_id = found.page.id if isinstance(found, FoundPage) else found.session
                if self._is_known(session_id) or self._core.has_no_room_for(found.uid):
                    continue
                # OSError: descriptors or processes ran out; the marks will be found again.
                with contextlib.suppress(ProcessGone, OSError):
                    if not isinstance(found, FoundPage):
                        self._adopt_by_environment(found)
                    elif self._adopt_by_page(found):
                        ours.pop_all()

    def _is_known(self, session_id: str) -> bool:
        return session_id in self._core.entries or self._core.is_settled(session_id)

    def _adopt_by_page(self, found: FoundPage) -> bool:
        """Take on the session of a page; True when the page's descriptor went along."""
        told, holder = found.page, found.holder
        if self._socket_path not in told.sockets or told.boot_id != self._observer.boot_id:
            return False
        session = Session(told.id, told.name, found.uid, found.gid, holder.id, now_utc(), told.page_fd)
        if self._observer.namespaced_pid(holder.id.pid) == told.pid and self._observer.same_ticks(
            holder.id, told.start_ticks
        ):
            if self._core.leads_another(session):
                return False
            session = self._observer.describe_leader(session)
            leader_pidfd = pidfd.open_pidfd(holder.id, self._observer.proc)
            self._note(session, "its leader lives")
            self._core.take_on(session, leader_pidfd, found.descriptor)
            return True
        leader = ProcessId(told.pid, told.start_ticks)
        if self._observer.could_be_orphan(holder.id, leader):
            clean = bool(told.flags & (wire.CLOSING | wire.ENDED))
            spared = frozenset(ProcessId(*pair) for pair in told.spared)
            session = replace(
                session, leader=leader, spared=spared, cause=replace(UNKNOWN_CAUSE, clean=clean)
            )
            self._adopt_dead(session, self._observer.cgroup_path(holder.id.pid))
        return False

    def _adopt_by_environment(self, found: StampedProcess) -> None:
        """Take on a session whose dead leader only the environment of an exec'ed worker names."""
        told = wire.SessionId.parse(found.session)
        if wire.place_of(self._socket_path, found.cgroup, found.uid) != told.place:
            return  # another daemon's, or carried into another cgroup or to another user
        leader = ProcessId(told.pid, told.start_ticks)
        if self._observer.could_be_orphan(found.holder.id, leader):
            session = Session(found.session, "", found.uid, found.gid, leader, now_utc())
            self._adopt_dead(session, found.cgroup)

    def _adopt_dead(self, session: Session, cgroup: str) -> None:
        known = (
            wire.place_of(self._socket_path, cgroup, session.uid) == wire.SessionId.parse(session.id).place
        )
        session = replace(
            session,
            cgroup=cgroup if known else None,
            namespaces=self._observer.proc.namespaces(os.getpid()),
            temp_dirs=("/tmp",),  # noqa: S108
        )
        self._note(session, "its leader died unseen")
        self._core.take_on(session, None, None)

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
