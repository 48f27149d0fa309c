"""Trainings that a booted system starts as services, scopes, user services, cron jobs and at jobs, and what proves that they are."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bootedsystem
import harness
import pytest
from bootedsystem import BootedSystem
from enclosure import JUDGED_WITHIN_S, UP_WITHIN_S
from staged import ROOT

USER = "trainer"
UP = "/run/zoo-up"

TRAIN = f"""#!/bin/sh
export PYTHONPATH=/srv/zoo REAPER_TEST_UP={UP} REAPER_TEST_ANIMAL="$1" REAPER_TEST_LIFETIME_S=600
shift
exec /opt/reaper/bin/python /srv/zoo/trainer.py "$@" </dev/null
"""


@dataclass(frozen=True)
class Animal:
    """A training with two busy workers. ``start`` is a shell's script, whose "$@" runs the training."""

    name: str
    kind: str
    start: str
    cgroup: str  # how the path of its unit ends
    above: tuple[
        str, ...
    ]  # the command names of its parent, of that one's parent, and so on up to process 1; no shells
    become: str = ""
    package: str = ""

    @property
    def command(self) -> list[str]:
        become = ["--become", self.become] if self.become else []
        return ["/srv/zoo/train", self.name, self.kind, *become]


# KillMode=process: else systemd would do Reaper's work once a leader is gone.
SERVICE = f"systemd-run --quiet --uid={USER} --property=KillMode=process --unit="
AS_USER = f'as_user() {{ id=$(id -u {USER}); setpriv --reuid {USER} --regid {USER} --init-groups env XDG_RUNTIME_DIR=/run/user/$id "$@"; }}; '
PID_1 = ("systemd",)


def service(name: str, kind: str) -> Animal:
    return Animal(name, kind, f'{SERVICE}{name} "$@"', f"/system.slice/{name}.service", PID_1)


def scope(name: str, kind: str) -> Animal:
    # It is nobody's service: whoever started it has gone, as a shell has whose user logged out.
    start = f'setsid -f systemd-run --quiet --scope --uid={USER} --unit={name} "$@" >/dev/null 2>&1'
    return Animal(name, kind, start, f"/system.slice/{name}.scope", PID_1)


def user_service(name: str, kind: str) -> Animal:
    start = f'{AS_USER}as_user systemd-run --quiet --user --property=KillMode=process --unit={name} "$@"'
    return Animal(name, kind, start, f"/app.slice/{name}.service", ("systemd", *PID_1))


ANIMALS = [
    service("service-spawn", "spawn"),
    service("service-loky", "loky"),
    Animal(
        "forking",
        "spawn",
        f'{SERVICE}forking --property=Type=forking "$@"',
        "/system.slice/forking.service",
        PID_1,
        become="double-fork",
    ),
    scope("scope", "spawn"),
    user_service("user-service", "spawn"),
    Animal(
        "cron",
        "spawn",
        # What this machine's cron does is no part of a test.
        "rm -rf /etc/crontab /etc/cron.d/* /var/spool/cron/crontabs/*;"
        f' echo "@reboot {USER} $*" >/etc/cron.d/training && systemctl start cron.service',
        "/system.slice/cron.service",
        ("cron", "cron", *PID_1),
        package="cron",
    ),
    Animal(
        "at",
        "loky",
        "jobs=/var/spool/cron/atjobs; rm -rf $jobs/*; "
        # The last thing that the package's installation does.
        "test -e $jobs/.SEQ || install -o daemon -g daemon -m 0600 /dev/null $jobs/.SEQ;"
        " systemctl start atd.service && cd / &&"
        f' echo "$*" | setpriv --reuid {USER} --regid {USER} --init-groups at now',
        "/system.slice/atd.service",
        ("atd", "atd", *PID_1),
        package="at",
    ),
]
ORPHANS = [
    service("lost-in-a-service", "spawn"),
    service("lost-in-a-service-loky", "loky"),
    scope("lost-in-a-scope", "spawn"),
    user_service("lost-in-a-user-service", "spawn"),
]
GUARDED = service("guarded", "spawn")


