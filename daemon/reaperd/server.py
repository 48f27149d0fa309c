"""Answers requests: who may ask for what, and what they are told. Whoever asks is known from the kernel alone."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from agent import wire
from reaperd import __version__, report
from reaperd.core import Core, count_stuck
from reaperd.gate_link import GateLink, Peer, Return
from reaperd.ledger import Entry
from reaperd.linux import page, pidfd
from reaperd.linux.procfs import ProcessGone
from reaperd.model import Family, ProcessId, Role, Session
from reaperd.times import moment, now_utc

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 25
_WAITERS_PER_UID = 64
_FRESH_S = 0.1  # a look that is younger answers the next question, too
_MOST_EVENTS = 500
_NOBODY = ProcessId(0, 0)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the server tells of the daemon itself."""

    mode: str
    config_path: str
    config_toml: str
    max_workers: int
    admins: frozenset[int]
    dry_run: bool


@dataclass(frozen=True, slots=True)
class _Waiter:
    """A peer that waits for the next event."""

    to: Return
    uid: int
    question: dict[str, Any]
    until_s: float


class Server:
    """The daemon's side of the wire protocol."""

    def __init__(self, core: Core, link: GateLink, facts: Facts) -> None:
        self.facts = facts
        self._core = core
        self._link = link
        self._waiters: list[_Waiter] = []
        self._families: dict[str, Family] = {}
        self._looked_at_s = 0.0
        self._started_at_s = time.monotonic()
        self._operations: dict[str, Callable[[Peer, dict[str, Any]], dict[str, Any]]] = {
            "register": self._register,
            "unregister": self._unregister,
            "ping": self._ping,
            "status": self._status,
            "ps": self._ps,
            "stop": self._stop,
            "config": self._config,
        }
        core.on_event = self.answer_waiters

    def answer(self, peer: Peer, to: Return, message: dict[str, Any]) -> None:
        """Answer one request, or let its peer wait for an event."""
        try:
            reply = self._perform(peer, to, message)
            if reply is not None:
                self._link.reply(to, wire.ok(**reply))
        except wire.WireError as error:
            self._link.reply(to, wire.refusal(error))
        except Exception:  # one request must never end the daemon
            log.exception("cannot answer a request of uid=%d pid=%d", peer.uid, peer.pid)
            mistake = wire.WireError("internal", "the daemon made a mistake; its log has the details")
            self._link.reply(to, wire.refusal(mistake))

    def _perform(self, peer: Peer, to: Return, message: dict[str, Any]) -> dict[str, Any] | None:
        operation = wire.text_field(message, "op", limit=64)
        if operation == "events":
            return self._events_or_wait(peer, to, message)
        perform = self._operations.get(operation)
        if perform is None:
            known = ", ".join(sorted((*self._operations, "events")))
            raise wire.WireError("unknown-op", f"op: there is no {operation!r:.80}, there are {known}")
        return perform(peer, message)

    # -- sessions ----------------------------------------------------------------------------

    def _register(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        session_id = wire.text_field(message, "session", limit=64)
        told = wire.SessionId.parse(session_id)
        name = _name(message.get("name"))
        page_fd = wire.integer_field(message, "page_fd", default=-1, least=-1)
        if wire.integer_field(message, "start_ticks") != told.start_ticks:
            raise wire.WireError("bad-session", "start_ticks: does not match the session id")
        try:
            with contextlib.ExitStack() as ours:
                handle = peer.open_pidfd()
                ours.callback(os.close, handle)
                session = self._describe(
                    peer, Session(session_id, name, peer.uid, peer.gid, _NOBODY, now_utc(), page_fd)
                )
                if not self._is_new(session):
                    return self._registered(session_id)
                descriptor = self._open_page(session)
                if descriptor is not None:
                    ours.callback(os.close, descriptor)
                session = self._core.observer.describe_leader(session)
                if pidfd.has_exited(handle):  # what was read may be the next owner's of the pid
                    raise ProcessGone(str(peer.pid))
                self._supersede(session)
                ours.pop_all()  # the core's from here on, whatever take_on() does
                log.info("registered session=%s name=%r pid=%d uid=%d", session_id, name, peer.pid, peer.uid)
                self._core.record(report.session_event("registered", session))
                self._core.take_on(session, handle, descriptor)
        except ProcessGone:
            raise wire.WireError("gone", "you have exited") from None
        return self._registered(session_id)

    def _registered(self, session_id: str) -> dict[str, Any]:
        return {"session": session_id, "max_workers": self.facts.max_workers}

    def _describe(self, peer: Peer, session: Session) -> Session:
        """Return ``session`` with its leader, who is the peer and nobody else."""
        observer, told = self._core.observer, wire.SessionId.parse(session.id)
        leader = observer.proc.stat(peer.pid).id
        if observer.namespaced_pid(peer.pid) != told.pid:
            raise wire.WireError("bad-session", "session: the id does not begin with your pid")
        if not observer.same_ticks(leader, told.start_ticks):
            raise wire.WireError("bad-session", "start_ticks: that is not when you started")
        if peer.pid <= 1 or leader in self._core.policy.untouchable:
            raise wire.WireError("not-allowed", "the daemon, its ancestors and init cannot be sessions")
        return replace(session, leader=leader)

    def _is_new(self, session: Session) -> bool:
        """Say whether the session is to be taken on; registering twice is granted, another's session is refused."""
        entry = self._core.entries.get(session.id)
        if entry is not None:
            if entry.session.leader == session.leader and entry.session.uid == session.uid:
                return False
            raise wire.WireError("session-exists", "another process leads that session")
        if self._core.has_no_room_for(session.uid):
            most = self._core.policy.max_per_uid
            raise wire.WireError(
                "quota", f"you have {most} sessions, and [sessions] max_per_uid allows no more"
            )
        return True

    def _open_page(self, session: Session) -> int | None:
        """Return the page of a session that has one: other languages need not make any."""
        if session.page_fd < 0:
            return None
        try:
            descriptor = self._core.observer.open_page(session.leader.pid, session.page_fd, session.uid)
        except OSError as error:
            raise wire.WireError("bad-page", f"cannot open the session page: {error.strerror}") from None
        try:
            if page.read_page(descriptor).id != session.id:
                raise wire.WireError("bad-page", "the session page is another session's")
        except wire.WireError:
            os.close(descriptor)
            raise
        return descriptor

    def _supersede(self, session: Session) -> None:
        """End an older session of the same leader, whose end it could not tell us."""
        for other_id, entry in list(self._core.entries.items()):
            other = entry.session
            if other.leader == session.leader and not other.ending and entry.died_at_s is None:
                self._core.unregister(other_id)

    def _unregister(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        entry = self._core.entries.get(wire.text_field(message, "session", limit=64))
        if entry is None:
            raise wire.WireError("unknown-session", "there is no such session")
        if entry.session.leader.pid != peer.pid or entry.session.uid != peer.uid:
            raise wire.WireError("not-allowed", "only its leader can end a session so")
        if not entry.session.ending:
            log.info("unregistered session=%s name=%r pid=%d", entry.session.id, entry.session.name, peer.pid)
            self._core.unregister(entry.session.id)
        return {}

    def _stop(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        entry = self._find(peer, wire.text_field(message, "session", limit=wire.MAX_NAME_CHARS))
        session = entry.session
        if self.facts.dry_run:
            raise wire.WireError("not-allowed", "the daemon runs with dry_run: it signals nobody")
        if session.ending and entry.died_at_s is None:
            raise wire.WireError(
                "ended", "its leader has ended that session and lives on: it is not Reaper's to stop"
            )
        last = self._core.store.last_event()
        if entry.died_at_s is None and entry.leader_target is None:
            log.info("asked to stop session=%s name=%r asked_by_uid=%d", session.id, session.name, peer.uid)
            self._core.stop_leader(session.id, peer.uid)
        return {"session": session.id, "after": last}

    def _find(self, peer: Peer, wanted: str) -> Entry:
        """Return the one session that ``wanted`` names: an id, a name, or the beginning of an id."""
        mine = [entry for entry in self._core.entries.values() if self._may_act(peer, entry.session)]
        # Another user's session of the same name must not make one's own ambiguous.
        for sessions in (mine, list(self._core.entries.values())):
            found = _named(sessions, wanted)
            if found is not None:
                if not self._may_act(peer, found.session):
                    raise wire.WireError("not-allowed", "that session is another user's")
                return found
        raise wire.WireError("unknown-session", f"there is no session {wanted!r:.80}")

    def _may_act(self, peer: Peer, session: Session) -> bool:
        return peer.uid in (0, session.uid) or peer.uid in self.facts.admins

    # -- telling -----------------------------------------------------------------------------

    def _ping(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        del peer, message
        return {"version": __version__, "pid": os.getpid()}

    def _config(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        del peer, message
        return {"toml": self.facts.config_toml}

    def _status(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        ping = self._ping(peer, message)
        entries = self._core.entries
        families = self._look()
        workers = sum(
            1
            for family in families.values()
            for member in family.members.values()
            if member.role is Role.WORKER
        )
        orphans = sum(
            1 for entry in entries.values() for id_ in entry.targets if not entry.targets[id_].gone_at_s
        )
        store = self._core.store
        return {
            "status": {
                **ping,
                "uptime_s": round(time.monotonic() - self._started_at_s, 3),
                "mode": self.facts.mode,
                "config": self.facts.config_path,
                "sessions": len(entries),
                "workers": workers,
                "orphans": orphans,
                "stuck": count_stuck(entries.values()),
                "quarantined": 0,
                "reaped_total": store.total("reaped"),
                "freed_bytes_total": store.total("freed_bytes"),
                "dry_run": self.facts.dry_run,
                "gate_restarts": self._link.lives_lost,
            }
        }

    def _look(self) -> dict[str, Family]:
        now_s = time.monotonic()
        if now_s - self._looked_at_s > _FRESH_S:
            self._families = self._core.look_at_living()
            self._looked_at_s = now_s
        return {id_: family for id_, family in self._families.items() if id_ in self._core.entries}

    def _ps(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        del message
        families = self._look()
        return {"sessions": [self._record(peer, entry, families) for entry in self._core.entries.values()]}

    def _record(self, peer: Peer, entry: Entry, families: dict[str, Family]) -> dict[str, Any]:
        session = entry.session
        if entry.died_at_s is None:
            family = families.get(session.id)
            members = family.members if family is not None else {}
        else:
            members = {id_: t.member for id_, t in entry.targets.items() if t.gone_at_s is None}
        usage = {id_: self._core.observer.usage(member.process) for id_, member in members.items()}
        leader = self._core.observer.leader(session) if self._may_act(peer, session) else None
        cmdline = None if leader is None else self._core.observer.marks.argv(leader)
        told = self._core.page_of(session.id)
        return report.session_record(
            entry, members, usage, leader_cmdline=cmdline, progress=told.progress if told else None
        )

    # -- events ------------------------------------------------------------------------------

    def _events_or_wait(self, peer: Peer, to: Return, message: dict[str, Any]) -> dict[str, Any] | None:
        wait_s = min(wire.integer_field(message, "wait_s", default=0), _LONGEST_WAIT_S)
        reply = self._events(peer.uid, message)
        waiting = sum(1 for waiter in self._waiters if waiter.uid == peer.uid)
        if reply["events"] or not wait_s or waiting >= _WAITERS_PER_UID:
            return reply
        self._waiters.append(_Waiter(to, peer.uid, message, time.monotonic() + wait_s))
        return None

    def _events(self, uid: int, message: dict[str, Any]) -> dict[str, Any]:
        since_epoch_s = 0.0
        if message.get("since") is not None:
            text = wire.text_field(message, "since", limit=64)
            when = moment(text)
            if when is None:
                raise wire.WireError("bad-request", f"since: must be an RFC 3339 time, got {text!r:.60}")
            since_epoch_s = when.timestamp()
        session = (
            wire.text_field(message, "session", limit=64) if message.get("session") is not None else None
        )
        sees_all = uid == 0 or uid in self.facts.admins
        events = self._core.store.events(
            after=wire.integer_field(message, "after", default=0),
            since_epoch_s=since_epoch_s,
            session=session,
            uid=None if sees_all else uid,
            limit=_MOST_EVENTS,
        )
        last = events[-1]["seq"] if events else self._core.store.last_event()
        return {"events": events, "last": last}

    def answer_waiters(self) -> None:
        """Answer who waits for events that are there now."""
        waiting, self._waiters = self._waiters, []
        now_s = time.monotonic()
        for waiter in waiting:
            reply = self._events(waiter.uid, waiter.question)
            if reply["events"] or waiter.until_s <= now_s:
                self._link.reply(waiter.to, wire.ok(**reply))
            else:
                self._waiters.append(waiter)

    def next_deadline(self) -> float | None:
        """Return when the next waiter has waited long enough."""
        return min((waiter.until_s for waiter in self._waiters), default=None)


def _named(sessions: list[Entry], wanted: str) -> Entry | None:
    """Return the one of ``sessions`` that ``wanted`` names, None where none does."""
    for matches in (
        [entry for entry in sessions if entry.session.id == wanted],
        [entry for entry in sessions if entry.session.name == wanted],
        [entry for entry in sessions if entry.session.id.startswith(wanted)],
    ):
        if len(matches) > 1:
            ids = ", ".join(sorted(entry.session.id for entry in matches)[:10])
            raise wire.WireError("ambiguous-session", f"{wanted!r:.80} can be any of {ids}")
        if matches:
            return matches[0]
    return None


def _name(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > wire.MAX_NAME_CHARS or "\0" in value:
        raise wire.WireError(
            "bad-request", f"name: must be a text of at most {wire.MAX_NAME_CHARS} characters"
        )
    return value
