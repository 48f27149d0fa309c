"""Many workers, and many sessions that end in one moment; ``make scale`` has the numbers that count, and the figures."""

from __future__ import annotations

from collections.abc import Callable

from harness import Daemon, alive
from throng import Kin, Throng, kill_leaders

StartDaemon = Callable[..., Daemon]

GRACE_S = 5.0
PROMISE_S = GRACE_S + 1.0
CONFIG = f'[kill]\ngrace = "{GRACE_S:g}s"\n'


def assert_over(daemon: Daemon, sessions: list[Kin]) -> None:
    for one in sessions:
        event = daemon.wait_end(one.session)
        assert {process["pid"] for process in event["processes"]} == set(one.workers)


def test_a_leader_s_300_workers_end_with_it(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config=CONFIG)
    with Throng(daemon, 1, 300) as throng:
        reaping = kill_leaders(throng.sessions, within_s=PROMISE_S)
        assert reaping.alive == ()
        assert_over(daemon, throng.sessions)


def test_of_120_sessions_those_end_whose_leaders_die_together_and_nobody_else_is_touched(
    start_daemon: StartDaemon,
) -> None:
    """First 60 in one instant, then 20 within a second."""
    daemon = start_daemon(config=CONFIG)
    with Throng(daemon, 120, 1) as throng:
        living = throng.sessions
        for count, over_s in ((60, 0.0), (20, 1.0)):
            dying = living[:: len(living) // count][:count]
            living = [one for one in living if one not in dying]
            reaping = kill_leaders(dying, within_s=PROMISE_S, over_s=over_s)
            assert reaping.alive == ()
            assert len(reaping.latencies_s) == count
            assert max(reaping.latencies_s) <= PROMISE_S
            assert_over(daemon, [dying[0], dying[-1]])
            assert [pid for one in living for pid in (one.leader, *one.workers) if not alive(pid)] == []
        listed = {session["id"]: session for session in daemon.sessions()}
        for one in living:
            assert {worker["pid"] for worker in listed[one.session]["workers"]} == set(one.workers)