@dataclass
class Seen:
    """An animal that is up. Pids are those of the system."""

    system: BootedSystem
    pid: int
    workers: list[int]
    held: dict[int, int] = dataclasses.field(default_factory=dict)  # a pidfd for each

    def __post_init__(self) -> None:
        for pid in (self.pid, *self.workers):
            here = self.system.pid_here(pid)
            assert here is not None, f"{pid} has gone at once"
            self.held[pid] = os.pidfd_open(here)

    def gone(self) -> list[int]:
        return [pid for pid, pidfd in self.held.items() if harness.has_ended(pidfd)]

    def wait_gone(self, pid: int) -> None:
        """Fail unless the daemon ends ``pid`` in time."""
        poll = select.poll()
        poll.register(self.held[pid], select.POLLIN)
        assert poll.poll(JUDGED_WITHIN_S * 1000), f"{pid} lives: {explain(self.system, pid)}"

    def kill_leader(self) -> None:
        self.system.run("kill", "-KILL", str(self.pid))
        self.wait_gone(self.pid)

    def read(self, pid: int, name: str) -> str:
        return self.system.path(f"/proc/{pid}/{name}").read_text()

    def stat(self, pid: int) -> tuple[str, int]:
        """Return state and parent."""
        state, parent = self.read(pid, "stat").rpartition(")")[2].split()[:2]
        return state, int(parent)

    def above(self) -> tuple[str, ...]:
        names, pid = [], self.pid
        while pid := self.stat(pid)[1]:
            names.append(self.read(pid, "comm").rstrip("\n").lower())
        # Some shells become the last command that they are given.
        return tuple(name for name in names if name != "sh")

    def is_busy(self, pid: int) -> bool:
        """Say whether it has used CPU, and holds more than memory_threshold."""
        fields = self.read(pid, "stat").rpartition(")")[2].split()  # from the state on, proc_pid_stat(5)
        cpu_ticks, rss_pages = int(fields[11]) + int(fields[12]), int(fields[21])
        return cpu_ticks > 0 and rss_pages * os.sysconf("SC_PAGE_SIZE") > 2**20

    def cgroup(self, pid: int) -> str:
        lines = self.read(pid, "cgroup").splitlines()
        return next(line for line in lines if line.startswith("0::")).removeprefix("0::")

    def close(self) -> None:
        for pidfd in self.held.values():
            os.close(pidfd)


def explain(system: BootedSystem, *pids: int) -> dict[int, dict[str, Any]]:
    """Return what `reaperctl explain` is told of each; all are asked about by one process, for a Python takes its time to start."""
    ask = 'printf "%s\\n" "$@" | /opt/reaper/bin/python /srv/zoo/asker.py /run/reaper/reaper.sock'
    questions = [json.dumps({"op": "explain", "pid": pid}) for pid in pids]
    answers = system.run("sh", "-c", ask, "sh", *questions).stdout.splitlines()
    return {pid: json.loads(answer)["explain"] for pid, answer in zip(pids, answers, strict=True)}


