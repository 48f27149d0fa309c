"""Whatever forks, execs and exits while a scan looks: nobody is called an orphan whose pool lives, and who is one is ended."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import machine as machines
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from machine import INITS, LOADS_DATA, OTHERS, SHELL, STARTED, TRAINER, Being, Bell, Machine, Proc

from reaperd.census import Interrupted
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import ProcessGone
from reaperd.marks import MarkReader
from reaperd.memory import Memory, MemoryReader, Wish
from reaperd.model import SIGNAL_NAMES, ProcessId
from reaperd.orphans import Orphans
from reaperd.policy import Policy
from reaperd.poller import Poller
from reaperd.reaper import Outcome, Reaper
from reaperd.scan import Scan
from reaperd.verdicts import Fate, Record, Rules, Suspect

RULES = Rules(age_limit_s=0.0, cpu_window_s=1.0, memory_threshold_bytes=1, quarantine_for_s=1.0)
POLICY = Policy(grace_s=0.5)
ENDED_WITHIN = 20  # looks, one a second
BETWEEN_S = 1.0
EXAMPLES = int(os.environ.get("REAPER_TEST_EXAMPLES", "200"))


class ReadHere(MemoryReader):
    """Reads what lies in memory without a helper: here, none stalls."""

    def __init__(self, proc: Proc) -> None:
        super().__init__(proc)
        self.silent: set[int] = set()

    def read(self, wishes: Iterable[Wish], alarm: Alarm | None = None) -> dict[int, Memory]:
        found = {}
        for wish in wishes:
            if alarm is not None and alarm.rings():
                break
            answer = None if wish.stat.id.pid in self.silent else self._read_one(wish.question())
            if answer is not None:
                found[wish.stat.id.pid] = Memory(answer[0], tuple(answer[1]), tuple(answer[2]))
        return found


class Signals(Reaper):
    """Signals nobody but a machine's processes, and only those that it is right to signal."""

    def __init__(self, world: World) -> None:
        super().__init__(world.proc, frozenset())
        self._world = world

    def take(self, target: ProcessId, handle: int | None) -> int | None:
        try:
            if self._world.proc.stat(target.pid).id != target:
                return None
        except ProcessGone:
            return None
        return self._pidfds.setdefault(target, target.pid)

    def has_ended(self, target: ProcessId) -> bool:
        return not self.holds(target) or not self._world.machine.ever[target].alive

    def send(self, target: ProcessId, number: int) -> Outcome:
        if self.has_ended(target):
            return Outcome.GONE
        self._world.check_signal(self._world.machine.ever[target], SIGNAL_NAMES[number])
        self._world.machine.signal(self._world.machine.ever[target], number)
        return Outcome.SENT

    def drop(self, target: ProcessId) -> None:
        del self._pidfds[target]


class NoPoller(Poller):
    """Waits for nothing."""

    def __init__(self) -> None:
        pass

    def watch(self, descriptor: int, call: Any) -> None:
        pass

    def unwatch(self, descriptor: int) -> None:
        pass


class Kept:
    """What outlives a daemon."""

    def __init__(self) -> None:
        self.records: dict[ProcessId, Record] = {}

    def orphans(self) -> dict[ProcessId, Record]:
        return dict(self.records)

    def save_orphan(self, id_: ProcessId, record: Record) -> None:
        self.records[id_] = record

    def forget_orphan(self, id_: ProcessId) -> None:
        del self.records[id_]

    def spared(self) -> frozenset[ProcessId]:
        return frozenset()

    def spare(self, id_: ProcessId) -> None:
        raise AssertionError(id_)

    def spare_no_longer(self, id_: ProcessId) -> None:
        raise AssertionError(id_)


class Nobodys:
    """There is no session."""

    def session_of(self, one: Suspect) -> tuple[str, str]:
        return "", ""


