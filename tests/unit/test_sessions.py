"""How many sessions there may be: of one user, and of all, so that descriptors are left to end those of the dead by."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from reaperd.model import ProcessId, Session
from reaperd.policy import Policy
from reaperd.sessions import Sessions
from reaperd.store import Store


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[Sessions]:
    with contextlib.closing(Store(str(tmp_path), "boot")) as store:
        yield Sessions(store, Policy(max_per_uid=10))


def add(sessions: Sessions, uid: int, count: int) -> None:
    for _ in range(count):
        number = len(sessions.entries) + 2
        sessions.add(Session(f"{number}", "", uid, uid, ProcessId(number, 1), ""))


def test_a_user_may_have_so_many_and_is_no_reason_to_refuse_another(sessions: Sessions) -> None:
    add(sessions, 1000, 9)
    assert not sessions.has_no_room_for(1000)
    add(sessions, 1000, 1)
    assert sessions.has_no_room_for(1000)
    assert not sessions.has_no_room_for(1001)


def test_many_users_together_leave_a_few_to_everybody_and_some_descriptors_to_the_daemon(
    sessions: Sessions,
) -> None:
    assert sessions.most == (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 40) // 4
    sessions.most = 100
    for uid in range(1000, 1010):
        assert not sessions.has_no_room_for(uid)
        add(sessions, uid, 9)
    add(sessions, 1, 7)
    add(sessions, 2, 3)
    assert sessions.has_no_room_for(1000), "who has many has enough"
    assert not sessions.has_no_room_for(1)
    assert not sessions.has_no_room_for(7)
    add(sessions, 1, 1)
    assert sessions.has_no_room_for(1)
    for uid in range(2000, 2024):
        assert not sessions.has_no_room_for(uid)
        add(sessions, uid, 1)
    assert sessions.has_no_room_for(7), "there is an end to it"
