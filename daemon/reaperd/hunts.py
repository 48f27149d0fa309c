"""Ends orphans: each is asked, then killed, and every signal is sent on evidence that was read after its pidfd was opened."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable

from reaperd import decide, ledger
from reaperd.escalation import Event, Stage
from reaperd.hunt import Hunt
from reaperd.ledger import Target
from reaperd.model import SIGCONT, SIGNAL_NAMES, SIGSTOP, SIGTERM, Member, ProcessId
from reaperd.poller import Poller
from reaperd.reaper import Outcome, Reaper
from reaperd.verdicts import Fate, Suspect, Verdict

log = logging.getLogger(__name__)

Judge = Callable[[Iterable[ProcessId], bool], dict[ProcessId, tuple[Suspect, Verdict]]]


class Hunts:
    """All that go on."""

    def __init__(self, reaper: Reaper, poller: Poller, judge: Judge, on_end: Callable[[Hunt], None]) -> None:
        """``judge`` looks again at processes, and says what is to become of each; ``on_end`` is called once for each hunt."""
        self._reaper = reaper
        self._poller = poller
        self._judge = judge
        self._on_end = on_end
        self._hunts: list[Hunt] = []
        self.grace_s = 5.0

    def targets(self) -> dict[ProcessId, Target]:
        """Return who is being ended."""
        return {id_: target for hunt in self._hunts for id_, target in hunt.targets.items()}

    def target_of(self, id_: ProcessId) -> Target | None:
        """Return how far ``id_`` has been ended, None where nobody is at it."""
        return next((hunt.targets[id_] for hunt in self._hunts if id_ in hunt.targets), None)

    def next_deadline(self) -> float | None:
        """Return the monotonic second at which ``step()`` has something to do, None when nothing is due."""
        due = [
            target.due_s
            for hunt in self._hunts
            for target in hunt.targets.values()
            if target.stage is not Stage.GONE and not target.excused
        ]
        return min(due, default=None)

    def begin(
        self,
        condemned: Iterable[tuple[Suspect, Verdict]],
        *,
        waived: bool,
        asked_by_uid: int | None = None,
        container: str = "",
    ) -> None:
        """Begin to end ``condemned``; those of one user and one dead pool parent are one hunt."""
        now_s, known = time.monotonic(), self.targets()
        groups: dict[tuple[int, ...], list[tuple[Suspect, Verdict]]] = {}
        for one, verdict in condemned:
            if one.id not in known and one.process.uid is not None:
                groups.setdefault((one.process.uid, *one.group), []).append((one, verdict))
        for (uid, *_), members in groups.items():
            targets = {}
            for one, verdict in members:
                member = Member(one.process, one.role, one.framework, verdict.evidence, marked=False)
                targets[one.id] = Target(member, Stage.FOUND, now_s, now_s)
            hunt = Hunt(uid, members[0][1].rule, waived, now_s, targets, asked_by_uid, container)
            self._hunts.append(hunt._replace(gpu_bytes={one.id: one.gpu_bytes for one, _ in members}))
        self.step()

    def step(self) -> None:
        """Send what is due, and conclude what is over."""
        now_s = time.monotonic()
        for hunt in self._hunts:
            due = [target for target in hunt.targets.values() if not target.done and target.due_s <= now_s]
            # Who outlived SIGKILL is tried again as it was: it is the same process, and nothing of it can be read.
            again = [t for t in hunt.targets.values() if t.stage is Stage.STUCK and t.due_s <= now_s]
            if due:
                self._pursue(hunt, due, now_s)
            for target in again:
                self._send(hunt, target, now_s)
        over = [hunt for hunt in self._hunts if hunt.is_over and not hunt.told_stuck]
        for hunt in over:
            self._on_end(hunt)
        # Whoever is stuck stays ours until it has gone, and is told of once.
        self._hunts = [
            hunt._replace(told_stuck=hunt.is_over)
            for hunt in self._hunts
            if not hunt.is_over or any(target.stage is Stage.STUCK for target in hunt.targets.values())
        ]

    def stop(self, one: Suspect) -> bool:
        """SIGSTOP one process, and say whether that was done; it is let go of at once."""
        return self._once(one.id, SIGSTOP, lambda fate: fate is Fate.QUARANTINE)

    def resume(self, id_: ProcessId) -> bool:
        """SIGCONT one process, and say whether it is there."""
        return self._once(id_, SIGCONT, lambda _: True)

    def _once(self, id_: ProcessId, number: int, agrees: Callable[[Fate], bool]) -> bool:
        held = self._reaper.holds(id_)
        if not held and self._reaper.take(id_, None) is None:
            return False
        try:
            judged = self._judge([id_], False).get(id_)
            return (
                judged is not None
                and agrees(judged[1].fate)
                and self._reaper.send(id_, number) is Outcome.SENT
            )
        finally:
            if not held:
                self._reaper.drop(id_)

    # -- one hunt ----------------------------------------------------------------------------

    def _pursue(self, hunt: Hunt, due: list[Target], now_s: float) -> None:
        for target in due:
            self._hold(hunt, target)
        # All pidfds are open: what is read now is true of exactly those who would be signalled.
        judged = self._judge([target.member.process.id for target in due], hunt.waived)
        for target in due:
            id_ = target.member.process.id
            if hunt.targets[id_].stage is Stage.GONE:
                continue
            seen = judged.get(id_)
            if self._reaper.has_ended(id_):
                self._exited(id_)
            elif seen is None and target.signals:
                # Whoever was asked to end may be past being read; it is the same process still.
                self._send(hunt, target, now_s)
            elif seen is None or seen[1].fate is not Fate.KILL or seen[0].process.uid != hunt.uid:
                reason = seen[1].evidence[-1] if seen else "it could not be read any more"
                log.info("left alone pid=%d: %s", id_.pid, reason)
                self._let_go(hunt, id_, target._replace(excused=True))
            else:
                member = target.member._replace(evidence=seen[1].evidence)
                self._send(hunt, target._replace(member=member), now_s)

    def _hold(self, hunt: Hunt, target: Target) -> None:
        id_ = target.member.process.id
        if self._reaper.holds(id_):
            return
        handle = None if self._reaper.is_full() else self._reaper.take(id_, None)
        if handle is None:
            hunt.targets[id_] = target._replace(stage=Stage.GONE, gone_at_s=time.monotonic())
            return
        self._poller.watch(handle, functools.partial(self._exited, id_))

    def _send(self, hunt: Hunt, target: Target, now_s: float) -> None:
        send = decide.next_send(target, Event.DUE, now_s, now_s + self.grace_s)
        id_ = target.member.process.id
        outcome = self._reaper.send(id_, send.signal)
        if outcome is Outcome.GONE:
            self._exited(id_)
            return
        if send.signal == SIGTERM:  # one that is stopped cannot end in good order
            self._reaper.send(id_, SIGCONT)
        denied = outcome is Outcome.DENIED
        hunt.targets[id_] = ledger.advance(
            target, ledger.Signalled(id_, Event.DUE, send.signal, send.due_s, denied=denied)
        )
        self._log(hunt, hunt.targets[id_], send.signal)

    def _log(self, hunt: Hunt, target: Target, number: int) -> None:
        pid, evidence = target.member.process.id.pid, "; ".join(target.member.evidence)
        if target.denied:
            log.warning("cannot send %s pid=%d uid=%d: not permitted", SIGNAL_NAMES[number], pid, hunt.uid)
        elif target.stage is Stage.STUCK and target.retries == 1:
            log.error("stuck pid=%d uid=%d: SIGKILL does not end it (state D?)", pid, hunt.uid)
        elif target.stage is not Stage.STUCK:
            log.info(
                "sent %s pid=%d uid=%d orphan framework=%r rule=%s grace_s=%g: %s",
                *(
                    SIGNAL_NAMES[number],
                    pid,
                    hunt.uid,
                    target.member.framework,
                    hunt.rule,
                    self.grace_s,
                    evidence,
                ),
            )

    def _exited(self, id_: ProcessId) -> None:
        now_s = time.monotonic()
        for hunt in self._hunts:
            target = hunt.targets.get(id_)
            if target is not None and target.stage is not Stage.GONE:
                self._let_go(hunt, id_, target._replace(stage=Stage.GONE, gone_at_s=now_s))

    def _let_go(self, hunt: Hunt, id_: ProcessId, target: Target) -> None:
        hunt.targets[id_] = target
        if self._reaper.holds(id_):
            self._poller.unwatch(self._reaper.handle(id_))
            self._reaper.drop(id_)
