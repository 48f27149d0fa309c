"""``agent.spared()``: what is started meanwhile is marked and named, whichever threads' blocks overlap."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import agent
from agent import session, wire
from reaperd import pages
from reaperd.linux.procfs import ProcFS, parse_maps

OUTER = "90-2e8-0000000a-0000000c"
SOON_S = 10.0  # a deadline, not a wait


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (wire.LINEAGE_VARIABLE, wire.SPARED_VARIABLE, "REAPER_DISABLE"):
        monkeypatch.delenv(name, raising=False)


def in_child(work: Callable[[], Any]) -> Any:
    """Return what ``work`` returns in a forked child."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        told = file.read()
    os.waitpid(pid, 0)
    assert told, "the child failed"
    return json.loads(told)


def as_leader(work: Callable[[], Any], *, registered: bool = True, **environment: str) -> Any:
    """Return what ``work`` returns in a child that leads a session: it is as new as any training script."""

    def lead() -> Any:
        os.environ.update(environment)
        if registered:
            register()
        return work()

    return in_child(lead)


def register() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no daemon
        agent.register(socket="/nonexistent")


def mark() -> str:
    """Return REAPER_SPARED, with the leader's own session, whose id nobody can know before, as "mine"."""
    mine = session._process.session.id if session._process.session is not None else "none"
    return os.environ.get(wire.SPARED_VARIABLE, "").replace(mine, "mine")


def named() -> list[int]:
    """Return the pids that the page names as spared."""
    page = session._process.page
    assert page is not None
    return [pid for pid, _ in pages.parse_page(os.pread(page.fd, wire.PAGE_BYTES, 0)).spared]


@contextlib.contextmanager
def children() -> Iterator[Callable[[], int]]:
    """Yield what forks a child that does nothing; all of them end with the block."""
    pids = []

    def start() -> int:
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        pids.append(pid)
        return pid

    try:
        yield start
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Other:
    """Another thread, which does one thing after the other as it is told."""

    def __init__(self) -> None:
        self._work: Callable[[], object] = lambda: None
        self._told, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._told.acquire(timeout=SOON_S):
            self._result = self._work()
            self._done.release()

    def does(self, work: Callable[[], Any]) -> Any:
        self._work = work
        self._told.release()
        assert self._done.acquire(timeout=SOON_S)
        return self._result


def leave(block: session.Spared) -> None:
    block.__exit__(None, None, None)


# -- the mark in the environment --------------------------------------------------------------------


def test_the_mark_is_in_the_environment_within_the_block_alone() -> None:
    def work() -> list[str]:
        seen = [mark()]
        with agent.spared():
            seen.append(mark())
        seen.append(mark())
        with contextlib.suppress(ZeroDivisionError), agent.spared():
            seen.append(mark())
            raise ZeroDivisionError
        return [*seen, mark()]

    assert as_leader(work) == ["", "mine", "", "mine", ""]
    outer = {wire.SPARED_VARIABLE: OUTER}
    assert as_leader(work, **outer) == [OUTER, f"{OUTER}:mine", OUTER, f"{OUTER}:mine", OUTER]


@pytest.mark.parametrize("first_out", ["the first in", "the second in"])
def test_of_the_overlapping_blocks_of_two_threads_the_first_sets_the_mark_and_the_last_takes_it_away(
    first_out: str,
) -> None:
    def work() -> list[str]:
        other, ours, theirs = Other(), agent.spared(), agent.spared()
        ours.__enter__()
        seen = [mark()]
        other.does(theirs.__enter__)
        seen.append(mark())
        if first_out == "the first in":
            leave(ours)
            seen.append(mark())
            other.does(lambda: leave(theirs))
        else:
            other.does(lambda: leave(theirs))
            seen.append(mark())
            leave(ours)
        return [*seen, mark()]

    outer = {wire.SPARED_VARIABLE: OUTER}
    assert as_leader(work) == ["mine", "mine", "mine", ""]
    assert as_leader(work, **outer) == [*[f"{OUTER}:mine"] * 3, OUTER]


