"""What is to become of a process that nobody registered, and on what evidence. Pure: facts and rules in, a verdict out.

The rules of this file:

1. Only who bears a certain signature *and* is known to have lost its own pool parent is ever ended. All else is told of at most.
2. A parent that may have started the process has not been lost. That it has is proved by having seen it change, or by what the
   parent is now: an init, or a program that is known to adopt and to start no pool.
3. The first rule that spares decides; the thresholds come last.
4. Every verdict carries all the facts that it was made of, in words that a person can check with ps and /proc.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from reaperd.model import Process, ProcessId, Role
from reaperd.signatures import FORKED, OTHER, Signature
from reaperd.words import duration, size

# An orphan that never ends by itself is ended after so long, whatever it takes of the machine.
STAYS_S = 3600.0
LEAST_SAMPLES = 3


class Fate(enum.Enum):
    """What becomes of a process at the next scan."""

    KILL = "kill"
    QUARANTINE = "quarantine"
    REPORT = "report"
    WAIT = "wait"  # an orphan that no rule condemns yet
    SPARE = "spare"


class Rules(NamedTuple):
    """What an administrator has set (``[scan]``)."""

    age_limit_s: float = 300.0
    cpu_threshold_percent: float = 50.0
    cpu_window_s: float = 30.0
    memory_threshold_bytes: int = 64 * 1024**2
    action: Fate = Fate.KILL
    quarantine_for_s: float = 600.0
    extra: tuple[Signature, ...] = ()


class Parent(NamedTuple):
    """Who a process has for its parent now."""

    pid: int
    name: str  # for people: "systemd --user"
    # Why it cannot be the pool's parent, in words; "" where it may well be.
    adopts: str = ""


class Suspect(NamedTuple):
    """What is known of one process that a scan looked at."""

    process: Process
    signature: Signature | None  # None: no framework's, as far as can be told
    parent: Parent
    # Its parent before, whose end was noticed by the change.
    lost_parent: ProcessId | None = None
    # The orphan that it descends from, and that may yet use it: both have lost their pool.
    below: ProcessId | None = None
    group: tuple[int, ...] = ()  # the orphans of one dead pool parent have the same
    session: str = ""  # that it belongs to
    spared_by_session: str = ""  # that it was started under spared() of
    protection: str | None = None  # why it must never be signalled
    gpu_bytes: int = 0
    unread: bool = False  # its marks could not be read

    @property
    def id(self) -> ProcessId:
        """Who it is."""
        return self.process.id

    @property
    def framework(self) -> str:
        """What it is shown as."""
        return self.signature.framework if self.signature else FORKED if self.process.forked else OTHER

    @property
    def role(self) -> Role:
        """What it does for its pool."""
        return self.signature.role if self.signature else Role.WORKER

    @property
    def is_lost(self) -> bool:
        """Whether its own pool parent is known to be gone."""
        return self.lost_parent is not None or bool(self.parent.adopts) or self.below is not None

    @property
    def is_claimed(self) -> bool:
        """Whether somebody has said that it is to live on, or sees to its end."""
        return bool(self.protection or self.session or self.spared_by_session)


class Sample(NamedTuple):
    """The CPU time that a process had used at one moment."""

    at_s: float  # since boot
    cpu_ticks: int


class Record(NamedTuple):
    """What is remembered of a suspect from one scan to the next, and most of it beyond the daemon's life. Seconds since boot."""

    lost_at_s: float  # when it was first seen to have lost its parent
    samples: tuple[Sample, ...] = ()
    lost_parent: ProcessId | None = None
    quarantined_at_s: float | None = None
    condemned_at_s: float | None = None  # when a rule would first have had it ended
    uid: int | None = None


class Verdict(NamedTuple):
    """What becomes of a process, by which rule, and why."""

    fate: Fate
    rule: str
    evidence: tuple[str, ...]  # what was found, and last the reason
    outlook: str = ""  # what the next scan would do about it: true until then

    @property
    def prospects(self) -> tuple[str, ...]:
        """The evidence, with the outlook beside the reason."""
        *facts, reason = self.evidence
        return (*facts, f"{reason}: {self.outlook}") if self.outlook else self.evidence


# -- CPU ------------------------------------------------------------------------------------------


def add_sample(samples: tuple[Sample, ...], new: Sample, window_s: float) -> tuple[Sample, ...]:
    """Return the samples with a new one, and without those that the window no longer needs."""
    if samples and new.at_s - samples[-1].at_s < window_s / (2 * LEAST_SAMPLES):
        return samples  # too close to tell anything
    kept = [*samples, new]
    while len(kept) > LEAST_SAMPLES and kept[-1].at_s - kept[1].at_s >= window_s:
        kept.pop(0)
    return tuple(kept)