class World:
    """A machine, the daemon's own code that looks at it, and what must hold at every moment."""

    def __init__(self, init: machines.Program, action: Fate) -> None:
        self.machine = Machine(init)
        self.rules = RULES._replace(action=action)
        self.kept = Kept()
        self.called: set[ProcessId] = set()  # orphans, before this look
        self.witnessed: dict[ProcessId, int] = {}  # in so many looks on end, with its pool's parent
        for program, subreaper in (
            (TRAINER, False),
            (machines.MANAGER, True),
            (TRAINER, True),
            (SHELL, True),
        ):
            one = self.machine.fork(self.machine.init)
            self.machine.exec(one, program)
            one.subreaper = subreaper
        self.restart()

    @contextlib.contextmanager
    def time(self) -> Iterator[None]:
        """Let time pass as the machine says."""

        def now_s(*_: int) -> float:
            return self.machine.now_s

        with (
            mock.patch.object(time, "monotonic", now_s),
            mock.patch.object(time, "clock_gettime", now_s),
        ):
            yield

    def restart(self) -> None:
        """Begin with a daemon that knows nothing but what the last one kept."""
        self.proc, self.bell = Proc(self.machine), Bell()
        marks = MarkReader(self.proc)
        self.memory = marks.memory = ReadHere(self.proc)
        scan = Scan(self.proc, marks, self.bell, uid_of=lambda pid, _: self.proc.uid_of(pid))
        self.orphans = Orphans(
            self.proc, scan, Signals(self), NoPoller(), self.kept, Nobodys(), lambda _: None
        )
        self.orphans.heed(self.rules, POLICY)
        self.witnessed = {}

    # -- what is true

    def check_signal(self, one: Being, name: str) -> None:
        assert one.lost, f"{name} to {one}, whose pool lives"
        if name == "SIGCONT":
            return
        assert one.id in self.called, f"{name} to {one} on one look alone"
        # Who changed after it was read last was changed too late for anybody.
        assert one.bears or one.changed > one.read, f"{name} to {one}, which is no pool's worker"

    def check_listing(self) -> None:
        for judged in self.orphans.listing():
            one = self.machine.ever[judged.suspect.id]
            assert one.lost, f"{one} is called an orphan, and its pool lives: {judged.verdict.evidence}"

    def check_condemned(self) -> None:
        for judged in self.orphans.listing():
            one, fate = self.machine.ever[judged.suspect.id], judged.verdict.fate
            if fate in (Fate.KILL, Fate.QUARANTINE):
                assert one.bears, f"{fate} of {one}: {judged.verdict.evidence}"

    # -- looking

    def look(self, happenings: Iterable[Any] = (), faults: Iterable[Any] = ()) -> None:
        self.proc.tell_all()
        for at, (act, a, b) in happenings:
            self.proc.happens[at] = lambda act=act, a=a, b=b: ACTS[act](self, a, b)
        for fault, which in faults:
            FAULTS[fault](self, which)
        calm = self.proc.tells_all and not self.memory.silent and self.bell.left is None
        on_record = {
            id_: record.lost_at_s
            for id_, record in self.kept.records.items()
            if record.lost_parent is not None or self._is_adopted(self.machine.ever[id_])
        }
        blind = bool(self.proc.gone)
        self.called |= self.kept.records.keys()
        try:
            self.orphans.look(self.proc.listing())
        except (Interrupted, ValueError):
            calm = False
        else:
            if not self.proc.happens:  # else it may have been another program when that was said
                self.check_condemned()
        self.check_listing()
        self.proc.tell_all()
        self.memory.silent, self.bell.left = set(), None
        if not blind:
            for id_, since_s in on_record.items():
                record = self.kept.records.get(id_)
                assert not self.machine.ever[id_].alive or (record and record.lost_at_s == since_s), (
                    f"{self.machine.ever[id_]} was forgotten"
                )
        self._witness(calm)

    def step(self) -> None:
        """Do what is due, which may be a look."""
        self.called |= self.kept.records.keys()
        self.orphans.step()
        self.check_listing()

    def _witness(self, calm: bool) -> None:
        before, self.witnessed = self.witnessed, {}
        for one in self.machine.living() if calm else ():
            # Within an exec nobody can read what it is.
            readable = not one.forked and not one.within_exec
            if one.starter is not None and one.parent is one.starter and readable:
                self.witnessed[one.id] = before.get(one.id, 0) + 1

    def must_end(self, one: Being) -> bool:
        """Say whether ``one`` is an orphan that can be told to be one."""
        starter, parent = one.starter, one.parent
        if not (one.alive and one.lost and one.bears) or starter is None or parent is None:
            return False
        if (
            one.forked and one.comm != LOADS_DATA
        ):  # it may be what a worker has put into the background, unless it was
            return False  # seen below its orphaned starter, which may end first
        if starter.alive:
            return parent is starter and starter.execed < one.born and self.must_end(starter)
        return self._is_adopted(one) or self.witnessed.get(one.id, 0) > 1

    def _is_adopted(self, one: Being) -> bool:
        """Say whether its parent is one that can only have adopted it."""
        return one.alive and one.parent is not None and one.parent.program.adopts

    def end(self) -> None:
        """Let nothing more happen, and see that all are ended that must be."""
        for one in self.machine.living():
            self.machine.end_exec(one)
        self.machine.wait(BETWEEN_S)
        due = {one.id for one in self.machine.living() if self.must_end(one)}
        for _ in range(ENDED_WITHIN):
            self.look()
            self.step()
            self.machine.wait(BETWEEN_S)
            due = {id_ for id_ in due if self.machine.ever[id_].alive}
            if not due:
                return
        living = [f"{self.machine.ever[id_]}: {self.orphans.explain(id_.pid).verdict}" for id_ in due]
        raise AssertionError(f"lives on: {living}")


