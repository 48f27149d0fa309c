"""The Debian package: what is in it, and its life on a running system, as an administrator sees it.

It is installed with dpkg into booted systems, which have what it depends on and no network. Scripts run in an environment
of their own there, with the `agent` that pip has put into it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bootedsystem
import debpackage
import pytest
from bootedsystem import BootedSystem, BootError
from installed import GONE_WITHIN_S, USER, Training, add_user, as_service, lay, training
from staged import ROOT

PYTHON = "/srv/env/bin/python"
CONFIG = "/etc/reaper/reaper.toml"
DATABASE = "/var/lib/reaper/reaper.db"
NEW_SETTINGS = "# What a later version comes with.\n"

DATA = {
    *("etc/reaper/reaper.toml", "usr/bin/reaperctl", "usr/bin/reaperd", "usr/lib/sysusers.d/reaper.conf"),
    *("usr/lib/systemd/system/reaperd.service", "usr/lib/systemd/user/reaperd.service"),
    *("usr/share/bash-completion/completions/reaperctl", "usr/share/bash-completion/completions/reaperd"),
    *(
        "usr/share/fish/vendor_completions.d/reaperctl.fish",
        "usr/share/fish/vendor_completions.d/reaperd.fish",
    ),
    *("usr/share/zsh/vendor-completions/_reaperctl", "usr/share/zsh/vendor-completions/_reaperd"),
    *(
        "usr/share/man/man1/reaperctl.1.gz",
        "usr/share/man/man5/reaper.toml.5.gz",
        "usr/share/man/man8/reaperd.8.gz",
    ),
    "usr/share/lintian/overrides/reaperd",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The package, and what `make deb` said of it."""
    if reason := debpackage.why_not():
        pytest.skip(reason)
    return debpackage.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def package(built: tuple[Path, str]) -> Path:
    return built[0]


