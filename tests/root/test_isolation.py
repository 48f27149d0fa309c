"""Sessions with a control group of their own, made by a real systemd: nothing that was started in one is lost or mistaken."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bootedsystem
import pytest
from bootedsystem import BootedSystem, BootError

pytestmark = pytest.mark.needs_root

CONFIG = "/etc/reaper/reaper.toml"
USER, UID = "trainer", 4321
PYTHON = "/opt/reaper/bin/python"
SLICE = f"/user.slice/user-{UID}.slice"
GONE_WITHIN_S = 20.0

# train.py SAID HOW [SECONDS]: registers, starts what no mark tells, and says who all of them are.
TRAIN = """
import json, multiprocessing, os, subprocess, sys, time, warnings
from multiprocessing import shared_memory
import agent

said, how, *rest = sys.argv[1:]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    session = agent.register(name=how, required=True, isolate=how != "by-config")
    if how == "again":
        agent.unregister()
        session = agent.register(name=how, required=True, isolate=True)
told = [str(one.message) for one in caught]

def start(script, **options):
    # Nothing inherits the page or the stamp, and nobody stands above: only the control group tells.
    command = ["env", "-i", "PATH=/usr/bin:/bin", "setsid", "sh", "-c", script]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)

pids = []
for _ in range(2):
    hidden = start("sleep 600 >/dev/null & echo $!")
    pids.append(int(hidden.stdout.readline()))
    hidden.wait()
deaf = start("trap '' TERM; (trap '' TERM; while :; do sleep 0.05; done) >/dev/null & echo $!")
pids.append(int(deaf.stdout.readline()))
deaf.wait()
pids.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
segment = shared_memory.SharedMemory(create=True, size=2**20)
from multiprocessing import resource_tracker
tracker = resource_tracker._resource_tracker._pid
spared = 0
if "spared" in how:
    with agent.spared():
        spared = subprocess.Popen(["sleep", "600"]).pid
if "unregistered" in how:
    agent.unregister()
    pids = [subprocess.Popen(["sleep", "600"]).pid]
if "nested" in how:
    inner = subprocess.Popen([sys.executable, "-c", (
        "import agent, subprocess, time; s = agent.register('inner', isolate=True, required=True); "
        "p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); time.sleep(600)")],
        stdout=subprocess.PIPE, text=True)
    pids += [inner.pid, int(inner.stdout.readline())]
note = {"leader": os.getpid(), "pids": pids, "tracker": tracker, "segment": segment.name, "spared": spared,
        "session": session.id, "isolated": session.isolated, "why": session.not_isolated, "told": told}
with open(said + ".new", "w") as file:
    json.dump(note, file)
os.rename(said + ".new", said)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def system(installation: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedSystem]:
    stage = tmp_path_factory.mktemp("stage")
    shutil.copytree(installation, stage, symlinks=True, dirs_exist_ok=True)
    script = stage / "srv/train.py"
    script.parent.mkdir()
    script.write_text(TRAIN)
    (stage / "usr/local/lib/sysusers.d/trainer.conf").write_text(f"u {USER} {UID} - /srv/{USER} /bin/sh\n")
    try:
        with bootedsystem.boot(stage) as booted:
            booted.run("systemd-sysusers")
            booted.run("install", "-d", "-o", USER, "-g", USER, "-m", "0700", f"/srv/{USER}")
            yield booted
    except BootError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def unit(system: BootedSystem) -> Iterator[BootedSystem]:
    config = system.path(CONFIG)
    before = config.read_text()
    config.write_text("[kill]\ngrace = 1\n")
    system.run("systemctl", "start", "reaperd.service")
    yield system
    system.run("systemctl", "stop", "reaperd.service")
    config.write_text(before)


def cgroup(system: BootedSystem, pid: int) -> str:
    """Return the control group of a process, as the system itself sees it."""
    lines = system.run("cat", f"/proc/{pid}/cgroup").stdout.splitlines()
    return next(line for line in lines if line.startswith("0::")).removeprefix("0::")


@dataclass
class Training:
    """A leader of USER's, and all whom it has started: by pid in the system, and by pidfd."""

    system: BootedSystem
    note: dict[str, Any]
    fds: dict[int, int]

    @property
    def scope(self) -> str:
        return cgroup(self.system, self.note["leader"])

    def kill_leader(self) -> None:
        signal.pidfd_send_signal(self.fds[self.note["leader"]], signal.SIGKILL)

    def has_ended(self, pid: int, within_s: float = 0.0) -> bool:
        poll = select.poll()
        poll.register(self.fds[pid], select.POLLIN)
        return bool(poll.poll(within_s * 1000))

    def left(self, within_s: float = GONE_WITHIN_S) -> list[int]:
        """Return which of the workers still live ``within_s`` from now."""
        end_s = time.monotonic() + within_s
        return [
            pid for pid in self.note["pids"] if not self.has_ended(pid, max(0.0, end_s - time.monotonic()))
        ]


