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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from agent import wire
from reaperd import decide, ledger, pages, report
from reaperd.aside import Aside
from reaperd.causes import read_cause
from reaperd.census import Interrupted
from reaperd.escalation import Stage
from reaperd.kept import Kept
from reaperd.ledger import Entry, Happening
from reaperd.linux import pidfd
from reaperd.linux.alarm import Alarm
from reaperd.linux.page import OpenPage
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
    SessionKey,
    Snapshot,
)
from reaperd.observer import Observer
from reaperd.policy import Policy
from reaperd.poller import Poller
from reaperd.reaper import Outcome, Reaper
from reaperd.reclaimer import Reclaimer
from reaperd.roster import Roster
from reaperd.store import Store
from reaperd.times import now_utc
from reaperd.waiters import News

log = logging.getLogger(__name__)

_GATHER_S = (
    0.002  # workers end together: what that changes is worked out once for all who do within that time
)
_PATIENCE_S = 60.0  # with who lets nobody read its marks
_CALM_WITHIN_S = 10.0  # others of the same user may come and go all the time
_MOST_ROUNDS = 3  # of looking for one plan


class Sight(NamedTuple):
    """Who was seen to belong to a dead leader's session."""

    family: Family
    unread: frozenset[int]  # pids of those who let nobody read them
    whole: bool  # none of them may be a member
    calm: bool = (
        True  # nobody who may have been one was gone before it could be read, as who re-forks all the time is
    )


