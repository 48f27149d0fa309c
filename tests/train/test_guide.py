"""docs/training.md: its examples run as they stand, and say what the page says that they do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
from harness import Scratch, test_environment

import agent

if tuple(map(int, metadata.version("scikit-learn").split(".")[:2])) < (1, 9):
    pytest.skip("scikit-learn has callbacks from 1.9 on", allow_module_level=True)

GUIDE = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(__file__))), "docs", "training.md")


def test_the_examples_of_the_guide_run(run: str, scratch: Scratch) -> None:
    with open(GUIDE, encoding="utf-8") as file:
        blocks = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)
    assert len(blocks) >= 4
    script = "\n".join(blocks)
    wanted = [
        line.rpartition("    # ")[2]
        for line in script.split("\n")
        if line.startswith("print(") and "    # " in line
    ]
    path = scratch.file("guide.py")
    with open(path, "w", encoding="utf-8") as file:
        file.write(script)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", path],
        cwd=scratch.path,
        env=test_environment(run, REAPER_SOCKET="/nonexistent", LOKY_MAX_CPU_COUNT="2"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[: len(wanted)] == wanted
    assert said[-1].startswith("{'estimator__max_depth': ")
    assert agent.read_status(scratch.file("run.json")).state == "completed"
