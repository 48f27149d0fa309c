"""Pidfds of members that only descent tells: one for each, as many as one user may have, and all asked at once who is dead."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterator

import pytest
from specimens import child, count_descriptors, die, end, id_of

from reaperd.kept import Kept
from reaperd.linux.procfs import ProcFS
from reaperd.model import ProcessId, SessionKey

ONE, TWO, OTHERS = SessionKey(1000, "one"), SessionKey(1000, "two"), SessionKey(1001, "one")


def of(*pids: int) -> frozenset[ProcessId]:
    return frozenset(map(id_of, pids))


@pytest.fixture
def kept() -> Iterator[Kept]:
    """Return one whose pidfds are all closed when the test ends, or it fails."""
    one = Kept(ProcFS())
    before = count_descriptors()
    yield one
    for key in (ONE, TWO, OTHERS):
        one.hold(key, frozenset())
    assert count_descriptors() == before
    one._epoll.close()


@contextlib.contextmanager
def allowed(descriptors: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def is_held(kept: Kept, id_: ProcessId) -> bool:
    handle = kept.copy_handle(id_)
    if handle is not None:
        os.close(handle)
    return handle is not None


# -- holding ----------------------------------------------------------------------------------------


def test_a_member_is_held_by_one_pidfd_as_long_as_any_session_keeps_it(kept: Kept) -> None:
    with child() as pid:
        before = count_descriptors()
        kept.hold(ONE, of(pid))
        kept.hold(TWO, of(pid))
        kept.hold(OTHERS, of(pid))
        kept.hold(ONE, of(pid))
        assert count_descriptors() == before + 1
        kept.hold(ONE, frozenset())
        kept.hold(ONE, frozenset())
        kept.hold(OTHERS, frozenset())
        assert is_held(kept, id_of(pid))
        kept.hold(TWO, frozenset())
        assert not is_held(kept, id_of(pid))
        assert count_descriptors() == before


def test_those_who_come_are_held_and_those_who_go_are_not(kept: Kept) -> None:
    with child() as one, child() as two, child() as three:
        kept.hold(ONE, of(one, two))
        kept.hold(ONE, of(two, three))
        assert [is_held(kept, id_of(pid)) for pid in (one, two, three)] == [False, True, True]


def test_who_is_gone_or_another_by_now_is_not_held(kept: Kept) -> None:
    with child() as pid, child() as living:
        before = count_descriptors()
        other = ProcessId(living, id_of(living).start_ticks + 1)
        gone = id_of(pid)
        end(pid)
        kept.hold(ONE, frozenset((gone, other)))
        assert count_descriptors() == before
        assert not is_held(kept, gone)
        assert not is_held(kept, other)
        assert kept.dead() == frozenset()


def test_a_copy_is_the_callers_and_reaches_that_process(kept: Kept) -> None:
    with child() as pid:
        kept.hold(ONE, of(pid))
        handle = kept.copy_handle(id_of(pid))
        assert handle is not None
        kept.hold(ONE, frozenset())
        assert not os.get_inheritable(handle)
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(handle)
    assert kept.copy_handle(ProcessId(pid, 1)) is None


# -- who is dead ------------------------------------------------------------------------------------


def test_all_who_have_ended_are_told_as_long_as_they_are_kept(kept: Kept) -> None:
    assert kept.dead() == frozenset()
    with child() as one, child() as two, child() as three:
        members = of(one, two, three)
        kept.hold(ONE, members)
        os.kill(three, signal.SIGSTOP)
        assert kept.dead() == frozenset()
        ended = of(one, two)
        die(one)
        end(two)
        assert kept.dead() == ended
        assert kept.dead() == ended
        kept.hold(ONE, members - ended)
        assert kept.dead() == frozenset()


def test_many_who_have_ended_are_told_all_at_once(kept: Kept) -> None:
    with contextlib.ExitStack() as stack:
        members = of(*(stack.enter_context(child()) for _ in range(40)))
        kept.hold(ONE, members)
        for id_ in members:
            end(id_.pid)
        assert kept.dead() == members


def test_who_ended_is_told_while_another_session_keeps_it(kept: Kept) -> None:
    with child() as pid:
        members = of(pid)
        kept.hold(ONE, members)
        kept.hold(TWO, members)
        end(pid)
        kept.hold(ONE, frozenset())
        assert kept.dead() == members


# -- limits -----------------------------------------------------------------------------------------


def test_one_user_has_a_share_and_all_together_no_more_than_four() -> None:
    before = count_descriptors()
    with allowed(64):
        kept = Kept(ProcFS())  # two for each, eight in all
    with contextlib.ExitStack() as stack:
        members = [of(*(stack.enter_context(child()) for _ in range(3))) for _ in range(5)]
        keys = [SessionKey(uid, "x") for uid in range(5)]
        for key, three in zip(keys, members, strict=True):
            kept.hold(key, three)
        held = [sum(is_held(kept, id_) for id_ in three) for three in members]
        assert held == [2, 2, 2, 2, 0]
        kept.hold(keys[0], frozenset())
        kept.hold(keys[4], frozenset())
        kept.hold(keys[4], members[4])
        assert sum(is_held(kept, id_) for id_ in members[4]) == 2
        for key in keys:
            kept.hold(key, frozenset())
    kept._epoll.close()
    assert count_descriptors() == before


def test_what_one_session_of_a_user_has_is_missing_to_the_users_others_alone() -> None:
    with allowed(64):
        kept = Kept(ProcFS())
    with child() as one, child() as two, child() as three, child() as four:
        kept.hold(ONE, of(one, two))
        kept.hold(TWO, of(three))
        kept.hold(OTHERS, of(four))
        assert [is_held(kept, id_of(pid)) for pid in (one, two, three, four)] == [True, True, False, True]
        kept.hold(ONE, of(one))
        kept.hold(TWO, of(three, four))
        assert [is_held(kept, id_of(pid)) for pid in (one, two, three, four)] == [True, False, False, True]
        kept.hold(TWO, frozenset())
        kept.hold(TWO, of(three))
        assert is_held(kept, id_of(three)), "room was made"
        for key in (ONE, TWO, OTHERS):
            kept.hold(key, frozenset())
    kept._epoll.close()


def test_a_member_beyond_the_share_that_others_keep_too_is_let_go_of_with_them() -> None:
    with allowed(64):
        kept = Kept(ProcFS())
    with child() as one, child() as two, child() as three:
        before = count_descriptors()
        kept.hold(ONE, of(one, two))
        kept.hold(TWO, of(three))  # beyond
        kept.hold(OTHERS, of(three))  # another user's share has room
        assert is_held(kept, id_of(three))
        for key in (TWO, OTHERS, ONE):
            kept.hold(key, frozenset())
        assert count_descriptors() == before
    kept._epoll.close()


def test_where_descriptors_have_run_out_nothing_is_left_behind_or_mixed_up(kept: Kept) -> None:
    with child() as one, child() as two:
        kept.hold(ONE, of(one))
        both = of(one, two)
        only_two = of(two)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        with allowed(lowest_free), contextlib.suppress(OSError):
            kept.hold(ONE, only_two)
        assert not is_held(kept, next(iter(both - only_two))), "it is no member any more"