class Core:
    """All sessions, and all that is done about them."""

    def __init__(
        self,
        observer: Observer,
        reaper: Reaper,
        store: Store,
        poller: Poller,
        policy: Policy,
        alarm: Alarm,
    ) -> None:
        self.observer = observer
        self.store = store
        self._policy = policy
        self.aside = Aside()
        self._roster = Roster(self._deadline_of)
        self.on_event: Callable[[News], None] = lambda _: None
        self._reaper = reaper
        self._poller = poller
        self._alarm = alarm
        self._leaders: dict[SessionKey, int] = {}  # pidfds
        self._pages: dict[SessionKey, OpenPage] = {}
        self._kept = Kept(observer.proc)
        self._exited: dict[ProcessId, float] = {}  # and when that was seen
        self._exits_due_s: float | None = None
        self._gather_s = _GATHER_S
        self._look_costs_s: dict[int, float] = {}  # by uid, of the last one
        # What a living leader's session was last judged by: the observer's count of changes, and the session.
        self._judged: dict[SessionKey, tuple[int, Session]] = {}
        self._targeted: Counter[ProcessId] = Counter()  # in how many sessions: a worker can lead one itself
        self._unsaved: dict[SessionKey, None] = {}
        self._told: set[SessionKey] = set()  # sessions that a dry run has spoken of
        self._reclaimer = Reclaimer(poller, observer, self._reclaimed)
        self._heed(policy)

    @property
    def entries(self) -> Mapping[SessionKey, Entry]:
        """All sessions on record."""
        return self._roster.entries

    @property
    def policy(self) -> Policy:
        """The rules in force."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._heed(policy)

    def _heed(self, policy: Policy) -> None:
        self._policy = policy
        self.observer.census.reader.reads_cgroups = bool(policy.protected_units)
        self._judged.clear()
        self._roster.touch()

    # -- taking sessions on ------------------------------------------------------------------

    def take_on(self, session: Session, leader_pidfd: int | None, opened: OpenPage | None) -> None:
        """Watch a session; without a pidfd its leader is dead already. What is open is ours, whatever comes of it."""
        with contextlib.ExitStack() as ours:
            if leader_pidfd is not None:
                ours.callback(os.close, leader_pidfd)
            if opened is not None:
                ours.callback(opened.close)
                session = session._replace(page_inode=opened.inode)
            self.observer.census.cover(session)
            ours.pop_all()
        if leader_pidfd is not None:
            self._leaders[session.key] = leader_pidfd
        if opened is not None:
            self._pages[session.key] = opened
        self._roster.put(Entry(session))
        self._unsaved[session.key] = None
        if leader_pidfd is None:
            self._leader_is_dead(session.key, session.cause or UNKNOWN_CAUSE)
            return
        self._poller.watch(leader_pidfd, functools.partial(self._leader_died, session.key))
        self._alarm.watch(leader_pidfd)
        self._read_page(session.key)
        below = self.observer.census.look_below(session)
        if below.processes or session.kept or session.seen:
            family = self.judge(self.entries[session.key].session, below)
            # Workers that stand elsewhere are found by the looks that follow.
            self._apply(session.key, ledger.Looked(family, time.monotonic(), 0.0, complete=False))
            self._kept.hold(session.key, self.entries[session.key].session.kept)

    def has_no_room_for(self, uid: int) -> bool:
        """Say whether ``uid`` has as many sessions as one user may have."""
        return self._roster.count_of(uid) >= self.policy.max_per_uid

    def led_by(self, leader: ProcessId) -> list[Entry]:
        """Return the sessions that ``leader`` leads: it can have many pages, and lead but one session."""
        return [entry for entry in self._roster.led_by(leader) if not entry.session.ending]

    def is_settled(self, key: SessionKey) -> bool:
        """Say whether a session is over for good: whoever carries its marks still was left alone, or told of."""
        return key in self._told or self.store.is_settled(key)

    # -- the leader ends ---------------------------------------------------------------------

    def unregister(self, key: SessionKey) -> None:
        """The leader ended its session: what it left is watched until the leader ends, too."""
        self._apply(key, ledger.Unregistered())
        with contextlib.suppress(Interrupted):  # the next scan looks, too
            self.look_at_living([key])

    def stop_leader(self, key: SessionKey, by_uid: int) -> None:
        """Ask the leader to end, and make it end after the grace period."""
        session = self.entries[key].session
        process = self.observer.census.leader(session)
        if process is None:
            return
        handle = os.dup(self._leaders[key])
        self._reaper.take(session.leader, handle)
        member = Member(process, Role.WORKER, "leader", ("somebody asked to stop the session",), marked=True)
        self._apply(key, ledger.StopAsked(member, time.monotonic(), by_uid))

    def _leader_died(self, key: SessionKey) -> None:
        handle = self._leaders[key]
        self._poller.unwatch(handle)
        self._alarm.silence(handle)
        session = self.entries[key].session
        cause, flags = UNKNOWN_CAUSE, 0
        with self._trying(key, "read the end"):
            cause = self._read_cause(session, handle)
            flags = self._read_page(key)
        # Where the kernel does not tell, what the leader said at its end must do.
        told = cause.kind in (CauseKind.EXIT, CauseKind.UNKNOWN)
        if told and (flags & (wire.CLOSING | wire.ENDED) or session.ending):
            cause = cause._replace(clean=True)
        self._note_exit(
            session.leader
        )  # it may be somebody's target, too: it was to be stopped, or is a worker itself
        self._leader_is_dead(key, cause)

    def _leader_is_dead(self, key: SessionKey, cause: Cause) -> None:
        now_s = time.monotonic()
        wait_s = self.policy.exit_grace_s if cause.clean else 0.0
        self._lose_dead(key, self._kept.dead())
        self._apply(key, ledger.LeaderDied(cause, now_s, now_s + wait_s))

    def _read_cause(self, session: Session, handle: int) -> Cause:
        def vanished() -> int:
            return sum(1 for id_ in session.seen if not self.observer.proc.is_alive(id_))

        return read_cause(session, handle, self.observer, vanished)

    def _amend_cause(self, entry: Entry) -> None:
        """Ask again why the leader died, where the kernel did not tell at once."""
        session, handle = entry.session, self._leaders.get(entry.session.key)
        if session.cause is not None and session.cause.kind is CauseKind.UNKNOWN and handle is not None:
            self._apply(session.key, ledger.CauseTold(self._read_cause(session, handle)))

    def _read_page(self, key: SessionKey) -> int:
        """Take from the page what only the leader knows, and return its flags."""
        told = self.page_of(key)
        if told is None:
            return 0
        session = self.entries[key].session
        if told.flags & wire.ENDED and not session.ending:
            self._apply(key, ledger.Unregistered())
        spared = frozenset(ProcessId(*pair) for pair in told.spared)
        if not spared <= session.spared and self.observer.shares_our_namespaces(session):
            self._apply(key, ledger.Spared(spared))
        return told.flags

    def page_of(self, key: SessionKey) -> pages.Page | None:
        """Return what a session's page says now, None where it has none or says nonsense."""
        opened = self._pages.get(key)
        if opened is not None:
            with contextlib.suppress(wire.WireError, OSError):
                try:
                    return opened.read()
                except pages.TornPage:
                    return opened.read(writer_is_dead=self._is_dead(key))
        return None

    def _is_dead(self, key: SessionKey) -> bool:
        return key not in self._leaders or pidfd.has_exited(self._leaders[key])

    # -- looking -----------------------------------------------------------------------------

    def judge(self, session: Session, snapshot: Snapshot) -> Family:
        """Return who belongs to ``session``."""
        return decide.judge(session, snapshot, self.policy)

    def look_at_living(self, only: Iterable[SessionKey] | None = None) -> dict[SessionKey, Family]:
        """Look who belongs to the sessions whose leaders live (``only`` some), and keep in mind whom only descent tells.

        Raises Interrupted where another leader dies meanwhile.
        """
        return self.aside.together(self._living(only), self._look_at, "look at the members")

    def scan(self, listing: dict[int, int]) -> None:
        """Look at all living leaders' sessions, at what has changed alone; ``listing`` is of all processes.

        Raises Interrupted where a leader dies meanwhile.
        """
        keys = self._living(None)
        if keys:
            self.observer.census.read_new(listing)
        self.aside.together(
            keys,
            lambda some: self._look_at(some, listing, changed_only=True),
            "look at the members",
        )
        seen = (id_ for key in keys if key in self.entries for id_ in self.entries[key].session.seen)
        processes = (self.observer.census.known.processes.get(id_.pid) for id_ in seen)
        self.observer.usage.note(process for process in processes if process is not None)
        if all(entry.died_at_s is None for entry in self.entries.values()):
            self.observer.marks.memory.close()  # nobody needs it before the next scan

    def _living(self, only: Iterable[SessionKey] | None) -> list[SessionKey]:
        return [
            key
            for key in (self.entries if only is None else only)
            if self.entries[key].died_at_s is None and self.aside.until_s(key) is None
        ]

    def _look_at(
        self, keys: Sequence[SessionKey], listing: dict[int, int] | None = None, *, changed_only: bool = False
    ) -> dict[SessionKey, Family]:
        """Return who belongs to the sessions; ``changed_only``: where that may be others than the last time."""
        dead = self._kept.dead()
        for key in keys:
            self._lose_dead(key, dead)
            self._read_page(key)
        sessions = [self.entries[key].session for key in keys]
        members = [id_ for session in sessions for id_ in (session.leader, *session.seen, *session.kept)]
        snapshot = self.observer.census.look(sessions, hold=False, again=members, listing=listing)
        # Whose pidfd says that it is dead, and who is there all the same, is another process with the same pid and tick.
        reused = frozenset(filter(self.observer.proc.is_alive, self._kept.dead()))
        families = {}
        oom_kills: dict[str, int | None] = {}
        for key in keys:
            if self._is_dead(key):
                continue  # its pid, too, may be another's
            self._lose_dead(key, reused)
            if not (changed_only and self._is_unchanged(key)):
                families[key] = self._judge_living(key, snapshot, for_scan=changed_only)
            self._refresh_oom(key, oom_kills)
        return families

    def _judge_living(self, key: SessionKey, snapshot: Snapshot, *, for_scan: bool) -> Family:
        """Take in who belongs to a living leader's session; scans alone are far enough apart to say that nobody does."""
        session = self.entries[key].session
        family = self.judge(session, snapshot)
        whole = session.uid not in {*snapshot.unread.values(), *snapshot.vanished}
        self._apply(key, ledger.Looked(family, time.monotonic(), 0.0, complete=whole and for_scan))
        session = self.entries[key].session
        self._kept.hold(key, session.kept)
        if whole:
            self._judged[key] = self.observer.census.known.changes, session
        return family

    def _is_unchanged(self, key: SessionKey) -> bool:
        """Say whether judging a session anew can tell nothing that it did not tell the last time."""
        changes, session = self._judged.get(key, (-1, None))
        now = self.entries[key].session
        return changes == self.observer.census.known.changes and session is now and not now.ending

    def _refresh_oom(self, key: SessionKey, read: dict[str, int | None]) -> None:
        """Take the counter as it stands while the leader lives: whoever was killed so far, it was not the leader.

        The kernel counts, then kills, and who is killed may take seconds to free its memory: a leader that is
        condemned may be the one that was counted. ``read`` has the counters that were read for others already.
        """
        session = self.entries[key].session
        if session.oom_counter not in read:
            read[session.oom_counter] = self.observer.oom_kills_in(session)
        count = read[session.oom_counter]
        if count != session.oom_kills and not self.observer.is_condemned(session.leader.pid):
            self._apply(key, ledger.OomCounted(count))

    def _lose_dead(self, key: SessionKey, dead: frozenset[ProcessId]) -> None:
        """Forget members whose pidfd says that they are dead: their pid may be somebody else's."""
        lost = dead & self.entries[key].session.kept
        if lost:
            self._apply(key, ledger.MembersLost(lost))
            self._kept.hold(key, self.entries[key].session.kept)

    # -- carrying out ------------------------------------------------------------------------

    def step(self) -> None:
        """Do all that is due now, up to the death of the next leader: that goes first."""
        while (self._do_due() or self._reclaimer.step()) and not self._alarm.rings():
            pass
        idle_s = self.observer.marks.memory.idle_deadline_s
        if idle_s is not None and idle_s <= time.monotonic():
            self.observer.marks.memory.close()

    def is_called_away(self) -> bool:
        """Say whether a leader has died of whose end nobody has taken note: whatever else is being done can wait."""
        return self._alarm.rings()

    def _do_due(self) -> bool:
        """Do what has become due since the last time; False when nothing has."""
        now_s = time.monotonic()
        if self._exits_due_s is not None and self._exits_due_s <= now_s:
            self._collect_exits()
        due = {}
        for entry in self._roster.take_due(now_s):
            key = entry.session.key
            if self.aside.until_s(key) is None:
                with self._trying(key, "decide on the members"):
                    if actions := decide.decide(entry, self.policy, now_s):
                        due[key] = actions
        looks = {key: action.depth for key, (action, *_) in due.items() if isinstance(action, decide.Look)}
        for depths in self._by_user(looks):
            if not self._alarm.rings():
                self._look(depths)
        for key, actions in due.items():
            if key not in looks:
                with self._trying(key, "do what is due to the members"):
                    self._do(key, actions)
        return bool(due)

    @contextlib.contextmanager
    def _trying(self, key: SessionKey, what: str, *, tell_exhaustion: bool = False) -> Iterator[None]:
        """Set a session aside where the block raises anything, and look what is due for it later."""
        with self.aside.trying(key, what, tell_exhaustion=tell_exhaustion):
            yield
        if self.aside.until_s(key) is not None and key in self.entries:
            self._roster.put(self.entries[key])

    def _deadline_of(self, entry: Entry) -> float | None:
        aside_until_s = self.aside.until_s(entry.session.key)
        return aside_until_s or ledger.deadline(entry, self.policy.tracker_grace_s)

    def next_deadline(self) -> float | None:
        """Return the monotonic second at which ``step()`` has something to do, None when nothing is due."""
        due = (
            self._roster.next_deadline(),
            self._reclaimer.deadline_s,
            self._exits_due_s,
            self.observer.marks.memory.idle_deadline_s,
        )
        return min((deadline_s for deadline_s in due if deadline_s is not None), default=None)

    def _do(self, key: SessionKey, actions: list[decide.Action]) -> None:
        sends = [action for action in actions if isinstance(action, decide.Send)]
        if sends:
            self._send(key, sends)
        for action in actions:
            match action:
                case decide.Reclaim():
                    self._ask_reclaim(key)
                case decide.Conclude():
                    self._conclude(key)
                case decide.Forget():
                    self._forget(key)

    def _by_user(self, looks: dict[SessionKey, decide.Depth]) -> list[dict[SessionKey, decide.Depth]]:
        """Return ``looks`` by user: nobody is to wait for what another user's processes cost, if they cost more.

        First looks come first. Looks at everybody come last, and by themselves: they can be interrupted.
        """
        groups: dict[tuple[int, float, int], dict[SessionKey, decide.Depth]] = {}
        for key, depth in looks.items():
            rank = 0 if not self.entries[key].looks else 2 if depth is decide.Depth.EVERYONE else 1
            cost_s = self._look_costs_s.get(key.uid, 0.0)
            groups.setdefault((rank, cost_s, key.uid), {})[key] = depth
        return [groups[group] for group in sorted(groups)]

    def _look(self, depths: dict[SessionKey, decide.Depth]) -> None:
        """Look who belongs to dead leaders' sessions, all in one pass, and send at once what is due on that evidence."""
        started_s = time.monotonic()
        try:
            if not any(self.entries[key].looks or self.entries[key].targets for key in depths):
                told = self._look_ahead(list(depths))
                depths = {key: depth for key, depth in depths.items() if key not in told}
            if not depths:
                return
            sights = self.aside.together(
                list(depths),
                lambda keys: self._see({key: depths[key] for key in keys}),
                "look at the members",
            )
            looked_at_s = time.monotonic()
            self._look_costs_s[next(iter(depths)).uid] = looked_at_s - started_s
            for key, seen in sights.items():
                with self._trying(key, "take in the members", tell_exhaustion=True):
                    self._take_in(key, seen, looked_at_s, looked_at_s - started_s, depths[key])
        except Interrupted:
            pass  # it is due still, after what has interrupted it
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            log.warning("cannot look for %d sessions: %s, trying again", len(depths), error.strerror)
            for key in depths:
                self._apply(key, ledger.LookFailed(time.monotonic()))
        finally:
            self.observer.census.handles.release()

    def _see(self, depths: dict[SessionKey, decide.Depth]) -> dict[SessionKey, Sight]:
        """Look, until nobody new is a member on the word of what was read for an earlier look."""
        entries = [self.entries[key] for key in depths]
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
        for _ in range(_MOST_ROUNDS):
            snapshot = self.observer.census.look(
                sessions, hold=True, members=members, again=again, everyone=everyone, hurried=hurried
            )
            sights = {entry.session.key: self._judge_dead(entry, snapshot) for entry in entries}
            stale = {
                id_
                for entry in entries
                for id_ in sights[entry.session.key].family.members
                if id_.pid in snapshot.stale and id_ not in entry.targets
            }
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
        for snapshot in self.observer.census.look_ahead([self.entries[key].session for key in keys]):
            whole = whole and not snapshot.unread
            for key in keys:
                with self._trying(key, "look ahead", tell_exhaustion=True):
                    family = self.judge(self.entries[key].session, snapshot)
                    if family.members:
                        sight = Sight(family, frozenset(), whole)
                        self._take_in(key, sight, time.monotonic(), 0.0, decide.Depth.NEWCOMERS, ahead=True)
                        told.add(key)
        return {key for key in told if whole and self._are_all_targets(key)}

    def _are_all_targets(self, key: SessionKey) -> bool:
        """Say whether all that were known before are being ended: what others start while we wait may have no mark."""
        session, targets = self.entries[key].session, self.entries[key].targets
        return targets.keys() >= {*session.kept, *session.seen}

    def _judge_dead(self, entry: Entry, snapshot: Snapshot) -> Sight:
        """Judge a dead leader's session; whoever got a dead member's pid in the tick in which that one started is no member."""
        reused = {
            id_.pid
            for id_ in entry.targets
            if id_.pid in snapshot.children
            and self._reaper.has_ended(id_)
            and self.observer.proc.is_alive(id_)
        }
        family = self.judge(entry.session, snapshot.without(reused) if reused else snapshot)
        uid = entry.session.uid
        return Sight(
            family,
            frozenset(snapshot.unread),
            uid not in snapshot.unread.values(),
            uid not in snapshot.vanished,
        )

    def _take_in(
        self,
        key: SessionKey,
        seen: Sight,
        looked_at_s: float,
        took_s: float,
        depth: decide.Depth,
        *,
        ahead: bool = False,
    ) -> None:
        entry = self.entries[key]
        held = self._hold_new(entry, seen.family)
        # Who could not be read may be a member, but one cannot wait for such for ever.
        since_s = looked_at_s - (entry.died_at_s or 0.0)
        all_read = (seen.whole or since_s >= _PATIENCE_S) and (seen.calm or since_s >= _CALM_WITHIN_S)
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
        )
        self._apply(key, looked)
        new = [id_ for id_ in held.members if id_ not in entry.targets]
        self._targeted.update(new)
        if new and not self.policy.dry_run and self.observer.shares_our_namespaces(entry.session):
            self._apply(key, ledger.ShmMeasured(self._reclaimer.measure(entry.session, new)))
        due = decide.decide(self.entries[key], self.policy, time.monotonic())
        sends = [action for action in due if isinstance(action, decide.Send)]
        if sends:
            self._send(key, sends)

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
        handle = self.observer.census.handles.claim(id_)
        if handle is None:
            handle = self._kept.copy_handle(id_)
        handle = self._reaper.take(id_, handle)
        if handle is not None:
            self._poller.watch(handle, functools.partial(self._note_exit, id_))

    def _send(self, key: SessionKey, sends: list[decide.Send]) -> None:
        """Send every signal first; what is noted and logged about them costs as much again."""
        outcomes = [self._signal(key, send) for send in sends]
        signalled = []
        for send, outcome in zip(sends, outcomes, strict=True):
            id_ = send.member.process.id
            if outcome is Outcome.GONE:
                self._note_exit(id_)
            denied = outcome is Outcome.DENIED
            signalled.append(ledger.Signalled(id_, send.event, send.signal, send.due_s, denied=denied))
        self._apply(key, ledger.SignalsSent(tuple(signalled)))
        entry = self.entries[key]
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

    def _signal(self, key: SessionKey, send: decide.Send) -> Outcome:
        entry, id_ = self.entries[key], send.member.process.id
        # A leader is in no family that is looked at again: it may have become another user's since.
        if id_ == entry.session.leader and self.observer.census.leader(entry.session) is None:
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
        now_s = time.monotonic()
        self._exited.setdefault(id_, now_s)
        if self._reaper.holds(id_):
            self._poller.unwatch(self._reaper.handle(id_))
        if self._exits_due_s is None:
            self._exits_due_s = now_s + self._gather_s

    def _collect_exits(self) -> None:
        """Take in who has ended, all in one go."""
        began_s = time.monotonic()
        gone, self._exited, self._exits_due_s = self._exited, {}, None
        for id_ in gone:
            if self._reaper.holds(id_):
                self._reaper.drop(id_)
        for key, entry in list(self.entries.items()):
            if entry.targets and not gone.keys().isdisjoint(entry.targets):
                with self._trying(key, "note the end of members"):
                    self._apply(key, ledger.Exited(gone))
        # Of many thousands some end all the time: working it out must not become all that we do.
        self._gather_s = max(_GATHER_S, 2 * (time.monotonic() - began_s))

    def _conclude(self, key: SessionKey) -> None:
        entry = self.entries[key]
        self._amend_cause(entry)
        entry = self.entries[key]
        event, freed = report.end_event(entry, dry_run=self.policy.dry_run), report.freed_by(entry)
        ended = sum(1 for target in entry.targets.values() if target.stage is Stage.GONE and target.signals)
        log.info(
            "%s session=%s name=%r uid=%d cause=%s processes=%d ended=%d left_alone=%d latency_s=%s freed_bytes=%d%s",
            event["kind"], key.id, entry.session.name, entry.session.uid, report.cause_words(entry.session.cause),
            len(entry.targets), ended, len(entry.left_alone), event["latency_s"], freed.rss_bytes + freed.shm_bytes,
            " dry_run" if self.policy.dry_run else "",
        )  # fmt: skip
        self.record(event)
        self.store.add_total("reaped", ended)
        self.store.add_total("freed_bytes", freed.rss_bytes + freed.shm_bytes)
        if self.policy.dry_run:
            self._told.add(key)
        else:
            self.store.settle(key)
        self._apply(key, ledger.Concluded())

    def _forget(self, key: SessionKey) -> None:
        entry = self._roster.remove(key)
        handle = self._leaders.pop(key, None)
        if handle is not None:
            self._poller.unwatch(handle)
            if entry.died_at_s is None:
                self._alarm.silence(handle)
            os.close(handle)
        opened = self._pages.pop(key, None)
        if opened is not None:
            opened.close()
        self.observer.census.uncover(key)
        self._kept.hold(key, frozenset())
        self._unsaved.pop(key, None)
        self.aside.forget(key)
        self._judged.pop(key, None)
        self._reclaimer.forget(key)
        self.store.forget(key)
        self._targeted.subtract(entry.targets.keys())
        for id_ in entry.targets:
            if not self._targeted[id_]:
                del self._targeted[id_]
                if self._reaper.holds(id_):
                    self._poller.unwatch(self._reaper.handle(id_))
                    self._reaper.drop(id_)

    # -- reclaiming --------------------------------------------------------------------------

    def _ask_reclaim(self, key: SessionKey) -> None:
        entry = self.entries[key]
        self._apply(key, ledger.ReclaimStarted())
        if self.policy.reclaim_shm and entry.targets and self.observer.shares_our_namespaces(entry.session):
            dead_s = time.monotonic() - (entry.died_at_s or 0.0)
            self._reclaimer.ask(entry.session, time.time() - dead_s)
        else:
            self._apply(key, ledger.Reclaimed(Freed()))

    def _reclaimed(self, key: SessionKey, held_bytes: int) -> None:
        entry = self.entries.get(key)
        if entry is not None:
            freed = Freed(shm_bytes=max(0, entry.shm_held_bytes - held_bytes))
            self._apply(key, ledger.Reclaimed(freed))

    # -- the record --------------------------------------------------------------------------

    def record(self, event: dict[str, Any]) -> None:
        """Put an event into the history and tell of it."""
        event, at_epoch_s = {"at": now_utc(), **event}, time.time()
        seq = self.store.add_event(event, at_epoch_s)
        if seq:
            self.on_event(News(seq, at_epoch_s, event))

    def _apply(self, key: SessionKey, happening: Happening) -> None:
        before = self.entries[key]
        after = ledger.apply(before, happening)
        self._roster.put(after)
        if after.session != before.session:
            self._unsaved[key] = None

    def save(self) -> None:
        """Put on record what has changed: before we wait, and after all that others wait for."""
        unsaved, self._unsaved = self._unsaved, {}
        for key in unsaved:
            if key in self.entries:
                with self._trying(key, "keep the record"):
                    self.store.save(self.entries[key].session)
        if not self.store.commit():
            self._unsaved = unsaved | self._unsaved

    def put_on_record(self, key: SessionKey) -> None:
        """Put one session on record at once: whoever is told that it is taken on relies on it, however we end."""
        with self._trying(key, "keep the record"):
            self.store.save(self.entries[key].session)
        if self.store.commit():
            self._unsaved.pop(key, None)

    def close(self) -> None:
        """Put everything on record and let go; what is being ended goes on being ended by the next daemon."""
        self.save()
        self._reclaimer.close()
        self.observer.marks.memory.close()
        self.store.close()
        for handle in self._leaders.values():
            os.close(handle)
        for opened in self._pages.values():
            opened.close()


def count_stuck(entries: Iterable[Entry]) -> int:
    """Return how many processes outlived SIGKILL."""
    return sum(len(entry.stuck()) for entry in entries)
