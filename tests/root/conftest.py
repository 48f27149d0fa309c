"""One installation and one booted system with it, for all tests of the service: each takes some seconds to make."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import bootedsystem
import installed
import pytest
from bootedsystem import BootedSystem, BootError
from installed import CONFIG, UNIT, Training
from staged import make


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make install` puts into a system, to be copied."""
    stage = tmp_path_factory.mktemp("installation")
    make("install", stage)
    return stage


@pytest.fixture
def stage(installation: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(installation, tmp_path / "stage", symlinks=True))


@pytest.fixture(scope="session")
def system(installation: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedSystem]:
    stage = tmp_path_factory.mktemp("service")
    shutil.copytree(installation, stage, symlinks=True, dirs_exist_ok=True)
    installed.lay(stage)
    try:
        with bootedsystem.boot(stage) as booted:
            installed.prepare(booted)
            yield booted
    except BootError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def settled(system: BootedSystem) -> Iterator[BootedSystem]:
    """The system; when the test is over, the daemon is stopped, remembers nobody and has its settings as they were."""
    config = system.path(CONFIG)
    before = config.read_text()
    yield system
    system.run("systemctl", "stop", UNIT)
    system.run("systemctl", "reset-failed", UNIT, check=False)
    system.run("rm", "-rf", "/var/lib/reaper")
    config.write_text(before)


@pytest.fixture
def unit(settled: BootedSystem) -> BootedSystem:
    """The system with the daemon started."""
    settled.run("systemctl", "start", UNIT)
    return settled


@pytest.fixture
def train(settled: BootedSystem) -> Iterator[Callable[..., Training]]:
    """Start a training of another user's, as a service of the system's unless another way is given."""
    with contextlib.ExitStack() as stack:

        def start(*how: str, words: tuple[str, ...] = ()) -> Training:
            command = how or installed.as_service()
            return stack.enter_context(installed.training(settled, *command, words=words))

        yield start
