"""What the sandbox of the unit refuses, and that all of the daemon's work is done inside it.

The first half runs a probe in a unit with exactly the settings of reaperd.service, the second the service itself.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import installed
import pytest
from bootedsystem import BootedSystem
from installed import (
    CONFIG,
    GONE_WITHIN_S,
    PYTHON,
    UNIT,
    USER,
    Training,
    as_service,
    as_user,
    as_user_service,
)
from staged import ROOT

pytestmark = pytest.mark.needs_root

SUPPORT = ROOT / "tests/support"
HOME = f"/srv/{USER}"
# What makes a unit the daemon's, and no sandbox.
OWN = (
    "Type",
    "NotifyAccess",
    "Exec",
    "Restart",
    "Watchdog",
    "Runtime",
    "State",
    "Configuration",
    "Syslog",
    "Before",
    "After",
)
# c 195 is NVIDIA's major; without a driver nobody has registered it.
GPU = "Environment=LD_LIBRARY_PATH=/srv/nvml NVML_GPUS=1 'NVML_PROCESSES=0 C 100 1000'"
DEVICES = "Character devices:\n  1 mem\n 10 misc\n195 nvidia-frontend\n\nBlock devices:\n"


# -- the probe ------------------------------------------------------------------------------------


def probe_unit(system: BootedSystem, start: str, more: str = "", manager: str = "system") -> str:
    lines = system.path(f"/usr/local/lib/systemd/{manager}/{UNIT}").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(OWN)]
    before_install = kept[: kept.index("[Install]")]
    return "\n".join([*before_install, "Type=oneshot", f"ExecStart={start}", more, ""])


@pytest.fixture(scope="module")
def told(system: BootedSystem) -> Iterator[dict[str, Any]]:
    """What the probe says; beside it runs a process of USER's, for it to look at."""
    shutil.copy(SUPPORT / "sandboxed.py", system.path("/srv/sandboxed.py"))
    library = system.path("/srv/nvml/libnvidia-ml.so.1")
    library.parent.mkdir()
    build(library)
    module = importlib.util.find_spec("pynvml")  # the extra `gpu`, without asking anybody for it
    assert module is not None
    assert module.origin is not None
    shutil.copy(module.origin, next(system.path("/opt/reaper/lib").glob("python3*/site-packages")))
    devices = system.path("/srv/devices")
    devices.write_text(DEVICES)
    for major, minor in ((10, 229), (195, 0)):
        system.run("mknod", "-m", "0666", f"/dev/probe-{major}-{minor}", "c", str(major), str(minor))
    system.run("install", "-d", "-m", "0700", "/var/lib/reaper")
    # systemd looks majors up there when it starts a unit.
    system.run("mount", "--bind", "/srv/devices", "/proc/devices")
    with installed.training(system, *as_service(), words=("late",)) as other:
        try:
            yield probe(system, other)
        finally:
            system.run("umount", "/proc/devices")
            system.run("rm", "/dev/probe-10-229", "/dev/probe-195-0")


def build(library: Path) -> None:
    source = SUPPORT / "nvml_standin.c"
    command = [
        "cc",
        "-D_GNU_SOURCE",
        "-shared",
        "-fPIC",
        f"-Wl,-soname,{library.name}",
        "-o",
        library,
        source,
    ]
    subprocess.run(command, check=True, timeout=60)


def probe(system: BootedSystem, other: Training, more: str = "") -> dict[str, Any]:
    start = f"{PYTHON} /srv/sandboxed.py {other.leader} {installed.uid(system)} {HOME} /var/lib/reaper"
    said = system.path("/run/probe.json")
    output = f"StandardOutput=file:/run/{said.name}\n{GPU}\n{more}"
    system.path("/run/systemd/system/probe.service").write_text(probe_unit(system, start, output))
    system.run("systemctl", "daemon-reload")
    system.run("systemctl", "start", "probe.service")
    found: dict[str, Any] = json.loads(said.read_text())
    said.unlink()
    return found


def test_what_the_sandbox_refuses_is_refused(told: dict[str, Any]) -> None:
    refused = told["refused"]
    families = {name for name in refused if name.startswith("RestrictAddressFamilies")}
    assert {name: what for name, what in refused.items() if what != "EPERM"} == dict.fromkeys(
        families, "EAFNOSUPPORT"
    )


def test_what_the_daemon_does_is_done_inside_it(told: dict[str, Any]) -> None:
    assert {name: what for name, what in told["allowed"].items() if what != "done"} == {}


