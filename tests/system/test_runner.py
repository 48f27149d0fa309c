"""``python -m agent SCRIPT``: a script that was not edited is the leader of a session, and notices nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from harness import Daemon, Scratch, test_environment

import agent

SCRIPT = """
import concurrent.futures, json, multiprocessing, os, sys
import helper

def work(x):
    return x * helper.FACTOR

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        done = list(pool.map(work, [1, 2]))
    print(json.dumps({"argv": sys.argv, "file": __file__, "done": done, "lineage": os.environ.get("REAPER_LINEAGE", ""),
                      "name": __name__, "pid": os.getpid()}))
    sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def folder(scratch: Scratch) -> str:
    path = scratch.directory("project")
    for name, text in (("train.py", SCRIPT), ("helper.py", "FACTOR = 3\n"), ("faulty.py", "x = 1\nx / 0\n")):
        with open(os.path.join(path, name), "w", encoding="utf-8") as file:
            file.write(text)
    return path


def python(run: str, folder: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=folder,
        env=test_environment(run, **{"REAPER_SOCKET": "/nonexistent", **env}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("words", [["train.py"], ["-m", "train"]])
def test_a_script_or_module_runs_as_python_would_run_it_but_as_a_leader(
    run: str, folder: str, words: list[str]
) -> None:
    arguments = [*words, "--epochs", "3", "-m", "x"]
    plain, ours = (
        told(python(run, folder, *start, *arguments, CODE="3"))
        for start in ([], ["-m", "agent", "--name", "nightly"])
    )
    assert plain.pop("lineage") == ""
    assert ours.pop("lineage").startswith(f"{ours.pop('pid')}-")
    assert plain.pop("pid")
    if words[0] == "-m":
        assert os.path.basename(plain["argv"].pop(0)) == "train.py"
        ours["argv"].pop(0)
    assert ours == plain
    assert python(run, folder, "-m", "agent", *arguments, CODE="3").returncode == 3


def test_the_daemon_knows_it_by_the_name_it_was_given(run: str, folder: str, daemon: Daemon) -> None:
    python(run, folder, "-m", "agent", "--name", "nightly", "train.py", REAPER_SOCKET=daemon.socket)
    assert daemon.wait_event(kind="registered")["name"] == "nightly"
    python(run, folder, "-m", "agent", "train.py", REAPER_SOCKET=daemon.socket)
    assert daemon.wait_event(kind="registered", name="train.py")["name"] == "train.py"


def test_what_the_script_raises_is_shown_with_its_own_line(run: str, folder: str) -> None:
    done = python(run, folder, "-m", "agent", "faulty.py")
    assert done.returncode == 1
    assert f'File "{folder}/faulty.py", line 2, in <module>' in done.stderr
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "which script?"),
        (["-m"], "-m: which module?"),
        (["missing.py"], "missing.py: No such file or directory"),
        (["--name", "", "train.py"], "name: must have 1 to 200 characters"),
        (["--odd", "train.py"], "unrecognized arguments: --odd"),
    ],
)
def test_wrong_usage_is_a_sentence_and_exit_code_2(
    run: str, folder: str, words: list[str], sentence: str
) -> None:
    done = python(run, folder, "-m", "agent", *words)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_it_is_part_of_what_is_said_to_be_public() -> None:
    assert {"training_session", "ProcessManager", "n_jobs", "limit_workers", "read_status"} <= set(
        agent.__all__
    )
    assert all(getattr(agent, name) is not None for name in agent.__all__)
