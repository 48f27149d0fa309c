"""The systemd units and the image: they agree with what the daemon does, and systemd itself finds nothing to say about its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from reaperd.rights import RIGHTS

GATE_USER = "reaper-gate"
PACKAGING = Path(__file__).resolve().parents[2] / "packaging" / "systemd"
UNITS = [
    pytest.param("reaperd.service", "--system", id="system"),
    pytest.param("user/reaperd.service", "--user", id="user"),
]
# What `systemd-analyze security` of systemd 252 says of the unit; newer ones weigh alike. It may only sink.
MOST_EXPOSURE = 4.0

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here"
)


def settings(unit: str) -> list[tuple[str, str]]:
    lines = (PACKAGING / unit).read_text("utf-8").splitlines()
    return [
        (key, value)
        for key, mark, value in (line.partition("=") for line in lines)
        if mark and key[:1] != "#"
    ]


@needs_analyze
@pytest.mark.parametrize(("unit", "manager"), UNITS)
def test_systemd_has_nothing_to_say_about_the_unit(unit: str, manager: str, tmp_path: Path) -> None:
    # verify wants the program to exist, and leaves with 0 on a key that it does not know: its stderr is what counts.
    text = (
        (PACKAGING / unit)
        .read_text("utf-8")
        .replace("/usr/local/bin/reaperd", shutil.which("true") or "/bin/true")
    )
    copy = tmp_path / "reaperd.service"
    copy.write_text(text, "utf-8")
    done = subprocess.run(
        ["systemd-analyze", manager, "verify", copy],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@needs_analyze
def test_a_key_that_systemd_does_not_know_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "reaperd.service"
    copy.write_text("[Service]\nExecStart=/bin/true\nRestrictAddresFamilies=AF_UNIX\n")
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert "RestrictAddresFamilies" in done.stderr


@pytest.mark.parametrize(("unit", "manager"), UNITS)
def test_a_bad_configuration_is_never_tried_again_and_no_failure_uses_up_the_starts(
    unit: str, manager: str
) -> None:
    found = settings(unit)
    for wanted in (
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("Restart", "on-failure"),
        ("RestartPreventExitStatus", "2"),
        ("StartLimitIntervalSec", "0"),
        ("KillMode", "mixed"),
    ):
        assert wanted in found


@needs_analyze
def test_what_stays_open_to_the_service_is_explained_in_its_unit(tmp_path: Path) -> None:
    exposure, exposed = security(tmp_path)
    text = (PACKAGING / "reaperd.service").read_text("utf-8")
    comments = text[text.index("# -- what stays open, and why") :]
    explained = {
        name
        for name in re.findall(r"(?<![\w=~/])[A-Z]\w+=\S*?(?=,|\s|$)", comments)
        if not name.startswith("WantedBy")
    }
    assert {name for name in exposed if name not in explained} == set()
    assert {name for name in explained if name not in exposed} == set(), "it is not open any more"
    assert exposure <= MOST_EXPOSURE


@needs_analyze
def test_a_line_that_is_taken_out_of_the_sandbox_is_noticed(tmp_path: Path) -> None:
    for line in ("MemoryDenyWriteExecute=", "RestrictNamespaces=", "CapabilityBoundingSet="):
        _, exposed = security(tmp_path, without=line)
        assert [name for name in exposed if name.startswith(line)]
    exposure, _ = security(tmp_path, without="CapabilityBoundingSet=")
    assert exposure > MOST_EXPOSURE


def security(folder: Path, without: str = "") -> tuple[float, set[str]]:
    """Return what `systemd-analyze security` makes of the system's unit, and the names of what it finds open."""
    text = (PACKAGING / "reaperd.service").read_text("utf-8").replace("/usr/local/bin/reaperd", "/bin/true")
    copy = folder / "reaperd.service"
    copy.write_text(
        "\n".join(line for line in text.splitlines() if not without or not line.startswith(without))
    )
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=100", copy]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", shown)
    asked = subprocess.run([*command, "--json=short"], capture_output=True, text=True, check=False).stdout
    exposed = {one["name"] for one in json.loads(asked) if one["exposure"] and float(one["exposure"]) > 0}
    return float(exposure), exposed