def test_the_unit_of_a_single_user_refuses_as_much_and_allows_what_a_users_daemon_does(
    system: BootedSystem, told: dict[str, Any]
) -> None:
    home = system.path(HOME)
    state, units = home / "state", home / ".config/systemd/user"
    for folder in (state, home / ".config", home / ".config/systemd", units):
        system.run("install", "-d", "-o", USER, "-g", USER, f"{HOME}/{folder.relative_to(home)}")
    training = installed.training(system, *as_user_service(system), words=("late",))
    with installed.user_manager(system), training as mine:
        start = f"{PYTHON} /srv/sandboxed.py {mine.leader} {installed.uid(system)} {HOME} {HOME}/state"
        output = f"StandardOutput=file:{HOME}/probe.json\n{GPU}"
        (units / "probe.service").write_text(probe_unit(system, start, output, "user"))
        system.run(*as_user(system, "systemctl", "--user", "daemon-reload"))
        system.run(*as_user(system, "systemctl", "--user", "start", "probe.service"))
    (units / "probe.service").unlink()
    found = json.loads((home / "probe.json").read_text())
    assert {name: what for name, what in found["allowed"].items() if what != "done"} == {}
    # Devices are root's to give.
    assert {name: found["refused"][name] for name in told["refused"] if name != "DevicePolicy"} == {
        name: what for name, what in told["refused"].items() if name != "DevicePolicy"
    }


def test_of_all_devices_the_gpus_may_be_asked(told: dict[str, Any]) -> None:
    # The rule lets it through to the driver, which is not here.
    assert told["gpu"] in ("ENXIO", "ENODEV", "done")


def test_without_the_sandbox_the_same_probe_is_refused_nothing_of_this(
    system: BootedSystem, told: object
) -> None:
    """So what it was refused was refused by the settings, and not by this machine."""
    with installed.training(system, *as_service(), words=("late",)) as other:
        start = ("systemd-run", "--quiet", "--pipe", "--wait", PYTHON, "/srv/sandboxed.py")
        shown = system.run(*start, str(other.leader), installed.uid(system), HOME, "/var/lib/reaper").stdout
    free = json.loads(shown)["refused"]
    # Arguments that make no sense are refused in other words. Three of them this machine may refuse root, too.
    assert {name for name, what in free.items() if what in ("EPERM", "EAFNOSUPPORT")} <= {
        "RestrictRealtime",
        "SystemCallFilter: @aio",
        "SystemCallFilter: userfaultfd",
        "DevicePolicy",
    }


def test_ip_is_cut_off_for_sockets_that_it_would_be_handed_too(
    system: BootedSystem, told: dict[str, Any]
) -> None:
    assert told["network"] == "EAFNOSUPPORT"
    with installed.training(system, *as_service(), words=("late",)) as other:
        handed = probe(system, other, "RestrictAddressFamilies=AF_INET")["network"]
    if handed != "EPERM" and "does not support BPF" in system.run("journalctl", "--no-pager").stdout:
        pytest.skip("this kernel or container has no BPF for control groups")
    assert handed == "EPERM"


def test_every_refusal_that_is_tried_stands_in_the_unit_and_every_one_of_the_unit_is_tried(
    told: dict[str, Any], system: BootedSystem
) -> None:
    tried = {name.partition(":")[0] for name in told["refused"]}
    text = system.path(f"/usr/local/lib/systemd/system/{UNIT}").read_text()
    settings = {line.partition("=")[0] for line in text.splitlines() if "=" in line and line[:1] not in "#["}
    assert tried <= settings
    elsewhere = {  # what else tests them
        "CapabilityBoundingSet": "test_rights.py",
        "NoNewPrivileges": "test_systemd.py",
        "IPAddressDeny": "the test above",
        "DeviceAllow": "the test above",
        "UMask": "files for itself alone",
        "LimitCORE": "no core files",
        "LimitNOFILE": "raising the limit of descriptors",
        # Nothing on this machine can show that these hold; a test of the unit's text pins them.
        "SystemCallErrorNumber": "EPERM above",
        "SystemCallArchitectures": "",
        "KeyringMode": "",
        "ProtectClock": "",
        "TasksMax": "",
        "MemorySwapMax": "",
        "OOMPolicy": "",
        "OOMScoreAdjust": "test_service_life.py",
    }
    sandbox = {
        name
        for name in settings
        if not name.startswith(OWN) and name not in ("KillMode", "TimeoutStopSec", "TimeoutStartSec")
    }
    assert sandbox - tried - elsewhere.keys() - {"Description", "StartLimitIntervalSec", "WantedBy"} == set()


# -- the service ----------------------------------------------------------------------------------

