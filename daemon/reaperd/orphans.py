"""Orphans that nobody registered: found by scans, judged by the rules, stopped or ended, and remembered over restarts.

What is true of them is read by scan.py, what becomes of them is decided by verdicts.py, and hunts.py ends them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from reaperd import report
from reaperd.escalation import Stage
from reaperd.hunt import Hunt
from reaperd.hunts import Hunts
from reaperd.ledger import Target
from reaperd.linux.procfs import TICKS_PER_S, ProcessGone, ProcFS
from reaperd.model import ProcessId, Role
from reaperd.policy import Policy
from reaperd.poller import Poller
from reaperd.reaper import Reaper
from reaperd.scan import Scan
from reaperd.verdicts import (
    LEAST_SAMPLES,
    Circumstances,
    Fate,
    Record,
    Rules,
    Sample,
    Suspect,
    Verdict,
    add_sample,
    ends_in_s,
    held_by_groups,
    judge,
    load_of,
)

log = logging.getLogger(__name__)

_GPU_PACE_S = 30.0
_LEAST_PACE_S = 0.1  # between two looks of which somebody's CPU is measured


class Memory(Protocol):
    """Where records are kept beyond the daemon's life; the store, or nothing at all."""

    def orphans(self) -> dict[ProcessId, Record]:
        """Return those of this boot."""

    def save_orphan(self, id_: ProcessId, record: Record) -> None:
        """Keep one."""

    def forget_orphan(self, id_: ProcessId) -> None:
        """Drop one."""

    def spared(self) -> frozenset[ProcessId]:
        """Return who was spared by hand in this boot."""

    def spare(self, id_: ProcessId) -> None:
        """Keep that somebody was."""

    def spare_no_longer(self, id_: ProcessId) -> None:
        """Drop that again."""


class Belongs(Protocol):
    """Who knows the registered sessions."""

    def session_of(self, one: Suspect) -> tuple[str, str]:
        """Return the session that ``one`` belongs to, and the one that it was meant to outlive; "" for none."""


class Judged(NamedTuple):
    """A suspect with all that was found about it."""

    suspect: Suspect
    given: Circumstances
    verdict: Verdict


class Counts(NamedTuple):
    """How many orphans there are that are not spared, and how many of them are stopped, or outlived SIGKILL."""

    orphans: int
    quarantined: int
    stuck: int


