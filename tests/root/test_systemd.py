"""The unit under a real systemd: its sandbox lets the daemon do all of its work, and its restarts lose nobody."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import bootedsystem
import pytest
from bootedsystem import BootedSystem, BootError
from staged import make

pytestmark = pytest.mark.needs_root

CONFIG = "/etc/reaper/reaper.toml"
USER = "trainer"
GONE_WITHIN_S = 10.0

# Another user's training: exec'ed and forked workers, and an array in shared memory as joblib leaves it behind.
TRAIN = """
import multiprocessing, os, subprocess, sys, time
import agent
agent.register(name="training", required=True)
folder = f"/dev/shm/joblib_memmapping_folder_{os.getpid()}_0_0"
os.mkdir(folder, 0o700)
with open(f"{folder}/array.pkl", "wb") as array:
    array.write(bytes(2**20))
context = multiprocessing.get_context("fork")
pids = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid for _ in range(2)]
for _ in range(2):
    worker = context.Process(target=time.sleep, args=(600,))
    worker.start()
    pids.append(worker.pid)
with open(sys.argv[1] + ".new", "w") as file:
    print(os.getpid(), *pids, file=file)
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedSystem]:
    stage = tmp_path_factory.mktemp("stage")
    make("install", stage)
    script = stage / "srv/train.py"
    script.parent.mkdir()
    script.write_text(TRAIN)
    user = stage / "usr/local/lib/sysusers.d/trainer.conf"
    user.write_text(f"u {USER} - - /srv/{USER} /bin/sh\n")
    try:
        with bootedsystem.boot(stage) as booted:
            booted.run("systemd-sysusers")
            booted.run("install", "-d", "-o", USER, "-g", USER, "-m", "0700", f"/srv/{USER}")
            booted.run("systemctl", "enable", "reaperd.service")
            yield booted
    except BootError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def unit(system: BootedSystem) -> Iterator[BootedSystem]:
    """The system with the daemon started; afterwards it is stopped, with its settings as they were."""
    config = system.path(CONFIG)
    before = config.read_text()
    system.run("systemctl", "start", "reaperd.service")
    yield system
    system.run("systemctl", "stop", "reaperd.service")
    system.run("systemctl", "reset-failed", "reaperd.service", check=False)
    config.write_text(before)


@dataclass
class Training:
    """Another user's session: its leader as the system numbers it, its workers by pidfd."""

    system: BootedSystem
    leader: int
    workers: list[int]

    def kill_leader(self) -> None:
        self.system.run("kill", "-KILL", str(self.leader))

    def living(self, within_s: float = 0.0) -> int:
        """Return how many workers still live ``within_s`` from now."""
        deadline = time.monotonic() + within_s
        return sum(not _ended(fd, max(0.0, deadline - time.monotonic())) for fd in self.workers)

    def folder(self) -> Path:
        return self.system.path(f"/dev/shm/joblib_memmapping_folder_{self.leader}_0_0")


def _ended(fd: int, within_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(within_s * 1000))


@contextlib.contextmanager
def training(system: BootedSystem, *start: str) -> Iterator[Training]:
    """Have ``start`` (a systemd-run) start a training of USER's, and end what is left of it afterwards."""
    said = system.path(f"/tmp/said-{time.monotonic_ns()}")
    # KillMode=process: else systemd would do Reaper's work once the leader is gone.
    command = (
        "--quiet",
        "--property=KillMode=process",
        "/opt/reaper/bin/python",
        "/srv/train.py",
        f"/tmp/{said.name}",
    )
    system.run(*start, *command)
    system.until(said.exists, "the training starts")
    leader, *workers = map(int, said.read_text().split())
    here = [system.pid_here(pid) for pid in (leader, *workers)]
    fds = [os.pidfd_open(pid) for pid in here if pid is not None]
    try:
        assert len(fds) == 1 + len(workers)
        yield Training(system, leader, fds[1:])
    finally:
        for fd in fds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            _ended(fd, 5)
            os.close(fd)


@pytest.fixture
def train(unit: BootedSystem) -> Iterator[Callable[[], Training]]:
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(training(unit, "systemd-run", f"--uid={USER}"))


def main_pid(system: BootedSystem) -> str:
    return system.show("reaperd.service", "MainPID")["MainPID"]


def is_answering(system: BootedSystem) -> bool:
    return system.run("reaperctl", "ping", check=False).returncode == 0


