"""Control groups: who is in one, the limits that somebody would leave, and what is done to all in one, on the kernel's own."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bootedsystem import BootError, end_group, unified_hierarchy

from reaperd.linux.cgroups import CGroups, is_gone, parse_hierarchies, parse_memberships
from reaperd.linux.procfs import ProcFS
from reaperd.model import ProcessId
from reaperd.reaper import Reaper

MOUNTS = (
    "cgroup2 {root}/unified cgroup2 rw 0 0\n"
    "cgroup {root}/memory cgroup rw,relatime,memory 0 0\n"
    "cgroup {root}/cpu cgroup rw,cpu,cpuacct 0 0\n"
    "cgroup {root}/pids cgroup rw,pids 0 0\n"
)
SLICE = "/user.slice/user-1000.slice"
LOGIN = f"{SLICE}/session-3.scope"


class Files:
    """Folders that look like mounted hierarchies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "mounts").write_text(MOUNTS.format(root=root))
        self.cgroups = CGroups(str(root / "mounts"))

    def write(self, name: str, text: str) -> None:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# -- parsing ----------------------------------------------------------------------------------------


def test_the_first_mount_of_each_hierarchy_counts() -> None:
    told = parse_hierarchies(MOUNTS.format(root="/c") + MOUNTS.format(root="/other"))
    assert told[""] == "/c/unified"
    assert (told["memory"], told["cpu"], told["cpuacct"]) == ("/c/memory", "/c/cpu", "/c/cpu")


def test_memberships_are_read_with_colons_in_names_and_without_nonsense() -> None:
    text = "4:memory:/a:b\n0::/user.slice/x\f\n1:name=systemd:/c\nnonsense\n2:half\n"
    assert parse_memberships(text) == [
        ("memory", "/a:b"),
        ("", "/user.slice/x\f"),
        ("name=systemd", "/c"),
    ]


# -- limits -----------------------------------------------------------------------------------------


def test_who_is_limited_nowhere_leaves_no_limit(files: Files) -> None:
    files.write(f"unified{LOGIN}/memory.max", "max\n")
    files.write(f"unified{LOGIN}/cpu.max", "max 100000\n")
    files.write(f"unified{LOGIN}/io.max", "")
    files.write(f"memory{LOGIN}/memory.limit_in_bytes", "9223372036854771712\n")
    files.write(f"cpu{LOGIN}/cpu.cfs_quota_us", "-1\n")
    text = f"3:memory:{LOGIN}\n2:cpu,cpuacct:{LOGIN}\n0::{LOGIN}\n"
    assert files.cgroups.limits_left(text, SLICE) == ""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (f"unified{LOGIN}/memory.max", "1073741824"),
        (f"unified{LOGIN}/memory.high", "1073741824"),
        (f"unified{LOGIN}/cpu.max", "50000 100000"),
        (f"unified{LOGIN}/cpuset.cpus", "0-1"),
        (f"unified{LOGIN}/io.max", "8:0 rbps=1048576 wbps=max"),
        (f"memory{LOGIN}/memory.limit_in_bytes", "1073741824"),
        (f"cpu{LOGIN}/cpu.cfs_quota_us", "50000"),
    ],
)
def test_a_limit_that_would_be_left_is_named(files: Files, name: str, told: str) -> None:
    files.write(name, f"{told}\n")
    text = f"3:memory:{LOGIN}\n2:cpu,cpuacct:{LOGIN}\n0::{LOGIN}\n"
    assert files.cgroups.limits_left(text, SLICE) == f"{Path(name).name} of {LOGIN} is {told!r}"


def test_limits_between_count_and_those_that_stay_in_force_do_not(files: Files) -> None:
    deep = f"{SLICE}/user@1000.service/app.slice/x.scope"
    files.write(f"unified{SLICE}/memory.max", "1\n")
    files.write("unified/user.slice/memory.max", "1\n")
    assert files.cgroups.limits_left(f"0::{deep}\n", SLICE) == ""
    files.write(f"unified{SLICE}/user@1000.service/memory.max", "5\n")
    assert f"of {SLICE}/user@1000.service is '5'" in files.cgroups.limits_left(f"0::{deep}\n", SLICE)
    files.write("memory/elsewhere/memory.limit_in_bytes", "7\n")
    assert "of /elsewhere is '7'" in files.cgroups.limits_left("3:memory:/elsewhere/below\n0::/\n", SLICE)