# -- what can happen --------------------------------------------------------------------------------


def chosen(those: list[Being], number: int) -> Being:
    return those[-1 - number % len(those)]  # the youngest first


def may_fork(world: World, number: int, *, pools: bool = True) -> Being | None:
    one = chosen(world.machine.beings(pools=pools) if pools else world.machine.living(), number)
    return None if one.within_exec or not one.alive or (pools and not one.program.pools) else one


def start(world: World, a: int, b: int) -> None:
    """Somebody starts a program that is no worker."""
    if above := may_fork(world, a, pools=False):
        one = world.machine.fork(above, reuse=bool(b & 1))
        if b & 2:
            one.sid = one.id.pid
        world.machine.exec(one, OTHERS[(b >> 2) % len(OTHERS)])
        one.subreaper = one.program == machines.MANAGER


def spawn(world: World, a: int, b: int) -> None:
    """A pool starts a worker, and either execs at once or in the end."""
    if above := may_fork(world, a):
        one = world.machine.fork(above, reuse=bool(b & 1))
        one.deaf = bool(b & 2)
        world.machine.begin_exec(one, STARTED[(b >> 3) % len(STARTED)])
        if not b & 4:
            world.machine.end_exec(one)


def fork(world: World, a: int, b: int) -> None:
    if above := may_fork(world, a, pools=False):
        one = world.machine.fork(above, reuse=bool(b & 1))
        if b & 2 and above.program.pools:
            world.machine.name(one, LOADS_DATA)


def execute(world: World, a: int, b: int) -> None:
    """Somebody becomes another program; a worker only who was started by what may have a pool."""
    one = chosen(world.machine.beings(), a)
    if one is world.machine.init or one.within_exec:
        return
    may_work = b & 1 and one.starter is not None and one.starter.program.pools
    those = STARTED if may_work else OTHERS
    world.machine.begin_exec(one, those[(b >> 2) % len(those)])
    if not b & 2:
        world.machine.end_exec(one)


