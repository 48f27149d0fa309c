"""The Debian package: built by `make deb`, taken apart, and made again under another version."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import staged
from staged import ROOT

BUILD = ROOT / "packaging" / "build-deb"


def why_not() -> str:
    """Return why no package can be built here, empty where one can."""
    if shutil.which("dpkg-deb") is None:
        return "no Debian package can be built here: there is no dpkg"
    done = subprocess.run(["sh", BUILD, "check"], capture_output=True, text=True, check=False)
    return f"no Debian package can be built here: {done.stderr.strip()}" if done.returncode else ""


def build(target: Path) -> tuple[Path, str]:
    """Run `make deb`; return the package, and all that was printed."""
    # The environment that the tests run in is there: it is not to be prepared again.
    environment = (f"BIN={os.path.dirname(sys.executable)}", "STAMP=")
    said = staged.make("deb", Path(), *environment, f"DIST={target}")
    (package,) = target.glob("*.deb")
    return package, said


def rebuild(package: Path, target: Path, version: str, *, default_settings: str) -> Path:
    """Return a package like ``package`` whose program says that it is ``version``, and with other default settings."""
    tree = target / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN/control"
    lines = control.read_text().splitlines()
    control.write_text(
        "\n".join(f"Version: {version}-1" if one.startswith("Version:") else one for one in lines) + "\n"
    )
    (init,) = tree.glob("usr/lib/reaper/lib/python3*/site-packages/reaperd/__init__.py")
    init.write_text(f'__version__ = "{version}"\n')
    for stale in (init.parent / "__pycache__").glob("__init__.*.pyc"):  # is read without a look at the source
        stale.unlink()
    (tree / "etc/reaper/reaper.toml").write_text(default_settings)
    sums = [
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(tree)}"
        for top in ("etc", "usr")
        for path in sorted((tree / top).rglob("*"))
        if path.is_file() and not path.is_symlink()
    ]
    (tree / "DEBIAN/md5sums").write_text("\n".join(sums) + "\n")
    made = target / f"reaperd_{version}-1.deb"
    subprocess.run(
        ["dpkg-deb", "-Znone", "--root-owner-group", "--build", tree, made],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return made
