"""A module that runs in a process of its own finds what its parent finds, and nothing of whoever's folder that runs in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import harness
import pytest

from agent.isolated import run_module

PARENT = """
import json, os, subprocess, sys
from agent.isolated import run_module
there = {"cwd": sys.argv[1], "env": {**os.environ, "PYTHONPATH": sys.argv[1]}}
done = subprocess.run([*run_module("probe", "a", "-b"), "c"], capture_output=True, text=True, **there)
print(done.stdout or json.dumps(done.stderr))
"""
PROBE = """
import json, sys, agent
from agent.isolated import run_module
print(json.dumps([__name__, sys.argv[1:], sys.path, run_module("probe")]))
"""


def test_where_this_process_imports_nothing_of_the_user_s_it_is_plain_isolation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", ["/usr/lib/python"])
    assert run_module("m", "x") == [sys.executable, "-I", "-m", "m", "x"]


def test_what_pip_install_user_has_installed_is_found_and_the_working_directory_is_not(
    tmp_path: Path,
) -> None:
    python = getattr(
        sys, "_base_executable", sys.executable
    )  # a virtual environment has no user's own directory
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    asked = subprocess.run(
        [python, "-c", "import site; print(site.ENABLE_USER_SITE, site.getusersitepackages())"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    enabled, users = asked.stdout.split()
    if enabled != "True":
        pytest.skip("this Python has no user site directory")
    Path(users).mkdir(parents=True)
    Path(users, "probe.py").write_text(PROBE)
    Path(users, "reaper.pth").write_text(f"{harness.ROOT}\n")  # as an editable installation has it
    (hostile := tmp_path / "hostile").mkdir()
    for name in ("probe", "json", "runpy", "site", "agent"):
        (hostile / f"{name}.py").write_text("raise SystemExit('hostile')")
    told = subprocess.run(
        [python, "-c", PARENT, str(hostile)],
        env={**environment, "REAPER_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    name, arguments, path, again = json.loads(told.stdout)
    assert (name, arguments) == ("__main__", ["a", "-b", "c"])
    assert users in path
    assert not {"", ".", str(hostile)} & set(path)
    # Its own children find it as well.
    assert users in again
