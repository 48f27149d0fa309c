"""Whom dead leaders left: looks for them, holds a pidfd of each, and carries out what was decided about them.

Looks and signals stand together: what is due on the evidence of a look is sent at once, before anything else is done.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from reaperd import decide, ledger, report
from reaperd.census import Interrupted
from reaperd.escalation import Stage
from reaperd.kept import Kept
from reaperd.ledger import Entry
from reaperd.linux.exhaustion import is_exhaustion, reason_of
from reaperd.linux.procfs import ProcessGone
from reaperd.model import SIGKILL, SIGNAL_NAMES, Family, Process, ProcessId, SessionKey, Snapshot
from reaperd.observer import Observer
from reaperd.poller import Poller
from reaperd.reaper import Outcome, Reaper
from reaperd.reclaimer import Reclaimer
from reaperd.sessions import Sessions

log = logging.getLogger(__name__)

# Workers end together: what that changes is worked out once for all who do within that time.
_GATHER_S = 0.002
_PATIENCE_S = 60.0  # with who lets nobody read its marks
_CALM_WITHIN_S = 10.0  # others of the same user may come and go all the time
_MAX_ROUNDS = 3  # of looking for one plan


class Sight(NamedTuple):
    """Who was seen to belong to a dead leader's session."""

    family: Family
    unread: frozenset[int]  # pids of those who let nobody read them
    whole: bool  # none of them may be a member
    vanished: bool = False  # somebody who may have been one was gone before he could be judged
    # Carry the stamp, and were gone or given to another parent since they were read: so is who re-forks all the time.
    moved: frozenset[ProcessId] = frozenset()

    @property
    def calm(self) -> bool:
        """Whether everybody who may be a member could be judged by what he is now."""
        return not self.vanished and not self.moved