class Orphans:
    """All suspects of one /proc."""

    def __init__(
        self,
        proc: ProcFS,
        scan: Scan,
        reaper: Reaper,
        poller: Poller,
        memory: Memory,
        belongs: Belongs,
        record_event: Callable[[dict[str, Any]], None],
        gpu: Callable[[], Mapping[int, int]] = dict,
    ) -> None:
        self._proc = proc
        self._scan = scan
        self._memory = memory
        self._belongs = belongs
        self._record_event = record_event
        self._gpu = gpu
        self._records = memory.orphans()
        self.hunts = Hunts(reaper, poller, self._judge_again, self._ended)
        self._judged: dict[ProcessId, Judged] = {}
        self._rules = Rules()
        self._policy = Policy()
        self._enabled = True
        self._look_due_s: float | None = None
        self._held: Mapping[int, int] = {}  # on GPUs, by pid
        self._gpu_due_s = 0.0  # since boot
        self.on_end: Callable[[Hunt], None] = lambda _: None

    def heed(self, rules: Rules, policy: Policy, *, enabled: bool = True) -> None:
        """Go by these rules from now on."""
        self._rules, self._enabled = rules, enabled
        self._policy = policy._replace(spared=self._spared())
        self._scan.heed(rules.extra)
        self.hunts.grace_s = policy.grace_s

    # -- looking -----------------------------------------------------------------------------

    def look(self, listing: dict[int, int] | None = None) -> None:
        """Look at all suspects, and do what is due about them; Interrupted, and then nothing was done."""
        if not self._enabled:
            return
        self.see(listing)
        self._act()
        watched = any(self._is_measured(one) for one in self._judged.values())
        pace_s = max(_LEAST_PACE_S, self._rules.cpu_window_s / LEAST_SAMPLES)
        self._look_due_s = time.monotonic() + pace_s if watched else None

    def see(self, listing: dict[int, int] | None = None) -> None:
        """Look at all suspects and judge them; Interrupted."""
        suspects = self._scan.look(listing)
        now_s = _since_boot_s()
        told = self._tell_all(suspects)
        for one in told:
            if one.is_lost:
                self._note(one, now_s)
        self._judged = self._judge(told)
        self._forget_gone(now_s)

    def step(self) -> None:
        """Do what is due by now; Interrupted."""
        if self._look_due_s is not None and self._look_due_s <= time.monotonic():
            self.look()
        self.hunts.step()

    def next_deadline(self) -> float | None:
        """Return the monotonic second at which ``step()`` has something to do, None when nothing is due."""
        due = [at_s for at_s in (self._look_due_s, self.hunts.next_deadline()) if at_s is not None]
        return min(due, default=None)

    def _is_measured(self, one: Judged) -> bool:
        """Say whether CPU use can change what becomes of ``one``."""
        return one.suspect.is_lost and one.verdict.rule in (
            "age",
            "harmless",
            "uncertain",
            "cpu_threshold",
            "quarantine",
        )

    def _tell_all(self, suspects: Iterable[Suspect]) -> list[Suspect]:
        """Return ``suspects`` with what the daemon knows of them; the pool of one that is left alone is in use."""
        told = {one.id.pid: self._tell(one) for one in suspects}

        def is_in_use(one: Suspect) -> bool:
            above, seen = told.get(one.process.ppid), {one.id.pid}
            while above is not None and above.id.pid not in seen:
                if above.is_claimed:
                    return True
                seen.add(above.id.pid)
                above = told.get(above.process.ppid)
            return False

        return [one._replace(below=None) if one.below and is_in_use(one) else one for one in told.values()]

    def _tell(self, one: Suspect) -> Suspect:
        """Return ``one`` with what the daemon knows of it."""
        record = self._records.get(one.id)
        if one.lost_parent is None and record is not None and record.lost_parent is not None:
            group = (-1 if one.process.uid is None else one.process.uid, *record.lost_parent)
            one = one._replace(lost_parent=record.lost_parent, group=group)
        # Whose parent lives is no orphan, whoever it belongs to.
        session, spared = self._belongs.session_of(one) if one.is_lost else ("", "")
        return one._replace(
            session=session, spared_by_session=spared, protection=self._policy.protection(one.process)
        )

    def _note(self, one: Suspect, now_s: float) -> None:
        before = self._records.get(one.id)
        record = before or Record(now_s, uid=one.process.uid)
        samples = add_sample(record.samples, Sample(now_s, one.process.cpu_ticks), self._rules.cpu_window_s)
        record = record._replace(samples=samples, lost_parent=one.lost_parent)
        self._keep(one.id, record)

    def _keep(self, id_: ProcessId, record: Record) -> None:
        before, self._records[id_] = self._records.get(id_), record
        if before is None or before._replace(samples=()) != record._replace(samples=()):
            self._memory.save_orphan(id_, record)

    def _judge(
        self, suspects: Iterable[Suspect], *, waived: bool = False, some: bool = False
    ) -> dict[ProcessId, Judged]:
        """Judge ``suspects``; of ``some`` of them, what all hold together was told by the last look."""
        suspects, now_s = list(suspects), _since_boot_s()
        gpu = self._held_on_gpus(suspects, now_s)
        suspects = [one._replace(gpu_bytes=gpu.get(one.id.pid, 0)) for one in suspects]
        held = held_by_groups(suspects)
        found = {}
        for one in suspects:
            record = self._records.get(one.id) or Record(now_s)
            last = self._judged.get(one.id) if some else None
            last_bytes = 0 if last is None else last.given.group_rss_bytes
            group_bytes = max(held.get(one.group, 0), one.process.rss_bytes, last_bytes)
            load = load_of(record.samples, TICKS_PER_S)
            given = Circumstances(record, now_s, group_bytes, load, waived)
            found[one.id] = Judged(one, given, judge(one, given, self._rules))
        return found

    def _held_on_gpus(self, suspects: Iterable[Suspect], now_s: float) -> Mapping[int, int]:
        """Return the GPU memory that processes hold, by pid; only where it can matter, for asking keeps GPUs awake."""
        oldest_s = now_s - self._rules.age_limit_s
        old = [
            one
            for one in suspects
            if one.is_lost and one.role is Role.WORKER and self._lost_at_s(one, now_s) <= oldest_s
        ]
        if not old:
            return {}
        if now_s >= self._gpu_due_s:
            self._held = self._gpu()
            self._gpu_due_s = now_s + _GPU_PACE_S
        return self._held

    def _lost_at_s(self, one: Suspect, now_s: float) -> float:
        record = self._records.get(one.id)
        return now_s if record is None else record.lost_at_s

    def _judge_again(
        self, ids: Iterable[ProcessId], waived: bool
    ) -> dict[ProcessId, tuple[Suspect, Verdict]]:
        """Read processes anew and judge them; whoever is gone, or is another one, is missing."""
        wanted = set(ids)
        told = self._tell_all(self._scan.examine({id_.pid for id_ in wanted}).values())
        judged = self._judge((one for one in told if one.id in wanted), waived=waived, some=True)
        return {id_: (one.suspect, one.verdict) for id_, one in judged.items()}

    # -- what is done about it ---------------------------------------------------------------

    def _act(self) -> None:
        condemned = []
        for one in self._judged.values():
            fate = one.verdict.fate
            if fate in (Fate.KILL, Fate.QUARANTINE) and self._policy.dry_run:
                self._condemn(one)
            elif fate is Fate.KILL:
                condemned.append((one.suspect, one.verdict))
            elif fate is Fate.QUARANTINE and one.given.record.quarantined_at_s is None:
                self._quarantine(one)
            elif fate is Fate.REPORT:
                self._condemn(one)
        if condemned:
            self.hunts.begin(condemned, waived=False)

    def _condemn(self, one: Judged) -> None:
        """Tell once of an orphan that is left alone although a rule would have it ended."""
        id_, record = one.suspect.id, one.given.record
        if record.condemned_at_s is not None:
            return
        self._keep(id_, record._replace(condemned_at_s=one.given.now_s))
        log.info(
            "orphan pid=%d uid=%s framework=%r rule=%s left alone: %s",
            *(id_.pid, one.suspect.process.uid, one.suspect.framework, one.verdict.rule),
            "; ".join(one.verdict.prospects),
        )
        # Who only may be an orphan would have been left alone whatever the action is.
        self._tell_of(
            one, "orphan", would=None if one.verdict.rule == "uncertain" else self._rules.action.value
        )

    def _quarantine(self, one: Judged) -> None:
        id_ = one.suspect.id
        # On record first: who is stopped must not be forgotten, however we end.
        self._keep(id_, one.given.record._replace(quarantined_at_s=one.given.now_s))
        if not self.hunts.stop(one.suspect):
            self._keep(id_, one.given.record)
            return
        log.warning(
            "quarantined pid=%d uid=%s framework=%r rule=%s: %s; `reaperctl release %d` lets it go on",
            *(id_.pid, one.suspect.process.uid, one.suspect.framework, one.verdict.rule),
            *("; ".join(one.verdict.evidence), id_.pid),
        )
        self._tell_of(one, "quarantined", result="stopped", signal="SIGSTOP")

    def _tell_of(self, one: Judged, kind: str, *, would: str | None = None, **more: Any) -> None:
        record = {**report.orphan_process(one.suspect, one.verdict), **more}
        fields = {"rule": one.verdict.rule, **({"would": would} if would else {})}
        self._record_event(report.event(kind, uid=one.suspect.process.uid, processes=[record], **fields))

    def _ended(self, hunt: Hunt) -> None:
        """A hunt is over: tell of all that were in it."""
        targets = [target for target in hunt.targets.values() if target.signals or target.denied]
        if targets:
            stuck = any(target.stage is Stage.STUCK for target in targets)
            self._record_event(report.hunt_event("stuck" if stuck else "killed", hunt))
        for id_, target in hunt.targets.items():
            if target.stage is Stage.GONE:
                self._judged.pop(id_, None)
                self._drop(id_)
        self.on_end(hunt)

    def _forget_gone(self, now_s: float) -> None:
        """Drop the records of those that have ended, or belong to a session by now, and tell what became of the condemned."""
        hunted = self.hunts.targets()
        for id_, record in list(self._records.items()):
            if id_ in hunted:
                continue
            judged = self._judged.get(id_)
            claimed = judged is not None and bool(judged.suspect.session)
            if judged is None and self._proc.is_alive(id_):
                continue
            if judged is not None and judged.suspect.is_lost and not claimed:
                continue
            if record.condemned_at_s is not None:
                outcome = "claimed" if claimed else "exited"
                after_s = round(now_s - record.condemned_at_s, 1)
                self._record_event(report.orphan_outcome(id_, record.uid, outcome, after_s))
            self._drop(id_)

    def _drop(self, id_: ProcessId) -> None:
        if self._records.pop(id_, None) is not None:
            self._memory.forget_orphan(id_)

    # -- what people ask for -----------------------------------------------------------------

    def is_hunting(self) -> bool:
        """Say whether somebody is being ended."""
        return any(not target.done for target in self.hunts.targets().values())

    def wait_s(self) -> float | None:
        """Return how long nothing is due to those who are being ended; None: for ever."""
        due_s = self.hunts.next_deadline()
        return None if due_s is None else max(0.0, due_s - time.monotonic())

    def listing(self) -> list[Judged]:
        """Return all that have lost their parent, as last judged."""
        return [one for one in self._judged.values() if one.suspect.is_lost]

    def counts(self) -> Counts:
        """Return how many there are, as last judged."""
        targets = self.hunts.targets().values()
        workers = [
            one
            for one in self.listing()
            if one.suspect.role is Role.WORKER and one.verdict.fate is not Fate.SPARE
        ]
        return Counts(
            orphans=len(workers),
            quarantined=sum(one.given.record.quarantined_at_s is not None for one in workers),
            stuck=sum(target.stage is Stage.STUCK for target in targets),
        )

    def target_of(self, id_: ProcessId) -> Target | None:
        """Return how far somebody has been ended, None where nobody is at it."""
        return self.hunts.target_of(id_)

    def cleanable(self) -> list[Judged]:
        """Return all orphans with what a clean-up would do to each: age, load and action do not matter for that."""
        self.see()
        lost = [one.suspect for one in self.listing()]
        return list(self._judge(lost, waived=True).values())

    def clean_up(
        self, wanted: Iterable[ProcessId], may: Callable[[Suspect], bool], by_uid: int, container: str = ""
    ) -> list[Judged]:
        """Begin to end those of ``wanted`` that a clean-up ends; return what was found about each."""
        wanted = set(wanted)
        found = [one for one in self.cleanable() if one.suspect.id in wanted and may(one.suspect)]
        condemned = [(one.suspect, one.verdict) for one in found if one.verdict.fate is Fate.KILL]
        if condemned and not self._policy.dry_run:
            self.hunts.begin(condemned, waived=True, asked_by_uid=by_uid, container=container)
        return found

    def explain(self, pid: int) -> Judged:
        """Return what would become of ``pid``, whoever it is; ProcessGone."""
        told = [one for one in self._tell_all(self._scan.examine([pid]).values()) if one.id.pid == pid]
        if not told:
            raise ProcessGone(str(pid))
        (judged,) = self._judge(told, some=True).values()
        return judged

    def is_quarantined(self, id_: ProcessId) -> bool:
        """Say whether a process was stopped, and not released."""
        record = self._records.get(id_)
        return record is not None and record.quarantined_at_s is not None

    def spare(self, id_: ProcessId, by_uid: int) -> frozenset[ProcessId]:
        """Never end this process from now on, and let it go on where it is in quarantine; return all who are spared so."""
        self._memory.spare(id_)
        self._policy = self._policy._replace(spared=self._spared())
        log.info("protected pid=%d asked_by_uid=%d", id_.pid, by_uid)
        if self.is_quarantined(id_) and self.hunts.resume(id_):
            self._keep(id_, self._records[id_]._replace(quarantined_at_s=None))
            log.info("released pid=%d asked_by_uid=%d", id_.pid, by_uid)
            judged = self._judged.get(id_)
            if judged is not None:
                self._tell_of(judged, "released", signal="SIGCONT")
        return self._policy.spared

    def spare_no_longer(self, id_: ProcessId, by_uid: int) -> frozenset[ProcessId]:
        """Judge this process as any other from now on; return all who are still spared by hand."""
        self._memory.spare_no_longer(id_)
        self._policy = self._policy._replace(spared=self._spared())
        log.info("protected no longer pid=%d asked_by_uid=%d", id_.pid, by_uid)
        return self._policy.spared

    def _spared(self) -> frozenset[ProcessId]:
        """Return who is spared by hand and lives, and forget the others: there are never more than processes."""
        spared = self._memory.spared()
        alive = frozenset(id_ for id_ in spared if self._proc.is_alive(id_))
        for id_ in spared - alive:
            self._memory.spare_no_longer(id_)
        return alive

    def describe(self, one: Judged) -> dict[str, Any]:
        """Return what is told of one orphan."""
        given = one.given._replace(now_s=_since_boot_s())
        due_s = ends_in_s(one.suspect, given, self._rules)
        return report.orphan_record(
            one.suspect,
            given,
            one.verdict,
            self.target_of(one.suspect.id),
            ends_in_s=None if self._policy.dry_run else due_s,
        )


def _since_boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
