"""Fixtures that start real processes, and the one that fails any test which leaves something behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import harness
import pytest
from harness import Cgroup, Daemon, Leader, Scratch

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

LEFT_WITHIN_S = 3.0  # what is on its way out when a test ends has this long to be gone

logs_key = pytest.StashKey[list[tuple[str, Callable[[], str]]]]()
leaders_key = pytest.StashKey[list[Leader]]()
failed_key = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs_root: the test becomes another user, or makes a cgroup or a mount"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_root") and os.geteuid() != 0:
        pytest.skip("needs root: it becomes another user, or makes a cgroup or a mount")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[failed_key] = True
        for title, read in item.stash.get(logs_key, []):
            report.sections.append((title, read()))
    return report


@pytest.fixture(autouse=True)
def run(request: pytest.FixtureRequest) -> Iterator[str]:
    """The mark of every process that this test starts; nothing of it may be left when the test ends."""
    mark = uuid.uuid4().hex[:12]
    shm, mounts = harness.list_shm(), harness.list_mounts()
    os.environ[harness.RUN_MARK] = mark  # for whatever the test starts without our help
    yield mark
    del os.environ[harness.RUN_MARK]
    if "unit" in request.path.parts and not harness.children_of(os.getpid()):
        return  # a unit test starts nothing; there are too many of them to look at every process after each
    faults = []
    left = harness.wait_gone(harness.marked(harness.RUN_MARK, mark), LEFT_WITHIN_S)
    left += [pid for pid in harness.marked(harness.RUN_MARK, mark) if pid not in left]
    if left:
        faults.append(f"processes left behind:\n{harness.describe(left)}")
    harness.end_leftovers(left, mark)
    ours = {entry for leader in request.node.stash.get(leaders_key, []) for entry in leader.shm}
    if entries := harness.shm_left(shm, ours, mark, LEFT_WITHIN_S):
        faults.append(f"left in /dev/shm: {entries}")
    if harness.list_mounts() != mounts:
        faults.append(f"mounts changed: {set(harness.list_mounts()) ^ set(mounts)}")
    if groups := harness.list_cgroups(mark):
        faults.append(f"cgroups left behind: {sorted(groups)}")
    if faults and not request.node.stash.get(failed_key, False):
        pytest.fail("\n".join(faults), pytrace=False)


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    directory = Scratch()
    yield directory
    directory.remove()


def _keep_log(request: pytest.FixtureRequest, title: str, read: Callable[[], str]) -> None:
    request.node.stash.setdefault(logs_key, []).append((title, read))


@pytest.fixture
def start_daemon(request: pytest.FixtureRequest, run: str, scratch: Scratch) -> Iterator[StartDaemon]:
    """Start a daemon, ready when this returns; ``started=False`` leaves that to the test."""
    with contextlib.ExitStack() as stack:

        def start(*options: str, started: bool = True, **settings: Any) -> Daemon:
            daemon = Daemon(scratch, run, **settings)
            stack.callback(daemon.close)
            _keep_log(request, f"log of the daemon on {daemon.socket}", daemon.read_log)
            return daemon.start(*options) if started else daemon

        yield start


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> Daemon:
    return start_daemon()


@pytest.fixture
def start_leader(request: pytest.FixtureRequest, run: str, scratch: Scratch) -> Iterator[StartLeader]:
    """Start a training script; all it starts is up when this returns."""
    with contextlib.ExitStack() as stack:

        def start(script: str, *arguments: str, up: bool = True, **settings: Any) -> Leader:
            if harness.interpreter_for(settings.get("uid")) is None:
                pytest.skip(f"uid {settings['uid']} may not execute any Python of this version")
            leader = Leader(scratch, run, script, *arguments, **settings)
            stack.callback(leader.close)
            request.node.stash.setdefault(leaders_key, []).append(leader)
            _keep_log(request, f"stderr of {script} {' '.join(arguments)}", leader.read_log)
            return leader.up() if up else leader

        yield start


@pytest.fixture
def start_process(run: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process that the test wants to live: it is ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(command: Sequence[str], **more: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                command,
                env=harness.test_environment(run, **more),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def unified_cgroup(run: str) -> Iterator[Callable[[str], Cgroup]]:
    """Make a control group on the unified hierarchy, removed with the test."""
    root = next((path for path in harness.CGROUP_ROOTS if os.path.exists(f"{path}/cgroup.controllers")), None)
    yield from _cgroups(root, "no unified cgroup hierarchy is mounted here", run)


@pytest.fixture
def memory_cgroup(run: str) -> Iterator[Callable[[str], Cgroup]]:
    """Make a control group whose memory can be limited, removed with the test."""
    root = "/sys/fs/cgroup/memory"
    if not os.path.exists(f"{root}/memory.limit_in_bytes"):
        root = next((path for path in harness.CGROUP_ROOTS if _gives_memory(path)), "")
    yield from _cgroups(root or None, "no memory cgroup controller is mounted here", run)


def _gives_memory(path: str) -> bool:
    try:
        with open(f"{path}/cgroup.subtree_control", encoding="ascii") as file:
            return "memory" in file.read().split()
    except OSError:
        return False


def _cgroups(root: str | None, reason: str, run: str) -> Iterator[Callable[[str], Cgroup]]:
    if root is None:
        pytest.skip(reason)
    if not os.access(root, os.W_OK):
        pytest.skip(f"{root} cannot be written to")
    with contextlib.ExitStack() as stack:

        def make(name: str) -> Cgroup:
            group = Cgroup(root, f"{run}-{name}")
            stack.callback(group.remove)
            return group

        yield make