def test_a_worker_that_only_inherited_a_session_marks_what_it_starts_with_that() -> None:
    def work() -> list[str]:
        with agent.spared():
            inside = mark()
        return [inside, mark()]

    stamp = {wire.LINEAGE_VARIABLE: f"{OUTER}:7-7-00000007-00000007"}
    assert as_leader(work, registered=False, **stamp) == ["7-7-00000007-00000007", ""]
    assert as_leader(work, registered=False) == ["", ""]


# -- who is named in the page -----------------------------------------------------------------------


def test_the_page_names_what_was_started_within_the_block_and_nothing_from_before_or_after() -> None:
    def work() -> bool:
        with children() as start:
            start()
            with agent.spared():
                inside = [start(), start()]
                assert named() == []
            start()
            return sorted(named()) == sorted(inside)

    assert as_leader(work)


def test_what_either_of_two_overlapping_threads_started_is_named() -> None:
    def work() -> list[bool]:
        with children() as start:
            other, ours, theirs = Other(), agent.spared(), agent.spared()
            worker = start()
            ours.__enter__()
            first = start()
            other.does(theirs.__enter__)
            second = other.does(start)
            leave(ours)
            third = other.does(start)
            early = set(named())
            other.does(lambda: leave(theirs))
            return [early == {first, second}, set(named()) == {first, second, third}, worker not in named()]

    assert as_leader(work) == [True, True, True]


def test_what_was_started_in_two_blocks_at_once_is_named_once() -> None:
    def work() -> bool:
        with children() as start:
            with agent.spared(), agent.spared():
                inside = [start() for _ in range(3)]
            return sorted(named()) == sorted(inside)

    assert as_leader(work)


def test_whoever_has_ended_is_named_no_longer() -> None:
    def work() -> list[bool]:
        with children() as start:
            with agent.spared():
                pid = os.fork()
                if pid == 0:
                    signal.pause()
            was_named = named() == [pid]
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            with agent.spared():
                another = start()
            return [was_named, named() == [another]]

    assert as_leader(work) == [True, True]


def test_a_block_that_was_entered_before_there_was_a_session_ends_without_touching_anothers() -> None:
    def work() -> list[object]:
        with children() as start:
            other, early, theirs = Other(), agent.spared(), agent.spared()
            early.__enter__()
            register()
            start()  # a worker
            other.does(theirs.__enter__)
            leave(early)
            return [mark(), named()]

    assert as_leader(work, registered=False) == ["mine", []]


# -- a child that was forked within the block -------------------------------------------------------


def carried() -> list[list[bool]]:
    """Return whether this process has a page and a spared mark: among its descriptors, and mapped."""
    links = list(ProcFS().descriptors(os.getpid(), os.getpid()).values())
    paths = [one.path for one in parse_maps(ProcFS().maps(os.getpid(), os.getpid()))]
    return [
        [any(prefix in one for one in found) for prefix in (wire.PAGE_PREFIX, wire.SPARED_PREFIX)]
        for found in (links, paths)
    ]


def test_a_child_that_was_forked_within_the_block_has_the_mark_and_no_page() -> None:
    def work() -> list[object]:
        with agent.spared():
            return [in_child(carried), carried()]

    assert as_leader(work) == [[[False, True], [False, True]], [[True, False], [True, False]]]


def test_a_child_that_leaves_the_block_it_was_forked_in_stays_spared_and_leads_nothing() -> None:
    def work() -> object:
        mine, block = agent.register(), agent.spared()
        block.__enter__()

        def leave_in_child() -> list[object]:
            leave(block)
            return [os.environ[wire.SPARED_VARIABLE] == mine.id, session._process.sparing, mine.leading]

        return in_child(leave_in_child)

    assert as_leader(work) == [True, 0, False]


def test_a_child_that_was_forked_while_another_thread_spares_is_spared_and_the_leader_stays_one() -> None:
    def work() -> list[object]:
        other, theirs = Other(), agent.spared()
        other.does(theirs.__enter__)
        told = in_child(carried)
        other.does(lambda: leave(theirs))
        return [told, agent.register().leading, carried()]

    assert as_leader(work) == [[[False, True], [False, True]], True, [[True, False], [True, False]]]
