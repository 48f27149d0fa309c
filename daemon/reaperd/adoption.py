"""Sessions that no message told of: those on record when the last daemon ended, and those found by their marks."""

from __future__ import annotations

import contextlib
import logging
import os

from agent import wire
from reaperd import report
from reaperd.core import Core
from reaperd.isolation import path_of_scope
from reaperd.linux import pidfd
from reaperd.linux.page import OpenPage
from reaperd.linux.procfs import ProcessGone, ProcessHidden
from reaperd.model import TEMP_DIRS, UNKNOWN_CAUSE, ProcessId, Session, SessionKey
from reaperd.observer import realm_of
from reaperd.pages import Page
from reaperd.sweep import FoundPage, StampedProcess, Sweep
from reaperd.times import now_utc

log = logging.getLogger(__name__)


class Adoption:
    """Takes sessions on for the core."""

    def __init__(self, core: Core, socket_path: str) -> None:
        self._core = core
        self._observer = core.observer
        self._sweep = Sweep(core.observer, self._is_known)
        self._socket_path = socket_path
        self._on_record: list[Session] = []  # that nobody could take on yet
        self._hidden: set[SessionKey] = set()  # of those, whose leader's life cannot be told

    def recover(self) -> None:
        """Take on again what was on record when the last daemon ended."""
        self._on_record = self._core.store.sessions()
        self._recover_those_left()

    def _recover_those_left(self) -> None:
        """Take on who is not set aside: a session that cannot be taken on must not keep the daemon from all others."""
        aside = self._core.sessions.aside
        for session in self._on_record:
            if session.key not in self._core.sessions.entries and aside.until_s(session.key) is None:
                with aside.trying(session.key, "take on the members"):
                    self._recover(session)
        self._on_record = [one for one in self._on_record if one.key not in self._core.sessions.entries]

    def _recover(self, session: Session) -> None:
        if session.cause is not None:
            self._core.take_on(session, None, None)
            return
        try:
            handle = pidfd.open_pidfd(session.leader, self._observer.proc)
        except ProcessHidden:  # until that can be told, it stays on record
            if session.key not in self._hidden:
                log.warning(
                    "cannot tell whether the leader lives, looking again session=%s pid=%d: /proc hides it (hidepid)",
                    session.id, session.leader.pid,
                )  # fmt: skip
            self._hidden.add(session.key)
            return
        except ProcessGone:
            log.info("leader died unseen session=%s pid=%d", session.id, session.leader.pid)
            self._core.take_on(session, None, None)
            return
        opened, gone = self._open_page(session)
        gone = gone and not pidfd.has_exited(handle)
        self._core.take_on(session._replace(ending=session.ending or gone), handle, opened)

    def _open_page(self, session: Session) -> tuple[OpenPage | None, bool]:
        """Return the page, and whether its leader no longer has it: it has unregistered meanwhile, or exec'ed."""
        if session.page_fd < 0:
            return None, False
        try:
            page_fd = self._observer.open_page(session.leader.pid, session.page_fd, session.uid)
            return OpenPage(page_fd), False
        except (FileNotFoundError, wire.WireError):
            return None, True
        except (ProcessGone, OSError):  # we cannot tell
            return None, False

    def sweep(self, listing: dict[int, int] | None = None) -> bool:
        """Look for marks of sessions that are not on record: on everybody, or on who is new in ``listing``.

        True when a session was taken on. Raises Interrupted in the second case, where a leader dies meanwhile.
        """
        self._recover_those_left()
        aside, before = self._core.sessions.aside, len(self._core.sessions.entries)
        for found in self._sweep.run(listing):
            with contextlib.ExitStack() as ours:
                if isinstance(found, FoundPage):
                    ours.callback(os.close, found.descriptor)
                # It may have been taken on since the sweep has asked.
                if self._is_known(found.key) or self._core.sessions.has_no_room_for(found.key.uid):
                    continue
                if aside.until_s(found.key) is not None:
                    continue
                # OSError: descriptors or processes ran out; the marks will be found again.
                with aside.trying(found.key, "adopt the members"), contextlib.suppress(ProcessGone, OSError):
                    if isinstance(found, FoundPage):
                        self._adopt_by_page(found)
                    else:
                        self._adopt_by_environment(found)
        return len(self._core.sessions.entries) > before

    def _is_known(self, key: SessionKey) -> bool:
        on_record = any(session.key == key for session in self._on_record)
        return on_record or key in self._core.sessions.entries or self._core.is_settled(key)

    def _adopt_by_page(self, found: FoundPage) -> None:
        """Take on the session of a page, if it is one of ours."""
        told, holder = found.page, found.holder
        if self._socket_path not in told.sockets or told.boot_id != self._observer.boot_id:
            return
        leader = ProcessId(told.pid, told.start_ticks)
        if told.start_ticks != wire.SessionId.parse(told.id).start_ticks:
            return
        session = Session(
            told.id, told.name, holder.uid, holder.gid, holder.stat.id, now_utc(), told.page_fd,
            temp_dirs=(*holder.folders, *TEMP_DIRS), attempt=told.attempt,
        )  # fmt: skip
        if self._leads(holder.stat.id, told):
            if self._core.sessions.led_by(holder.stat.id):
                return
            session = self._observer.describe_leader(session)
            session = session._replace(scope=self._core.scope_in(session.key, session.cgroup or "/"))
            leader_pidfd = pidfd.open_pidfd(holder.stat.id, self._observer.proc)
            self._note(session, "its leader lives")
            self._core.take_on(session, leader_pidfd, OpenPage(os.dup(found.descriptor)))
            return
        # A leader of another realm is nobody that we could see dead: there its pid and start time are another's.
        if told.realm == self._observer.realm and self._observer.could_be_orphan(holder.stat.id, leader):
            clean = bool(told.flags & (wire.CLOSING | wire.ENDED))
            spared = frozenset(ProcessId(*pair) for pair in told.spared)
            session = session._replace(
                leader=leader, spared=spared, cause=UNKNOWN_CAUSE._replace(clean=clean)
            )
            self._adopt_dead(
                session, self._observer.cgroup_path(holder.stat.id.pid), os.dup(found.descriptor)
            )

    def _leads(self, holder: ProcessId, told: Page) -> bool:
        """Say whether ``holder`` is who a page names: a worker in namespaces of its own can bear the leader's numbers there."""
        return (
            self._observer.namespaced_pid(holder.pid) == told.pid
            and self._observer.same_ticks(holder, told.start_ticks)
            and realm_of(self._observer.proc.namespaces(holder.pid)) == told.realm
        )

    def _adopt_by_environment(self, found: StampedProcess) -> None:
        """Take on a session whose dead leader only the environment of an exec'ed worker names."""
        told, holder = wire.SessionId.parse(found.session), found.holder
        if not self._is_in_place(found.key, found.cgroup):
            return  # another daemon's, or carried into another cgroup, another container or to another user
        leader = ProcessId(told.pid, told.start_ticks)
        if not self._observer.could_be_orphan(holder.stat.id, leader):
            return
        # A page tells more; who holds it may not have had its turn yet, and without it would never be found again.
        for one in self._sweep.pages_of(holder.uid, leader.start_ticks):
            with contextlib.ExitStack() as ours:
                ours.callback(os.close, one.descriptor)
                if one.key == found.key and not self._is_known(found.key):
                    self._adopt_by_page(one)
        if not self._is_known(found.key):
            session = Session(
                found.session, "", holder.uid, holder.gid, leader, now_utc(),
                temp_dirs=(*holder.folders, *TEMP_DIRS),
            )  # fmt: skip
            self._adopt_dead(session, found.cgroup, None)

    def _adopt_dead(self, session: Session, cgroup: str, page_fd: int | None) -> None:
        session = session._replace(
            cgroup=cgroup if self._is_in_place(session.key, cgroup) else None,
            scope=self._core.scope_in(session.key, cgroup),
            namespaces=self._observer.proc.namespaces(os.getpid()),  # could_be_orphan() has seen to that
        )
        self._note(session, "its leader died unseen")
        self._core.take_on(session, None, None if page_fd is None else OpenPage(page_fd))

    def _is_in_place(self, key: SessionKey, cgroup: str) -> bool:
        """Say whether a session of ours, whose leader is dead, began in ``cgroup``, or was put there by a daemon of ours."""
        place = wire.place_of(self._socket_path, cgroup, key.uid, self._observer.realm)
        return (
            place == wire.SessionId.parse(key.id).place
            or path_of_scope(key, cgroup, self._socket_path) is not None
        )

    def _note(self, session: Session, how: str) -> None:
        log.info(
            "adopted session=%s name=%r pid=%d uid=%d: %s",
            session.id,
            session.name,
            session.leader.pid,
            session.uid,
            how,
        )
        self._core.sessions.record(report.session_event("registered", session, adopted=True))