def test_nothing_of_a_users_environment_reaches_a_disk_and_nothing_of_the_daemon_the_swap() -> None:
    for unit in ("reaperd.service", "user/reaperd.service"):
        found = settings(unit)
        for wanted in (
            ("LimitCORE", "0"),
            ("MemorySwapMax", "0"),
            ("OOMPolicy", "continue"),
            ("TasksMax", "64"),
            ("SystemCallErrorNumber", "EPERM"),
            ("SystemCallArchitectures", "native"),
            ("KeyringMode", "private"),
            ("SyslogLevel", "err"),
        ):
            assert wanted in found, unit
    assert ("ProtectClock", "yes") in settings("reaperd.service")
    assert ("OOMScoreAdjust", "-900") in settings("reaperd.service")


def test_both_units_refuse_the_same_calls() -> None:
    of_system, of_user = (
        [value for key, value in settings(unit) if key == "SystemCallFilter"]
        for unit in ("reaperd.service", "user/reaperd.service")
    )
    assert of_system == of_user
    assert "@system-service" in of_system[0]


def test_the_system_unit_lets_the_daemon_ask_the_gpus_and_reach_no_other_device() -> None:
    found = settings("reaperd.service")
    assert ("DevicePolicy", "closed") in found
    assert [value for key, value in found if key == "DeviceAllow"] == ["char-nvidia* rw"]


def test_the_system_unit_makes_no_mount_namespace() -> None:
    # The daemon reclaims only what a session saw on the same mounts as the daemon itself does.
    namespacing = {
        *(
            "ProtectSystem",
            "ProtectHome",
            "ProtectProc",
            "ProcSubset",
            "ProtectControlGroups",
            "ProtectHostname",
        ),
        *("ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "RootDirectory", "RootImage"),
        *("PrivateTmp", "PrivateDevices", "PrivateMounts", "PrivateUsers", "PrivateNetwork", "PrivateIPC"),
        *(
            "ReadWritePaths",
            "ReadOnlyPaths",
            "InaccessiblePaths",
            "BindPaths",
            "TemporaryFileSystem",
            "DynamicUser",
        ),
    }
    assert not namespacing & {key for key, _ in settings("reaperd.service")}


def test_the_container_has_the_capabilities_of_the_unit_and_the_daemon_knows_what_each_is_for() -> None:
    (unit,) = [value for key, value in settings("reaperd.service") if key == "CapabilityBoundingSet"]
    compose = (PACKAGING.parent / "docker" / "compose.yaml").read_text("utf-8")
    (added,) = re.findall(r"^    cap_add: \[(.*)\]$", compose, re.MULTILINE)
    names = set(unit.replace("CAP_", "").split())
    assert set(added.split(", ")) == names == {right.removeprefix("CAP_") for right in RIGHTS}
    assert "    cap_drop: [ALL]\n" in compose
    for wanted in ("pid: host", "read_only: true", "no-new-privileges:true", "network_mode: none"):
        assert wanted in compose


def test_the_image_makes_the_gates_user_and_is_asked_for_its_health() -> None:
    text = (PACKAGING.parent / "docker" / "Dockerfile").read_text("utf-8")
    assert f"echo '{GATE_USER}:x:" in text
    assert 'CMD ["reaperctl", "--system", "ping"]' in text
    assert 'ENTRYPOINT ["reaperd"]' in text
    ignored = (PACKAGING.parent / "docker" / "Dockerfile.dockerignore").read_text("utf-8").split()
    for name in ("agent", "daemon", "config", "pyproject.toml", "README.md", "LICENSE"):
        assert f"!{name}" in ignored
        assert (PACKAGING.parents[1] / name).exists()


def test_where_memory_runs_out_the_system_daemon_is_among_the_last_to_go() -> None:
    assert ("OOMScoreAdjust", "-900") in settings("reaperd.service")
    assert not [key for key, _ in settings("user/reaperd.service") if key == "OOMScoreAdjust"], (
        "a user's manager may not lower it"
    )


# -- the Debian package ---------------------------------------------------------------------------


@pytest.mark.skipif(
    shutil.which("dpkg-buildpackage") is None, reason="dpkg-buildpackage is not installed here"
)
def test_what_is_missing_for_the_debian_package_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "status").touch()  # a machine on which nothing is installed
    done = check_deb(DPKG_ADMINDIR=str(tmp_path))
    assert done.returncode == 2
    assert "not installed here: " in done.stderr
    assert "debhelper-compat (= 13)" in done.stderr
    assert "apt-get install build-essential debhelper python3-venv" in done.stderr


def test_where_there_is_no_dpkg_it_says_so(tmp_path: Path) -> None:
    for tool in ("sh", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    done = check_deb(PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("a Debian package is built on Debian or Ubuntu: ")


def check_deb(**more: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/sh", PACKAGING.parent / "build-deb", "check"]
    return subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=False)