class Load(NamedTuple):
    """The CPU that a process used, in percent of one core."""

    mean: float
    least: float  # of all intervals between two samples
    over_s: float
    samples: int


def load_of(samples: tuple[Sample, ...], ticks_per_s: int) -> Load | None:
    """Return what ``samples`` tell; None for fewer than two."""
    if len(samples) < 2:
        return None
    shares = [
        100 * max(0, later.cpu_ticks - earlier.cpu_ticks) / ticks_per_s / (later.at_s - earlier.at_s)
        for earlier, later in itertools.pairwise(samples)
    ]
    first, last = samples[0], samples[-1]
    over_s = last.at_s - first.at_s
    mean = 100 * max(0, last.cpu_ticks - first.cpu_ticks) / ticks_per_s / over_s
    return Load(mean, min(shares), over_s, len(samples))


# -- judging --------------------------------------------------------------------------------------


def held_by_groups(suspects: Iterable[Suspect]) -> Mapping[tuple[int, ...], int]:
    """Return the memory in bytes that the orphans of each dead pool parent hold together."""
    held: dict[tuple[int, ...], int] = {}
    for one in suspects:
        if one.is_lost and one.role is Role.WORKER:
            held[one.group] = held.get(one.group, 0) + one.process.rss_bytes
    return held


class Circumstances(NamedTuple):
    """What a suspect is judged by, beside what it is."""

    record: Record
    now_s: float  # since boot
    group_rss_bytes: int
    load: Load | None
    waived: bool = False  # somebody wants it cleaned up: age, load and action do not matter


def judge(one: Suspect, given: Circumstances, rules: Rules) -> Verdict:
    """Return what is to become of ``one``."""
    facts = (*_identity(one), *_lineage(one, given), *_burden(one, given))

    def verdict(fate: Fate, rule: str, reason: str, outlook: str = "") -> Verdict:
        return Verdict(fate, rule, (*facts, reason), outlook)

    spared = _spared(one)
    if spared is not None:
        return verdict(Fate.SPARE, *spared)
    harm = _harm(one, given, rules)
    if one.signature is None or not one.signature.certain:
        reason = "nothing tells it from a program that was put into the background: it is never ended on that evidence"
        return verdict(Fate.REPORT if harm else Fate.SPARE, "uncertain", reason)
    if given.waived:
        return verdict(Fate.KILL, "cleanup", "its pool is dead", "it would be ended by a clean-up")
    if given.record.quarantined_at_s is not None:
        return verdict(*_quarantined(given, rules))
    if harm is None:
        return verdict(Fate.WAIT, *_harmless(one, given, rules))
    rule, reason = harm
    would = {
        Fate.KILL: "it would be ended at the next scan",
        Fate.QUARANTINE: "it would be stopped at the next scan",
        Fate.REPORT: '[scan] action is "report": it is told of, and left alone',
    }[rules.action]
    return verdict(rules.action, rule, reason, would)


def ends_in_s(one: Suspect, given: Circumstances, rules: Rules) -> float | None:
    """Return the seconds until ``one`` is to be ended if it goes on as it does now; None where no rule would have it ended.

    0 where the next scan does it. GPU memory is not asked for before the age limit, and does not count until then.
    """
    fate = judge(one, given, rules).fate
    stopped_at_s = given.record.quarantined_at_s
    if fate is Fate.KILL:
        return 0.0
    if fate is Fate.QUARANTINE:
        return rules.quarantine_for_s - (0.0 if stopped_at_s is None else given.now_s - stopped_at_s)
    if fate is not Fate.WAIT or rules.action is Fate.REPORT:
        return None
    lost_at_s = given.record.lost_at_s
    for age_s in sorted((rules.age_limit_s, STAYS_S)):
        then = given._replace(now_s=max(given.now_s, lost_at_s + age_s))
        if _harm(one, then, rules) is not None:
            stops_s = rules.quarantine_for_s if rules.action is Fate.QUARANTINE else 0.0
            return then.now_s - given.now_s + stops_s
    return None


def _identity(one: Suspect) -> tuple[str, ...]:
    if one.signature is not None:
        return (f"{how_recognised(one)}: {one.role.value} of {one.framework}",)
    if one.process.forked:
        return ("forked and never exec'ed: its command line is its parent's, and tells nothing",)
    return ("its command line is no framework's worker's",)


