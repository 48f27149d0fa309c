"""Every way in which a leader can end: its workers go, and the event names the cause."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from harness import EXIT_GRACE_S, GRACE_S, Cgroup, Daemon, Leader, broken_promise, has_ended, open_pidfd

StartLeader = Callable[..., Leader]


@dataclass(frozen=True)
class End:
    """How to end a leader, and what the event must say then."""

    name: str
    cause: dict[str, Any]
    number: int = 0
    words: str = ""

    def bring_about(self, leader: Leader) -> None:
        if self.number:
            leader.signal(self.number)
        else:
            leader.tell(self.words)


ENDS = [
    End("SIGKILL", {"kind": "signal", "code": 9}, number=signal.SIGKILL),
    End("SIGTERM", {"kind": "signal", "code": 15}, number=signal.SIGTERM),
    End("SIGINT-to-the-leader-alone", {"kind": "signal", "code": 2}, number=signal.SIGINT),
    End("SIGSEGV", {"kind": "signal", "code": 11}, number=signal.SIGSEGV),
    End("its-own-SIGABRT", {"kind": "signal", "code": 6}, words=f"signal {int(signal.SIGABRT)}"),
    End("os._exit(3)", {"kind": "exit", "code": 3}, words="exit 3"),
    End("unhandled-exception", {"kind": "exit", "code": 1}, words="raise"),
    End("clean-end", {"kind": "exit", "code": 0}, words="end"),
]
# The parent that never waits leaves a zombie; the other is blocked in wait(2) when the leader dies.
PARENTS = [pytest.param("pytest", id="zombie"), pytest.param("waits", id="waited-for")]


def named_cause(event: dict[str, Any]) -> dict[str, Any]:
    """Return the two fields of the cause that are promised; more may be there."""
    return {key: event["cause"][key] for key in ("kind", "code")}


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.name)
def test_however_a_leader_ends_its_processes_go_and_the_event_names_the_cause(
    end: End, parent: str, daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", "everything-left", socket=daemon.socket, parent=parent)
    end.bring_about(leader)
    leader.wait_dead()
    assert broken_promise(leader) == ""
    event = daemon.wait_end(leader.session)
    assert event["kind"] == "reaped"
    assert named_cause(event) == end.cause
    assert {one["pid"] for one in event["processes"]} == set(leader.family.workers)


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize(
    "end",
    [end for end in ENDS if end.name in ("SIGTERM", "SIGSEGV", "os._exit(3)")],
    ids=lambda end: end.name,
)
def test_a_leader_that_never_gets_to_close_its_pool_is_reaped(
    end: End, parent: str, daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader(
        "pools.py", "executor", "--idle", "--method", "spawn", socket=daemon.socket, parent=parent
    )
    end.bring_about(leader)
    leader.wait_dead()
    assert broken_promise(leader) == ""
    assert named_cause(daemon.wait_end(leader.session)) == end.cause


@pytest.mark.parametrize("words, code", [("end", 0), ("raise", 1)])
def test_a_leader_that_closes_its_own_pool_leaves_nothing_to_reap(
    words: str, code: int, daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("pools.py", "executor", "--idle", "--method", "spawn", socket=daemon.socket)
    leader.tell(words)
    leader.wait_dead()
    event = daemon.wait_end(leader.session)
    assert leader.wait_all_gone(0) == []
    assert named_cause(event) == {"kind": "exit", "code": code}


def test_after_a_clean_end_what_is_left_has_exit_grace_to_finish(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    pidfds = [pidfd for pid in leader.family.workers if (pidfd := open_pidfd(pid)) is not None]
    leader.tell("end")
    leader.wait_dead()
    early = [has_ended(pidfd, within_s=0.6 * EXIT_GRACE_S / len(pidfds)) for pidfd in pidfds]
    late = [has_ended(pidfd, within_s=EXIT_GRACE_S + GRACE_S) for pidfd in pidfds]
    assert (early, late) == ([False, False], [True, True])
    daemon.wait_end(leader.session)


def test_after_a_crash_nothing_is_given_exit_grace(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    leader.kill9()
    assert leader.wait_all_gone(0.6 * EXIT_GRACE_S) == []
    daemon.wait_end(leader.session)


def count_oom_kills(group: Cgroup) -> int:
    try:
        text = group.read("memory.oom_control")
    except FileNotFoundError:
        text = group.read("memory.events")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))


LIMIT = 96 << 20


@pytest.mark.needs_root
@pytest.mark.parametrize("parent", PARENTS)
def test_a_leader_that_the_oom_killer_took_is_said_to_have_died_of_it(
    parent: str, daemon: Daemon, start_leader: StartLeader, memory_cgroup: Callable[[str], Cgroup]
) -> None:
    group = memory_cgroup("oom")
    group.limit_memory(LIMIT)
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket, groups=[group], parent=parent)
    leader.tell(f"eat {4 * LIMIT}")
    leader.wait_dead()
    assert count_oom_kills(group) == 1
    assert broken_promise(leader) == ""
    event = daemon.wait_end(leader.session)
    assert event["cause"]["kind"] == "oom"


@pytest.mark.needs_root
def test_a_plain_sigkill_in_a_cgroup_with_a_limit_is_not_called_oom(
    daemon: Daemon, start_leader: StartLeader, memory_cgroup: Callable[[str], Cgroup]
) -> None:
    group = memory_cgroup("kill")
    group.limit_memory(LIMIT)
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket, groups=[group])
    leader.kill9()
    assert broken_promise(leader) == ""
    assert named_cause(daemon.wait_end(leader.session)) == {"kind": "signal", "code": 9}
    assert count_oom_kills(group) == 0


@pytest.mark.needs_root
def test_a_sigkill_after_the_oom_killer_took_a_worker_is_not_called_oom(
    daemon: Daemon, start_leader: StartLeader, memory_cgroup: Callable[[str], Cgroup]
) -> None:
    group = memory_cgroup("worker")
    group.limit_memory(LIMIT)
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket, groups=[group])
    assert leader.ask(f"worker-eats {4 * LIMIT}")["signal"] == 9
    assert count_oom_kills(group) == 1
    daemon.wait_listed(leader.pid, leader.ask("more subprocess")["pids"])  # so there was a scan in between
    leader.kill9()
    assert broken_promise(leader) == ""
    assert named_cause(daemon.wait_end(leader.session)) == {"kind": "signal", "code": 9}
