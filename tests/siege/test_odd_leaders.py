"""Leaders that register late, lose their main thread, exec, hang or are traced, and workers that are never long the same."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from harness import (
    STRANGER,
    Daemon,
    Leader,
    Scratch,
    broken_promise,
    children_of,
    read_proc,
    repeat_until,
)
from tracer import Tracer

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

# Nobody can promise when whoever looks at /proc gets hold of what is never long there.
CAUGHT_WITHIN_S = 60.0
SIGKILLED = {"kind": "signal", "code": 9}


def assert_reaped(daemon: Daemon, leader: Leader) -> None:
    assert broken_promise(leader) == ""
    assert daemon.wait_end(leader.session)["cause"] == SIGKILLED


def assert_reaped_once_it_is_killed(daemon: Daemon, leader: Leader) -> None:
    """Assert that the leader counts as alive and its workers as its own, and that they end with it."""
    everyone = [leader.pid, *leader.family.workers]
    daemon.wait_listed(leader.pid, leader.family.workers)
    assert leader.still_alive(everyone) == everyone
    leader.kill9()
    assert_reaped(daemon, leader)


# -- a worker that registers late -----------------------------------------------------------------


class Nested:
    """A leader below which another one registers, late: a worker until then, with a worker of its own."""

    def __init__(self, daemon: Daemon, outer: Leader) -> None:
        self.outer = outer
        self.beside: list[int] = outer.family.facts["beside"]  # the outer leader's other worker
        daemon.wait_listed(outer.pid, outer.family.workers)
        told = outer.ask("inner-registers")
        self.session: str = told["session"]
        self.leader: int = told["leader"]
        self.workers: list[int] = [
            pid for pid in [*outer.family.facts["below"], *told["pids"]] if pid != self.leader
        ]
        assert self.session != outer.session

    def wait_listed(self, daemon: Daemon) -> None:
        """Return when the outer session has everybody, and the inner one what was started after it began."""
        daemon.wait_listed(self.outer.pid, [self.leader, *self.workers, *self.beside])
        daemon.wait_listed(self.leader, self.workers[-1:])


@pytest.fixture(
    params=[("late-child", False), ("late-grandchild", True)], ids=["child", "grandchild-restarted"]
)
def nested(request: pytest.FixtureRequest, daemon: Daemon, start_leader: StartLeader) -> Nested:
    """Have such a pair; in one case the daemon began anew since the inner leader has registered."""
    kind, restart = request.param
    nested = Nested(daemon, start_leader("odd.py", kind, socket=daemon.socket))
    if restart:
        daemon.restart()
    nested.wait_listed(daemon)
    return nested


def test_a_worker_that_registers_late_ends_with_its_workers_alone(daemon: Daemon, nested: Nested) -> None:
    os.kill(nested.leader, signal.SIGKILL)
    event = daemon.wait_end(nested.session)
    assert event["cause"] == SIGKILLED
    assert nested.outer.still_alive(nested.workers) == []
    rest = [nested.outer.pid, *nested.beside]
    assert nested.outer.still_alive(rest) == rest
    nested.outer.kill9()
    assert_reaped(daemon, nested.outer)


def test_whoever_registered_late_below_it_goes_with_the_outer_leader(daemon: Daemon, nested: Nested) -> None:
    nested.outer.kill9()
    assert_reaped(daemon, nested.outer)
    assert nested.outer.still_alive([nested.leader, *nested.workers]) == []
    daemon.wait_end(nested.session)


@pytest.mark.parametrize("first", ["outer", "inner"])
def test_two_leaders_that_die_in_one_moment_leave_nothing(first: str, daemon: Daemon, nested: Nested) -> None:
    deaths = [lambda: nested.outer.signal(signal.SIGKILL), lambda: os.kill(nested.leader, signal.SIGKILL)]
    for die in deaths if first == "outer" else reversed(deaths):
        die()
    nested.outer.wait_dead()
    assert_reaped(daemon, nested.outer)
    assert nested.outer.still_alive([nested.leader, *nested.workers]) == []
    daemon.wait_end(nested.session)


# -- a leader without its main thread -------------------------------------------------------------


def test_what_ends_the_last_thread_ends_a_leader_without_its_main_one(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("odd.py", "worker", "--headless", "after", socket=daemon.socket)
    daemon.wait_listed(leader.pid, leader.family.workers)
    leader.ask("ping")
    leader.tell("exit 5")
    leader.wait_dead()
    assert broken_promise(leader) == ""
    assert daemon.wait_end(leader.session)["cause"] == {"kind": "exit", "code": 5}


def test_a_leader_can_register_without_its_main_thread(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("odd.py", "worker", "--headless", "before", socket=daemon.socket)
    assert_reaped_once_it_is_killed(daemon, leader)


@pytest.mark.parametrize("headless", ["before", "after"])
def test_a_leader_without_its_main_thread_is_found_by_its_page(
    headless: str, start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(started=False)
    leader = start_leader("odd.py", "worker", "--headless", headless, socket=daemon.socket)
    daemon.start()
    assert_reaped_once_it_is_killed(daemon, leader)


def test_what_a_leader_starts_after_its_main_thread_and_a_daemon_are_gone_ends_with_it(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    """It had no worker when the daemon began anew: that must not be taken for a session that is over."""
    leader = start_leader("odd.py", "nobody", "--headless", "after", socket=daemon.socket)
    daemon.restart()
    session = daemon.session_of(leader.pid)
    assert session is not None
    assert session["state"] == "running"
    later = leader.ask("more")["pids"]
    daemon.wait_listed(leader.pid, later)
    leader.kill9()
    assert_reaped(daemon, leader)
    assert leader.still_alive(later) == []


# -- a leader that becomes another program --------------------------------------------------------


@pytest.mark.parametrize("restart", [False, True], ids=["", "restarted"])
def test_a_leader_that_execs_without_registering_again_leads_what_it_started(
    restart: bool, daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("odd.py", "worker", socket=daemon.socket)
    leader.ask("exec-away")
    if restart:
        daemon.restart()
    assert_reaped_once_it_is_killed(daemon, leader)


# -- a leader that does not run -------------------------------------------------------------------


@pytest.fixture
def hold() -> Iterator[Callable[[int], None]]:
    """Hold a process by ptrace(2), as a debugger does, for as long as the test lasts."""
    tracers: list[Tracer] = []

    def hold(pid: int) -> None:
        tracers.append(Tracer(pid))
        tracers[-1].hold()

    yield hold
    for tracer in tracers:
        tracer.close()


def state_of(pid: int) -> str:
    return read_proc(pid, "stat").rpartition(b") ")[2][:1].decode()


@pytest.mark.parametrize("late", [False, True], ids=["registered", "adopted"])
def test_a_leader_under_a_debugger_is_alive_until_it_is_dead(
    late: bool, start_daemon: StartDaemon, start_leader: StartLeader, hold: Callable[[int], None]
) -> None:
    """The kernel tells its parent of its end only when the debugger has looked."""
    daemon = start_daemon(started=not late)
    leader = start_leader("odd.py", "worker", socket=daemon.socket, parent="waits")
    hold(leader.pid)
    assert state_of(leader.pid) == "t"
    if late:
        daemon.start()
    assert_reaped_once_it_is_killed(daemon, leader)


@pytest.fixture
def pipe(scratch: Scratch) -> str:
    path = scratch.file("pipe")
    os.mkfifo(path)
    return path


def block(leader: Leader, pipe: str) -> int:
    """Have the leader wait in state D, which vfork(2) does; return the child it waits for."""
    before = set(leader.family.workers)
    leader.tell(f"spawn-from {pipe}")

    def blocked() -> int | None:
        # Nothing tells when a process gets there.
        child = next((pid for pid in children_of(leader.pid) if pid not in before), None)
        return child if state_of(leader.pid) == "D" else None

    child = repeat_until(blocked, 10.0, "the leader is not in state D")
    leader.hold(child)
    return child


def release(pipe: str) -> None:
    os.close(os.open(pipe, os.O_WRONLY))


def test_a_leader_in_state_d_delays_nobody_and_is_reaped(
    daemon: Daemon, start_leader: StartLeader, pipe: str
) -> None:
    leader, other = (start_leader("odd.py", "worker", socket=daemon.socket) for _ in range(2))
    child = block(leader, pipe)
    other.kill9()
    assert_reaped(daemon, other)
    daemon.wait_listed(leader.pid, leader.family.workers)
    assert leader.still_alive([leader.pid, child]) == [leader.pid, child]
    leader.kill9()
    assert_reaped(daemon, leader)
    assert leader.still_alive([child]) == []


def test_a_leader_in_state_d_goes_on_when_it_can(
    daemon: Daemon, start_leader: StartLeader, pipe: str
) -> None:
    leader = start_leader("odd.py", "worker", socket=daemon.socket)
    block(leader, pipe)
    daemon.restart()
    release(pipe)
    assert leader.read_line() == {"spawned": True}
    assert_reaped_once_it_is_killed(daemon, leader)


@pytest.mark.parametrize("end", ["released", "killed"])
def test_a_leader_in_state_d_is_found_by_a_daemon_that_comes_late(
    end: str, start_daemon: StartDaemon, start_leader: StartLeader, pipe: str
) -> None:
    daemon = start_daemon(started=False)
    leader = start_leader("odd.py", "worker", socket=daemon.socket)
    block(leader, pipe)
    daemon.start()
    if end == "released":
        release(pipe)
        assert leader.read_line() == {"spawned": True}
        assert_reaped_once_it_is_killed(daemon, leader)
    else:
        leader.kill9()
        # That its workers have it for a leader is seen when they come to their turn.
        daemon.wait_end(leader.session)
        assert leader.living() == []


# -- a leader that hides --------------------------------------------------------------------------


@pytest.mark.needs_root
@pytest.mark.parametrize("late", [False, True], ids=["registered", "adopted"])
def test_a_leader_whose_memory_is_nobody_s_to_read_is_reaped(
    late: bool, start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(started=not late)
    leader = start_leader("odd.py", "worker", "--undumpable", socket=daemon.socket, uid=STRANGER)
    if late:
        daemon.start()
    assert_reaped_once_it_is_killed(daemon, leader)


# -- the daemon's own children ---------------------------------------------------------------------


def test_a_helper_of_the_daemon_is_nobody_s_worker(daemon: Daemon, start_leader: StartLeader) -> None:
    """When it is born it has all of the daemon's descriptors, the pages of other sessions among them."""
    first, second = (start_leader("odd.py", "worker", socket=daemon.socket) for _ in range(2))
    with contextlib.closing(Tracer(daemon.pid, hold_children=True)) as tracer:
        tracer.hold()
        first.signal(signal.SIGKILL)
        end_s = time.monotonic() + 20.0
        tracer.run_while(lambda: not tracer.children and time.monotonic() < end_s)
        assert tracer.children, "the daemon started no helper to free what the first session held"
        second.signal(signal.SIGKILL)
        end_s = time.monotonic() + 20.0
        tracer.run_while(lambda: bool(second.living()) and time.monotonic() < end_s)
        assert second.living() == []
    for leader in (first, second):
        # So it lives: a helper's SIGTERM must not be taken for its own.
        event = daemon.wait_end(leader.session)
        assert {one["pid"] for one in event["processes"]} == set(leader.family.workers)


# -- workers that are never long the same ---------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "hops-in-new-sessions",
        "hops-with-closed-descriptors",
        "hops-in-a-crowd",
        "hops-and-execs",
    ],
)
def test_what_forks_itself_every_millisecond_is_caught(
    kind: str, daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("odd.py", kind, socket=daemon.socket)
    leader.kill9()
    assert leader.wait_released(CAUGHT_WITHIN_S), "it hops on"
    assert daemon.wait_end(leader.session)["kind"] == "reaped"
