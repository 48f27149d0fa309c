"""Answers requests: who may ask for what, and what they are told. Whoever asks is known from the kernel alone."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from agent import wire
from reaperd import __version__, report
from reaperd.alerts import Alerts
from reaperd.census import Interrupted
from reaperd.core import Core, count_stuck
from reaperd.gate_link import GateLink, Peer, Return
from reaperd.ledger import Entry
from reaperd.linux import pidfd
from reaperd.linux.exhaustion import is_exhaustion, reason_of, tell_exhaustion
from reaperd.linux.page import OpenPage
from reaperd.linux.procfs import ProcessGone
from reaperd.listing import Listing
from reaperd.model import TEMP_DIRS, ProcessId, Role, Session, SessionKey
from reaperd.orphan_requests import OrphanRequests
from reaperd.orphans import Orphans
from reaperd.questions import Question, parse_question
from reaperd.surroundings import Lack
from reaperd.times import moment, now_utc
from reaperd.turns import Turns
from reaperd.waiters import Waiter, Waiters

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 25
_MAX_REQUESTS = 2048  # that wait
_TURN_S = 0.002  # for answering: then whoever died meanwhile is looked at
# What it costs a user to register anew what was registered: the history of both is longer than the time that it took us.
_SUPERSEDING_S = 0.02
# And what one costs systemd that is to be isolated.
_ISOLATING_S = 0.02
_MAX_EVENTS = 500
_MAX_FOLDERS = 4
_NOBODY = ProcessId(0, 0)
_ROOT_OF_CONTAINERS = -1  # whose turn it is where root of some container asks: that is not the machine's


class Facts(NamedTuple):
    """What the server tells of the daemon itself."""

    mode: str
    config_path: str
    config_toml: str
    max_workers: int
    admins: frozenset[int]
    dry_run: bool
    isolate: bool = False
    lacks: tuple[Lack, ...] = ()  # what it has to do without, where it runs


class Counts(NamedTuple):
    """How many there are now."""

    sessions: int
    workers: int  # of leaders that live
    orphans: int
    stuck: int
    quarantined: int


class _Request(NamedTuple):
    """A request that waits for its turn."""

    peer: Peer
    to: Return
    message: dict[str, Any]


class Server:
    """The daemon's side of the wire protocol."""

    def __init__(self, core: Core, link: GateLink, facts: Facts, orphans: Orphans, alerts: Alerts) -> None:
        self.facts = facts
        self._core = core
        self._link = link
        # Our own user has no one else to spare where we are not root.
        most = min(_MAX_REQUESTS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 16)
        self._turns: Turns[_Request] = Turns(frozenset((0, os.geteuid())), most)
        self._waiters: Waiters[Return] = Waiters()
        self._listing = Listing(core)
        self._started_at_s = time.monotonic()
        self._operations: dict[str, Callable[[Peer, dict[str, Any]], dict[str, Any]]] = {
            "unregister": self._unregister,
            "ping": self._ping,
            "status": self._status,
            "stop": self._stop,
            "config": self._config,
            **OrphanRequests(core, orphans, self._may_act_on).operations,
        }
        self._orphans = orphans
        self._alerts = alerts
        core.sessions.listeners.append(self._waiters.note)

    # -- whose turn it is --------------------------------------------------------------------

    def admit(self, peer: Peer, to: Return, message: dict[str, Any]) -> None:
        """Let a request wait for its turn."""
        if self._turns.is_generous(peer.uid):
            container = "unknown"
            with contextlib.suppress(OSError, MemoryError):  # they may have run out
                container = self._container_of(peer)
            peer = peer._replace(container=container)
        if not self._turns.add(self._account_of(peer), _Request(peer, to, message)):
            peer.connection.close()
            busy = wire.WireError("busy", "too many of your requests wait already: try again in a second")
            self._link.reply(to, wire.encode(wire.refusal(busy)))

    def take_turns(self) -> None:
        """Answer requests for a few milliseconds, and no more where a leader has died meanwhile; then tell of new events."""
        now_s = time.monotonic()
        until_s = now_s + _TURN_S
        while now_s < until_s and not self._core.is_called_away():
            request = self._turns.take(now_s)
            if request is None:
                break
            began_s = _spent_s()
            self._answer(request)
            now_s = time.monotonic()
            self._turns.charge(self._account_of(request.peer), _spent_s() - began_s, now_s)
        self._answer_waiters(now_s)

    def _account_of(self, peer: Peer) -> int:
        """Return who takes the turns of ``peer``, and pays for them: root of a container is not the machine's."""
        return _ROOT_OF_CONTAINERS if peer.container and self._turns.is_generous(peer.uid) else peer.uid

    def next_deadline(self) -> float | None:
        """Return when there is something to do: a request has its turn, or somebody has waited long enough for an event."""
        due = (
            self._turns.next_at_s(time.monotonic()),
            self._waiters.next_deadline(),
            0.0 if self._waiters.has_news() else None,
        )
        return min((at_s for at_s in due if at_s is not None), default=None)

    def close(self) -> None:
        """Let go of those who wait."""
        for request in self._turns.drain():
            request.peer.connection.close()

    def _answer(self, request: _Request) -> None:
        """Answer one request, or let its peer wait for an event."""
        peer, to, message = request
        try:
            reply = self._perform(peer._replace(container=self._container_of(peer)), to, message)
        except wire.WireError as error:
            reply = wire.encode(wire.refusal(error))
        except Interrupted:
            reply = wire.encode(
                wire.refusal(wire.WireError("busy", "a script has just ended, and goes first: try again"))
            )
        except Exception as error:  # one request must never end the daemon
            reason = wire.WireError("internal", "the daemon made a mistake; its log has the details")
            if is_exhaustion(error):
                reason = wire.WireError(
                    "busy", f"the daemon has run out of something, {reason_of(error)}: try again"
                )
                log.warning("cannot answer a request of uid=%d: %s", peer.uid, reason_of(error))
            else:
                log.exception("cannot answer a request of uid=%d pid=%d", peer.uid, peer.pid)
            reply = wire.encode(wire.refusal(reason))
        finally:
            peer.connection.close()
        if reply is not None:
            self._link.reply(to, reply)

    def _perform(self, peer: Peer, to: Return, message: dict[str, Any]) -> bytes | None:
        operation = wire.text_field(message, "op", limit=64)
        if operation == "events":
            return self._events_or_wait(peer, to, message)
        if operation == "ps":
            return self._ps(peer)
        if operation == "register":
            return self._register_and_isolate(peer, to, message)
        if operation == "alerts":
            self._test_alerts(peer, to, message)
            return None
        perform = self._operations.get(operation)
        if perform is None:
            known = ", ".join(sorted((*self._operations, "alerts", "events", "ps", "register")))
            raise wire.WireError("unknown-op", f"op: there is no {operation!r:.80}, there are {known}")
        return wire.encode(wire.ok(**perform(peer, message)))

    # -- sessions ----------------------------------------------------------------------------

    def _register_and_isolate(self, peer: Peer, to: Return, message: dict[str, Any]) -> bytes | None:
        """Take a session on, and answer once it is isolated, where it is to be: what it starts must not be earlier."""
        asked = message.get("isolate", False)
        if not isinstance(asked, bool):
            raise wire.WireError("bad-request", f"isolate: must be true or false, got {asked!r:.60}")
        told = self._register(peer, message)
        if not (asked or self.facts.isolate):
            return wire.encode(wire.ok(**told))
        self._turns.charge(self._account_of(peer), _ISOLATING_S, time.monotonic())

        def answer(scope: str | None, why: str) -> None:
            self._link.reply(to, wire.encode(wire.ok(**told, isolated=scope is not None, not_isolated=why)))

        self._core.isolate(SessionKey(peer.uid, told["session"]), answer)
        return None

    def _register(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        session_id = wire.text_field(message, "session", limit=64)
        told = wire.SessionId.parse(session_id)
        name = _name(message.get("name"))
        page_fd = wire.integer_field(message, "page_fd", default=-1, least=-1)
        folders = _folders(message.get("temp_dirs"))
        attempt = wire.attempt_field(message)
        if wire.integer_field(message, "start_ticks") != told.start_ticks:
            raise wire.WireError("bad-session", "start_ticks: does not match the session id")
        try:
            with contextlib.ExitStack() as ours:
                handle = peer.open_pidfd()
                ours.callback(os.close, handle)
                session = self._describe(
                    peer,
                    Session(
                        session_id, name, peer.uid, peer.gid, _NOBODY, now_utc(), page_fd,
                        temp_dirs=(*folders, *TEMP_DIRS), attempt=attempt,
                    ),
                )  # fmt: skip
                if not self._is_new(session):
                    return self._registered(session_id)
                opened = self._open_page(session)
                if opened is not None:
                    ours.callback(opened.close)
                session = self._core.observer.describe_leader(self._supervised(session))
                if pidfd.has_exited(handle):  # what was read may be the next owner's of the pid
                    raise ProcessGone(str(peer.pid))
                self._supersede(peer, session)
                log.info("registered session=%s name=%r pid=%d uid=%d", session_id, name, peer.pid, peer.uid)
                self._core.sessions.record(report.session_event("registered", session))
                ours.pop_all()  # the core's from here on, whatever take_on() does
                self._core.take_on(session, handle, opened)
                self._core.sessions.put_on_record(session.key)
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
        return session._replace(leader=leader)

    def _is_new(self, session: Session) -> bool:
        """Say whether the session is to be taken on; registering twice is granted, another's session is refused."""
        entry = self._core.sessions.entries.get(session.key)
        if entry is not None:
            if entry.session.leader == session.leader:
                return False
            raise wire.WireError("session-exists", "another process leads that session")
        if self._core.sessions.has_no_room_for(session.uid):
            in_all, most = len(self._core.sessions.entries), self._core.policy.max_per_uid
            reason = f"you have {most} sessions, and [sessions] max_per_uid allows no more"
            if in_all >= self._core.sessions.most:
                reason = (
                    f"all users have {in_all} sessions, and the daemon's limit of open files allows no more"
                )
            raise wire.WireError("quota", reason)
        return True

    def _supervised(self, session: Session) -> Session:
        """Return ``session`` as one under `reaperctl run`, where an older one of the same leader is: it has exec'ed since."""
        older = (entry.session.attempt for entry in self._core.sessions.led_by(session.leader))
        return session._replace(attempt=session.attempt or next(filter(None, older), None))

    def _open_page(self, session: Session) -> OpenPage | None:
        """Return the page of a session that has one: other languages need not make any."""
        if session.page_fd < 0:
            return None
        try:
            opened = OpenPage(self._core.observer.open_page(session.leader.pid, session.page_fd, session.uid))
        except OSError as error:
            tell_exhaustion(error)
            raise wire.WireError("bad-page", f"cannot open the session page: {error.strerror}") from None
        try:
            if opened.read().id != session.id:
                raise wire.WireError("bad-page", "the session page is another session's")
        except wire.WireError:
            opened.close()
            raise
        return opened

    def _supersede(self, peer: Peer, session: Session) -> None:
        """End an older session of the same leader, whose end it could not tell us."""
        for entry in self._core.sessions.led_by(session.leader):
            if entry.died_at_s is None:
                self._turns.charge(self._account_of(peer), _SUPERSEDING_S, time.monotonic())
                self._core.unregister(entry.session.key)

    def _unregister(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        session_id = wire.text_field(message, "session", limit=64)
        entry = self._core.sessions.entries.get(SessionKey(peer.uid, session_id))
        if entry is None and not any(key.id == session_id for key in self._core.sessions.entries):
            raise wire.WireError("unknown-session", "there is no such session")
        if entry is None or entry.session.leader.pid != peer.pid:
            raise wire.WireError("not-allowed", "only its leader can end a session so")
        if not entry.session.ending:
            log.info("unregistered session=%s name=%r pid=%d", entry.session.id, entry.session.name, peer.pid)
            self._core.unregister(entry.session.key)
            self._core.sessions.put_on_record(entry.session.key)
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
            self._core.stop_leader(session.key, peer.uid)
        return {"session": session.id, "after": last}

    def _find(self, peer: Peer, wanted: str) -> Entry:
        """Return the one session that ``wanted`` names: an id, a name, or the beginning of an id."""
        mine = [entry for entry in self._core.sessions.entries.values() if self._may_act(peer, entry.session)]
        # Another user's session of the same name must not make one's own ambiguous.
        for sessions in (mine, list(self._core.sessions.entries.values())):
            found = _named(sessions, wanted)
            if found is not None:
                if not self._may_act(peer, found.session):
                    raise wire.WireError("not-allowed", "that session is another user's")
                return found
        raise wire.WireError("unknown-session", f"there is no session {wanted!r:.80}")

    def _may_act(self, peer: Peer, session: Session) -> bool:
        if peer.container:
            return peer.uid == session.uid and peer.container == session.namespaces.pid
        return self._may_act_on(peer, session.uid)

    def _may_act_on(self, peer: Peer, uid: int | None, pid: int | None = None) -> bool:
        """Say whether ``peer`` may act on what is of ``uid``, the process ``pid`` for one; None: of several, or of anybody.

        From a container, that is what runs in the same one: its root may have the machine's uid 0, and is another's all the same.
        """
        if peer.container:
            same = pid is not None and self._core.observer.proc.pid_namespace(pid) == peer.container
            return same and peer.uid == uid
        return peer.uid in (0, uid) or peer.uid in self.facts.admins

    def _container_of(self, peer: Peer) -> str:
        """Return the pid namespace of ``peer`` where that is not ours; what is nobody's where it cannot be told."""
        try:
            handle = peer.open_pidfd()
        except ProcessGone:
            return "gone"
        try:
            return self._core.observer.container_of(peer.pid, handle)
        finally:
            os.close(handle)

    # -- telling -----------------------------------------------------------------------------

    def _ping(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        del peer, message
        return {"version": __version__, "pid": os.getpid()}

    def _config(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        del peer, message
        return {"toml": self.facts.config_toml}

    def _test_alerts(self, peer: Peer, to: Return, message: dict[str, Any]) -> None:
        """Have every target of alerts sent a message, and answer once it is known what came of that."""
        action = wire.text_field(message, "action", limit=64)
        if action != "test":
            raise wire.WireError("bad-request", f"action: there is no {action!r:.80}, there is test")
        if not self._may_act_on(peer, os.geteuid()):
            raise wire.WireError("not-allowed", "only root and the admins can test the alerts")

        def answer(results: list[dict[str, Any]] | None) -> None:
            untold = wire.WireError("failed", "what sends the alerts did not say what came of it")
            told = wire.refusal(untold) if results is None else wire.ok(results=results)
            self._link.reply(to, wire.encode(told))

        self._alerts.test(answer)
        log.info("asked to test the alerts asked_by_uid=%d", peer.uid)

    def _status(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        counts, store = self.count(), self._core.store
        return {
            "status": {
                **self._ping(peer, message),
                "uptime_s": round(time.monotonic() - self._started_at_s, 3),
                "mode": self.facts.mode,
                "config": self.facts.config_path,
                **counts._asdict(),
                "reaped_total": store.total("reaped"),
                "freed_bytes_total": store.total("freed_bytes"),
                "dry_run": self.facts.dry_run,
                "gate_restarts": self._link.lives_lost,
                "limits": [lack._asdict() for lack in self.facts.lacks],
            }
        }

    def count(self) -> Counts:
        """Return how many there are; of those whose leaders live, as they were when last looked at."""
        entries = self._core.sessions.entries
        families = self._listing.families().values()
        workers = sum(one.role is Role.WORKER for family in families for one in family.members.values())
        orphans = sum(
            1 for entry in entries.values() for id_ in entry.targets if not entry.targets[id_].gone_at_s
        )
        found = self._orphans.counts()
        return Counts(
            sessions=len(entries),
            workers=workers,
            orphans=orphans + found.orphans,
            stuck=count_stuck(entries.values()) + found.stuck,
            quarantined=found.quarantined,
        )

    def _ps(self, peer: Peer) -> bytes:
        whole = wire.encode(wire.ok(sessions=[]))
        sessions = self._listing.sessions(functools.partial(self._may_act, peer))
        return whole.removesuffix(b"[]}") + sessions + b"}"

    # -- events ------------------------------------------------------------------------------

    def _events_or_wait(self, peer: Peer, to: Return, message: dict[str, Any]) -> bytes | None:
        wait_s = min(wire.integer_field(message, "wait_s", default=0), _LONGEST_WAIT_S)
        question = self._question(peer, message)
        events = self._core.store.events(question, limit=_MAX_EVENTS)
        if events or not wait_s or not self._waiters.may_wait(peer.uid):
            return self._told(events)
        self._waiters.add(Waiter(to, peer.uid, question, time.monotonic() + wait_s))
        return None

    def _question(self, peer: Peer, message: dict[str, Any]) -> Question:
        since_epoch_s = 0.0
        if message.get("since") is not None:
            text = wire.text_field(message, "since", limit=64)
            when = moment(text)
            if when is None:
                raise wire.WireError("bad-request", f"since: must be an RFC 3339 time, got {text!r:.60}")
            since_epoch_s = when.timestamp()
        uid = None if self._may_act_on(peer, None) else peer.uid
        return parse_question(message, since_epoch_s=since_epoch_s, uid=uid, container=peer.container)

    def _told(self, events: list[dict[str, Any]]) -> bytes:
        last = events[-1]["seq"] if events else self._core.store.last_event()
        return wire.encode(wire.ok(events=events, last=last))

    def _answer_waiters(self, now_s: float) -> None:
        """Answer who waits for what has happened: each thing is written down once, whoever is told."""
        written: dict[tuple[int, ...], bytes] = {}
        for to, all_news in self._waiters.take(now_s):
            told = all_news[:_MAX_EVENTS]
            key = tuple(news.seq for news in told)
            if key not in written:
                written[key] = self._told([{"seq": news.seq, **news.event} for news in told])
            self._link.reply(to, written[key])


def _spent_s() -> float:
    """Return the seconds of CPU that we and our helpers have used: how long it took says more of the machine than of us."""
    helpers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.thread_time() + helpers.ru_utime + helpers.ru_stime


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


def _folders(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > _MAX_FOLDERS or not all(map(_is_folder, value)):
        raise wire.WireError(
            "bad-request", f"temp_dirs: must be a list of at most {_MAX_FOLDERS} absolute paths"
        )
    return tuple(value)


def _is_folder(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096 and os.path.isabs(value) and "\0" not in value


def _name(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > wire.MAX_NAME_CHARS or "\0" in value:
        raise wire.WireError(
            "bad-request", f"name: must be a text of at most {wire.MAX_NAME_CHARS} characters"
        )
    return value
