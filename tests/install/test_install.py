"""`make install` and `make uninstall`, into a directory that stands for the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from staged import make

FILES = (
    "etc/reaper/reaper.toml",
    "opt/reaper/bin/reaperctl",
    "opt/reaper/bin/reaperd",
    "opt/reaper/share/reaper/reaper.toml",
    "usr/local/lib/systemd/system/reaperd.service",
    "usr/local/lib/systemd/user/reaperd.service",
    "usr/local/lib/sysusers.d/reaper.conf",
    "usr/local/share/bash-completion/completions/reaperctl",
    "usr/local/share/bash-completion/completions/reaperd",
    "usr/local/share/fish/vendor_completions.d/reaperctl.fish",
    "usr/local/share/fish/vendor_completions.d/reaperd.fish",
    "usr/local/share/man/man1/reaperctl.1",
    "usr/local/share/man/man5/reaper.toml.5",
    "usr/local/share/man/man8/reaperd.8",
    "usr/local/share/zsh/site-functions/_reaperctl",
    "usr/local/share/zsh/site-functions/_reaperd",
)


def listing(stage: Path) -> set[str]:
    """Return the files and links below ``stage``, those of the virtual environment's library apart."""
    found = (path.relative_to(stage) for path in stage.rglob("*") if path.is_symlink() or path.is_file())
    return {str(path) for path in found if path.parts[:3] != ("opt", "reaper", "lib")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stage = tmp_path_factory.mktemp("machine")
    make("install", stage)
    return stage


@pytest.fixture
def stage(installed: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(installed, tmp_path / "machine", symlinks=True))


def test_every_file_is_where_it_is_said_to_be(installed: Path) -> None:
    found = listing(installed)
    assert set(FILES) <= found
    outside = {path for path in found if not path.startswith("opt/reaper/")}
    assert outside - set(FILES) == {"usr/local/bin/reaperctl", "usr/local/bin/reaperd"}


def test_the_commands_on_the_path_lead_into_the_prefix(installed: Path) -> None:
    for command in ("reaperd", "reaperctl"):
        assert os.readlink(installed / "usr/local/bin" / command) == f"/opt/reaper/bin/{command}"
        assert (
            "/opt/reaper/bin/python" in (installed / "opt/reaper/bin" / command).read_text().splitlines()[0]
        )


def test_no_installed_file_names_the_place_where_it_was_staged(installed: Path) -> None:
    traces = [
        path
        for path in installed.rglob("*")
        if path.is_file() and not path.is_symlink() and os.fsencode(installed) in path.read_bytes()
    ]
    assert traces == []


def test_the_installed_daemon_runs_from_its_prefix(installed: Path) -> None:
    python = installed / "opt/reaper/bin/python"
    code = "import agent, reaperd, sys; print(agent.__file__, reaperd.__file__, reaperd.__version__)"
    out = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    where_agent, where_reaperd, version = out.split()
    assert where_agent.startswith(f"{installed}/opt/reaper/lib")
    assert where_reaperd.startswith(f"{installed}/opt/reaper/lib")
    assert version


def test_a_changed_configuration_survives_installing_again_and_uninstalling(stage: Path) -> None:
    config = stage / "etc/reaper/reaper.toml"
    config.write_text("[kill]\ngrace = 1\n")
    assert "kept /etc/reaper/reaper.toml" in make("install", stage)
    assert config.read_text() == "[kill]\ngrace = 1\n"
    assert "kept /etc/reaper" in make("uninstall", stage)
    assert listing(stage) == {"etc/reaper/reaper.toml"}


def test_uninstalling_leaves_nothing_but_the_history(stage: Path) -> None:
    history = stage / "var/lib/reaper/reaper.db"
    history.parent.mkdir(parents=True)
    history.write_bytes(b"")
    assert "kept /var/lib/reaper" in make("uninstall", stage)
    assert listing(stage) == {"var/lib/reaper/reaper.db"}
    history.unlink()
    make("uninstall", stage)
    assert listing(stage) == set()
    assert not (stage / "etc/reaper").exists()
    assert not (stage / "var/lib/reaper").exists()


def test_a_prefix_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "opt" / "reaper" / "precious"
    other.parent.mkdir(parents=True)
    other.write_text("")
    for target in ("install", "uninstall"):
        with pytest.raises(AssertionError, match="is left alone"):
            make(target, tmp_path)
    assert other.exists()


def test_another_prefix_and_bindir_reach_the_unit(tmp_path: Path) -> None:
    elsewhere = ("PREFIX=/srv/reaper", "BINDIR=/usr/bin", "LIBDIR=/usr/lib", "DATADIR=/usr/share")
    make("install", tmp_path, *elsewhere)
    unit = (tmp_path / "usr/lib/systemd/system/reaperd.service").read_text()
    assert "\nExecStart=/usr/bin/reaperd\n" in unit
    assert os.readlink(tmp_path / "usr/bin/reaperd") == "/srv/reaper/bin/reaperd"
    page = (tmp_path / "usr/share/man/man1/reaperctl.1").read_text()
    assert page.startswith(".TH REAPERCTL 1 ")
    assert not (tmp_path / "usr/local").exists()
    make("uninstall", tmp_path, *elsewhere)
    assert listing(tmp_path) == set()
