"""A booted system in which Reaper is installed for all, and other users' trainings in it: as services, in slices, in logins."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import select
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bootedsystem import BootedSystem

UNIT = "reaperd.service"
CONFIG = "/etc/reaper/reaper.toml"
USER = "trainer"
GONE_WITHIN_S = 10.0
PYTHON = "/opt/reaper/bin/python"

# Another user's training: exec'ed and forked workers, and an array in shared memory as joblib leaves it behind. The words
# after the file that it tells its pids in: where else an array is to be, and "late" where no daemon need answer.
TRAIN = """
import multiprocessing, os, subprocess, sys, time
import agent
said, *words = sys.argv[1:]
agent.register(name="training", required="late" not in words)
for parent in ("/dev/shm", *(word for word in words if word != "late")):
    folder = f"{parent}/joblib_memmapping_folder_{os.getpid()}_0_0"
    os.mkdir(folder, 0o700)
    with open(f"{folder}/array.pkl", "wb") as array:
        array.write(bytes(2**20))
context = multiprocessing.get_context("fork")
pids = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid for _ in range(2)]
for _ in range(2):
    worker = context.Process(target=time.sleep, args=(600,))
    worker.start()
    pids.append(worker.pid)
with open(said + ".new", "w") as file:
    print(os.getpid(), *pids, file=file)
os.rename(said + ".new", said)
time.sleep(600)
"""


def lay(stage: Path) -> None:
    """Lay what the trainings need over an installation: a script, a user, and logins that end at once when they end."""
    script = stage / "srv/train.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(TRAIN)
    user = stage / "usr/local/lib/sysusers.d/trainer.conf"
    user.parent.mkdir(parents=True, exist_ok=True)
    user.write_text(f"u {USER} - - /srv/{USER} /bin/sh\n")
    login = stage / "etc/systemd/logind.conf.d/at-once.conf"
    login.parent.mkdir(parents=True)
    login.write_text("[Login]\nUserStopDelaySec=0\nKillUserProcesses=no\n")


def prepare(system: BootedSystem) -> None:
    """Do in the running system what an installation does there."""
    add_user(system)
    system.run("systemctl", "enable", UNIT)


def add_user(system: BootedSystem) -> None:
    """Make the users that the system's files name, and a home for USER."""
    system.run("systemd-sysusers")
    # A file system of its own: the one below tells nobody when a file was made.
    system.run("install", "-d", f"/srv/{USER}")
    owner = ",".join(f"{name}={uid(system)}" for name in ("uid", "gid"))
    system.run("mount", "-t", "tmpfs", "-o", f"mode=0700,{owner}", "tmpfs", f"/srv/{USER}")


# -- trainings ------------------------------------------------------------------------------------


@dataclass
class Training:
    """Another user's session: its leader and its workers as the system numbers them, each held by a pidfd."""

    system: BootedSystem
    leader: int
    workers: list[int]
    fds: dict[int, int]

    def kill_leader(self) -> None:
        signal.pidfd_send_signal(self.fds[self.leader], signal.SIGKILL)

    def living(self, within_s: float = 0.0) -> int:
        """Return how many workers still live ``within_s`` from now."""
        deadline = time.monotonic() + within_s
        return sum(
            not has_ended(self.fds[pid], max(0.0, deadline - time.monotonic())) for pid in self.workers
        )

    def is_whole(self) -> bool:
        """Say whether the leader and every worker live."""
        return not any(has_ended(fd, 0) for fd in self.fds.values())

    def cgroup(self) -> str:
        lines = self.system.path(f"/proc/{self.leader}/cgroup").read_text().splitlines()
        return next(line for line in lines if line.startswith("0::"))

    def folder(self, parent: str = "/dev/shm") -> Path:
        return self.system.path(f"{parent}/joblib_memmapping_folder_{self.leader}_0_0")


def has_ended(fd: int, within_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(within_s * 1000))


@contextlib.contextmanager
def training(
    system: BootedSystem, *start: str, words: tuple[str, ...] = (), python: str = PYTHON
) -> Iterator[Training]:
    """Have ``start`` (a systemd-run) start a training of USER's, and end what is left of it afterwards."""
    said = system.path(f"/tmp/said-{time.monotonic_ns()}")
    system.run(*start, python, "/srv/train.py", f"/tmp/{said.name}", *words)
    system.until(said.exists, "the training starts")
    pids = list(map(int, said.read_text().split()))
    here = {pid: system.pid_here(pid) for pid in pids}
    fds = {pid: os.pidfd_open(found) for pid, found in here.items() if found is not None}
    try:
        assert fds.keys() == set(pids)
        yield Training(system, pids[0], pids[1:], fds)
    finally:
        for fd in fds.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            has_ended(fd, 5)
            os.close(fd)


# KillMode=process: else systemd would do Reaper's work once the leader is gone.
SERVICE = ("systemd-run", "--quiet", "--property=KillMode=process")