class Zoo:
    """All of them in one system, seen by the daemon before any leader is killed."""

    def __init__(self, system: BootedSystem, missing: dict[str, str]) -> None:
        self.system = system
        self.missing = missing  # why a package is not there
        self.seen: dict[str, Seen] = {}
        self.canaries: set[int] = set()
        pipe = system.path(UP)
        os.mkfifo(pipe)
        pipe.chmod(0o666)
        self._up = os.open(pipe, os.O_RDWR | os.O_CLOEXEC)  # read and write: never at its end
        animals = [one for one in (*ANIMALS, *ORPHANS, GUARDED) if one.package not in missing]
        for animal in animals:
            system.run("sh", "-c", animal.start, "sh", *animal.command)
        self._wait_up({animal.name for animal in animals})
        self.wait_scanned()

    def _wait_up(self, names: set[str]) -> None:
        """Wait until each has said that it is up; one that has not is no reason to judge the others."""
        end_s, unread = time.monotonic() + UP_WITHIN_S, b""
        while names and select.select([self._up], [], [], max(0.0, end_s - time.monotonic()))[0]:
            *lines, unread = (unread + os.read(self._up, 65536)).split(b"\n")
            for line in lines:
                told = json.loads(line)
                names.discard(told["animal"])
                self.seen[told["animal"]] = Seen(self.system, told["pid"], told["workers"])

    def wait_scanned(self, canaries: int = 2) -> None:
        """Return when the daemon has ended that many orphans that came one after the other, each since this call.

        None is judged before orphan_age_limit is over, and meanwhile the daemon looks three times in each cpu_window.
        """
        for _ in range(canaries):
            with self._canary() as canary:
                self.canaries.add(canary.pid)
                canary.wait_gone(canary.pid)

    @contextlib.contextmanager
    def _canary(self) -> Iterator[Seen]:
        said = self.system.path(f"/run/canary-{time.monotonic_ns()}")
        run = ["systemd-run", "--quiet", "--property=KillMode=process"]
        run.append(f"--property=StandardOutput=file:/run/{said.name}")
        self.system.run(*run, "/opt/reaper/bin/python", "/srv/zoo/canary.py")
        self.system.until(lambda: said.exists() and said.read_text().endswith("\n"), "a canary comes up")
        canary = Seen(self.system, int(said.read_text()), [])
        try:
            yield canary
        finally:
            canary.close()

    def of(self, animal: Animal) -> Seen:
        if animal.package in self.missing:
            pytest.skip(self.missing[animal.package])
        if animal.name not in self.seen:
            shown = self.system.run("journalctl", "--no-pager", "--lines=60").stdout
            pytest.fail(f"{animal.name} did not come up:\n{shown}")
        return self.seen[animal.name]

    def close(self) -> None:
        for seen in self.seen.values():
            seen.close()
        os.close(self._up)


# -- the system's files ---------------------------------------------------------------------------


def lay(stage: Path, scratch: Path) -> dict[str, str]:
    """Lay all that the animals need over a system; return why a package that some of them need cannot be had, by its name."""
    home = stage / "srv/zoo"
    home.mkdir(parents=True)
    for script in ("zoo/trainer.py", "zoo/stage.py", "zoo/canary.py", "asker.py"):
        shutil.copy(ROOT / "tests/support" / script, home)
    for module in ("joblib", "cloudpickle"):  # older joblibs bring their own of the latter
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            ignored = shutil.ignore_patterns("test", "__pycache__")
            shutil.copytree(Path(spec.origin).parent, home / module, ignore=ignored)
    (home / "train").write_text(TRAIN)
    (home / "train").chmod(0o755)
    (stage / "etc/cron.d").mkdir(parents=True, exist_ok=True)
    (stage / "usr/local/lib/sysusers.d/trainer.conf").write_text(f"u {USER} - - /srv/{USER} /bin/sh\n")
    return {
        package: why
        for package, program in (("cron", "cron"), ("at", "atd"))
        if (why := fetch(package, program, stage, scratch))
    }


def fetch(package: str, program: str, stage: Path, scratch: Path) -> str:
    """Lay Debian's ``package`` over the system unless it is installed, and return why that cannot be done."""
    if shutil.which(program, path=bootedsystem.PATH):
        return ""
    if shutil.which("apt-get") is None:
        return f"{package} is not installed"
    command = ["apt-get", "-qq", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10", "download"]
    done = subprocess.run([*command, package], cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{package} is neither installed nor to be had: {done.stderr.strip()}"
    (archive,) = scratch.glob(f"{package}_*.deb")
    subprocess.run(["dpkg", "-x", archive, stage], check=True)
    # Where /lib is a link, a directory cannot be laid over it.
    shutil.copytree(stage / "lib", stage / "usr/lib", dirs_exist_ok=True)
    shutil.rmtree(stage / "lib")
    return ""
