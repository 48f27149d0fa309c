"""Who reclaims, and when: a helper for each user, and none waits for another user's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from reaperd import reclaimer
from reaperd.model import ProcessId, Session, SessionKey
from reaperd.poller import Poller
from reaperd.reclaim import Claim
from reaperd.reclaimer import Reclaimer

NO_LEADER = ProcessId(4194305, 1)  # one more than any pid can be
SOON_S = 10.0


class Root:
    root = "/proc"


class Observer:
    """Knows of nobody who has anything mapped."""

    proc = Root()

    def shm_mapped(self, ids: Any) -> list[str]:
        return []


@dataclass
class Stage:
    """A reclaimer whose helpers do what the test says of their user."""

    works: dict[int, Callable[[], int]]
    poller: Poller = field(default_factory=Poller)
    done: list[SessionKey] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reclaimer = Reclaimer(
            self.poller,
            Observer(),
            lambda key, held: self.done.append(key),
            self._work,  # type: ignore[arg-type]
        )

    def _work(self, claims: list[Claim], proc_root: str) -> Callable[[], int]:
        assert len({claim.session.uid for claim in claims}) == 1
        return self.works[claims[0].session.uid]

    def ask(self, uid: int, name: str = "s") -> SessionKey:
        session = Session(name, "", uid, uid, NO_LEADER, "")
        self.reclaimer.ask(session, time.time(), None, frees=True)
        return session.key

    def step_until(self, wanted: set[SessionKey]) -> None:
        end_s = time.monotonic() + SOON_S
        while not wanted <= set(self.done):
            assert time.monotonic() < end_s, f"done is only {self.done}"
            self.reclaimer.step()
            self.poller.wait(0.1)

    def close(self) -> None:
        self.reclaimer.close()


def children() -> set[str]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return set(file.read().split())


@pytest.fixture
def staged() -> Iterator[Callable[[dict[int, Callable[[], int]]], Stage]]:
    made: list[Stage] = []

    def make(works: dict[int, Callable[[], int]]) -> Stage:
        made.append(Stage(works))
        return made[-1]

    before, theirs = len(os.listdir("/proc/self/fd")), children()
    yield make
    for one in made:
        one.close()
        one.poller._epoll.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert children() <= theirs


def hang() -> int:
    signal.pause()
    return 0


def fail() -> int:
    os.close(2)  # its traceback is nobody's business
    raise RecursionError


def test_all_sessions_of_a_user_are_served_by_one_helper_and_told_as_done(
    staged: Callable[..., Stage],
) -> None:
    stage = staged({1: lambda: 7})
    keys = {stage.ask(1, name) for name in "abc"}
    stage.step_until(keys)
    assert sorted(stage.done) == sorted(keys)
    assert stage.reclaimer.deadline_s is None


def test_a_users_helper_that_hangs_or_fails_costs_no_other_user_anything(
    staged: Callable[..., Stage],
) -> None:
    stage = staged({1: hang, 2: fail, 3: lambda: 7})
    hung, failed, good = (stage.ask(uid) for uid in (1, 2, 3))
    stage.step_until({failed, good})
    assert hung not in stage.done
    again = stage.ask(3, "again")
    stage.step_until({again})
    assert hung not in stage.done


def test_a_helper_that_takes_too_long_is_ended_and_its_sessions_are_done_with(
    staged: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reclaimer, "_LONGEST_S", 0.05)
    stage = staged({1: hang})
    key = stage.ask(1)
    stage.reclaimer.step()
    assert stage.reclaimer.deadline_s is not None
    stage.step_until({key})


def test_only_so_many_helpers_run_at_once_and_the_others_follow(staged: Callable[..., Stage]) -> None:
    users = range(1, 2 * reclaimer._MAX_AT_ONCE + 1)
    stage = staged(dict.fromkeys(users, lambda: 0))
    keys = {stage.ask(uid) for uid in users}
    theirs = children()
    stage.reclaimer.step()
    assert len(children() - theirs) == reclaimer._MAX_AT_ONCE
    stage.step_until(keys)