class Survivors:
    """Ends them."""

    def __init__(
        self,
        sessions: Sessions,
        observer: Observer,
        reaper: Reaper,
        poller: Poller,
        kept: Kept,
        reclaimer: Reclaimer,
    ) -> None:
        self._sessions = sessions
        self._observer = observer
        self._reaper = reaper
        self._poller = poller
        self._kept = kept
        self._reclaimer = reclaimer
        self._exited: dict[ProcessId, float] = {}  # and when that was seen
        self._gather_s = _GATHER_S
        self._look_costs_s: dict[int, float] = {}  # by uid, of the last one
        self._targeted: Counter[ProcessId] = Counter()  # in how many sessions: a worker can lead one itself
        self.exits_due_s: float | None = None  # when ``collect_exits()`` is to be called

    # -- looking -----------------------------------------------------------------------------

    def by_user(self, looks: dict[SessionKey, decide.Depth]) -> list[dict[SessionKey, decide.Depth]]:
        """Return ``looks`` by user: nobody is to wait for what another user's processes cost, if they cost more.

        First looks come first. Looks at everybody come last, and by themselves: they can be interrupted.
        """
        groups: dict[tuple[int, float, int], dict[SessionKey, decide.Depth]] = {}
        for key, depth in looks.items():
            rank = 0 if not self._sessions.entries[key].looks else 2 if depth is decide.Depth.EVERYONE else 1
            cost_s = self._look_costs_s.get(key.uid, 0.0)
            groups.setdefault((rank, cost_s, key.uid), {})[key] = depth
        return [groups[group] for group in sorted(groups)]

    def look(self, depths: dict[SessionKey, decide.Depth]) -> None:
        """Look who belongs to dead leaders' sessions, all in one pass, and send at once what is due on that evidence."""
        started_s = time.monotonic()
        still = self._hold_still(depths)
        try:
            entries = [self._sessions.entries[key] for key in depths]
            if not any(entry.looks or entry.targets for entry in entries):
                told = self._look_ahead(list(depths))
                depths = {key: depth for key, depth in depths.items() if key not in told}
            if not depths:
                return
            sights = self._sessions.aside.together(
                list(depths),
                lambda keys: self._see({key: depths[key] for key in keys}),
                "look at the members",
            )
            looked_at_s = time.monotonic()
            self._look_costs_s[next(iter(depths)).uid] = looked_at_s - started_s
            for key, seen in sights.items():
                with self._sessions.trying(key, "take in the members", tell_exhaustion=True):
                    self._take_in(
                        key, seen, looked_at_s, looked_at_s - started_s, depths[key], still=key in still
                    )
        except Interrupted:
            pass  # it is due still, after what has interrupted it
        except (OSError, MemoryError) as error:
            if not is_exhaustion(error):
                raise
            log.warning("cannot look for %d sessions: %s, trying again", len(depths), reason_of(error))
            for key in depths:
                self._sessions.apply(key, ledger.LookFailed(time.monotonic()))
        finally:
            self._observer.census.handles.release()  # first: to thaw takes a descriptor
            for scope in still.values():
                self._reaper.let_go_on(scope)

    def _hold_still(self, keys: Iterable[SessionKey]) -> dict[SessionKey, str]:
        """Have those hold still, by their control groups, of whom some are to be killed; return whom that is to be undone for.

        At the first look, too: an earlier daemon may have been ended before it could undo it.
        """
        still: dict[SessionKey, str] = {}
        for key in keys:
            entry = self._sessions.entries[key]
            if entry.session.scope is None:
                continue
            if decide.must_hold_still(entry, self._sessions.policy, time.monotonic()):
                still[key] = entry.session.scope
            elif not entry.looks and not self._sessions.policy.dry_run:
                self._reaper.let_go_on(entry.session.scope)
        if still:
            self._reaper.hold_still(still.values())
        return still

    def _see(self, depths: dict[SessionKey, decide.Depth]) -> dict[SessionKey, Sight]:
        """Look, until nobody is a member, or cut off from all others, on the word of what was read for an earlier look."""
        entries = [self._sessions.entries[key] for key in depths]
        sessions = [entry.session for entry in entries]
        members: set[ProcessId] = set()
        again: set[ProcessId] = set()
        for entry in entries:
            known = entry.living_targets()
            members |= known
            if not entry.looks:  # some may have been found ahead
                known = (entry.session.kept | entry.session.seen) - known
                members |= known
            if depths[entry.session.key] is not decide.Depth.NEWCOMERS:
                again |= known
        everyone = decide.Depth.EVERYONE in depths.values()
        hurried = not any(entry.looks for entry in entries)
        sights: dict[SessionKey, Sight] = {}
        for _ in range(_MAX_ROUNDS):
            snapshot = self._observer.census.look(
                sessions, hold=True, members=members, again=again, everyone=everyone, hurried=hurried
            )
            sights = {entry.session.key: self._judge_dead(entry, snapshot) for entry in entries}
            stale = {
                id_
                for entry in entries
                for id_ in sights[entry.session.key].family.members
                if id_.pid in snapshot.stale and id_ not in entry.targets
            }
            stale |= {id_ for sight in sights.values() for id_ in sight.moved if id_.pid in snapshot.stale}
            if not stale:
                break
            again |= stale
        return sights

    def _look_ahead(self, keys: list[SessionKey]) -> set[SessionKey]:
        """Signal whom pages alone tell, some at a time: they end while the others are read.

        Return the sessions that this has told of all there seems to be: a look at once would take the time that the
        kernel needs to end them.
        """
        told: set[SessionKey] = set()
        whole = True
        sessions = [self._sessions.entries[key].session for key in keys]
        for snapshot in self._observer.census.look_ahead(sessions):
            whole = whole and not snapshot.unread
            for key in keys:
                with self._sessions.trying(key, "look ahead", tell_exhaustion=True):
                    session = self._sessions.entries[key].session
                    family = decide.judge(session, snapshot, self._sessions.policy)
                    if family.members:
                        sight = Sight(family, frozenset(), whole)
                        self._take_in(key, sight, time.monotonic(), 0.0, decide.Depth.NEWCOMERS, ahead=True)
                        told.add(key)
        return {key for key in told if whole and self._are_all_targets(key)}

    def _are_all_targets(self, key: SessionKey) -> bool:
        """Say whether all that were known before are being ended: what others start while we wait may have no mark."""
        session, targets = self._sessions.entries[key].session, self._sessions.entries[key].targets
        return targets.keys() >= {*session.kept, *session.seen}

    def _judge_dead(self, entry: Entry, snapshot: Snapshot) -> Sight:
        """Judge a dead leader's session; whoever got a dead member's pid in the tick in which that one started is no member."""
        reused = {
            id_.pid
            for id_ in entry.targets
            if id_.pid in snapshot.children
            and self._reaper.has_ended(id_)
            and self._observer.proc.is_alive(id_)
        }
        snapshot = snapshot.without(reused) if reused else snapshot
        family = decide.judge(entry.session, snapshot, self._sessions.policy)
        uid = entry.session.uid
        return Sight(
            family,
            frozenset(snapshot.unread),
            uid not in snapshot.unread.values(),
            uid in snapshot.vanished,
            frozenset(one.id for one in family.strays if not self._has_same_parent(one)),
        )

    def _has_same_parent(self, process: Process) -> bool:
        try:
            stat = self._observer.proc.stat(process.id.pid)
        except ProcessGone:
            return False
        return stat.id == process.id and not stat.dead and stat.ppid == process.ppid

    def _take_in(
        self,
        key: SessionKey,
        seen: Sight,
        looked_at_s: float,
        took_s: float,
        depth: decide.Depth,
        *,
        ahead: bool = False,
        still: bool = False,
    ) -> None:
        entry = self._sessions.entries[key]
        held = self._hold_new(entry, seen.family)
        # Who could not be read may be a member, but one cannot wait for such for ever.
        since_s = looked_at_s - (entry.died_at_s or 0.0)
        unchanged_s = min(since_s, looked_at_s - entry.changed_at_s)
        all_read = (seen.whole or since_s >= _PATIENCE_S) and (seen.calm or unchanged_s >= _CALM_WITHIN_S)
        complete = all_read and len(held.members) == len(seen.family.members)
        looked = ledger.Looked(
            held,
            looked_at_s,
            took_s,
            complete=complete,
            unread=seen.unread,
            afresh=depth is not decide.Depth.NEWCOMERS,
            ahead=ahead,
            everyone=depth is decide.Depth.EVERYONE,
            calm=seen.calm,
        )
        self._sessions.apply(key, looked)
        if not complete:
            log.debug(
                "not all seen session=%s members=%d unread=%s calm=%s ahead=%s",
                *(entry.session.id, len(seen.family.members), sorted(seen.unread), seen.calm, ahead),
            )
        new = [id_ for id_ in held.members if id_ not in entry.targets]
        self._targeted.update(new)
        if new and not self._sessions.policy.dry_run and self._observer.shares_our_shm(entry.session):
            self._sessions.apply(key, ledger.ShmMeasured(self._reclaimer.measure(entry.session, new)))
        now_s = time.monotonic()
        due = decide.decide(self._sessions.entries[key], self._sessions.policy, now_s, still=still)
        sends = [action for action in due if isinstance(action, decide.Send)]
        if sends:
            self.send(key, sends, still=still)

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
        return family._replace(members=members)

    def _hold(self, id_: ProcessId) -> None:
        handle = self._observer.census.handles.claim(id_)
        if handle is None:
            handle = self._kept.copy_handle(id_)
        handle = self._reaper.take(id_, handle)
        if handle is not None:
            self._poller.watch(handle, functools.partial(self.note_exit, id_))

    # -- signalling --------------------------------------------------------------------------

    def send(self, key: SessionKey, sends: list[decide.Send], *, still: bool = False) -> None:
        """Send every signal first; what is noted and logged about them costs as much again."""
        if still and self._kill_all(key, sends):
            outcomes = [Outcome.SENT] * len(sends)
        else:
            outcomes = [self._signal(key, send) for send in sends]
        signalled = []
        for send, outcome in zip(sends, outcomes, strict=True):
            id_ = send.member.process.id
            if outcome is Outcome.GONE:
                self.note_exit(id_)
            denied = outcome is Outcome.DENIED
            signalled.append(ledger.Signalled(id_, send.event, send.signal, send.due_s, denied=denied))
        self._sessions.apply(key, ledger.SignalsSent(tuple(signalled)))
        entry = self._sessions.entries[key]
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

    def _kill_all(self, key: SessionKey, sends: list[decide.Send]) -> bool:
        """Kill a session's own control group as one, and say whether that was done: all in it are to be killed, and hold still."""
        scope = self._sessions.entries[key].session.scope
        if scope is None or any(send.signal != SIGKILL for send in sends):
            return False
        return self._reaper.kill_all(scope, [send.member.process.id for send in sends])

    def _signal(self, key: SessionKey, send: decide.Send) -> Outcome:
        entry, id_ = self._sessions.entries[key], send.member.process.id
        # A leader is in no family that is looked at again: it may have become another user's since.
        if id_ == entry.session.leader and self._observer.census.leader(entry.session) is None:
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
            *(report.cause_words(session.cause), self._sessions.policy.grace_s),
            "; ".join(send.member.evidence),
        )

    def _tell_stuck(self, entry: Entry, target: ledger.Target) -> None:
        pid = target.member.process.id.pid
        log.error("stuck pid=%d session=%s: SIGKILL does not end it (state D?)", pid, entry.session.id)
        processes = [report.process_record(target)]
        self._sessions.record(report.session_event("stuck", entry.session, processes=processes))

    # -- their end ---------------------------------------------------------------------------

    def note_exit(self, id_: ProcessId) -> None:
        """Somebody has ended, who may be a member of several sessions."""
        now_s = time.monotonic()
        if self.exits_due_s is None:
            self.exits_due_s = now_s + self._gather_s
        self._exited.setdefault(id_, now_s)
        # Last: as long as it is watched, we are told again where this has come to nothing.
        if self._reaper.holds(id_):
            self._poller.unwatch(self._reaper.handle(id_))

    def collect_exits(self) -> None:
        """Take in who has ended, all in one go."""
        began_s = time.monotonic()
        gone, self._exited, self.exits_due_s = self._exited, {}, None
        for id_ in gone:
            if self._reaper.holds(id_):
                self._reaper.drop(id_)
        for key, entry in list(self._sessions.entries.items()):
            if entry.targets and not gone.keys().isdisjoint(entry.targets):
                with self._sessions.trying(key, "note the end of members"):
                    self._sessions.apply(key, ledger.Exited(gone))
        # Of many thousands some end all the time: working it out must not become all that we do.
        self._gather_s = max(_GATHER_S, 2 * (time.monotonic() - began_s))

    def forget(self, entry: Entry) -> None:
        """A session is no more: let go of those who are in no other."""
        self._targeted.subtract(entry.targets.keys())
        for id_ in entry.targets:
            if not self._targeted[id_]:
                del self._targeted[id_]
                if self._reaper.holds(id_):
                    self._poller.unwatch(self._reaper.handle(id_))
                    self._reaper.drop(id_)
