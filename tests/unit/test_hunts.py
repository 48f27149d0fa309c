"""Real children are ended by hunts: in what order, on what evidence, and what spares them at the last moment."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator

import pytest
from specimens import SOON_S, child, id_of

from reaperd import report
from reaperd.hunt import Hunt
from reaperd.hunts import Hunts
from reaperd.ledger import Target
from reaperd.linux.procfs import ProcFS
from reaperd.model import SIGKILL, SIGTERM, Process, ProcessId
from reaperd.poller import Poller
from reaperd.reaper import Reaper
from reaperd.signatures import SIGNATURES
from reaperd.verdicts import Fate, Parent, Suspect, Verdict

KILL, SPARE = (
    Verdict(Fate.KILL, "memory_threshold", ("why",)),
    Verdict(Fate.SPARE, "session", ("is claimed",)),
)


def suspect(id_: ProcessId, group: int = 1) -> Suspect:
    process = Process(id_, 1, os.getuid(), "python3")
    return Suspect(process, SIGNATURES[0], Parent(1, "init", "adopts"), group=(group,))


class Hunting:
    """Hunts whose verdicts are said here, and what came of each."""

    def __init__(self) -> None:
        self.poller = Poller()
        self.says: dict[ProcessId, Verdict] = {}
        self.uid = os.getuid()  # whose they are when they are judged again
        self.held: list[bool] = []  # whether a pidfd was open whenever somebody was judged again
        self.over: list[Hunt] = []
        self.reaper = Reaper(ProcFS(), frozenset())
        self.hunts = Hunts(self.reaper, self.poller, self._judge, self.over.append)

    def _judge(self, ids: Iterable[ProcessId], waived: bool) -> dict[ProcessId, tuple[Suspect, Verdict]]:
        del waived
        wanted = list(ids)
        self.held += [self.reaper.holds(id_) for id_ in wanted]
        now = {id_: suspect(id_) for id_ in wanted if id_ in self.says}
        return {
            id_: (one._replace(process=one.process._replace(uid=self.uid)), self.says[id_])
            for id_, one in now.items()
        }

    def begin(self, *ids: ProcessId, group: int = 1) -> None:
        self.says.update({id_: KILL for id_ in ids if id_ not in self.says})
        self.hunts.begin([(suspect(id_, group), KILL) for id_ in ids], waived=False)

    def run(self) -> dict[ProcessId, Target]:
        """Go on until all is over."""
        end_s = time.monotonic() + SOON_S
        while not self.over:
            due_s = self.hunts.next_deadline()
            assert time.monotonic() < end_s
            self.poller.wait(SOON_S if due_s is None else max(0.0, due_s - time.monotonic()))
            self.hunts.step()
        return {id_: target for hunt in self.over for id_, target in hunt.targets.items()}


@pytest.fixture
def hunting() -> Iterator[Hunting]:
    one = Hunting()
    yield one
    for id_ in one.hunts.targets():
        if one.reaper.holds(id_):
            one.reaper.drop(id_)
    del one
    gc.collect()  # what it has open must not be closed in the middle of a test that counts descriptors


def test_what_the_ended_held_of_the_machine_is_told(hunting: Hunting) -> None:
    with child() as one, child() as other:
        ids = [id_of(one), id_of(other)]
        hunting.says.update(dict.fromkeys(ids, KILL))
        held = [suspect(id_)._replace(gpu_bytes=4096) for id_ in ids]
        held = [each._replace(process=each.process._replace(rss_bytes=512)) for each in held]
        hunting.hunts.begin([(each, KILL) for each in held], waived=False)
        hunting.run()
        event = report.hunt_event("killed", hunting.over[0])
    assert event["freed"] == {"rss_bytes": 1024, "shm_bytes": 0, "gpu_bytes": 8192}


def deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def orphan(work: Callable[[], object] = lambda: None) -> Iterator[ProcessId]:
    with child(work) as pid:
        yield id_of(pid)


def test_who_is_asked_to_end_and_does_is_not_killed(hunting: Hunting) -> None:
    with orphan() as id_:
        hunting.begin(id_)
        (target,) = hunting.run().values()
    assert target.signals == (SIGTERM,)
    assert hunting.held == [True], "it is judged again when its pidfd is open, and not before"
    assert not hunting.reaper.holds(id_)


def test_who_is_deaf_is_killed_when_the_grace_is_over(hunting: Hunting) -> None:
    hunting.hunts.grace_s = 0.05
    with orphan(deaf) as id_:
        hunting.begin(id_)
        (target,) = hunting.run().values()
    assert target.signals == (SIGTERM, SIGKILL)


def test_who_is_stopped_may_end_in_good_order(hunting: Hunting) -> None:
    with orphan() as id_:
        os.kill(id_.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, id_.pid, os.WSTOPPED)
        hunting.begin(id_)
        (target,) = hunting.run().values()
    assert target.signals == (SIGTERM,)


def test_whom_something_spares_at_the_last_moment_is_not_signalled(hunting: Hunting) -> None:
    with orphan() as id_:
        hunting.says[id_] = SPARE
        hunting.begin(id_)
        (target,) = hunting.run().values()
        assert target.signals == ()
        assert target.excused
        assert ProcFS().is_alive(id_)
        assert not hunting.reaper.holds(id_)


def test_who_has_become_another_users_at_the_last_moment_is_not_signalled(hunting: Hunting) -> None:
    hunting.uid += 1
    with orphan() as id_:
        hunting.begin(id_)
        (target,) = hunting.run().values()
        assert (target.signals, target.excused) == ((), True)
        assert ProcFS().is_alive(id_)


def test_who_is_spared_after_it_was_asked_to_end_is_not_killed(hunting: Hunting) -> None:
    hunting.hunts.grace_s = 0.05
    with orphan(deaf) as id_:
        hunting.begin(id_)
        hunting.says[id_] = SPARE
        (target,) = hunting.run().values()
        assert target.signals == (SIGTERM,)
        assert ProcFS().is_alive(id_)


def test_who_cannot_be_read_any_more_is_not_signalled(hunting: Hunting) -> None:
    with orphan() as id_:
        hunting.hunts.begin([(suspect(id_), KILL)], waived=False)
        (target,) = hunting.run().values()
        assert target.signals == ()
        assert ProcFS().is_alive(id_)


def test_a_pid_that_is_somebody_elses_by_now_is_not_signalled(hunting: Hunting) -> None:
    with orphan() as id_:
        other = ProcessId(id_.pid, id_.start_ticks - 1)
        hunting.begin(other)
        (target,) = hunting.run().values()
        assert target.signals == ()
        assert ProcFS().is_alive(id_)


def test_nobody_is_hunted_twice_and_each_dead_parents_orphans_are_one_hunt(hunting: Hunting) -> None:
    with orphan(deaf) as one, orphan(deaf) as other, orphan(deaf) as third:
        hunting.says.update(dict.fromkeys((one, other, third), KILL))
        found = [(suspect(one, 1), KILL), (suspect(other, 1), KILL), (suspect(third, 2), KILL)]
        for _ in range(2):
            hunting.hunts.begin(found, waived=False)
        assert hunting.hunts.target_of(one) is not None
        for id_ in (one, other, third):
            os.kill(id_.pid, signal.SIGKILL)
        while len(hunting.over) < 2:
            hunting.poller.wait(SOON_S)
            hunting.hunts.step()
    assert sorted(map(len, (hunt.targets for hunt in hunting.over))) == [1, 2]
    assert hunting.hunts.targets() == {}
    assert hunting.hunts.target_of(one) is None


def test_quarantine_stops_and_lets_go_only_whom_the_verdict_names(hunting: Hunting) -> None:
    with orphan() as id_:
        hunting.says[id_] = KILL
        assert not hunting.hunts.stop(suspect(id_))
        hunting.says[id_] = Verdict(Fate.QUARANTINE, "memory_threshold", ())
        assert hunting.hunts.stop(suspect(id_))
        assert os.waitid(os.P_PID, id_.pid, os.WSTOPPED) is not None
        assert hunting.hunts.resume(id_)
        assert os.waitid(os.P_PID, id_.pid, os.WCONTINUED) is not None
        assert not hunting.reaper.holds(id_)
        assert not hunting.hunts.stop(suspect(ProcessId(id_.pid, id_.start_ticks - 1)))
