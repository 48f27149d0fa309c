"""Busy processes that look like orphans and are none: none of them is signalled, under the most aggressive settings.

All of them share one pid namespace with a daemon that meanwhile ends real orphans there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from animals import ANIMALS, Animal, Seen, Zoo
from enclosure import AGGRESSIVE, Enclosure, Keeper
from harness import repeat_until

pytestmark = pytest.mark.needs_root

# Forked and never exec'ed, by a parent that has left: nothing tells them from a forked worker whose pool is dead. They may be
# told of, and are left alone.
REPORTED = (
    "forked-child-whose-parent-left",
    "double-fork",
    "double-fork-loky",
    "python-daemon",
    "python-daemon-spawn",
    "gunicorn",
)

SOON_S = 10.0  # a deadline, not a wait


class Visit:
    """A zoo that has been looked at by a daemon for a while."""

    def __init__(self, enclosure: Enclosure) -> None:
        self.keeper: Keeper = enclosure.daemon(AGGRESSIVE.format(action="kill", quarantine_for="1s"))
        follow = [sys.executable, "-m", "reaperd.ctl.main", "events", "--follow"]
        self.follower = enclosure.start(follow, REAPER_SOCKET=self.keeper.daemon.socket)
        assert self.follower.stdout is not None
        self.zoo = Zoo(enclosure)
        self.keeper.wait_scanned()

    def seen(self, animal: Animal) -> Seen:
        if reason := self.zoo.why_not.get(animal.name):
            pytest.skip(reason)
        errors = self.zoo.enclosure.read_errors()
        assert animal.name in self.zoo.seen, f"{animal.name} did not come up:\n{errors}"
        return self.zoo.seen[animal.name]


@pytest.fixture(scope="module")
def visit() -> Iterator[Visit]:
    enclosure = Enclosure()
    try:
        visit = Visit(enclosure)
        yield visit
        visit.zoo.close()
    finally:
        enclosure.close()


@pytest.mark.parametrize("animal", ANIMALS, ids=lambda animal: animal.name)
def test_what_only_looks_like_an_orphan_lives_on(animal: Animal, visit: Visit) -> None:
    seen, keeper = visit.seen(animal), visit.keeper
    explained = {pid: keeper.ask("explain", pid=pid) for pid in seen.everyone}
    assert seen.gone() == [], explained
    assert len(seen.workers) == animal.workers
    assert animal.claim(seen), "it is not what it claims to be"
    if "stopped" not in animal.name:
        # A tracer stops who it traces for a moment, again and again; whom a daemon has stopped stays so.
        stopped = set(seen.everyone)

        def goes_on() -> bool | None:
            stopped.intersection_update(seen.stopped())
            if stopped:
                keeper.get("status")
                return None
            return True

        repeat_until(goes_on, SOON_S, f"{stopped} run")
    for pid, answer in explained.items():
        may_be_told_of = animal.name in REPORTED and pid == seen.pid
        assert answer["explain"]["verdict"] in (("spare", "report") if may_be_told_of else ("spare",)), answer
        assert {event["kind"] for event in keeper.events_of(pid)} <= ({"orphan"} if may_be_told_of else set())


def test_a_forked_child_whose_parent_left_is_told_of(visit: Visit) -> None:
    animal = next(one for one in ANIMALS if one.name == "forked-child-whose-parent-left")
    pid = visit.seen(animal).pid
    event = visit.keeper.wait_event(pid, "orphan")
    assert event["result"] == "kept"
    assert event["signals"] == []
    assert visit.keeper.orphans()[pid]["verdict"] == "report"


def test_the_daemon_its_gate_and_the_command_that_asks_it_live_on(visit: Visit) -> None:
    assert visit.keeper.daemon.process.poll() is None
    assert visit.keeper.get("status")["status"]["gate_restarts"] == 0
    assert visit.follower.poll() is None


def test_nobody_is_on_record_as_ended_but_the_orphans_that_were_to_be(visit: Visit) -> None:
    ended = {
        part["pid"]
        for event in visit.keeper.events()
        if event["kind"] == "killed"
        for part in event["processes"]
    }
    assert ended == visit.keeper.canaries
