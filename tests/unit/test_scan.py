"""What a scan finds out about real processes that a pool has left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from reaperd.linux.procfs import ProcFS
from reaperd.marks import MarkReader
from reaperd.policy import Policy
from reaperd.scan import Scan

WORKER = "from multiprocessing.spawn import spawn_main\nimport time; print('up', flush=True); time.sleep(60)"
SERVICE = "/system.slice/guarded.service"


class Grouped(ProcFS):
    """Puts everybody into one cgroup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def cgroup(self, pid: int) -> str:
        del pid
        return self._text


@contextlib.contextmanager
def worker_of_a_shell() -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Start what bears a worker's command line; yield its pid, and its parent."""
    command = ["sh", "-c", '"$@" & echo $!; wait', "sh", sys.executable, "-c", WORKER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        pidfd = os.pidfd_open(pid)
        try:
            assert shell.stdout.readline() == "up\n"
            yield pid, shell
        finally:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


@pytest.mark.parametrize(
    "text",
    [
        f"0::{SERVICE}\n",
        f"2:memory:/\n1:name=systemd:{SERVICE}\n0::{SERVICE}\n",
        f"2:memory:/\n1:name=systemd:{SERVICE}\n0::/\n",
    ],
)
def test_an_orphan_in_a_protected_unit_is_protected_whichever_hierarchy_tells(text: str) -> None:
    proc = Grouped(text)
    scan = Scan(proc, MarkReader(proc))
    with worker_of_a_shell() as (pid, shell):
        assert not scan.examine([pid])[pid].is_lost
        shell.kill()
        shell.wait()
        orphan = scan.examine([pid])[pid]
        assert orphan.is_lost
        assert orphan.process.cgroup == SERVICE
        policy = Policy(protected_units=frozenset(("guarded.service",)))
        assert policy.protection(orphan.process) == "runs in guarded.service, which [protect] units names"