def how_recognised(one: Suspect) -> str:
    """Return what of a process bears its signature, in words."""
    row = one.signature
    if row is None:
        return "nothing"
    if row.comm:
        return f"the name of its main thread is {row.comm}"
    if row.title:
        return f"argv[0] begins with {row.title!r}"
    if row.variable:
        return f"{row.variable} is in its environment"
    if row.script:
        return f"it runs a script .../{row.script}"
    if row.tokens:
        return f"argv has {' '.join(row.tokens)!r}"
    return f"argv has {row.option} {row.begins!r}"


def _lineage(one: Suspect, given: Circumstances) -> tuple[str, ...]:
    now = f"its parent is {one.parent.name} (pid {one.parent.pid})"
    age_s = given.now_s - given.record.lost_at_s
    since = f"seen to be an orphan {f'{duration(age_s)} ago' if age_s >= 1 else 'just now'}"
    if one.below is not None:
        return (f"{now}, an orphan itself, {since}",)
    if one.lost_parent is not None:
        return (f"its parent was pid {one.lost_parent.pid}, which has ended; {now} by now, {since}",)
    if one.parent.adopts:
        return (f"re-parented: {now}, {one.parent.adopts}; {since}",)
    return (f"{now}, which may have started it",)


def _burden(one: Suspect, given: Circumstances) -> tuple[str, ...]:
    found = []
    if given.load is not None:
        found.append(
            f"{given.load.mean:.0f} % CPU over {duration(given.load.over_s)} ({given.load.samples} samples)"
        )
    memory = f"holds {size(one.process.rss_bytes)}"
    if given.group_rss_bytes > one.process.rss_bytes:
        others = (
            "its dead parent's other orphans" if one.lost_parent else "the other orphans of its process group"
        )
        memory += f", with {others} {size(given.group_rss_bytes)}"
    found.append(memory)
    if one.gpu_bytes:
        found.append(f"holds {size(one.gpu_bytes)} of GPU memory")
    return tuple(found)


def _spared(one: Suspect) -> tuple[str, str] | None:
    """Return the rule and the reason that spare it whatever it takes of the machine, None where none does."""
    if one.protection is not None:
        return "protected", f"it {one.protection}"
    if one.unread:
        return "unread", "it lets nobody read what it is, and may belong to a session"
    if one.session:
        return "session", f"it belongs to session {one.session}, and goes with that"
    if one.spared_by_session:
        return "session", f"session {one.spared_by_session} started it to live on (agent.spared)"
    if not one.is_lost:
        return "parent", "no orphan: the parent that may have started it lives"
    if one.role is Role.TRACKER:
        return "tracker", "a tracker frees what its workers shared, and ends by itself after them"
    return None


def _harm(one: Suspect, given: Circumstances, rules: Rules) -> tuple[str, str] | None:
    """Return the rule that an orphan breaks, None where it breaks none, or not for long enough."""
    age_s = given.now_s - given.record.lost_at_s
    if age_s < rules.age_limit_s or age_s <= 0:  # one look alone never tells enough
        return None
    load = given.load
    if (
        load is not None
        and load.samples >= LEAST_SAMPLES
        and load.over_s >= rules.cpu_window_s
        and load.least >= rules.cpu_threshold_percent
    ):
        return "cpu_threshold", f"never below cpu_threshold ({rules.cpu_threshold_percent:g} %)"
    if one.gpu_bytes:
        return "gpu", "an orphan that holds GPU memory"
    if given.group_rss_bytes >= rules.memory_threshold_bytes:
        return "memory_threshold", f"at least memory_threshold ({size(rules.memory_threshold_bytes)})"
    if one.signature is not None and one.signature.stays and age_s >= STAYS_S:
        return "stays", f"may never end by itself, and has been an orphan for {duration(STAYS_S)}"
    return None


def _harmless(one: Suspect, given: Circumstances, rules: Rules) -> tuple[str, str]:
    age_s = given.now_s - given.record.lost_at_s
    if age_s < rules.age_limit_s or age_s <= 0:
        return "age", f"orphan_age_limit is {duration(rules.age_limit_s)}: it is not judged before"
    alone = one.signature.alone if one.signature else ""
    return "harmless", f"below all thresholds{': ' + alone if alone else ''}"


def _quarantined(given: Circumstances, rules: Rules) -> tuple[Fate, str, str, str]:
    stopped_s = given.now_s - (given.record.quarantined_at_s or 0.0)
    left_s = rules.quarantine_for_s - stopped_s
    if left_s <= 0:
        over = f"in quarantine for {duration(stopped_s)}, and quarantine_for is over"
        return Fate.KILL, "quarantine", over, "it would be ended at the next scan"
    return (
        Fate.QUARANTINE,
        "quarantine",
        f"stopped with SIGSTOP {duration(stopped_s)} ago",
        f"it is ended in {duration(left_s)} unless released",
    )
