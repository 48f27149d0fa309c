"""Earlier versions of Reaper, as tests/fixtures keeps them: their agents and daemons run beside those of the tree."""

from __future__ import annotations

import os
import sys
import tarfile

from harness import ROOT, Daemon, Scratch, make_environment

FIXTURES = os.path.join(ROOT, "tests", "fixtures")
PACKAGE = "package.tar.xz"
NAMES = sorted(name for name in os.listdir(FIXTURES) if os.path.isfile(os.path.join(FIXTURES, name, PACKAGE)))


class Version:
    """One of them, unpacked; ``python`` is an interpreter whose ``agent`` and ``reaperd`` are of that version."""

    def __init__(self, name: str, scratch: Scratch) -> None:
        self.name = name
        self.folder = os.path.join(FIXTURES, name)
        root = scratch.directory("v", 0o755)
        with tarfile.open(os.path.join(self.folder, PACKAGE)) as package:
            # Not in each patch release of the Pythons before 3.12; the archive is our own.
            package.extractall(root, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        self.import_path = os.pathsep.join([root, os.path.join(root, "daemon")])
        self.python = make_environment(
            os.path.join(root, "python"), os.path.realpath(sys.executable), self.import_path
        )

    def read(self, name: str) -> bytes:
        """Return a file of the fixture."""
        with open(os.path.join(self.folder, name), "rb") as file:
            return file.read()


class AgedDaemon(Daemon):
    """A daemon of ``version`` (None: the tree's), which may be another one the next time that it is started."""

    version: Version | None = None

    def of(self, version: Version | None) -> AgedDaemon:
        self.version = version
        return self

    def interpreter(self) -> str:
        return super().interpreter() if self.version is None else self.version.python

    def environment(self) -> dict[str, str]:
        found = super().environment()
        return found if self.version is None else {**found, "PYTHONPATH": self.version.import_path}


def environment_of(version: Version | None) -> dict[str, str]:
    """Return what makes a training script import the agent of ``version``."""
    return {} if version is None else {"PYTHONPATH": version.import_path}
