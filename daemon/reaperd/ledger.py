"""All that the core remembers, and how each thing that happens changes it. Pure.

A session's phase is derived from what is known of its processes and stored nowhere:
watched (the leader lives) -> reaping (workers are being ended) -> trackers (they end by themselves, or are ended)
-> reclaiming (what the dead held is freed) -> concluded, where only stuck processes keep a session on record.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from reaperd.escalation import NEXT, Event, Stage
from reaperd.model import Cause, Family, Freed, Member, ProcessId, Role, Session

# Seconds until the next look, by the number of looks in a row that changed nothing.
# Not at once: while many processes end, looking at them would take the time that the kernel needs for it.
SPACING_S = (0.02, 0.02, 0.02, 0.02, 0.04, 0.5)
CLOSE_S = 0.002  # where somebody re-forks
QUICK_S = 0.02  # a look that took longer is not repeated at once
# Looks are due at multiples of this, so that one pass serves all sessions that end within it.
GRID_S = 0.02
QUIET_LOOKS = 5
# So many where somebody re-forked before: it can slip through many a look at /proc.
QUIET_LOOKS_AFTER_GROWTH = 40
# On a crowded machine so many take long: after that time it is enough, too.
QUIET_AFTER_GROWTH_S = 1.0
# Looks that find members without a living parent among those that were asked to end, before such are frozen.
GROWTH_LIMIT = 2
# A worker that was asked to end may start a few commands to end well; so many at once are a fork bomb.
MAX_NEWCOMERS = 32
DONE = (Stage.GONE, Stage.STUCK)


class Phase(enum.Enum):
    """Where a session stands."""

    WATCHED = "watched"
    REAPING = "reaping"
    TRACKERS = "trackers"
    RECLAIMING = "reclaiming"
    FINISHED = "finished"


class Target(NamedTuple):
    """A process that is being ended."""

    member: Member
    stage: Stage
    due_s: float  # when its stage is over; meaningless for GONE
    found_at_s: float = 0.0
    retries: int = 0
    signals: tuple[int, ...] = ()
    gone_at_s: float | None = None
    denied: bool = False
    excused: bool = False  # the last look did not find that it belongs to the session any more
    late: bool = False  # found when all others had been asked to end, with nobody of them for a parent

    @property
    def done(self) -> bool:
        """Whether nothing more is awaited of it."""
        return self.excused or self.stage in DONE

    @property
    def tracker(self) -> bool:
        """Whether it guards shared memory, and goes last."""
        return self.member.role is Role.TRACKER


class Entry(NamedTuple):
    """One session on record. All times are monotonic seconds."""

    session: Session
    died_at_s: float | None = None
    signal_from_s: float = 0.0  # no signal earlier: a clean exit leaves its workers some time
    look_due_s: float | None = None
    looked_at_s: float = 0.0
    judged_at_s: float = 0.0  # when all that were found were last looked at, not only those who are new
    blind_until_s: float = 0.0  # nobody could look, and nobody is signalled unseen
    looks: int = 0
    quiet_looks: int = 0
    saw_everyone: bool = False  # the last look did
    restless: bool = False  # the last look was not calm
    growth: int = 0
    changed_at_s: float = 0.0  # when a worker was last found or seen to end
    targets: Mapping[ProcessId, Target] = MappingProxyType({})
    left_alone: Mapping[ProcessId, str] = MappingProxyType({})
    workers: int = 0  # when last looked at; while the leader lives
    # In a row, at all who could be one, that found no worker of a session that its leader has ended.
    idle_looks: int = 0
    leader_target: Target | None = None  # set while somebody has the leader stopped
    stopped_by_uid: int | None = None  # who that was
    reclaim_asked: bool = False
    reclaimed: Freed | None = None
    shm_held_bytes: int = 0
    concluded: bool = False

    @property
    def quiet_looks_wanted(self) -> int:
        """How many looks in a row must find nobody new."""
        return QUIET_LOOKS_AFTER_GROWTH if self.growth else QUIET_LOOKS

    def is_quiet(self, looks: int, at_s: float) -> bool:
        """Say whether it is enough that ``looks`` in a row, up to ``at_s``, have found nobody new."""
        if looks >= self.quiet_looks_wanted:
            return True
        return looks >= QUIET_LOOKS and at_s - self.changed_at_s >= QUIET_AFTER_GROWTH_S

    @property
    def workers_done(self) -> bool:
        """Whether every worker found is gone or stuck, and looking again found no other."""
        if not (self.saw_everyone and self.is_quiet(self.quiet_looks, self.looked_at_s)):
            return False
        return all(target.tracker or target.done for target in self.targets.values())

    @property
    def phase(self) -> Phase:
        """Where the session stands."""
        if self.died_at_s is None:
            return Phase.WATCHED
        if not self.workers_done:
            return Phase.REAPING
        if not all(target.done for target in self.targets.values()):
            return Phase.TRACKERS
        return Phase.FINISHED if self.reclaimed is not None else Phase.RECLAIMING

    def living_targets(self) -> frozenset[ProcessId]:
        """Return who has not ended, as far as is known."""
        return frozenset(id_ for id_, target in self.targets.items() if target.stage is not Stage.GONE)

    def stuck(self) -> list[Target]:
        """Return the targets that outlived SIGKILL."""
        return [target for target in self.targets.values() if target.stage is Stage.STUCK]


# -- what happens ---------------------------------------------------------------------------------


class LeaderDied(NamedTuple):
    """A leader's pidfd became readable."""

    cause: Cause
    at_s: float
    signal_from_s: float


