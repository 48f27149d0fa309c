"""Hatchling's hook: what generate.py writes goes into the wheel, and from there below the prefix it is installed in."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface  # type: ignore[import-not-found, unused-ignore]


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg, misc, unused-ignore]
    """Adds man pages and completions to a wheel; an editable install has none."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        self.folder = tempfile.TemporaryDirectory()
        # In a process of its own: the tree's modules are none of the build's.
        generate = Path(self.root, "packaging/pages/generate.py")
        subprocess.run([sys.executable, generate, self.folder.name], check=True)
        for file in sorted(Path(self.folder.name).rglob("*")):
            if file.is_file():
                build_data["shared_data"][str(file)] = str(file.relative_to(self.folder.name))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        if version != "editable":
            self.folder.cleanup()