def go_on(world: World, a: int, b: int) -> None:
    for one in world.machine.living():
        world.machine.end_exec(one)


def leave(world: World, a: int, b: int) -> None:
    one = chosen(world.machine.beings(), a)
    if one is not world.machine.init:
        world.machine.exit(one, zombie=bool(b & 1))


def lead(world: World, a: int, b: int) -> None:
    """Somebody begins a POSIX session; process 1 has done so before it started anybody."""
    one = chosen(world.machine.beings(), a)
    one.sid = one.id.pid


def behead(world: World, a: int, b: int) -> None:
    chosen(world.machine.beings(), a).headless = True


def pass_time(world: World, a: int, b: int) -> None:
    world.machine.wait((0.1, 0.6, 1.0, 3.0)[a % 4])


ACTS = {
    "wait": pass_time,
    "leave": leave,
    "spawn": spawn,
    "fork": fork,
    "execute": execute,
    "start": start,
    "go on": go_on,
    "lead": lead,
    "behead": behead,
}


# -- what a look can miss ---------------------------------------------------------------------------


def pid_of(world: World, number: int) -> int:
    return chosen(world.machine.living(), number).id.pid


def tear(world: World, which: int) -> None:
    world.proc.torn = 1 + which


def ring(world: World, which: int) -> None:
    world.bell.left = which


FAULTS = {
    "unlisted": lambda world, which: world.proc.unlisted.add(pid_of(world, which)),
    "childless": lambda world, which: world.proc.childless.add(pid_of(world, which)),
    "gone": lambda world, which: world.proc.gone.add(pid_of(world, which)),
    "silent": lambda world, which: world.memory.silent.add(pid_of(world, which)),
    "torn": tear,
    "ring": ring,
}

NUMBER = st.integers(0, 63)
ACT = st.tuples(st.sampled_from(sorted(ACTS, key=list(ACTS).index)), NUMBER, NUMBER)
LOOK = st.tuples(
    st.just("look"),
    st.lists(st.tuples(st.integers(1, 80), ACT), max_size=4),
    st.lists(st.tuples(st.sampled_from(list(FAULTS)), NUMBER), max_size=2),
)
CALM = st.just(("look", [], []))
STEP = st.one_of(ACT, ACT, ACT, ACT, LOOK, CALM, st.sampled_from([("step", 0, 0), ("restart", 0, 0)]))


# Without Phase.shrink: that takes minutes, and what was done is short enough to be read.
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    init=st.sampled_from(INITS),
    action=st.sampled_from([Fate.KILL, Fate.QUARANTINE]),
    steps=st.lists(STEP, min_size=15, max_size=45),
)
def test_nobody_is_called_an_orphan_while_its_pool_lives_and_every_orphan_is_ended(
    init: machines.Program, action: Fate, steps: list[Any]
) -> None:
    world = World(init, action)
    with world.time():
        for what, one, other in steps:
            if what == "look":
                world.look(one, other)
                world.machine.wait(0.1)
            elif what == "step":
                world.step()
            elif what == "restart":
                world.restart()
            else:
                ACTS[what](world, one, other)
        world.end()


def test_a_fork_does_not_inherit_what_its_parent_was_before_it_became_another_program() -> None:
    world = World(INITS[0], Fate.KILL)
    machine = world.machine
    with world.time():
        one = machine.fork(machine.living()[1])
        machine.exec(one, machines.WORKERS[0])
        machine.wait(60.0)  # so old that nobody is read again without need
        world.look()
        machine.exec(one, TRAINER)
        child = machine.fork(one)
        machine.wait(60.0)
        world.look()
        machine.exit(one)
        for _ in range(3):
            machine.wait(BETWEEN_S)
            world.look()
        fates = {judged.suspect.id: judged.verdict.fate for judged in world.orphans.listing()}
        assert fates == {child.id: Fate.REPORT}
