"""`make install` and `make uninstall` into a directory that stands for a machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make(target: str, stage: Path, *variables: str) -> str:
    """Run ``make target DESTDIR=stage`` and return all that it prints; a failure is an AssertionError with that text."""
    done = subprocess.run(
        ["make", "--no-print-directory", "-C", ROOT, target, f"DESTDIR={stage}", *variables],
        # A make that runs the tests hands its own variables down, PYTHON and VENV among them.
        env={
            key: value
            for key, value in os.environ.items()
            if key not in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