class Looked(NamedTuple):
    """Somebody looked who belongs to the session."""

    family: Family
    at_s: float
    took_s: float
    # False: there may be more members than these: somebody was not looked at, or was gone before.
    complete: bool = True
    # Pids of those who let nobody read their marks: what they are is not known.
    unread: frozenset[int] = frozenset()
    afresh: bool = True  # False: who was found before was not looked at again
    ahead: bool = False  # True: only some were looked at, before the look that counts
    everyone: bool = True  # False: who was nobody's before was not looked at again
    # False: somebody who may be a member was gone, or given to another parent, before he could be judged.
    calm: bool = True


class Exited(NamedTuple):
    """Members' pidfds became readable; when each was seen to be."""

    processes: Mapping[ProcessId, float]


class Signalled(NamedTuple):
    """A signal was sent to one process, or refused."""

    process: ProcessId
    event: Event
    signal: int
    due_s: float
    denied: bool = False


class SignalsSent(NamedTuple):
    """Signals went out, many at once: a session can have thousands of workers."""

    signals: tuple[Signalled, ...]


class LookFailed(NamedTuple):
    """Nobody could look: descriptors ran out."""

    at_s: float


class Isolated(NamedTuple):
    """The leader was put into a control group of the session's own; what counts OOM kills there, and how many so far."""

    scope: str
    oom_counter: str = ""
    oom_kills: int | None = None


class MembersLost(NamedTuple):
    """Members that only descent tells have ended: their pids may be somebody else's."""

    processes: frozenset[ProcessId]


class OomCounted(NamedTuple):
    """The OOM counter was read while the leader lived: whoever was killed so far, it was not the leader."""

    kills: int | None


class CauseTold(NamedTuple):
    """The kernel told late why the leader died."""

    cause: Cause


class StopAsked(NamedTuple):
    """Somebody wants the leader ended."""

    leader: Member
    at_s: float
    by_uid: int = 0


class Unregistered:
    """The leader ended its session and lives on."""


class Spared(NamedTuple):
    """The leader named processes that it started under ``spared()``."""

    processes: frozenset[ProcessId]


class Reclaimed(NamedTuple):
    """What the dead held in /dev/shm and in temporary directories is freed, or freeing it was given up."""

    freed: Freed


class ReclaimStarted:
    """A helper has begun to free what the dead held."""


class ShmMeasured(NamedTuple):
    """How many bytes in /dev/shm the session held when its leader died."""

    held_bytes: int


class Concluded:
    """The session's last event was written."""


Happening = (
    LeaderDied
    | Looked
    | Exited
    | LookFailed
    | Isolated
    | SignalsSent
    | MembersLost
    | OomCounted
    | CauseTold
    | StopAsked
    | Unregistered
    | Spared
    | Reclaimed
    | ReclaimStarted
    | ShmMeasured
    | Concluded
)


def apply(entry: Entry, happening: Happening) -> Entry:  # noqa: PLR0912
    """Return the entry after ``happening``."""
    session = entry.session
    match happening:
        case LeaderDied():
            return _leader_died(entry, happening)
        case Looked():
            return _looked(entry, happening)
        case LookFailed():
            again_s = happening.at_s + SPACING_S[-1]
            return entry._replace(
                quiet_looks=0, saw_everyone=False, look_due_s=again_s, blind_until_s=again_s
            )
        case Exited():
            return _exited(entry, happening)
        case SignalsSent():
            return _signals_sent(entry, happening)
        case StopAsked():
            target = Target(happening.leader, Stage.FOUND, happening.at_s)
            return entry._replace(leader_target=target, stopped_by_uid=happening.by_uid)
        case Unregistered():
            return entry._replace(session=session._replace(ending=True))
        case Spared():
            return entry._replace(session=session._replace(spared=session.spared | happening.processes))
        case Isolated():
            scope, counter, kills = happening
            moved = session._replace(scope=scope, oom_counter=counter, oom_kills=kills)
            return entry._replace(session=moved)
        case MembersLost():
            return entry._replace(session=session.keeping(session.kept - happening.processes))
        case OomCounted():
            return entry._replace(session=session._replace(oom_kills=happening.kills))
        case CauseTold():
            return entry._replace(session=session._replace(cause=happening.cause))
        case ShmMeasured():
            return entry._replace(shm_held_bytes=max(entry.shm_held_bytes, happening.held_bytes))
        case ReclaimStarted():
            return entry._replace(reclaim_asked=True)
        case Reclaimed():
            return entry._replace(reclaimed=happening.freed)
        case Concluded():
            return entry._replace(concluded=True)


