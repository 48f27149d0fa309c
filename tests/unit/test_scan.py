"""What a scan finds out about those whom a pool has left behind, and of whom it reads the memory again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from reaperd import signatures
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import ProcFS, Stat
from reaperd.marks import MarkReader
from reaperd.memory import Memory, MemoryReader, Wish
from reaperd.policy import Policy
from reaperd.scan import Scan

WORKER = "from multiprocessing.spawn import spawn_main\nimport time; print('up', flush=True); time.sleep(60)"
UNIT = "/system.slice/guarded.service"


class Grouped(ProcFS):
    """Puts everybody into one cgroup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def cgroup(self, pid: int) -> str:
        del pid
        return self._text


class Dying(ProcFS):
    """Shows one process as it was, who has children no more."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: Stat | None = None

    def stat(self, pid: int) -> Stat:
        return self.shown if self.shown is not None and self.shown.id.pid == pid else super().stat(pid)


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
        f"0::{UNIT}\n",
        f"2:memory:/\n1:name=systemd:{UNIT}\n0::{UNIT}\n",
        f"2:memory:/\n1:name=systemd:{UNIT}\n0::/\n",
    ],
)
def test_an_orphan_in_a_protected_unit_is_protected_whichever_hierarchy_tells(text: str) -> None:
    proc = Grouped(text)
    scan = Scan(proc, MarkReader(proc))
    with worker_of_a_shell() as (pid, shell):
        (worker,) = scan.examine([pid]).values()
        assert not worker.is_lost
        shell.kill()
        shell.wait()
        (orphan,) = scan.examine([pid]).values()
        assert orphan.is_lost
        assert orphan.process.cgroup == UNIT
        policy = Policy(protected_units=frozenset(("guarded.service",)))
        assert policy.protection(orphan.process) == "runs in guarded.service, which [protect] units names"


DAEMON = """from multiprocessing.spawn import spawn_main
import os, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
print(os.getpid(), flush=True)
time.sleep(60)"""


def test_what_a_worker_puts_into_the_background_is_no_worker() -> None:
    """Its command line is that of the worker that has forked it, and init has adopted it."""
    with subprocess.Popen([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        pidfd = os.pidfd_open(pid)
        try:
            assert worker.wait() == 0
            proc = ProcFS()
            scan = Scan(proc, MarkReader(proc))
            for found in (scan.look(), scan.examine([pid]).values()):
                for one in found:
                    assert one.id.pid != pid or one.signature is None or not one.signature.certain
            assert pid in {id_.pid for id_ in scan.examine([pid])}
        finally:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


# -- whose memory is read again -------------------------------------------------------------------

SERVICE = os.getpid()  # whose owner the kernel tells; all else about it is made up


class Asked(MemoryReader):
    """Remembers of whom memory was to be read."""

    def __init__(self, proc: ProcFS) -> None:
        super().__init__(proc)
        self.pids: list[int] = []

    def read(self, wishes: Iterable[Wish], alarm: Alarm | None = None) -> dict[int, Memory]:
        wishes = list(wishes)
        self.pids += [wish.stat.id.pid for wish in wishes]
        return super().read(wishes, alarm)


class Host:
    """A /proc of init and one service of its, an interpreter that bears no signature."""

    def __init__(self, root: Path) -> None:
        self.root = root
        proc = ProcFS(str(root))
        marks = MarkReader(proc)
        marks.memory = self.asked = Asked(proc)
        self.scan = Scan(proc, marks)
        self.become(1, "systemd", ppid=0)
        self.become(SERVICE, "python3")
        (root / "1/task/1/children").write_text(str(SERVICE))

    def become(
        self, pid: int, comm: str, *, ppid: int = 1, ticks: int = 10, image: int = 1, environ: str = ""
    ) -> None:
        rest = [0] * 49
        rest[0], rest[18], rest[24] = ppid, ticks, image
        task = self.root / f"{pid}/task/{pid}"
        task.mkdir(parents=True, exist_ok=True)
        (self.root / f"{pid}/stat").write_text(f"{pid} ({comm}) S " + " ".join(map(str, rest)))
        (self.root / f"{pid}/status").write_text("Name:\t\nUid:\t0\t0\t0\t0\n")  # before Linux 6.13
        (self.root / f"{pid}/cgroup").write_text("0::/\n")
        (task / "cmdline").write_text(f"{comm}\0service.py\0")
        (task / "environ").write_text(f"HOME=/\0{environ}\0")

    def asked_for(self) -> int:
        """Look, and return how often the service's memory was read for that."""
        self.asked.pids.clear()
        self.scan.look()
        return self.asked.pids.count(SERVICE)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_service_in_python_is_not_read_again_while_it_stays_what_it_is(host: Host) -> None:
    assert host.asked_for() > 0
    assert host.asked_for() == 0
    assert host.asked_for() == 0


@pytest.mark.parametrize(
    "changed", [{"image": 2}, {"ticks": 11}, {"comm": "python3 serving"}], ids=["program", "pid", "title"]
)
def test_one_that_becomes_something_else_is_read_again(host: Host, changed: dict[str, str]) -> None:
    host.asked_for()
    host.become(SERVICE, **{"comm": "python3", **changed})  # type: ignore[arg-type]
    assert host.asked_for() > 0


def test_one_whose_program_cannot_be_told_is_read_at_every_look(host: Host) -> None:
    host.become(SERVICE, "python3", image=0)
    host.asked_for()
    assert host.asked_for() > 0


def test_one_is_read_again_when_other_signatures_are_looked_for(host: Host) -> None:
    host.asked_for()
    host.scan.heed((signatures.SIGNATURES[0],))
    assert host.asked_for() > 0


def test_one_that_becomes_a_rank_is_a_suspect(host: Host) -> None:
    assert host.scan.look() == []
    host.become(SERVICE, "python3", image=2, environ=f"{signatures.TORCHRUN_VARIABLE}=7")
    (suspect,) = host.scan.look()
    assert suspect.framework == "torchrun"


def test_a_parent_seen_in_the_middle_of_its_end_is_told_as_the_lost_one_once_it_is_dead() -> None:
    proc = Dying()
    scan = Scan(proc, MarkReader(proc))
    with worker_of_a_shell() as (pid, shell):
        scan.look()
        parent = proc.stat(shell.pid)
        proc.shown = parent
        shell.kill()
        shell.wait()
        assert [one.lost_parent for one in scan.look() if one.id.pid == pid] == [None]
        proc.shown = None
        assert [one.lost_parent for one in scan.look() if one.id.pid == pid] == [parent.id]
