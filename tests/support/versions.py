"""Earlier versions of Reaper, as tests/fixtures keeps them: their agents and daemons run beside those of the tree."""

from __future__ import annotations

import os
import sys
import tarfile

from harness import ROOT, SITE_PACKAGES, Daemon, Scratch

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
        self.python = _environment(os.path.join(root, "python"), self.import_path)

    def read(self, name: str) -> bytes:
        """Return a file of the fixture."""
        with open(os.path.join(self.folder, name), "rb") as file:
            return file.read()


def _environment(root: str, import_path: str) -> str:
    """Make a virtual environment: the daemon starts its gate with -I, which takes no PYTHONPATH."""
    home = os.path.dirname(os.path.realpath(sys.executable))
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages, binaries = os.path.join(root, "lib", name, "site-packages"), os.path.join(root, "bin")
    os.makedirs(packages)
    os.mkdir(binaries)
    os.symlink(os.path.realpath(sys.executable), os.path.join(binaries, "python"))
    for path, text in (
        (os.path.join(root, "pyvenv.cfg"), f"home = {home}\n"),
        (os.path.join(packages, "tree.pth"), "\n".join([*import_path.split(os.pathsep), *SITE_PACKAGES])),
    ):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    return os.path.join(binaries, "python")


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