def _leader_died(entry: Entry, died: LeaderDied) -> Entry:
    if entry.died_at_s is not None:
        return entry
    return entry._replace(
        session=entry.session._replace(cause=died.cause),
        died_at_s=died.at_s,
        signal_from_s=died.signal_from_s,
        look_due_s=died.at_s,
        changed_at_s=died.at_s,
        leader_target=None,
    )


def _looked(entry: Entry, looked: Looked) -> Entry:
    members = looked.family.members
    if entry.died_at_s is None:
        unmarked = frozenset(id_ for id_, member in members.items() if not member.marked)
        workers = sum(member.role is Role.WORKER for member in members.values())
        session = entry.session.keeping(unmarked).adopted_by(looked.family.subreapers)
        if members.keys() != session.seen:
            session = session._replace(seen=frozenset(members))
        idle = session.ending and not workers and looked.complete
        return entry._replace(
            session=session,
            left_alone=looked.family.left_alone,
            workers=workers,
            idle_looks=entry.idle_looks + 1 if idle else 0,
        )
    new = [member for id_, member in members.items() if id_ not in entry.targets]
    new_workers = [member for member in new if member.role is Role.WORKER]
    targets = dict(entry.targets)
    if looked.afresh:
        targets = {id_: _judged_again(target, looked) for id_, target in targets.items()}
    found = _new_targets(entry, new, looked.at_s, crowded=len(new_workers) >= MAX_NEWCOMERS)
    targets.update((target.member.process.id, target) for target in found)
    quiet = 0 if new_workers or not looked.complete or looked.ahead else entry.quiet_looks + 1
    changed = entry._replace(
        session=entry.session.keeping(entry.session.kept | _living(members, targets)).adopted_by(
            looked.family.subreapers
        ),
        targets=targets,
        left_alone=_but_for_the_gone(
            {**entry.left_alone, **_excused(entry, looked), **looked.family.left_alone}, targets
        ),
        looks=entry.looks + (not looked.ahead),
        looked_at_s=looked.at_s,
        judged_at_s=looked.at_s if looked.afresh else entry.judged_at_s,
        quiet_looks=quiet,
        saw_everyone=looked.everyone,
        restless=not looked.calm,
        growth=entry.growth + any(target.late for target in found),
        changed_at_s=looked.at_s if new_workers else entry.changed_at_s,
    )
    if looked.ahead:  # those who were told end now; where others were left to the look, nobody waits for that
        due_s = _on_grid(looked.at_s + SPACING_S[0]) if looked.complete else entry.look_due_s
        return changed._replace(look_due_s=due_s)
    if changed.workers_done:
        return changed._replace(look_due_s=None)
    # Below 0: after growth the first looks are close.
    distant = quiet - changed.quiet_looks_wanted + QUIET_LOOKS
    spacing = CLOSE_S if distant < 0 else SPACING_S[min(distant, len(SPACING_S) - 1)]
    # A look that takes long on a crowded machine must not become all that we do, unless somebody forks all the time.
    share = 2 if changed.growth or changed.restless else 5
    # What was found too late may have handed on by now to one that has only just started.
    at_once = changed.growth > entry.growth and looked.took_s <= QUICK_S
    # In a control group of its own whoever got away is caught by the next look: all hold still for it.
    at_once |= changed.restless and not entry.restless and changed.session.scope is not None
    due_s = looked.at_s + (0.0 if at_once else max(spacing, share * looked.took_s))
    return changed._replace(look_due_s=due_s if spacing == CLOSE_S else _on_grid(due_s))


def _on_grid(at_s: float) -> float:
    return math.ceil(round(at_s / GRID_S, 6)) * GRID_S


def _living(members: Iterable[ProcessId], targets: Mapping[ProcessId, Target]) -> frozenset[ProcessId]:
    """Return ``members`` without those who have ended: whoever is there with such an id got it in the same tick."""
    return frozenset(id_ for id_ in members if targets[id_].stage is not Stage.GONE)


def _judged_again(target: Target, looked: Looked) -> Target:
    """Excuse a process that became another user's, was spared or protected meanwhile; one that has ended tells so itself."""
    id_ = target.member.process.id
    listed = id_ in looked.family.members
    if target.excused == (not listed) or (not listed and id_.pid in looked.unread):
        return target
    return target._replace(excused=not listed)