def as_service(*more: str) -> tuple[str, ...]:
    return (*SERVICE, f"--uid={USER}", *more)


def lend(system: BootedSystem, *names: str) -> None:
    """Copy distributions of the tests' own Python, with what they need, to the installation's: nobody is asked for them."""
    (packages,) = system.path("/opt/reaper/lib").glob("python3*/site-packages")
    todo, seen = list(names), set()
    while todo:
        if (name := todo.pop()) in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another system, or another Python
            continue
        todo += [re.split("[^A-Za-z0-9._-]", need)[0] for need in found.requires or () if "extra" not in need]
        for file in found.files or ():
            if ".." not in file.parts:
                (packages / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(
                    file.locate(), packages / file
                )  # what is compiled goes by the time of its source


def uid(system: BootedSystem) -> str:
    return system.run("id", "-u", USER).stdout.strip()


def as_user(system: BootedSystem, *command: str) -> tuple[str, ...]:
    """Return what runs ``command`` as USER, within reach of USER's own service manager."""
    become = ("setpriv", "--reuid", USER, "--regid", USER, "--init-groups")
    runtime = f"XDG_RUNTIME_DIR=/run/user/{uid(system)}"
    return (*become, "env", runtime, f"HOME=/srv/{USER}", *command)


def as_user_service(system: BootedSystem) -> tuple[str, ...]:
    return as_user(system, *SERVICE, "--user")


# A login as sshd and getty make one: pam_systemd moves it into a session scope of its own.
LOGIN = ("systemd-run", "--quiet", f"--uid={USER}", "--property=PAMName=login")


@contextlib.contextmanager
def user_manager(system: BootedSystem) -> Iterator[None]:
    """Keep USER's own service manager running."""
    number = uid(system)
    system.run("loginctl", "enable-linger", USER)
    try:
        system.run("systemctl", "start", f"user@{number}.service")  # one of an earlier login may be ending
        yield
    finally:
        system.run("loginctl", "disable-linger", USER)
        system.run("systemctl", "stop", f"user@{number}.service")


# -- the daemon -----------------------------------------------------------------------------------


def main_pid(system: BootedSystem) -> str:
    return system.show(UNIT, "MainPID")["MainPID"]


def gate_pid(system: BootedSystem) -> str:
    return system.run(
        "pgrep", "--parent", main_pid(system), "--full", "reaperd.gate", check=False
    ).stdout.strip()


def is_answering(system: BootedSystem) -> bool:
    return system.run("reaperctl", "ping", check=False).returncode == 0


def ask(system: BootedSystem, *command: str) -> Any:
    """Return what a `reaperctl ... --json` of root's prints."""
    return json.loads(system.run("reaperctl", "--system", *command, "--json").stdout)


def events(shown: str, kind: str) -> list[int]:
    """Return the leaders in the events of one kind that a `reaperctl events --json` has printed."""
    told = [json.loads(line) for line in shown.splitlines()]
    return [event["leader"]["pid"] for event in told if event["kind"] == kind]


def reaped(system: BootedSystem) -> list[int]:
    """Return the leaders whose sessions the daemon for all has reaped."""
    return events(system.run("reaperctl", "--system", "events", "--json").stdout, "reaped")


def now() -> str:
    """Return the time as journalctl takes it. Not a cursor: with a unit asked for, the entry that follows one is passed over."""
    return f"@{time.time():.6f}"


def journal(system: BootedSystem, since: str = "@0", unit: str = UNIT) -> list[dict[str, Any]]:
    """Return what the processes of ``unit`` have written since then; systemd's own lines are left out."""
    system.run("journalctl", "--sync")
    asked = ("--no-pager", f"--unit={unit}", f"--since={since}", "--output=json")
    shown = system.run("journalctl", *asked).stdout
    entries: list[dict[str, Any]] = [json.loads(line) for line in shown.splitlines()]
    return [entry for entry in entries if entry["_TRANSPORT"] == "stdout"]


def messages(system: BootedSystem, since: str = "@0") -> str:
    return "\n".join(entry["MESSAGE"] for entry in journal(system, since))


@contextlib.contextmanager
def drop_in(system: BootedSystem, text: str, unit: str = UNIT) -> Iterator[None]:
    """Run the unit with more settings: it is stopped now, and when the block ends."""
    file = system.path(f"/run/systemd/system/{unit}.d/test.conf")
    system.run("systemctl", "stop", unit)
    file.parent.mkdir(parents=True)
    file.write_text(f"[Service]\n{text}\n")
    system.run("systemctl", "daemon-reload")
    try:
        yield
    finally:
        system.run("systemctl", "stop", unit, check=False)
        system.run("systemctl", "reset-failed", unit, check=False)
        file.unlink()
        file.parent.rmdir()
        system.run("systemctl", "daemon-reload")