@pytest.fixture(scope="module")
def later(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of a version to come."""
    return debpackage.rebuild(
        package, tmp_path_factory.mktemp("later"), "99.0", default_settings=NEW_SETTINGS
    )


@pytest.fixture(scope="module")
def members(package: Path) -> dict[str, tarfile.TarInfo]:
    """What the package puts on the machine, by path."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as unpacking:
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
            found = {one.name.removeprefix("./"): one for one in archive}
        assert unpacking.wait(30) == 0
    return found


def field(package: Path, name: str) -> str:
    return subprocess.run(
        ["dpkg-deb", "-f", package, name], capture_output=True, text=True, check=True
    ).stdout.strip()


# -- what is in it --------------------------------------------------------------------------------


def test_every_file_is_where_debian_has_such_files(members: dict[str, tarfile.TarInfo]) -> None:
    files = {path for path, one in members.items() if not one.isdir()}
    outside = {path for path in files if not path.startswith(("usr/lib/reaper/", "usr/share/doc/reaperd/"))}
    assert outside == DATA
    assert {"usr/share/doc/reaperd/copyright", "usr/share/doc/reaperd/changelog.Debian.gz"} <= files
    # `agent` is no module of the system's Python: that name is many people's.
    assert not [path for path in files if "dist-packages" in path]


def test_all_of_it_is_roots_and_nobody_else_writes_to_it(members: dict[str, tarfile.TarInfo]) -> None:
    assert {(one.uname, one.gname) for one in members.values()} == {("root", "root")}
    assert [path for path, one in members.items() if one.mode & 0o022 and not one.issym()] == []
    assert [path for path, one in members.items() if one.mode & (stat.S_ISUID | stat.S_ISGID)] == []


def test_its_environment_is_that_of_a_python_it_depends_on_by_name(
    package: Path, members: dict[str, tarfile.TarInfo]
) -> None:
    target = members["usr/lib/reaper/bin/python"].linkname
    assert target.startswith("python3.")
    assert target in field(package, "Depends").split(", ")
    assert members[f"usr/lib/reaper/bin/{target}"].linkname in (
        f"../../../bin/{target}",
        f"/usr/bin/{target}",
    )
    bytecode = [path for path in members if path.endswith("/reaperd/ctl/__pycache__")]
    assert bytecode == [f"usr/lib/reaper/lib/{target}/site-packages/reaperd/ctl/__pycache__"]


def test_no_file_of_it_names_the_place_where_it_was_built(package: Path, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", package, tmp_path], check=True)
    scripts = [
        path for path in (tmp_path / "usr/lib/reaper").rglob("*") if path.is_file() and not path.is_symlink()
    ]
    assert len(scripts) > 200
    assert [path for path in scripts if b"/debian/reaperd" in path.read_bytes()] == []
    assert [path for path in scripts if path.name in ("RECORD", "direct_url.json")] == []
    for command in ("reaperd", "reaperctl"):
        first = (tmp_path / "usr/lib/reaper/bin" / command).read_text().splitlines()[0]
        assert first.startswith("#!/usr/lib/reaper/bin/python")
    unit = (tmp_path / "usr/lib/systemd/system/reaperd.service").read_text()
    assert "\nExecStart=/usr/bin/reaperd\n" in unit


def test_the_settings_are_a_conffile_and_say_what_is_built_in(package: Path, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "--raw-extract", package, tmp_path / "tree"], check=True)
    assert (tmp_path / "tree/DEBIAN/conffiles").read_text().split() == [CONFIG]
    assert (tmp_path / f"tree{CONFIG}").read_bytes() == (ROOT / "config/reaper.toml").read_bytes()


@pytest.mark.skipif(shutil.which("lintian") is None, reason="lintian is not installed here")
def test_lintian_finds_no_fault(built: tuple[Path, str]) -> None:
    assert [line for line in built[1].splitlines() if line.startswith(("E: ", "W: "))] == []


# -- its life on a machine ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(package: Path, later: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is laid over this machine: both packages, a user, and an environment of theirs with `agent` in it."""
    stage = tmp_path_factory.mktemp("stage")
    lay(stage)
    shutil.copy(package, stage / "srv/first.deb")
    shutil.copy(later, stage / "srv/later.deb")
    shutil.copy(ROOT / "Makefile", stage / "srv/Makefile")
    environment = stage / "srv/env"
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", environment], check=True)
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "-qq", "--no-deps"]
    done = subprocess.run([*pip, ROOT], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return stage


@pytest.fixture
def bare(stage: Path) -> Iterator[BootedSystem]:
    """A system without Reaper."""
    try:
        with bootedsystem.boot(stage) as booted:
            add_user(booted)
            booted.run(
                "rm", "-f", "/usr/sbin/policy-rc.d"
            )  # by which some machines' images forbid all starts
            yield booted
    except BootError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def system(bare: BootedSystem) -> BootedSystem:
    """A system with the package."""
    dpkg(bare, "--install", "/srv/first.deb")
    return bare


@pytest.fixture
def train(system: BootedSystem) -> Iterator[Callable[[], Training]]:
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(training(system, *as_service(), python=PYTHON))


def dpkg(system: BootedSystem, *words: str) -> str:
    """Run dpkg, and return what it says on stderr."""
    # The triggers are others': all man pages of the system would be indexed anew, which takes seconds.
    return system.run("dpkg", "--no-triggers", *words).stderr


def is_active(system: BootedSystem) -> str:
    return system.run("systemctl", "is-active", "reaperd.service", check=False).stdout.strip()


def sessions(system: BootedSystem) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(system.run("reaperctl", "ps", "--json").stdout)
    return found


def what_lasts(session: dict[str, Any]) -> dict[str, Any]:
    """Return what of a session is the same for as long as it lives."""
    leader = {key: session["leader"][key] for key in ("pid", "start_ticks", "cmdline")}
    return {**{key: session[key] for key in ("id", "name", "uid", "state")}, "leader": leader}


def made(system: BootedSystem) -> set[str]:
    """Return every path that this machine has not, logs and dpkg's own records apart."""
    found = {
        path for path in system.made() if not path.startswith(("/var/log/", "/var/lib/dpkg/", "/var/cache/"))
    }
    return found | {
        f"/run/{name}" for name in ("reaper", "reaperd.pid") if system.path(f"/run/{name}").exists()
    }


@pytest.mark.needs_root
def test_installed_it_runs_and_ends_what_another_users_script_left(
    system: BootedSystem, train: Callable[[], Training]
) -> None:
    assert is_active(system) == "active"
    assert system.run("systemctl", "is-enabled", "reaperd.service").stdout.strip() == "enabled"
    assert system.show("reaperd.service", "FragmentPath")["FragmentPath"].endswith(
        "/systemd/system/reaperd.service"
    )
    global_unit = system.run("systemctl", "--global", "is-enabled", "reaperd.service", check=False).stdout
    assert global_unit.strip() == "disabled"
    core = system.show("reaperd.service", "MainPID")["MainPID"]
    gate = system.run("pgrep", "--parent", core, "--full", "reaperd.gate").stdout.strip()
    assert system.run("ps", "-o", "user=", "-p", gate).stdout.strip() == "reaper-gate"
    system.run("reaperctl", "ping", user=USER)

    session = train()
    assert [one["name"] for one in sessions(system)] == ["training"]
    session.kill_leader()
    assert session.living(within_s=GONE_WITHIN_S) == 0
    system.until(lambda: not session.folder().exists(), "the array is taken out of /dev/shm")


@pytest.mark.needs_root
def test_an_upgrade_takes_over_living_sessions_and_keeps_changed_settings(
    system: BootedSystem, train: Callable[[], Training]
) -> None:
    session = train()
    (before,) = sessions(system)
    settings = system.path(CONFIG)
    settings.write_text('[kill]\ngrace = "3s"\n')

    dpkg(system, "--unpack", "/srv/later.deb")
    assert is_active(system) == "inactive", "nothing runs while its files are others'"
    assert session.living() == 4
    dpkg(system, "--force-confdef", "--force-confold", "--configure", "reaperd")
    assert is_active(system) == "active"
    assert json.loads(system.run("reaperctl", "status", "--json").stdout)["version"] == "99.0"
    assert settings.read_text() == '[kill]\ngrace = "3s"\n'
    assert system.path(f"{CONFIG}.dpkg-dist").read_text() == NEW_SETTINGS
    assert 'grace = "3s"' in system.run("reaperctl", "config", "show").stdout

    (after,) = sessions(system)
    assert what_lasts(after) == what_lasts(before)
    assert session.living() == 4
    session.kill_leader()
    assert session.living(within_s=GONE_WITHIN_S) == 0


@pytest.mark.needs_root
def test_removing_it_touches_no_job_and_purging_it_leaves_nothing(bare: BootedSystem) -> None:
    before = made(bare)
    dpkg(bare, "--install", "/srv/first.deb")
    with training(bare, *as_service(), python=PYTHON) as session:
        bare.path("/etc/reaper/reaper.toml.d").mkdir()
        bare.path("/etc/reaper/reaper.toml.d/ours.toml").write_text("[kill]\ngrace = 3\n")
        dpkg(bare, "--remove", "reaperd")
        assert is_active(bare) == "inactive"
        assert bare.run("pgrep", "--full", "reaperd", check=False).stdout == ""
        assert session.living(within_s=0.5) == 4
        bare.run("kill", "-0", str(session.leader))
        kept = made(bare) - before
        assert {CONFIG, "/etc/reaper/reaper.toml.d/ours.toml", DATABASE} <= kept
        assert [path for path in kept if path.startswith("/usr/")] == []

        # The session that was left is known again as soon as there is a daemon.
        dpkg(bare, "--install", "/srv/first.deb")
        assert [one["leader"]["pid"] for one in sessions(bare)] == [session.leader]
        dpkg(bare, "--purge", "reaperd")
        assert session.living(within_s=0.5) == 4
        assert made(bare) - before == set()
    # As with every user that a package makes: its uid must not become somebody else's.
    bare.run("id", "reaper-gate")


@pytest.mark.needs_root
def test_it_and_make_install_do_not_get_into_each_others_way_unsaid(bare: BootedSystem) -> None:
    unit = bare.path("/usr/local/lib/systemd/system/reaperd.service")
    unit.parent.mkdir(parents=True, exist_ok=True)
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    assert "'make uninstall' takes it away" in dpkg(bare, "--install", "/srv/first.deb")
    for target in ("install", "uninstall"):
        done = bare.run("make", "--no-print-directory", "-C", "/srv", target, check=False)
        assert done.returncode == 2
        assert "apt-get remove reaperd first" in done.stderr
    bare.run("id", "reaper-gate")