def journal(system: BootedSystem) -> str:
    return system.run("journalctl", "--unit=reaperd.service", "--no-pager", "--output=cat").stdout


def test_started_means_ready_and_every_user_gets_an_answer(unit: BootedSystem) -> None:
    shown = unit.show("reaperd.service", "ActiveState", "StatusText", "NRestarts")
    assert (shown["ActiveState"], shown["NRestarts"]) == ("active", "0")
    assert shown["StatusText"]
    unit.run("reaperctl", "ping")
    unit.run("reaperctl", "ping", user=USER)


def test_the_core_holds_five_capabilities_and_the_gate_none(unit: BootedSystem) -> None:
    core = dict(
        line.split(":\t", 1) for line in unit.path(f"/proc/{main_pid(unit)}/status").read_text().splitlines()
    )
    # capability.h: CAP_DAC_READ_SEARCH, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_PTRACE
    assert int(core["CapEff"], 16) == sum(1 << number for number in (2, 5, 6, 7, 19))
    assert (core["NoNewPrivs"], core["Seccomp"]) == ("1", "2")
    # Answered by a gate that has given up its privileges: it does that before it reads.
    unit.run("reaperctl", "ping")
    child = unit.run("pgrep", "--parent", main_pid(unit), "--full", "reaperd.gate").stdout.strip()
    gate = dict(line.split(":\t", 1) for line in unit.path(f"/proc/{child}/status").read_text().splitlines())
    uid = unit.run("id", "-u", "reaper-gate").stdout.strip()
    assert gate["Uid"].split() == [uid] * 4
    assert {int(gate[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}


def test_the_daemon_sees_the_same_mounts_as_everybody_else(unit: BootedSystem) -> None:
    # Else it could reclaim nothing: it only touches what a session saw on these very mounts.
    assert os.readlink(unit.path(f"/proc/{main_pid(unit)}/ns/mnt")) == os.readlink(
        unit.path("/proc/1/ns/mnt")
    )


def test_another_users_workers_and_shared_memory_go_with_their_leader(
    unit: BootedSystem, train: Callable[[], Training]
) -> None:
    session = train()
    assert session.folder().exists()
    session.kill_leader()
    assert session.living(within_s=GONE_WITHIN_S) == 0
    unit.until(lambda: not session.folder().exists(), "the array is taken out of /dev/shm")


def test_killed_with_sigkill_it_comes_back_and_knows_its_sessions(
    unit: BootedSystem, train: Callable[[], Training]
) -> None:
    session, before = train(), main_pid(unit)
    unit.run("kill", "-KILL", before)
    unit.until(lambda: main_pid(unit) not in ("0", before), "systemd starts it again")
    unit.until(lambda: is_answering(unit), "it answers again")
    assert session.living() == 4
    session.kill_leader()
    assert session.living(within_s=GONE_WITHIN_S) == 0


def test_a_leader_that_dies_while_no_daemon_runs_is_reaped_by_the_next(
    unit: BootedSystem, train: Callable[[], Training]
) -> None:
    session = train()
    unit.run("systemctl", "stop", "reaperd.service")
    session.kill_leader()
    assert session.living() == 4
    unit.run("systemctl", "start", "reaperd.service")
    assert session.living(within_s=GONE_WITHIN_S) == 0


def test_a_daemon_that_hangs_is_replaced_by_the_watchdog(
    unit: BootedSystem, train: Callable[[], Training]
) -> None:
    unit.run("systemctl", "stop", "reaperd.service")
    drop_in = unit.path("/run/systemd/system/reaperd.service.d/watchdog.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nWatchdogSec=1\n")
    try:
        unit.run("systemctl", "daemon-reload")
        unit.run("systemctl", "start", "reaperd.service")
        session, before = train(), main_pid(unit)
        unit.run("kill", "-STOP", before)
        unit.until(
            lambda: main_pid(unit) not in ("0", before) and is_answering(unit), "the watchdog replaces it"
        )
        session.kill_leader()
        assert session.living(within_s=GONE_WITHIN_S) == 0
    finally:
        drop_in.unlink()
        drop_in.parent.rmdir()
        unit.run("systemctl", "daemon-reload")


def test_a_daemon_with_nothing_to_do_feeds_the_watchdog(unit: BootedSystem) -> None:
    unit.run("systemctl", "stop", "reaperd.service")
    run = ("systemd-run", "--quiet", "--unit=idle", "--property=Type=notify", "--property=WatchdogSec=500ms")
    unit.run(*run, "/usr/local/bin/reaperd")
    fed = unit.show("idle.service", "WatchdogTimestampMonotonic")["WatchdogTimestampMonotonic"]
    seen = {fed}
    unit.until(
        lambda: (
            seen.add(unit.show("idle.service", "WatchdogTimestampMonotonic")["WatchdogTimestampMonotonic"])
            or len(seen) > 4
        ),
        "it feeds the watchdog",
    )
    assert unit.show("idle.service", "ActiveState", "NRestarts") == {
        "ActiveState": "active",
        "NRestarts": "0",
    }
    unit.run("systemctl", "stop", "idle.service")


def test_reloading_applies_a_good_file_and_keeps_the_old_settings_on_a_bad_one(unit: BootedSystem) -> None:
    config, before = unit.path(CONFIG), main_pid(unit)
    config.write_text("[kill]\ngrace = 7\n")
    unit.run("systemctl", "reload", "reaperd.service")
    unit.until(lambda: "grace = 7" in shown_config(unit), "the new setting holds")
    config.write_text("[kill]\ngrace = -1\n")
    unit.run("systemctl", "reload", "reaperd.service")
    unit.until(lambda: "[kill] grace" in journal(unit), "the fault is named in the journal")
    assert "grace = 7" in shown_config(unit)
    assert (main_pid(unit), unit.show("reaperd.service", "ActiveState")["ActiveState"]) == (before, "active")


def shown_config(system: BootedSystem) -> str:
    text = system.run("reaperctl", "config", "show").stdout
    return text.replace('grace = "7s"', "grace = 7").replace("grace = 7.0", "grace = 7")


def test_a_bad_configuration_fails_the_start_once_with_its_fault_in_the_journal(unit: BootedSystem) -> None:
    unit.run("systemctl", "stop", "reaperd.service")
    unit.path(CONFIG).write_text('[scan]\ninterval = "-1s"\n')
    assert unit.run("systemctl", "start", "reaperd.service", check=False).returncode != 0
    shown = unit.show("reaperd.service", "ActiveState", "SubState", "NRestarts", "ExecMainStatus")
    assert shown == {"ActiveState": "failed", "SubState": "failed", "NRestarts": "0", "ExecMainStatus": "2"}
    assert "[scan] interval" in journal(unit)


def test_stopping_it_ends_no_training_and_takes_the_gate_along(
    unit: BootedSystem, train: Callable[[], Training]
) -> None:
    session = train()
    unit.run("systemctl", "stop", "reaperd.service")
    shown = unit.show("reaperd.service", "ActiveState", "Result", "ExecMainStatus")
    assert shown == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    assert session.living(within_s=0.5) == 4
    assert unit.run("pgrep", "--full", "reaperd.gate", check=False).stdout == ""
    assert unit.run("reaperctl", "ping", check=False).returncode == 3


def test_a_user_runs_one_of_their_own_where_none_is_installed_for_all(system: BootedSystem) -> None:
    system.run("loginctl", "enable-linger", USER)
    runtime = f"/run/user/{system.run('id', '-u', USER).stdout.strip()}"
    environment = ("env", f"XDG_RUNTIME_DIR={runtime}", f"HOME=/srv/{USER}")
    system.until(system.path(f"{runtime}/systemd/private").exists, "the user's manager starts")
    try:
        system.run(*environment, "systemctl", "--user", "enable", "--now", "reaperd.service", user=USER)
        status = json.loads(system.run(*environment, "reaperctl", "status", "--json", user=USER).stdout)
        assert status["mode"] == "user"
        assert system.path(f"/srv/{USER}/.local/state/reaper/reaper.db").exists()
        start = (
            "setpriv",
            "--reuid",
            USER,
            "--regid",
            USER,
            "--init-groups",
            *environment,
            "systemd-run",
            "--user",
        )
        with training(system, *start) as started:
            started.kill_leader()
            assert started.living(within_s=GONE_WITHIN_S) == 0
        system.run(*environment, "systemctl", "--user", "stop", "reaperd.service", user=USER)
    finally:
        system.run("loginctl", "disable-linger", USER)
        system.run("systemctl", "stop", f"user@{runtime.rpartition('/')[2]}.service")
