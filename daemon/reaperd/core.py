"""The core: takes sessions on, notices that their leaders die, and carries out what was decided. Owns all state.

Pure code decides (decide.py on ledger.py); this file fetches the facts, does the deeds and feeds both back.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from agent import wire
from reaperd import decide, ledger, report
from reaperd.causes import read_cause
from reaperd.escalation import Stage
from reaperd.ledger import Entry, Happening
from reaperd.linux import page, pidfd
from reaperd.linux.procfs import ProcessGone
from reaperd.model import (
    SIGNAL_NAMES,
    UNKNOWN_CAUSE,
    Cause,
    CauseKind,
    Family,
    Freed,
    Member,
    ProcessId,
    Role,
    Session,
    Snapshot,
)
from reaperd.observer import Observer
from reaperd.policy import Policy
from reaperd.poller import Poller
from reaperd.reaper import Outcome, Reaper
from reaperd.reclaimer import Reclaimer
from reaperd.store import Store
from reaperd.times import now_utc

log = logging.getLogger(__name__)

_MANY = 3  # so many sessions that are due for a look at once share one pass over all processes


class Core:
    """All sessions, and all that is done about them."""

    def __init__(
        self,
        observer: Observer,
        reaper: Reaper,
        store: Store,
        poller: Poller,
        policy: Policy,
    ) -> None:
        self.observer = observer
        self.store = store
        self.policy = policy
        self.entries: dict[str, Entry] = {}
        self.on_event: Callable[[], None] = lambda: None
        self._reaper = reaper
        self._poller = poller
        self._leaders: dict[str, int] = {}  # pidfds
        self._pages: dict[str, int] = {}  # our own descriptors of the session pages
        self._kept: dict[ProcessId, int] = {}  # pidfds of members that only descent tells
        self._exited: set[ProcessId] = set()
        self._mapped: dict[
            str, frozenset[str]
        ] = {}  # names in /dev/shm that a dead session's members had mapped
        self._unsaved: set[str] = set()
        self._told: set[str] = set()  # sessions that a dry run has spoken of
        self._reclaimer = Reclaimer(poller, observer, self._reclaimed)

    # -- taking sessions on ------------------------------------------------------------------

    def take_on(self, session: Session, leader_pidfd: int | None, page_fd: int | None) -> None:
        """Watch a session; without a pidfd its leader is dead already. The descriptors are ours, whatever comes of it."""
        if leader_pidfd is not None:
            self._leaders[session.id] = leader_pidfd
        if page_fd is not None:
            self._pages[session.id] = page_fd
        self.entries[session.id] = Entry(session)
        self._unsaved.add(session.id)
        if leader_pidfd is None:
            self._leader_is_dead(session.id, session.cause or UNKNOWN_CAUSE)
            return
        self._poller.watch(leader_pidfd, functools.partial(self._leader_died, session.id))
        self._read_page(session.id)
        family = self.judge(self.entries[session.id].session, self.observer.look_below(session))
        self._apply(session.id, ledger.Looked(family, time.monotonic(), 0.0))
        self._hold_kept(session.id)

    def has_no_room_for(self, uid: int) -> bool:
        """Say whether ``uid`` has as many sessions as one user may have."""
        mine = sum(1 for entry in self.entries.values() if entry.session.uid == uid)
        return mine >= self.policy.max_per_uid

    def leads_another(self, session: Session) -> bool:
        """Say whether the leader of ``session`` leads one already: it can have many pages, and lead but one session."""
        return any(
            entry.session.leader == session.leader and not entry.session.ending
            for entry in self.entries.values()
        )

    def is_settled(self, session_id: str) -> bool:
        """Say whether a session is over for good: whoever carries its marks still was left alone, or told of."""
        return session_id in self._told or self.store.is_settled(session_id)

    # -- the leader ends ---------------------------------------------------------------------

    def unregister(self, session_id: str) -> None:
        """The leader ended its session: what it left is watched until the leader ends, too."""
        self._apply(session_id, ledger.Unregistered())
        self.look_at_living()

    def stop_leader(self, session_id: str, by_uid: int) -> None:
        """Ask the leader to end, and make it end after the grace period."""
        session = self.entries[session_id].session
        process = self.observer.leader(session)
        if process is None:
            return
        handle = os.dup(self._leaders[session_id])
        self._reaper.take(session.leader, handle)
        member = Member(process, Role.WORKER, "leader", ("somebody asked to stop the session",), marked=True)
        self._apply(session_id, ledger.StopAsked(member, time.monotonic(), by_uid))

    def _leader_died(self, session_id: str) -> None:
        handle = self._leaders[session_id]
        self._poller.unwatch(handle)
        session = self.entries[session_id].session
        cause = self._read_cause(session, handle)
        flags = self._read_page(session_id)
        if cause.kind is CauseKind.EXIT and (flags & (wire.CLOSING | wire.ENDED) or session.ending):
            cause = replace(cause, clean=True)
        self._note_exit(
            session.leader
        )  # it may be somebody's target, too: it was to be stopped, or is a worker itself
        self._leader_is_dead(session_id, cause)

    def _leader_is_dead(self, session_id: str, cause: Cause) -> None:
        now_s = time.monotonic()
        wait_s = self.policy.exit_grace_s if cause.clean else 0.0
        self._drop_reused(session_id)
        self._apply(session_id, ledger.LeaderDied(cause, now_s, now_s + wait_s))

    def _read_cause(self, session: Session, handle: int) -> Cause:
        def vanished() -> int:
            return sum(1 for id_ in session.seen if not self.observer.is_alive(id_))

        return read_cause(session, handle, self.observer, vanished)

    def _amend_cause(self, entry: Entry) -> None:
        """Ask again why the leader died, where the kernel did not tell at once."""
        session, handle = entry.session, self._leaders.get(entry.session.id)
        if session.cause is not None and session.cause.kind is CauseKind.UNKNOWN and handle is not None:
            self._apply(session.id, ledger.CauseTold(self._read_cause(session, handle)))

    def _read_page(self, session_id: str) -> int:
        """Take from the page what only the leader knows, and return its flags."""
        told = self.page_of(session_id)
        if told is None:
            return 0
        session = self.entries[session_id].session
        if told.flags & wire.ENDED and not session.ending:
            self._apply(session_id, ledger.Unregistered())
        if self.observer.shares_our_namespaces(session):
            self._apply(session_id, ledger.Spared(frozenset(ProcessId(*pair) for pair in told.spared)))
        return told.flags

    def page_of(self, session_id: str) -> wire.Page | None:
        """Return what a session's page says now, None where it has none or says nonsense."""
        descriptor = self._pages.get(session_id)
        if descriptor is not None:
            with contextlib.suppress(wire.WireError, OSError):
                dead = pidfd.has_exited(self._leaders[session_id]) if session_id in self._leaders else True
                return page.read_page(descriptor, writer_is_dead=dead)
        return None

    # -- looking -----------------------------------------------------------------------------

    def judge(self, session: Session, snapshot: Snapshot) -> Family:
        """Return who belongs to ``session``."""
        return decide.judge(session, snapshot, self.policy)

    def look_at_living(self, *, note_usage: bool = False) -> dict[str, Family]:
        """Look who belongs to the sessions whose leaders live, and keep in mind those whom only descent tells."""
        living = [entry.session for entry in self.entries.values() if entry.died_at_s is None]
        for session in living:
            self._drop_reused(session.id)
            self._read_page(session.id)
        snapshot = self.observer.look_at_all([self.entries[session.id].session for session in living])
        if note_usage:
            self.observer.note_usage(snapshot)
        families = {}
        for session in living:
            family = self.judge(self.entries[session.id].session, snapshot)
            self._apply(session.id, ledger.Looked(family, time.monotonic(), 0.0))
            self._hold_kept(session.id)
            self._refresh_oom(session.id)
            families[session.id] = family
        return families

    def _refresh_oom(self, session_id: str) -> None:
        """Take the counter as it stands while the leader lives: whoever was killed so far, it was not the leader.

        The kernel counts, then kills, and who is killed may take seconds to free its memory: a leader that is
        condemned may be the one that was counted.
        """
        session = self.entries[session_id].session
        count = self.observer.oom_kills_in(session)
        if count != session.oom_kills and not self.observer.is_condemned(session.leader.pid):
            self._apply(session_id, ledger.OomCounted(count))

    def _drop_reused(self, session_id: str) -> None:
        """Forget members whose pidfd says that they are dead: their pid may be somebody else's."""
        kept = self.entries[session_id].session.kept
        dead = frozenset(id_ for id_ in kept if id_ in self._kept and pidfd.has_exited(self._kept[id_]))
        if dead:
            self._apply(session_id, ledger.MembersLost(dead))

    def _hold_kept(self, session_id: str) -> None:
        for id_ in self.entries[session_id].session.kept:
            if id_ not in self._kept:
                with contextlib.suppress(ProcessGone):
                    self._kept[id_] = pidfd.open_pidfd(id_, self.observer.proc)
        if len(self._kept) > 2 * sum(len(entry.session.kept) for entry in self.entries.values()):
            self._release_kept()

    def _release_kept(self) -> None:
        wanted = {id_ for entry in self.entries.values() for id_ in entry.session.kept}
        for id_ in set(self._kept) - wanted:
            os.close(self._kept.pop(id_))

    # -- carrying out ------------------------------------------------------------------------

    def step(self) -> None:
        """Do all that is due now; what others wait for first, bookkeeping afterwards."""
        while self._do_due() or self._reclaimer.step():
            pass
        self._save()

    def _do_due(self) -> bool:
        """Do what has become due since the last time; False when nothing has."""
        self._collect_exits()
        now_s = time.monotonic()
        due = {
            session_id: actions
            for session_id, entry in self.entries.items()
            if (actions := decide.decide(entry, self.policy, now_s))
        }
        looks = {
            session_id: action for session_id, (action, *_) in due.items() if isinstance(action, decide.Look)
        }
        if len(looks) > _MANY:
            self._look(list(looks), quick=False)
        for session_id, actions in due.items():
            if session_id not in looks:
                self._do(session_id, actions)
            elif len(looks) <= _MANY:
                self._look([session_id], quick=looks[session_id].quick)
        return bool(due)

    def next_deadline(self) -> float | None:
        """Return the monotonic second at which ``step()`` has something to do, None when nothing is due."""
        due = ledger.next_deadline(self.entries.values(), self.policy.tracker_grace_s)
        waiting = self._reclaimer.deadline_s
        return waiting if due is None else due if waiting is None else min(due, waiting)

    def _do(self, session_id: str, actions: list[decide.Action]) -> None:
        sends = [action for action in actions if isinstance(action, decide.Send)]
        if sends:
            self._send(session_id, sends)
        for action in actions:
            match action:
                case decide.Reclaim():
                    self._ask_reclaim(session_id)
                case decide.Conclude():
                    self._conclude(session_id)
                case decide.Forget():
                    self._forget(session_id)

    def _look(self, session_ids: list[str], *, quick: bool) -> None:
        """Look who belongs to dead leaders' sessions, all in one pass, and send at once what is due on that evidence."""
        sessions = [self.entries[session_id].session for session_id in session_ids]
        started_s = time.monotonic()
        try:
            snapshot = self.observer.look_quick(sessions[0]) if quick else self.observer.look(*sessions)
            looked_at_s = time.monotonic()
            for session_id in session_ids:
                self._take_in(session_id, snapshot, looked_at_s, looked_at_s - started_s)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            log.warning("cannot look for %d sessions: %s, trying again", len(session_ids), error.strerror)
            for session_id in session_ids:
                self._apply(session_id, ledger.LookFailed(time.monotonic()))
        finally:
            self.observer.release()

    def _take_in(self, session_id: str, snapshot: Snapshot, looked_at_s: float, took_s: float) -> None:
        entry = self.entries[session_id]
        family = self.judge(entry.session, snapshot)
        held = self._hold_new(entry, family)
        complete = len(held.members) == len(family.members)
        self._apply(session_id, ledger.Looked(held, looked_at_s, took_s, complete=complete))
        new = [id_ for id_ in held.members if id_ not in entry.targets]
        if new and not self.policy.dry_run and self.observer.shares_our_namespaces(entry.session):
            self._apply(session_id, ledger.ShmMeasured(self._reclaimer.measure(entry.session, new)))
        due = decide.decide(self.entries[session_id], self.policy, time.monotonic())
        sends = [action for action in due if isinstance(action, decide.Send)]
        if sends:
            self._send(session_id, sends)

    def _hold_new(self, entry: Entry, family: Family) -> Family:
        """Hold a pidfd of each new member; return the family without those for whom none is left."""
        members = dict(family.members)
        for id_ in family.members:
            if id_ in entry.targets or self._reaper.holds(id_):
                continue
            if self._reaper.is_full():
                del members[id_]
            else:
                self._hold(id_)
        return Family(members, family.left_alone)

    def _hold(self, id_: ProcessId) -> None:
        handle = self.observer.claim(id_)
        if handle is None and id_ in self._kept:
            handle = os.dup(self._kept[id_])
        handle = self._reaper.take(id_, handle)
        if handle is not None:
            self._poller.watch(handle, functools.partial(self._note_exit, id_))

    def _send(self, session_id: str, sends: list[decide.Send]) -> None:
        """Send every signal first; what is noted and logged about them costs as much again."""
        outcomes = [self._signal(session_id, send) for send in sends]
        signalled = []
        for send, outcome in zip(sends, outcomes, strict=True):
            id_ = send.member.process.id
            if outcome is Outcome.GONE:
                self._exited.add(id_)
            denied = outcome is Outcome.DENIED
            signalled.append(ledger.Signalled(id_, send.event, send.signal, send.due_s, denied=denied))
        self._apply(session_id, ledger.SignalsSent(tuple(signalled)))
        entry = self.entries[session_id]
        for send, outcome in zip(sends, outcomes, strict=True):
            self._log_sent(entry, send, outcome)
            target = entry.targets.get(send.member.process.id)
            if (
                target is not None
                and target.stage is Stage.STUCK
                and target.retries == 1
                and not target.denied
            ):
                self._tell_stuck(entry, target)

    def _signal(self, session_id: str, send: decide.Send) -> Outcome:
        entry, id_ = self.entries[session_id], send.member.process.id
        # A leader is in no family that is looked at again: it may have become another user's since.
        if id_ == entry.session.leader and self.observer.leader(entry.session) is None:
            return Outcome.DENIED
        return self._reaper.send(id_, send.signal)

    def _log_sent(self, entry: Entry, send: decide.Send, outcome: Outcome) -> None:
        signal_name, pid, session = SIGNAL_NAMES[send.signal], send.member.process.id.pid, entry.session
        if outcome is Outcome.DENIED:
            log.warning("cannot send %s pid=%d session=%s: not permitted", signal_name, pid, session.id)
            return
        log.info(
            "sent %s pid=%d session=%s name=%r framework=%r cause=%s grace_s=%g: %s",
            *(signal_name, pid, session.id, session.name, send.member.framework),
            *(report.cause_words(session.cause), self.policy.grace_s, "; ".join(send.member.evidence)),
        )

    def _tell_stuck(self, entry: Entry, target: ledger.Target) -> None:
        pid = target.member.process.id.pid
        log.error("stuck pid=%d session=%s: SIGKILL does not end it (state D?)", pid, entry.session.id)
        self.record(report.session_event("stuck", entry.session, processes=[report.process_record(target)]))

    def _note_exit(self, id_: ProcessId) -> None:
        self._exited.add(id_)

    def _collect_exits(self) -> None:
        """Note whose pidfds became readable, all in one go: a session's workers end together."""
        while self._exited:
            gone, self._exited = frozenset(self._exited), set()
            now_s = time.monotonic()
            for id_ in gone:
                if self._reaper.holds(id_):
                    self._poller.unwatch(self._reaper.handle(id_))
                    self._reaper.drop(id_)
            for session_id, entry in list(self.entries.items()):
                if not gone.isdisjoint(entry.targets):
                    self._apply(session_id, ledger.Exited(gone, now_s))

    def _conclude(self, session_id: str) -> None:
        entry = self.entries[session_id]
        self._amend_cause(entry)
        entry = self.entries[session_id]
        event, freed = report.end_event(entry, dry_run=self.policy.dry_run), report.freed_by(entry)
        ended = sum(1 for target in entry.targets.values() if target.stage is Stage.GONE and target.signals)
        log.info(
            "%s session=%s name=%r uid=%d cause=%s processes=%d ended=%d left_alone=%d latency_s=%s freed_bytes=%d%s",
            event["kind"], session_id, entry.session.name, entry.session.uid, report.cause_words(entry.session.cause),
            len(entry.targets), ended, len(entry.left_alone), event["latency_s"], freed.rss_bytes + freed.shm_bytes,
            " dry_run" if self.policy.dry_run else "",
        )  # fmt: skip
        self.record(event)
        self.store.add_total("reaped", ended)
        self.store.add_total("freed_bytes", freed.rss_bytes + freed.shm_bytes)
        if self.policy.dry_run:
            self._told.add(session_id)
        else:
            self.store.settle(session_id)
        self._apply(session_id, ledger.Concluded())

    def _forget(self, session_id: str) -> None:
        entry = self.entries.pop(session_id)
        handle = self._leaders.pop(session_id, None)
        if handle is not None:
            self._poller.unwatch(handle)
            os.close(handle)
        descriptor = self._pages.pop(session_id, None)
        if descriptor is not None:
            os.close(descriptor)
        self._unsaved.discard(session_id)
        self.store.forget(session_id)
        wanted = {id_ for other in self.entries.values() for id_ in other.targets}
        for id_ in entry.targets:
            if id_ not in wanted and self._reaper.holds(id_):
                self._poller.unwatch(self._reaper.handle(id_))
                self._reaper.drop(id_)
        self._release_kept()

    # -- reclaiming --------------------------------------------------------------------------

    def _ask_reclaim(self, session_id: str) -> None:
        entry = self.entries[session_id]
        self._apply(session_id, ledger.ReclaimStarted())
        if self.policy.reclaim_shm and entry.targets and self.observer.shares_our_namespaces(entry.session):
            dead_s = time.monotonic() - (entry.died_at_s or 0.0)
            self._reclaimer.ask(entry.session, time.time() - dead_s)
        else:
            self._apply(session_id, ledger.Reclaimed(Freed()))

    def _reclaimed(self, session_id: str, held_bytes: int) -> None:
        entry = self.entries.get(session_id)
        if entry is not None:
            freed = Freed(shm_bytes=max(0, entry.shm_held_bytes - held_bytes))
            self._apply(session_id, ledger.Reclaimed(freed))

    # -- the record --------------------------------------------------------------------------

    def record(self, event: dict[str, Any]) -> None:
        """Put an event into the history and tell who waits for one."""
        self.store.add_event({"at": now_utc(), **event}, time.time())
        self.on_event()

    def _apply(self, session_id: str, happening: Happening) -> None:
        before = self.entries[session_id]
        after = ledger.apply(before, happening)
        self.entries[session_id] = after
        if after.session != before.session:
            self._unsaved.add(session_id)

    def _save(self) -> None:
        for session_id in self._unsaved:
            if session_id in self.entries:
                self.store.save(self.entries[session_id].session)
        self._unsaved.clear()

    def close(self) -> None:
        """Put everything on record and let go; what is being ended goes on being ended by the next daemon."""
        self._save()
        self._reclaimer.close()
        self.store.close()


def count_stuck(entries: Iterable[Entry]) -> int:
    """Return how many processes outlived SIGKILL."""
    return sum(len(entry.stuck()) for entry in entries)
