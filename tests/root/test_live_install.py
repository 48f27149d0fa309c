"""`make install` and `make uninstall` on a running system, as an administrator does it: in a booted one, thrown away after."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bootedsystem
import installed
import pytest
from bootedsystem import BootedSystem, BootError
from staged import ROOT

pytestmark = pytest.mark.needs_root

SOURCE = "/srv/reaper"
PARTS = ("Makefile", "pyproject.toml", "README.md", "LICENSE", "agent", "config", "daemon", "packaging")


def system_python_version() -> tuple[int, int]:
    """Return the version of the Python that `make install` takes first."""
    show = "import sys; print(*sys.version_info[:2])"
    done = subprocess.run(["/usr/bin/python3", "-c", show], capture_output=True, text=True, check=True)
    major, minor = done.stdout.split()
    return int(major), int(minor)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[BootedSystem]:
    """A system with a clone in /srv/reaper, without Reaper and without a network: what pip needs lies in /srv/wheels."""
    stage = tmp_path / "stage"
    for part in PARTS:
        target = stage / "srv/reaper" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, target)
    if sys.executable and sys.version_info[:2] != system_python_version():
        pytest.skip("the wheels that this Python can fetch are not those of the system's Python")
    fetch = [sys.executable, "-m", "pip", "wheel", "-qq", "--wheel-dir", stage / "srv/wheels"]
    subprocess.run([*fetch, stage / "srv/reaper", "hatchling"], stdin=subprocess.DEVNULL, check=True)
    installed.lay(stage)
    try:
        with bootedsystem.boot(stage) as booted:
            yield booted
    except BootError as reason:
        pytest.skip(str(reason))


def make(system: BootedSystem, target: str) -> str:
    offline = ("PIP_NO_INDEX=1", "PIP_FIND_LINKS=/srv/wheels", "HOME=/root")
    return system.run("env", *offline, "make", "--no-print-directory", "-C", SOURCE, target).stdout


def test_install_starts_the_daemon_and_uninstall_takes_all_of_it_away(system: BootedSystem) -> None:
    assert "installed and started" in make(system, "install")
    system.run("systemctl", "is-enabled", "reaperd.service")
    assert system.run("systemctl", "is-active", "reaperd.service").stdout == "active\n"
    system.run("id", "reaper-gate")
    system.run("reaperctl", "ping")

    installed.prepare(system)
    with installed.training(system, *installed.as_service()) as session:
        before = system.show("reaperd.service", "MainPID")
        system.path("/etc/reaper/reaper.toml").write_text("[kill]\ngrace = 2\n")
        assert "kept /etc/reaper/reaper.toml" in make(system, "install")
        assert system.show("reaperd.service", "MainPID") != before, "an upgrade takes effect at once"
        assert [one["leader"]["pid"] for one in installed.ask(system, "ps")] == [session.leader]
        assert session.is_whole()

        said = make(system, "uninstall")
        assert session.is_whole()
    assert "kept /etc/reaper" in said
    assert "kept /var/lib/reaper" in said
    assert system.run("systemctl", "is-active", "reaperd.service", check=False).stdout == "inactive\n"
    assert (
        system.run("systemctl", "list-unit-files", "--no-legend", "reaperd.service", check=False).stdout == ""
    )
    assert system.run("id", "reaper-gate", check=False).returncode != 0
    gone = (
        "/opt/reaper",
        "/usr/local/bin/reaperd",
        "/usr/local/bin/reaperctl",
        "/usr/local/lib/sysusers.d/reaper.conf",
    )
    assert [path for path in gone if system.path(path).exists() or system.path(path).is_symlink()] == []
    assert system.path("/etc/reaper/reaper.toml").read_text() == "[kill]\ngrace = 2\n"
