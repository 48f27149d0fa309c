"""The core: takes sessions on, notices that their leaders die, and has done what is due until each session is over.

Pure code decides (decide.py on ledger.py). The parts that the core owns fetch the facts, do the deeds and feed both back:
sessions.py keeps what has become of each, living.py looks at those whose leaders live, survivors.py ends what others left.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterable

from agent import wire
from reaperd import decide, ledger, report
from reaperd.causes import read_cause
from reaperd.census import Interrupted
from reaperd.escalation import Stage
from reaperd.isolator import Done, Isolator
from reaperd.kept import Kept
from reaperd.leaders import Leaders
from reaperd.ledger import Entry, Phase
from reaperd.linux.alarm import Alarm
from reaperd.linux.oom import Counter
from reaperd.linux.page import OpenPage
from reaperd.linux.procfs import ProcessGone
from reaperd.living import Living
from reaperd.model import UNKNOWN_CAUSE, Cause, CauseKind, Freed, Member, Role, Session, SessionKey
from reaperd.observer import Observer
from reaperd.policy import Policy
from reaperd.poller import Poller
from reaperd.reaper import Reaper
from reaperd.reclaim import LastWord
from reaperd.reclaimer import Reclaimer
from reaperd.sessions import Sessions
from reaperd.store import Store
from reaperd.strays import Strays
from reaperd.survivors import Survivors

log = logging.getLogger(__name__)


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
        *,
        socket_path: str = "",
    ) -> None:
        self.observer = observer
        self.store = store
        self.sessions = Sessions(store, policy)
        self.leaders = Leaders(self.sessions, observer)
        self._reaper = reaper
        self._poller = poller
        self._alarm = alarm
        self._kept = Kept(observer.proc)
        self.living = Living(self.sessions, observer, self.leaders, self._kept)
        self.strays = Strays(self.sessions, self.leaders, observer.proc)
        self._told: set[SessionKey] = set()  # sessions that a dry run has spoken of
        self._reclaimer = Reclaimer(poller, observer, self._reclaimed)
        self._survivors = Survivors(self.sessions, observer, reaper, poller, self._kept, self._reclaimer)
        self._isolator = Isolator(poller, observer, socket_path, system=os.geteuid() == 0)
        self._heed(policy)

    @property
    def policy(self) -> Policy:
        """The rules in force."""
        return self.sessions.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._heed(policy)

    def _heed(self, policy: Policy) -> None:
        self.sessions.heed(policy)
        self.observer.census.reader.reads_cgroups = bool(policy.protected_units)
        self.living.judge_anew()

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
            # On our list last: who is on it is taken for one whose end we shall be told of.
            if leader_pidfd is not None:
                ours.callback(self._poller.unwatch, leader_pidfd)
                ours.callback(self._alarm.silence, leader_pidfd)
                self._watch(session.key, leader_pidfd)
            self.sessions.add(session)
            self.leaders.hold(session.key, leader_pidfd, opened)
            ours.pop_all()
        if leader_pidfd is None:
            if self.store.is_settled(session.key):  # its end was told of; somebody had outlived SIGKILL
                self.sessions.apply(session.key, ledger.Concluded())
            self._leader_is_dead(session.key, session.cause or UNKNOWN_CAUSE)
            return
        self.leaders.read_page(session.key)
        self.living.look_below(session.key)

    def _watch(self, key: SessionKey, leader_pidfd: int) -> None:
        self._poller.watch(leader_pidfd, functools.partial(self._leader_died, key, leader_pidfd))
        self._alarm.watch(leader_pidfd)

    def mend(self) -> None:
        """Set right what an error in the middle of something has left half done."""
        for key, entry in list(self.sessions.entries.items()):
            handle = self.leaders.handle(key)
            if entry.died_at_s is None and handle is None:
                self._leader_is_dead(key, entry.session.cause or UNKNOWN_CAUSE)
            elif entry.died_at_s is None and handle is not None and not self._poller.watches(handle):
                self._watch(key, handle)
            elif entry.phase is Phase.RECLAIMING and entry.reclaim_asked and not self._reclaimer.has(key):
                self.sessions.apply(key, ledger.Reclaimed(Freed()))

    def is_settled(self, key: SessionKey) -> bool:
        """Say whether a session is over for good: whoever carries its marks still was left alone, or told of."""
        return key in self._told or self.store.is_settled(key)

    def scope_in(self, key: SessionKey, cgroup: str) -> str | None:
        """Return the control group that was made for a session where ``cgroup`` is that, or below it."""
        return self._isolator.scope_in(key, cgroup)

    def isolate(self, key: SessionKey, done: Done) -> None:
        """Give a session a control group of its own, and call ``done`` with that, or with why not, once it is decided."""
        session, handle = self.sessions.entries[key].session, self.leaders.handle(key)
        leader = self.observer.census.leader(session)
        if session.scope is not None:
            done(session.scope, "")
        elif self.policy.dry_run:
            done(None, "the daemon runs with dry_run: it changes nothing")
        elif handle is None or leader is None:
            done(None, "it has ended")
        elif (protection := self.policy.protection(leader)) is not None:
            done(None, f"it {protection}")
        else:
            self._isolator.ask(session, handle, functools.partial(self._isolated, key, done))

    def _isolated(self, key: SessionKey, done: Done, scope: str | None, why: str) -> None:
        if scope is None:
            log.info("not isolated session=%s uid=%d: %s", key.id, key.uid, why)
        elif key in self.sessions.entries:
            log.info("isolated session=%s uid=%d cgroup=%r", key.id, key.uid, scope)
            session = self.sessions.entries[key].session
            counter = Counter(session.oom_counter, session.oom_kills)
            with contextlib.suppress(ProcessGone, OSError):
                counter = self.observer.oom_counter(session.leader.pid)
            self.sessions.apply(key, ledger.Isolated(scope, *counter))
            self.sessions.put_on_record(key)
        done(scope, why)

    # -- the leader ends ---------------------------------------------------------------------

    def unregister(self, key: SessionKey) -> None:
        """The leader ended its session: what it left is watched until the leader ends, too."""
        self.sessions.apply(key, ledger.Unregistered())
        with contextlib.suppress(Interrupted):  # the next scan looks, too
            self.living.look([key])

    def stop_leader(self, key: SessionKey, by_uid: int) -> None:
        """Ask the leader to end, and make it end after the grace period."""
        session = self.sessions.entries[key].session
        process, handle = self.observer.census.leader(session), self.leaders.handle(key)
        if process is None or handle is None:
            return
        self._reaper.take(session.leader, os.dup(handle))
        member = Member(process, Role.WORKER, "leader", ("somebody asked to stop the session",), marked=True)
        self.sessions.apply(key, ledger.StopAsked(member, time.monotonic(), by_uid))

    def _leader_died(self, key: SessionKey, handle: int) -> None:
        self._alarm.silence(handle)
        session = self.sessions.entries[key].session
        cause, flags = UNKNOWN_CAUSE, 0
        with self.sessions.trying(key, "read the end"):
            cause = self._read_cause(session, handle)
            flags = self.leaders.read_page(key)
        # Where the kernel does not tell, what the leader said at its end must do.
        told = cause.kind in (CauseKind.EXIT, CauseKind.UNKNOWN)
        if told and (flags & (wire.CLOSING | wire.ENDED) or session.ending):
            cause = cause._replace(clean=True)
        # It may be somebody's target, too: it was to be stopped, or is a worker itself.
        self._survivors.note_exit(session.leader)
        self._leader_is_dead(key, cause)
        # Last: as long as it is watched, we are told again where this has come to nothing.
        self._poller.unwatch(handle)

    def _leader_is_dead(self, key: SessionKey, cause: Cause) -> None:
        now_s = time.monotonic()
        wait_s = self.policy.exit_grace_s if cause.clean else 0.0
        self.living.lose_dead(key, self._kept.dead())
        self.sessions.apply(key, ledger.LeaderDied(cause, now_s, now_s + wait_s))

    def _read_cause(self, session: Session, handle: int) -> Cause:
        def vanished() -> int:
            return sum(1 for id_ in session.seen if not self.observer.proc.is_alive(id_))

        return read_cause(session, handle, self.observer, vanished)

    def _amend_cause(self, entry: Entry) -> None:
        """Ask again why the leader died, where the kernel did not tell at once."""
        session, handle = entry.session, self.leaders.handle(entry.session.key)
        if session.cause is not None and session.cause.kind is CauseKind.UNKNOWN and handle is not None:
            self.sessions.apply(session.key, ledger.CauseTold(self._read_cause(session, handle)))

    # -- carrying out ------------------------------------------------------------------------

    def step(self) -> None:
        """Do all that is due now, up to the death of the next leader: that goes first."""
        while (self._do_due() or self._reclaimer.step()) and not self._alarm.rings():
            pass
        self._isolator.step()
        self._reaper.thaw_late(time.monotonic())
        idle_s = self.observer.marks.memory.idle_deadline_s
        if idle_s is not None and idle_s <= time.monotonic():
            self.observer.marks.memory.close()

    def is_called_away(self) -> bool:
        """Say whether a leader has died of whose end nobody has taken note: whatever else is being done can wait."""
        return self._alarm.rings()

    def _do_due(self) -> bool:
        """Do what has become due since the last time; False when nothing has."""
        now_s = time.monotonic()
        if self._survivors.exits_due_s is not None and self._survivors.exits_due_s <= now_s:
            self._survivors.collect_exits()
        due = {}
        for entry in self.sessions.take_due(now_s):
            key = entry.session.key
            with self.sessions.trying(key, "decide on the members"):
                if actions := decide.decide(entry, self.policy, now_s):
                    due[key] = actions
        looks = {key: action.depth for key, (action, *_) in due.items() if isinstance(action, decide.Look)}
        for depths in self._survivors.by_user(looks):
            if not self._alarm.rings():
                self._survivors.look(depths)
        for key, actions in due.items():
            if key not in looks:
                with self.sessions.trying(key, "do what is due to the members"):
                    self._do(key, actions)
        return bool(due)

    def next_deadline(self) -> float | None:
        """Return the monotonic second at which ``step()`` has something to do, None when nothing is due."""
        due = (
            self.sessions.next_deadline(),
            self._reclaimer.deadline_s,
            self._isolator.deadline_s,
            self._reaper.thaw_due_s,
            self._survivors.exits_due_s,
            self.observer.marks.memory.idle_deadline_s,
        )
        return min((deadline_s for deadline_s in due if deadline_s is not None), default=None)

    def _do(self, key: SessionKey, actions: list[decide.Action]) -> None:
        sends = [action for action in actions if isinstance(action, decide.Send)]
        if sends:
            self._survivors.send(key, sends)
        for action in actions:
            match action:
                case decide.Reclaim():
                    self._ask_reclaim(key)
                case decide.Conclude():
                    self._conclude(key)
                case decide.Forget():
                    self._forget(key)

    def _conclude(self, key: SessionKey) -> None:
        entry = self.sessions.entries[key]
        self._amend_cause(entry)
        entry = self.sessions.entries[key]
        event, freed = report.end_event(entry, dry_run=self.policy.dry_run), report.freed_by(entry)
        ended = sum(1 for target in entry.targets.values() if target.stage is Stage.GONE and target.signals)
        log.info(
            "%s session=%s name=%r uid=%d cause=%s processes=%d ended=%d left_alone=%d latency_s=%s freed_bytes=%d%s",
            event["kind"], key.id, entry.session.name, entry.session.uid, report.cause_words(entry.session.cause),
            len(entry.targets), ended, len(entry.left_alone), event["latency_s"], freed.rss_bytes + freed.shm_bytes,
            " dry_run" if self.policy.dry_run else "",
        )  # fmt: skip
        self.sessions.record(event)
        self.store.add_total("reaped", ended)
        self.store.add_total("freed_bytes", freed.rss_bytes + freed.shm_bytes)
        if self.policy.dry_run:
            self._told.add(key)
        else:
            self.store.settle(key)
        self.sessions.apply(key, ledger.Concluded())

    def _forget(self, key: SessionKey) -> None:
        entry, handle = self.sessions.remove(key), self.leaders.handle(key)
        if handle is not None:
            self._poller.unwatch(handle)
            if entry.died_at_s is None:
                self._alarm.silence(handle)
        self.leaders.forget(key)
        self.observer.census.uncover(key)
        self._kept.hold(key, frozenset())
        self.living.forget(key)
        self._reclaimer.forget(key)
        self._isolator.let_go(entry.session)
        self.store.forget(key)
        self._survivors.forget(entry)

    # -- reclaiming --------------------------------------------------------------------------

    def _ask_reclaim(self, key: SessionKey) -> None:
        entry = self.sessions.entries[key]
        self.sessions.apply(key, ledger.ReclaimStarted())
        ours = self.observer.shares_our_namespaces(entry.session)
        # Who ended badly may have left names though all its workers, and who cleans up after them, were gone before it.
        frees = self.observer.shares_our_shm(entry.session) and self.policy.reclaim_shm
        frees = frees and (bool(entry.targets) or self._left_names(entry.session))
        last_word = self._last_word(entry) if ours else None
        if frees or last_word is not None:
            dead_s = time.monotonic() - (entry.died_at_s or 0.0)
            # With mounts of its own, it has had other temporary folders at the same places.
            session = entry.session if ours else entry.session._replace(temp_dirs=())
            self._reclaimer.ask(session, time.time() - dead_s, last_word, frees=frees)
        else:
            self.sessions.apply(key, ledger.Reclaimed(Freed()))

    def _left_names(self, session: Session) -> bool:
        clean = session.cause is not None and session.cause.clean
        return not clean and self._reclaimer.has_names(session)

    def _last_word(self, entry: Entry) -> LastWord | None:
        """Return what is to stand in the leader's status file, None where it needs no word of ours."""
        told = self.leaders.page_of(entry.session.key)
        if told is None or not told.status_file or told.flags & wire.ENDED:
            return None
        self._amend_cause(entry)
        cause = self.sessions.entries[entry.session.key].session.cause
        progress = None if told.progress is None else report.progress_record(told.progress)
        return LastWord(told.status_file, report.cause_record(cause), progress)

    def _reclaimed(self, key: SessionKey, held_bytes: int) -> None:
        entry = self.sessions.entries.get(key)
        if entry is not None:
            freed = Freed(shm_bytes=max(0, entry.shm_held_bytes - held_bytes))
            self.sessions.apply(key, ledger.Reclaimed(freed))

    # -- the daemon ends ---------------------------------------------------------------------

    def close(self) -> None:
        """Put everything on record and let go; what is being ended goes on being ended by the next daemon."""
        self.sessions.save()
        self._reclaimer.close()
        self._isolator.close()
        self.observer.marks.memory.close()
        self.store.close()
        self.leaders.close()


def count_stuck(entries: Iterable[Entry]) -> int:
    """Return how many processes outlived SIGKILL."""
    return sum(len(entry.stuck()) for entry in entries)