@contextlib.contextmanager
def training(
    system: BootedSystem, how: str, *, where: tuple[str, ...] = (), before: str = "true"
) -> Iterator[Training]:
    """Start a training the way a login's shell would: in the scope of a session of USER's, by default."""
    said = system.path(f"/tmp/said-{time.monotonic_ns()}")
    number = time.monotonic_ns()
    where = where or ("--scope", f"--slice=user-{UID}.slice", f"--unit=session-{number}.scope")
    command = f"{before}; exec setsid {PYTHON} /srv/train.py /tmp/{said.name} {how} </dev/null >/tmp/{said.name}.log 2>&1"
    if "--scope" in where:
        command = f"({command}) &"
    system.run("systemd-run", "--quiet", f"--uid={USER}", *where, "sh", "-c", command)
    system.until(said.exists, f"the training starts: {system.path(f'/tmp/{said.name}.log')}", within_s=20)
    with held(system, json.loads(said.read_text())) as one:
        yield one


@contextlib.contextmanager
def held(system: BootedSystem, note: dict[str, Any]) -> Iterator[Training]:
    """Hold a pidfd of all whom a training has named, and end what is left of them afterwards."""
    pids = [note["leader"], *note["pids"], note["tracker"], *([note["spared"]] if note["spared"] else [])]
    here = {pid: system.pid_here(pid) for pid in pids}
    fds = {pid: os.pidfd_open(one) for pid, one in here.items() if one is not None}
    one = Training(system, note, fds)
    try:
        assert fds.keys() == set(pids)
        yield one
    finally:
        for fd in fds.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        for pid in fds:
            assert one.has_ended(pid, 5)
        for fd in fds.values():
            os.close(fd)


def journal(system: BootedSystem) -> str:
    return system.run("journalctl", "--unit=reaperd.service", "--no-pager", "--output=cat").stdout


def test_a_leader_is_moved_into_a_scope_of_its_users_slice(unit: BootedSystem) -> None:
    with training(unit, "plain") as one:
        assert (one.note["isolated"], one.note["told"]) == (True, [])
        assert Path(one.scope).parent == Path(SLICE)
        name = Path(one.scope).name
        assert name.startswith(f"reaper-{UID}-{one.note['session']}-")
        for pid in (*one.note["pids"], one.note["tracker"]):
            assert cgroup(unit, pid) == one.scope
        shown = unit.show(name, "Delegate", "PartOf", "ActiveState", "TasksMax", "Description")
        assert shown["Delegate"] == "yes"
        assert shown["PartOf"].startswith("session-")
        assert shown["ActiveState"] == "active"
        assert one.note["session"] in shown["Description"]
        told = json.loads(unit.run("reaperctl", "ps", "--json").stdout)
        assert [session["isolated"] for session in told if session["id"] == one.note["session"]] == [True]


@pytest.mark.parametrize("held_to", ["IPAddressDeny=any", "RuntimeMaxSec=600", "DevicePolicy=closed"])
def test_nobody_is_moved_out_of_what_a_scope_is_held_to(unit: BootedSystem, held_to: str) -> None:
    """No file of the scope's control group tells of it."""
    name = f"session-{time.monotonic_ns()}.scope"
    where = ("--scope", f"--slice=user-{UID}.slice", f"--unit={name}", f"--property={held_to}")
    with training(unit, "plain", where=where) as one:
        assert one.scope == f"{SLICE}/{name}"
        assert held_to.partition("=")[0].removesuffix("Sec") in one.note["why"]


def test_a_later_session_of_a_leader_is_stopped_with_its_login_too(unit: BootedSystem) -> None:
    with training(unit, "again") as one:
        parts = unit.show(Path(one.scope).name, "PartOf")["PartOf"].split()
        assert sorted(part.partition("-")[0] for part in parts) == ["reaper", "session"]
        unit.run("systemctl", "stop", *(part for part in parts if part.startswith("session-")))
        assert one.has_ended(one.note["leader"], GONE_WITHIN_S)