SEARCH = """
import os, subprocess, sys, time
import agent
session = agent.training_session(name="search", status_file=sys.argv[1])
session.__enter__()
agent.progress(1, 4, "fold 1")
for parent in ("/dev/shm", "/tmp", os.environ["JOBLIB_TEMP_FOLDER"]):
    folder = f"{parent}/joblib_memmapping_folder_{os.getpid()}_0_0"
    os.mkdir(folder, 0o700)
    with open(f"{folder}/array.pkl", "wb") as array:
        array.write(bytes(2**20))
print(os.getpid(), subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""

# The worker of a pool of `spawn` whose parent is killed at once.
LOSE = """
import multiprocessing, os, signal, time
if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    worker.start()
    with open(f"/proc/{worker.pid}/cmdline") as file:
        while "spawn_main" not in file.read():
            file.seek(0)
    print(worker.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start_as_user(system: BootedSystem, name: str, script: str, *words: str, **environment: str) -> list[int]:
    """Start a script of USER's as a service, and return the pids that it prints."""
    path = f"/srv/{name}.py"
    system.path(path).write_text(script)
    said = system.path(f"/run/said-{name}")
    said.unlink(missing_ok=True)
    more = [f"--setenv={key}={value}" for key, value in environment.items()]
    output = f"--property=StandardOutput=file:/run/{said.name}"
    system.run(*as_service(output, "--collect", *more), PYTHON, path, *words)
    system.until(lambda: said.exists() and said.read_text().endswith("\n"), f"{name} comes up")
    return [int(word) for word in said.read_text().split()]


def test_a_killed_search_gets_its_last_word_and_its_folders_are_taken_away_in_a_home_too(
    unit: BootedSystem,
) -> None:
    scratch = f"{HOME}/scratch"
    unit.run("install", "-d", "-o", USER, "-g", USER, "-m", "0700", scratch)
    leader, _ = start_as_user(
        unit, "search", SEARCH, f"{HOME}/run.json", JOBLIB_TEMP_FOLDER=scratch, HOME=HOME
    )
    folders = [
        unit.path(f"{parent}/joblib_memmapping_folder_{leader}_0_0")
        for parent in ("/dev/shm", "/tmp", scratch)
    ]
    assert all(folder.exists() for folder in folders)
    unit.run("kill", "-KILL", str(leader))
    unit.until(lambda: leader in installed.reaped(unit), "the session is over")
    status = unit.path(f"{HOME}/run.json")
    unit.until(
        lambda: json.loads(status.read_text())["state"] == "killed", "the status file has the last word"
    )
    assert status.stat().st_uid == int(installed.uid(unit))
    assert [str(folder) for folder in folders if folder.exists()] == []
    (event,) = [
        told
        for line in unit.run("reaperctl", "events", "--json").stdout.splitlines()
        if (told := json.loads(line))["kind"] == "reaped" and told["leader"]["pid"] == leader
    ]
    assert event["freed"]["shm_bytes"] >= 2**20


def test_every_command_of_reaperctl_is_answered_by_the_service(
    unit: BootedSystem, train: Callable[..., Training]
) -> None:
    session = train()
    (orphan,) = start_as_user(unit, "lose", LOSE)
    for command in (
        ("ping",),
        ("status",),
        ("ps",),
        ("orphans",),
        ("events",),
        ("monitor", "--duration", "0.2"),
        ("config", "show"),
        ("config", "check"),
        ("explain", str(orphan)),
        ("explain", str(session.leader)),
        ("protect", str(orphan)),
        ("protect", str(orphan), "--undo"),
        ("cleanup", "--dry-run"),
        ("doctor",),
    ):
        done = unit.run("reaperctl", *command, check=False)
        assert (done.returncode, "Traceback" in done.stdout + done.stderr) == (0, False), (command, done)
    assert orphan in [one["pid"] for one in installed.ask(unit, "orphans")]
    unit.run("reaperctl", "cleanup", "--yes")
    unit.until(lambda: not unit.path(f"/proc/{orphan}/exe").exists(), "the orphan is ended")
    (mine,) = [one for one in installed.ask(unit, "ps") if one["leader"]["pid"] == session.leader]
    assert {one["pid"] for one in mine["workers"]} == set(session.workers)
    assert "REAPER_LINEAGE" in str(mine["workers"])
    unit.run("reaperctl", "stop", mine["id"])
    assert session.living(within_s=GONE_WITHIN_S) == 0
    done = unit.run("reaperctl", "run", "--name", "through", "--", "sh", "-c", "exit 7", check=False)
    assert done.returncode == 7


def test_a_stopped_suspect_goes_on_when_it_is_released(unit: BootedSystem) -> None:
    unit.path(CONFIG).write_text(
        '[scan]\ninterval = "200ms"\norphan_age_limit = "200ms"\ncpu_window = "500ms"\nmemory_threshold = "1MiB"\n'
        'action = "quarantine"\nquarantine_for = "10min"\n'
    )
    unit.run("systemctl", "reload", UNIT)
    (orphan,) = start_as_user(unit, "lose", LOSE)
    state = unit.path(f"/proc/{orphan}/stat")
    try:
        unit.until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", "it is stopped")
        unit.run("reaperctl", "release", str(orphan))
        unit.until(lambda: state.read_text().rpartition(")")[2].split()[0] == "S", "it goes on")
    finally:
        unit.run("kill", "-KILL", str(orphan), check=False)
