"""Pools that come and go at random while a daemon scans as often as it can: it ends the orphans, all of them, and nobody else."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from enclosure import AGGRESSIVE, Enclosure, Keeper
from harness import ZOO, repeat_until

pytestmark = pytest.mark.needs_root

FATES = os.path.join(ZOO, "fates.py")
SECONDS = 10
GONE_WITHIN_S = 60.0
SEED = "REAPER_TEST_SEED"  # in the environment


@dataclass(frozen=True)
class Worker:
    """What a worker said when it was born, or is known of one that could not say it."""

    pid: int
    ticks: int | None
    starter: int
    certain: bool
    forked: bool = False  # by a worker: once that is gone, it may be what it has put into the background


class Ledger:
    """What all of them have told. None gets a pid that another one had: there are not so many of them."""

    def __init__(self, path: str) -> None:
        with open(path, encoding="utf-8") as file:
            lines: list[dict[str, Any]] = [json.loads(line) for line in file]
        self.pools = {line["pool"]: line["flavour"] for line in lines if "pool" in line}
        self.left = {line["left"] for line in lines if "left" in line}
        self.others = {line["other"] for line in lines if "other" in line}
        self.ended = {line["ended"]: line["told_by"] for line in lines if "ended" in line}
        self.workers = {
            line["born"]: Worker(
                line["born"], line["ticks"], line["starter"], line["certain"], line["forked"]
            )
            for line in lines
            if "born" in line
        }
        for line in lines:
            for pid in line.get("children", ()):
                certain = self.pools[line["left"]] != "fork"
                self.workers.setdefault(pid, Worker(pid, None, line["left"], certain))

    def is_lost(self, pid: int, *, ended: frozenset[int] = frozenset()) -> bool:
        """Say whether the pool of ``pid`` is dead; ``ended`` are those whom the daemon has ended."""
        one = self.workers.get(pid)
        if one is None:
            return False
        return one.starter in self.left | self.others | ended or self.is_lost(one.starter, ended=ended)


class Show:
    """It is over: nobody does anything any more, and the daemon has ended whom it ends."""

    def __init__(self, enclosure: Enclosure, seed: int) -> None:
        self.enclosure = enclosure
        self.keeper: Keeper = enclosure.daemon(AGGRESSIVE.format(action="kill", quarantine_for="1s"))
        path = enclosure.scratch.file("ledger")
        with open(path, "w", encoding="utf-8"):
            os.chmod(path, 0o666)
        command = [sys.executable, FATES, str(seed), str(SECONDS)]
        director = enclosure.start(command, REAPER_TEST_LEDGER=path, REAPER_DISABLE="1")
        assert director.stdout is not None
        assert director.stdout.readline() == b"over\n", enclosure.read_errors()
        self.ledger = Ledger(path)
        repeat_until(self._none_late, GONE_WITHIN_S, "all orphans are ended")
        self.keeper.wait_scanned()
        self.ledger = Ledger(path)
        self.killed: dict[int, int] = {}  # start ticks by pid
        for event in self.keeper.events():
            if event["kind"] in ("killed", "stuck"):
                self.killed.update({part["pid"]: part["start_ticks"] for part in event["processes"]})
        for pid in self.keeper.canaries:
            self.killed.pop(pid, None)

    def lives(self, one: Worker) -> bool:
        fields = self.enclosure.stat(one.pid)
        return bool(fields) and fields[0] != b"Z" and one.ticks in (int(fields[19]), None)

    def _none_late(self) -> bool | None:
        """Say whether none is left whom its adopter, init, shows to be an orphan."""
        late = [
            one.pid
            for one in self.ledger.workers.values()
            if one.certain
            and not one.forked
            and one.pid not in self.ledger.others
            and self.enclosure.parent_of(one.pid) == 1
            and self.lives(one)
        ]
        return None if late else True


@pytest.fixture(scope="module")
def show() -> Iterator[Show]:
    seed = int(os.environ.get(SEED) or random.SystemRandom().getrandbits(32))
    print(f"{SEED}={seed}")
    enclosure = Enclosure()
    try:
        yield Show(enclosure, seed)
    finally:
        enclosure.close()


def test_nobody_is_ended_whose_pool_lives(show: Show) -> None:
    ledger, killed = show.ledger, frozenset(show.killed)
    assert killed, "nobody was an orphan"
    for pid, ticks in show.killed.items():
        events = show.keeper.events_of(pid)
        assert pid in ledger.workers, events
        assert ledger.workers[pid].ticks in (ticks, None), events
        assert ledger.workers[pid].certain, events
        assert ledger.is_lost(pid, ended=killed - {pid}), events
    for pid, parent in ledger.ended.items():
        if pid not in ledger.workers or ledger.workers[pid].starter == parent:  # else it was adopted
            assert ledger.is_lost(parent, ended=killed), f"{pid} was ended while its parent {parent} lived"


def test_who_was_not_to_be_ended_lives_on(show: Show) -> None:
    ledger = show.ledger
    for one in ledger.workers.values():
        spared = not one.certain or not ledger.is_lost(one.pid, ended=frozenset(show.killed))
        if one.pid not in ledger.left and (spared or one.pid in ledger.others):
            assert show.lives(one), (one, show.keeper.events_of(one.pid))
    for pid in ledger.pools.keys() - ledger.left:
        assert show.enclosure.state_of(pid) not in ("", "Z"), show.keeper.events_of(pid)


def test_all_orphans_are_gone(show: Show) -> None:
    ledger = show.ledger
    lost = [
        one for one in ledger.workers.values() if one.certain and not one.forked and ledger.is_lost(one.pid)
    ]
    assert lost
    left = [
        one
        for one in lost
        if one.pid not in ledger.others and show.enclosure.parent_of(one.pid) == 1 and show.lives(one)
    ]
    assert left == []
    assert show.keeper.get("status")["status"]["gate_restarts"] == 0