def test_whom_no_mark_tells_ends_with_the_leader_and_the_tracker_last(unit: BootedSystem) -> None:
    with training(unit, "plain") as one:
        scope = unit.path(f"/sys/fs/cgroup{one.scope}")
        segment = unit.path(f"/dev/shm/{one.note['segment']}")
        assert segment.exists()
        one.kill_leader()
        assert one.left() == []
        assert one.has_ended(one.note["tracker"], GONE_WITHIN_S)
        unit.until(lambda: not segment.exists(), "the tracker unlinks what it guards")
        unit.until(lambda: not scope.exists(), "systemd takes the empty scope away")
        (event,) = ends(unit, one)
        by_pid = {process["pid"]: process for process in event["processes"]}
        assert by_pid.keys() == {*one.note["pids"], one.note["tracker"]} | later(by_pid, one)
        assert by_pid[one.note["tracker"]]["signals"] == []
        hidden = by_pid[one.note["pids"][0]]
        assert hidden["evidence"] == ["runs in the control group that was made for the session"]
        assert hidden["signals"][0] == "SIGTERM"
        assert by_pid[one.note["pids"][2]]["signals"] == ["SIGTERM", "SIGKILL"]


def ends(system: BootedSystem, one: Training) -> list[dict[str, Any]]:
    """Return the events that tell how the session ended."""
    session = one.note["session"]

    def found() -> list[dict[str, Any]]:
        lines = system.run("reaperctl", "events", "--json").stdout.splitlines()
        events = [json.loads(line) for line in lines]
        return [
            event for event in events if event["session"] == session and event["kind"] in ("reaped", "ended")
        ]

    system.until(lambda: bool(found()), "the session is over")
    return found()


def later(by_pid: dict[int, Any], one: Training) -> set[int]:
    """Return who was started by the deaf shell: its sleeps, the first of which may live on when the training says who is there."""
    deaf = one.note["pids"][2]
    return {pid for pid in by_pid if pid > deaf}


def test_what_was_spared_lives_on_in_the_scope_of_a_dead_session(unit: BootedSystem) -> None:
    with training(unit, "spared") as one:
        scope = one.scope
        one.kill_leader()
        assert one.left() == []
        ends(unit, one)
        assert not one.has_ended(one.note["spared"])
        assert cgroup(unit, one.note["spared"]) == scope
        frozen = unit.path(f"/sys/fs/cgroup{scope}/cgroup.freeze").read_text()
        assert frozen == "0\n"


def test_what_a_leader_starts_after_it_has_unregistered_is_its_own(unit: BootedSystem) -> None:
    with training(unit, "unregistered") as one:
        assert cgroup(unit, one.note["pids"][0]) == one.scope
        one.kill_leader()
        ends(unit, one)
        assert one.left(within_s=0) == one.note["pids"]


def test_a_daemon_that_was_killed_knows_the_scope_when_it_comes_back(unit: BootedSystem) -> None:
    with training(unit, "plain") as one:
        pid = unit.show("reaperd.service", "MainPID")["MainPID"]
        unit.run("systemctl", "stop", "reaperd.service")
        assert pid != "0"
        one.kill_leader()
        unit.run("systemctl", "start", "reaperd.service")
        assert one.left() == []


def test_a_daemon_that_lost_its_state_knows_the_scope_by_its_name(unit: BootedSystem) -> None:
    with training(unit, "plain") as one:
        unit.run("systemctl", "stop", "reaperd.service")
        for name in ("reaper.db", "reaper.db-wal", "reaper.db-shm"):
            unit.path(f"/var/lib/reaper/{name}").unlink(missing_ok=True)
        one.kill_leader()
        unit.run("systemctl", "start", "reaperd.service")
        assert one.left() == []


def test_a_worker_that_leads_an_isolated_session_of_its_own_goes_with_the_outer_one(
    unit: BootedSystem,
) -> None:
    with training(unit, "nested") as one:
        inner = one.note["pids"][-2]
        assert cgroup(unit, inner) != one.scope
        assert f"reaper-{UID}-{inner}-" in cgroup(unit, inner)
        one.kill_leader()
        assert one.left() == []


def test_stopping_what_the_leader_came_from_stops_its_scope(unit: BootedSystem) -> None:
    with training(unit, "plain") as one:
        of = unit.show(Path(one.scope).name, "PartOf")["PartOf"]
        unit.run("systemctl", "stop", of)
        assert one.left() == []
        assert one.has_ended(one.note["leader"], 5)


def test_what_is_part_of_a_service_stays_there_and_is_told_why(unit: BootedSystem) -> None:
    with training(unit, "service", where=("--property=KillMode=process",)) as one:
        assert not one.note["isolated"]
        assert one.scope.startswith("/system.slice/run-")
        assert "whoever put it there counts on it to stay" in one.note["why"]
        (told,) = one.note["told"]
        assert one.note["why"] in told
        assert f"not isolated session={one.note['session']}" in journal(unit)
        one.kill_leader()
        # As before: its marks are known, and what scrubbed them is not.
        marked = one.note["pids"][-1]
        assert one.has_ended(marked, GONE_WITHIN_S)