def test_as_many_processes_may_be_had_in_the_new_group_as_in_the_old(files: Files) -> None:
    assert files.cgroups.most_tasks(f"0::{LOGIN}\n", SLICE) is None
    files.write(f"unified{LOGIN}/pids.max", "max\n")
    assert files.cgroups.most_tasks(f"0::{LOGIN}\n", SLICE) is None
    files.write(f"pids{LOGIN}/pids.max", "4915\n")
    assert files.cgroups.most_tasks(f"5:pids:{LOGIN}\n0::{LOGIN}\n", SLICE) == 4915


def test_nor_more_than_any_group_allows_that_the_new_one_is_not_below(files: Files) -> None:
    service = f"{SLICE}/user@1000.service"
    files.write(f"unified{SLICE}/pids.max", "3\n")  # the new one is below that
    files.write(f"unified{service}/pids.max", "50\n")
    files.write(f"unified{service}/app.slice/x.scope/pids.max", "60\n")
    assert files.cgroups.most_tasks(f"0::{service}/app.slice/x.scope\n", SLICE) == 50


# -- who is in one ----------------------------------------------------------------------------------


def test_all_in_a_group_and_below_it_are_its_residents_but_those_of_other_namespaces(files: Files) -> None:
    files.write("unified/s.scope/cgroup.procs", "7\n0\n8\n")
    files.write("unified/s.scope/below/cgroup.procs", "9\n")
    assert files.cgroups.residents("/s.scope") == {0, 7, 8, 9}
    assert files.cgroups.residents_of_one("/s.scope") == {0, 7, 8}
    assert files.cgroups.residents("/gone.scope") == set()


def test_a_path_from_outside_of_our_namespace_is_no_path(files: Files) -> None:
    files.write("secret/cgroup.procs", "7\n")
    assert files.cgroups.residents("/../secret") == set()
    with pytest.raises(FileNotFoundError):
        files.cgroups.kill("/../secret")


# -- the kernel's own -------------------------------------------------------------------------------


class Group:
    """A real control group with sleepers in it."""

    def __init__(self, path: Path, mounted: Path) -> None:
        self.path = path
        self.name = f"/{path.relative_to(mounted)}"
        self.cgroups = CGroups()
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, command: str = "exec sleep 600", *, before: str = ":") -> ProcessId:
        """Run ``before``, and then, in the group, ``command``; return when it is in there."""
        enter = f'{before}; echo $$ >"{self.path}/cgroup.procs"; {command}'
        process = subprocess.Popen(["sh", "-c", enter], stdin=subprocess.DEVNULL)
        self.started.append(process)
        while process.pid not in self.cgroups.residents(self.name):
            assert process.poll() is None, "it cannot enter the group"
            select.select((), (), (), 0.001)
        return ProcFS().stat(process.pid).id


@pytest.fixture
def group() -> Iterator[Group]:
    if os.geteuid() != 0:
        pytest.skip("needs root: it makes a control group")
    try:
        mounted = unified_hierarchy()
    except BootError as reason:
        pytest.skip(str(reason))
    path = mounted / f"reaper-test-{os.getpid()}"
    path.mkdir()
    one = Group(path, mounted)
    try:
        yield one
    finally:
        if path.exists():
            end_group(path)
        for process in one.started:
            process.wait(5)


def has_ended(process: ProcessId, within_s: float = 5.0) -> bool:
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(process.pid)
        try:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            return bool(poll.poll(within_s * 1000))
        finally:
            os.close(handle)
    return True


def test_who_is_frozen_holds_still_until_it_is_thawed(group: Group) -> None:
    # What ends somebody at once ends who is frozen, too: it is caught before that.
    one = group.start("while :; do sleep 0.01; done", before="trap 'exit 3' TERM")
    group.cgroups.freeze(group.name)
    assert group.cgroups.wait_frozen(group.name, time.monotonic() + 5)
    os.kill(one.pid, signal.SIGTERM)
    assert not has_ended(one, within_s=0.05)
    group.cgroups.thaw(group.name)
    assert has_ended(one)


def test_all_in_a_group_are_killed_as_one_where_none_but_the_targets_is_in_it(group: Group) -> None:
    targets = [group.start() for _ in range(2)]
    reaper = Reaper(ProcFS(), frozenset())
    for one in targets:
        reaper.take(one, None)
    reaper.hold_still([group.name, "/gone.scope"])
    assert not reaper.kill_all(group.name, targets[:1]), "somebody else is in it"
    assert not has_ended(targets[0], within_s=0.05)
    assert reaper.kill_all(group.name, targets)
    assert all(map(has_ended, targets))
    assert not reaper.kill_all(group.name, targets), "nobody is in it"
    reaper.let_go_on(group.name)
    for one in targets:
        reaper.drop(one)


