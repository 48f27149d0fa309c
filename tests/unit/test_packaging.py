"""The systemd units and the image: they agree with what the daemon does, and systemd itself finds nothing to say about its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from reaperd import surroundings

GATE_USER = "reaper-gate"
PACKAGING = Path(__file__).resolve().parents[2] / "packaging" / "systemd"
UNITS = [
    pytest.param("reaperd.service", "--system", id="system"),
    pytest.param("user/reaperd.service", "--user", id="user"),
]


def settings(unit: str) -> list[tuple[str, str]]:
    lines = (PACKAGING / unit).read_text("utf-8").splitlines()
    return [
        (key, value)
        for key, mark, value in (line.partition("=") for line in lines)
        if mark and key[:1] != "#"
    ]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
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


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
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
    assert set(added.split(", ")) == names == set(surroundings.CAPABILITIES)
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
