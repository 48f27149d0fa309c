"""Clocks that do not go on together: on a machine that was suspended, one stood still while another went on.

The clock on the wall is no part of this: that no decision reads it is a rule (``tests/unit/test_rules.py``).
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest
from harness import (
    WORKERS_GONE_S,
    Daemon,
    Leader,
    broken_promise,
    children_of,
    cmdline,
    end_process,
    list_shm,
    read_proc,
    repeat_until,
    test_environment,
)

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

pytestmark = pytest.mark.needs_root


@pytest.fixture
def after_a_suspend(run: str) -> Iterator[list[str]]:
    """Return what has a command run on a machine that seems to have been suspended for days: there, only one clock went on."""
    if subprocess.run(["unshare", "--time", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no time namespace can be made here")
    holder = subprocess.Popen(
        ["unshare", "--time", "--boottime", "500000", "--fork", "--kill-child", "cat"],
        stdin=subprocess.PIPE,
        env=test_environment(run),
    )
    with holder:
        try:
            (inner,) = repeat_until(lambda: children_of(holder.pid) or None, 10, "the namespace")
            repeat_until(lambda: True if cmdline(inner) == ["cat"] else None, 10, "it is inside")
            yield ["nsenter", f"--time=/proc/{inner}/ns/time"]
        finally:
            holder.kill()


def test_a_machine_that_was_suspended_for_days_is_no_reason_to_wait_or_to_miss_anything(
    after_a_suspend: list[str], start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    """Start times count the days, all that waits does not; what is freed by name is told by both, and by the wall clock."""
    daemon = start_daemon(inside=after_a_suspend)
    leader = start_leader("pools.py", "memmap", "--busy", socket=daemon.socket, inside=after_a_suspend)
    offsets = read_proc(leader.pid, "timens_offsets").split()
    assert (offsets[1], offsets[4]) == (b"0", b"500000")
    for pid in leader.family.trackers:
        os.kill(pid, signal.SIGSTOP)  # else one of them cleans up after the others
    for pid in leader.family.trackers:
        end_process(pid)
    daemon.kill9()
    daemon.start()
    leader.kill9()
    assert broken_promise(leader) == ""
    event = daemon.wait_end(leader.session)
    assert event["latency_s"] < WORKERS_GONE_S
    assert [name for name in list_shm() if f"_{leader.pid}_" in name] == []
    assert event["freed"]["shm_bytes"] > 20_000_000