class Obstinate(CGroups):
    """Control groups that cannot be thawed as long as there is ``error``."""

    error: int | None = None
    thawed = 0

    def freeze(self, cgroup: str) -> None:
        pass

    def thaw(self, cgroup: str) -> None:
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        self.thawed += 1


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EACCES])
def test_who_cannot_be_thawed_when_it_is_due_is_thawed_later(
    error: int, caplog: pytest.LogCaptureFixture
) -> None:
    cgroups = Obstinate("/nowhere")
    reaper = Reaper(ProcFS(), frozenset(), cgroups)
    reaper.hold_still(["/x.scope"])
    cgroups.error = error
    for _ in range(3):
        reaper.let_go_on("/x.scope")
    assert reaper.thaw_due_s is not None
    reaper.thaw_late(reaper.thaw_due_s)
    reaper.thaw_late(reaper.thaw_due_s - 1)
    assert len(caplog.records) == 1
    cgroups.error = None
    reaper.thaw_late(reaper.thaw_due_s)
    assert (cgroups.thawed, reaper.thaw_due_s) == (1, None)
    reaper.thaw_late(time.monotonic())
    assert cgroups.thawed == 1


@pytest.mark.parametrize("error", [errno.ENOENT, errno.ENODEV, errno.EACCES, errno.ENAMETOOLONG])
def test_a_group_that_is_gone_or_was_never_frozen_by_us_stops_nothing(error: int) -> None:
    cgroups = Obstinate("/nowhere")
    reaper = Reaper(ProcFS(), frozenset(), cgroups)
    cgroups.error = error
    reaper.let_go_on("/x.scope")
    assert reaper.thaw_due_s is None


def test_a_group_that_goes_while_it_is_written_to_is_gone(group: Group) -> None:
    below = group.path / "below"
    below.mkdir()
    with open(below / "cgroup.freeze", "wb", buffering=0) as file:
        below.rmdir()
        with pytest.raises(OSError, match="No such device") as raised:
            file.write(b"0")
    assert is_gone(raised.value)


def test_who_is_in_another_pid_namespace_is_no_target(files: Files) -> None:
    """The kernel shows him as 0, and would kill him with all others."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        one = ProcFS().stat(process.pid).id
        reaper = Reaper(ProcFS(), frozenset(), files.cgroups)
        reaper.take(one, None)
        files.write("unified/s.scope/cgroup.kill", "")
        files.write("unified/s.scope/cgroup.procs", f"0\n{one.pid}\n")
        assert not reaper.kill_all("/s.scope", [one])
        files.write("unified/s.scope/cgroup.procs", f"{one.pid}\n")
        assert reaper.kill_all("/s.scope", [one])
        reaper.drop(one)
    finally:
        process.kill()
        process.wait()


def test_nobody_is_killed_with_a_group_in_the_place_of_a_dead_target_or_of_the_untouchable(
    group: Group,
) -> None:
    dead, living = group.start(), group.start()
    reaper = Reaper(ProcFS(), frozenset((living,)))
    for one in (dead, living):
        reaper.take(one, None)
    os.kill(dead.pid, signal.SIGKILL)
    assert has_ended(dead)
    assert not reaper.kill_all(group.name, [dead, living])
    # As if its pid had been given to the one who is in the group now.
    posing = ProcessId(living.pid, dead.start_ticks)
    assert not reaper.kill_all(group.name, [posing])
    assert not has_ended(living, within_s=0.05)
    for one in (dead, living):
        reaper.drop(one)


def test_a_group_is_made_with_a_process_in_it_or_not_at_all(group: Group) -> None:
    one = group.start()
    group.cgroups.make(f"{group.name}/own", one.pid)
    assert group.cgroups.residents_of_one(f"{group.name}/own") == {one.pid}
    with pytest.raises(OSError, match="No such process"):
        group.cgroups.make(f"{group.name}/none", 2**22 - 1)
    assert not (group.path / "none").exists()
    with pytest.raises(OSError, match="busy"):
        group.cgroups.remove(f"{group.name}/own")
    os.kill(one.pid, signal.SIGKILL)
    assert has_ended(one)
    group.started[0].wait()
    group.cgroups.remove(f"{group.name}/own")
    assert not (group.path / "own").exists()
