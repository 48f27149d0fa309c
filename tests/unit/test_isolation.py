"""Which leaders may be moved into a control group of their own, and what that is called."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, cast

import pytest

from reaperd.isolation import (
    NotIsolated,
    Place,
    is_scope_of_user,
    is_within,
    path_of_scope,
    place_below,
    place_by_systemd,
    scope_name,
)
from reaperd.isolator import Isolator
from reaperd.linux.procfs import ProcFS
from reaperd.model import Session, SessionKey
from reaperd.observer import Observer
from reaperd.poller import Poller

UID = 1000
KEY = SessionKey(UID, "100-3e8-0000000a-0000000b")
SOCKET = "/run/reaper/reaper.sock"
USERS = f"/user.slice/user-{UID}.slice"
MANAGED = f"{USERS}/user@{UID}.service"


# -- names ------------------------------------------------------------------------------------------


def test_a_scope_is_named_after_user_session_and_daemon() -> None:
    name = scope_name(KEY, SOCKET)
    assert name.startswith("reaper-1000-100-3e8-0000000a-0000000b-")
    assert name.endswith(".scope")
    others = (scope_name(KEY._replace(uid=1001), SOCKET), scope_name(KEY, "/tmp/other.sock"))
    assert len({name, *others}) == 3


def test_a_session_knows_its_own_scope_by_the_name_and_no_other() -> None:
    name = scope_name(KEY, SOCKET)
    assert path_of_scope(KEY, f"{USERS}/{name}", SOCKET) == f"{USERS}/{name}"
    assert path_of_scope(KEY, f"{USERS}/{name}/below/that", SOCKET) == f"{USERS}/{name}"
    assert path_of_scope(KEY, f"/{name}", SOCKET) == f"/{name}"
    for other in (f"{USERS}/x{name}", f"{USERS}/{name}x", USERS, "/", ""):
        assert path_of_scope(KEY, other, SOCKET) is None
    assert path_of_scope(KEY, f"{USERS}/{name}", "/tmp/other.sock") is None
    assert path_of_scope(KEY._replace(uid=1), f"{USERS}/{name}", SOCKET) is None


def test_a_scope_of_any_session_of_a_user_is_known_as_that() -> None:
    path = f"{USERS}/{scope_name(KEY, SOCKET)}"
    assert is_scope_of_user(UID, path)
    assert is_scope_of_user(UID, f"{path}/below")
    for uid, other in (
        (100, path),
        (1, path),
        (UID, None),
        (UID, USERS),
        (UID, path.removesuffix(".scope")),
        (UID, "/reaper-1000x.scope"),
    ):
        assert not is_scope_of_user(uid, other)


def test_what_only_begins_alike_is_not_within() -> None:
    assert is_within("/a/b", "/a/b")
    assert is_within("/a/b/c", "/a/b")
    for other in ("/a/bc", "/a", "/", None):
        assert not is_within(other, "/a/b")


# -- who may be moved, by systemd -------------------------------------------------------------------


def test_who_logged_in_is_moved_to_a_place_beside_and_stopped_with_the_login() -> None:
    found = place_by_systemd(f"{USERS}/session-3.scope", UID, system=True)
    assert found == Place(f"user-{UID}.slice", USERS, "session-3.scope")


def test_who_was_started_by_the_user_s_own_systemd_is_stopped_with_that() -> None:
    cgroup = f"{MANAGED}/app.slice/app-gnome.slice/vte-spawn-1.scope"
    assert place_by_systemd(cgroup, UID, system=True) == Place(
        f"user-{UID}.slice", USERS, f"user@{UID}.service"
    )
    assert place_by_systemd(cgroup, UID, system=False) == Place("app.slice", MANAGED, "vte-spawn-1.scope")


@pytest.mark.parametrize(
    "cgroup",
    [
        "/",
        "",
        "/system.slice/cron.service",
        "/system.slice/docker-0123.scope",
        "/system.slice/slurmstepd.scope/job_1/step_0/user/task_0",
        "/kubepods.slice/kubepods-pod1.slice/cri-containerd-1.scope",
        "/user.slice/user-1001.slice/session-3.scope",  # somebody else's: su(1) keeps it
        "/user.slice/user-10001.slice/session-3.scope",
        f"{USERS}x/session-3.scope",
        "/reaper-1000-x.scope",
    ],
)
def test_who_runs_elsewhere_than_below_its_user_s_slice_stays_there(cgroup: str) -> None:
    for system in (True, False):
        with pytest.raises(NotIsolated, match="counts on it to stay"):
            place_by_systemd(cgroup, UID, system=system)


@pytest.mark.parametrize(
    "cgroup",
    [
        USERS,
        f"{USERS}/user@{UID}.service",
        f"{USERS}/user@{UID}.service/init.scope",
        f"{MANAGED}/app.slice/jupyter.service",
        f"{MANAGED}/user.slice/libpod-1.scope/container",
    ],
)
def test_who_is_part_of_a_service_or_a_container_stays_there(cgroup: str) -> None:
    for system in (True, False):
        with pytest.raises(NotIsolated, match="only who runs in a scope is moved"):
            place_by_systemd(cgroup, UID, system=system)


def test_a_scope_that_somebody_else_made_below_the_slice_is_left_alone() -> None:
    with pytest.raises(NotIsolated, match="somebody else than systemd"):
        place_by_systemd(f"{USERS}/session-3.scope/inner.scope", UID, system=True)


def test_a_user_s_own_daemon_moves_nobody_out_of_what_the_system_made() -> None:
    with pytest.raises(NotIsolated, match="not the user's own systemd's"):
        place_by_systemd(f"{USERS}/session-3.scope", UID, system=False)


# -- without systemd --------------------------------------------------------------------------------


def test_without_systemd_groups_are_made_below_the_daemon_s_own() -> None:
    for cgroup in ("/", "/jobs", "/jobs/reaper"):
        assert place_below("/jobs/reaper", cgroup, {7, 8}, {7, 8, 9}) == "/jobs/reaper"


@pytest.mark.parametrize(
    ("own", "cgroup", "residents", "why"),
    [
        ("/", "/", {7}, "no control group of its own"),
        ("/reaper", "/", {7, 10}, "has others in it"),
        ("/reaper", "/limited", {7}, "would leave the limits"),
        ("/reaper", "/reap", {7}, "would leave the limits"),
        ("/reaper", "/reaper/reaper-1-x.scope", {7}, "would leave the limits"),
    ],
)
def test_without_systemd_nobody_leaves_limits_and_no_group_of_others_is_used(
    own: str, cgroup: str, residents: set[int], why: str
) -> None:
    with pytest.raises(NotIsolated, match=why):
        place_below(own, cgroup, residents, {7, 8, 9})


def test_where_memory_runs_out_while_one_is_told_the_next_one_has_its_turn_all_the_same() -> None:
    observer = Observer(ProcFS())
    isolator = Isolator(Poller(), observer, SOCKET, system=True)
    observer.is_beside_us = lambda pid: False  # type: ignore[method-assign]
    leader = observer.proc.stat(os.getpid()).id
    session = Session(KEY.id, "", KEY.uid, 0, leader, "")
    told: list[str] = []

    def fail(scope: str | None, why: str) -> None:
        raise MemoryError

    isolator._running = cast(Any, "somebody's")
    for done in (fail, lambda _, why: told.append(why)):
        with open_pidfd() as handle:
            isolator.ask(session, handle, done)
    isolator._running = None
    with pytest.raises(MemoryError):
        isolator.step()
    assert isolator.deadline_s == 0
    isolator.step()
    assert (len(told), isolator.deadline_s) == (1, None)


@contextlib.contextmanager
def open_pidfd() -> Iterator[int]:
    handle = os.pidfd_open(os.getpid())
    try:
        yield handle
    finally:
        os.close(handle)