def _but_for_the_gone(
    left_alone: Mapping[ProcessId, str], targets: Mapping[ProcessId, Target]
) -> Mapping[ProcessId, str]:
    """Return who is left alone: what was seen of one before, or just before, it ended does not make it one of them."""
    gone = {id_ for id_, target in targets.items() if target.stage is Stage.GONE}
    return {id_: reason for id_, reason in left_alone.items() if id_ not in gone}


def _excused(entry: Entry, looked: Looked) -> Mapping[ProcessId, str]:
    return {
        id_: "does not belong to the session any more"
        for id_, target in entry.targets.items()
        if looked.afresh
        and id_.pid not in looked.unread
        and target.stage is not Stage.GONE
        and id_ not in looked.family.members
    }


def _new_targets(entry: Entry, members: list[Member], at_s: float, *, crowded: bool) -> list[Target]:
    """Return the newcomers as targets, parents before their children."""
    asked = {
        target.member.process.id.pid: target
        for target in entry.targets.values()
        if target.stage is Stage.ASKED and not target.tracker
    }
    found = []
    for member in sorted(members, key=lambda member: (member.process.id.start_ticks, member.process.id.pid)):
        parent = None if crowded else asked.get(member.process.ppid)
        if member.role is Role.TRACKER:
            target = Target(member, Stage.TRUSTED, max(at_s, entry.signal_from_s), at_s)
        elif parent is not None:
            # Part of how its parent ends well: it has as long as its parent, and is not asked itself.
            target = asked[member.process.id.pid] = Target(member, Stage.ASKED, parent.due_s, at_s)
        else:
            late = bool(entry.looks) and at_s > entry.signal_from_s
            target = Target(member, Stage.FOUND, max(at_s, entry.signal_from_s), at_s, late=late)
        found.append(target)
    return found


def _exited(entry: Entry, exited: Exited) -> Entry:
    gone = {}
    for id_, at_s in exited.processes.items():
        target = entry.targets.get(id_)
        if target is not None:
            stage = NEXT[target.stage, Event.EXITED]
            gone[id_] = target._replace(stage=stage, gone_at_s=target.gone_at_s or at_s)
    if not gone:
        return entry
    session = entry.session.keeping(entry.session.kept - gone.keys())
    targets = {**entry.targets, **gone}
    changed = entry._replace(
        session=session, targets=targets, left_alone=_but_for_the_gone(entry.left_alone, targets)
    )
    if all(target.tracker for target in gone.values()):
        return changed
    # A worker may have forked in its last moment: begin to look again.
    last_s = max(exited.processes[id_] for id_ in gone)
    due = last_s + CLOSE_S if entry.growth else _on_grid(last_s + SPACING_S[0])
    return changed._replace(
        quiet_looks=0,
        changed_at_s=last_s,
        look_due_s=due if entry.look_due_s is None else min(due, entry.look_due_s),
    )


def _signals_sent(entry: Entry, sent: SignalsSent) -> Entry:
    targets, leader_target = dict(entry.targets), entry.leader_target
    for one in sent.signals:
        target = targets.get(one.process)
        if leader_target is not None and one.process == entry.session.leader:
            leader_target = advance(leader_target, one)
        elif target is not None and target.stage is not Stage.GONE:
            targets[one.process] = advance(target, one)
    return entry._replace(targets=targets, leader_target=leader_target)


def advance(target: Target, signalled: Signalled) -> Target:
    """Return ``target`` after a signal was sent to it, or refused."""
    stage = NEXT[target.stage, signalled.event]
    return target._replace(
        stage=stage,
        due_s=signalled.due_s,
        retries=target.retries + (stage is Stage.STUCK),
        signals=target.signals if signalled.denied else (*target.signals, signalled.signal),
        denied=signalled.denied,
    )


def tracker_due_s(entry: Entry, tracker_grace_s: float) -> float:
    """Return when trackers that have not ended by themselves are killed."""
    return max(entry.changed_at_s, entry.signal_from_s) + tracker_grace_s


def deadline(entry: Entry, tracker_grace_s: float) -> float | None:
    """Return the earliest monotonic second at which something is due for a session, None when nothing is."""
    if entry.died_at_s is None:
        return entry.leader_target.due_s if entry.leader_target is not None else None
    due = [
        t.due_s
        for t in entry.targets.values()
        if t.stage not in (Stage.GONE, Stage.TRUSTED) and not t.excused
    ]
    if entry.look_due_s is not None:
        due.append(entry.look_due_s)
    if entry.phase is Phase.TRACKERS and any(t.stage is Stage.TRUSTED for t in entry.targets.values()):
        due.append(tracker_due_s(entry, tracker_grace_s))
    return max(min(due), entry.blind_until_s) if due else None
