"""Who dies, who is spared, and what is to be done now. Pure: facts and rules in, a plan out."""

from __future__ import annotations

import enum
from typing import NamedTuple

from reaperd import lineage
from reaperd.escalation import NEXT, SIGNAL, Event, Stage
from reaperd.ledger import GROWTH_LIMIT, Entry, Phase, Target, tracker_due_s
from reaperd.model import Family, Member, Session, Snapshot
from reaperd.policy import Policy

FREEZE_S = 0.005  # from SIGSTOP to SIGKILL: all of a growing session must hold still first
LATE_GRACE_S = 0.2  # the least that a worker found late gets between SIGTERM and SIGKILL
FRESH_S = 0.2  # nobody is signalled on evidence that is older
KILL_WAIT_S = 1.0  # how long SIGKILL may take to show before a process counts as stuck
MAX_RETRY_S = 32.0
IDLE_LOOKS = 2  # one look can come while a worker is between two programs


class Depth(enum.Enum):
    """Whom a look reads, beside those that leaders can just have left."""

    NEWCOMERS = "newcomers"  # nobody else: it is to find those that were forked meanwhile
    MEMBERS = "members"  # who was found to belong to the session: they are to be signalled
    EVERYONE = "everyone"  # and whoever was nobody's: it may be another program by now


class Look(NamedTuple):
    """See again who belongs to the session."""

    depth: Depth


class Send(NamedTuple):
    """Send a signal to one process; its new stage is over at ``due_s``."""

    member: Member
    event: Event
    stage: Stage
    signal: int
    due_s: float


class Reclaim:
    """Free what the dead held in /dev/shm and in temporary directories."""


class Conclude:
    """Write the session's last event; nothing more is done for it, save for stuck processes."""


class Forget:
    """Take the session off the record."""


Action = Look | Send | Reclaim | Conclude | Forget


def judge(session: Session, snapshot: Snapshot, policy: Policy) -> Family:
    """Return who belongs to ``session`` and may be ended, and who is left alone and why."""
    return lineage.family(session, snapshot, policy.protection)


def decide(entry: Entry, policy: Policy, now_s: float, *, still: bool = False) -> list[Action]:
    """Return what is to be done for one session now.

    ``still``: all in its own control group, where it has one, hold still, or cannot be made to.
    """
    if entry.died_at_s is None:
        return _while_the_leader_lives(entry, policy, now_s)
    if now_s < entry.blind_until_s:
        return []
    targets = [] if policy.dry_run else _to_signal(entry, policy, now_s)
    # Signals first, while the evidence is fresh: where many sessions end at once, a look is due again before long.
    fresh = [t for t in targets if now_s - max(entry.judged_at_s, t.found_at_s) <= FRESH_S]
    if fresh and (still or not _kills(entry, fresh)):
        return _sends(entry, fresh, policy, now_s)
    if targets:
        return [Look(Depth.MEMBERS)]
    if entry.look_due_s is not None and entry.look_due_s <= now_s:
        return [Look(_depth(entry, now_s))]
    if policy.dry_run:
        return _tell(entry, now_s)
    actions: list[Action] = []
    if entry.phase is Phase.RECLAIMING and not entry.reclaim_asked:
        actions.append(Reclaim())
    if entry.phase is Phase.FINISHED:
        # At once, so that both are written together: else one who is taken on again by the next daemon would end twice.
        if not entry.concluded:
            actions.append(Conclude())
        if not entry.stuck():
            actions.append(Forget())
    return actions


def _tell(entry: Entry, now_s: float) -> list[Action]:
    """Say what would be done, when it would be done: after a clean exit workers may yet end by themselves."""
    if entry.concluded:
        return [Forget()]
    if not entry.looks:
        return []
    living = any(target.stage is not Stage.GONE for target in entry.targets.values())
    return [] if living and now_s < entry.signal_from_s else [Conclude(), Forget()]


def _while_the_leader_lives(entry: Entry, policy: Policy, now_s: float) -> list[Action]:
    """End a session that its leader has ended and that left no worker; end a leader that is to be stopped."""
    if entry.idle_looks >= IDLE_LOOKS:
        return [Forget()] if entry.concluded else [Conclude(), Forget()]
    target = entry.leader_target
    if target is None or target.due_s > now_s or policy.dry_run:
        return []
    return [next_send(target, Event.DUE, now_s, now_s + policy.grace_s)]


def _depth(entry: Entry, now_s: float) -> Depth:
    if not entry.looks:
        return Depth.MEMBERS
    return Depth.EVERYONE if entry.is_quiet(entry.quiet_looks + 1, now_s) else Depth.NEWCOMERS


def _to_signal(entry: Entry, policy: Policy, now_s: float) -> list[Target]:
    """Return those for whom a signal is due."""
    if now_s < entry.signal_from_s:
        return []
    multiplying = entry.growth >= GROWTH_LIMIT
    trackers_too = entry.phase is Phase.TRACKERS and tracker_due_s(entry, policy.tracker_grace_s) <= now_s
    due = []
    for target in entry.targets.values():
        if target.stage is Stage.GONE or target.excused:
            continue
        if target.stage is Stage.TRUSTED:
            if trackers_too:
                due.append(target)
        elif target.due_s <= now_s or (multiplying and _grows(target)):
            due.append(target)
    return due


def must_hold_still(entry: Entry, policy: Policy, now_s: float) -> bool:
    """Say whether all in the session's own control group are to hold still for the next look.

    Somebody is to be killed on what it tells: then nobody has forked anybody since, who would be lost sight of. Or they
    multiply, or the last look found some gone before it could read them: they are others before this one comes to its end.
    """
    if entry.died_at_s is None or policy.dry_run or entry.session.scope is None:
        return False
    never_still = entry.growth >= GROWTH_LIMIT or entry.restless
    return never_still or _kills(entry, _to_signal(entry, policy, now_s))


def _kills(entry: Entry, targets: list[Target]) -> bool:
    """Say whether a signal that is due in a session with a control group of its own is SIGKILL."""
    if entry.session.scope is None:
        return False
    return any(NEXT[one.stage, _event(entry, one)] is Stage.KILLED for one in targets)


def _event(entry: Entry, target: Target) -> Event:
    return Event.MULTIPLIED if entry.growth >= GROWTH_LIMIT and _grows(target) else Event.DUE


def _grows(target: Target) -> bool:
    return target.late and target.stage in (Stage.FOUND, Stage.ASKED)


def _sends(entry: Entry, targets: list[Target], policy: Policy, now_s: float) -> list[Action]:
    """Return the signals for ``targets``; what multiplies is frozen before it is killed: frozen, it forks no more."""
    kill_at_s = max(entry.signal_from_s + policy.grace_s, now_s + LATE_GRACE_S)
    return [next_send(target, _event(entry, target), now_s, kill_at_s) for target in targets]


def next_send(target: Target, event: Event, now_s: float, kill_at_s: float) -> Send:
    """Return the signal that takes ``target`` into its next stage; asked to end, it has until ``kill_at_s``."""
    stage = NEXT[target.stage, event]
    due_s = {
        Stage.ASKED: kill_at_s,
        Stage.FROZEN: now_s + FREEZE_S,
        Stage.KILLED: now_s + KILL_WAIT_S,
        Stage.STUCK: now_s + min(2.0 ** min(target.retries, 16), MAX_RETRY_S),
    }[stage]
    return Send(target.member, event, stage, SIGNAL[stage], due_s)