def test_every_session_is_isolated_where_the_configuration_says_so(unit: BootedSystem) -> None:
    unit.path(CONFIG).write_text("[kill]\ngrace = 1\n[sessions]\nisolate = true\n")
    unit.run("systemctl", "reload", "reaperd.service")
    with training(unit, "by-config") as one:
        assert (one.note["isolated"], one.note["told"]) == (True, [])
        one.kill_leader()
        assert one.left() == []
    with training(unit, "by-config", where=("--property=KillMode=process",)) as one:
        assert (one.note["isolated"], one.note["told"]) == (False, [])


@pytest.fixture
def job(unit: BootedSystem) -> Iterator[str]:
    """A control group with a memory limit, in the hierarchy of version 1: the booted system's own has no controllers."""
    root = "/run/memory"
    unit.run("mkdir", root)
    if unit.run("mount", "-t", "cgroup", "-o", "memory", "cgroup", root, check=False).returncode:
        unit.run("rmdir", root)
        pytest.skip("there is no memory controller of version 1")
    unit.run("mkdir", f"{root}/job")
    unit.run("sh", "-c", f"echo 1G >{root}/job/memory.limit_in_bytes; chown {USER} {root}/job/cgroup.procs")
    yield f"{root}/job"
    unit.until(
        lambda: unit.run("rmdir", f"{root}/job", check=False).returncode == 0, "the group can be removed"
    )
    unit.run("umount", root)
    unit.run("rmdir", root)


def test_nobody_leaves_a_limit_that_was_set_for_him(unit: BootedSystem, job: str) -> None:
    unit.run("systemctl", "restart", "reaperd.service")  # it was started before there was that hierarchy
    with training(unit, "plain", before=f"echo 0 >{job}/cgroup.procs") as one:
        assert not one.note["isolated"]
        assert one.note["why"] == "it would leave a limit: memory.limit_in_bytes of /job is '1073741824'"
        assert Path(one.scope).name.startswith("session-")
        one.kill_leader()
        ends(unit, one)


def test_a_dry_run_moves_nobody(unit: BootedSystem) -> None:
    unit.path(CONFIG).write_text("[kill]\ndry_run = true\n")
    unit.run("systemctl", "reload", "reaperd.service")
    with training(unit, "plain") as one:
        assert "dry_run" in one.note["why"]
        assert Path(one.scope).name.startswith("session-")


def test_a_command_is_run_in_a_scope_and_its_supervisor_stays_outside(unit: BootedSystem) -> None:
    run = (
        "reaperctl",
        "run",
        "--isolate",
        "--name",
        "isolated",
        "--",
        "sh",
        "-c",
        "cat /proc/self/cgroup; exit 7",
    )
    where = ("--quiet", "--scope", f"--slice=user-{UID}.slice", f"--unit=session-{time.monotonic_ns()}.scope")
    done = unit.run("systemd-run", *where, f"--uid={USER}", *run, check=False)
    assert done.returncode == 7, done.stderr
    assert f"0::{SLICE}/reaper-{UID}-" in done.stdout
    assert "control group" not in done.stderr


def test_a_user_s_own_daemon_asks_the_user_s_own_systemd(system: BootedSystem) -> None:
    system.run("loginctl", "enable-linger", USER)
    runtime = f"/run/user/{UID}"
    environment = ("env", f"XDG_RUNTIME_DIR={runtime}", f"HOME=/srv/{USER}")
    system.until(system.path(f"{runtime}/systemd/private").exists, "the user's manager starts")
    try:
        system.run(*environment, "systemctl", "--user", "start", "reaperd.service", user=USER)
        run = ("reaperctl", "run", "--isolate", "--", "cat", "/proc/self/cgroup")
        done = system.run(*environment, "systemd-run", "--user", "--scope", "--quiet", *run, user=USER)
        manager = f"{SLICE}/user@{UID}.service"
        assert f"0::{manager}/app.slice/reaper-{UID}-" in done.stdout, done.stderr
        said = f"/srv/{USER}/said"
        script = ("sh", "-c", f"exec setsid {PYTHON} /srv/train.py {said} plain </dev/null >/dev/null 2>&1 &")
        system.run(*environment, "systemd-run", "--user", "--scope", "--quiet", *script, user=USER)
        system.until(system.path(said).exists, "the training starts", within_s=20)
        with held(system, json.loads(system.path(said).read_text())) as one:
            assert one.note["isolated"], one.note["why"]
            assert one.scope.startswith(f"{manager}/app.slice/reaper-")
            one.kill_leader()
            assert one.left() == []
        system.run(*environment, "systemctl", "--user", "stop", "reaperd.service", user=USER)
    finally:
        system.run("loginctl", "disable-linger", USER)
        system.run("systemctl", "stop", f"user@{UID}.service")
